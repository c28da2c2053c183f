"""How long programs and copies take. Many are dispatched in a row, so that dispatch counts only where it has to."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def in_a_row_s(call: Callable[[], Any], calls: int = 10, rounds: int = 5) -> float:
    """Seconds for each of `calls` that are dispatched together; the median round, after one to warm up."""
    jax.block_until_ready(call())

    def one_round() -> Any:
        outcome = None
        for _ in range(calls):
            outcome = call()
        return jax.block_until_ready(outcome)

    return statistics.median(seconds(one_round) for _ in range(rounds)) / calls


def donating_s(call: Callable[[Any], Any], value: Any, calls: int = 10, rounds: int = 5) -> tuple[float, Any]:
    """The same for a call that takes a value and returns the next one; also the last."""
    value = jax.block_until_ready(call(value))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            value = call(value)
        jax.block_until_ready(value)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times), value


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
