"""A small cache to try one behaviour on: `Server` computes prompts on a virtual plane that checks what it reads."""

from __future__ import annotations

from typing import Any

from jaxcache.agreement.lanes import Lanes
from jaxcache.components import FullAttention, RecurrentState, SlidingWindow
from jaxcache.components.base import Component
from jaxcache.config import CacheConfig
from jaxcache.core import invariants
from jaxcache.core.lease import Lease
from jaxcache.core.prefetch import Ticket
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.core.tokens import Namespace, Sequence
from jaxcache.testing.chance import Delays
from jaxcache.testing.page_content import model_step
from jaxcache.testing.simulated_storage import SimulatedStorage
from jaxcache.testing.storage_faults import StorageFaults
from jaxcache.testing.virtual_plane import VirtualPlane
from jaxcache.testing.virtual_rank import Exchange, VirtualRank
from jaxcache.types import Match, Transfer, TransferKind, Wait

PAGE = 4
FULL = FullAttention("full", ())
PAGE_US = 1000
DELAYS = Delays(
    copies=(0, 1), queries=(0, 1), pages=(PAGE_US, PAGE_US), deadline_us=10**12, piece_pages=1, num_threads=1
)
NEXT = 1_000_000  # a token that follows every prompt, so that the whole prompt may be found


def window(window_tokens: int, name: str = "window") -> SlidingWindow:
    return SlidingWindow(name, (), window_tokens=window_tokens)


def state(chunk_tokens: int = 1) -> RecurrentState:
    return RecurrentState("state", (), chunk_tokens=chunk_tokens)


def prompt(num_tokens: int, first: int = 0) -> list[int]:
    """Tokens that no other `first` (a multiple of 1000) has."""
    return list(range(first, first + num_tokens))


def make_core(*components: Component, **fields: Any) -> PrefixCache:
    defaults = {"page_tokens": PAGE, "device_pages": 32, "prefetch_min_tokens": 1}
    return PrefixCache(components or (FULL,), CacheConfig(**{**defaults, **fields}))


class Server:
    """One rank of a fleet, on a plane without faults, with one namespace. Checks the invariants after each call."""

    def __init__(self, *components: Component, **fields: Any):
        self.core = make_core(*components, **fields)
        names = tuple(component.name for component in self.core.components)
        self.storage = SimulatedStorage(1, names)
        self.plane = VirtualPlane(self.core, self.storage, 0, StorageFaults(), DELAYS)
        self.rank = VirtualRank(self.core, self.plane, Lanes(names, self.core.config.max_live_transfers), 2)
        self.namespace = self.core.new_namespace(model="test")
        self.agreed: Any = None
        self.chunk_ends: dict[int, list[int]] = {}  # by lease id: where model steps ended

    def sequence(self, tokens: list[int], namespace: Namespace | None = None) -> Sequence:
        return self.core.sequence(tokens, namespace or self.namespace)

    def match(self, tokens: list[int], namespace: Namespace | None = None) -> Match:
        """Of a prompt that goes on after `tokens`."""
        return self.core.match(self.sequence([*tokens, NEXT], namespace))

    def planned(self, kind: TransferKind) -> list[Transfer]:
        return [transfer for transfer in self.core.outbox.transfers if transfer.kind is kind]

    def free(self, component: str = "full") -> int:
        return self._residency(self.core.tiers.device, component).allocator.num_free

    def host_free(self, component: str = "full") -> int:
        return self._residency(self.core.tiers.host, component).allocator.num_free

    @staticmethod
    def _residency(residencies, component: str):
        return next(residency for residency in residencies if residency.component.name == component)

    # ---- steps

    def step(self, num_storage_pages: int = 1000) -> None:
        """The plan is applied, each transfer moves so many pages, and the outcomes of the step before are agreed."""
        self.agreed = step_all([self], self.agreed, num_storage_pages)

    def settle(self) -> None:
        """Steps until no transfer is live or queued."""
        self.step()
        while self.core.needs_exchange() or self.core.stores.is_waiting or self.core.admission.loading:
            self.step()

    def check(self) -> None:
        invariants.check(self.core)

    def check_empty(self) -> None:
        """I10: everything can be had back."""
        self.settle()
        invariants.check_empty(self.core)

    # ---- requests

    def try_admit(self, tokens: list[int] | Sequence, chunk: int | None = None, **options: Any) -> Lease | Wait:
        """Room for the whole prompt unless a chunk is given."""
        sequence = tokens if isinstance(tokens, Sequence) else self.sequence(tokens)
        cached = self.core.match(sequence, options.get("max_cached_tokens")).num_tokens
        answer = self.core.admit(sequence, chunk or sequence.num_tokens - cached, **options)
        self.check()
        return answer

    def admit(self, tokens: list[int] | Sequence, chunk: int | None = None, **options: Any) -> Lease:
        lease = self.try_admit(tokens, chunk, **options)
        assert isinstance(lease, Lease), lease
        return lease

    def compute(self, lease: Lease, end: int) -> None:
        """Model steps up to `end`, with chunks that end where the lease says."""
        while self.core.step_number < lease.first_step:
            self.step()
        begin = lease.num_computed
        while begin < end:
            self.rank.apply()
            stop = lease.next_stop
            chunk_end = min(end, lease.num_tokens, end if stop is None else stop)
            self.plane.model_step(lease, model_step(self.core, lease.sequence, begin, chunk_end))
            self.chunk_ends.setdefault(lease.id, []).append(chunk_end)
            if chunk_end < end:
                assert self.core.grow(lease, chunk_end, end - chunk_end)
            begin = chunk_end
        self.check()

    def insert(self, lease: Lease, num_computed: int, **options: Any) -> None:
        """With all states that were made on the way."""
        ends = self.chunk_ends.get(lease.id, [])
        self.core.insert(lease, num_computed, states=[end for end in ends if end in lease.checkpoints], **options)
        self.check()

    def release(self, lease: Lease) -> None:
        self.core.release(lease)
        self.check()

    def decode(self, lease: Lease, tokens: list[int]) -> None:
        """Tokens one by one, as a serving loop would: each is computed in a step of its own."""
        for token in tokens:
            computed = lease.sequence.num_tokens
            lease.sequence.extend([token])
            assert self.core.grow(lease, computed, 1)
            self.compute(lease, computed + 1)
            self.insert(lease, computed + 1)

    def prefill(self, tokens: list[int] | Sequence, **options: Any) -> int:
        """Admit, compute, insert, release. Returns how many tokens were cached."""
        lease = self.admit(tokens, **options)
        self.compute(lease, lease.sequence.num_tokens)
        self.insert(lease, lease.sequence.num_tokens)
        self.release(lease)
        return lease.num_cached_tokens

    def flush_device(self) -> None:
        """Another prompt, soon aborted, pushes everything unpinned off the device, but for states."""
        paged = [kind.device for kind in self.core.kinds if kind is not self.core.kinds.state]
        full_pages = min(device.available() for device in paged)
        lease = self.admit(prompt(full_pages * PAGE, 900_000))
        self.release(lease)
        self.rank.apply()

    # ---- storage

    def store(self, tokens: list[int]) -> None:
        """Another replica has stored every page, window and state of this prompt."""
        for key in self.sequence(tokens).page_keys(len(tokens) // PAGE):
            for c in range(len(self.core.components)):
                self.storage.put_pages(0, c, [key])

    def prefetch(self, tokens: list[int]) -> Ticket:
        ticket = self.core.prefetch(self.sequence([*tokens, NEXT]))
        assert ticket is not None, self.core.counters
        self.check()
        return ticket


def server_with_storage(*components: Component, **fields: Any) -> Server:
    server = Server(*components, **{"host_pages": 64, "prefetch_host_share": 1.0, **fields})
    server.rank.attach()
    return server


def step_all(servers: list[Server], agreed: Any = None, num_storage_pages: int = 1000) -> Any:
    """One step of servers that are ranks of one fleet. agreed: what the step before returned."""
    rows = []
    for server, row in zip(servers, [None] * len(servers) if agreed is None else agreed, strict=True):
        server.rank.apply()
        time = server.plane.time
        time.advance(time.now_us + num_storage_pages * PAGE_US)
        rows.append(server.rank.step(row))
        server.rank.apply()
        server.check()
    assert len({server.core.digest for server in servers}) == 1
    return Exchange({"cp": len(servers), "tp": 1, "pp": 1}, servers[0].rank.lanes.num_unanimous).reduce(rows)
