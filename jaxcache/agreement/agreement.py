"""The one exchange per step in which ranks agree on outcomes: issued in step t, read in step t + 1.

step t       issue(what this rank saw) ---- one reduction, beside the model step ----+
step t + 1   read() -> AgreedReport: the same on every rank, or RanksDiverged <------+
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from jaxcache.agreement.lanes import AgreedReport, Lanes, LocalReport
from jaxcache.agreement.reduction import Reduction, never
from jaxcache.types import Outcome


class Agreement:
    """Packs what this process saw, reduces it over all ranks and unpacks the answer; serving thread only."""

    def __init__(self, lanes: Lanes, reduction: Reduction):
        self.lanes = lanes
        self._reduction = reduction
        self._issued: LocalReport | None = None

    def issue(self, step: int, digest: int, outcomes: Mapping[int, Outcome], clock_ms: int, ok: bool) -> None:
        """Starts the exchange.

        outcomes: of every live storage transfer, by id; all processes name the same ids
        clock_ms: of any origin; only stage 0's counts, modulo 2^31
        ok:       no copy between device and host has failed here
        raises:   RankUnresponsive if the runtime reports that it cannot be
        """
        assert self._issued is None, f"{step=}: the agreement of step {self._issued.step} has not been read"
        self._issued = said = self.lanes.pack(step, digest, outcomes, clock_ms, ok)
        row, num_ranks = said.row, self._reduction.num_ranks
        self._reduction.start(row[None] if num_ranks == 1 else np.broadcast_to(row, (num_ranks, len(row))))

    def read(self, timeout_s: float, is_reported: Callable[[], bool] = never) -> AgreedReport | None:
        """Waits for what was issued; None if nothing was.

        RanksDiverged and TransferFault end serving on every rank; RankUnresponsive here: it did not come in time.
        """
        issued, self._issued = self._issued, None
        if issued is None:
            return None
        return self.lanes.unpack(self._reduction.finish(timeout_s, is_reported), issued)
