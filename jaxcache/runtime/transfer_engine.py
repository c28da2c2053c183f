"""Performs transfers: the only threads of the cache.

    serving thread                                      copy threads                     storage threads
    apply: scatter what earlier steps loaded    <------ rows -> device shard
           BACKUP: dispatch the gather NOW -----------> device shard -> rows ----------> STORE
           LOAD_BACK: dispatch the staging, submit
           STORE, QUERY, FETCH: submit                                   rows <--------- FETCH
    poll : what storage delivered                       <------------------------------- QUERY

Whoever needs a host page waits for the job that fills it, and whoever overwrites one for its readers; waiting jobs
occupy no thread. Workers touch shard-local arrays only; everything that spans devices is dispatched by the serving
thread. The engine never holds a view of a pool: a pool that is viewed is silently copied when it is donated.
"""

from __future__ import annotations

import atexit
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from jaxcache.pools.device_pool import DevicePools, PageMover, Staging, bucket_pages, chunks
from jaxcache.pools.host_pool import HostPool
from jaxcache.pools.page_layout import PageLayout, local_devices
from jaxcache.runtime.backup_merging import merged
from jaxcache.runtime.counters import Counters
from jaxcache.runtime.host_page_order import HostPageOrder
from jaxcache.runtime.inline_copies import back_up_now, load_back_now
from jaxcache.runtime.job_graph import Job, JobGraph
from jaxcache.runtime.process_end import EXIT_S, is_exiting
from jaxcache.runtime.rates import Rates
from jaxcache.runtime.shard_copies import local_shards, shard_copies
from jaxcache.runtime.storage_io import StorageIO
from jaxcache.runtime.storage_operation import Status
from jaxcache.storage.base import Storage
from jaxcache.types import Move, PageIds, Transfer, TransferFault, TransferKind

DEFAULT_MAX_BUCKET = 256


@dataclass(eq=False)
class _LoadBack:
    """Pages on their way to the device: submitted in `step`, scattered in a later one."""

    step: int
    component: str
    page_ids: PageIds
    shards: dict[str, list[Any]] = field(default_factory=dict)  # by stack; arrays to be filled, or None, until loaded
    job: Job | None = None


SHARE_OF_CORES = 0.02  # of one


class TransferEngine:
    """All transfers of one process. Every method is called on the serving thread."""

    def __init__(
        self,
        layouts: Mapping[str, PageLayout],
        mesh: Mesh,
        num_pages: Mapping[str, int],
        host_pages: Mapping[str, int],
        storage: Storage | None,
        deadline_s: float,
        num_threads: int,
        max_bucket: int = DEFAULT_MAX_BUCKET,
        page_kernels: str = "auto",
        page_tokens: int = 1,
        storage_units: Mapping[str, int] | None = None,
        store_share: float | None = None,
    ):
        """
        storage_units: pages that may share a value of storage, by component; 1 where nothing is said
        store_share:   of one thread's time, that STOREs may take while requests run. None: SHARE_OF_CORES where the
                       devices are the host's own cores, else all of it
        """
        self.mover = PageMover(layouts, mesh, num_pages, max_bucket, page_kernels)
        self.host_pools = {name: HostPool(layout, host_pages[name], mesh) for name, layout in layouts.items()}
        self.fault: BaseException | None = None
        self._layouts, self._counters = dict(layouts), Counters()
        self._shard_copies = {device: shard_copies(device) for device in local_devices(mesh)}
        self._needs_staging = any(copies.needs_staging for copies in self._shard_copies.values())
        self._orders = {name: HostPageOrder[Job]() for name in layouts}
        self._copies = JobGraph(num_threads, "jaxcache-copy")
        self.rates = Rates()
        self._storage_io = StorageIO(
            self.host_pools,
            self._orders,
            storage,
            deadline_s,
            num_threads,
            self._counters,
            page_tokens,
            storage_units,
            store_share or (SHARE_OF_CORES if local_devices(mesh)[0].platform == "cpu" else 1.0),
        )
        self._load_backs: list[_LoadBack] = []
        self._end_at_exit = partial(_end, weakref.ref(self._storage_io), weakref.ref(self._copies))
        atexit.register(self._end_at_exit)  # runs before jax ends its backends, which copies use

    def warmup(self, pools: DevicePools) -> DevicePools:
        """Compiles every program that `apply` can run; pools are donated and come back unchanged."""
        if self._needs_staging:
            self.mover.warmup_staging()
        return self.mover.warmup(pools)

    def apply(self, pools: DevicePools, transfers: Sequence[Transfer], step: int) -> DevicePools:
        """Dispatches transfers in order, after the scatters of what earlier steps loaded.

        pools:   donated where a scatter is due
        returns: the pools that the coming model step must use; every backed-up page may be overwritten in them
        raises:  TransferFault if a copy failed
        """
        self._raise_fault()
        self._storage_io.close_idle()
        pools = self._scatter_arrived(dict(pools), step)
        for transfer in merged(transfers):
            if transfer.kind is TransferKind.BACKUP:
                self._back_up(pools, transfer)
            elif transfer.kind is TransferKind.LOAD_BACK:
                self._load_back(pools, transfer, step)
            else:
                self._storage_io.start(transfer)
        return pools

    def serves(self, is_serving: bool) -> None:
        """Whether requests run: only then what is stored is bounded."""
        self._storage_io.budget.serves(is_serving)

    def poll(self) -> dict[int, Status]:
        """The state of every live STORE, QUERY and FETCH, by transfer id."""
        return self._storage_io.poll()

    def has_ended(self) -> bool:
        """Whether a live storage transfer will deliver nothing more: less work than `poll`."""
        return self._storage_io.has_ended()

    def cancel(self, transfer_id: int) -> None:
        """Ends a storage transfer's deliveries; its pages are untouched once it is quiet. Repeating it is harmless."""
        self._storage_io.cancel(transfer_id)

    def forget(self, transfer_id: int) -> None:
        """The core is finished with a quiet storage transfer."""
        took = self._storage_io.forget(transfer_id)
        if took is not None:
            self.rates.fetched(*took)

    def read_host(self, component: str, page_ids: PageIds) -> Staging:
        """At most `mover.max_bucket` host pages on the devices, as `mover.gather` returns pages of the pools; waits for
        them, and for what fills them. Raises TransferFault if that failed."""
        self._wait_for(self._orders[component].before_read(page_ids))
        pool, bucket = self.host_pools[component], bucket_pages(len(page_ids))
        load = _LoadBack(0, component, page_ids)
        load.shards = {stack.field.spec.name: [None] * len(pool.devices) for stack in pool.layout.stacks}
        if self._needs_staging:
            staging = jax.block_until_ready(self.mover.staging(component, bucket))
            load.shards = {name: local_shards(array, pool.devices) for name, array in staging.items()}
        for rank in range(len(pool.devices)):
            self._copy_to_device(pool, rank, page_ids, load)
        return self._assembled(load)

    def write_host(self, component: str, page_ids: PageIds, staging: Staging) -> None:
        """The other way round: these host pages, which nobody uses, hold the first of the staged ones."""
        self._wait_for(self._orders[component].before_write(page_ids))
        pool = self.host_pools[component]
        shards = {name: local_shards(array, pool.devices) for name, array in staging.items()}
        for rank in range(len(pool.devices)):
            self._copy_to_rows(pool, rank, page_ids, shards)

    def _wait_for(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if job.exception() is not None:
                self.fault = self.fault or job.exception()
        self._raise_fault()

    def discard_load_backs(self) -> None:
        """What is on its way to the device will not be scattered; its host pages are still read to the end."""
        self._load_backs.clear()

    def set_storage(self, storage: Storage | None) -> None:
        """From now on asks this storage; transfers under way stay with the one they started with."""
        self._storage_io.connect(storage)

    def calls(self, storage: Storage) -> bool:
        """Whether a thread calls this storage, or soon will."""
        return self._storage_io.calls(storage)

    def drain(self, timeout_s: float | None = None) -> bool:
        """Waits until no thread has work; False if that took longer."""
        return self._copies.drain(timeout_s) and self._storage_io.drain(timeout_s)

    def close(self) -> None:
        """Stops storage transfers and joins the threads; waits for native calls that are under way.

        At the end of the interpreter it waits for EXIT_S at most, and what has not begun is left undone.
        """
        atexit.unregister(self._end_at_exit)
        if is_exiting():
            self._end_at_exit()
        else:
            self._storage_io.close()
            self._copies.close()

    def stats(self) -> dict[str, float]:
        """Sums since the start, and the present queues."""
        queues = {"copy_queue_depth": self._copies.num_open, "storage_queue_depth": self._storage_io.num_open}
        return {"breaker_openings": 0} | self._counters.sums() | queues

    def _back_up(self, pools: DevicePools, transfer: Transfer) -> None:
        for move in transfer.moves:
            for piece in chunks(len(move.src_page_ids), self.mover.max_bucket):
                self._back_up_chunk(pools, move.component, move.src_page_ids[piece], move.dst_page_ids[piece])

    def _back_up_chunk(self, pools: DevicePools, component: str, src: PageIds, dst: PageIds) -> None:
        if not self._orders[component].before_write(dst):
            with self._counters.busy("backup"):
                is_done = back_up_now(pools[component], self.host_pools[component], src, dst)
            if is_done:
                self._count("backup", component, len(dst))
                return
        staging = self.mover.gather(component, pools[component], src)
        shards = {name: local_shards(array, self.host_pools[component].devices) for name, array in staging.items()}
        order = self._orders[component]
        pool = self.host_pools[component]
        works = [partial(self._copy_to_rows, pool, rank, dst, shards) for rank in range(len(pool.devices))]
        order.add_writer(dst, self._submit_copies("backup", component, len(dst), works, order.before_write(dst)))

    def _load_back(self, pools: DevicePools, transfer: Transfer, step: int) -> None:
        for move in transfer.moves:
            for piece in chunks(len(move.src_page_ids), self.mover.max_bucket):
                self._load_back_chunk(pools, _LoadBack(step, move.component, move.dst_page_ids[piece]), move, piece)

    def _load_back_chunk(self, pools: DevicePools, load: _LoadBack, move: Move, piece: slice) -> None:
        src, order, name = move.src_page_ids[piece], self._orders[move.component], move.component
        if not order.before_read(src):
            with self._counters.busy("load_back"):
                loaded = load_back_now(self.mover, name, pools[name], self.host_pools[name], src, load.page_ids)
            if loaded is not None:
                pools[name] = loaded
                self._count("load_back", name, len(src))
                return
        pool = self.host_pools[move.component]
        load.shards = {stack.field.spec.name: [None] * len(pool.devices) for stack in pool.layout.stacks}
        if self._needs_staging:
            staging = self.mover.staging(move.component, bucket_pages(len(src)))
            load.shards = {name: local_shards(array, pool.devices) for name, array in staging.items()}
        works = [partial(self._copy_to_device, pool, rank, src, load) for rank in range(len(pool.devices))]
        load.job = self._submit_copies("load_back", move.component, len(src), works, order.before_read(src))
        order.add_reader(src, load.job)
        self._load_backs.append(load)

    def _scatter_arrived(self, pools: DevicePools, step: int) -> DevicePools:
        arrived = [load for load in self._load_backs if load.step < step]
        self._load_backs = [load for load in self._load_backs if load.step >= step]
        for load in arrived:
            assert load.job is not None
            if load.job.exception() is not None:
                self.fault = self.fault or load.job.exception()
                self._raise_fault()
            staging = self._assembled(load)
            pools[load.component] = self.mover.scatter(load.component, pools[load.component], load.page_ids, staging)
        return pools

    def _assembled(self, load: _LoadBack) -> dict[str, jax.Array]:
        """The staging arrays over all devices, made of this process's shards."""
        layout, bucket = self._layouts[load.component], bucket_pages(len(load.page_ids))
        shardings = layout.staging_shardings()
        fields = {stack.field.spec.name: stack.field for stack in layout.stacks}
        return {
            name: jax.make_array_from_single_device_arrays(
                (bucket, *f.padded_shape), shardings[name], load.shards[name]
            )
            for name, f in fields.items()
        }

    def _copy_to_rows(self, pool: HostPool, rank: int, page_ids: PageIds, shards: dict[str, list[jax.Array]]) -> None:
        """Worker: one local device's share of the staged pages into its host rows."""
        device = pool.devices[rank]
        with self._counters.busy("backup"):
            for f in (stack.field for stack in pool.layout.stacks):
                self._shard_copies[device].to_rows(shards[f.spec.name][rank], f, pool.rows[device], page_ids)

    def _copy_to_device(self, pool: HostPool, rank: int, page_ids: PageIds, load: _LoadBack) -> None:
        """Worker: host rows to a staging shard on one local device."""
        device, bucket = pool.devices[rank], bucket_pages(len(page_ids))
        copies, rows = self._shard_copies[device], pool.rows[device]
        with self._counters.busy("load_back"):
            for f in (stack.field for stack in pool.layout.stacks):
                shards = load.shards[f.spec.name]
                shards[rank] = copies.from_rows(rows, page_ids, f, bucket, shards[rank])

    def _submit_copies(
        self, kind: str, component: str, num_pages: int, works: Sequence[Callable[[], None]], after: Sequence[Job]
    ) -> Job:
        """One job per local device, so that they share the cores; the job returned is done when all are."""
        parts = [self._copies.submit(work, after) for work in works]
        job = self._copies.submit(partial(self._count, kind, component, num_pages), parts)
        job.add_done_callback(self._note_fault)
        return job

    def _count(self, kind: str, component: str, num_pages: int) -> None:
        pool = self.host_pools[component]
        num_bytes = num_pages * pool.layout.row_bytes * len(pool.devices)
        self._counters.add(**{f"{kind}_pages": num_pages, f"{kind}_bytes": num_bytes})

    def _note_fault(self, job: Job) -> None:
        if job.exception() is not None and self.fault is None:
            self.fault = job.exception()

    def _raise_fault(self) -> None:
        if self.fault is not None:
            raise TransferFault(f"a copy between device and host failed: {self.fault!r}") from self.fault


def _end(*working: weakref.ref[StorageIO] | weakref.ref[JobGraph]) -> None:
    """Ends those that still exist, and waits for what they have begun, EXIT_S at most.

    What is under way keeps its part of an engine alive, and not the engine: the handler at exit must keep neither, nor
    any host memory.
    """
    deadline = time.monotonic() + EXIT_S
    threads = [thread for part in working if (found := part()) is not None for thread in found.end()]
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
