"""Copies between one device's shard of a staging array and host rows. Runs on workers, touches shard-local data only.

BACKUP     staging shard --> rows          LOAD_BACK  rows --> staging shard

MemoryCopies  devices that are the host: one memcpy per page; the buffer that it fills becomes the shard
PinnedCopies  GPUs without CUDA's driver: a second pinned buffer on the way down, a pageable one on the way up
DirectCopies  GPUs: between the shard and the rows, nothing in between
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxcache.engine.cuda_copies import CudaCopies, driver
from jaxcache.pools.page_layout import FieldLayout


class ShardCopies(ABC):
    """needs_staging: whether `from_rows` writes into an array that was made before, by a program."""

    needs_staging: bool

    @abstractmethod
    def to_rows(self, pages: jax.Array, field: FieldLayout, rows: np.ndarray, page_ids: np.ndarray) -> None:
        """The field's columns of rows[page_ids] = pages.

        pages: [at least len(page_ids), *local_shape], on the device
        rows:  uint8[num_pages, row_bytes] of the device's host pool
        """

    @abstractmethod
    def from_rows(
        self, rows: np.ndarray, page_ids: np.ndarray, field: FieldLayout, bucket: int, staged: jax.Array | None
    ) -> jax.Array:
        """The field's columns of rows[page_ids] on the device: [bucket, *local_shape]; further pages are undefined.

        staged: what is filled and returned, where `needs_staging`; else None
        """


class MemoryCopies(ShardCopies):
    needs_staging = False

    def __init__(self, device: Any):
        self.sharding = SingleDeviceSharding(device, memory_kind=device.default_memory().kind)

    def to_rows(self, pages, field, rows, page_ids):
        rows_from_pages(rows[:, field.byte_range], page_ids, np.asarray(pages))

    def from_rows(self, rows, page_ids, field, bucket, staged):
        buffer = np.empty((bucket, field.local_bytes), np.uint8)
        pages = pages_from_rows(rows[:, field.byte_range], page_ids, buffer)
        shard = jax.device_put(pages.view(field.dtype).reshape(bucket, *field.local_shape), self.sharding)
        return jax.block_until_ready(shard)


class PinnedCopies(MemoryCopies):
    def __init__(self, device: Any):
        super().__init__(device)
        self.pinned = SingleDeviceSharding(device, memory_kind="pinned_host")

    def to_rows(self, pages, field, rows, page_ids):
        super().to_rows(jax.device_put(pages, self.pinned), field, rows, page_ids)


class DirectCopies(ShardCopies):
    needs_staging = True

    def __init__(self, device: Any):
        self.cuda = CudaCopies(device)

    def to_rows(self, pages, field, rows, page_ids):
        self.cuda.to_rows(pages, rows[:, field.byte_range], page_ids)

    def from_rows(self, rows, page_ids, field, bucket, staged):
        assert staged is not None and len(staged) == bucket, f"{bucket=} {staged=}"
        self.cuda.from_rows(rows[:, field.byte_range], page_ids, staged)
        return staged


def shard_copies(device: Any) -> ShardCopies:
    """Those that suit a device."""
    if device.platform == "cpu":
        return MemoryCopies(device)
    is_cuda = "cuda" in device.client.platform_version and driver() is not None
    return DirectCopies(device) if is_cuda else PinnedCopies(device)


def local_shards(array: jax.Array, devices: tuple) -> list[jax.Array]:
    """The shards on these devices, in their order."""
    by_device = {shard.device: shard.data for shard in array.addressable_shards}
    return [by_device[device] for device in devices]


def rows_from_pages(rows: np.ndarray, page_ids: np.ndarray, pages: np.ndarray) -> None:
    """rows[page_ids] = pages.

    rows:  uint8[num_pages, n], a column range of host rows
    pages: [at least len(page_ids), ...] of n bytes each
    """
    rows[page_ids] = pages.reshape(len(pages), -1).view(np.uint8)[: len(page_ids)]


def pages_from_rows(rows: np.ndarray, page_ids: np.ndarray, buffer: np.ndarray) -> np.ndarray:
    """buffer[: len(page_ids)] = rows[page_ids]. Returns the buffer: uint8[bucket, n]; further pages are undefined."""
    pages = buffer[: len(page_ids)]
    if rows.flags.c_contiguous:
        np.take(rows, page_ids, axis=0, out=pages, mode="clip")
    else:  # np.take would copy all rows first
        for target, page_id in zip(pages, page_ids.tolist(), strict=True):
            target[...] = rows[page_id]
    return buffer
