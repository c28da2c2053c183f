"""Guards the ratios of the core to their floors, with room for noise. The goals are stricter, and elsewhere.

Never a time. `make bench` runs it; `pytest benchmarks --benchmark-autosave` keeps the ratios of a run (extra_info).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.core.suite import WORKLOAD, groups
from benchmarks.figure import Figure

SMALLER = replace(
    WORKLOAD, victims=20_000, conversations=500, capacities=(2_000_000,), replay_requests=2000, warmup_steps=150
)
AT_MOST = {
    "match_128k_page16": 1.6,
    "match_128k_page64": 1.6,
    "match_128k_64_nodes_page16": 3.0,
    "match_128k_64_nodes_page64": 3.0,
    "split": 6.0,
    "split_3_components": 6.0,
    "insert_duplicate_128k": 3.0,
    "insert_8k_after_1k": 3.0,
    "lock_unlock_64_nodes": 2.5,
    "admit_64_nodes": 8.0,
    "release_64_nodes": 3.0,
    "evict_one": 3.0,
    "evict_one_4000_namespaces": 2.0,
    "evict_share": 3.5,
    "evict_share_3_components": 11.0,
    "bytes_per_token": 1.3,
    "bytes_per_token_all_host": 1.6,
    "step_256": 15.0,
    "step_256_grow_each": 20.0,
    "step_256_3_components": 120.0,
}
AT_LEAST = {
    "replay_full_page16_2M": 0.4,
    "replay_full_page64_2M": 0.4,
    "replay_all_page16_2M": 0.15,
    "replay_all_page64_2M": 0.15,
    "replay_all_host_page16_2M": 0.08,
    "replay_all_host_page64_2M": 0.08,
}
GROUPS = groups(SMALLER)
unseen = dict.fromkeys([*AT_MOST, *AT_LEAST])


@pytest.mark.parametrize("group", GROUPS)
def test_ratios(benchmark: Any, group: str):
    figures: list[Figure] = benchmark.pedantic(GROUPS[group], rounds=1, iterations=1)
    ratios = {figure.name: figure.ratio for figure in figures if figure.ratio is not None}
    benchmark.extra_info.update(ratios)
    for name, ratio in ratios.items():
        unseen.pop(name, None)
        assert ratio >= AT_LEAST.get(name, 0.0), name
        assert ratio <= AT_MOST.get(name, math.inf), name


def test_every_bound_is_of_a_figure(request: pytest.FixtureRequest):
    if len(request.session.items) <= len(GROUPS):
        pytest.skip("not all groups were measured")
    assert not unseen
