"""Device pools: arrays of pages, and the two programs that move pages in and out of them.

    pool[field]  [num_pages, *padded page], sharded within the page, never over pages
    gather       pool --page ids--> staging [bucket, *padded page]     the pool is only read
    scatter      staging --page ids--> the same pool buffers           donated, in place

Both are local to each shard. Buckets are powers of two, so that `warmup` can compile every shape that will ever run.
A padding id is `num_pages`, which a scatter drops. Never -1: that wraps around to the last page.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcache.pools.page_layout import PageLayout, local_devices
from kernels_pallas.form import is_pallas
from kernels_pallas.gather_pages import gather_pages, gather_pages_reference
from kernels_pallas.page_view import page_view
from kernels_pallas.ring import DEFAULT_RING
from kernels_pallas.scatter_pages import scatter_pages, scatter_pages_reference

ComponentPools = dict[str, jax.Array]  # by field
DevicePools = dict[str, ComponentPools]  # by component


def init_pools(layouts: Mapping[str, PageLayout], num_pages: Mapping[str, int], mesh: Mesh) -> DevicePools:
    """Zeroed pools {component: {field: [num_pages, *padded page]}}; MemoryError if they do not fit a device."""
    _check_fit(layouts, num_pages, mesh)
    shardings = {name: layout.shardings() for name, layout in layouts.items()}

    def zeros() -> DevicePools:
        return {
            name: {f.spec.name: jnp.zeros((num_pages[name], *f.padded_shape), f.dtype) for f in layout.fields}
            for name, layout in layouts.items()
        }

    return jax.jit(zeros, out_shardings=shardings)()


def chunks(num_ids: int, max_bucket: int) -> Iterator[slice]:
    """Splits a request into pieces that fit the largest bucket."""
    for start in range(0, num_ids, max_bucket):
        yield slice(start, min(start + max_bucket, num_ids))


def bucket_pages(num_ids: int) -> int:
    """The smallest power of two that holds so many."""
    return 1 << (num_ids - 1).bit_length()


class PageMover:
    """Gathers and scatters pages of every component, one bucket at a time; serving thread only."""

    def __init__(
        self,
        layouts: Mapping[str, PageLayout],
        mesh: Mesh,
        num_pages: Mapping[str, int],
        max_bucket: int,
        page_kernels: str = "auto",
    ):
        """page_kernels: see CacheConfig. ValueError for one that cannot be."""
        if max_bucket < 1:
            raise ValueError(f"{max_bucket=} must be at least 1")
        self.layouts, self.mesh = dict(layouts), mesh
        self.max_bucket = 1 << (max_bucket.bit_length() - 1)  # the largest power of two within what was asked for
        self._num_pages = dict(num_pages)
        self._gathers = {name: _gather_program(layout, page_kernels) for name, layout in self.layouts.items()}
        self._scatters = {name: _scatter_program(layout, page_kernels) for name, layout in self.layouts.items()}

    def gather(self, component: str, pools: ComponentPools, page_ids: np.ndarray) -> ComponentPools:
        """Dispatches a copy of at most `max_bucket` pages; afterwards the pages may be overwritten.

        pools:   not donated
        returns: staging {field: [bucket, *padded page]}, sharded like the pools
        """
        return self._gathers[component](pools, self._padded(component, page_ids))

    def scatter(
        self, component: str, pools: ComponentPools, page_ids: np.ndarray, staging: ComponentPools
    ) -> ComponentPools:
        """Dispatches the write of at most `max_bucket` pages, in place.

        pools:   donated
        staging: as `gather` returns it, for the same bucket; rows beyond `page_ids` are ignored
        """
        return self._scatters[component](pools, self._padded(component, page_ids), staging)

    def staging(self, component: str, bucket: int) -> ComponentPools:
        """Dispatches the making of arrays that a load-back fills: {field: [bucket, *padded page]}, zeroed."""
        return _staging_program(self.layouts[component], bucket)()

    def warmup_staging(self) -> None:
        """Compiles `staging` for every bucket."""
        jax.block_until_ready([self.staging(name, bucket) for name in self.layouts for bucket in self.buckets()])

    def warmup(self, pools: DevicePools) -> DevicePools:
        """Compiles every bucket of every component. Moves padding only: pools (donated) come back unchanged."""
        pools = dict(pools)
        for name in self.layouts:
            for bucket in self.buckets():
                no_pages = np.full(bucket, self._num_pages[name], np.int32)
                staging = self.gather(name, pools[name], no_pages)
                pools[name] = self.scatter(name, pools[name], no_pages, staging)
        return jax.block_until_ready(pools)

    def buckets(self) -> list[int]:
        """All bucket sizes."""
        return [1 << k for k in range(self.max_bucket.bit_length())]

    def _padded(self, component: str, page_ids: np.ndarray) -> np.ndarray:
        num_ids, num_pages = len(page_ids), self._num_pages[component]
        assert 0 < num_ids <= self.max_bucket, f"{component=}: {num_ids=} must be in [1, {self.max_bucket}]"
        assert page_ids.min() >= 0, f"{component=}: a page id is negative: {page_ids=}"
        padded = np.full(bucket_pages(num_ids), num_pages, np.int32)
        padded[:num_ids] = page_ids
        return padded


@functools.cache  # caches of equal layout on one mesh share their programs
def _gather_program(layout: PageLayout, page_kernels: str):
    """jit (pools, ids) -> staging."""
    specs = {f.spec.name: f.pool_spec for f in layout.fields}
    shardings, replicated = layout.shardings(), NamedSharding(layout.mesh, PartitionSpec())

    is_kernel = _is_pallas("gather_pages", layout, page_kernels)
    gather_field = gather_pages if is_kernel else gather_pages_reference

    @jax.named_scope("jaxcache.gather")
    def gather(pools, page_ids):
        return {name: gather_field(pool, page_ids) for name, pool in pools.items()}

    local = jax.shard_map(
        gather, mesh=layout.mesh, in_specs=(specs, PartitionSpec()), out_specs=specs, check_vma=not is_kernel
    )
    return jax.jit(local, in_shardings=(shardings, replicated), out_shardings=shardings)


@functools.cache
def _scatter_program(layout: PageLayout, page_kernels: str):
    """jit (pools, ids, staging) -> pools, in place."""
    specs = {f.spec.name: f.pool_spec for f in layout.fields}
    shardings, replicated = layout.shardings(), NamedSharding(layout.mesh, PartitionSpec())

    is_kernel = _is_pallas("scatter_pages", layout, page_kernels)
    scatter_field = scatter_pages if is_kernel else scatter_pages_reference

    @jax.named_scope("jaxcache.scatter")
    def scatter(pools, page_ids, staging):
        return {name: scatter_field(pool, page_ids, staging[name]) for name, pool in pools.items()}

    local = jax.shard_map(
        scatter, mesh=layout.mesh, in_specs=(specs, PartitionSpec(), specs), out_specs=specs, check_vma=not is_kernel
    )
    in_shardings = (shardings, replicated, shardings)
    return jax.jit(local, donate_argnums=0, in_shardings=in_shardings, out_shardings=shardings)


def _is_pallas(operation: str, layout: PageLayout, page_kernels: str) -> bool:
    """Whether a kernel runs; ValueError where one was asked for that cannot."""
    if not is_pallas(operation, page_kernels, layout.mesh.devices.flat[0].platform):
        return False
    for f in layout.fields:
        page_view(f.local_shape, f.dtype, DEFAULT_RING.box_bytes)
    return True


@functools.cache
def _staging_program(layout: PageLayout, bucket: int):
    """jit () -> staging."""

    def zeros():
        return {f.spec.name: jnp.zeros((bucket, *f.padded_shape), f.dtype) for f in layout.fields}

    return jax.jit(zeros, out_shardings=layout.shardings())


def _check_fit(layouts: Mapping[str, PageLayout], num_pages: Mapping[str, int], mesh: Mesh) -> None:
    needed = {
        name: num_pages[name] * sum(math.prod(f.local_shape) * f.dtype.itemsize for f in layout.fields)
        for name, layout in layouts.items()
    }
    for device in local_devices(mesh):
        memory = device.memory_stats()
        if memory is None or "bytes_limit" not in memory:
            continue
        free = memory["bytes_limit"] - memory.get("bytes_in_use", 0)
        total = sum(needed.values())
        if total > free:
            raise MemoryError(f"pools of {total} bytes ({needed}) do not fit the {free} free bytes of {device}")
