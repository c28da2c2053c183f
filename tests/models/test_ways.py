"""Hit equals miss, for every family, tier and way; and mutations of every family's pages, each of which must show.

    way         the prompt that comes back             what is found of it: full attention only, wide window, narrow one
    whole       the same                               all its whole pages
    split       parts after 26 tokens                  24; 16, where a chunk ended and the window is kept; 16
    mid-window  parts after 42 tokens                  40; 40, whose window two chunks have published; 32
    alone       the same, its last window is gone      all; 32; 32
    short       7 tokens of its own                    4, the first: shorter than the window, and nothing is missing
    by token    the same, computed where one decodes   all its whole pages; another program, so equal but for rounding

What is cached was computed in chunks of 16 tokens, and published after each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pytest

import jaxcache
from jaxcache.core.radix_tree import Node
from jaxcache.types import Tier
from models.decoder import FULL, WINDOW
from tests.models.families import FAMILIES, FULL_ONLY, WIDE, WINDOWED
from tests.models.serving import (
    MAX_ERROR,
    MAX_KL,
    PAGE_TOKENS,
    SHAPE,
    Answer,
    Driver,
    Rig,
    WrongAnswer,
    check_equal,
    kl,
    random_tokens,
    reference,
    rig_on,
)

PROMPT, OTHER, SHORT = random_tokens(1, 45), random_tokens(2, 45), random_tokens(3, 7)
ALL = 44  # tokens of PROMPT in whole pages
LAST_CHUNK = 32  # where it began
TIERS = ("device", "host", "storage")
FAR = 10  # times the threshold is the least that a mutation must make
assert (PAGE_TOKENS, SHAPE.chunk_tokens, WIDE) == (4, 16, 10), "what is found follows from these"


def parting_at(cut: int) -> np.ndarray:
    return np.concatenate([PROMPT[:cut], OTHER[:9]])


class Way(NamedTuple):
    """found: tokens of the prompt that must be cached: full attention only, with a wide window, with a narrow one"""

    prompt: np.ndarray
    found: tuple[int, int, int]
    loses_window: bool = False
    by_token: bool = False


WAYS = {
    "whole": Way(PROMPT, (ALL, ALL, ALL)),
    "split": Way(parting_at(26), (24, 16, 16)),
    "mid-window": Way(parting_at(42), (40, 40, 32)),
    "alone": Way(PROMPT, (ALL, 32, 32), loses_window=True),
    "short": Way(SHORT, (4, 4, 4)),
    "by token": Way(PROMPT, (ALL, ALL, ALL), by_token=True),
}
EIGHT = (2, 2, 2)
QUICK_ON_EIGHT = ("llama", "qwen3", "gemma3_wide", "gpt_oss_wide")  # the mixture of experts has a file of its own
CASES = [
    pytest.param(family, shape, way, id=f"{family}-{shape}-{way}", marks=marks)
    for family, way in itertools.product(FAMILIES, WAYS)
    for shape, marks in (
        ((1, 1, 1), ()),
        (EIGHT, () if way == "whole" and family in QUICK_ON_EIGHT else pytest.mark.slow),
    )
]


def found(family: str, way: Way) -> int:
    return way.found[0 if family in FULL_ONLY else 1 if family.endswith("wide") else 2]


def want(rig: Rig, prompt: np.ndarray) -> Answer:
    return reference(rig.mesh, tuple(prompt.tolist()), rig.model)


@contextmanager
def cached(rig: Rig, tier: str, loses_window: bool = False) -> Iterator[Driver]:
    """A driver whose three prompts are cached in `tier`, and nowhere nearer."""
    storage = jaxcache.MemoryStorage()
    with rig.cache(storage if tier == "storage" else None) as cache:
        driver = Driver(rig, cache)
        for tokens in (SHORT, OTHER, PROMPT):
            check_equal(driver.ask(tokens, by_chunk=True), want(rig, tokens))
        driver.drain()
        if loses_window and tier != "storage":
            lose_window(driver)
        if tier == "host":
            driver.fill_device()
        if tier != "storage":
            yield driver
        elif loses_window:
            lose_stored_window(driver, storage)
    if tier == "storage":
        with rig.cache(storage) as cache:
            yield Driver(rig, cache)


def lose_window(driver: Driver) -> None:
    """What room for others does: the window that the last chunk published leaves every tier; full attention stays."""
    tiers = driver.cache.core.tiers
    for node in path(driver, PROMPT):
        for residency in tiers.residencies:
            if (
                residency.component.name == WINDOW
                and node.start >= LAST_CHUNK
                and node.pages[residency.index] is not None
            ):
                tiers.drop(residency, node)


def lose_stored_window(driver: Driver, storage: jaxcache.MemoryStorage) -> None:
    keys = driver.sequence(PROMPT).page_keys(ALL // PAGE_TOKENS)[LAST_CHUNK // PAGE_TOKENS :]
    for name in [name for name in storage._values if name.page_key in keys and name.component == WINDOW]:
        del storage._values[name]


def path(driver: Driver, prompt: np.ndarray) -> list[Node]:
    """The nodes that hold a prompt's whole pages, top first."""
    return [node for node, _ in driver.cache.core.tiers.tree.walk(driver.sequence(prompt), ALL)]


def ask(driver: Driver, tier: str, prompt: np.ndarray, **choices) -> Answer:
    return driver.ask_storage(prompt, **choices) if tier == "storage" else driver.ask(prompt, **choices)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(("family", "shape", "way"), CASES)
def test_hit_equals_miss(make_mesh, family, shape, way, tier):
    rig, way = rig_on(make_mesh(*shape), FAMILIES[family]), WAYS[way]
    with cached(rig, tier, way.loses_window and family in WINDOWED) as driver:
        got = ask(driver, tier, way.prompt, by_token=way.by_token)
    assert got.hits == tuple(found(family, way) if name == tier else 0 for name in TIERS)
    check_equal(got, want(rig, way.prompt))
    if not way.by_token:
        assert np.array_equal(got.logits, want(rig, way.prompt).logits), "the hit runs the programs of the miss"


@pytest.mark.parametrize("family", WINDOWED)
def test_hit_over_two_tiers_equals_miss(make_mesh, family):
    """The window comes from host memory, the pages of full attention are on the device."""
    rig = rig_on(make_mesh(), FAMILIES[family])
    with cached(rig, "device") as driver:
        tiers = driver.cache.core.tiers
        (window,) = tiers.suffixes
        for node in path(driver, PROMPT):
            if node.pages[window] is not None:
                tiers.drop(tiers.device[window], node)
        driver.edit_pool(lambda pool: pool.fill(0), WINDOW)
        got = driver.ask(PROMPT)
    assert sum(got.hits) == ALL
    check_equal(got, want(rig, PROMPT))


# ---- mutations: (driver with both prompts on the device, pages of PROMPT and of OTHER by component) -> None


class Pages(NamedTuple):
    """Device pages by component, from the first page on; -1: not there"""

    mine: dict[str, np.ndarray]
    other: dict[str, np.ndarray]


def pages_of(driver: Driver, prompt: np.ndarray, tier: Tier = Tier.DEVICE) -> dict[str, np.ndarray]:
    tiers = driver.cache.core.tiers
    tables = {component.name: np.full(ALL // PAGE_TOKENS, -1) for component in tiers.components}
    for node in path(driver, prompt):
        places = slice(node.start // PAGE_TOKENS, node.end // PAGE_TOKENS)
        for residency in (tiers.device, tiers.host)[tier]:
            if (pages := node.pages[residency.index]) is not None:
                tables[residency.component.name][places] = pages[: ALL // PAGE_TOKENS - places.start]
    return tables


def oldest_visible(window_tokens: int) -> tuple[int, int]:
    """(page, slot) of the oldest token that the window of token ALL reads."""
    return divmod(ALL - window_tokens + 1, PAGE_TOKENS)


def full_page_of_another_request(driver: Driver, pages: Pages) -> None:
    swap_in_tables(driver, FULL, pages.mine[FULL][3], pages.other[FULL][3])


def window_page_of_another_request(driver: Driver, pages: Pages) -> None:
    swap_in_tables(driver, WINDOW, pages.mine[WINDOW][-1], pages.other[WINDOW][-1])


def swap_in_tables(driver: Driver, component: str, mine: int, other: int) -> None:
    def spoil(batch):
        table = batch.page_tables[component]
        return batch._replace(page_tables={**batch.page_tables, component: np.where(table == mine, other, table)})

    assert min(mine, other) >= 0 and mine != other
    driver.spoil = spoil


def position_off_by_one(driver: Driver, pages: Pages) -> None:
    driver.spoil = lambda batch: batch._replace(starts=batch.starts + (batch.num_new > 0))


def zeroed_keys_of_a_full_page(driver: Driver, pages: Pages) -> None:
    """Of one layer."""
    driver.edit_pool(lambda pool: pool[(pages.mine[FULL][5], *first_layer(pool), 0)].fill(0))


def zeroed_keys_of_a_window_page(driver: Driver, pages: Pages) -> None:
    driver.edit_pool(lambda pool: pool[(pages.mine[WINDOW][-1], *first_layer(pool), 0)].fill(0), WINDOW)


def first_layer(pool: np.ndarray) -> tuple[int, ...]:
    return (0,) * (pool.ndim - 5)


def stale_oldest_token_of_the_window(driver: Driver, pages: Pages) -> None:
    """One slot of one page, in all layers: what is left behind if a window is kept one token too short."""
    page, slot = oldest_visible(driver.rig.model.window_tokens)

    def edit(pool):
        pool[pages.mine[WINDOW][page], ..., slot, :, :] = pool[pages.other[WINDOW][page], ..., slot, :, :]

    driver.edit_pool(edit, WINDOW)


def stale_window(driver: Driver, pages: Pages) -> None:
    """Pages of the window hold what another request left there."""

    def edit(pool):
        held = pages.mine[WINDOW] >= 0
        pool[pages.mine[WINDOW][held]] = pool[pages.other[WINDOW][held]]

    driver.edit_pool(edit, WINDOW)


Mutation = Callable[[Driver, Pages], None]
OF_FULL: tuple[Mutation, ...] = (full_page_of_another_request, position_off_by_one, zeroed_keys_of_a_full_page)
OF_WINDOW: tuple[Mutation, ...] = (
    window_page_of_another_request,
    zeroed_keys_of_a_window_page,
    stale_oldest_token_of_the_window,
    stale_window,
)
MUTATIONS = [
    pytest.param(family, mutation, id=f"{family}-{mutation.__name__}")
    for family in FAMILIES
    for mutation in (*OF_FULL, *(OF_WINDOW if family in WINDOWED else ()))
]


@pytest.mark.mutation
@pytest.mark.parametrize(("family", "mutation"), MUTATIONS)
def test_a_mutation_shows(make_mesh, family, mutation):
    """The comparison fails, and the first logits alone show it, not narrowly."""
    rig = rig_on(make_mesh(), FAMILIES[family])
    with cached(rig, "device") as driver:
        mutation(driver, Pages(pages_of(driver, PROMPT), pages_of(driver, OTHER)))
        got = driver.ask(PROMPT)
    assert got.hits == (ALL, 0, 0)
    with pytest.raises(WrongAnswer):
        check_equal(got, want(rig, PROMPT))
    first, wanted = got.logits[:1], want(rig, PROMPT).logits[:1]
    assert kl(wanted, first) > FAR * MAX_KL and np.abs(first - wanted).max() > FAR * MAX_ERROR


@pytest.mark.mutation
@pytest.mark.parametrize("family", FAMILIES)
def test_a_host_row_of_another_request_shows(make_mesh, family):
    """The last page: of the window, where there is one."""
    rig = rig_on(make_mesh(), FAMILIES[family])
    component = WINDOW if family in WINDOWED else FULL
    with cached(rig, "host") as driver:
        mine, other = (pages_of(driver, prompt, Tier.HOST)[component][-1] for prompt in (PROMPT, OTHER))
        assert min(mine, other) >= 0 and mine != other

        def swap(rows):
            rows[mine] = rows[other]

        driver.edit_host(swap, component)
        got = driver.ask(PROMPT)
    assert got.hits == (0, ALL, 0)
    with pytest.raises(WrongAnswer):
        check_equal(got, want(rig, PROMPT))


@pytest.mark.mutation
def test_a_window_that_is_declared_too_short_shows(make_mesh, monkeypatch):
    """The cache is told of a page less than the model reads."""
    model = FAMILIES["gemma3_wide"]
    rig = rig_on(make_mesh(), model)
    with monkeypatch.context() as changed:
        changed.setattr(type(model), "window_tokens", property(lambda self: WIDE - PAGE_TOKENS))
        cache = rig.cache()
    with cache:
        driver = Driver(rig, cache)
        driver.ask(PROMPT, by_chunk=True)
        driver.drain()
        driver.fill_device()
        got = driver.ask(PROMPT)
    assert got.hits == (0, ALL, 0)
    with pytest.raises(WrongAnswer):
        check_equal(got, want(rig, PROMPT))
