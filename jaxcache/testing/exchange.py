"""The exchange between the virtual ranks of a mesh: the reduction of the product, one row per rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxcache.runtime import reduction


class Exchange:
    """mesh_shape: {"cp": n, "tp": n, "pp": n}; ranks are counted in the order of the mesh."""

    def __init__(self, mesh_shape: dict[str, int], num_unanimous: int):
        self.mesh_shape, self.num_unanimous = mesh_shape, num_unanimous

    def reduce(self, rows: Sequence[bytes | None]) -> np.ndarray | None:
        """What every rank gets for what each has said: int32[num_ranks, num_lanes]. None if nobody says anything.

        rows: the lanes of each rank, packed
        Some saying nothing is an AssertionError: the others would wait for ever.
        """
        silent = [rank for rank, row in enumerate(rows) if row is None]
        assert len(silent) in (0, len(rows)), f"X7: ranks {silent} take no part in the exchange, the others wait"
        if silent:
            return None
        stacked = np.frombuffer(b"".join(row for row in rows if row is not None), np.int32).reshape(len(rows), -1)
        return np.broadcast_to(reduction.reduce_rows(stacked, self.mesh_shape, self.num_unanimous), stacked.shape)
