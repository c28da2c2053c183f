"""The hand-written path of full attention alone decides what the general path decides."""

from __future__ import annotations

import random

import pytest

from jaxcache.components import FullAttention
from jaxcache.config import CacheConfig
from jaxcache.core.backbone import Backbone
from jaxcache.core.eviction import POLICIES
from jaxcache.core.invariants import all_nodes
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.testing.scenario import Scenario
from tests.core.driver import draw_config, iterate

STEPS = 120


def history(seed: int, policy: str) -> list[tuple]:
    """After every step: the digest, the table of every lease, the nodes and their pages, the order of eviction."""
    rng = random.Random(seed)
    page_tokens, max_pages = rng.choice([1, 4, 16]), rng.choice([6, 12, 20])
    components = (FullAttention("full", ()),)
    config = draw_config(rng, components, page_tokens, max_pages, host_pages=0, eviction_policy=policy)
    scenario = Scenario(components, config, seed)
    steps = []
    for _ in range(STEPS):
        iterate(scenario, rng, max_pages * page_tokens, abort_chance=0.03)
        steps.append(state(scenario.core))
    return steps


def state(core: PrefixCache) -> tuple:
    device = core.tiers.device[0]
    nodes = sorted((n.id, n.start, n.end, n.hits, n.is_output, tuple(n.pages[0])) for n in all_nodes(core))  # pyright: ignore[reportArgumentType]
    evictions = [(*key, step, reason, lease) for *key, _, step, reason, lease in core.tiers.evictions]
    tables = [(lease.id, tuple(lease.page_tables["full"])) for lease in core.leases.values()]
    order = [node.id for node in device.order]
    sums = (device.num_resident, device.num_pinned, device.allocator.num_free, core.tiers.num_evicted_pages[0])
    return core.digest, tables, nodes, order, evictions, sums


@pytest.fixture
def general_path(monkeypatch):
    """Call it, and caches made from then on have no hand-written path."""
    return lambda: monkeypatch.setattr(Backbone, "suffices", staticmethod(lambda tiers: False))


def test_both_paths_decide_the_same(seed, general_path):
    """I8: same digests, tables, nodes, pages, evictions and sums after every step, whatever the policy."""
    seeds = [(100 * seed + i, policy) for i, policy in enumerate(POLICIES)]
    by_hand = [history(*s) for s in seeds]
    general_path()
    assert [history(*s) for s in seeds] == by_hand
    assert any(evictions for steps in by_hand for _, _, _, _, evictions, _ in steps)


@pytest.mark.parametrize(("host_pages", "by_hand"), [(0, True), (8, False)])
def test_the_path_by_hand_is_for_full_attention_on_the_device_only(host_pages, by_hand):
    config = CacheConfig(page_tokens=4, device_pages=8, host_pages=host_pages)
    assert (PrefixCache((FullAttention("full", ()),), config).backbone is not None) is by_hand
