"""What one run of the fuzzer is about, drawn at random: components, sizes, policies, ranks. Small, so all runs out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import lcm
from random import Random
from typing import NamedTuple

from jaxcache.components import Component, FullAttention, RecurrentState, SlidingWindow
from jaxcache.config import CacheConfig, TenantShare
from jaxcache.types import PrefetchPolicy, WritePolicy

EVICTION_POLICIES = ("lru", "lfu", "fifo", "slru", "priority", "s3fifo", "adaptive")
DRAWN_POLICIES = (*EVICTION_POLICIES, "slru", "adaptive")  # nine: a draw from another number is another run


def full(page: int, rng: Random) -> Component:
    return FullAttention("full", ())


def window(page: int, rng: Random) -> Component:
    """Of more than one token: a window that needs nothing keeps nothing where it is alone."""
    return SlidingWindow("window", (), max(2, rng.choice((page, page + 1, 2 * page, 3 * page + 2))))


def wide(page: int, rng: Random) -> Component:
    return SlidingWindow("wide", (), rng.choice((4 * page, 5 * page + 1)))


def narrow(page: int, rng: Random) -> Component:
    return SlidingWindow("narrow", (), rng.choice((1, 2, page + 2)))


def state(page: int, rng: Random) -> Component:
    return RecurrentState("state", (), rng.choice((1, page, 2 * page, 3)))


Mixture = tuple[Callable[[int, Random], Component], ...]
MIXTURES: tuple[Mixture, ...] = (
    (full,),
    (full, window),
    (full, state),
    (full, window, state),
    (window, full, state),
    (window,),
    (state,),
    (window, state),
    (full, wide, narrow),
    (narrow, wide),
)


class Kind(NamedTuple):
    """What a run is of; all else is drawn. One rank: several decide the same."""

    mixture: Mixture
    eviction_policy: str
    write_policy: WritePolicy
    has_tenants: bool


class Setting(NamedTuple):
    """vocabulary: how many token ids there are; grid: of positions at which a request can resume.

    is_calm: the same few texts come again and again, and little else happens: they end up in storage, and come back
    """

    components: tuple[Component, ...]
    config: CacheConfig
    num_ranks: int
    has_storage: bool
    fault_rate: float
    tenants: tuple[str, ...]
    num_running: int
    vocabulary: int
    is_calm: bool
    max_prompt: int
    grid: int


def draw(rng: Random, kind: Kind | None = None) -> Setting:
    page = rng.choice((1, 4, 4, 4, 16))
    components = tuple(make(page, rng) for make in (kind.mixture if kind else rng.choice(MIXTURES)))
    is_calm = rng.random() < 0.3
    num_device = rng.choice((10, 16, 24, 40))
    num_host = rng.choice((24, 40) if is_calm else (0, 0, 12, 24, 60))
    storage = num_host > 0 and rng.random() < 0.8
    tenants = {}
    if kind.has_tenants if kind else not is_calm and rng.random() < 0.25:
        tenants = {"a": TenantShare(rng.choice((0.0, 0.2, 0.4)), rng.choice((0.5, 1.0))), "b": TenantShare(0.2, 0.7)}
    config = CacheConfig(
        page_tokens=page,
        device_pages={c.name: _pages(c, num_device, rng) for c in components},
        host_pages={c.name: _pages(c, num_host, rng) if rng.random() < 0.95 else 0 for c in components},
        write_policy=rng.choice(
            (WritePolicy.WRITE_THROUGH, WritePolicy.WRITE_THROUGH, *WritePolicy, WritePolicy.WRITE_BACK)
        ),
        eviction_policy="lru" if rng.random() < 0.4 else rng.choice(DRAWN_POLICIES),
        tenants=tenants,
        max_retain_steps=60,
        max_retained_share=rng.choice((0.1, 0.25, 0.5)),
        evict_output_first=rng.random() < 0.7,
        stable_tables=rng.random() < 0.3,
        load_back_min_tokens=rng.choice((1, 1, 1, 2 * page)),
        max_states_per_path=rng.choice((1, 2, 4)),
        prefetch_policy=rng.choice(tuple(PrefetchPolicy)),
        prefetch_timeout_s=rng.choice((0.0, 0.05)),
        prefetch_timeout_s_per_1k_tokens=0.1,
        prefetch_min_tokens=rng.choice((1, 1, 2 * page)),
        prefetch_host_share=rng.choice((0.3, 0.6, 1.0)),
        max_stores=rng.choice((1, 3, 3)),
        max_queued_stores=rng.choice((2, 64, 64)),
        max_stored_beliefs=rng.choice((8, 1 << 20)),
        max_live_transfers=rng.choice((5, 16)),
        events=rng.random() < 0.6,
        max_logged_changes=rng.choice((20, 1 << 16)),
        caching=rng.random() >= 0.02,
    )
    if kind is not None:
        config = replace(config, eviction_policy=kind.eviction_policy, write_policy=kind.write_policy)
    return Setting(
        components,
        config,
        num_ranks=1 if kind else rng.choice((1, 1, 1, 1, 1, 2, 3)),
        has_storage=storage,
        fault_rate=rng.choice((0.0, 0.01) if is_calm else (0.0, 0.02, 0.2)),
        tenants=("", *tenants),
        num_running=rng.choice((2, 4, 8)),
        vocabulary=50 if is_calm else rng.choice((2, 2, 50)),
        is_calm=is_calm,
        max_prompt=num_device * page * 2 // 3,
        grid=lcm(page, *[c.grid_tokens for c in components]),
    )


def _pages(component: Component, num_pages: int, rng: Random) -> int:
    if isinstance(component, RecurrentState):
        return min(num_pages, rng.choice((6, 12, 20)))
    return num_pages if rng.random() < 0.7 else num_pages * 3 // 4
