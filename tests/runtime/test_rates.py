"""Whether what storage has is fetched or computed again: by what was measured."""

from __future__ import annotations

import time

import numpy as np
import pytest

import jaxcache
from jaxcache.engine.rates import MEMORY, MIN_PREFILL_TOKENS, PROBE_EVERY, Rates
from tests.models.serving import PAGE_TOKENS, Driver, random_tokens, rig_on

NO_PROBE = 5
PROMPT = random_tokens(1, 20 * PAGE_TOKENS + 1)


def test_without_measurements_all_is_fetched():
    assert Rates(time.perf_counter).pays(NO_PROBE)


@pytest.mark.parametrize(("fetch_s", "is_worth_it"), [(0.9e-3, True), (1.1e-3, False)])
def test_the_faster_way_is_taken(fetch_s, is_worth_it):
    rates = Rates(time.perf_counter)
    rates.compute_s, rates.fetch_s = 1e-3, fetch_s
    assert rates.pays(NO_PROBE) == is_worth_it
    assert rates.pays(3 * PROBE_EVERY), "or nobody would ever notice that storage is fast again"


def test_prefill_is_measured_in_busy_steps_that_prefill():
    now = 0.0
    rates = Rates(lambda: now)
    for num_tokens, seconds, is_busy in [(100, 0.2, True), (MIN_PREFILL_TOKENS - 1, 9.0, True), (100, 9.0, False)]:
        rates.step(True)
        rates.prefills(num_tokens)
        now += seconds
        rates.step(is_busy)
        now += 9.0  # a step without prefill
    assert rates.compute_s == pytest.approx(0.002)
    rates.step(True)
    rates.prefills(100)
    now += 0.1
    rates.step(True)
    assert rates.compute_s == pytest.approx(0.002 + MEMORY * (0.001 - 0.002))


def served(mesh, storage, config_change: dict, compute_s: float) -> tuple[int, dict]:
    """(tokens found in storage by the second of two prompts that are there, counters)"""
    other = random_tokens(2, 20 * PAGE_TOKENS + 1)
    with rig_on(mesh).cache(storage) as cache:
        driver = Driver(rig_on(mesh), cache)
        for prompt in (PROMPT, other):
            driver.finish(driver.admit(driver.sequence(prompt)), num_decode=1)
        driver.pools = cache.drain(driver.pools)
    with rig_on(mesh).cache(storage, **config_change) as cache:
        driver = Driver(rig_on(mesh), cache)
        driver.ask_storage(PROMPT)
        assert cache.engine.rates.fetch_s, "the fetch was not measured"
        cache.engine.rates.compute_s = compute_s
        answer = driver.ask_storage(other)
        assert cache.core.stores.live == {}
        return answer.hits[2], cache.stats()["counters"]


@pytest.mark.parametrize(
    ("choice", "compute_s", "is_found"),
    [({}, 1e-12, True), ({"prefetch_if_faster": True}, 1e-12, False), ({"prefetch_if_faster": True}, 1e3, True)],
    ids=["always", "slower than computing", "faster"],
)
def test_what_would_be_slower_is_computed(make_mesh, choice, compute_s, is_found):
    found, counters = served(make_mesh(2, 1, 1), jaxcache.MemoryStorage(), choice, compute_s)
    assert bool(found) == is_found
    assert counters.get("prefetch_declined", 0) == (not is_found)


def test_what_was_declined_stays_believed_stored(make_mesh):
    """It is there, and need not be written again."""
    storage = jaxcache.MemoryStorage()
    _, counters = served(make_mesh(), storage, {"prefetch_if_faster": True}, 1e-12)
    assert counters["prefetch_declined"] == 1
    assert np.all([counters.get(name, 0) == 0 for name in ("unfulfilled_transfer", "unfulfilled_aborted")])
