"""A serving loop that is driven at random: the same seed gives the same run on every machine and under every hash seed.

drive(seed, num_steps)   draws components, sizes and policies, unless they are given, and checks all along:
                         equal digests, the content of every page read, the invariants, that nothing is left, and,
                         with events=True, after every step that a consumer of events knows what the tree holds
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from jaxcache.components import FullAttention, RecurrentState, SlidingWindow
from jaxcache.components.base import Component
from jaxcache.config import CacheConfig, TenantShare
from jaxcache.core import invariants
from jaxcache.core.eviction import POLICIES
from jaxcache.testing.request import Request
from jaxcache.testing.scenario import Scenario
from jaxcache.testing.storage_faults import FAULTS, StorageFaults
from jaxcache.types import PrefetchPolicy, Tier, TransferKind, WritePolicy
from tests.core.consumer import Consumer
from tests.core.strict import Strict

MIXTURES = (
    ("full",),
    ("full", "window"),
    ("full", "state"),
    ("full", "window", "state"),
    ("full", "window", "window"),
    ("window",),
    ("state",),
    ("window", "state"),
)
MAX_WAITING = 5
MAX_RUNNING = 6


class Run(NamedTuple):
    """counters: of the first rank, with `evicted_pages`. digest: the last one."""

    counters: Counter[str]
    digest: int


def drive(
    seed: int,
    num_steps: int,
    num_ranks: int = 2,
    mixture: Sequence[str] | None = None,
    max_pages: int | None = None,
    abort_chance: float = 0.03,
    cap_chance: float = 0.1,
    accident_chance: float = 0.015,
    wish_chance: float = 0.2,
    check_every: int = 7,
    **overrides: Any,
) -> Run:
    """Raises AssertionError as soon as anything is wrong. overrides: fields of CacheConfig."""
    rng = random.Random(seed)
    page_tokens = overrides.pop("page_tokens", None) or rng.choice([1, 4, 16])
    max_pages = max_pages or rng.choice([6, 12, 20])
    components = draw_components(rng, mixture or rng.choice(MIXTURES), page_tokens)
    config = draw_config(rng, components, page_tokens, max_pages, **overrides)
    faults = StorageFaults(seed, num_ranks, FAULTS, rng.choice([0.0, 1.0, 6.0]))
    scenario = Strict(components, config, seed, (num_ranks, 1, 1), faults)
    scenario.cap_chance = cap_chance
    scenario.wish_chance = wish_chance
    consumers = [Consumer(core) for core in scenario.cores if config.events]
    for step in range(num_steps):
        iterate(scenario, rng, max_pages * page_tokens, abort_chance)
        if rng.random() < accident_chance:
            _accident(scenario, rng)
        for consumer in consumers:
            consumer.check()
        if step % check_every == 0:
            for core in scenario.cores:
                invariants.check(core)
    scenario.wind_down()
    for core in scenario.cores:
        invariants.check(core)
    counters = Counter(scenario.core.counters)
    counters["evicted_pages"] = sum(scenario.core.tiers.num_evicted_pages)
    for core in scenario.cores:
        invariants.check_empty(core)
    for consumer in consumers:
        consumer.check()
    return Run(counters, scenario.core.digest)


def draw_components(rng: random.Random, kinds: Sequence[str], page_tokens: int) -> tuple[Component, ...]:
    """Windows shorter and longer than pages, states on grids that do and do not divide them."""
    page = page_tokens
    components: list[Component] = []
    for i, kind in enumerate(kinds):
        if kind == "full":
            components.append(FullAttention("full", ()))
        elif kind == "window":
            window = rng.choice([1, 2, 3, page - 1, page, page + 1, 2 * page, 3 * page + 1, 5 * page])
            components.append(SlidingWindow(f"window{i}", (), window_tokens=max(1, window)))
        else:
            components.append(RecurrentState("state", (), chunk_tokens=rng.choice([1, 2, page, 2 * page, 3])))
    return tuple(components)


def draw_config(
    rng: random.Random, components: tuple[Component, ...], page_tokens: int, max_pages: int, **overrides: Any
) -> CacheConfig:
    """Tiers so small that everything that can run out does."""
    room = max_pages + 4
    states = [component.name for component in components if isinstance(component, RecurrentState)]
    device_pages = {c.name: rng.choice([room + 1, room + 6, 2 * room, 4 * room]) for c in components}
    host_pages = {c.name: rng.choice([0, 1, 4, max_pages, 2 * room, 6 * room]) for c in components}
    device_pages.update(dict.fromkeys(states, 60))
    host_pages.update({name: rng.choice([0, 1, 3, 8, 30]) for name in states})
    choices: dict[str, Any] = {
        "page_tokens": page_tokens,
        "device_pages": device_pages,
        "host_pages": host_pages,
        "write_policy": rng.choice(list(WritePolicy)),
        "prefetch_min_tokens": 1,
        "evict_output_first": rng.random() < 0.5,
        "max_states_per_path": rng.choice([1, 2, 4]),
        "prefetch_policy": rng.choice(list(PrefetchPolicy)),
        "max_stores": rng.choice([1, 4]),
        "max_queued_stores": rng.choice([1, 64]),
        "prefetch_host_share": rng.choice([0.3, 1.0]),
        "load_back_min_tokens": rng.choice([1, 1, 3 * page_tokens]),
        "max_stored_beliefs": rng.choice([4, 1000]),
        "eviction_policy": rng.choice(list(POLICIES)),
        "max_retained_share": rng.choice([0.0, 0.25, 0.6]),
    }
    config = CacheConfig(**{**choices, **overrides})
    return config if "tenants" in overrides else replace(config, tenants=draw_tenants(rng, config, components, room))


def draw_tenants(
    rng: random.Random, config: CacheConfig, components: tuple[Component, ...], room: int
) -> dict[str, TenantShare]:
    """Often none; else floors that leave room for the longest request, and quotas that are soon met."""
    floor_of_room = 1 - room / min(config.pages_of(c.name, Tier.DEVICE) for c in components)
    shares = {}
    for name in rng.choice(["", "", "a", "b", "ab"]):
        floor = rng.choice([0.0, max(0.0, floor_of_room / 2)])
        shares[name] = TenantShare(floor, rng.choice([1.0, max(floor, 0.3), max(floor, 0.6)]))
    return shares


def iterate(scenario: Scenario, rng: random.Random, max_tokens: int, abort_chance: float) -> None:
    """One iteration of the serving loop: sometimes with several model steps, and with aborts at the worst moments."""
    scenario.step()
    while rng.random() < 0.5 and len(scenario.waiting) < MAX_WAITING:
        scenario.arrive(max_tokens)
    for request in list(scenario.waiting):
        if rng.random() < 0.05:
            scenario.give_up(request)
        elif len(scenario.running) < MAX_RUNNING:
            _admit(scenario, request)
        if scenario.running and rng.random() < abort_chance:
            scenario.finish(rng.choice([scenario.running[-1], rng.choice(scenario.running)]))
    scenario.apply()
    for _ in range(rng.choice([1, 1, 2])):
        for request in list(scenario.running):
            if rng.random() < 0.8:
                scenario.run(request)
            if not scenario.core.plan_is_applied() and rng.random() < 0.5:
                scenario.apply()
    if any(transfer.kind is TransferKind.LOAD_BACK for transfer in scenario.core.outbox.transfers):
        scenario.apply()


def _admit(scenario: Scenario, request: Request) -> None:
    core = scenario.core
    idle = not scenario.running and not core.live_transfers() and not core.is_busy()
    held_up = core.config.prefetch_policy is not PrefetchPolicy.BEST_EFFORT and request.has_running_prefetch
    assert scenario.admit(request) or not idle or held_up, "A1: starved in an empty system"


def _accident(scenario: Scenario, rng: random.Random) -> None:
    kind = rng.randrange(3)
    if kind == 0:
        scenario.reset()
    elif kind == 1:
        scenario.forget_device()
    else:
        scenario.retire(rng.randrange(2))
