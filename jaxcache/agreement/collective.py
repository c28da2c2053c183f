"""THE collective: what one process says, reduced over the ranks of all processes, in one program of fixed shape.

Nothing else in the library communicates but the programs that make whole pages for a snapshot (pools/whole_pages.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcache.agreement.agreement import Agreement
from jaxcache.agreement.lanes import Lanes
from jaxcache.agreement.readiness import wait_until_ready
from jaxcache.agreement.reduction import ATTENTION_AXES, STAGE_AXIS, LocalReduction, Reduction, never
from jaxcache.pools.page_layout import local_devices
from jaxcache.types import RankUnresponsive

ALL_AXES = (*ATTENTION_AXES, STAGE_AXIS)
MIN_LANES = 1024  # a CPU runs programs of less than 1000 operations inside the dispatch, which then waits for all ranks


class CollectiveReduction(Reduction):
    """One program of fixed shape over all ranks of all processes, compiled once."""

    def __init__(self, mesh: Mesh, num_unanimous: int):
        self._sharding = NamedSharding(mesh, _rank_spec(mesh))
        self._program = collective(mesh, num_unanimous)
        self.num_ranks = mesh.size
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

    def finish(self, timeout_s: float, is_reported: Callable[[], bool] = never) -> bytes:
        wait_until_ready([self._shard], timeout_s, is_reported)
        return self._view(self._shard).tobytes()


def reduction_of(mesh: Mesh) -> type[LocalReduction] | type[CollectiveReduction]:
    """The form that a mesh needs."""
    return LocalReduction if len(local_devices(mesh)) == mesh.size else CollectiveReduction


def agreement_on(
    mesh: Mesh, component_names: Sequence[str], max_live: int, form: type[CollectiveReduction] | None = None
) -> Agreement:
    """The agreement of the processes of a mesh.

    max_live: storage transfers that it carries
    form:     None: the one that the mesh needs
    """
    lanes = Lanes(tuple(component_names), max_live)
    return Agreement(lanes, (form or reduction_of(mesh))(mesh, lanes.num_unanimous))


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
