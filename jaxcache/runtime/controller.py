"""THE loop: what happens once per step, in which order. The only place where core, transfers and agreement meet.

    step    read the agreement of the step before -> commit -> poll the engine -> issue the next agreement
    apply   take the plan -> hand it to the engine, which dispatches it in order

Serving thread only. Every process makes the same calls in the same order; only outcomes differ, and those are agreed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from jaxcache.agreement import local_outcomes
from jaxcache.agreement.agreement import Agreement
from jaxcache.agreement.lanes import AgreedReport
from jaxcache.agreement.peers import Peers, ProcessReport
from jaxcache.core import bad_input
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.core.serving import changes
from jaxcache.engine.effects import Effects, Pools
from jaxcache.engine.transfer_engine import TransferEngine
from jaxcache.types import RanksDiverged, RankUnresponsive, ServingEnded, TransferFault

P = TypeVar("P", bound=Pools)
E = TypeVar("E", bound=Effects)


class Controller(Generic[E]):
    """Drives one core, one engine and one agreement."""

    def __init__(self, core: PrefixCache, engine: TransferEngine[E], agreement: Agreement, fleet: Peers):
        self.core = core
        self.engine = engine
        self.agreement = agreement
        self.fleet = fleet
        self.serving = core.serving
        self._has_told = False
        self.is_draining = False  # the loop does nothing else: storing does not rest, and each step tells the clock
        self.agreed = AgreedReport(0, {}, 0)  # the last one
        fleet.watch(self._state)

    def step(self) -> None:
        """Takes what the ranks agreed on, and says what happened here.

        Raises RankUnresponsive, RanksDiverged, TransferFault.
        """
        self._check()
        self._step()

    @changes
    def _step(self) -> None:
        bad_input.check_applied(self.core.outbox.transfers)  # before the agreement is taken
        agreed = self._read()
        ended = self.core.commit({}) if agreed is None else self.core.commit(agreed.outcomes, agreed.clock_ms)
        is_busy = bool(self.core.leases)
        self.engine.serves(is_busy and not self.is_draining)
        self.engine.rates.step(is_busy)
        for id in ended:
            self.engine.forget(id)
        for id in self.core.unwanted_transfers():
            self.engine.cancel(id)
        self._issue()

    def _read(self) -> AgreedReport | None:
        try:
            agreed = self.agreement.read(self.fleet.wait_s, self.fleet.is_reported)
        except RankUnresponsive as error:
            raise self._unresponsive("the agreement", error) from error
        except RanksDiverged as error:
            raise self._end(self.fleet.diverged(error, self._state())) from error
        except TransferFault as error:
            is_own = self.engine.fault is not None
            told = TransferFault(f"{error}: {self.engine.fault!r}") if is_own else error
            raise self._end(self.fleet.fault(told, self._state(), is_own)) from self.engine.fault
        self.agreed = agreed or self.agreed
        return agreed

    def _issue(self) -> None:
        """Nothing is exchanged by a process that has nobody to differ from and nothing new to say."""
        core = self.core
        is_alone = len(self.fleet.processes) == 1
        if not (self._has_news() if is_alone else local_outcomes.is_due(core)):
            return
        outcomes = local_outcomes.outcomes(core, self.engine.poll(), self._pays)
        ok = self.engine.fault is None
        try:
            self.agreement.issue(core.step_number, local_outcomes.digest(core), outcomes, self._clock_ms(), ok)
        except RankUnresponsive as error:
            raise self._unresponsive("the agreement", error) from error

    def _clock_ms(self) -> int:
        """Of a clock that only moves forward; used as agreed on by stage 0 only."""
        return int(self.engine.effects.now() * 1000)

    def _pays(self, query_id: int) -> bool:
        return not self.core.config.prefetch_if_faster or self.engine.rates.pays(query_id)

    def _has_news(self) -> bool:
        """Of STOREs only the end; what prefetches bring is of use before theirs."""
        core = self.core
        if self.is_draining:
            return core.needs_exchange()
        is_awaited = core.prefetches.live or core.stores.num_awaited_exchanges
        return bool(is_awaited) or (bool(core.stores.live) and self.engine.has_ended())

    def wait(self, arrays: Sequence[Any]) -> None:
        """Until these are computed, which may need all ranks. Raises RankUnresponsive."""
        self._check()
        try:
            self.fleet.wait_for(arrays)
        except RankUnresponsive as error:
            raise self._unresponsive("a computation", error) from error

    @contextmanager
    def needed(self) -> Iterator[None]:
        """Around what this process cannot serve without: in a fleet, failing ends serving, and the others hear why."""
        try:
            yield
        except Exception as error:
            if len(self.fleet.processes) > 1:
                self._has_told = True
                self.serving.end(error, "init_pools")
                self.fleet.give_up(error, self._state())
            raise

    def _unresponsive(self, what: str, error: RankUnresponsive) -> ServingEnded:
        return self._end(self.fleet.unresponsive(what, error, self._state()))

    def _end(self, error: ServingEnded) -> ServingEnded:
        """Serving has ended, and the other processes know of it."""
        self._has_told = True
        self.serving.end(error, "")
        return error

    def _tell(self) -> None:
        """Tells the others if a call of the core has ended serving here: they need not wait for this process."""
        if self.serving.ended is not None and not self._has_told:
            self._has_told = True
            self.fleet.fault(self.serving.ended, self._state())

    def _check(self) -> None:
        """What has ended serving ends every later call."""
        self._tell()
        self.serving.check()

    def close(self) -> None:
        """Joins the engine's threads, unless serving has ended: they may wait for ever for what others owe."""
        self._tell()
        self.fleet.close()
        if self.serving.ended is None:
            self.engine.close()

    def _state(self) -> ProcessReport:
        core, known, agreed = self.core, self.core.decisions, self.agreed
        since = max(agreed.step, known.complete_since())
        decisions = [decision for decision in known.recent.copy() if decision[0] >= since]
        ids = f"transfers {sorted(agreed.outcomes)}" if agreed.outcomes else "no transfers"
        last = f"last agreed in step {agreed.step} on {ids}"
        return ProcessReport(core.step_number, local_outcomes.digest(core), last, since, decisions, core.counts())

    def apply(self, pools: P) -> P:
        """Dispatches everything planned so far, in plan order; load-backs of earlier steps are scattered first.

        Whatever goes wrong in between ends serving: TransferFault, or RankUnresponsive.
        """
        self._check()
        core = self.core
        bad_input.check_computed(core.leases.uncomputed, core.tiers, core.outbox.transfers)
        try:
            plan = self.core.take_plan()
            return self.engine.apply(pools, plan.transfers, self.core.step_number)
        except BaseException as error:  # the plan is taken and half done: pages would not hold what the core believes
            fault = error if isinstance(error, TransferFault) else _not_carried_out(error)
            ended = self._end(self.fleet.fault(fault, self._state()))
            if not isinstance(error, Exception):
                raise  # the program is to stop
            raise ended from fault.__cause__


def _not_carried_out(error: BaseException) -> TransferFault:
    fault = TransferFault(f"a plan was not carried out: {error!r}")
    fault.__cause__ = error
    return fault
