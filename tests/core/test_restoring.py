"""Trees that any serving has left, recorded and made again in caches of other sizes and tiers, with fake pages."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from jaxcache.components.base import Component
from jaxcache.config import CacheConfig
from jaxcache.core import invariants
from jaxcache.core.eviction import POLICIES
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.core.restoring import Placement, Restoring, check_quiet, placements
from jaxcache.core.tree_record import findable_nodes, record_of, sources_of
from jaxcache.testing.fake_plane import FakePlane
from jaxcache.testing.page_content import page_content
from jaxcache.types import WritePolicy
from tests.core.consumer import Consumer
from tests.core.driver import MIXTURES, draw_components, draw_config, iterate
from tests.core.strict import Strict

Rows = list[list[bytes]]  # by component, in the order of the snapshot


class Snapshot:
    """A core as its snapshot has it, with the content of the pages that a fake plane holds."""

    def __init__(self, core: PrefixCache, plane: FakePlane):
        check_quiet(core)
        sources, origins = sources_of(core)
        self.record = record_of(core, origins)
        self.rows: Rows = [
            [plane.device[c][page] for page in found.device_ids] + [plane.host[c][page] for page in found.host_ids]
            for c, found in enumerate(sources)
        ]

    def restore(self, core: PrefixCache) -> Rows:
        """Into an empty core; returns what its pages hold, by residency."""
        restoring = Restoring(core)
        restoring.check(self.record)
        fitted = restoring.fitted(self.record)
        placed = placements(core, fitted)
        held = [self.placed(core, r, placement) for r, placement in enumerate(placed)]
        restoring.adopt(fitted, placed, 0)
        invariants.check(core)
        check_contents(core, held)
        return held

    def placed(self, core: PrefixCache, r: int, placement: Placement) -> list[bytes]:
        held = [b"nothing"] * core.tiers.residencies[r].allocator.num_pages
        for page_id, source in zip(placement.page_ids.tolist(), placement.sources.tolist(), strict=True):
            held[page_id] = self.rows[r % len(core.components)][source]
        return held


def check_contents(core: PrefixCache, held: Rows) -> None:
    """Every page of the tree holds what its key stands for, on every tier."""
    num = len(core.components)
    for node in findable_nodes(core.tiers.tree):
        keys = core.tiers.tree.keys(node)
        for r, page_ids in enumerate(node.pages):
            if page_ids is not None:
                found = [held[r][page_id][:13] for page_id in page_ids.tolist()]
                assert found == [page_content(r % num, key) for key in keys[-len(page_ids) :]], f"{node=} {r=}"


def served(seed: int, num_steps: int, mixture: tuple[str, ...], **overrides: Any) -> Strict:
    """A serving loop at random, wound down: nothing runs, and nothing is in flight."""
    rng = random.Random(seed)
    page_tokens = rng.choice([1, 4])
    max_pages = rng.choice([6, 12])
    components = draw_components(rng, mixture, page_tokens)
    scenario = Strict(components, draw_config(rng, components, page_tokens, max_pages, **overrides), seed, (1, 1, 1))
    for _ in range(num_steps):
        iterate(scenario, rng, max_pages * page_tokens, 0.03)
        if rng.random() < 0.01:
            scenario.retire(rng.randrange(2))
    scenario.wind_down()
    for plane in scenario.planes:
        plane.jobs.advance(plane.jobs.now_us + 10**9)  # every copy ends
    return scenario


def redrawn(rng: random.Random, config: CacheConfig, components: tuple[Component, ...], **changes: Any) -> CacheConfig:
    """Other sizes, larger and smaller, and any policies."""
    names = [component.name for component in components]
    device = {name: rng.choice([1, 5, 20, 200]) for name in names}
    host = dict.fromkeys(names, 0) if rng.random() < 0.3 else {name: rng.choice([0, 5, 20, 200]) for name in names}
    policies = {
        "write_policy": rng.choice(list(WritePolicy)),
        "eviction_policy": rng.choice(list(POLICIES)),
        "tenants": rng.choice([{}, config.tenants]),
    }
    return replace(config, device_pages=device, host_pages=host, **{**policies, **changes})


def order_of(core: PrefixCache) -> list[list[tuple[int, bytes]]]:
    """By residency, the entries that may leave, best victim first, each by its end and its last page's key."""
    nodes = {node.id for node in findable_nodes(core.tiers.tree)}
    return [
        [(node.end, core.tiers.tree.keys(node)[-1]) for node in residency.order if node.id in nodes]
        for residency in core.tiers.residencies
    ]


def entries(core: PrefixCache) -> dict[tuple[int, bytes], list[bool]]:
    """Which residencies have what, by the end and the last key of every node."""
    return {
        (node.end, core.tiers.tree.keys(node)[-1]): [pages is not None for pages in node.pages]
        for node in findable_nodes(core.tiers.tree)
    }


# ---- any tree


@pytest.mark.parametrize("mixture", MIXTURES, ids="+".join)
@pytest.mark.parametrize("seed", range(3))
def test_any_tree_in_an_equal_cache(mixture, seed):
    """The same nodes, entries, namespaces and counts of hits; for lru the same order of eviction, on every tier."""
    scenario = served(seed, 60, mixture, eviction_policy="lru", tenants={})
    before = scenario.core
    after = PrefixCache(before.components, replace(before.config, events=True))
    consumer = Consumer(after)
    Snapshot(before, scenario.planes[0]).restore(after)
    assert entries(after) == entries(before)
    assert list(after.tiers.tree.roots) == list(before.tiers.tree.roots)
    assert after.tiers.tree.retired == before.tiers.tree.retired
    assert order_of(after) == order_of(before)
    consumer.check()
    invariants.check_empty(after)


@pytest.mark.parametrize("mixture", MIXTURES, ids="+".join)
@pytest.mark.parametrize("seed", range(6))
def test_any_tree_in_any_cache(mixture, seed):
    """Sizes, tiers and policies of their own: every invariant holds, and every page holds what its key stands for."""
    rng = random.Random(f"{seed} {mixture}")
    scenario = served(100 + seed, 60, mixture)
    snapshot = Snapshot(scenario.core, scenario.planes[0])
    for _ in range(4):
        core = PrefixCache(
            scenario.core.components, redrawn(rng, scenario.core.config, scenario.core.components, events=True)
        )
        consumer = Consumer(core)
        snapshot.restore(core)
        consumer.check()
        invariants.check_empty(core)
        consumer.check()
