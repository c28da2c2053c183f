"""The replay finds what an independent simulation finds, and the optimum is one."""

from __future__ import annotations

import random
from itertools import count

import pytest

from benchmarks.core.workload import TRACE
from jaxcache.replay.replay import Replay, Setting
from jaxcache.replay.traces import TraceRequest, read_trace


def lru_by_pages(requests: list[TraceRequest], page_tokens: int, num_pages: int) -> int:
    """Tokens found by the plainest cache there is: a page is (everything up to its end), with the time of its last use.

    Leaves leave before their parents, the least recently used first, the deeper one first among equals.
    """
    last_use: dict[tuple, tuple[int, int]] = {}
    num_children: dict[tuple, int] = {}
    clock = count()
    found = 0
    for request in requests:
        size = request.block_tokens // page_tokens
        num = request.input_length // page_tokens
        path, key = [], ()
        for i in range(num):
            key = (hash(key), request.block_ids[i // size], i)
            path.append(key)
        hit = 0
        while hit < min(num, (request.input_length - 1) // page_tokens) and path[hit] in last_use:
            hit += 1
        found += hit * page_tokens
        used = set(path[:hit])
        now = next(clock)
        own_pages = -(-request.input_length // page_tokens) - hit  # the tail shorter than a page takes one, too
        while len(last_use) + own_pages > num_pages:
            leaves = [key for key in last_use if not num_children.get(key) and key not in used]
            victim = min(leaves, key=lambda key: (last_use[key][0], -last_use[key][1]))
            del last_use[victim]
            above = parents[victim]
            num_children[above] -= 1
        parents.update(zip(path, [(), *path], strict=False))
        for depth, key in enumerate(path):
            if key not in last_use:
                num_children[parents[key]] = num_children.get(parents[key], 0) + 1
            last_use[key] = (now, depth)
    return found


parents: dict[tuple, tuple] = {}


@pytest.mark.parametrize("device_tokens", [100_000, 200_000, 400_000])
def test_lru_agrees_to_the_token_with_a_simulation_by_pages(device_tokens):
    requests = [r for r in read_trace(TRACE, 400) if r.input_length < 60_000]
    replay = Replay(Setting(512, device_tokens))
    for request in requests:
        replay.request(request)
    assert replay.report()["hit_tokens"]["device"] == lru_by_pages(requests, 512, device_tokens // 512)


def random_trace(seed: int, num_requests: int, length: int) -> list[TraceRequest]:
    """Prompts that branch everywhere and end inside each other."""
    rng = random.Random(seed)
    requests, known = [], [(0,)]
    for _ in range(num_requests):
        start = rng.choice(known[-30:])
        start = start[: rng.randint(1, len(start))]
        ids = start + tuple(
            rng.randrange(10**6) for _ in range(rng.randint(0, length - len(start)) if len(start) < length else 0)
        )
        known.append(ids)
        requests.append(TraceRequest(len(ids) * 8 - rng.randrange(8), 1, ids, 8))
    return requests


@pytest.mark.parametrize("num_pages", [24, 40, 100])
def test_lru_agrees_with_the_simulation_where_prompts_end_inside_others(num_pages, seed):
    requests = random_trace(seed, 400, 10)
    replay = Replay(Setting(4, num_pages * 4))
    for request in requests:
        replay.request(request)
    assert replay.report()["hit_tokens"]["device"] == lru_by_pages(requests, 4, num_pages)


@pytest.mark.parametrize("components", [("full",), ("full", "window", "state")])
def test_a_request_longer_than_the_device_counts_and_leaves_everything_as_it_was(components):
    replay = Replay(Setting(4, 10 * 4, components=components))
    short = TraceRequest(3 * 8, 1, (1, 2, 3), 8)  # 6 pages; the next one splits it
    for request in (short, TraceRequest(3 * 8, 1, (1, 2, 9), 8)):
        replay.request(request)
    before = replay.resident_tokens(), replay.hit_tokens()
    replay.request(TraceRequest(6 * 8, 1, (1, 2, 3, 4, 5, 6), 8))  # 12 pages: what follows a shorter hit would fit
    assert (replay.resident_tokens(), replay.hit_tokens()) == before
    assert replay.num_too_long == 1
    replay.request(TraceRequest(5 * 8, 1, (1, 2, 3, 4, 5), 8))  # 10 pages
    assert replay.num_too_long == 1
    assert replay.resident_tokens()["device"] == replay.capacity_tokens()["device"] == 40
