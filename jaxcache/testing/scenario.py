"""A serving loop without a model: requests come, are admitted, run, branch, are aborted, on one or several ranks.

Every rank has the core, the engine and the loop of the product, on a virtual plane with its own delays and faults; all
get the same calls, and tell each other what the product's lanes and reduction carry, one step late. After each step the
digests are equal, and every page that a model step would read has the content it should have.
"""

from __future__ import annotations

import random
from collections import Counter

import numpy as np

from jaxcache.agreement.lanes import Lanes
from jaxcache.components.base import Component
from jaxcache.config import CacheConfig
from jaxcache.core.lease import Lease
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.core.tokens import Namespace, Sequence
from jaxcache.pools.storage_units import cut
from jaxcache.testing.chance import Delays
from jaxcache.testing.page_content import model_step
from jaxcache.testing.request import Request
from jaxcache.testing.simulated_storage import SimulatedStorage
from jaxcache.testing.storage_faults import StorageFaults
from jaxcache.testing.virtual_plane import VirtualPlane
from jaxcache.testing.virtual_rank import STORE_SHARES, Exchange, VirtualRank

TENANTS = ("a", "b", "c")  # whose namespaces these are, where tenants have limits
REMEMBERED = 40
MAX_WIND_DOWN = 2000


class Scenario:
    """waiting, running: requests. finished: token lists to branch from.

    published: what may ever be found, page key -> the key before it
    """

    def __init__(
        self,
        components: tuple[Component, ...],
        config: CacheConfig,
        seed: int,
        mesh_shape: tuple[int, int, int] = (1, 1, 1),
        faults: StorageFaults | None = None,
        delays: Delays | None = None,
    ):
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()  # what only the loop knows
        num_ranks = mesh_shape[0] * mesh_shape[1] * mesh_shape[2]
        self.faults = faults or StorageFaults(seed, num_ranks)
        self.delays = delays or Delays(seed)
        self.cores = [PrefixCache(components, config) for _ in range(num_ranks)]
        components = self.core.components
        self.published: dict[bytes, bytes] = {}
        names = tuple(component.name for component in components)
        self.storage = SimulatedStorage(num_ranks, names, 2 if seed % 4 == 3 else 1, self.published)
        self.planes = [
            VirtualPlane(core, self.storage, rank, self.faults, self.delays) for rank, core in enumerate(self.cores)
        ]
        lanes = Lanes(names, config.max_live_transfers)
        self.exchange = Exchange(dict(zip(("cp", "tp", "pp"), mesh_shape, strict=True)), lanes.num_unanimous)
        share = STORE_SHARES[seed // 2 % len(STORE_SHARES)]
        self.ranks = [
            VirtualRank(core, plane, lanes, num_ranks, share)
            for core, plane in zip(self.cores, self.planes, strict=True)
        ]
        self.agreed: np.ndarray | None = None
        if self.core.tiers.has_host:
            self.attach()
        self.namespaces: list[list[Namespace]] = []
        self.num_namespaces = 2
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.finished: list[tuple[int, list[int]]] = []
        self.weights_version = 0
        self.is_being_cleared = False
        self.cap_chance = 0.1  # of asking for less than what is cached
        self.wish_chance = 0.0  # of inserting with a priority or a retention
        self.read_chance = 0.5  # that the loop asks for new tables before a model step; the old ones are good, too
        self.decode_tokens: tuple[int, ...] = (1,)  # per model step, one of these
        self.chunk_tokens: tuple[int, ...] = (1, config.page_tokens, 1000)  # of a prompt, one of these
        self.insert_chance, self.stop_insert_chance = 0.6, 1.0  # of publishing after a chunk; and where it had to end
        self.max_new_tokens, self.max_output_tokens = 3 * config.page_tokens, 2 * config.page_tokens
        self.elsewhere_chance = 0.4  # that another replica has stored a prompt
        self.prefetch_chance = 0.4  # of asking storage all the same
        self.vocabulary = self.random.choice([2, 3, 50])

    @property
    def core(self) -> PrefixCache:
        """The first rank's; all are equal."""
        return self.cores[0]

    # ---- steps

    def step(self) -> None:
        """Time passes, differently on every rank; outcomes of the step before are agreed, the next ones exchanged."""
        step = self.core.step_number
        if self.agreed is not None:  # nobody goes on before the last one has said its part
            self._all_reach(max(plane.time.now_us for plane in self.planes))
        for plane in self.planes:
            plane.time.advance(plane.time.now_us + self.delays.step_us(plane.rank, step))
        if self.is_being_cleared:
            self.storage.clear()
            self.is_being_cleared = False
        agreed = [None] * len(self.ranks) if self.agreed is None else self.agreed
        self.agreed = self.exchange.reduce([rank.step(row) for rank, row in zip(self.ranks, agreed, strict=True)])
        self._same_digests()

    def _all_reach(self, now_us: int) -> None:
        for plane in self.planes:
            plane.time.advance(now_us)

    def _same_digests(self) -> None:
        digest = self.core.decisions.digest
        for core in self.cores:
            assert core.decisions.digest == digest, f"I8: digests={[core.digest for core in self.cores]}"

    def apply(self) -> None:
        for rank in self.ranks:
            rank.apply()

    # ---- namespaces

    def namespace(self, index: int) -> list[Namespace]:
        while len(self.namespaces) <= index:
            self.namespaces.append(self._new_namespace(len(self.namespaces)))
        return self.namespaces[index]

    def _new_namespace(self, index: int) -> list[Namespace]:
        fields = {"model": "fake", "salt": str(index), "weights_version": str(self.weights_version)}
        if self.core.config.tenants:
            fields["tenant"] = TENANTS[index]
        return [core.new_namespace(**fields) for core in self.cores]

    def retire(self, index: int) -> None:
        """New weights: nothing of the old namespace may be found from now on; who waits or runs in it goes on."""
        self.counts["retired_namespaces"] += 1
        for core, namespace in zip(self.cores, self.namespace(index), strict=True):
            core.retire_namespace(namespace)
        self.weights_version += 1
        self.namespaces[index] = self._new_namespace(index)

    # ---- everything at once

    def reset(self) -> None:
        self.counts["resets"] += 1
        for request in list(self.running):
            self.finish(request)
        for core in self.cores:
            core.reset()

    def forget_device(self) -> None:
        """Those who run are to be admitted again; in a retired namespace they cannot be."""
        self.counts["lost_devices"] += 1
        for rank in self.ranks:
            rank.forget_device()
        for request in reversed(self.running):
            assert all(lease._released for lease in request.leases)
            request.forget_lease()
            if not request.sequences[0].namespace.retired:
                self.waiting.insert(0, request)
        self.running.clear()

    def attach(self) -> None:
        """Storage comes, or comes back."""
        for rank in self.ranks:
            rank.attach()

    def detach(self) -> None:
        """Storage goes, with whatever is in flight."""
        self.counts["detaches"] += 1
        for rank in self.ranks:
            rank.detach()

    def clear_storage(self) -> None:
        """Every rank empties it, the first one now and the last one just before it says its next part."""
        self.counts["cleared_storages"] += 1
        for core in self.cores:
            core.attachment.cleared()
        self.storage.clear()
        self.is_being_cleared = True

    # ---- requests

    def arrive(self, max_tokens: int, seed: int | None = None) -> Request:
        """A new prompt: often a branch of an earlier conversation, inside its prompt or its generated text."""
        rng = self.random if seed is None else random.Random(seed)
        self.counts["arrivals"] += 1
        space, tokens = rng.randrange(self.num_namespaces), []
        if self.finished and rng.random() < 0.9:
            space, earlier = rng.choice(self.finished[-rng.choice([1, 4, 12]) :])
            tokens = earlier[: rng.choice([len(earlier), rng.randint(0, len(earlier))])]
        tokens = tokens[: max_tokens - 2]
        is_stored = rng.random() < self.elsewhere_chance
        num_new = self.max_new_tokens * (2 if is_stored else 1)
        num_new = rng.randint(1, max(1, min(num_new, max_tokens - len(tokens) - 1)))
        tokens = tokens + [rng.randrange(self.vocabulary) for _ in range(num_new)]
        num_output = rng.randint(0, min(self.max_output_tokens, max_tokens - len(tokens)))
        request = Request(tokens, self._sequences(tokens, space), num_output, rng.getrandbits(32))
        if is_stored:
            self._store_elsewhere(request.sequences[0], rng)
        if is_stored or rng.random() < self.prefetch_chance:
            request.prefetch(self.cores)
        self.waiting.append(request)
        return request

    def arrive_again(self, request: Request, seed: int) -> None:
        """Somebody else has the same prompt, at the same time: their prefetches are one."""
        self.counts["arrivals"] += 1
        sequences = self._sequences(request.tokens, request.space)
        twin = Request(list(request.tokens), sequences, request.num_output, seed)
        twin.prefetch(self.cores)
        self.waiting.append(twin)

    def _sequences(self, tokens: list[int], space: int) -> list[Sequence]:
        return [
            core.sequence(tokens, namespace) for core, namespace in zip(self.cores, self.namespace(space), strict=True)
        ]

    def _store_elsewhere(self, sequence: Sequence, rng: random.Random) -> None:
        """Another replica has served this prompt and stored most of it."""
        num_ranks, step = len(self.ranks), self.core.step_number
        keys = self._publish(sequence, sequence.num_tokens)
        for c, component in enumerate(self.core.components):
            unit = self.core.config.unit_pages(component.name) if component.is_paged else 1
            for pages in cut(range(len(keys)), unit):
                missing = rng.randrange(20 * num_ranks)
                for rank in range(num_ranks):
                    if rank != missing:
                        is_torn = self.faults.of_call(rank, step, "put", keys[pages[-1]]) == "torn"
                        self.storage.put_pages(rank, c, keys[pages.start : pages.stop], is_torn)

    def _publish(self, sequence: Sequence, num_tokens: int) -> list[bytes]:
        """The keys of the whole pages up to there, which may be found from now on."""
        keys = sequence.page_keys(num_tokens // self.core.config.page_tokens)
        self.published.update(zip(keys, [sequence.namespace.digest, *keys], strict=False))
        return keys

    def admit(self, request: Request) -> bool:
        """Admits a waiting request on every rank; a Wait changes nothing."""
        digest, rng = self.core.digest, request.random
        chunk = rng.choice(self.chunk_tokens)
        cap = None if rng.random() >= self.cap_chance else rng.randint(0, len(request.tokens))
        found = self.core.match(request.sequences[0], cap).num_tokens
        chunk = min(chunk, len(request.tokens) - found)
        answers = [
            core.admit(sequence, chunk, ticket, cap)
            for core, sequence, ticket in zip(self.cores, request.sequences, request.tickets, strict=True)
        ]
        leases = [answer for answer in answers if isinstance(answer, Lease)]
        if not leases:
            assert self.core.digest == digest, "A1: a Wait changed something"
            return False
        assert len(leases) == len(self.cores), "R: ranks disagree about an admission"
        self.waiting.remove(request)
        self.running.append(request)
        request.leases = leases
        request.num_computed = leases[0].num_cached_tokens
        self._check_published(request, request.num_computed)
        return True

    def _check_published(self, request: Request, num_tokens: int) -> None:
        """The simple model: a dictionary of all prefixes that were ever published or stored."""
        for key in request.sequences[0].page_keys(num_tokens // self.core.config.page_tokens):
            assert key in self.published, "found what nobody published"

    def run(self, request: Request) -> None:
        """One model step of one request: reads everything that resuming needs, writes the chunk; then insert, grow."""
        lease, rng = request.leases[0], request.random
        if self.core.step_number < lease.first_step or not self.core.plan_is_applied():
            return
        begin = request.num_computed
        stop = lease.next_stop
        end = min(len(request.tokens), lease.num_tokens, stop if stop is not None else lease.num_tokens)
        if end > begin:
            self._model_step(request, begin, end)
        is_finished = end == len(request.tokens) and not request.num_output
        if rng.random() < (self.stop_insert_chance if end == stop else self.insert_chance) or is_finished:
            self.insert(request)
        if is_finished:
            self._check_resumable(request)
            self.finish(request)
            return
        if end == len(request.tokens):
            num_new = min(request.num_output, rng.choice(self.decode_tokens))
            request.extend([rng.randrange(self.vocabulary) for _ in range(num_new)])
        self._grow(request)

    def _model_step(self, request: Request, begin: int, end: int) -> None:
        step = model_step(self.core, request.sequences[0], begin, end)
        if request.random.random() < self.read_chance:
            for core, lease in zip(self.cores, request.leases, strict=True):
                core.tables_were_read([lease])
            if not self.core.config.stable_tables:
                request.tables.clear()
        for plane, lease, tables in zip(self.planes, request.leases, request.grown_tables(), strict=True):
            plane.model_step(lease, step, tables)
        request.num_computed = end
        request.written.append(end)

    def _grow(self, request: Request) -> None:
        room = request.random.choice(self.chunk_tokens)
        room = min(room, len(request.tokens) - request.num_computed)
        pairs = zip(self.cores, request.leases, strict=True)
        grown = [core.grow(lease, request.num_computed, room) for core, lease in pairs]
        if not all(grown):
            assert not any(grown), "R: ranks disagree about the room for a request"
            self.retract(request)

    def insert(self, request: Request) -> None:
        priority = retain_steps = 0
        if request.random.random() < self.wish_chance:
            priority, retain_steps = request.random.choice([0, 1, 5]), request.random.choice([0, 1, 5, 30])
        states = [end for end in request.written if end in request.leases[0].checkpoints]
        request.written.clear()
        for core, lease in zip(self.cores, request.leases, strict=True):
            core.insert(lease, request.num_computed, states=states, priority=priority, retain_steps=retain_steps)
        self._publish(request.sequences[0], request.num_computed)
        if states:
            self._check_state(request, states[-1])

    def _check_state(self, request: Request, position: int) -> None:
        """What was reported of the last grid point is where the next turn resumes. (Quotas may take it at once.)"""
        core, lease = self.core, request.leases[0]
        grid = core.tiers.grid_tokens
        is_last = position == request.num_computed // grid * grid <= lease._published
        namespace = lease.sequence.namespace
        if is_last and core.config.caching and not namespace.retired and core.tiers.tenants is None:
            found = core.match(core.sequence([*request.tokens[:position], 0], namespace)).num_tokens
            assert found == position, f"N7: {found=}, although the state at {position} was reported"

    def _check_resumable(self, request: Request) -> None:
        """Without recurrent states, a conversation that was published whole can be resumed at its last whole page."""
        core, lease = self.core, request.leases[0]
        page = core.config.page_tokens
        whole = request.num_computed // page * page
        namespace = lease.sequence.namespace
        if core.kinds.state is None and lease._published == whole and core.config.caching and not namespace.retired:
            again = core.sequence([*request.tokens, 0], namespace)
            assert core.match(again).num_tokens >= whole, f"A4: not resumable at {whole}"

    def retract(self, request: Request) -> None:
        """A running request gives its room back, and waits to be admitted again before all others (A6)."""
        self.counts["retractions"] += 1
        self._release(request)
        if not request.sequences[0].namespace.retired:
            self.waiting.insert(0, request)

    def finish(self, request: Request) -> None:
        """Ends a running request, finished or aborted."""
        self._release(request)
        self.finished.append((request.space, request.tokens))
        del self.finished[:-REMEMBERED]

    def _release(self, request: Request) -> None:
        for core, lease in zip(self.cores, request.leases, strict=True):
            core.release(lease)
        for rank in self.ranks:
            if not rank.core.leases:
                rank.engine.serves(False)
        request.forget_lease()
        self.running.remove(request)

    def cancel(self, request: Request) -> None:
        """Its prefetch, while it waits."""
        self.counts["cancels_in_flight"] += request.has_running_prefetch
        request.cancel(self.cores)

    def give_up(self, request: Request) -> None:
        """Aborts a waiting request and its prefetch."""
        self.cancel(request)
        self.waiting.remove(request)

    # ---- the end

    def wind_down(self) -> None:
        """Ends everything, and waits until every transfer is quiet."""
        for request in list(self.running):
            self.finish(request)
        for request in list(self.waiting):
            self.give_up(request)
        self.apply()
        for _ in range(MAX_WIND_DOWN):
            self.step()
            self.apply()
            if not (self.core.needs_exchange() or self.core.is_busy() or self.core.stores.is_waiting):
                break
        else:
            raise AssertionError(f"after {MAX_WIND_DOWN} more steps transfers {self.core.live_transfers()} go on")
        self.step()
        live = [rank.engine.storage_io.live for rank in self.ranks]
        assert not any(live), "a transfer has ended that its rank goes on with"
        for rank in self.ranks:
            rank.check_failures()
        self._check_accounts()

    def _check_accounts(self) -> None:
        """I12: every agreed storage-hit token was used, or is unfulfilled for one reason."""
        counters = self.core.counters
        resolved = sum(count for name, count in counters.items() if name.startswith("unfulfilled_"))
        resolved += counters["storage_tokens_used"]
        assert resolved == counters["agreed_storage_tokens"], f"I12: {resolved=} of {counters['agreed_storage_tokens']}"
