"""THE loop: what happens once per step, in which order. The only place where core, transfers and agreement meet.

    step    read the agreement of the step before -> commit -> poll the engine -> issue the next agreement
    apply   take the plan -> hand it to the engine, which dispatches it in order

Serving thread only. Every process makes the same calls in the same order; only outcomes differ, and those are agreed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.pools.device_pool import DevicePools
from jaxcache.runtime.agreement import Agreed, Agreement
from jaxcache.runtime.transfer_engine import Status, TransferEngine
from jaxcache.types import Outcome, RanksDiverged


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
        self._issue(live)

    def _read(self) -> Agreed | None:
        try:
            return self.agreement.read()
        except RanksDiverged as error:
            raise RanksDiverged(f"{error}; last decisions: {list(self.core.planner.recent)[-16:]}") from error

    def _issue(self, live: list[int]) -> None:
        """Storage transfers are carried every step, as far as there are lanes: undecided ones first, in the order of
        their ids, so that those which only await quiet never keep others waiting. Without any, only the digest is
        exchanged, every few steps. All ranks know which it is."""
        config = self.core.config
        if not live and self.core.step_number % config.agreement_every_steps:
            return
        statuses = self.engine.poll()
        unwanted = dict.fromkeys(self.core.unwanted_transfers())
        carried = sorted(live, key=lambda id: (id in unwanted, id))[: config.max_live_transfers]
        outcomes = {id: self._outcome(id, statuses) for id in sorted(carried)}
        ok = self.engine.fault is None
        self.agreement.issue(self.core.step_number, self.core.digest, outcomes, _clock_ms(), ok)

    def _outcome(self, id: int, statuses: Mapping[int, Status]) -> Outcome:
        status = statuses.get(id)
        if status is None:  # planned, but not applied yet
            return Outcome(done=False, quiet=False)
        if status.exists is None:
            return Outcome(status.done, status.quiet, status.pages)
        if not status.done:
            return Outcome(done=False, quiet=status.quiet)
        end = self.core.largest_end(id, status.exists)
        return Outcome(True, status.quiet, smallest_end=end, largest_end=end)

    def apply(self, pools: DevicePools) -> DevicePools:
        """Dispatches everything planned so far, in plan order; load-backs of earlier steps are scattered first."""
        plan: Any = self.core.take_plan()
        return self.engine.apply(pools, plan.transfers, self.core.step_number)


def _clock_ms() -> int:
    """Milliseconds of a clock that only moves forward, in 31 bits; used as agreed on by stage 0 only."""
    return int(time.monotonic() * 1000) & 0x7FFFFFFF
