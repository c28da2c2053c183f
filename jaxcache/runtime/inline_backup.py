"""Backups of devices that are the host: their pages are memory that this process reads, so one copy is enough.

    gather program --> staging --> worker --> rows      two copies, a program, and a job for each device
    pages of the pool -----------------------> rows      one copy, no longer than that dispatch

Only of pools that are computed and rows that nobody uses; otherwise nothing is done, and the usual way is taken.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcache.pools.device_pool import ComponentPools
from jaxcache.pools.host_pool import HostPool
from jaxcache.pools.page_layout import FieldLayout
from jaxcache.runtime.shard_copies import local_shards

LARGE_BYTES = 8192  # from here on a loop over pages is faster than numpy's, which copies twice
Pages = np.ndarray  # uint8[num_pages, local_bytes] of one field on one device


def back_up_now(pools: ComponentPools, pool: HostPool, src: np.ndarray, dst: np.ndarray) -> bool:
    """rows[dst] = pages[src] on every local device; False, with nothing done, where the pages cannot be read now."""
    if any(device.platform != "cpu" for device in pool.devices):
        return False
    views = [_views(pools[field.spec.name], field, pool.devices) for field in pool.layout.fields]
    if any(view is None for view in views):
        return False
    for field, by_device in zip(pool.layout.fields, views, strict=True):
        for device, pages in zip(pool.devices, by_device or (), strict=True):
            _copy(pages, src, pool.rows[device][:, field.byte_range], dst)
    return True


def _copy(pages: Pages, src: np.ndarray, rows: np.ndarray, dst: np.ndarray) -> None:
    if pages.shape[1] < LARGE_BYTES:
        rows[dst] = pages[src]
        return
    for source, target in zip(src.tolist(), dst.tolist(), strict=True):
        rows[target] = pages[source]


def _views(array: Any, field: FieldLayout, devices: Sequence) -> list[Pages] | None:
    """The pages on each device, until `array` is dropped or donated. None: not computed, or laid out otherwise.

    Through the address, since jax keeps what `np.asarray` returns, and a donation with such a view alive is a copy.
    """
    if not array.is_ready():
        return None
    shape = (array.shape[0], field.local_bytes)
    views = []
    shard: Any
    for shard in local_shards(array, tuple(devices)):
        if shard.on_device_size_in_bytes() != shape[0] * shape[1]:
            return None
        memory = (ctypes.c_uint8 * (shape[0] * shape[1])).from_address(shard.unsafe_buffer_pointer())
        views.append(np.frombuffer(memory, np.uint8).reshape(shape))
    return views
