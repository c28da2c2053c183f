"""What storing may cost while requests run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from jaxcache.engine.jobs import carry_out
from jaxcache.engine.store_budget import SLICE_S, StoreBudget


def budget_of(share: float) -> StoreBudget:
    return StoreBudget(share, time.monotonic, time.thread_time)


@contextmanager
def turn(budget: StoreBudget, keep_going: Callable[[], bool]) -> Iterator[bool]:
    """Around what a worker does for a STORE. False: `keep_going` has said no."""
    begun = carry_out(budget.begin(keep_going))
    try:
        yield begun is not None
    finally:
        if begun is not None:
            budget.end(begun)


def spin(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def work(budget: StoreBudget, seconds: float) -> None:
    with turn(budget, lambda: True) as may_store:
        assert may_store
        spin(seconds)


def rested_s(budget: StoreBudget) -> float:
    """How long a worker that goes on in any case has to rest now."""
    start = time.monotonic()
    with turn(budget, lambda: True):
        return time.monotonic() - start


def test_work_is_made_up_for_by_rest():
    budget = budget_of(0.2)
    budget.serves(True)
    work(budget, 0.02)
    clock = budget.clock()
    assert rested_s(budget) >= 0.07  # 4 x 0.02, less the thread's clock ticks
    assert budget.clock() - clock < 0.07, "deadlines must not run meanwhile"


@pytest.mark.parametrize("share", [0.001, 1.0])
def test_nothing_rests_while_no_request_runs(share):
    budget = budget_of(share)
    work(budget, 0.02)
    assert rested_s(budget) < SLICE_S


def test_without_a_limit_nothing_rests():
    budget = budget_of(1.0)
    budget.serves(True)
    work(budget, 0.02)
    assert rested_s(budget) < SLICE_S


@pytest.mark.parametrize("end", ["the last request", "a cancel"])
def test_a_rest_ends_with(end):
    budget = budget_of(0.0001)
    budget.serves(True)
    work(budget, 0.02)  # 200 s of rest
    is_wanted = True

    def take_turn():
        with turn(budget, lambda: is_wanted) as may_store:
            assert may_store == is_wanted

    worker = threading.Thread(target=take_turn, daemon=True)
    worker.start()
    worker.join(2 * SLICE_S)
    assert worker.is_alive()
    if end == "a cancel":
        is_wanted = False
    else:
        budget.serves(False)
    worker.join(10)
    assert not worker.is_alive()


def test_workers_take_turns_and_all_they_do_counts():
    """Four at once, each with work beside its turns: storing ends no earlier than the share allows. A rest is 99 times
    the work, so that a busy machine does not make a turn longer than its rest."""
    budget = budget_of(0.01)
    budget.serves(True)
    at_once, most, lock = 0, 0, threading.Lock()

    def worker():
        nonlocal at_once, most
        for _ in range(2):
            with turn(budget, lambda: True):
                with lock:
                    at_once += 1
                    most = max(most, at_once)
                spin(0.001)
                with lock:
                    at_once -= 1
            spin(0.001)

    work(budget, 0.001)  # from here on it is known what a turn costs
    start = time.monotonic()
    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    used_s = 4 * (2 * 0.001 + 0.001)  # what follows the last turn counts at the next
    assert time.monotonic() - start >= 0.8 * used_s * (1 / 0.01 - 1)


def test_a_turn_that_takes_longer_than_its_rest_holds_up_nobody():
    """A storage that hangs in one call."""
    budget, hangs = budget_of(0.5), threading.Event()
    budget.serves(True)

    def hang():
        with turn(budget, lambda: True):
            hangs.wait(20)

    worker = threading.Thread(target=hang, daemon=True)
    worker.start()
    time.sleep(0.05)
    assert rested_s(budget) < 1
    hangs.set()
    worker.join(10)
    assert not worker.is_alive()


def test_what_was_done_while_no_request_ran_is_not_made_up_for():
    budget = budget_of(0.001)
    work(budget, 0.02)
    budget.serves(True)
    assert rested_s(budget) < SLICE_S


def test_the_clock_of_deadlines_stands_still_in_rests_only():
    budget = budget_of(0.001)
    budget.serves(True)
    work(budget, 0.02)  # 20 s of rest
    clock = budget.clock()
    time.sleep(0.1)
    assert budget.clock() - clock < 0.02
    budget.serves(False)
    clock = budget.clock()
    time.sleep(0.1)
    assert budget.clock() - clock >= 0.1
