"""Hit equals miss, for every family, tier and way; and mutations of every family's pages, each of which must show.

    way         the prompt that comes back             what is found of it: full attention only, wide window, narrow one
    whole       the same                               all its whole pages
    split       parts after 26 tokens                  24; 16, where a chunk ended and the window is kept; 16
    mid-window  parts after 42 tokens                  40; 40, whose window two chunks have published; 32
    alone       the same, its last window is gone      all; 32; 32
    short       11 tokens of its own                   8, the first: shorter than the window, and nothing is missing
    by token    the same, computed where one decodes   all its whole pages; another program, so equal but for rounding

What is cached was computed in chunks of 16 tokens, and published after each. Of states, those at the last page of each
prompt are kept, and where others have parted before: after 26 and 42 tokens. So with states as much is found as
without, down to the grid; when the last one is gone, as much as the one before holds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import lcm
from typing import NamedTuple

import numpy as np
import pytest

import jaxcache
from jaxcache.core.node import Node
from jaxcache.types import Tier
from models.decoder import components
from models.layer_plan import FULL, STATE, WINDOW
from tests.models.families import FAMILIES, FULL_ONLY, LATENTS, WIDE, WINDOWED, WITH_STATES
from tests.models.serving import (
    MAX_ERROR,
    MAX_KL,
    MODEL,
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

PROMPT, OTHER, SHORT = random_tokens(1, 45), random_tokens(2, 45), random_tokens(3, 11)
ALL = 44  # tokens of PROMPT in whole pages
LAST_CHUNK = 32  # where it began
TIERS = ("device", "host", "storage")
FAR = 10  # times the threshold is the least that a mutation must make
assert (PAGE_TOKENS, SHAPE.chunk_tokens, WIDE) == (4, 16, 10), "what is found follows from these"


def parting_at(cut: int, shift: int = 1) -> np.ndarray:
    """PROMPT up to there, then 9 tokens of which the first is another than PROMPT's, and than with another shift."""
    return np.concatenate([PROMPT[:cut], (np.resize(PROMPT[cut:], 9) + shift) % MODEL.vocab_size])


class Way(NamedTuple):
    """found: tokens of the prompt that must be cached: full attention only, with a wide window, with a narrow one

    loses: the window, or state, at the end of the prompt is gone
    """

    prompt: np.ndarray
    found: tuple[int, int, int]
    loses: bool = False
    by_token: bool = False


WAYS = {
    "whole": Way(PROMPT, (ALL, ALL, ALL)),
    "split": Way(parting_at(26), (24, 16, 16)),
    "mid-window": Way(parting_at(42), (40, 40, 32)),
    "alone": Way(PROMPT, (ALL, 32, 32), loses=True),
    "short": Way(SHORT, (8, 8, 8)),
    "by token": Way(PROMPT, (ALL, ALL, ALL), by_token=True),
}
EIGHT = (2, 2, 2)
# attention alone has a file of its own, test_hit_equals_miss.py
QUICK_ON_EIGHT = ("gpt_oss_wide", "nemotron_h_fine", "qwen3_next_fine", "deepseek_v32", "deepseek_v4_wide")
# also on one device: they differ in little from a model that is quick
SLOW = ("deepseek_v32_packed", "deepseek_v4_narrow")


def on_one(family: str):
    """Marks on one device."""
    return pytest.mark.slow if family in SLOW else ()


CASES = [
    pytest.param(family, shape, way, id=f"{family}-{shape}-{way}", marks=marks)
    for family, way in itertools.product(FAMILIES, WAYS)
    for shape, marks in (
        ((1, 1, 1), on_one(family)),
        (EIGHT, () if way == "whole" and family in QUICK_ON_EIGHT else pytest.mark.slow),
    )
]


def marked(families: Iterable[str]) -> list:
    return [pytest.param(family, marks=on_one(family)) for family in families]


def found(family: str, way: Way) -> int:
    if family in WITH_STATES:
        grid = grid_of(family)
        return last_state(family, before=last_state(family)) if way.loses else way.found[0] // grid * grid
    return way.found[0 if family in FULL_ONLY else 1 if family.endswith("wide") else 2]


def grid_of(family: str) -> int:
    return lcm(PAGE_TOKENS, FAMILIES[family].state_grid_tokens)


def last_state(family: str, before: int = ALL + 1) -> int:
    """Where PROMPT's last state is, that ends before `before`."""
    grid = grid_of(family)
    return max(end for end in (cut // grid * grid for cut in (26, 42, ALL)) if end < before)


def want(rig: Rig, prompt: np.ndarray) -> Answer:
    return reference(rig.mesh, tuple(prompt.tolist()), rig.model)


@contextmanager
def cached(family: str, rig: Rig, tier: str, loses: bool = False) -> Iterator[Driver]:
    """A driver whose prompts are cached in `tier`, and nowhere nearer."""
    storage = jaxcache.MemoryStorage()
    others = [parting_at(cut, shift=2) for cut in (26, 42)] if family in WITH_STATES else []
    with rig.cache(storage if tier == "storage" else None) as cache:
        driver = Driver(rig, cache)
        for tokens in (SHORT, OTHER, PROMPT, *others):
            check_equal(driver.ask(tokens, by_chunk=True), want(rig, tokens))
        driver.drain()
        if loses and tier != "storage":
            lose(driver, family)
        if tier == "host":
            driver.fill_device()
        if tier != "storage":
            yield driver
        elif loses:
            lose_stored(driver, family, storage)
    if tier == "storage":
        with rig.cache(storage) as cache:
            yield Driver(rig, cache)


def lose(driver: Driver, family: str) -> None:
    """What room for others does: the last window, or state, leaves every tier; full attention stays."""
    tiers = driver.cache.core.tiers
    for node in path(driver, PROMPT):
        for residency in tiers.residencies:
            name = residency.component.name
            is_last = node.end == last_state(family) if name == STATE else node.start >= LAST_CHUNK
            if name != FULL and is_last and node.pages[residency.index] is not None:
                tiers.drop(residency, node)


def lose_stored(driver: Driver, family: str, storage: jaxcache.MemoryStorage) -> None:
    keys = driver.sequence(PROMPT).page_keys(ALL // PAGE_TOKENS)
    gone = {WINDOW: keys[LAST_CHUNK // PAGE_TOKENS :]}
    if family in WITH_STATES:
        gone[STATE] = [keys[last_state(family) // PAGE_TOKENS - 1]]
    for name in [name for name in storage._values if name.page_key in gone.get(name.component, ())]:
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
    with cached(family, rig, tier, way.loses and family not in FULL_ONLY) as driver:
        got = ask(driver, tier, way.prompt, by_token=way.by_token)
    assert got.hits == tuple(found(family, way) if name == tier else 0 for name in TIERS)
    check_equal(got, want(rig, way.prompt))
    if not way.by_token:
        assert np.array_equal(got.logits, want(rig, way.prompt).logits), "the hit runs the programs of the miss"


@pytest.mark.parametrize("family", marked(WINDOWED | WITH_STATES))
def test_hit_over_two_tiers_equals_miss(make_mesh, family):
    """The window or state comes from host memory, the pages of full attention are on the device."""
    rig = rig_on(make_mesh(), FAMILIES[family])
    with cached(family, rig, "device") as driver:
        tiers = driver.cache.core.tiers
        for node in path(driver, PROMPT):
            for residency in tiers.device:
                if residency.component.name != FULL and node.pages[residency.index] is not None:
                    tiers.drop(residency, node)
        for component in (WINDOW, STATE):
            for field in driver.pools.get(component, ()):
                driver.edit_pool(lambda pool: pool.fill(0), component, field)
        got = driver.ask(PROMPT)
    assert sum(got.hits) == found(family, WAYS["whole"])
    check_equal(got, want(rig, PROMPT))


# ---- mutations: (driver with both prompts on the device, pages of PROMPT and of OTHER by component) -> None


Mutation = Callable[["Driver", "Pages"], None]


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
    (component,) = (part for part in components(driver.rig.model, PAGE_TOKENS, "float32") if part.name == WINDOW)
    (axis,) = (field.axes.index("slots") for field in component.fields if field.name == "kv")

    def edit(pool):
        by_slot = np.moveaxis(pool, 1 + axis, 1)
        by_slot[pages.mine[WINDOW][page], slot] = by_slot[pages.other[WINDOW][page], slot]

    driver.edit_pool(edit, WINDOW)


def stale_window(driver: Driver, pages: Pages) -> None:
    """Pages of the window hold what another request left there."""

    def edit(pool):
        held = pages.mine[WINDOW] >= 0
        pool[pages.mine[WINDOW][held]] = pool[pages.other[WINDOW][held]]

    driver.edit_pool(edit, WINDOW)


def entries_zeroed(component: str, field: str) -> Mutation:
    """Of all pages. Without the indexer's keys the oldest entries are chosen."""

    def mutation(driver: Driver, pages: Pages) -> None:
        def edit(pool):
            pool[pages.mine[component][pages.mine[component] >= 0]] = 0

        driver.edit_pool(edit, component, field)

    mutation.__name__ = f"zeroed_{field}"
    return mutation


def compress_state_is(name: str, source: Callable[[Pages], int | None]) -> Mutation:
    """The window's last page holds the compress state of another page, or none. It shows when the group that follows is
    complete, and chosen: while tokens are decoded."""

    def mutation(driver: Driver, pages: Pages) -> None:
        mine, other = pages.mine[WINDOW][-1], source(pages)
        assert mine >= 0 and (other is None or (other >= 0 and other != mine))
        state = 0 if other is None else np.array(driver.pools[WINDOW]["csa_state"])[other]

        def edit(pool):
            pool[mine] = state

        driver.edit_pool(edit, WINDOW, "csa_state")

    mutation.__name__ = f"{name}_compress_state"
    return mutation


def state_of_another_request(driver: Driver, pages: Pages) -> None:
    mine, other = last_of(pages.mine), last_of(pages.other)
    assert min(mine, other) >= 0 and mine != other

    def spoil(batch):
        read = batch.states.read
        return batch._replace(states=batch.states._replace(read=np.where(read == mine, other, read)))

    driver.spoil = spoil


def last_of(tables: dict[str, np.ndarray]) -> int:
    """The slot of the last state."""
    return tables[STATE][tables[STATE] >= 0][-1]


def zeroed_inputs_of_a_state(driver: Driver, pages: Pages) -> None:
    """What the convolution reads of the tokens before, of the first layer."""
    for field in [field for field in driver.pools[STATE] if field != "memory"]:
        zero_state(driver, field, pages)


def zeroed_memory_of_a_state(driver: Driver, pages: Pages) -> None:
    zero_state(driver, "memory", pages)


def zero_state(driver: Driver, field: str, pages: Pages) -> None:
    driver.edit_pool(lambda pool: pool[last_of(pages.mine), 0].fill(0), STATE, field)


def index_keys_of_another_request(driver: Driver, pages: Pages) -> None:
    """Of all pages, in the first layer."""

    def edit(pool):
        pool[pages.mine[FULL], 0] = pool[pages.other[FULL], 0]

    driver.edit_pool(edit, FULL, "index_key")


def missing_index_keys(driver: Driver, pages: Pages) -> None:
    """The scores of all tokens are equal, in the first layer."""

    def edit(pool):
        pool[pages.mine[FULL], 0] = 0

    driver.edit_pool(edit, FULL, "index_key")


def missing_latents(driver: Driver, pages: Pages) -> None:
    """Of one page in all layers."""
    driver.edit_pool(lambda pool: pool[pages.mine[FULL][5]].fill(0), FULL, "latent")


OF_FULL: tuple[Mutation, ...] = (full_page_of_another_request, position_off_by_one)
OF_LATENTS: tuple[Mutation, ...] = (index_keys_of_another_request, missing_index_keys, missing_latents)
OF_WINDOW: tuple[Mutation, ...] = (window_page_of_another_request, stale_oldest_token_of_the_window, stale_window)
LATE: tuple[Mutation, ...] = (
    compress_state_is("earlier", lambda pages: pages.mine[WINDOW][pages.mine[WINDOW] >= 0][-2]),
    compress_state_is("foreign", lambda pages: pages.other[WINDOW][-1]),
    compress_state_is("empty", lambda pages: None),
)
OF_ENTRIES: tuple[Mutation, ...] = (
    entries_zeroed(WINDOW, "kv"),
    entries_zeroed(FULL, "csa"),
    entries_zeroed(FULL, "csa_index"),
    entries_zeroed(FULL, "hca"),
    *LATE,
)
OF_STATE: tuple[Mutation, ...] = (state_of_another_request, zeroed_inputs_of_a_state, zeroed_memory_of_a_state)


def mutations_of(family: str) -> tuple[Mutation, ...]:
    if family in LATENTS:
        return OF_FULL + OF_LATENTS
    if family.startswith("deepseek_v4"):
        return OF_FULL + OF_WINDOW + OF_ENTRIES
    windowed = (*OF_WINDOW, zeroed_keys_of_a_window_page)
    others = windowed if family in WINDOWED else OF_STATE if family in WITH_STATES else ()
    return (*OF_FULL, zeroed_keys_of_a_full_page, *others)


MUTATIONS = [
    pytest.param(family, mutation, id=f"{family}-{mutation.__name__}", marks=on_one(family))
    for family in FAMILIES
    for mutation in mutations_of(family)
]


@pytest.mark.mutation
@pytest.mark.parametrize(("family", "mutation"), MUTATIONS)
def test_a_mutation_shows(make_mesh, family, mutation):
    """The comparison fails, and the first logits that differ show it alone, not narrowly."""
    rig = rig_on(make_mesh(), FAMILIES[family])
    with cached(family, rig, "device") as driver:
        mutation(driver, Pages(pages_of(driver, PROMPT), pages_of(driver, OTHER)))
        got = driver.ask(PROMPT)
    assert got.hits == (found(family, WAYS["whole"]), 0, 0)
    with pytest.raises(WrongAnswer):
        check_equal(got, want(rig, PROMPT))
    all_wanted = want(rig, PROMPT).logits
    row = np.flatnonzero((got.logits != all_wanted).any(axis=1))[:1]
    assert row == 0 or mutation in LATE
    first, wanted = got.logits[row], all_wanted[row]
    assert kl(wanted, first) > FAR * MAX_KL and np.abs(first - wanted).max() > FAR * MAX_ERROR


@pytest.mark.mutation
@pytest.mark.parametrize("family", marked(FAMILIES))
def test_a_host_row_of_another_request_shows(make_mesh, family):
    """The last page: of the window, or the last state, where there is one."""
    rig = rig_on(make_mesh(), FAMILIES[family])
    component = WINDOW if family in WINDOWED else STATE if family in WITH_STATES else FULL
    with cached(family, rig, "host") as driver:
        mine, other = (pages_of(driver, prompt, Tier.HOST)[component] for prompt in (PROMPT, OTHER))
        mine, other = mine[mine >= 0][-1], other[other >= 0][-1]
        assert mine != other

        def swap(rows):
            rows[mine] = rows[other]

        driver.edit_host(swap, component)
        got = driver.ask(PROMPT)
    assert got.hits == (0, found(family, WAYS["whole"]), 0)
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
