"""Performs transfers: which job waits for which, what storage has delivered, and when.

    serving thread                                      copy workers                     storage workers
    apply: scatter what earlier steps loaded    <------ rows -> device shard
           BACKUP: dispatch the gather NOW -----------> device shard -> rows ----------> STORE
           LOAD_BACK: take or make staging, submit
           STORE, QUERY, FETCH: submit                                   rows <--------- FETCH
    poll : what storage delivered                       <------------------------------- QUERY

What needs a host page waits for the job that fills it, and what overwrites one for its readers; waiting jobs occupy no
worker. Everything that needs devices, threads or a clock is behind `Effects`: the simulation runs this very engine.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from jaxcache.engine.backup_merging import merged
from jaxcache.engine.counters import Counters
from jaxcache.engine.effects import Effects, Pools
from jaxcache.engine.host_page_order import HostPageOrder
from jaxcache.engine.jobs import Job, JobGraph, Steps
from jaxcache.engine.rates import Rates
from jaxcache.engine.storage_connection import REST_S
from jaxcache.engine.storage_io import BATCH_PAGES, StorageIO
from jaxcache.engine.storage_operation import Status
from jaxcache.pools.cells import Part
from jaxcache.pools.storage_units import chunks
from jaxcache.storage.base import Storage
from jaxcache.types import PageIds, Transfer, TransferFault, TransferKind

P = TypeVar("P", bound=Pools)
E = TypeVar("E", bound=Effects)


@dataclass(eq=False)
class _LoadBack:
    """Pages on their way to the device: submitted in `step`, scattered in a later one."""

    step: int
    component: str
    page_ids: PageIds
    staged: Any
    job: Job


class TransferEngine(Generic[E]):
    """All transfers of one process. Every method is called on the serving thread.

    orders: by component, who uses which host page. copies: the jobs between device and host
    """

    def __init__(
        self,
        effects: E,
        parts: Mapping[str, Part],
        storage: Storage | None,
        deadline_s: float,
        num_threads: int,
        page_tokens: int = 1,
        store_share: float = 1.0,
        rest_s: float = REST_S,
        batch_pages: int = BATCH_PAGES,
    ):
        """
        parts:       this process's share of the host pages, by component
        deadline_s:  of a storage transfer
        num_threads: that copy, and as many for storage
        Further arguments are those of `StorageIO`.
        """
        self.effects = effects
        self.fault: BaseException | None = None
        self._counters = Counters(effects.now, effects.trace)
        self.orders = {name: HostPageOrder[Job]() for name in parts}
        self.copies = JobGraph(effects.workers("jaxcache-copy", num_threads, 0))
        self.rates = Rates(effects.now)
        self.storage_io = StorageIO(
            effects,
            parts,
            self.orders,
            storage,
            deadline_s,
            num_threads,
            self._counters,
            page_tokens,
            store_share,
            rest_s,
            batch_pages,
        )
        self._load_backs: list[_LoadBack] = []
        effects.at_exit(partial(_end, weakref.ref(self.storage_io), weakref.ref(self.copies)))

    def apply(self, pools: P, transfers: Sequence[Transfer], step: int) -> P:
        """Dispatches transfers in order, after the scatters of what earlier steps loaded.

        pools:   donated where a scatter is due
        returns: the pools that the coming model step must use; every backed-up page may be overwritten in them
        raises:  TransferFault if a copy failed
        """
        self._raise_fault()
        self.storage_io.close_idle()
        pools = copy(pools)
        self._scatter_arrived(pools, step)
        for transfer in merged(transfers):
            if transfer.kind is TransferKind.BACKUP:
                self._back_up(pools, transfer)
            elif transfer.kind is TransferKind.LOAD_BACK:
                self._load_back(pools, transfer, step)
            else:
                self.storage_io.start(transfer)
        return pools

    def serves(self, is_serving: bool) -> None:
        """Whether requests run: only then what is stored is bounded."""
        self.storage_io.budget.serves(is_serving)

    def poll(self) -> dict[int, Status]:
        """The state of every live STORE, QUERY and FETCH, by transfer id."""
        return self.storage_io.poll()

    def has_ended(self) -> bool:
        """Whether a live storage transfer will deliver nothing more: less work than `poll`."""
        return self.storage_io.has_ended()

    def cancel(self, transfer_id: int) -> None:
        """Ends a storage transfer's deliveries; its pages are untouched once it is quiet. Repeating it is harmless."""
        self.storage_io.cancel(transfer_id)

    def forget(self, transfer_id: int) -> None:
        """The core is finished with a quiet storage transfer."""
        took = self.storage_io.forget(transfer_id)
        if took is not None:
            self.rates.fetched(*took)

    def wait_to_read(self, component: str, page_ids: PageIds) -> None:
        """Until what fills these host pages has ended. Raises TransferFault if that failed."""
        self._wait_for(self.orders[component].before_read(page_ids))

    def wait_to_write(self, component: str, page_ids: PageIds) -> None:
        """Until no job touches these host pages. Raises TransferFault if one failed."""
        self._wait_for(self.orders[component].before_write(page_ids))

    def _wait_for(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self.effects.wait(job)
            if job.exception() is not None:
                self.fault = self.fault or job.exception()
        self._raise_fault()

    def forget_device(self) -> None:
        """The pools are lost, or given up. What is on its way to them will not be scattered; its host pages are still
        read to the end."""
        self._load_backs.clear()
        self.effects.forget_device()

    def set_storage(self, storage: Storage | None) -> None:
        """From now on asks this storage; transfers under way stay with the one they started with."""
        self.storage_io.connect(storage)

    def calls(self, storage: Storage) -> bool:
        """Whether a worker calls this storage, or soon will."""
        return self.storage_io.calls(storage)

    def drain(self, timeout_s: float | None = None) -> bool:
        """Waits until no thread has work; False if that took longer."""
        return self.copies.drain(timeout_s) and self.storage_io.drain(timeout_s)

    def close(self) -> None:
        """Stops storage transfers and joins the threads; waits for native calls that are under way.

        At the end of the interpreter it waits for a while at most, and what has not begun is left undone.
        """
        if not self.effects.ends_at_exit():
            self.storage_io.close()
            self.copies.close()

    def stats(self) -> dict[str, float]:
        """Sums since the start, and the present queues."""
        queues = {"copy_queue_depth": self.copies.num_open, "storage_queue_depth": self.storage_io.num_open}
        return {"breaker_openings": 0} | self._counters.sums() | queues

    def _back_up(self, pools: Pools, transfer: Transfer) -> None:
        for move in transfer.moves:
            for piece in chunks(len(move.src_page_ids), self.effects.max_pages):
                self._back_up_chunk(pools, move.component, move.src_page_ids[piece], move.dst_page_ids[piece])

    def _back_up_chunk(self, pools: Pools, component: str, src: PageIds, dst: PageIds) -> None:
        order = self.orders[component]
        after = order.before_write(dst)
        with self._counters.busy("backup"):
            copies = self.effects.gather(pools, component, src, dst, is_free=not after)
        if copies:
            order.add_writer(dst, self._submit_copies("backup", component, len(dst), copies, after))
        else:
            self._count("backup", component, len(dst))

    def _load_back(self, pools: Pools, transfer: Transfer, step: int) -> None:
        for move in transfer.moves:
            for piece in chunks(len(move.src_page_ids), self.effects.max_pages):
                src, dst = move.src_page_ids[piece], move.dst_page_ids[piece]
                self._load_back_chunk(pools, move.component, src, dst, step)

    def _load_back_chunk(self, pools: Pools, component: str, src: PageIds, dst: PageIds, step: int) -> None:
        order = self.orders[component]
        after = order.before_read(src)
        with self._counters.busy("load_back"):
            loading = self.effects.load(pools, component, src, dst, is_free=not after)
        if loading.copies:
            job = self._submit_copies("load_back", component, len(src), loading.copies, after)
            order.add_reader(src, job)
            self._load_backs.append(_LoadBack(step, component, dst, loading.staged, job))
        else:
            self._count("load_back", component, len(src))

    def _scatter_arrived(self, pools: Pools, step: int) -> None:
        arrived = [load for load in self._load_backs if load.step < step]
        self._load_backs = [load for load in self._load_backs if load.step >= step]
        for load in arrived:
            self._wait_for([load.job])
            self.effects.scatter(pools, load.component, load.page_ids, load.staged)

    def _submit_copies(
        self, kind: str, component: str, num_pages: int, copies: Sequence[Steps], after: Sequence[Job]
    ) -> Job:
        """One job per local device, so that they share the cores; the job returned is done when all are."""
        job = self.copies.all_of([self.copies.submit(self._counted(kind, steps), after) for steps in copies])
        job.add_done_callback(partial(self._copies_ended, kind, component, num_pages))
        return job

    def _copies_ended(self, kind: str, component: str, num_pages: int, job: Job) -> None:
        if job.exception() is None:
            self._count(kind, component, num_pages)
        else:
            self.fault = self.fault or job.exception()

    def _counted(self, kind: str, steps: Steps) -> Steps:
        with self._counters.busy(kind):
            yield from steps

    def _count(self, kind: str, component: str, num_pages: int) -> None:
        num_bytes = num_pages * self.effects.page_bytes[component]
        self._counters.add(**{f"{kind}_pages": num_pages, f"{kind}_bytes": num_bytes})

    def _raise_fault(self) -> None:
        if self.fault is not None:
            raise TransferFault(f"a copy between device and host failed: {self.fault!r}") from self.fault


def _end(*working: weakref.ref[StorageIO] | weakref.ref[JobGraph]) -> list[threading.Thread]:
    """Ends those that still exist; returns the threads, each of which ends with what it does.

    What is under way keeps its part of an engine alive, and not the engine: the handler at exit must keep neither, nor
    any host memory.
    """
    return [thread for part in working if (found := part()) is not None for thread in found.end()]
