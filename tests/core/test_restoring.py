"""Trees that any serving has left, recorded and made again in caches of other sizes and tiers, with fake pages."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from jaxcache.components.base import Component
from jaxcache.config import CacheConfig, TenantShare
from jaxcache.core import invariants, restoring
from jaxcache.core.eviction import POLICIES
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.core.restoring import Placement, Restoring, check_quiet, placements
from jaxcache.core.tree_record import findable_nodes, record_of, sources_of
from jaxcache.testing.page_content import page_content
from jaxcache.testing.virtual_plane import VirtualPlane
from jaxcache.types import ServingEnded, WritePolicy
from tests.core.consumer import Consumer
from tests.core.driver import MIXTURES, draw_components, draw_config, iterate
from tests.core.helpers import NEXT, Server, make_core, prompt
from tests.core.strict import Strict

Rows = list[list[bytes]]  # by component, in the order of the snapshot


class Snapshot:
    """A core as its snapshot has it, with the content of the pages that a fake plane holds."""

    def __init__(self, core: PrefixCache, plane: VirtualPlane):
        check_quiet(core)
        sources, origins = sources_of(core)
        self.record = record_of(core, origins)
        self.rows: Rows = [
            [row.tobytes() for row in (*plane.device[c][found.device_ids], *plane.host[c][found.host_ids])]
            for c, found in enumerate(sources)
        ]

    def restore(self, core: PrefixCache) -> Rows:
        """Into an empty core; returns what its pages hold, by residency."""
        own = Restoring(core)
        own.check(self.record)
        fitted = own.fitted(self.record)
        placed = placements(core, fitted)
        held = [self.placed(core, r, placement) for r, placement in enumerate(placed)]
        own.adopt(fitted, placed, 0)
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
        plane.time.advance(plane.time.now_us + 10**9)  # every copy ends
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
@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(n, marks=pytest.mark.slow) for n in range(3, 20))])
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


@pytest.mark.parametrize("mixture", MIXTURES, ids="+".join)
@pytest.mark.parametrize("seed", range(2))
def test_what_fits_is_what_eviction_would_have_left(mixture, seed):
    """On the device alone: the live cache, cut to half of each component's pages, keeps the same entries."""
    scenario = served(200 + seed, 80, mixture, eviction_policy="lru", tenants={}, host_pages=0)
    live, components = scenario.core, scenario.core.components
    snapshot = Snapshot(live, scenario.planes[0])
    sizes = {r.component.name: max(1, r.num_resident // 2) for r in live.tiers.device}
    core = PrefixCache(components, replace(live.config, device_pages=sizes))
    snapshot.restore(core)
    for residency in live.tiers.device:
        surplus = residency.allocator.num_pages - sizes[residency.component.name]
        assert live.tiers.make_room(live.tiers.device[residency.index], surplus)
    assert entries(core) == entries(live)
    assert order_of(core) == order_of(live)


def test_host_pages_that_no_host_tier_may_hold_go_to_the_device():
    """Of a cache that writes back: pages in host memory below device pages. With room nothing is lost."""
    num_moved = 0
    for seed in range(8):
        scenario = served(300 + seed, 60, ("full", "window", "state"), write_policy=WritePolicy.WRITE_BACK, tenants={})
        snapshot = Snapshot(scenario.core, scenario.planes[0])
        for host_pages in (0, 500):
            config = replace(scenario.core.config, device_pages=500, host_pages=host_pages)
            core = PrefixCache(scenario.core.components, replace(config, write_policy=WritePolicy.WRITE_THROUGH))
            snapshot.restore(core)
            assert entries(core).keys() == entries(scenario.core).keys()
            for after, before in zip(entries(core).values(), entries(scenario.core).values(), strict=True):
                num = len(core.components)
                assert [after[c] or after[c + num] for c in range(num)] == [
                    before[c] or before[c + num] for c in range(num)
                ]
                num_moved += after != before
    assert num_moved > 50


@pytest.mark.mutation
def test_tiers_that_were_not_looked_at_would_be_seen(monkeypatch):
    monkeypatch.setattr(Restoring, "_suited", lambda _, record: record)
    with pytest.raises(AssertionError):
        test_host_pages_that_no_host_tier_may_hold_go_to_the_device()


@pytest.mark.mutation
def test_an_order_that_was_not_restored_would_be_seen(monkeypatch):
    monkeypatch.setattr(restoring, "_restore_order", lambda *_: None)
    with pytest.raises(AssertionError):
        test_any_tree_in_an_equal_cache(("full",), 1)


@pytest.mark.mutation
def test_pages_at_other_places_would_be_seen(monkeypatch):
    """As if the pages of a component were numbered in another order than they are written in."""

    number = sources_of

    def shifted(core: PrefixCache) -> Any:
        sources, origins = number(core)
        return sources, [np.where(origin > 0, origin - 1, origin) for origin in origins]

    monkeypatch.setattr(sys.modules[__name__], "sources_of", shifted)
    with pytest.raises(AssertionError):
        test_any_tree_in_an_equal_cache(("full",), 1)


# ---- one behaviour each


def restored(server: Server, **fields: Any) -> PrefixCache:
    server.settle()
    core = make_core(*server.core.components, **fields)
    Snapshot(server.core, server.plane).restore(core)
    return core


def found(core: PrefixCache, tokens: list[int], **fields: str) -> int:
    """How many tokens of a prompt that goes on are found."""
    return core.match(core.sequence([*tokens, NEXT], core.new_namespace(**fields))).num_tokens


def test_hits_priorities_and_generated_text_are_kept():
    server = Server(device_pages=64, eviction_policy="priority")
    lease = server.admit(prompt(8))
    server.compute(lease, 8)
    server.insert(lease, 8, priority=3)
    server.decode(lease, prompt(8, 1000))
    server.release(lease)
    server.prefill(prompt(8) + prompt(4, 2000))
    before, after = (findable_nodes(core.tiers.tree) for core in (server.core, restored(server, device_pages=64)))
    assert [(n.end, n.hits, n.priority, n.is_output) for n in after] == [
        (n.end, n.hits, n.priority, n.is_output) for n in before
    ]
    assert {n.priority for n in after} == {0, 3} and any(n.is_output for n in after) and any(n.hits for n in after)


def test_what_is_retained_leaves_last_and_is_retained_no_more():
    server = Server(device_pages=32, max_retained_share=0.5)
    lease = server.admit(prompt(16))
    server.compute(lease, 16)
    server.insert(lease, 16, retain_steps=1000)
    server.release(lease)
    server.prefill(prompt(16, 1000))
    core = restored(server, device_pages=4)
    assert (found(core, prompt(16), model="test"), found(core, prompt(16, 1000), model="test")) == (16, 0)
    invariants.check_empty(core)


def test_floors_and_accounts_of_tenants():
    """Namespaces get their accounts again; where not everything fits, a floor protects its tenant's oldest pages."""
    server = Server(device_pages=32)
    tenants = {"a": TenantShare(floor=0.5)}
    prompts = {"a": prompt(48), "b": prompt(32, 1000), "c": prompt(32, 2000)}
    for tenant, tokens in prompts.items():
        lease = server.admit(server.sequence(tokens, server.core.new_namespace(model="test", tenant=tenant)))
        server.compute(lease, len(tokens))
        server.insert(lease, len(tokens))
        server.release(lease)
    for chosen, expected in ((tenants, [32, 0, 32]), ({}, [0, 32, 32])):
        core = restored(server, device_pages=16, tenants=chosen)
        assert [found(core, tokens, model="test", tenant=tenant) for tenant, tokens in prompts.items()] == expected


def test_retired_here_or_there():
    server = Server(device_pages=32)
    server.prefill(prompt(8))
    other = server.core.new_namespace(model="other")
    server.core.retire_namespace(server.namespace)
    lease = server.admit(server.sequence(prompt(12), other))
    server.compute(lease, 12)
    server.insert(lease, 12)
    server.release(lease)
    core = restored(server)
    assert found(core, prompt(12), model="other") == 12 and core.tiers.tree.num_nodes == 1
    with pytest.raises(ValueError, match="was retired"):
        core.new_namespace(model="test")
    core = make_core()
    core.new_namespace(model="test")
    with pytest.raises(ValueError, match="was retired before the snapshot was made"):
        Snapshot(server.core, server.plane).restore(core)
    assert core.tiers.tree.num_nodes == 0
    core = make_core()
    core.retire_namespace(core.new_namespace(model="other"))
    Snapshot(server.core, server.plane).restore(core)
    assert core.tiers.tree.num_nodes == 0


def test_the_digest_says_what_was_restored():
    server = Server(device_pages=32)
    record = Snapshot(server.core, server.plane).record
    digests = []
    for checksum in (1, 1, 2):
        core = make_core()
        Restoring(core).adopt(record, placements(core, record), checksum)
        digests.append(core.digest)
    assert digests[0] == digests[1] != digests[2]


def test_an_interrupt_ends_serving(monkeypatch):
    server = Server(device_pages=32)
    server.prefill(prompt(8))
    core = make_core()
    monkeypatch.setattr(core.tiers.tree, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Snapshot(server.core, server.plane).restore(core)
    with pytest.raises(ServingEnded, match="adopt was interrupted"):
        core.new_namespace(model="test")


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_refusals():
    server = Server(device_pages=32, host_pages=32)
    lease = server.admit(prompt(8))
    with pytest.raises(RuntimeError, match=r"every lease released first; held: \[1\]"):
        check_quiet(server.core)
    server.compute(lease, 8)
    server.insert(lease, 8)
    server.release(lease)
    with pytest.raises(RuntimeError, match="still to be moved"):
        check_quiet(server.core)
    server.settle()
    record = Snapshot(server.core, server.plane).record
    with pytest.raises(RuntimeError, match="this cache has pages"):
        Restoring(server.core).check(record)
    server.core.reset()
    server.settle()
    Snapshot(restored(server), server.plane)
    Restoring(server.core).check(record)
