"""Device pools: arrays of pages, and the two programs that move pages in and out of them.

    pool[field]  [num_pages, *padded page], sharded within the page, never over pages
    gather       pool --page ids--> staging [bucket, *padded page]     the pool is only read
    scatter      staging --page ids--> the same pool buffers           donated, in place

Fields that are alike are staged as one array, see `page_layout.Stack`: {first field: [bucket, fields, *padded page]}.
Both are local to each shard. Buckets are powers of two, so that `warmup` can compile every shape that will ever run.
A padding id is `num_pages`, which a scatter drops. Never -1: that wraps around to the last page.

On GPUs a scatter gives the staging back that it has read, and a later load-back fills it again. New arrays would be
made by a program, behind the model step that runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcache.pools.page_layout import PageLayout, Stack, local_devices
from jaxcache.pools.spare_staging import SpareStaging, Staging
from kernels_pallas.form import is_pallas
from kernels_pallas.gather_pages import gather_pages, gather_pages_reference
from kernels_pallas.layer_pages import (
    gather_layers,
    gather_layers_reference,
    scatter_layers,
    scatter_layers_reference,
)
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
        keeps_staging: bool = False,
    ):
        """
        page_kernels:  see CacheConfig. ValueError for one that cannot be.
        keeps_staging: what `scatter` has read is what a later `staging` returns; of each component as much as two
                       transfers of `max_bucket` pages
        """
        if max_bucket < 1:
            raise ValueError(f"{max_bucket=} must be at least 1")
        self.layouts, self.mesh = dict(layouts), mesh
        self.max_bucket = 1 << (max_bucket.bit_length() - 1)  # the largest power of two within what was asked for
        self._num_pages = dict(num_pages)
        self._gathers = {name: _gather_program(layout, page_kernels) for name, layout in self.layouts.items()}
        self._scatters = {
            name: _scatter_program(layout, page_kernels, keeps_staging) for name, layout in self.layouts.items()
        }
        self._spares = SpareStaging(2 * self.max_bucket) if keeps_staging else None

    def gather(self, component: str, pools: ComponentPools, page_ids: np.ndarray) -> Staging:
        """Dispatches a copy of at most `max_bucket` pages; afterwards the pages may be overwritten.

        pools:   not donated
        returns: staging {first field: [bucket, *padded shape of the stack]}, sharded like the pools
        """
        return self._gathers[component](pools, self._padded(component, page_ids))

    def scatter(self, component: str, pools: ComponentPools, page_ids: np.ndarray, staging: Staging) -> ComponentPools:
        """Dispatches the write of at most `max_bucket` pages, in place.

        pools:   donated
        staging: as `gather` returns it, for the same bucket; rows beyond `page_ids` are ignored. Donated where it
                 is kept
        """
        pools, staging = self._scatters[component](pools, self._padded(component, page_ids), staging)
        if self._spares is not None:
            self._spares.add(component, bucket_pages(len(page_ids)), staging)
        return pools

    def renewed(self, component: str, pools: ComponentPools) -> ComponentPools:
        """The same buffers as new arrays, when they are computed and nobody reads the old ones any more.

        pools: donated
        """
        return jax.block_until_ready(_renewal_program(self.layouts[component])(pools))

    def staging(self, component: str, bucket: int) -> Staging:
        """Arrays that a load-back fills, when they are computed: as `gather` returns them, with any content."""
        spare = self._spares.take(component, bucket) if self._spares is not None else None
        return spare or _staging_program(self.layouts[component], bucket)()

    def warmup_staging(self) -> None:
        """Compiles what makes staging arrays of every bucket."""
        programs = [_staging_program(layout, bucket) for layout in self.layouts.values() for bucket in self.buckets()]
        jax.block_until_ready([program() for program in programs])

    def warmup(self, pools: DevicePools) -> DevicePools:
        """Compiles every program of every component. Moves padding only: pools (donated) come back unchanged."""
        pools = dict(pools)
        for name in self.layouts:
            pools[name] = self.renewed(name, pools[name])
            for bucket in self.buckets():
                no_pages = np.full(bucket, self._num_pages[name], np.int32)
                staging = self.gather(name, pools[name], no_pages)
                pools[name] = self.scatter(name, pools[name], no_pages, staging)
        self.drop_spares()
        return jax.block_until_ready(pools)

    def drop_spares(self) -> None:
        """Keeps no staging."""
        if self._spares is not None:
            self._spares.clear()

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
    is_kernel = {stack: _is_pallas("gather", stack, layout, page_kernels) for stack in layout.stacks}

    def gather_stack(stack: Stack, pools, page_ids):
        if len(stack.names) == 1:
            return (gather_pages if is_kernel[stack] else gather_pages_reference)(pools[stack.names[0]], page_ids)
        layers = [pools[name] for name in stack.names]
        return (gather_layers if is_kernel[stack] else gather_layers_reference)(layers, page_ids)

    @jax.named_scope("jaxcache.gather")
    def gather(pools, page_ids):
        return {stack.field.spec.name: gather_stack(stack, pools, page_ids) for stack in layout.stacks}

    pool_specs, staging_specs = _specs(layout)
    local = jax.shard_map(
        gather,
        mesh=layout.mesh,
        in_specs=(pool_specs, PartitionSpec()),
        out_specs=staging_specs,
        check_vma=not any(is_kernel.values()),
    )
    replicated = NamedSharding(layout.mesh, PartitionSpec())
    return jax.jit(local, in_shardings=(layout.shardings(), replicated), out_shardings=layout.staging_shardings())


@functools.cache
def _scatter_program(layout: PageLayout, page_kernels: str, keeps_staging: bool):
    """jit (pools, ids, staging) -> (pools, the staging or None), in place."""
    is_kernel = {stack: _is_pallas("scatter", stack, layout, page_kernels) for stack in layout.stacks}

    def scatter_stack(stack: Stack, pools, page_ids, staged):
        if len(stack.names) == 1:
            scatter_one = scatter_pages if is_kernel[stack] else scatter_pages_reference
            return (scatter_one(pools[stack.names[0]], page_ids, staged),)
        layers = [pools[name] for name in stack.names]
        return (scatter_layers if is_kernel[stack] else scatter_layers_reference)(layers, page_ids, staged)

    @jax.named_scope("jaxcache.scatter")
    def scatter(pools, page_ids, staging):
        written = {}
        for stack in layout.stacks:
            arrays = scatter_stack(stack, pools, page_ids, staging[stack.field.spec.name])
            written |= zip(stack.names, arrays, strict=True)
        return written

    pool_specs, staging_specs = _specs(layout)
    local = jax.shard_map(
        scatter,
        mesh=layout.mesh,
        in_specs=(pool_specs, PartitionSpec(), staging_specs),
        out_specs=pool_specs,
        check_vma=not any(is_kernel.values()),
    )
    pools, ids, staging = layout.shardings(), NamedSharding(layout.mesh, PartitionSpec()), layout.staging_shardings()

    def scatter_all(pools, page_ids, staging):
        return local(pools, page_ids, staging), staging if keeps_staging else None

    return jax.jit(
        scatter_all,
        donate_argnums=(0, 2) if keeps_staging else 0,
        in_shardings=(pools, ids, staging),
        out_shardings=(pools, staging if keeps_staging else None),
    )


def _specs(layout: PageLayout) -> tuple[dict[str, PartitionSpec], dict[str, PartitionSpec]]:
    """Of the pools, by field, and of the staging."""
    pools = {f.spec.name: f.pool_spec for f in layout.fields}
    return pools, {stack.field.spec.name: stack.field.pool_spec for stack in layout.stacks}


def _is_pallas(direction: str, stack: Stack, layout: PageLayout, page_kernels: str) -> bool:
    """Whether a kernel runs; ValueError where one was asked for that cannot."""
    operation = f"{direction}_pages" if len(stack.names) == 1 else f"{direction}_layers"
    if not is_pallas(operation, page_kernels, layout.mesh.devices.flat[0].platform):
        return False
    page_view(stack.field.local_shape, stack.field.dtype, DEFAULT_RING.box_bytes)
    return True


@functools.cache
def _renewal_program(layout: PageLayout):
    """jit pools -> pools, in place."""
    shardings = layout.shardings()
    return jax.jit(lambda pools: pools, donate_argnums=0, in_shardings=(shardings,), out_shardings=shardings)


@functools.cache
def _staging_program(layout: PageLayout, bucket: int):
    """jit () -> staging."""

    def zeros():
        fields = [stack.field for stack in layout.stacks]
        return {f.spec.name: jnp.zeros((bucket, *f.padded_shape), f.dtype) for f in fields}

    return jax.jit(zeros, out_shardings=layout.staging_shardings())


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
