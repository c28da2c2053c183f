"""The core against a dictionary of all prefixes that were ever published, in any order of calls that Hypothesis finds.

The simple model is `Scenario.published`: a hit that nobody published, or a page with other content than its tokens
say, fails. `invariants.check` recomputes everything after every rule.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jaxcache.core import invariants
from jaxcache.testing.request import Request
from jaxcache.types import PrefetchPolicy, TransferKind, WritePolicy
from tests.core.consumer import Consumer
from tests.core.driver import draw_components, draw_config
from tests.core.strict import Strict

MIXTURES = (("full",), ("full", "window"), ("full", "state"), ("full", "window", "state"))
PAGE_TOKENS = (1, 4, 16)
MAX_PAGES = 8
INTERESTING = (
    "waits",
    "evicted_pages",
    "duplicate_pages",
    "backup_pages",
    "skipped_backup_pages",
    "load_back_pages",
    "stored_pages",
    "storage_tokens_used",
)

place = st.integers(0, 5)


class CoreMachine(RuleBasedStateMachine):
    """One rank: two would only repeat what the fuzz shows. `happened` collects the counters of all runs.

    fixed: fields of CacheConfig that are not drawn; events: checked after every rule
    """

    def __init__(self, mixture: tuple[str, ...], page_tokens: int, happened: Counter[str], fixed: dict[str, Any]):
        super().__init__()
        self.fixed = fixed
        self.consumer: Consumer | None = None
        self.mixture = mixture
        self.page_tokens = page_tokens
        self.happened = happened
        self.scenario: Strict | None = None

    @initialize(
        seed=st.integers(0, 2**32 - 1),
        write_policy=st.sampled_from(WritePolicy),
        prefetch_policy=st.sampled_from(PrefetchPolicy),
        host_pages=st.sampled_from([1, 4, MAX_PAGES, 24]),
    )
    def start(self, seed: int, write_policy: WritePolicy, prefetch_policy: PrefetchPolicy, host_pages: int):
        components = draw_components(Random(seed), self.mixture, self.page_tokens)
        overrides: dict[str, Any] = {"write_policy": write_policy, "prefetch_policy": prefetch_policy}
        overrides |= {"host_pages": host_pages, **self.fixed}
        config = draw_config(Random(seed), components, self.page_tokens, MAX_PAGES, **overrides)
        self.scenario = Strict(components, config, seed)
        self.scenario.wish_chance = 0.2
        self.consumer = Consumer(self.core) if config.events else None

    def teardown(self):
        if self.scenario is None:
            return
        self.scenario.wind_down()
        invariants.check(self.core)
        self.happened.update(self.core.counters)
        self.happened["evicted_pages"] += sum(self.core.tiers.num_evicted_pages)
        invariants.check_empty(self.core)

    @property
    def core(self):
        assert self.scenario is not None
        return self.scenario.core

    @invariant()
    def everything_adds_up(self):
        if self.scenario is not None:
            invariants.check(self.core)

    @invariant()
    def the_events_tell_it_all(self):
        if self.consumer is not None:
            self.consumer.check()

    # ---- the loop

    @rule(times=st.sampled_from([1, 1, 1, 5]))
    def step(self, times: int):
        """A load-back is applied before the next step begins (`commit` insists); anything else may wait."""
        for _ in range(times):
            if any(transfer.kind is TransferKind.LOAD_BACK for transfer in self.core.outbox.transfers):
                self.scenario.apply()
            self.scenario.step()

    @rule()
    def apply(self):
        self.scenario.apply()

    @rule()
    def iterate(self):
        """What a serving loop does most of the time."""
        self.step(1)
        self.arrive()
        for request in list(self.scenario.waiting):
            self.scenario.admit(request)
        self.scenario.apply()
        for request in list(self.scenario.running):
            self.scenario.run(request)

    # ---- requests

    def _one_of(self, requests: list[Request], place: int) -> Request:
        return requests[place % len(requests)]

    @rule()
    def arrive(self):
        if len(self.scenario.waiting) < 5:
            self.scenario.arrive(MAX_PAGES * self.page_tokens)

    @precondition(lambda self: self.scenario.waiting)
    @rule(place=place)
    def admit(self, place: int):
        self.scenario.admit(self._one_of(self.scenario.waiting, place))

    @precondition(lambda self: self.scenario.waiting)
    @rule(place=place)
    def give_up(self, place: int):
        self.scenario.give_up(self._one_of(self.scenario.waiting, place))

    @precondition(lambda self: self.scenario.running)
    @rule(place=place)
    def run(self, place: int):
        self.scenario.run(self._one_of(self.scenario.running, place))

    @precondition(lambda self: self.scenario.running)
    @rule(place=place)
    def insert(self, place: int):
        self.scenario.insert(self._one_of(self.scenario.running, place))

    @precondition(lambda self: self.scenario.running)
    @rule(place=place)
    def finish(self, place: int):
        self.scenario.finish(self._one_of(self.scenario.running, place))

    # ---- accidents

    @precondition(lambda self: self.scenario.core.counters["admits"] > 8)
    @rule(which=st.sampled_from(["reset", "forget_device", "retire 0", "retire 1"]))
    def accident(self, which: str):
        if which == "reset":
            self.scenario.reset()
        elif which == "forget_device":
            self.scenario.forget_device()
        else:
            self.scenario.retire(int(which[-1]))


def run_machine(
    mixture: tuple[str, ...], page_tokens: int, max_examples: int, num_rules: int, **fixed: Any
) -> Counter[str]:
    happened: Counter[str] = Counter()
    run_state_machine_as_test(
        partial(CoreMachine, mixture, page_tokens, happened, fixed),
        settings=settings(
            max_examples=max_examples, stateful_step_count=num_rules, suppress_health_check=list(HealthCheck)
        ),
    )
    return happened


@pytest.fixture(scope="module")
def totals() -> dict[tuple, Counter[str]]:
    return {}


@pytest.mark.timeout(900)  # shrinking a failure takes up to five minutes
@pytest.mark.parametrize("page_tokens", PAGE_TOKENS)
@pytest.mark.parametrize("mixture", MIXTURES, ids="+".join)
def test_core_against_a_dictionary(mixture, page_tokens, totals):
    totals[mixture, page_tokens] = run_machine(mixture, page_tokens, max_examples=40, num_rules=60)


def test_everything_interesting_happened(totals):
    if len(totals) < len(MIXTURES) * len(PAGE_TOKENS):
        pytest.skip("only some of the machines ran")
    happened = sum(totals.values(), Counter())
    assert not [name for name in INTERESTING if not happened[name]], happened


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page_tokens", PAGE_TOKENS)
@pytest.mark.parametrize("mixture", MIXTURES, ids="+".join)
def test_core_against_a_dictionary_for_long(mixture, page_tokens):
    run_machine(mixture, page_tokens, max_examples=400, num_rules=150)
