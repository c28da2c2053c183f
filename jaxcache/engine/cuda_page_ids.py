"""Page ids for programs on GPUs, written by the copy engine into arrays that earlier programs have read.

    program n    reads ids --> gives the array back        program n + 8    ids, written over the old ones

jax would make an array of them for each program, on the serving thread.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxcache.engine.cuda_copies import CopyEngine
from jaxcache.engine.shard_copies import local_shards
from jaxcache.pools.device_pool import PageIdArrays
from jaxcache.pools.host_pool import pinned_memory
from jaxcache.pools.page_layout import local_devices

MAX_ARRAYS = 8  # of one bucket, that wait


class CudaPageIds(PageIdArrays):
    """Serving thread only."""

    def __init__(self, mesh: Mesh, max_ids: int):
        """max_ids: of one program."""
        self._devices = local_devices(mesh)
        self._copies = [CopyEngine(device.local_hardware_id) for device in self._devices]
        pinned = [pinned_memory(4 * max_ids, device) for device in self._devices]
        self._owners, self._rows = [owner for owner, _ in pinned], [memory.view(np.int32) for _, memory in pinned]
        self._arrays: defaultdict[int, deque[jax.Array]] = defaultdict(lambda: deque(maxlen=MAX_ARRAYS))

    def of(self, page_ids: np.ndarray) -> np.ndarray | jax.Array:
        """On the devices, if an array has been given back and read."""
        num_ids = len(page_ids)
        waiting: deque[Any] = self._arrays[num_ids]
        if not waiting or not waiting[0].is_ready():
            return page_ids
        array = waiting.popleft()
        for copies, row, shard in zip(self._copies, self._rows, local_shards(array, self._devices), strict=True):
            row[:num_ids] = page_ids
            copies.start(shard.unsafe_buffer_pointer(), row.ctypes.data, 4 * num_ids)
        for copies in self._copies:
            copies.wait()
        return array

    def give_back(self, array: jax.Array) -> None:
        self._arrays[len(array)].append(array)
