"""What keeps ranks together is needed: the simulation that passes fails when one piece of it is taken out.

The whole list of "ranks that cannot disagree" is here. The same mutations of axes and stages, applied to the compiled
program, are in tests/runtime/test_agreement.py; mutations of the core alone in tests/core/test_mutations.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np
import pytest

from jaxcache.agreement import local_outcomes
from jaxcache.agreement.lanes import DONE, LANE_BYTES, Lanes
from jaxcache.core.eviction.lru import Lru
from jaxcache.core.prefetch import PrefetchState
from jaxcache.core.prefetches import Prefetches
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.testing import scenario, simulation
from jaxcache.testing.simulation import RATES, Settings, Simulation
from jaxcache.testing.virtual_rank import Exchange, VirtualRank, WatchedAgreement
from jaxcache.types import CLOCK_MODULUS, DECLINED, NO_PAGES, Outcome, PrefetchPolicy, WritePolicy

MESH = (2, 2, 2)
NUM_STEPS = 600
SEEDS = range(6)
CP, TP, PP = range(3)

Patch = pytest.MonkeyPatch


# ---- axes and stages


def reduced_over(axes: tuple[int, ...], leader_axes: tuple[int, ...], forwards: bool):
    """An exchange whose minima leave out the other axes; forwards: whether stage 0's lanes reach the other stages."""

    def reduce(self: Exchange, rows: Sequence[bytes | None]) -> np.ndarray | None:
        if any(row is None for row in rows):
            return None
        grid = np.frombuffer(b"".join(row for row in rows if row is not None), np.int32).reshape(*MESH, -1)
        unanimous = np.broadcast_to(grid.min(axis=axes, keepdims=True), grid.shape)
        leader = np.broadcast_to(grid.min(axis=leader_axes, keepdims=True), grid.shape)
        leader = np.broadcast_to(leader[:, :, :1], grid.shape) if forwards else leader
        cut = self.num_unanimous
        return np.concatenate([unanimous[..., :cut], leader[..., cut:]], axis=-1).reshape(len(rows), -1)

    return reduce


def reducing_over_cp_only(patch: Patch) -> None:
    patch.setattr(Exchange, "reduce", reduced_over((CP,), (CP,), True))


def reducing_over_tp_only(patch: Patch) -> None:
    patch.setattr(Exchange, "reduce", reduced_over((TP,), (TP,), True))


def reducing_over_cp_and_tp_only(patch: Patch) -> None:
    patch.setattr(Exchange, "reduce", reduced_over((CP, TP), (CP, TP), True))


def stage_1_decides_by_itself(patch: Patch) -> None:
    patch.setattr(Exchange, "reduce", reduced_over((CP, TP, PP), (CP, TP), False))


def wall_clock_on_a_follower(patch: Patch) -> None:
    read, last = WatchedAgreement.read, MESH[0] * MESH[1] * MESH[2] - 1

    def own_clock(self: WatchedAgreement, *args):
        agreed, plane = read(self, *args), self.engine.effects
        if agreed is None or plane.rank != last:
            return agreed
        return agreed._replace(clock_ms=int(plane.now() * 1000) % CLOCK_MODULUS)

    patch.setattr(WatchedAgreement, "read", own_clock)


# ---- who takes part, and what it says


def a_rank_skips_the_exchange_because_nothing_of_its_own_is_in_flight(patch: Patch) -> None:
    step = VirtualRank.step

    def skips(self: VirtualRank, agreed: np.ndarray | None) -> np.ndarray | None:
        row = step(self, agreed)
        live = self.engine.storage_io.live.values()
        return row if any(not operation.status().quiet for operation in live) else None

    patch.setattr(VirtualRank, "step", skips)


def pending_is_taken_for_zero(patch: Patch) -> None:
    outcome = local_outcomes._outcome
    patch.setattr(local_outcomes, "_outcome", lambda *args: outcome(*args)._replace(done=True))


def pending_is_taken_for_quiet(patch: Patch) -> None:
    outcome = local_outcomes._outcome
    patch.setattr(local_outcomes, "_outcome", lambda *args: said_quiet(outcome(*args)))


def said_quiet(outcome: Outcome) -> Outcome:
    """As soon as it is decided."""
    return outcome._replace(quiet=outcome.done)


def failed_transfers_are_left_out(patch: Patch) -> None:
    """On the rank where they failed: its later ones move up by one place."""
    outcomes = local_outcomes.outcomes

    def without_failed(core, statuses, pays):
        unwanted = core.unwanted_transfers()
        failed = [id for id, status in statuses.items() if not status.ok and id not in unwanted]
        return {id: said for id, said in outcomes(core, statuses, pays).items() if id not in failed}

    patch.setattr(local_outcomes, "outcomes", without_failed)


def lanes_are_matched_by_position(patch: Patch) -> None:
    """The same, where the lanes do not name the transfers: nobody notices that they have moved up."""
    failed_transfers_are_left_out(patch)
    slot, own_bytes = Lanes._slot, DONE * LANE_BYTES  # id and ~id

    def anonymous(self: Lanes, transfer_id: int, outcome: Outcome) -> bytes:
        return self._absent_slots[:own_bytes] + slot(self, transfer_id, outcome)[own_bytes:]

    patch.setattr(Lanes, "_slot", anonymous)


# ---- what is decided with it


def a_rank_that_would_rather_compute_decides_alone(patch: Patch) -> None:
    """By what it has measured itself, instead of by the least end that all ranks name."""
    outcomes, commit = local_outcomes.outcomes, Prefetches._commit_query
    declined: set[tuple[int, int]] = set()  # of which core, and which QUERY

    def noted(core, statuses, pays):
        declined.update((id(core.prefetches), query) for query in statuses if not pays(query))
        return outcomes(core, statuses, lambda query: True)

    def own(self, prefetch, outcome):
        if outcome.done and (id(self), prefetch.id) in declined:
            outcome = outcome._replace(smallest_end=DECLINED)
        commit(self, prefetch, outcome)

    patch.setattr(local_outcomes, "outcomes", noted)
    patch.setattr(Prefetches, "_commit_query", own)


def the_first_minimum_is_the_answer_for_windows_and_states(patch: Patch) -> None:
    commit = Prefetches._commit_query

    def first_round(self, prefetch, outcome):
        commit(self, prefetch, outcome._replace(largest_end=outcome.smallest_end))

    patch.setattr(Prefetches, "_commit_query", first_round)


def host_pages_are_freed_at_cancel(patch: Patch) -> None:
    abandon = Prefetches._abandon

    def frees(self, prefetch):
        was_fetching = prefetch.state is PrefetchState.FETCH
        abandon(self, prefetch)
        if was_fetching:
            for host, pages in zip(self.tiers.host, prefetch.pages, strict=True):
                host.allocator.free(pages)
            prefetch.pages = [NO_PAGES] * len(prefetch.pages)

    patch.setattr(Prefetches, "_abandon", frees)


def a_model_step_runs_between_insert_and_apply(patch: Patch) -> None:
    patch.setattr(PrefixCache, "plan_is_applied", lambda self: True)


def capacity_is_what_this_rank_has(patch: Patch) -> None:
    """The last rank has one page less, and was not asked at the start."""
    ranks = count(1)

    def core(components, config):
        pages = dict(config.device_pages)
        pages["full"] -= next(ranks) == MESH[0] * MESH[1] * MESH[2]
        return PrefixCache(components, replace(config, device_pages=pages))

    patch.setattr(scenario, "PrefixCache", core)
    make = simulation.Scenario

    def made(*args, **options):
        nonlocal ranks
        ranks = count(1)
        return make(*args, **options)

    patch.setattr(simulation, "Scenario", made)


def a_set_is_iterated_in_eviction_order(patch: Patch) -> None:
    """Its order is that of addresses: another one on every rank."""
    patch.setattr(Lru, "first", lambda self: next(iter({*self._nodes, *self._back}), None))


MUTATIONS = (
    reducing_over_cp_only,
    reducing_over_tp_only,
    reducing_over_cp_and_tp_only,
    stage_1_decides_by_itself,
    a_rank_skips_the_exchange_because_nothing_of_its_own_is_in_flight,
    the_first_minimum_is_the_answer_for_windows_and_states,
    pending_is_taken_for_zero,
    pending_is_taken_for_quiet,
    host_pages_are_freed_at_cancel,
    a_model_step_runs_between_insert_and_apply,
    capacity_is_what_this_rank_has,
    wall_clock_on_a_follower,
    a_set_is_iterated_in_eviction_order,
    failed_transfers_are_left_out,
    lanes_are_matched_by_position,
    a_rank_that_would_rather_compute_decides_alone,
)


# ---- what makes them show soon: fields of the config, and rates of operations


@dataclass(frozen=True)
class Setup:
    config: Mapping[str, Any] = field(default_factory=dict)
    rates: Mapping[str, int] = field(default_factory=dict)
    seeds: Sequence[int] = SEEDS

    def apply(self, patch: Patch) -> None:
        make = simulation.make_config
        patch.setattr(simulation, "make_config", lambda *args: replace(make(*args), **self.config))
        for kind, rate in self.rates.items():
            patch.setitem(RATES, kind, rate)
        if self.config:
            patch.setitem(RATES, "change_policy", 0)


USUAL = Setup()
CLOCKS = Setup({"prefetch_policy": PrefetchPolicy.TIMEOUT})  # the only one that looks at a clock
CANCELS = Setup({"prefetch_policy": PrefetchPolicy.WAIT_COMPLETE, "host_pages": 40}, {"cancel": 300})
CROWD = Setup({"device_pages": 18, "write_policy": WritePolicy.WRITE_THROUGH}, {"arrive": 700}, range(6, 12))
QUESTIONS = Setup({"prefetch_policy": PrefetchPolicy.WAIT_COMPLETE}, {"arrive": 500}, range(4, 12))
SETUPS = {
    the_first_minimum_is_the_answer_for_windows_and_states: QUESTIONS,
    stage_1_decides_by_itself: CLOCKS,
    wall_clock_on_a_follower: CLOCKS,
    host_pages_are_freed_at_cancel: CANCELS,
    a_model_step_runs_between_insert_and_apply: CROWD,
    a_set_is_iterated_in_eviction_order: Setup({"eviction_policy": "lru"}),
}


def first_failure(seeds: Sequence[int]) -> tuple[int, Exception] | None:
    """The first seed that fails, and how."""
    for seed in seeds:
        try:
            Simulation(Settings(MESH, NUM_STEPS, seed)).run()
        except (AssertionError, RuntimeError) as error:  # RanksDiverged, or a rank whose lease may not run yet
            return seed, error
    return None


@pytest.mark.mutation
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_the_simulation_notices_that(mutation, monkeypatch):
    setup = SETUPS.get(mutation, USUAL)
    setup.apply(monkeypatch)
    mutation(monkeypatch)
    found = first_failure(setup.seeds)
    assert found is not None, f"{len(setup.seeds)} seeds pass although {mutation.__name__}"
    monkeypatch.undo()
    setup.apply(monkeypatch)
    assert first_failure([found[0]]) is None


@pytest.mark.parametrize("axes", [((CP,), (CP,)), ((CP, TP, PP), (CP, TP))], ids=str)
def test_the_mutated_exchange_differs_from_the_real_one_only_in_its_axes(axes, rng):
    exchange = Exchange({"cp": 2, "tp": 2, "pp": 2}, 30)
    rows = [row.tobytes() for row in rng.integers(-(2**31), 2**31, (8, 40)).astype(np.int32)]
    whole = reduced_over((CP, TP, PP), (CP, TP), True)
    np.testing.assert_array_equal(whole(exchange, rows), exchange.reduce(rows))
    assert not np.array_equal(reduced_over(*axes, False)(exchange, rows), exchange.reduce(rows))
