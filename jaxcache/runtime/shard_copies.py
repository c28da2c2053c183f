"""Copies between one device's shard of a staging array and host rows. Runs on workers, touches shard-local data only.

    BACKUP     staging shard --DMA--> host view --memcpy per page--> rows
    LOAD_BACK  rows --memcpy per page--> one contiguous buffer --DMA--> staging shard

Where devices are the host itself, both DMAs are nothing: the view is the shard's memory, and the buffer becomes it.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

BUFFER_ALIGNMENT = 64  # bytes; below this the CPU client copies the buffer once more


def local_shards(array: jax.Array, devices: tuple) -> list[jax.Array]:
    """The shards on these devices, in their order."""
    by_device = {shard.device: shard.data for shard in array.addressable_shards}
    return [by_device[device] for device in devices]


def to_host(shard: jax.Array, device) -> jax.Array:
    """Starts the copy of a shard to host memory that np.asarray then views without a further copy."""
    if device.platform == "cpu":
        return shard
    return jax.device_put(shard, SingleDeviceSharding(device, memory_kind="pinned_host"))


def rows_from_pages(rows: np.ndarray, page_ids: np.ndarray, pages: np.ndarray) -> None:
    """rows[page_ids] = pages.

    rows:  uint8[num_pages, n], a column range of host rows
    pages: [at least len(page_ids), ...] of n bytes each
    """
    rows[page_ids] = pages.reshape(len(pages), -1).view(np.uint8)[: len(page_ids)]


def pages_from_rows(rows: np.ndarray, page_ids: np.ndarray, bucket: int) -> np.ndarray:
    """rows[page_ids] in a new buffer uint8[bucket, n] that nobody writes again; further pages are undefined."""
    pages = _aligned_empty(bucket, rows.shape[1])
    if rows.flags.c_contiguous:
        np.take(rows, page_ids, axis=0, out=pages[: len(page_ids)], mode="clip")
    else:  # np.take would copy all rows first
        for target, page_id in zip(pages, page_ids.tolist(), strict=False):
            target[...] = rows[page_id]
    return pages


def device_shard(pages: np.ndarray, device) -> jax.Array:
    """Starts the copy of a buffer to a device; the buffer must never be written again."""
    return jax.device_put(pages, SingleDeviceSharding(device, memory_kind=device.default_memory().kind))


def _aligned_empty(num_rows: int, row_bytes: int) -> np.ndarray:
    memory = np.empty(num_rows * row_bytes + BUFFER_ALIGNMENT, np.uint8)
    skip = -memory.ctypes.data % BUFFER_ALIGNMENT
    return memory[skip : skip + num_rows * row_bytes].reshape(num_rows, row_bytes)
