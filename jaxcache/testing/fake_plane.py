"""A data plane of one rank without devices: page id -> row, a function of what the page stands for.

    apply   scatter what earlier steps loaded, once it is there; then the plan, in order:
            BACKUP     the rows are taken NOW ------ later ------> host pages
            LOAD_BACK  host pages ------------------ later ------> rows, scattered by an apply of a later step
            STORE, QUERY, FETCH ------------------------------->  simulated_io.py

Copies end in any order, at any time; the real HostPageOrder says who waits for whom. Every read checks the content, so
a page that was freed too early, reused, or loaded to the wrong place is found at the first read.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxcache.core.lease import Lease
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.runtime.backup_merging import merged
from jaxcache.runtime.host_page_order import HostPageOrder
from jaxcache.testing.chance import Delays
from jaxcache.testing.page_content import GARBAGE, RANK, ModelStep
from jaxcache.testing.simulated_io import Pages, SimulatedIO, check_no_storage
from jaxcache.testing.simulated_storage import SimulatedStorage
from jaxcache.testing.storage_faults import StorageFaults
from jaxcache.testing.virtual_jobs import VirtualJob, VirtualJobs
from jaxcache.types import Move, TransferKind


class BackUp(VirtualJob):
    """Rows on their way to host pages, which are garbage from when it begins until it ends."""

    __slots__ = ("page_ids", "pages", "rows")

    def __init__(self, rows: list[bytes], pages: Pages, page_ids: list[int]):
        super().__init__()
        self.rows, self.pages, self.page_ids = rows, pages, page_ids

    def begin(self) -> bool:
        pages = self.pages
        for page_id in self.page_ids:
            pages[page_id] = GARBAGE
        return True

    def end(self) -> None:
        pages = self.pages
        for page_id, row in zip(self.page_ids, self.rows, strict=True):
            pages[page_id] = row


class LoadBack(VirtualJob):
    """Rows on their way to device pages `targets` of component c, asked for in `step`."""

    __slots__ = ("c", "page_ids", "pages", "rows", "step", "targets")

    def __init__(self, pages: Pages, page_ids: list[int], c: int, targets: list[int], step: int):
        super().__init__()
        self.pages, self.page_ids, self.c, self.targets, self.step = pages, page_ids, c, targets, step
        self.rows: list[bytes] = []

    def begin(self) -> bool:
        return True

    def end(self) -> None:
        self.rows = [self.pages[page_id] for page_id in self.page_ids]


class FakePlane:
    """device, host: by component, page id -> row. jobs: this rank's time. num_waits: how often it waited for a copy."""

    def __init__(
        self,
        core: PrefixCache,
        storage: SimulatedStorage,
        rank: int = 0,
        faults: StorageFaults | None = None,
        delays: Delays | None = None,
    ):
        self.core, self.rank = core, rank
        self.delays = delays or Delays()
        self.jobs = VirtualJobs()
        tiers = core.tiers
        self.device: list[Pages] = [[GARBAGE] * device.allocator.num_pages for device in tiers.device]
        self.host: list[Pages] = [[GARBAGE] * host.allocator.num_pages for host in tiers.host]
        self.numbers = {component.name: c for c, component in enumerate(core.components)}
        self.orders = [HostPageOrder[VirtualJob]() for _ in core.components]
        faults = faults or StorageFaults()
        self.io = SimulatedIO(
            rank, self.jobs, self.orders, self.host, self.numbers, storage, faults, self.delays, core.prefetches
        )
        self.num_waits = 0
        self._arriving: list[LoadBack] = []

    # ---- plans

    def apply(self) -> None:
        """Scatters the load-backs of earlier steps, then carries out the plan in order."""
        transfers = self.core.take_plan().transfers
        step = self.core.step_number
        if self._arriving:
            self._scatter(step)
        for transfer in merged(transfers) if len(transfers) > 1 else transfers:
            if transfer.kind is TransferKind.BACKUP:
                for move in transfer.moves:
                    self._back_up(move)
            elif transfer.kind is TransferKind.LOAD_BACK:
                for move in transfer.moves:
                    self._load_back(move, step)
            else:
                self.io.start(transfer)

    def _back_up(self, move: Move) -> None:
        c = self.numbers[move.component]
        device, order, ids = self.device[c], self.orders[c], move.dst_page_ids
        targets = ids.tolist()
        job = BackUp([device[page_id] for page_id in move.src_page_ids.tolist()], self.host[c], targets)
        after = order.before_write(ids)
        check_no_storage(after)
        order.add_writer(ids, job)
        self.jobs.submit(job, self.delays.copy_us(self.rank, self.core.step_number, targets[0]), after)

    def _load_back(self, move: Move, step: int) -> None:
        c = self.numbers[move.component]
        order, ids = self.orders[c], move.src_page_ids
        sources = ids.tolist()
        job = LoadBack(self.host[c], sources, c, move.dst_page_ids.tolist(), step)
        after = order.before_read(ids)
        check_no_storage(after)
        order.add_reader(ids, job)
        self.jobs.submit(job, self.delays.copy_us(self.rank, step, ~sources[0]), after)
        self._arriving.append(job)

    def _scatter(self, step: int) -> None:
        for job in self._arriving:
            if job.step >= step:
                continue
            if not job.is_over:
                self.num_waits += 1
                self.jobs.wait(job)
            device = self.device[job.c]
            assert GARBAGE not in job.rows, f"rank {self.rank}: a load-back read a host page that nobody had written"
            for page_id, row in zip(job.targets, job.rows, strict=True):
                device[page_id] = row
        self._arriving = [job for job in self._arriving if job.step >= step]

    def lose_device(self) -> None:
        """The device and all that is on its way to it are lost."""
        self._arriving.clear()
        for pages in self.device:
            pages[:] = [GARBAGE] * len(pages)

    # ---- the model's side

    def model_step(self, lease: Lease, step: ModelStep, tables: Mapping[str, np.ndarray] | None = None) -> None:
        """Computes the next tokens of a lease: reads everything that resuming needs, writes the chunk.

        tables: those that the loop has; None: the present ones
        """
        suffix = RANK[self.rank]
        tables = tables or lease.page_tables
        for c, first, pages in step.reads:
            ids = tables[self.core.components[c].name][first : first + len(pages)].tolist()
            self._read(c, ids, [page + suffix for page in pages])
        for c, first, pages in step.writes:
            device = self.device[c]
            for page_id, page in zip(tables[self.core.components[c].name][first:].tolist(), pages, strict=False):
                device[page_id] = page + suffix
        if step.state_after is not None:
            self._state_step(lease, step)

    def _state_step(self, lease: Lease, step: ModelStep) -> None:
        kind, suffix = self.core.kinds.state, RANK[self.rank]
        c = kind.c if kind is not None else -1
        assert kind is not None and lease.write_slot is not None and step.state_after is not None
        if step.state_before is not None:
            slot = lease.read_slot if step.begin == lease.num_cached_tokens else lease.write_slot
            assert slot is not None
            self._read(c, [slot], [step.state_before + suffix])
        self.device[c][lease.write_slot] = step.state_after + suffix
        if step.end in lease.checkpoints:
            self.device[c][lease.checkpoints[step.end]] = step.state_after + suffix

    def _read(self, c: int, page_ids: list[int], expected: list[bytes]) -> None:
        device = self.device[c]
        found = [device[page_id] for page_id in page_ids]
        if found != expected:
            where = next(i for i, row in enumerate(expected) if i >= len(found) or found[i] != row)
            name = self.core.components[c].name
            raise AssertionError(
                f"rank {self.rank}: a model step read page {where} of {len(expected)} of {name}, id "
                f"{page_ids[where : where + 1]}: {found[where : where + 1]}, {expected[where]} should be there"
            )
