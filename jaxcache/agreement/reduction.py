"""Reduces what the ranks say to one row, which all of them get.

    lanes        unanimous                   leader
    reduced      min over cp, tp and pp      min over cp and tp on stage 0, forwarded stage by stage

`reduce_rows` says what that means; `LocalReduction` does it where one process owns the whole mesh, and
`collective.CollectiveReduction` where it does not: the same answer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jax.sharding import Mesh

ATTENTION_AXES = ("cp", "tp")
STAGE_AXIS = "pp"


def never() -> bool:
    """Nothing was reported."""
    return False


def reduce_rows(rows: np.ndarray, mesh_shape: Mapping[str, int], num_unanimous: int) -> np.ndarray:
    """What every rank must get.

    rows:       int32[num_ranks, num_lanes], in mesh order
    mesh_shape: extent of each axis, in the order of the mesh's axes; it has cp, tp and pp
    returns:    int32[num_lanes]
    """
    names = list(mesh_shape)
    grid = rows.reshape(*mesh_shape.values(), -1)
    stage_0 = np.take(grid, 0, axis=names.index(STAGE_AXIS)).reshape(-1, rows.shape[1])
    return np.concatenate([rows[:, :num_unanimous].min(axis=0), stage_0[:, num_unanimous:].min(axis=0)])


class Reduction(ABC):
    """Started in one step, finished in a later one; at most one is under way.

    num_ranks: of all processes
    """

    num_ranks: int

    @abstractmethod
    def start(self, rows: np.ndarray) -> None:
        """Hands over the rows: int32[num_ranks, num_lanes] in mesh order; only those of this process's ranks count."""

    @abstractmethod
    def finish(self, timeout_s: float, is_reported: Callable[[], bool] = never) -> bytes:
        """Waits for the reduced row, int32[num_lanes]; RankUnresponsive as `wait_until_ready`."""


class LocalReduction(Reduction):
    """For one process that owns the whole mesh."""

    def __init__(self, mesh: Mesh, num_unanimous: int):
        self._shape, self._num_unanimous = dict(mesh.shape), num_unanimous
        self.num_ranks = mesh.size

    def start(self, rows: np.ndarray) -> None:
        self._reduced = reduce_rows(rows, self._shape, self._num_unanimous)

    def finish(self, timeout_s: float, is_reported: Callable[[], bool] = never) -> bytes:
        return self._reduced.tobytes()
