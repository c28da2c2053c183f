"""What the engine needs of devices, threads and clocks, for real.

    BACKUP     pool --gather program--> staging --worker, one a device--> rows         LOAD_BACK  the other way round

Workers touch shard-local arrays only; everything that spans devices is dispatched by the serving thread. No view of a
pool is kept: a pool that is viewed is silently copied when it is donated.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxcache.engine.effects import Effects, Loading
from jaxcache.engine.inline_copies import back_up_now, load_back_now
from jaxcache.engine.jobs import Job, Steps, Threads, at_once
from jaxcache.engine.shard_copies import local_shards, shard_copies
from jaxcache.pools.cells import Part
from jaxcache.pools.device_pool import DevicePools, PageMover, bucket_pages
from jaxcache.pools.host_pool import HostPool
from jaxcache.pools.page_layout import PageLayout, local_devices
from jaxcache.pools.spare_staging import Staging
from jaxcache.pools.storage_cells import local_part
from jaxcache.types import PageIds

DEFAULT_MAX_BUCKET = 256
SHARE_OF_CORES = 0.02  # of one
EXIT_S = 5.0  # at a normal exit, for the calls and copies that are under way

Shards = dict[str, list[Any]]  # by stack, and by local device; None: not there yet


class _Staged(NamedTuple):
    """What copies to the devices fill. whole: the same over all devices, if it was there before"""

    whole: Staging | None
    shards: Shards


class DeviceEffects(Effects):
    """Of one process's devices and host memory."""

    def __init__(
        self,
        layouts: Mapping[str, PageLayout],
        mesh: Mesh,
        num_pages: Mapping[str, int],
        host_pages: Mapping[str, int],
        max_bucket: int = DEFAULT_MAX_BUCKET,
        page_kernels: str = "auto",
    ):
        devices = local_devices(mesh)
        self._shard_copies = {device: shard_copies(device) for device in devices}
        (self._needs_staging,) = {copies.needs_staging for copies in self._shard_copies.values()}
        self.mover = PageMover(layouts, mesh, num_pages, max_bucket, page_kernels, self._needs_staging)
        self.host_pools = {name: HostPool(layout, host_pages[name], mesh) for name, layout in layouts.items()}
        self.max_pages = self.mover.max_bucket
        self.page_bytes = {name: layout.row_bytes * len(devices) for name, layout in layouts.items()}
        self._layouts = dict(layouts)
        self._store_share = SHARE_OF_CORES if devices[0].platform == "cpu" else 1.0
        self._at_exit: Callable[[], None] | None = None

    def warmup(self, pools: DevicePools) -> DevicePools:
        """Compiles every program that `apply` can run; pools are donated and come back unchanged."""
        if self._needs_staging:
            self.mover.warmup_staging()
        return self.mover.warmup(pools)

    def parts(self, units: Mapping[str, int]) -> dict[str, Part]:
        """Host memory, as it is stored. units: pages that may share a value, by component; 1 where nothing is said"""
        return {name: local_part(pool, units.get(name, 1)) for name, pool in self.host_pools.items()}

    def store_share(self, chosen: float | None) -> float:
        """Of one thread's time, that STOREs may take. None: SHARE_OF_CORES where the devices are the host's own cores,
        else all of it."""
        return chosen or self._store_share

    # ---- BACKUP

    def gather(self, pools: DevicePools, component: str, src: PageIds, dst: PageIds, is_free: bool) -> Sequence[Steps]:
        pool = self.host_pools[component]
        if is_free and back_up_now(pools[component], pool, src, dst):
            return ()
        staging = self.mover.gather(component, pools[component], src)
        return [at_once(self._copy_to_rows, pool, rank, dst, shards) for rank, shards in self._by_rank(pool, staging)]

    def write_host(self, component: str, page_ids: PageIds, staging: Staging) -> None:
        """These host pages, which no job uses, hold the first of the staged ones."""
        pool = self.host_pools[component]
        for rank, shards in self._by_rank(pool, staging):
            self._copy_to_rows(pool, rank, page_ids, shards)

    def _by_rank(self, pool: HostPool, staging: Staging) -> list[tuple[int, Shards]]:
        shards = {name: local_shards(array, pool.devices) for name, array in staging.items()}
        return [(rank, shards) for rank in range(len(pool.devices))]

    def _copy_to_rows(self, pool: HostPool, rank: int, page_ids: PageIds, shards: Shards) -> None:
        """Worker: one local device's share of the staged pages into its host rows."""
        device = pool.devices[rank]
        for f in (stack.field for stack in pool.layout.stacks):
            self._shard_copies[device].to_rows(shards[f.spec.name][rank], f, pool.rows[device], page_ids)

    # ---- LOAD_BACK

    def load(self, pools: DevicePools, component: str, src: PageIds, dst: PageIds, is_free: bool) -> Loading:
        pool = self.host_pools[component]
        if is_free:
            loaded = load_back_now(self.mover, component, pools[component], pool, src, dst)
            if loaded is not None:
                pools[component] = loaded
                return Loading(())
        staging = self.mover.staging(component, bucket_pages(len(src))) if self._needs_staging else None
        shards = self._shards_to_fill(pool, staging)
        ranks = range(len(pool.devices))
        staged = _Staged(staging, shards)
        return Loading([at_once(self._copy_to_device, pool, rank, src, shards) for rank in ranks], staged)

    def scatter(self, pools: DevicePools, component: str, dst: PageIds, staged: _Staged) -> None:
        staging = staged.whole or self._assembled(component, len(dst), staged.shards)
        pools[component] = self.mover.scatter(component, pools[component], dst, staging)

    def forget_device(self) -> None:
        self.mover.drop_spares()

    def read_host(self, component: str, page_ids: PageIds) -> Staging:
        """At most `max_pages` host pages, which no job writes, on the devices, as `PageMover.gather` returns pages of
        the pools."""
        pool, staging = self.host_pools[component], None
        if self._needs_staging:
            staging = jax.block_until_ready(self.mover.staging(component, bucket_pages(len(page_ids))))
        shards = self._shards_to_fill(pool, staging)
        for rank in range(len(pool.devices)):
            self._copy_to_device(pool, rank, page_ids, shards)
        return staging or self._assembled(component, len(page_ids), shards)

    def _shards_to_fill(self, pool: HostPool, staging: Staging | None) -> Shards:
        if staging is not None:
            return {name: local_shards(array, pool.devices) for name, array in staging.items()}
        return {stack.field.spec.name: [None] * len(pool.devices) for stack in pool.layout.stacks}

    def _copy_to_device(self, pool: HostPool, rank: int, page_ids: PageIds, shards: Shards) -> None:
        """Worker: host rows to a staging shard on one local device."""
        device, bucket = pool.devices[rank], bucket_pages(len(page_ids))
        copies, rows = self._shard_copies[device], pool.rows[device]
        for f in (stack.field for stack in pool.layout.stacks):
            own = shards[f.spec.name]
            own[rank] = copies.from_rows(rows, page_ids, f, bucket, own[rank])

    def _assembled(self, component: str, num_pages: int, shards: Shards) -> Staging:
        """The staging arrays over all devices, made of this process's shards."""
        layout, bucket = self._layouts[component], bucket_pages(num_pages)
        shardings = layout.staging_shardings()
        fields = {stack.field.spec.name: stack.field for stack in layout.stacks}
        return {
            name: jax.make_array_from_single_device_arrays((bucket, *f.padded_shape), shardings[name], shards[name])
            for name, f in fields.items()
        }

    # ---- threads and clocks

    def workers(self, name: str, num_workers: int, niceness: int) -> Threads:
        return Threads(num_workers, name, niceness)

    def wait(self, job: Job) -> None:
        job.exception()

    def now(self) -> float:
        return time.monotonic()

    def thread_s(self) -> float:
        return time.thread_time()

    def trace(self, name: str) -> AbstractContextManager[object]:
        return jax.profiler.TraceAnnotation(name)

    def at_exit(self, end: Callable[[], list[threading.Thread]]) -> None:
        self._at_exit = partial(_wait_for, end)
        atexit.register(self._at_exit)  # runs before jax ends its backends, which copies use

    def ends_at_exit(self) -> bool:
        if self._at_exit is None:
            return False
        atexit.unregister(self._at_exit)
        if is_exiting():
            self._at_exit()
        return is_exiting()


def _wait_for(end: Callable[[], list[threading.Thread]]) -> None:
    """EXIT_S at most, for all of them."""
    deadline = time.monotonic() + EXIT_S
    for thread in end():
        thread.join(max(0.0, deadline - time.monotonic()))


def is_exiting() -> bool:
    """Whether this runs at the end of the interpreter, in an `atexit` handler: Python counts the main thread as ended,
    and it is the one that asks. A thread that outlives the main thread goes on as before."""
    main = threading.main_thread()
    return threading.get_ident() == main.ident and not main.is_alive()
