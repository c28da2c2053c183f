"""Copies of devices that are the host: their pages are memory of this process, so one copy each way is enough.

    gather program --> staging --> worker --> rows      two copies, a program, and a job for each device
    pages of the pool -----------------------> rows     one copy, no longer than that dispatch
    rows --------------------> pages of the pool        after a donation, which waits for all that still read them

Only of pools that are computed and rows that nobody uses; otherwise nothing is done, and the usual way is taken.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxcache.engine.shard_copies import local_shards
from jaxcache.pools.device_pool import ComponentPools, PageMover
from jaxcache.pools.host_pool import HostPool

LARGE_BYTES = 8192  # from here on a loop over pages is faster than numpy's, which copies twice
Pages = np.ndarray  # uint8[num_pages, local_bytes] of one field on one device


def back_up_now(pools: ComponentPools, pool: HostPool, src: np.ndarray, dst: np.ndarray) -> bool:
    """rows[dst] = pages[src] on every local device; False, with nothing done, where the pages cannot be read now."""
    shards = _shards(pools, pool)
    if shards is None:
        return False
    for pages, rows in _by_field(shards, pool):
        _copy(pages, src, rows, dst)
    return True


def load_back_now(
    mover: PageMover, component: str, pools: ComponentPools, pool: HostPool, src: np.ndarray, dst: np.ndarray
) -> ComponentPools | None:
    """pages[dst] = rows[src] on every local device.

    pools:   donated, unless nothing is done
    returns: the pools with these pages, in place; None, with nothing done, where the pages cannot be written now
    """
    if _shards(pools, pool) is None:
        return None
    pools = mover.renewed(component, pools)
    shards = _shards(pools, pool)
    assert shards is not None, f"{component=}: pools that were computed are not any more"
    for pages, rows in _by_field(shards, pool):
        _copy(rows, src, pages, dst)
    return pools


def _shards(pools: ComponentPools, pool: HostPool) -> list[list[Any]] | None:
    """By field and local device. None: not computed, or laid out otherwise than pages of `local_bytes` in a row."""
    if pool.devices[0].platform != "cpu":
        return None
    found = []
    for field in pool.layout.fields:
        array: Any = pools[field.spec.name]
        if not array.is_ready():
            return None
        shards: list[Any] = local_shards(array, pool.devices)
        if shards[0].on_device_size_in_bytes() != len(array) * field.local_bytes:
            return None
        found.append(shards)
    return found


def _by_field(shards: list[list[Any]], pool: HostPool) -> Iterator[tuple[Pages, np.ndarray]]:
    """(pages, their columns of the rows) of every field on every local device."""
    for field, of_field in zip(pool.layout.fields, shards, strict=True):
        for device, shard in zip(pool.devices, of_field, strict=True):
            yield _view(shard, field.local_bytes), pool.rows[device][:, field.byte_range]


def _view(shard: Any, page_bytes: int) -> Pages:
    """The pages of one device, until their array is dropped or donated.

    Through the address, since jax keeps what `np.asarray` returns, and a donation with such a view alive is a copy.
    """
    num_bytes = len(shard) * page_bytes
    memory = (ctypes.c_uint8 * num_bytes).from_address(shard.unsafe_buffer_pointer())
    return np.frombuffer(memory, np.uint8).reshape(-1, page_bytes)


def _copy(sources: np.ndarray, src: np.ndarray, targets: np.ndarray, dst: np.ndarray) -> None:
    """targets[dst] = sources[src]"""
    if sources.shape[1] < LARGE_BYTES:
        targets[dst] = sources[src]
        return
    for source, target in zip(src.tolist(), dst.tolist(), strict=True):
        targets[target] = sources[source]
