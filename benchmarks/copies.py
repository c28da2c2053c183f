"""Backups and load-backs of one component, through the transfer engine, as often as one likes."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
from jax.sharding import Mesh

from jaxcache.components import FieldSpec, FullAttention
from jaxcache.engine.device_effects import DeviceEffects
from jaxcache.engine.transfer_engine import TransferEngine
from jaxcache.pools.device_pool import bucket_pages, init_pools
from jaxcache.pools.page_layout import page_layouts
from jaxcache.types import Move, Transfer, TransferKind


class Copies:
    """Moves always the same pages, half of its pools, in random order. Programs are compiled when they are used first.

    num_bytes: that one transfer moves, on all devices of the process
    """

    def __init__(self, mesh: Mesh, row_bytes: int, num_moved: int, num_fields: int = 1):
        """
        row_bytes:  of a page on each rank, a multiple of 128 * num_fields
        num_fields: of a page, all alike: more than one where a pool is a list of layers
        """
        cp, tp, pp = (mesh.shape[axis] for axis in ("cp", "tp", "pp"))
        shape = (pp, 2, 8 * cp, 2 * tp, row_bytes // num_fields // 128)
        field = FieldSpec("", shape, "float32", ("layers", None, "slots", "heads", None))
        fields = tuple(replace(field, name=f"field{i}") for i in range(num_fields))
        layouts = page_layouts([FullAttention("full", fields)], mesh)
        pages = {"full": 2 * num_moved}
        effects = DeviceEffects(layouts, mesh, pages, pages, max_bucket=bucket_pages(num_moved))
        self.engine = TransferEngine(effects, effects.parts({}), None, deadline_s=60, num_threads=4)
        self.pools = init_pools(layouts, pages, mesh)
        self.num_bytes = num_moved * effects.page_bytes["full"]
        order = np.random.default_rng(0).permutation(2 * num_moved).astype(np.int32)
        device_ids, host_ids = order[:num_moved], order[num_moved:]
        self._moves = {
            TransferKind.BACKUP: Move("full", device_ids, host_ids),
            TransferKind.LOAD_BACK: Move("full", host_ids, device_ids),
        }
        self._step = 0

    def apply(self, *kinds: TransferKind) -> None:
        """One step of the engine with these transfers, and the scatter of what the step before loaded."""
        self._step += 1
        transfers = [
            Transfer(2 * self._step + i, kind, self._step, (self._moves[kind],)) for i, kind in enumerate(kinds)
        ]
        self.pools = self.engine.apply(self.pools, transfers, self._step)

    def backup(self) -> None:
        """Until the pages are in their host rows."""
        self.apply(TransferKind.BACKUP)
        self.engine.drain()

    def load_back(self) -> None:
        """Until the pages are in the pools."""
        self.apply(TransferKind.LOAD_BACK)
        self.apply()
        jax.block_until_ready(self.pools)
