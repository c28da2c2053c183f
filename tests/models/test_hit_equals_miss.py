"""A cached prefix changes no token and no logit: from every tier, whole, split and chunked. Mutations must show.

make     how the prefix came into the cache        whole, split (it ends inside a node), chunked (inserted by chunk)
tier     where it is when the request comes        device; host: device pages have left; storage: a new cache
check    logits and tokens against those without caching; bit for bit where the same program computed them
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import jaxcache
from jaxcache.engine import device_effects
from jaxcache.pools.storage_cells import storage_cells
from jaxcache.storage.base import ObjectKey
from tests.models.serving import (
    DEVICE_PAGES,
    HOST_PAGES,
    MAX_ERROR,
    MAX_KL,
    MESHES,
    PAGE_TOKENS,
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

PROMPT = random_tokens(1, 45)
OTHER = random_tokens(2, 45)  # another request
BRANCH = np.concatenate([PROMPT[:26], OTHER[:11]])  # shares 26 tokens with the prompt, so 6 whole pages
TIERS = ("device", "host", "storage")
MAKES = ("whole", "split", "chunked")
FAR = 10  # times the threshold is the least that a mutation must make


@pytest.fixture(params=MESHES, ids=str)
def rig(request: pytest.FixtureRequest, make_mesh) -> Rig:
    return rig_on(make_mesh(*request.param))


@pytest.fixture(params=["memory", "file"])
def storage(request: pytest.FixtureRequest, tmp_path) -> jaxcache.Storage:
    return jaxcache.MemoryStorage() if request.param == "memory" else jaxcache.FileStorage(tmp_path / "storage")


def want(rig: Rig, prompt: np.ndarray = PROMPT) -> Answer:
    return reference(rig.mesh, tuple(prompt.tolist()))


def make(driver: Driver, how: str) -> None:
    """Computes the prompt and another request, so that there is something to mix up."""
    for tokens in (OTHER, PROMPT):
        check_equal(driver.ask(tokens, by_chunk=how == "chunked"), want(driver.rig, tokens))


@contextmanager
def cached(rig: Rig, tier: str, how: str, storage: jaxcache.Storage | None = None) -> Iterator[Driver]:
    """A driver whose prefix is in `tier`, and nowhere nearer."""
    if tier == "storage":
        storage = storage or jaxcache.MemoryStorage()
        with rig.cache(storage) as cache:
            first = Driver(rig, cache)
            make(first, how)
            first.drain()
    with rig.cache(storage if tier == "storage" else None) as cache:
        driver = Driver(rig, cache)
        if tier != "storage":
            make(driver, how)
        if tier == "host":
            driver.fill_device()
        yield driver


def ask(driver: Driver, tier: str, prompt: np.ndarray = PROMPT, **choices) -> Answer:
    return driver.ask_storage(prompt, **choices) if tier == "storage" else driver.ask(prompt, **choices)


def hits_of(tier: str, num_tokens: int) -> tuple[int, int, int]:
    return tuple(num_tokens if name == tier else 0 for name in TIERS)  # type: ignore[return-value]


# ---- equal


@pytest.mark.parametrize("how", MAKES)
@pytest.mark.parametrize("tier", TIERS)
def test_hit_equals_miss(rig, tier, how):
    """Bit for bit: the hit runs the programs of the miss."""
    prompt, num_hit = (BRANCH, 24) if how == "split" else (PROMPT, 44)
    with cached(rig, tier, how) as driver:
        got = ask(driver, tier, prompt)
    assert got.hits == hits_of(tier, num_hit)
    check_equal(got, want(rig, prompt))
    assert np.array_equal(got.logits, want(rig, prompt).logits)


@pytest.mark.parametrize("tier", TIERS)
def test_hit_equals_miss_in_another_program(rig, tier):
    """One token is left to compute, and the program for one token computes it: equal but for rounding."""
    with cached(rig, tier, "whole") as driver:
        got = ask(driver, tier, by_token=True)
    assert got.hits == hits_of(tier, 44)
    check_equal(got, want(rig))


def test_hit_over_three_tiers_equals_miss(rig):
    """The first pages are on the device again, the next in host memory only, the rest comes from storage."""
    storage = jaxcache.MemoryStorage()
    with rig.cache(storage) as cache:
        first = Driver(rig, cache)
        first.ask(PROMPT)
        first.drain()
    with rig.cache(storage) as cache:
        driver = Driver(rig, cache)
        driver.ask(PROMPT[:30])
        driver.fill_device()
        driver.ask(PROMPT[:15])
        got = driver.ask_storage(PROMPT)
    assert got.hits == (12, 16, 16)
    check_equal(got, want(rig))


def test_hit_from_file_storage_equals_miss(make_mesh, storage):
    """On either engine."""
    rig = rig_on(make_mesh())
    with cached(rig, "storage", "chunked", storage) as driver:
        got = ask(driver, "storage")
    assert got.hits == hits_of("storage", 44)
    check_equal(got, want(rig))


def test_storage_of_another_grid_is_a_miss(make_mesh):
    """What one device wrote whole is not there for eight that share it."""
    storage = jaxcache.MemoryStorage()
    with cached(rig_on(make_mesh()), "storage", "whole", storage):
        rig = rig_on(make_mesh(2, 2, 2))
        with rig.cache(storage) as cache:
            got = Driver(rig, cache).ask_storage(PROMPT)
    assert got.hits == (0, 0, 0)
    check_equal(got, want(rig))


def test_conversation_that_branches_in_its_output_equals_miss(rig):
    """Second turns on the generated text of the first, which was inserted while decoding."""
    with rig.cache() as cache:
        driver = Driver(rig, cache)
        first = driver.ask(PROMPT, num_decode=9)
        spoken = np.concatenate([PROMPT, np.array(first.tokens, np.int32)])
        for cut in (len(spoken), len(spoken) - 3):
            turn = np.concatenate([spoken[:cut], OTHER[:9]])
            got = driver.ask(turn)
            assert sum(got.hits) == (min(cut, len(spoken) - 1) // PAGE_TOKENS) * PAGE_TOKENS
            check_equal(got, want(rig, turn))


# ---- mutations


def pages_of(driver: Driver, tokens: np.ndarray) -> np.ndarray:
    """Device pages of a cached prompt."""
    sequence = driver.sequence(tokens)
    path = driver.cache.core.tiers.tree.walk(sequence, sequence.num_tokens - 1)
    return np.concatenate([node.pages[0] for node, _ in path])


def rows_of(driver: Driver, tokens: np.ndarray) -> np.ndarray:
    """Host rows of a cached prompt."""
    sequence = driver.sequence(tokens)
    path = driver.cache.core.tiers.tree.walk(sequence, sequence.num_tokens - 1)
    return np.concatenate([node.pages[1] for node, _ in path])


def must_differ(rig: Rig, driver: Driver, tier: str) -> None:
    """The comparison fails, and the first logits alone show it, not narrowly."""
    got = ask(driver, tier)
    assert got.hits == hits_of(tier, 44)
    with pytest.raises(WrongAnswer):
        check_equal(got, want(rig))
    got_first, want_first = got.logits[:1], want(rig).logits[:1]
    assert kl(want_first, got_first) > FAR * MAX_KL
    assert np.abs(got_first - want_first).max() > FAR * MAX_ERROR


@pytest.mark.mutation
@pytest.mark.parametrize("tier", TIERS)
def test_page_of_another_request_in_the_table_shows(rig, tier):
    with cached(rig, tier, "whole") as driver:

        def spoil(batch):
            table = batch.page_tables["full"].copy()
            table[0, 3] = wrong
            return batch._replace(page_tables={"full": table})

        if tier == "storage":
            driver.ask_storage(OTHER)
        else:
            driver.ask(OTHER)
        wrong = pages_of(driver, OTHER)[3]
        driver.spoil = spoil
        must_differ(rig, driver, tier)


@pytest.mark.mutation
@pytest.mark.parametrize("tier", TIERS)
def test_position_off_by_one_shows(rig, tier):
    with cached(rig, tier, "whole") as driver:
        driver.spoil = lambda batch: batch._replace(starts=batch.starts + (batch.num_new > 0))
        must_differ(rig, driver, tier)


@pytest.mark.mutation
def test_zeroed_device_page_shows(rig):
    with cached(rig, "device", "whole") as driver:
        page = pages_of(driver, PROMPT)[5]
        driver.edit_pool(lambda pool: pool[page].fill(0))
        must_differ(rig, driver, "device")


@pytest.mark.mutation
def test_zeroed_layer_of_a_device_page_shows(rig):
    """The last layer's keys of one page: the least that can be lost."""
    with cached(rig, "device", "whole") as driver:
        page = pages_of(driver, PROMPT)[5]
        driver.edit_pool(lambda pool: pool[page, 2, 0].fill(0))
        must_differ(rig, driver, "device")


@pytest.mark.mutation
def test_zeroed_host_row_shows(rig):
    with cached(rig, "host", "whole") as driver:
        row = rows_of(driver, PROMPT)[5]
        driver.edit_host(lambda rows: rows[row].fill(0))
        must_differ(rig, driver, "host")


@pytest.mark.mutation
def test_host_row_of_another_request_shows(rig):
    with cached(rig, "host", "whole") as driver:
        mine, other = rows_of(driver, PROMPT)[5], rows_of(driver, OTHER)[5]

        def swap(rows):
            rows[mine] = rows[other]

        driver.edit_host(swap)
        must_differ(rig, driver, "host")


def by_programs(monkeypatch):
    """Copies as GPUs have them; CPU devices do without the programs where they can."""
    monkeypatch.setattr(device_effects, "back_up_now", lambda *args: False)
    monkeypatch.setattr(device_effects, "load_back_now", lambda *args: None)


@pytest.mark.mutation
@pytest.mark.parametrize("tier", ["host", "storage"])
def test_load_back_to_the_wrong_pages_shows(rig, tier, monkeypatch):
    """One page of the request lands where no page of it belongs. (Pages of a prefix that change places would not show:
    keys carry their positions, and attention sees all of them.)"""
    by_programs(monkeypatch)
    with cached(rig, tier, "whole") as driver:
        mover, scatter = driver.cache.engine.effects.mover, driver.cache.engine.effects.mover.scatter

        def misdirected(name, pools, page_ids, staging):
            page_ids = page_ids.copy()
            page_ids[0] = (set(range(DEVICE_PAGES)) - set(page_ids.tolist())).pop()
            return scatter(name, pools, page_ids, staging)

        driver.edit_pool(lambda pool: pool.fill(0))
        monkeypatch.setattr(mover, "scatter", misdirected)
        must_differ(rig, driver, tier)


@pytest.mark.mutation
@pytest.mark.parametrize("tier", ["host", "storage"])
def test_load_back_that_never_lands_shows(rig, tier, monkeypatch):
    by_programs(monkeypatch)
    with cached(rig, tier, "whole") as driver:
        driver.edit_pool(lambda pool: pool.fill(0))
        monkeypatch.setattr(driver.cache.engine.effects.mover, "scatter", lambda name, pools, ids, staging: pools)
        must_differ(rig, driver, tier)


@pytest.mark.mutation
def test_backup_of_pages_that_were_overwritten_shows(rig, monkeypatch):
    """A gather that reads its pages after they were reused: what snapshots prevent."""
    by_programs(monkeypatch)
    with rig.cache() as cache:
        driver = Driver(rig, cache)
        mover, gather, late = cache.engine.effects.mover, cache.engine.effects.mover.gather, cache.init_pools()
        monkeypatch.setattr(mover, "gather", lambda name, pools, page_ids: gather(name, late[name], page_ids))
        driver.ask(PROMPT)
        driver.fill_device()
        must_differ(rig, driver, "host")


@pytest.mark.mutation
def test_fetch_into_the_wrong_row_shows(rig, monkeypatch):
    with cached(rig, "storage", "whole") as driver:
        storage_io, fetch = driver.cache.engine.storage_io, driver.cache.engine.storage_io._fetch_page
        keys = driver.sequence(PROMPT).page_keys(11)

        def misdirected(storage, name, key, row):
            return fetch(storage, name, key, HOST_PAGES - 1 if key == keys[5] else row)

        monkeypatch.setattr(storage_io, "_fetch_page", misdirected)
        must_differ(rig, driver, "storage")


# ---- storage is never wrong


@pytest.mark.parametrize("damage", ["one bit", "torn", "another page", "gone"])
def test_damaged_file_is_a_miss(make_mesh, tmp_path, damage):
    rig = rig_on(make_mesh())
    storage = jaxcache.FileStorage(tmp_path / "storage")
    with rig.cache(storage) as cache:
        first = Driver(rig, cache)
        first.ask(PROMPT)
        first.drain()
        keys = first.sequence(PROMPT).page_keys(11)
    files = {key: _file_of(storage, cache, key) for key in keys}
    victim, other = files[keys[4]], files[keys[5]]
    content = bytearray(victim.read_bytes())
    victim.unlink()
    if damage == "one bit":
        content[-1] ^= 1
        victim.write_bytes(content)
    elif damage == "torn":
        victim.write_bytes(content[:-8])
    elif damage == "another page":
        victim.write_bytes(other.read_bytes())
    with rig.cache(jaxcache.FileStorage(tmp_path / "storage")) as cache:
        got = Driver(rig, cache).ask_storage(PROMPT)
        assert cache.storage.stats()["corrupt"] == (damage != "gone")
    assert got.hits == (0, 0, 4 * PAGE_TOKENS)
    check_equal(got, want(rig))


def _file_of(storage: jaxcache.FileStorage, cache: jaxcache.Cache, page_key: bytes) -> Path:
    (cell,) = storage_cells(cache.layouts["full"], (0, 0, 0))
    return Path(storage._path_of(ObjectKey(page_key, "full", cell.name)))


# ---- the comparison itself


def test_comparison_notices_a_hundredth_of_a_percent():
    logits = np.linspace(-2, 2, 64, dtype=np.float32)[None]
    answer = Answer(logits, [], (0, 0, 0))
    check_equal(answer, Answer(logits + np.float32(5e-5) * (np.arange(64) == 7), [], (0, 0, 0)))
    for wrong in (logits * np.float32(1.0001), logits * np.float32("nan"), logits[:, ::-1]):
        with pytest.raises(WrongAnswer):
            check_equal(Answer(wrong, [], (0, 0, 0)), answer)
    with pytest.raises(WrongAnswer):
        check_equal(Answer(logits, [1], (0, 0, 0)), Answer(logits, [2], (0, 0, 0)))
