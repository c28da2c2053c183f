"""One rank of the simulation: the real core, a fake data plane, a clock of its own, and the step of the controller.

step      what was agreed in the step before -> commit -> poll the plane -> what this rank says now
exchange  what all ranks say -> what each of them gets in the next step
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.runtime import carried, reduction
from jaxcache.runtime.lanes import Agreed, Lanes, Said
from jaxcache.testing.chance import mix
from jaxcache.testing.fake_plane import FakePlane
from jaxcache.types import CLOCK_MODULUS, Outcome


class VirtualRank:
    """clock_ms: of any origin, and up to 2 % fast or slow."""

    def __init__(self, core: PrefixCache, plane: FakePlane, lanes: Lanes):
        self.core, self.plane, self.lanes = core, plane, lanes
        seed = plane.delays.seed
        self._origin_ms = mix(seed, plane.rank, 1) % CLOCK_MODULUS
        self._drift = 0.98 + mix(seed, plane.rank, 2) % 1000 / 25_000
        self._said: Said | None = None

    @property
    def clock_ms(self) -> int:
        return int(self._origin_ms + self.plane.jobs.now_us / 1000 * self._drift) % CLOCK_MODULUS

    def step(self, reduced: np.ndarray | None) -> bytes | None:
        """reduced: the row of the step before, or None; returns this rank's row, or None without an exchange."""
        core, plane = self.core, self.plane
        if reduced is None:
            ended = core.commit({})
        else:
            assert self._said is not None
            agreed = self.lanes.unpack(reduced.tobytes(), self._said)
            self._check(agreed.outcomes)
            ended = core.commit(agreed.outcomes, self.leader_clock_ms(agreed))
        for id in ended:
            plane.io.forget(id)
        for id in core.unwanted_transfers():
            plane.io.cancel(id)
        self._said = None
        if not carried.is_due(core):
            return None
        outcomes = carried.outcomes(core, plane.io.poll(), self._pays)
        self._said = self.lanes.pack(core.step_number, carried.digest(core), outcomes, self.clock_ms, True)
        return self._said.packed

    def _pays(self, query_id: int) -> bool:
        """Each rank has measured something else."""
        delays = self.plane.delays
        return not delays.declines or mix(delays.seed, self.plane.rank, query_id) % 128 > 0

    def leader_clock_ms(self, agreed: Agreed) -> int:
        """Stage 0's."""
        return agreed.clock_ms

    def _check(self, agreed: Mapping[int, Outcome]) -> None:
        """Nothing that is still under way here was taken for done or quiet."""
        for id, outcome in agreed.items():
            if outcome.done or outcome.quiet:
                here = self.plane.io.live[id].status()
                assert here.done or not outcome.done, f"R4: rank {self.plane.rank}: {id} is not done, but taken for it"
                assert here.quiet or not outcome.quiet, f"L6: rank {self.plane.rank}: {id} is not quiet"


class Exchange:
    """Between the ranks of a mesh: the reduction of the product, one row per rank.

    mesh_shape: {"cp": n, "tp": n, "pp": n}; ranks are counted in the order of the mesh
    """

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
