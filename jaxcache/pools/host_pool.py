"""The host tier's memory: one row per page and local device, allocated and touched at start, never moved.

    rows[device]  uint8 [num_pages, row_bytes]        a row is that device's share of a page, all fields
                  |  field 0  |  field 1  | ... |

The memory is pinned where the devices copy to it by DMA. The pool knows bytes only: who may touch a row, and when, is
the transfer engine's business.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from jaxcache.pools.page_layout import FieldLayout, PageLayout, local_devices


class HostPool:
    """All host pages of one component, for the devices of this process."""

    def __init__(self, layout: PageLayout, num_pages: int, mesh: Mesh):
        self.layout, self.num_pages = layout, num_pages
        self.devices = local_devices(mesh)
        self.rows: dict[Any, np.ndarray] = {}
        self._owners: list[Any] = []  # keeps the memory behind the rows alive
        for device in self.devices:
            allocate = plain_memory if device.platform == "cpu" else pinned_memory
            owner, memory = allocate(num_pages * layout.row_bytes, device)
            self._owners.append(owner)
            self.rows[device] = memory.reshape(num_pages, layout.row_bytes)

    @property
    def num_bytes(self) -> int:
        return sum(rows.nbytes for rows in self.rows.values())

    def field_rows(self, device, field: FieldLayout) -> np.ndarray:
        """A view of one field: [num_pages, *local_shape] in its own dtype."""
        columns = self.rows[device][:, field.byte_range]
        return columns.view(field.dtype).reshape(self.num_pages, *field.local_shape)


def plain_memory(num_bytes: int, device) -> tuple[Any, np.ndarray]:
    """Page-aligned, touched memory for devices that are the host: (owner, uint8[num_bytes])."""
    owner = mmap.mmap(-1, max(num_bytes, 1))
    memory = np.frombuffer(owner, np.uint8)[:num_bytes]
    memory.fill(0)
    return owner, memory


def pinned_memory(num_bytes: int, device) -> tuple[Any, np.ndarray]:
    """Touched memory that `device` copies to by DMA: (owner, uint8[num_bytes]).

    The owner is a jax array that no program ever sees; writing its buffer directly is visible to later copies.
    MemoryError where jax may not take so much.
    """
    sharding = SingleDeviceSharding(device, memory_kind="pinned_host")
    try:
        owner = jax.device_put(np.zeros(max(num_bytes, 1), np.uint8), sharding, may_alias=False)
        address = owner.block_until_ready().unsafe_buffer_pointer()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(
            f"{num_bytes} bytes of pinned host memory do not fit: jax takes 64 GB of it in a process at most, or what "
            "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB says before jax starts. Set that, or fewer host_pages"
        ) from error
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * max(num_bytes, 1)).from_address(address))
    return owner, memory[:num_bytes]
