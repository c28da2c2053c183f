"""How long Python's garbage collector stops the scheduler's thread while a trace is served beside many nodes."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.core.loaded_core import EVERY_KIND, LoadedCore, random_tokens
from benchmarks.core.replays import turns_of_prompts
from benchmarks.core.workload import Workload
from benchmarks.figure import Figure, Goal, figure
from jaxcache.replay.traces import read_trace
from jaxcache.runtime.garbage import GarbageControl

PAUSE_GOAL = Goal("value", "<=", 5)


def pauses(workload: Workload) -> list[Figure]:
    """The longest pause, without and with CacheConfig.collect_in_step."""
    nodes = f"{workload.victims:,} nodes, 3 components"
    what = f"longest pause of the garbage collector, the trace beside {nodes}"
    (alone, full), (in_step, _) = pauses_ms(workload, None), pauses_ms(workload, GarbageControl())
    return [
        figure("pause_full_collection", f"a full collection, {nodes}", [full], unit="ms"),
        figure("pause", f"{what}: as Python does it", [alone], unit="ms"),
        figure("pause_collect_in_step", f"{what}: collect_in_step", [in_step], unit="ms", goal=PAUSE_GOAL),
    ]


def pauses_ms(workload: Workload, control: GarbageControl | None) -> tuple[float, float]:
    """(longest while the trace is served, of a full collection afterwards).

    Before that, as many one-page prompts are served as there are to be nodes. A step comes after every request.
    """
    requests = read_trace(workload.trace, workload.replay_requests)
    page = workload.page_tokens[-1]
    trace_pages = sum(request.input_length for request in requests) // page + 2 * len(requests)
    loaded = LoadedCore(page, 2 * workload.victims + trace_pages, EVERY_KIND)  # nothing is evicted
    if control is not None:
        control.start()
    for _ in range(workload.victims // 1000):
        for tokens in random_tokens(1000, page):
            loaded.serve(tokens)
        if control is not None:
            control.step(is_idle=False)
    with pauses_s() as taken:
        for prompts in turns_of_prompts(requests, workload.turn_requests):
            for tokens in prompts:
                loaded.serve(tokens)
                if control is not None:
                    control.step(is_idle=False)
    if control is not None:
        control.stop()
    with pauses_s() as full:
        gc.collect()
    return max(taken, default=0.0) * 1000, full[0] * 1000


@contextmanager
def pauses_s() -> Iterator[list[float]]:
    """Fills a list with the time of every collection meanwhile."""
    taken: list[float] = []
    starts: list[float] = []

    def note(phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            starts.append(time.perf_counter())
        else:
            taken.append(time.perf_counter() - starts.pop())

    gc.callbacks.append(note)
    try:
        yield taken
    finally:
        gc.callbacks.remove(note)
