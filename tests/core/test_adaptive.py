"""The policy that learns: hardly ever worse than lru, and better where there is something to learn.

Workloads are made here (jaxcache/replay/workloads.py); capacities are shares of what a workload uses again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from benchmarks.core.workload import TRACE
from jaxcache.replay import workloads
from jaxcache.replay.optimum import offline
from jaxcache.replay.replay import Replay, Setting
from jaxcache.replay.traces import TraceRequest, read_trace

TOLERATED = 0.005  # of the prompt tokens
NUM_HOT = 40
BLOCKS = 8
Rng = np.random.Generator


def documents(make: Callable[[Rng], workloads.Documents]) -> Callable[[Rng, int, int], list[TraceRequest]]:
    return lambda rng, num, block: workloads.requests(make(rng), num, BLOCKS, block)


WORKLOADS: dict[str, Callable[[Rng, int, int], list[TraceRequest]]] = {
    "scan": documents(lambda rng: workloads.scan(rng, NUM_HOT)),
    "loop": documents(lambda rng: workloads.loop(NUM_HOT)),
    "shift": documents(lambda rng: workloads.shift(rng, NUM_HOT, every=20)),
    "jump": documents(lambda rng: workloads.jump(rng, NUM_HOT, every=300)),
    "zipf": documents(lambda rng: workloads.zipf(rng, 10 * NUM_HOT, 1.0)),
    "uniform": documents(lambda rng: workloads.zipf(rng, 2 * NUM_HOT, 0.0)),
    "recent": documents(lambda rng: workloads.recent(rng, NUM_HOT / 2)),
    "phases": documents(
        lambda rng: workloads.phases(400, workloads.recent(rng, NUM_HOT / 3), workloads.zipf(rng, 5 * NUM_HOT, 0.9))
    ),
    "conversations": lambda rng, num, block: workloads.conversations(rng, num, NUM_HOT, 2, block),
}
SHARES = {"small": 0.15, "middle": 0.5, "large": 0.9}


def hit_rates(requests: Sequence[TraceRequest], share: float, page_tokens: int, **options) -> tuple[float, float]:
    """Of lru and adaptive, in a cache for a share of the hot set, but no smaller than two of the longest prompts."""
    lengths = [request.input_length for request in requests]
    capacity = max(int(share * NUM_HOT * sum(lengths) / len(lengths)), 2 * max(lengths))
    lru, adaptive = (
        replayed(requests, Setting(page_tokens, capacity, policy=policy, **options)) for policy in ("lru", "adaptive")
    )
    return lru, adaptive


def replayed(requests: Sequence[TraceRequest], setting: Setting) -> float:
    replay = Replay(setting)
    for request in requests:
        replay.request(request)
    return replay.hit_rate()


@pytest.mark.parametrize("share", ["small", "large"])
@pytest.mark.parametrize("name", ["scan", "loop", "shift"])
def test_hardly_ever_worse_than_lru(name, share, seed):
    requests = WORKLOADS[name](np.random.default_rng(seed), 500, 16)
    lru, adaptive = hit_rates(requests, SHARES[share], 16)
    assert adaptive > lru - TOLERATED


@pytest.mark.parametrize(("name", "gain"), [("scan", 0.05), ("loop", 0.3)])
def test_much_better_where_lru_is_wrong(name, gain, seed):
    """A scan flushes lru, and a loop that is a little too large leaves it nothing."""
    requests = WORKLOADS[name](np.random.default_rng(seed), 800, 16)
    lru, adaptive = hit_rates(requests, 0.9, 16)
    assert adaptive > lru + gain


def test_follows_lru_where_lru_is_best(seed):
    """Conversations, of which the one that was answered last goes on: nothing to learn, and nothing lost."""
    requests = workloads.conversations(np.random.default_rng(seed), 500, NUM_HOT, 2, 16, last_share=0.05)
    lru, adaptive = hit_rates(requests, 0.5, 16)
    assert abs(adaptive - lru) < TOLERATED


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("page_tokens", [16, 64, 512])
@pytest.mark.parametrize("name", WORKLOADS)
def test_hardly_ever_worse_than_lru_for_long(name, page_tokens, share, seed):
    requests = WORKLOADS[name](np.random.default_rng(seed), 1500, page_tokens)
    lru, adaptive = hit_rates(requests, SHARES[share], page_tokens)
    assert adaptive > lru - TOLERATED


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize(
    "options",
    [{"num_namespaces": 3}, {"include_outputs": True}, {"host_tokens": 30_000}, {"components": ("full", "state")}],
    ids=lambda options: next(iter(options)),
)
def test_hardly_ever_worse_than_lru_with(options, name, seed):
    requests = WORKLOADS[name](np.random.default_rng(seed), 1500, 16)
    lru, adaptive = hit_rates(requests, 0.5, 16, **options)
    assert adaptive > lru - TOLERATED


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_production_traffic():
    """Within half a point of lru at every capacity, and 30 % of the way to the offline optimum at 2M tokens."""
    requests = read_trace(TRACE)
    num_tokens = sum(request.input_length for request in requests)
    for capacity in (500_000, 2_000_000, 8_000_000, 24_000_000):
        lru, adaptive = (replayed(requests, Setting(512, capacity, policy=policy)) for policy in ("lru", "adaptive"))
        assert adaptive > lru - TOLERATED
        if capacity == 2_000_000:
            optimum = offline(requests, 512, capacity).optimum / num_tokens
            assert adaptive > lru + 0.3 * (optimum - lru)
