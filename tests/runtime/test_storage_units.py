"""Several pages to a value of storage: few values, and hits that end where a prompt ended or prompts parted."""

from __future__ import annotations

import threading
import time

import jax
import numpy as np
import pytest

import jaxcache
from jaxcache.core.stores import Stores
from jaxcache.storage.base import ObjectKey
from tests.models.serving import PAGE_TOKENS, Driver, Rig, check_equal, random_tokens, reference, rig_on

UNIT = 8
PROMPT = random_tokens(1, 20 * PAGE_TOKENS)


class Values(jaxcache.MemoryStorage):
    """num_pages: of every value that was put; num_asked: names in each call of `exists`"""

    def __init__(self):
        super().__init__()
        self.num_pages: list[int] = []
        self.num_asked: list[int] = []

    def exists(self, keys):
        self.num_asked.append(len(keys))
        return super().exists(keys)

    def put(self, key: ObjectKey, buffer: memoryview) -> bool:
        count, is_several, _ = key.cell.partition(" x ")
        self.num_pages.append(int(count) if is_several else 1)
        return super().put(key, buffer)


def prompt(num_shared_pages: int, seed: int, num_pages: int = 20) -> np.ndarray:
    own = random_tokens(seed, (num_pages - num_shared_pages) * PAGE_TOKENS)
    return np.concatenate([PROMPT[: num_shared_pages * PAGE_TOKENS], own])


def served(rig: Rig, storage: jaxcache.Storage, *prompts: np.ndarray, **changes) -> None:
    """Serves the prompts without asking storage, one after the other, and stores what they leave."""
    with rig.cache(storage, **{"storage_unit_pages": UNIT, **changes}) as cache:
        driver = Driver(rig, cache)
        for tokens in prompts:
            driver.finish(driver.admit(driver.sequence(tokens)), num_decode=1)
            driver.pools = cache.drain(driver.pools)


def found(rig: Rig, storage: jaxcache.Storage, tokens: np.ndarray, **changes) -> int:
    """Pages of a prompt that a new cache finds in storage, its answer checked."""
    with rig.cache(storage, **{"storage_unit_pages": UNIT, **changes}) as cache:
        answer = Driver(rig, cache).ask_storage(np.append(tokens, 1).astype(np.int32))
    check_equal(answer, reference(rig.mesh, tuple(np.append(tokens, 1).tolist())))
    assert answer.hits[:2] == (0, 0)
    return answer.hits[2] // PAGE_TOKENS


@pytest.fixture(params=[(1, 1, 1), (2, 2, 2)], ids=str)
def rig(make_mesh, request) -> Rig:
    return rig_on(make_mesh(*request.param))


def test_values_hold_units_and_a_restart_finds_all(rig):
    storage = Values()
    served(rig, storage, PROMPT)
    num_ranks = rig.mesh.size
    assert sorted(storage.num_pages) == [*[4] * num_ranks, *[8] * 2 * num_ranks]
    assert found(rig, storage, PROMPT) == 20


def test_a_prompt_that_is_new_to_storage_costs_one_small_question(rig):
    """One value of 1, 2, 4 and 8 pages each could hold its first page; all that could hold any of it are 36."""
    storage = Values()
    served(rig, storage, PROMPT)
    storage.num_asked.clear()
    assert found(rig, storage, prompt(0, 2)) == 0
    assert storage.num_asked == [4]


def test_a_hit_ends_inside_a_unit_where_a_prompt_ended(rig):
    storage = Values()
    served(rig, storage, PROMPT[: 11 * PAGE_TOKENS])
    assert found(rig, storage, PROMPT) == 11


def test_a_prompt_of_whole_pages_finds_all_but_its_last(rig):
    """One token must be computed, so the last page is not asked for; the value that ends with it is of use."""
    storage = Values()
    served(rig, storage, PROMPT[: 16 * PAGE_TOKENS])
    with rig.cache(storage, storage_unit_pages=UNIT) as cache:
        assert Driver(rig, cache).ask_storage(PROMPT[: 16 * PAGE_TOKENS]).hits == (0, 0, 15 * PAGE_TOKENS)


def test_what_follows_a_stored_prompt_is_stored_from_there(rig):
    """No page is written twice."""
    storage = Values()
    served(rig, storage, PROMPT[: 11 * PAGE_TOKENS], PROMPT)
    assert sum(storage.num_pages) == 20 * rig.mesh.size
    assert found(rig, storage, PROMPT) == 20


def test_a_prompt_that_parts_inside_a_value_finds_what_ends_before(rig):
    storage = Values()
    served(rig, storage, PROMPT)  # values of pages 0-7, 8-15, 16-19
    assert found(rig, storage, prompt(13, seed=2)) == 8
    assert found(rig, storage, prompt(16, seed=2)) == 16


def test_a_shared_beginning_is_found_once_it_was_shared(rig):
    storage = Values()
    one, other, third = prompt(13, seed=2), prompt(13, seed=3), prompt(13, seed=4)
    served(rig, storage, PROMPT, one)
    assert [found(rig, storage, tokens) for tokens in (PROMPT, one, other, third)] == [20, 20, 13, 13]


def test_the_next_one_that_shares_it_writes_only_its_own(rig):
    storage = Values()
    served(rig, storage, PROMPT, prompt(13, seed=2), prompt(13, seed=3))
    own, shared_again = 20 + 7 + 7, 13 - 8
    assert sum(storage.num_pages) == (own + shared_again) * rig.mesh.size
    assert found(rig, storage, prompt(13, seed=3)) == 20


@pytest.mark.mutation
def test_mutation_without_what_is_above_a_branch_cannot_be_found(rig, monkeypatch):
    monkeypatch.setattr(Stores, "_above", lambda *args: [])
    storage = Values()
    served(rig, storage, PROMPT, prompt(13, seed=2))
    assert found(rig, storage, prompt(13, seed=2)) == 8


@pytest.mark.parametrize(("writer", "reader"), [(8, 16), (16, 8), (1, 8), (4, 64)])
def test_another_unit_finds_what_both_could_have_written(make_mesh, writer, reader):
    """Smaller values are of use to larger units; larger ones are not looked for."""
    rig = rig_on(make_mesh())
    storage = Values()
    served(rig, storage, PROMPT, storage_unit_pages=writer)
    expected = 20 if writer <= reader else 0
    assert found(rig, storage, PROMPT, storage_unit_pages=reader) == expected


def test_a_damaged_value_is_a_miss_of_its_pages(make_mesh):
    rig = rig_on(make_mesh())

    class Damaged(Values):
        def get(self, key, buffer):
            return not key.cell.startswith("4 x") and super().get(key, buffer)

    storage = Damaged()
    served(rig, storage, PROMPT)
    assert found(rig, storage, PROMPT) == 16


def test_a_hit_that_begins_inside_a_value_reads_only_the_rest(make_mesh):
    """The tree holds the first pages of a value already."""
    rig = rig_on(make_mesh())
    storage = Values()
    served(rig, storage, PROMPT)
    with rig.cache(storage, storage_unit_pages=UNIT, write_policy=jaxcache.WritePolicy.NONE) as cache:
        driver = Driver(rig, cache)
        driver.finish(driver.admit(driver.sequence(PROMPT[: 5 * PAGE_TOKENS])), num_decode=1)
        answer = driver.ask_storage(np.append(PROMPT, 1).astype(np.int32))
    check_equal(answer, reference(rig.mesh, tuple(np.append(PROMPT, 1).tolist())))
    assert answer.hits == (5 * PAGE_TOKENS, 0, 15 * PAGE_TOKENS)


def test_units_follow_from_the_pages(make_mesh):
    with rig_on(make_mesh()).cache(storage_unit_pages=None) as cache:
        assert cache.config.storage_unit_pages == {"full": 64}


@pytest.mark.parametrize("wrong", [0, 3, -4, True, 2.0, "8", {"full": 6}])
def test_a_unit_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="storage_unit_pages must be powers of two"):
        jaxcache.CacheConfig(page_tokens=4, device_pages=8, storage_unit_pages=wrong)


class Slow(jaxcache.MemoryStorage):
    """A put takes so long; `works` is processor time."""

    def __init__(self, seconds: float, works: bool = False):
        super().__init__()
        self.seconds, self.works = seconds, works
        self.gate = threading.Event()

    def put(self, key: ObjectKey, buffer: memoryview) -> bool:
        if self.works:
            end = time.thread_time() + self.seconds
            while time.thread_time() < end:
                pass
        else:
            self.gate.wait(self.seconds)
        return super().put(key, buffer)


def test_a_hanging_store_cannot_hold_up_drain_for_longer(make_mesh):
    """Although a process alone tells itself of STOREs only when they end."""
    rig, storage = rig_on(make_mesh()), Slow(60.0)
    with rig.cache(storage, storage_unit_pages=UNIT, storage_deadline_s=600.0) as cache:
        driver = Driver(rig, cache)
        driver.finish(driver.admit(driver.sequence(PROMPT)), num_decode=1)
        with pytest.raises(TimeoutError, match="still running after"):
            driver.pools = cache.drain(driver.pools, timeout_s=0.2)
        storage.gate.set()


def test_drain_does_not_rest_although_a_request_runs(make_mesh):
    rig = rig_on(make_mesh())
    with rig.cache(Slow(0.005, works=True), store_time_share=1e-5) as cache:  # one rest would take 500 s
        driver = Driver(rig, cache)
        running = driver.admit(driver.sequence(random_tokens(9, 2 * PAGE_TOKENS)))
        driver.finish(driver.admit(driver.sequence(PROMPT)), num_decode=1)
        driver.pools = cache.drain(driver.pools, timeout_s=60.0)
        assert cache.stats()["counters"]["stored_pages"] == 20
        cache.release(running)


def test_stores_that_wait_for_their_storage_keep_their_deadline(make_mesh):
    """As many threads write as read, however small the share: it is of processor time."""
    rig = rig_on(make_mesh())
    choices = {"storage_threads": 4, "storage_deadline_s": 2.0, "store_time_share": 0.03}
    with rig.cache(Slow(0.04), **choices) as cache:
        driver = Driver(rig, cache)
        for seed in range(4):  # 80 pages: 3.2 s of one thread
            driver.finish(driver.admit(driver.sequence(random_tokens(seed, 20 * PAGE_TOKENS))), num_decode=1)
        driver.pools = cache.drain(driver.pools)
        assert cache.stats()["counters"]["stored_pages"] == 80


def test_a_window_alone_is_fetched(make_mesh):
    """The pages of full attention are there, so of them nothing is asked: a move without pages is no failure."""
    axes = ("layers", "slots", "heads", None)
    fields = (jaxcache.FieldSpec("k", (1, PAGE_TOKENS, 2, 8), "float32", axes),)
    components = [
        jaxcache.FullAttention("full", fields),
        jaxcache.SlidingWindow("window", fields, window_tokens=3 * PAGE_TOKENS),
    ]
    few = {"full": 64, "window": 16}
    config = jaxcache.CacheConfig(
        page_tokens=PAGE_TOKENS,
        device_pages=few,
        host_pages=few,
        prefetch_min_tokens=1,
        prefetch_policy=jaxcache.PrefetchPolicy.WAIT_COMPLETE,
    )
    model_step = jax.jit(lambda pools: jax.tree.map(lambda array: array + 0, pools))
    with jaxcache.Cache(components, make_mesh(), config, storage=jaxcache.MemoryStorage()) as cache:
        pools, namespace = cache.init_pools(), cache.new_namespace(model="hybrid")
        prompts = [np.arange(10 * PAGE_TOKENS), np.arange(16 * PAGE_TOKENS)]
        others = [np.arange(10_000 * i, 10_000 * i + 8 * PAGE_TOKENS) for i in range(1, 5)]
        for tokens in prompts + others:
            sequence = cache.sequence(tokens, namespace)
            lease = cache.admit(sequence, len(tokens) - cache.match(sequence).num_tokens)
            assert isinstance(lease, jaxcache.Lease)
            pools = cache.apply(pools)
            while lease.first_step > cache.step_number:
                pools = cache.apply(cache.step(pools))
            pools = model_step(pools)
            cache.insert(lease, len(tokens))
            pools = cache.apply(pools)
            cache.release(lease)
            pools = cache.drain(pools)
        sequence = cache.sequence([*prompts[0].tolist(), 9_999], namespace)
        assert cache.match(sequence).num_tokens == 0, "the window has left the device and host memory"
        ticket = cache.prefetch(sequence)
        assert ticket is not None
        assert not cache.core.outbox.transfers[-1].moves[0].page_keys
        while not ticket.done:
            pools = cache.apply(cache.step(pools))
            cache.engine.drain(1)
        assert cache.match(sequence).num_tokens == 10 * PAGE_TOKENS
        assert "storage_failures" not in cache.stats()["transfers"]
