"""What the engine needs of devices, threads and clocks, without any: rows that say what they stand for, virtual time.

    gather   the rows are taken NOW ------ later ------> host pages
    load     host pages ------------------ later ------> rows, scattered by an apply of a later step
    workers  jobs in virtual time; a call of storage takes as long as `RankStorage.begin` says

Copies end in any order, at any time. Every read of a model step checks the content, so a page that was freed too early,
reused, or loaded to the wrong place is found at the first read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import ceil

import numpy as np

from jaxcache.core.lease import Lease
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.engine.effects import Effects, Loading, Pools
from jaxcache.engine.jobs import Job, Pause, Steps
from jaxcache.pools.cells import Part, Share
from jaxcache.testing.chance import Delays, mix
from jaxcache.testing.page_content import GARBAGE_BYTE, RANK, ROW_BYTES, ModelStep
from jaxcache.testing.simulated_storage import RankStorage, SimulatedStorage
from jaxcache.testing.storage_faults import StorageFaults
from jaxcache.testing.virtual_time import VirtualTime, VirtualWorkers
from jaxcache.types import CLOCK_MODULUS, PageIds

MAX_PAGES = 3  # of one copy
COPIES_AT_ONCE = 64  # so many that none waits for another's worker
COMPONENT_BYTE = 12  # of a row; no component has the number GARBAGE_BYTE
CALL_S = 1e-4  # of processor time, that a call of storage takes
NOTHING = nullcontext()


class VirtualPlane(Effects):
    """Of one rank.

    device, host: by component, uint8[num_pages, ROW_BYTES]
    num_waits:    how often it waited for a copy
    """

    max_pages = MAX_PAGES

    def __init__(self, core: PrefixCache, shared: SimulatedStorage, rank: int, faults: StorageFaults, delays: Delays):
        self.core, self.rank, self.delays = core, rank, delays
        self.time = VirtualTime()
        self.storage = RankStorage(shared, rank, faults, delays)
        self.numbers = {component.name: c for c, component in enumerate(core.components)}
        tiers = core.tiers
        self.device = [_garbage(residency.allocator.num_pages) for residency in tiers.device]
        self.host = [_garbage(residency.allocator.num_pages) for residency in tiers.host]
        self.pools: Pools = dict(zip(self.numbers, self.device, strict=True))
        self.page_bytes = dict.fromkeys(self.numbers, ROW_BYTES)
        self.num_waits = 0
        self._origin_ms = mix(delays.seed, rank, 1) % CLOCK_MODULUS
        self._drift = 0.98 + mix(delays.seed, rank, 2) % 1000 / 25_000

    def parts(self) -> dict[str, Part]:
        """Host memory, as it is stored."""
        cells, unit = self.storage.shared.cells[self.rank], self.core.config.unit_pages
        return {name: Part(name, (Share(self.host[c], cells),), unit(name)) for name, c in self.numbers.items()}

    # ---- copies

    def gather(self, pools: Pools, component: str, src: PageIds, dst: PageIds, is_free: bool) -> Sequence[Steps]:
        rows, host, first = pools[component][src], self.host[self.numbers[component]], int(dst[0])
        step = self.core.step_number
        if is_free and self.delays.copies_at_once(self.rank, step, first):
            host[dst] = rows
            return ()
        return [_to_host(rows, host, dst, self.delays.copy_us(self.rank, step, first))]

    def load(self, pools: Pools, component: str, src: PageIds, dst: PageIds, is_free: bool) -> Loading:
        host, first, step = self.host[self.numbers[component]], ~int(src[0]), self.core.step_number
        staged = _garbage(len(src))
        if is_free and self.delays.copies_at_once(self.rank, step, first):
            staged[:] = host[src]
            self.scatter(pools, component, dst, staged)
            return Loading(())
        return Loading([_from_host(host, src, staged, self.delays.copy_us(self.rank, step, first))], staged)

    def scatter(self, pools: Pools, component: str, dst: PageIds, staged: np.ndarray) -> None:
        is_written = staged[:, COMPONENT_BYTE] != GARBAGE_BYTE
        assert is_written.all(), f"rank {self.rank}: a load-back of {component} read a host page that was not written"
        pools[component][dst] = staged

    def forget_device(self) -> None:
        for rows in self.device:
            rows[:] = GARBAGE_BYTE

    # ---- time

    def workers(self, name: str, num_workers: int, niceness: int) -> VirtualWorkers:
        return VirtualWorkers(self.time, COPIES_AT_ONCE if name == "jaxcache-copy" else num_workers, self._duration_us)

    def _duration_us(self, pause: Pause) -> int:
        rest_us = ceil(pause.rest_s * 1e6)  # not less, or a rest that is almost over would never be
        return rest_us + self.storage.begin(pause) if pause.call else rest_us

    def wait(self, job: Job) -> None:
        if not job.done():
            self.num_waits += 1
            self.time.wait(job)

    def now(self) -> float:
        """Of any origin, and up to 2 % fast or slow."""
        return (self._origin_ms + self.time.now_us / 1000 * self._drift) / 1000

    def thread_s(self) -> float:
        return self.storage.num_calls * CALL_S

    def trace(self, name: str) -> AbstractContextManager[object]:
        return NOTHING

    def at_exit(self, end: Callable[[], list[threading.Thread]]) -> None:
        pass

    def ends_at_exit(self) -> bool:
        return False

    # ---- the model's side

    def model_step(self, lease: Lease, step: ModelStep, tables: Mapping[str, np.ndarray] | None = None) -> None:
        """Computes the next tokens of a lease: reads everything that resuming needs, writes the chunk.

        tables: those that the loop has; None: the present ones
        """
        tables = tables or lease.page_tables
        for c, first, pages in step.reads:
            self._read(c, tables[self.core.components[c].name][first : first + len(pages)], pages)
        for c, first, pages in step.writes:
            self._write(c, tables[self.core.components[c].name][first : first + len(pages)], pages)
        if step.state_after is not None:
            self._state_step(lease, step, step.state_after)

    def _state_step(self, lease: Lease, step: ModelStep, after: bytes) -> None:
        kind = self.core.kinds.state
        assert kind is not None and lease.write_slot is not None
        c = kind.c
        if step.state_before is not None:
            slot = lease.read_slot if step.begin == lease.num_cached_tokens else lease.write_slot
            assert slot is not None
            self._read(c, np.array([slot]), [step.state_before])
        slots = [lease.write_slot, *([lease.checkpoints[step.end]] if step.end in lease.checkpoints else [])]
        self._write(c, np.array(slots), [after] * len(slots))

    def _write(self, c: int, page_ids: np.ndarray, pages: list[bytes]) -> None:
        suffix = RANK[self.rank]
        rows = b"".join([page + suffix for page in pages[: len(page_ids)]])
        self.device[c][page_ids] = np.frombuffer(rows, np.uint8).reshape(-1, ROW_BYTES)

    def _read(self, c: int, page_ids: np.ndarray, pages: list[bytes]) -> None:
        suffix = RANK[self.rank]
        expected = [page + suffix for page in pages]
        found = self.device[c][page_ids].tobytes()
        if found != b"".join(expected):
            there = [found[i * ROW_BYTES : (i + 1) * ROW_BYTES] for i in range(len(page_ids))]
            where = next(i for i, row in enumerate(expected) if i >= len(there) or there[i] != row)
            name = self.core.components[c].name
            raise AssertionError(
                f"rank {self.rank}: a model step read page {where} of {len(expected)} of {name}, "
                f"id {page_ids[where : where + 1]}: {there[where : where + 1]}, {expected[where]} should be there"
            )


def _garbage(num_pages: int) -> np.ndarray:
    return np.full((num_pages, ROW_BYTES), GARBAGE_BYTE, np.uint8)


def _to_host(rows: np.ndarray, host: np.ndarray, dst: PageIds, us: int) -> Steps:
    """The host pages are garbage from when it begins until it ends."""
    host[dst] = GARBAGE_BYTE
    yield Pause(us / 1e6)
    host[dst] = rows


def _from_host(host: np.ndarray, src: PageIds, staged: np.ndarray, us: int) -> Steps:
    yield Pause(us / 1e6)
    staged[:] = host[src]
