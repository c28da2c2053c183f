"""A serving loop without a model: requests come, are admitted, run, branch, are aborted, on one or several ranks.

Every rank has the real core and its own fake data plane with its own delays and faults; all get the same calls. After
each step the digests are equal, and every page that a model step would read has the content it should have.
"""

from __future__ import annotations

import random

from jaxcache.components.base import Component
from jaxcache.config import CacheConfig
from jaxcache.core.lease import Lease
from jaxcache.core.page_hash import Namespace
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.core.sequence import Sequence
from jaxcache.core.ticket import Ticket
from jaxcache.testing.fake_plane import Content, FakePlane, content, reduce
from jaxcache.types import Outcome

TENANTS = ("a", "b")  # whose namespaces these are, where tenants have limits


class Request:
    """One request on every rank."""

    def __init__(self, tokens: list[int], sequences: list[Sequence], tickets: list[Ticket | None], num_output: int):
        self.tokens = tokens
        self.sequences = sequences
        self.tickets = tickets
        self.num_output = num_output
        self.leases: list[Lease] = []
        self.num_computed = 0


class Scenario:
    """waiting, running: requests. finished: token lists to branch from. published: what may ever be found."""

    def __init__(self, components: tuple[Component, ...], config: CacheConfig, seed: int, num_ranks: int = 1):
        self.random = random.Random(seed)
        self.cores = [PrefixCache(components, config) for _ in range(num_ranks)]
        storages: list[dict[Content, None]] = [{} for _ in range(num_ranks)]
        pairs = enumerate(zip(self.cores, storages, strict=True))
        self.planes = [FakePlane(core, storage, seed * 97 + rank) for rank, (core, storage) in pairs]
        for core in self.cores:
            if core.tiers.has_host:
                core.attachment.attach()
        self.namespaces: list[list[Namespace]] = []
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.finished: list[tuple[int, list[int]]] = []
        self.published: dict[Content, None] = {}
        self.previous: dict[int, Outcome] = {}
        self.weights_version = 0
        self.cap_chance = 0.1  # of asking for less than what is cached
        self.wish_chance = 0.0  # of inserting with a priority or a retention
        self.wishes = random.Random(seed + 1)
        self.vocabulary = self.random.choice([2, 3, 50])

    @property
    def core(self) -> PrefixCache:
        """The first rank's; all are equal."""
        return self.cores[0]

    # ---- steps

    def step(self) -> None:
        """Storage moves on, the outcomes of the step before are agreed, the plan is applied."""
        for plane in self.planes:
            plane.work(plane.random.choice([0, 1, 2, 5, 50]))
        for core in self.cores:
            core.commit(self.previous)
        self.previous = reduce([plane.outcomes() for plane in self.planes])
        self._same_digests()

    def _same_digests(self) -> None:
        digests = [core.digest for core in self.cores]
        assert len(set(digests)) == 1, f"I8: {digests=}"

    def apply(self) -> None:
        for plane in self.planes:
            plane.apply()

    # ---- requests

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
        for core, namespace in zip(self.cores, self.namespace(index), strict=True):
            core.retire_namespace(namespace)
        self.weights_version += 1
        self.namespaces[index] = self._new_namespace(index)

    # ---- everything at once

    def reset(self) -> None:
        for request in list(self.running):
            self.finish(request)
        for core in self.cores:
            core.reset()

    def drop_device(self) -> None:
        for request in list(self.running):
            self.finish(request)
        for core, plane in zip(self.cores, self.planes, strict=True):
            core.drop_device()
            plane.lose_device()

    def arrive(self, max_tokens: int) -> None:
        """A new prompt: often a branch of an earlier conversation, inside its prompt or its generated text."""
        rng = self.random
        space, tokens = rng.randrange(2), []
        if self.finished and rng.random() < 0.9:
            space, earlier = rng.choice(self.finished[-rng.choice([1, 4, 12]) :])
            tokens = earlier[: rng.choice([len(earlier), rng.randint(0, len(earlier))])]
        page = self.core.config.page_tokens
        tokens = tokens[: max_tokens - 2]
        num_new = rng.randint(1, max(1, min(3 * page, max_tokens - len(tokens) - 1)))
        tokens = tokens + [rng.randrange(self.vocabulary) for _ in range(num_new)]
        pairs = zip(self.cores, self.namespace(space), strict=True)
        sequences = [core.sequence(tokens, namespace) for core, namespace in pairs]
        if rng.random() < 0.4:
            self._store_elsewhere(sequences[0])
        tickets: list[Ticket | None] = [None] * len(self.cores)
        if rng.random() < 0.6:
            tickets = [core.prefetch(seq) for core, seq in zip(self.cores, sequences, strict=True)]
        self.waiting.append(Request(tokens, sequences, tickets, rng.randint(0, 2 * page)))

    def _store_elsewhere(self, sequence: Sequence) -> None:
        """Another replica has served this prompt and stored most of it."""
        page = sequence.page_bytes // 4
        for plane in self.planes:
            for end in range(page, sequence.num_tokens + 1, page):
                for component in self.core.components:
                    if plane.random.random() < 0.98:
                        self.published[content(component.name, sequence, end)] = None
                        plane.storage[content(component.name, sequence, end)] = None

    def admit(self, request: Request) -> bool:
        """Admits a waiting request on every rank; a Wait changes nothing."""
        digest = self.core.digest
        chunk = self.random.choice([1, self.core.config.page_tokens, 1000])
        cap = None if self.random.random() >= self.cap_chance else self.random.randint(0, len(request.tokens))
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
        backbone = self.core.components[self.core.tiers.full or 0].name
        page = self.core.config.page_tokens
        for end in range(page, num_tokens + 1, page):
            assert content(backbone, request.sequences[0], end) in self.published, "found what nobody published"

    def run(self, request: Request) -> None:
        """One model step of one request: reads everything that resuming needs, writes the chunk; then insert, grow."""
        lease = request.leases[0]
        if self.core.step_number < lease.first_step or not self.core.plan_is_applied():
            return
        begin = request.num_computed
        stop = lease.next_stop
        end = min(len(request.tokens), lease.num_tokens, stop if stop is not None else lease.num_tokens)
        if end > begin:
            for plane, each in zip(self.planes, request.leases, strict=True):
                plane.model_step(each, begin, end)
            request.num_computed = end
        finished = end == len(request.tokens) and not request.num_output
        if self.random.random() < 0.6 or finished or end == stop:
            self.insert(request)
        if finished:
            self._check_resumable(request)
            self.finish(request)
            return
        if end == len(request.tokens):
            request.num_output -= 1
            token = self.random.randrange(self.vocabulary)
            request.tokens.append(token)
            for sequence in request.sequences:
                sequence.extend([token])
        self._grow(request)

    def _grow(self, request: Request) -> None:
        room = min(
            self.random.choice([1, self.core.config.page_tokens, 1000]), len(request.tokens) - request.num_computed
        )
        pairs = zip(self.cores, request.leases, strict=True)
        grown = [core.grow(lease, request.num_computed, room) for core, lease in pairs]
        if not all(grown):
            self.finish(request)  # retracted

    def insert(self, request: Request) -> None:
        priority = retain_steps = 0
        if self.wishes.random() < self.wish_chance:
            priority, retain_steps = self.wishes.choice([0, 1, 5]), self.wishes.choice([0, 1, 5, 30])
        for core, lease in zip(self.cores, request.leases, strict=True):
            core.insert(lease, request.num_computed, priority=priority, retain_steps=retain_steps)
        page = self.core.config.page_tokens
        for end in range(page, request.num_computed + 1, page):
            for component in self.core.components:
                self.published[content(component.name, request.sequences[0], end)] = None

    def _check_resumable(self, request: Request) -> None:
        """Without recurrent states, a conversation that was published whole can be resumed at its last whole page."""
        core, lease = self.core, request.leases[0]
        page = core.config.page_tokens
        whole = request.num_computed // page * page
        namespace = lease.sequence.namespace
        if core.tiers.point is None and lease._published == whole and core.config.caching and not namespace.retired:
            again = core.sequence([*request.tokens, 0], namespace)
            assert core.match(again).num_tokens >= whole, f"A4: not resumable at {whole}"

    def finish(self, request: Request) -> None:
        """Releases a running request: finished, aborted or retracted."""
        for core, lease in zip(self.cores, request.leases, strict=True):
            core.release(lease)
        self.running.remove(request)
        self.finished.append((int(request.sequences[0].namespace.fields["salt"]), request.tokens))
        del self.finished[:-40]

    def give_up(self, request: Request) -> None:
        """Aborts a waiting request and its prefetch."""
        for core, ticket in zip(self.cores, request.tickets, strict=True):
            if ticket is not None:
                core.cancel(ticket)
        self.waiting.remove(request)

    def wind_down(self) -> None:
        """Ends everything, and waits until every transfer is quiet."""
        for request in list(self.running):
            self.finish(request)
        for request in list(self.waiting):
            self.give_up(request)
        self.apply()
        for _ in range(500):
            self.step()
            self.apply()
            if not (self.core.live_transfers() or self.core.is_busy() or self.core.stores.is_waiting):
                break
        self.step()
        self._check_accounts()

    def _check_accounts(self) -> None:
        """I12: every agreed storage-hit token was used, or is unfulfilled for one reason."""
        counters = self.core.counters
        resolved = sum(count for name, count in counters.items() if name.startswith("unfulfilled_"))
        resolved += counters["storage_tokens_used"]
        assert resolved == counters["agreed_storage_tokens"], f"I12: {resolved=} of {counters['agreed_storage_tokens']}"
