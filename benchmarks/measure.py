"""Clocks: microseconds of one call, without what reading the clock takes itself.

A measurement is a `prepare` that returns what is to be timed, so that every turn starts from the same state. An
operation and its floor take turns, and each is first in every other turn: noise hits both.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from itertools import repeat
from typing import Any, NamedTuple

Action = Callable[[], Any]
Prepare = Callable[[], Action]
Clock = Callable[[], int]

WALL: Clock = time.perf_counter_ns  # cheap: for what takes microseconds
CPU: Clock = time.thread_time_ns  # not disturbed by other processes: for what takes longer
CLOCK_READS = 201


class Turns(NamedTuple):
    """Microseconds of the operation and of its floor, by turn."""

    us: list[float]
    floors: list[float]


def take_turns(operation: Prepare, floor: Prepare, num_turns: int, clock: Clock = WALL) -> Turns:
    turns = Turns([], [])
    cost = clock_cost_us(clock)
    both = ((operation, turns.us), (floor, turns.floors))
    for turn in range(num_turns):
        for prepare, times in both if turn % 2 else both[::-1]:
            times.append(elapsed_us(prepare(), clock, cost))
    return turns


def samples(operation: Prepare, num_samples: int, clock: Clock = WALL) -> list[float]:
    """The same for an operation that has no floor."""
    cost = clock_cost_us(clock)
    return [elapsed_us(operation(), clock, cost) for _ in range(num_samples)]


def elapsed_us(action: Action, clock: Clock, cost_us: float) -> float:
    start = clock()
    action()
    return max((clock() - start) / 1000 - cost_us, 0.001)


def clock_cost_us(clock: Clock) -> float:
    """What measuring nothing takes."""
    return statistics.median(elapsed_us(nothing, clock, 0.0) for _ in range(CLOCK_READS))


def nothing() -> None:
    pass


def call_us(action: Action, num_calls: int) -> float:
    """Microseconds of one call, out of many in a row: for what takes no longer than reading the clock."""
    start = WALL()
    for _ in repeat(None, num_calls):
        action()
    return (WALL() - start) / 1000 / num_calls


def undisturbed(measure: Callable[[], Any]) -> Any:
    """Runs a measurement without garbage, and without its collector going through what was there before."""
    gc.collect()
    gc.freeze()
    try:
        return measure()
    finally:
        gc.unfreeze()


def interpreter_us() -> float:
    """1,000 look-ups in a dictionary: what a figure is worth on a machine that others use, too."""
    table = dict.fromkeys(range(10))

    def look_up():
        for _ in range(100):
            for key in table:
                table[key]

    return call_us(look_up, 20)
