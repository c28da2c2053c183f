"""What the tests of snapshots share: a cache that has served, everything that is in it, and its snapshot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import jaxcache
from jaxcache.core import invariants
from jaxcache.core.tree_record import findable_nodes
from jaxcache.pools.page_layout import FieldLayout
from jaxcache.types import Tier
from tests.models.serving import Driver, random_tokens

START = random_tokens(90, 14)
PROMPTS = [np.concatenate([START[: 4 * (seed % 3)], random_tokens(seed, 45)]) for seed in range(7)]  # more than fit

Bytes = dict[tuple[Tier, str, bytes], bytes]  # page by tier, component and key


@dataclass(frozen=True)
class Saved:
    """A snapshot, and what the cache held that it was made of."""

    folder: Path
    matches: list[jaxcache.Match]
    pages: Bytes
    order: list[list[bytes]]


def unpadded(pages: np.ndarray, field: FieldLayout) -> np.ndarray:
    """[pages, *padded page] -> [pages, *page], by hand."""
    for dim, (axis, num) in enumerate(zip(field.spec.axes, field.spec.shape, strict=True), start=1):
        step = pages.shape[dim] // num if axis == "heads" else 1
        pages = pages.take(range(0, num * step, step), axis=dim)
    return pages


def pages_of(cache: jaxcache.Cache, pools: Any) -> Bytes:
    """Every page that a request can find, as a device pool or host memory has it."""
    found: Bytes = {}
    for node in findable_nodes(cache.core.tiers.tree):
        keys = cache.core.tiers.tree.keys(node)
        for residency, ids in zip(cache.core.tiers.residencies, node.pages, strict=True):
            if ids is None:
                continue
            name = residency.component.name
            rows = [b""] * len(ids)
            for field in cache.layouts[name].fields:
                if residency.tier is Tier.DEVICE:
                    padded = np.asarray(pools[name][field.spec.name])[ids]
                else:
                    padded = host_pages(cache, name, field, ids)
                rows = [row + page.tobytes() for row, page in zip(rows, unpadded(padded, field), strict=True)]
            found |= {(residency.tier, name, key): row for key, row in zip(keys[-len(ids) :], rows, strict=True)}
    return found


def host_pages(cache: jaxcache.Cache, component: str, field: FieldLayout, ids: np.ndarray) -> np.ndarray:
    """[pages, *padded page] of the rows of all devices."""
    pool = cache.engine.effects.host_pools[component]
    cache.engine.drain()
    padded = np.zeros((len(ids), *field.padded_shape), field.dtype)
    for device in pool.devices:
        at = dict(zip(pool.layout.mesh.axis_names, pool.layout.coordinates(device), strict=True))
        places = zip(field.axes, field.local_shape, strict=True)
        index = [slice(None) if axis is None else slice(at[axis] * n, (at[axis] + 1) * n) for axis, n in places]
        padded[(slice(None), *index)] = pool.field_rows(device, field)[ids]
    return padded


def order_of(cache: jaxcache.Cache) -> list[list[bytes]]:
    """By residency, the last keys of the entries that may leave, best victim first."""
    tree = cache.core.tiers.tree
    can_be_found = {node.id for node in findable_nodes(tree)}
    return [
        [tree.keys(node)[-1] for node in residency.order if node.id in can_be_found]
        for residency in cache.core.tiers.residencies
    ]


def matches_of(driver: Driver) -> list[jaxcache.Match]:
    return [driver.cache.match(driver.sequence(prompt)) for prompt in PROMPTS]


def save(driver: Driver, folder: Path) -> Saved:
    driver.drain()
    driver.cache.snapshot(driver.pools, folder)
    cache = driver.cache
    return Saved(folder, matches_of(driver), pages_of(cache, driver.pools), order_of(cache))


def restored(rig, folder: Path, **changes: Any) -> Driver:
    cache = rig.cache(**changes)
    driver = Driver(rig, cache)
    driver.pools = cache.restore(folder)
    invariants.check(cache.core)
    return driver


def served(rig, **changes: Any) -> Driver:
    driver = Driver(rig, rig.cache(**changes))
    for prompt in PROMPTS:
        driver.ask(prompt)
    return driver


def check_same(driver: Driver, saved: Saved) -> None:
    """Matches, pages, and the order in which they leave."""
    assert matches_of(driver) == saved.matches
    assert pages_of(driver.cache, driver.pools) == saved.pages
    assert order_of(driver.cache) == saved.order
