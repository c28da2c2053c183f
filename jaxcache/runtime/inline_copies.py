"""Copies of devices that are the host: their pages are memory of this process, so one copy each way is enough.

    gather program --> staging --> worker --> rows      two copies, a program, and a job for each device
    pages of the pool -----------------------> rows     one copy, no longer than that dispatch
    rows --------------------> pages of the pool        after a donation, which waits for whoever still reads them

Only of pools that are computed and rows that nobody uses; otherwise nothing is done, and the usual way is taken.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxcache.pools.device_pool import ComponentPools, PageMover
from jaxcache.pools.host_pool import HostPool
from jaxcache.pools.page_layout import FieldLayout
from jaxcache.runtime.shard_copies import local_shards

LARGE_BYTES = 8192  # from here on a loop over pages is faster than numpy's, which copies twice
Pages = np.ndarray  # uint8[num_pages, local_bytes] of one field on one device


def back_up_now(pools: ComponentPools, pool: HostPool, src: np.ndarray, dst: np.ndarray) -> bool:
    """rows[dst] = pages[src] on every local device; False, with nothing done, where the pages cannot be read now."""
    if not _can_be_reached(pools, pool):
        return False
    for pages, rows in _by_field(pools, pool):
        _copy(pages, src, rows, dst)
    return True


def load_back_now(
    mover: PageMover, component: str, pools: ComponentPools, pool: HostPool, src: np.ndarray, dst: np.ndarray
) -> ComponentPools | None:
    """pages[dst] = rows[src] on every local device.

    pools:   donated, unless nothing is done
    returns: the pools with these pages, in place; None, with nothing done, where the pages cannot be written now
    """
    if not _can_be_reached(pools, pool):
        return None
    pools = mover.renewed(component, pools)
    for pages, rows in _by_field(pools, pool):
        _copy(rows, src, pages, dst)
    return pools


def _can_be_reached(pools: ComponentPools, pool: HostPool) -> bool:
    """Whether the pools are computed, and nothing but their pages, one after the other, in this process's memory."""
    if any(device.platform != "cpu" for device in pool.devices):
        return False
    for field in pool.layout.fields:
        array: Any = pools[field.spec.name]
        if not array.is_ready():
            return False
        num_bytes = array.shape[0] * field.local_bytes
        if any(shard.on_device_size_in_bytes() != num_bytes for shard in local_shards(array, pool.devices)):
            return False
    return True


def _by_field(pools: ComponentPools, pool: HostPool) -> Iterator[tuple[Pages, np.ndarray]]:
    """(pages, their columns of the rows) of every field on every local device."""
    for field in pool.layout.fields:
        for device, pages in zip(pool.devices, _views(pools[field.spec.name], field, pool.devices), strict=True):
            yield pages, pool.rows[device][:, field.byte_range]


def _views(array: Any, field: FieldLayout, devices: Sequence) -> Iterator[Pages]:
    """The pages on each device, until `array` is dropped or donated.

    Through the address, since jax keeps what `np.asarray` returns, and a donation with such a view alive is a copy.
    """
    shape = (array.shape[0], field.local_bytes)
    shard: Any
    for shard in local_shards(array, tuple(devices)):
        memory = (ctypes.c_uint8 * (shape[0] * shape[1])).from_address(shard.unsafe_buffer_pointer())
        yield np.frombuffer(memory, np.uint8).reshape(shape)


def _copy(sources: np.ndarray, src: np.ndarray, targets: np.ndarray, dst: np.ndarray) -> None:
    """targets[dst] = sources[src]"""
    if sources.shape[1] < LARGE_BYTES:
        targets[dst] = sources[src]
        return
    for source, target in zip(src.tolist(), dst.tolist(), strict=True):
        targets[target] = sources[source]
