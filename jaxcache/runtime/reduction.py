"""Two ways to reduce the ranks' rows to one, which give the same answer.

    lanes        unanimous                   leader
    reduced      min over cp, tp and pp      min over cp and tp on stage 0, forwarded stage by stage

`reduce_rows` says what that means; `LocalReduction` does it where one process owns the whole mesh, and
`CollectiveReduction` is THE collective where it does not. Nothing else in the library
communicates but the programs that make whole pages for a snapshot (pools/whole_pages.py).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcache.pools.page_layout import local_devices
from jaxcache.runtime.readiness import nobody, wait_until_ready
from jaxcache.types import RankUnresponsive

ATTENTION_AXES = ("cp", "tp")
STAGE_AXIS = "pp"
ALL_AXES = (*ATTENTION_AXES, STAGE_AXIS)
MIN_LANES = 1024  # a CPU runs programs of less than 1000 operations inside the dispatch, which then waits for all ranks


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
    """Started in one step, finished in a later one; at most one is under way."""

    @abstractmethod
    def __init__(self, mesh: Mesh, num_unanimous: int): ...

    @abstractmethod
    def start(self, rows: np.ndarray) -> None:
        """Hands over the rows: int32[num_ranks, num_lanes] in mesh order; only those of this process's ranks count."""

    @abstractmethod
    def finish(self, timeout_s: float, is_reported: Callable[[], bool] = nobody) -> bytes:
        """Waits for the reduced row, int32[num_lanes]; RankUnresponsive as `wait_until_ready`."""


class LocalReduction(Reduction):
    """For one process that owns the whole mesh."""

    def __init__(self, mesh: Mesh, num_unanimous: int):
        assert len(local_devices(mesh)) == mesh.size, "a local reduction needs every rank in this process"
        self._shape, self._num_unanimous = dict(mesh.shape), num_unanimous

    def start(self, rows: np.ndarray) -> None:
        self._reduced = reduce_rows(rows, self._shape, self._num_unanimous)

    def finish(self, timeout_s: float, is_reported: Callable[[], bool] = nobody) -> bytes:
        return self._reduced.tobytes()


class CollectiveReduction(Reduction):
    """One program of fixed shape over all ranks of all processes, compiled once."""

    def __init__(self, mesh: Mesh, num_unanimous: int):
        self._sharding = NamedSharding(mesh, _rank_spec(mesh))
        self._program = collective(mesh, num_unanimous)
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        self._view = memoryview if on_cpu else np.asarray  # takes half as long, but cannot see a GPU

    def start(self, rows: np.ndarray) -> None:
        rows = np.array(rows)  # a dispatched program may still read what it was given
        by_rank = jax.make_array_from_callback(rows.shape, self._sharding, lambda index: rows[index])
        try:
            self._shard = self._program(by_rank).addressable_shards[0].data
        except (ValueError, jax.errors.JaxRuntimeError) as error:  # jax raises either for what the runtime reports
            raise RankUnresponsive(f"failed: {error}") from error
        self._shard.copy_to_host_async()

    def finish(self, timeout_s: float, is_reported: Callable[[], bool] = nobody) -> bytes:
        wait_until_ready([self._shard], timeout_s, is_reported)
        return self._view(self._shard).tobytes()


def reduction_of(mesh: Mesh) -> type[Reduction]:
    """The form that a mesh needs."""
    return LocalReduction if len(local_devices(mesh)) == mesh.size else CollectiveReduction


@functools.lru_cache(maxsize=16)  # caches of one mesh share it: nothing to compile for the second
def collective(mesh: Mesh, num_unanimous: int):
    """jit int32[num_ranks, num_lanes] -> the same shape, every rank's row reduced; both sharded one row per rank."""
    spec = _rank_spec(mesh)
    sharding = NamedSharding(mesh, spec)

    def agree(row: jax.Array) -> jax.Array:
        padding = ((0, 0), (0, max(0, MIN_LANES - num_unanimous)))
        unanimous = lax.pmin(jnp.pad(row[:, :num_unanimous], padding), ALL_AXES)[:, :num_unanimous]
        leader = _from_stage_0(lax.pmin(row[:, num_unanimous:], ATTENTION_AXES), mesh.shape[STAGE_AXIS])
        return jnp.concatenate([unanimous, leader], axis=1)

    local = jax.shard_map(agree, mesh=mesh, in_specs=spec, out_specs=spec)
    return jax.jit(local, in_shardings=sharding, out_shardings=sharding)


def _from_stage_0(value: jax.Array, num_stages: int) -> jax.Array:
    """Every stage gets stage 0's value, one hop after the other."""
    stage = lax.axis_index(STAGE_AXIS)
    for k in range(1, num_stages):
        value = jnp.where(stage == k, lax.ppermute(value, STAGE_AXIS, [(k - 1, k)]), value)
    return value


def _rank_spec(mesh: Mesh) -> PartitionSpec:
    return PartitionSpec(mesh.axis_names)
