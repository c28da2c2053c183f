"""What storing may cost while requests run."""

from __future__ import annotations

import threading
import time

import pytest

from jaxcache.runtime.store_budget import SLICE_S, StoreBudget


def spin(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def rested_s(budget: StoreBudget) -> float:
    """How long a worker that goes on in any case has to rest now."""
    start = time.monotonic()
    budget.rest(lambda: True)
    return time.monotonic() - start


def test_work_is_made_up_for_by_rest():
    budget = StoreBudget(0.2)
    budget.serves(True)
    with budget.work():
        spin(0.02)
    clock = budget.clock()
    assert rested_s(budget) >= 0.07  # 4 x 0.02, less the thread's clock ticks
    assert budget.clock() - clock < 0.07, "deadlines must not run meanwhile"


@pytest.mark.parametrize("share", [0.001, 1.0])
def test_nothing_rests_while_no_request_runs(share):
    budget = StoreBudget(share)
    with budget.work():
        spin(0.02)
    assert rested_s(budget) < SLICE_S


def test_without_a_limit_nothing_rests():
    budget = StoreBudget(1.0)
    budget.serves(True)
    with budget.work():
        spin(0.02)
    assert rested_s(budget) < SLICE_S


@pytest.mark.parametrize("end", ["the last request", "a cancel"])
def test_a_rest_ends_with(end):
    budget = StoreBudget(0.0001)
    budget.serves(True)
    with budget.work():
        spin(0.02)  # 200 s of rest
    is_wanted = True
    worker = threading.Thread(target=budget.rest, args=(lambda: is_wanted,), daemon=True)
    worker.start()
    worker.join(2 * SLICE_S)
    assert worker.is_alive()
    if end == "a cancel":
        is_wanted = False
    else:
        budget.serves(False)
    worker.join(10)
    assert not worker.is_alive()


def test_what_was_done_while_no_request_ran_is_not_made_up_for():
    budget = StoreBudget(0.001)
    with budget.work():
        spin(0.02)
    budget.serves(True)
    assert rested_s(budget) < SLICE_S


def test_the_clock_of_deadlines_stands_still_in_rests_only():
    budget = StoreBudget(0.001)
    budget.serves(True)
    with budget.work():
        spin(0.02)  # 20 s of rest
    clock = budget.clock()
    time.sleep(0.1)
    assert budget.clock() - clock < 0.02
    budget.serves(False)
    clock = budget.clock()
    time.sleep(0.1)
    assert budget.clock() - clock >= 0.1
