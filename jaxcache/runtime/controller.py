"""THE loop: what happens once per step, in which order. The only place where core, transfers and agreement meet.

    step    read the agreement of the step before -> commit -> poll the engine -> issue the next agreement
    apply   take the plan -> hand it to the engine, which dispatches it in order

Serving thread only. Every process makes the same calls in the same order; only outcomes differ, and those are agreed.
"""

from __future__ import annotations

import time
from typing import Any

from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.pools.device_pool import DevicePools
from jaxcache.runtime import carried
from jaxcache.runtime.agreement import Agreed, Agreement
from jaxcache.runtime.transfer_engine import TransferEngine
from jaxcache.types import RanksDiverged


class Controller:
    """Drives one core, one engine and one agreement."""

    def __init__(self, core: PrefixCache, engine: TransferEngine, agreement: Agreement):
        self.core = core
        self.engine = engine
        self.agreement = agreement

    def step(self) -> None:
        """Takes what the ranks agreed on, and says what happened here. Raises RanksDiverged, TransferFault."""
        agreed = self._read()
        before = self.core.live_transfers()
        if agreed is not None:
            self.core.commit(agreed.outcomes, agreed.clock_ms)
        else:
            self.core.commit({})
        live = self.core.live_transfers()
        for id in before:
            if id not in live:
                self.engine.forget(id)
        for id in self.core.unwanted_transfers():
            self.engine.cancel(id)
        self._issue()

    def _read(self) -> Agreed | None:
        try:
            return self.agreement.read()
        except RanksDiverged as error:
            raise RanksDiverged(f"{error}; last decisions: {list(self.core.planner.recent)[-16:]}") from error

    def _issue(self) -> None:
        core = self.core
        if carried.is_due(core):
            outcomes = carried.outcomes(core, self.engine.poll())
            self.agreement.issue(core.step_number, core.digest, outcomes, _clock_ms(), self.engine.fault is None)

    def apply(self, pools: DevicePools) -> DevicePools:
        """Dispatches everything planned so far, in plan order; load-backs of earlier steps are scattered first."""
        plan: Any = self.core.take_plan()
        return self.engine.apply(pools, plan.transfers, self.core.step_number)


def _clock_ms() -> int:
    """Milliseconds of a clock that only moves forward, in 31 bits; used as agreed on by stage 0 only."""
    return int(time.monotonic() * 1000) & 0x7FFFFFFF
