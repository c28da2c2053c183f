"""Policies side by side: curves are what replays find, below the optimum; tiers as they fill; nothing twice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from jaxcache.replay.optimum import offline
from jaxcache.replay.replay import Replay, Setting
from jaxcache.replay.study import Study, around
from jaxcache.replay.traces import TraceRequest

GIVEN = Setting(16, 800)


def popular_and_new() -> list[TraceRequest]:
    """Prompts of 2 to 20 blocks of 16 tokens: every other one is new; the others begin like one of 40, some often."""
    rng = np.random.default_rng(1)
    requests = []
    for i in range(401):
        popular = int(40 * rng.random() ** 3)
        known = [popular * 100 + depth for depth in range(rng.integers(1, 10))] if i % 2 else []
        ids = [*known, *range(10_000 + 100 * i, 10_000 + 100 * i + rng.integers(2, 12))]
        requests.append(TraceRequest(16 * len(ids) - 3, 1, tuple(map(int, ids)), 16))
    return requests


REQUESTS = popular_and_new()


def replayed(setting: Setting, requests: list[TraceRequest]) -> Replay:
    replay = Replay(setting)
    for request in requests:
        replay.request(request)
    return replay


def test_capacities_are_octaves_around_the_given_one_and_lru_is_always_there():
    settings = around([replace(GIVEN, policy="fifo"), replace(GIVEN, policy="lfu")])
    capacities = [100, 200, 400, 800, 1600, 3200]
    assert [(s.device_tokens, s.policy) for s in settings] == [
        (capacity, policy) for capacity in capacities for policy in ("fifo", "lfu", "lru")
    ]
    assert around([GIVEN])[3] == GIVEN
    assert [s.device_tokens for s in around([replace(GIVEN, device_tokens=33)])] == [16, 33, 66, 132]


def test_curves_are_what_replays_find():
    settings = [replace(GIVEN, policy=policy) for policy in ("lfu", "lru")]
    curves = Study(REQUESTS).curves(around(settings))
    assert curves.capacities[3] == 800
    for place in (0, 3, 5):
        for policy in ("lfu", "lru"):
            setting = replace(GIVEN, policy=policy, device_tokens=curves.capacities[place])
            assert curves.policies[policy][place] == replayed(setting, REQUESTS).hit_rate()
    assert curves.policies["lru"][0] < curves.policies["lru"][3] < curves.policies["lru"][5]
    assert curves.policies["lru"] != curves.policies["lfu"]


def test_the_optimum_is_above_every_policy_and_below_the_infinite_cache():
    curves = Study(REQUESTS).curves(around([replace(GIVEN, policy=policy) for policy in ("adaptive", "s3fifo")]))
    assert list(curves.policies) == ["adaptive", "s3fifo", "lru"]
    for rates in curves.policies.values():
        assert len(set(rates)) == 6
        assert all(optimum >= rate for optimum, rate in zip(curves.optimum, rates, strict=True))
    assert curves.optimum == sorted(curves.optimum)
    assert curves.optimum[-2] < curves.optimum[-1] <= curves.infinite
    num_tokens = sum(request.input_length for request in REQUESTS)
    assert curves.infinite == offline(REQUESTS, 16, 800).infinite / num_tokens


@pytest.mark.parametrize("sizes", [(805,), (805, 1600, 3203)])
def test_an_occupancy_has_200_samples_stays_below_the_capacity_and_ends_as_the_residency(sizes):
    setting = Setting(16, *sizes)
    study = Study(REQUESTS)
    study.reports([setting])
    occupancy = study.occupancies[setting]
    assert occupancy.served == [*range(0, 401, 3), 401]
    assert list(occupancy.capacity) == ["device", "host", "storage"][: len(sizes)]
    for (tier, capacity), size in zip(occupancy.capacity.items(), sizes, strict=True):
        assert capacity == size // 16 * 16
        tokens = occupancy.tokens[tier]
        assert tokens[0] == 0
        assert max(tokens) <= capacity
        assert max(tokens) > 0.9 * capacity
    end = replayed(setting, REQUESTS)
    residencies = (end.core.tiers.device[0].num_resident, end.core.tiers.host[0].num_resident, len(end.storage.keys))
    last = [tokens[-1] for tokens in occupancy.tokens.values()]
    assert last == [16 * num_pages for num_pages in residencies[: len(sizes)]]


def test_nothing_is_computed_twice_and_the_progress_adds_up(monkeypatch):
    optima, replays, steps = [], [], []
    monkeypatch.setattr("jaxcache.replay.study.offline", lambda *args: optima.append(args[2]) or offline(*args))
    monkeypatch.setattr("jaxcache.replay.study.Replay", lambda setting: replays.append(setting) or Replay(setting))
    settings = [replace(GIVEN, host_tokens=1600, policy=policy) for policy in ("fifo", "lru")]
    study = Study(REQUESTS[:50], lambda label, num: steps.append(num))
    study.reports(settings)
    assert optima == [1600]
    study.curves(around(settings))
    assert optima == [1600, 3200]  # the host's capacity is the largest up to there
    assert len(replays) == len(set(replays)) == 2 * 6
    assert sum(steps) == study.num_steps([*settings, *around(settings)]) == 50 * (12 + 2)
