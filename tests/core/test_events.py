"""I13, S3: who sees only the events holds what the tree holds, whatever happens and whenever they are taken."""

from __future__ import annotations

import random
import sys
import threading
from collections import Counter
from typing import Any

import pytest

from jaxcache.core import change_log
from jaxcache.testing.scenario import Scenario
from jaxcache.types import AllCleared, BlockRemoved, BlockStored, Tier, WritePolicy
from tests.core.consumer import Consumer, in_tree
from tests.core.driver import MIXTURES, draw_components, draw_config, drive, iterate
from tests.core.helpers import FULL, PAGE, Server, prompt, state, window
from tests.core.test_state_machine import run_machine

MACHINES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "full, no host": (("full",), {"host_pages": 0}),
    "full": (("full",), {}),
    "full, write_back": (("full",), {"write_policy": WritePolicy.WRITE_BACK}),
    "full+window": (("full", "window"), {}),
    "full+state": (("full", "state"), {}),
    "full+window+state": (("full", "window", "state"), {}),
    "full+window+state, write_back": (("full", "window", "state"), {"write_policy": WritePolicy.WRITE_BACK}),
    "window+state": (("window", "state"), {}),
}


class Watched(Server):
    """A server whose events are checked after each call."""

    def __init__(self, *components, **fields: Any):
        super().__init__(*components, **{"events": True, **fields})
        self.consumer = Consumer(self.core)

    def check(self) -> None:
        super().check()
        self.consumer.check()


def held(server: Watched, tier: Tier = Tier.DEVICE, component: str = "full") -> list[bytes]:
    return sorted(server.consumer.held[tier, component])


# ---- whatever happens


@pytest.mark.timeout(900)  # shrinking a failure takes up to five minutes
@pytest.mark.parametrize("name", MACHINES)
def test_after_every_rule_the_consumer_knows_the_tree(name):
    mixture, fixed = MACHINES[name]
    happened = run_machine(mixture, 4, max_examples=20, num_rules=60, events=True, **fixed)
    assert happened["evicted_pages"], happened


@pytest.mark.parametrize("max_logged_changes", [1, 1 << 16])
def test_after_every_step_of_the_fuzz(seed, max_logged_changes):
    """Also if the log overflows in nearly every step."""
    happened: Counter[str] = Counter()
    for i, mixture in enumerate(MIXTURES):
        fields = {"mixture": mixture, "events": True, "max_logged_changes": max_logged_changes}
        happened.update(drive(1000 * seed + i, 100, accident_chance=0.05, **fields).counters)
    assert bool(happened["event_overflows"]) is (max_logged_changes == 1)


@pytest.mark.parametrize("mixture", MIXTURES, ids="+".join)
def test_events_change_no_decision(mixture, seed):
    """I8."""
    with_events, without = (drive(seed, 80, mixture=mixture, events=events).digest for events in (True, False))
    assert with_events == without


@pytest.mark.parametrize("mixture", [("full",), ("full", "window", "state")], ids="+".join)
def test_a_thread_that_takes_while_the_core_changes(mixture, seed):
    """Every interleaving gives events in their order: nothing is lost, also when the log overflows under its hands."""
    rng = random.Random(seed)
    config = draw_config(rng, draw_components(rng, mixture, 4), 4, 12, events=True, max_logged_changes=40)
    scenario = Scenario(draw_components(random.Random(seed), mixture, 4), config, seed)
    consumer = Consumer(scenario.core)
    stop = threading.Event()
    failures: list[BaseException] = []

    def take_all_the_time() -> None:
        try:
            while not stop.is_set():
                consumer.take()
        except AssertionError as error:
            failures.append(error)

    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=take_all_the_time)
    thread.start()
    try:
        for step in range(150):
            iterate(scenario, rng, 12 * 4, abort_chance=0.03)
            if step % 40 == 39:
                scenario.reset()
            elif step % 40 == 19:
                scenario.retire(step % 2)
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(switch_interval)
    assert not failures
    consumer.check()


# ---- what is said


def test_what_a_request_stores_and_what_a_branch_adds():
    server = Server(events=True)
    consumer = Consumer(server.core)
    server.prefill(prompt(16))
    consumer.take()
    sequence = server.sequence([*prompt(8), *prompt(8, 1000)])
    server.prefill(sequence)
    (event,) = consumer.take()
    keys = sequence.page_keys(4)
    assert isinstance(event, BlockStored)
    assert (event.namespace_digest, event.tier, event.component) == (server.namespace.digest, Tier.DEVICE, "full")
    assert (list(event.page_keys), event.parent_key, event.page_tokens) == (keys[2:], keys[1], PAGE)
    assert event.token_ids.tolist() == prompt(8, 1000)
    assert consumer.held == in_tree(server.core)


def test_the_first_page_follows_the_namespace():
    server = Server(events=True)
    consumer = Consumer(server.core)
    server.prefill(prompt(8))
    (event,) = consumer.take()
    assert isinstance(event, BlockStored)
    assert event.parent_key == event.namespace_digest == server.namespace.digest


def test_a_state_is_the_page_that_ends_with_it_and_a_window_what_its_entry_covers():
    """K4: the keys that storage uses."""
    server = Watched(FULL, window(6), state())
    server.prefill(prompt(16))
    keys = server.sequence(prompt(16)).page_keys(4)
    assert held(server) == sorted(keys)
    assert held(server, component="window") == sorted(keys[1:])
    assert held(server, component="state") == sorted(keys[2:])


def test_host_memory_and_load_backs():
    server = Watched(host_pages=32)
    server.prefill(prompt(16))
    keys = sorted(server.sequence(prompt(16)).page_keys(4))
    assert held(server) == held(server, Tier.HOST) == keys
    server.flush_device()
    server.consumer.check()
    assert not held(server)
    assert held(server, Tier.HOST) == keys
    server.release(server.admit(prompt(17)))
    assert held(server) == held(server, Tier.HOST) == keys


def test_a_page_that_is_trimmed_off_for_room():
    server = Watched(device_pages=8)
    server.prefill(prompt(24))
    server.prefill(prompt(12, 1000))
    kept = server.sequence(prompt(24)).page_keys(5) + server.sequence(prompt(12, 1000)).page_keys(3)
    assert held(server) == sorted(kept)


# ---- everything at once


def test_a_reset_is_one_event():
    server = Watched(FULL, window(6), state(), host_pages=32)
    server.prefill(prompt(24))
    server.core.reset()
    assert server.consumer.take() == [AllCleared()]
    server.check()
    server.prefill(prompt(24))
    assert len(held(server)) == 6


def test_a_retired_namespace_is_gone_at_once():
    """K5: its pages are reclaimed later, which no consumer needs to know; the next version begins empty."""
    server = Watched(device_pages=16, host_pages=8)
    other = server.core.new_namespace(model="other")
    server.prefill(prompt(16))
    server.prefill(server.sequence(prompt(8), other))
    consumer = server.consumer
    server.core.retire_namespace(server.namespace)
    events = consumer.take()
    assert {type(event) for event in events} == {BlockRemoved}
    assert held(server) == held(server, Tier.HOST) == sorted(server.sequence(prompt(8), other).page_keys(2))
    server.namespace = server.core.new_namespace(model="test", weights_version="2")
    server.prefill(prompt(16))
    assert len(held(server)) == 6
    for first in (1000, 2000, 3000):
        server.prefill(prompt(40, first))
    server.check_empty()
    consumer.check()
    assert not any(consumer.held.values())
    assert not consumer.stream._nodes.keys() - {root.id for root in server.core.tiers.tree.all_roots()}


def test_without_the_device_host_memory_stays():
    server = Watched(FULL, window(6), state(), host_pages=32)
    server.prefill(prompt(24))
    server.rank.apply()
    before = held(server, Tier.HOST)
    server.rank.forget_device()
    server.check()
    assert not held(server)
    assert held(server, Tier.HOST) == before != []


# ---- nobody asks


def test_when_the_log_overflows_what_is_there_is_stored_again():
    """The log is bounded: it holds what is there, and not how it came to be."""
    server = Server(FULL, window(6), state(), device_pages=16, host_pages=24, events=True, max_logged_changes=50)
    consumer = Consumer(server.core)
    log = server.core.tiers.log
    assert log is not None
    for first in range(0, 40_000, 1000):
        server.prefill(prompt(16, first))
        server.step()
        assert len(log) <= 51
    assert server.core.counters["event_overflows"] > 3
    events = consumer.take()
    assert events[0] == AllCleared()
    assert AllCleared() not in events[1:]
    consumer.check()
    assert consumer.held[Tier.DEVICE, "full"]


def test_an_overflow_does_not_bring_a_retired_namespace_back():
    """Though its pages are still there."""
    server = Server(host_pages=32, events=True, max_logged_changes=1)
    consumer = Consumer(server.core)
    for version in ("2", "3"):
        server.prefill(prompt(16))
        server.core.retire_namespace(server.namespace)
        server.namespace = server.core.new_namespace(model="test", weights_version=version)
    server.prefill(prompt(16))
    server.step()
    events = consumer.take()
    assert events[0] == AllCleared()
    assert all(isinstance(event, BlockStored) for event in events[1:])
    consumer.check()
    assert len(consumer.held[Tier.DEVICE, "full"]) == 4
    server.check_empty()
    consumer.check()


def test_tokens_that_only_the_log_keeps_are_bounded(monkeypatch):
    monkeypatch.setattr(change_log, "MAX_LOGGED_BYTES", 1000)
    server = Server(device_pages=16, events=True)
    consumer = Consumer(server.core)
    for first in range(0, 5000, 1000):
        server.prefill(prompt(40, first))
        server.step()
        consumer.check()
    assert not server.core.counters["event_overflows"]
    for first in range(0, 30_000, 1000):
        server.prefill(prompt(40, first))
        server.step()
    assert server.core.counters["event_overflows"] == 4
    assert consumer.take()[0] == AllCleared()
    consumer.check()


def test_off_means_off():
    server = Server()
    assert server.core.tiers.log is server.core.tiers.tree.log is None
