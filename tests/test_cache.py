"""The face at work on real pools: what moves in one step, what is forgotten, what it says about itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

import jaxcache
from jaxcache.types import AllCleared, BlockRemoved, BlockStored, Span, Tier
from models import decoder
from tests.models.serving import (
    DEVICE_PAGES,
    HOST_PAGES,
    MESHES,
    PAGE_TOKENS,
    Answer,
    Driver,
    Rig,
    check_equal,
    conversations,
    random_tokens,
    reference,
    rig_on,
    serve,
    uncached,
)

PROMPT = random_tokens(1, 45)
OTHER = random_tokens(2, 45)


@pytest.fixture(params=MESHES, ids=str)
def rig(request: pytest.FixtureRequest, make_mesh) -> Rig:
    return rig_on(make_mesh(*request.param))


@pytest.fixture
def driver(rig) -> Iterator[Driver]:
    """A driver whose cache holds the prompt, on the device and in host memory."""
    with rig.cache() as cache:
        driver = Driver(rig, cache)
        driver.ask(PROMPT)
        driver.step()
        yield driver


@pytest.fixture
def one(make_mesh) -> Rig:
    """One device."""
    return rig_on(make_mesh())


def want(rig: Rig, prompt: np.ndarray = PROMPT) -> Answer:
    return reference(rig.mesh, tuple(prompt.tolist()))


def addresses(pools: decoder.Pools) -> list[int]:
    return [shard.data.unsafe_buffer_pointer() for shard in pools["full"]["kv"].addressable_shards]


def pages_of(driver: Driver, tokens: np.ndarray, tier: Tier) -> np.ndarray:
    sequence = driver.sequence(tokens)
    path = driver.cache.core.tiers.tree.walk(sequence, sequence.num_tokens - 1)
    return np.concatenate([node.pages[tier] for node, _ in path])


# ---- several moves in one step


def test_pages_that_are_reused_in_the_step_of_their_backup(rig):
    """insert, release, admit of all pages, apply, model step: host memory has what the pages held before."""
    with rig.cache() as cache:
        driver = Driver(rig, cache)
        driver.step()
        lease = driver.admit(driver.sequence(PROMPT))
        for start, stop in ((0, 16), (16, 32), (32, 45)):
            driver.extend(lease, start, stop, is_decode=False)
        pages = lease.page_tables["full"][:11]
        computed = np.array(driver.pools["full"]["kv"])[pages]
        cache.insert(lease, 45)
        cache.release(lease)
        greedy = cache.admit(driver.sequence(OTHER), DEVICE_PAGES * PAGE_TOKENS)
        assert set(pages.tolist()) <= set(greedy.page_ids[0].tolist())
        driver.pools = cache.apply(driver.pools)
        driver.edit_pool(lambda pool: pool.fill(7))  # a model step that writes every page
        cache.release(greedy)
        driver.step()
        assert cache.stats()["counters"]["backup_pages"] == 11
        got = driver.ask(PROMPT)
        loaded = np.array(driver.pools["full"]["kv"])[pages_of(driver, PROMPT, Tier.DEVICE)]
    assert got.hits == (0, 44, 0)
    assert np.array_equal(loaded[:11], computed)
    check_equal(got, want(rig))


def test_hit_on_a_load_back_that_another_has_planned(driver):
    """In the same step: the pages are loaded once, and both may run when they are there."""
    driver.fill_device()
    before = driver.cache.stats()["counters"].get("load_back_pages", 0)
    longer = np.concatenate([PROMPT, OTHER[:5]])
    leases = [driver.cache.admit(driver.sequence(tokens), 8) for tokens in (PROMPT, longer)]
    assert driver.cache.stats()["counters"]["load_back_pages"] - before == 11
    assert [lease.num_cached_tokens for lease in leases] == [44, 44]
    assert {lease.first_step for lease in leases} == {driver.cache.step_number + 1}
    driver.pools = driver.cache.apply(driver.pools)
    driver.step()
    for lease, prompt in zip(leases, (PROMPT, longer), strict=True):
        check_equal(driver.finish(lease), want(driver.rig, prompt))


def test_release_before_the_load_back_lands(driver):
    """Nobody gets its pages before they are written; then they are a hit on the device."""
    driver.fill_device()
    lease = driver.cache.admit(driver.sequence(PROMPT), 1)
    driver.pools = driver.cache.apply(driver.pools)
    driver.cache.release(lease)
    everything = driver.cache.admit(driver.sequence(OTHER), DEVICE_PAGES * PAGE_TOKENS)
    assert isinstance(everything, jaxcache.Wait)
    assert everything.reason == "no room"
    others = driver.cache.admit(driver.sequence(OTHER), 16)
    driver.extend(others, 0, 16, is_decode=False)
    driver.step()
    check_equal(driver.finish(others), want(driver.rig, OTHER))
    got = driver.ask(PROMPT)
    assert got.hits == (44, 0, 0)
    check_equal(got, want(driver.rig))


def test_pools_stay_where_they_are(rig):
    """X17: through evictions, backups, load-backs and fetches every donated pool is gone and no pool was copied."""
    requests = conversations()
    with rig.cache(jaxcache.MemoryStorage(), host_pages=64) as cache:
        server = rig.server(cache)
        before = addresses(server.pools)
        for request in requests:
            server.submit(request)
        while server.waiting or server.running:
            pools = server.pools
            server.step()
            assert addresses(server.pools) == before
            assert server.pools is pools or server.pools["full"]["kv"] is pools["full"]["kv"] or is_gone(pools)
        server.pools = cache.drain(server.pools)
        transfers = cache.stats()["transfers"]
    assert min(transfers["backup_pages"], transfers["load_back_pages"], transfers["store_pages"]) > 0
    assert [request.output for request in requests] == uncached(rig.mesh)


def is_gone(pools: decoder.Pools) -> bool:
    return pools["full"]["kv"].is_deleted()


def test_serving_under_the_thread_guard(rig):
    """Whatever spans devices is dispatched by the serving thread."""
    requests = conversations()[:14]
    storage = jaxcache.MemoryStorage()
    with jax.thread_guard(True):
        for _ in range(2):
            with rig.cache(storage, host_pages=64) as cache:
                server = rig.server(cache)
                outputs = serve(server, conversations()[:14])
                server.pools = cache.drain(server.pools)
                assert cache.stats()["transfers"]["backup_pages"] > 0
    assert cache.stats()["transfers"]["fetch_pages"] > 0
    assert outputs == uncached(rig.mesh)[: len(requests)]


# ---- limits and forks


def test_capped_hit_equals_miss(driver):
    """A7: as if only part of it were cached."""
    lease = driver.cache.admit(driver.sequence(PROMPT), 16, max_cached_tokens=22)
    assert lease.num_cached_tokens == 20
    check_equal(driver.finish(lease), want(driver.rig))


def test_two_requests_on_one_prefix(driver):
    """A fork: both hold the prefix, and neither sees what the other generates."""
    first, second = (driver.admit(driver.sequence(PROMPT)) for _ in range(2))
    longer = np.concatenate([PROMPT, OTHER[:9]])
    third = driver.admit(driver.sequence(longer))
    check_equal(driver.finish(first), want(driver.rig))
    check_equal(driver.finish(third), want(driver.rig, longer))
    check_equal(driver.finish(second), want(driver.rig))


def test_without_caching_nothing_is_found(one):
    """S5: the same interface."""
    with one.cache(caching=False) as cache:
        driver = Driver(one, cache)
        for _ in range(2):
            got = driver.ask(PROMPT)
            assert got.hits == (0, 0, 0)
            check_equal(got, want(one))
        assert cache.stats()["pages"]["device"]["full"]["free"] == DEVICE_PAGES


# ---- namespaces


def test_namespaces_share_nothing_on_any_tier(one):
    """K1, X10: another adapter, tenant or version of the weights is a miss, in memory and in storage."""
    storage = jaxcache.MemoryStorage()
    with one.cache(storage) as cache:
        driver = Driver(one, cache)
        driver.ask(PROMPT)
        driver.drain()
        for fields in ({"adapter": "a"}, {"tenant_salt": "b"}, {"weights_version": "2"}, {"model": "other"}):
            other = cache.new_namespace(**{"model": "tiny", **fields})
            assert cache.match(cache.sequence(PROMPT, other)).num_tokens == 0
    with one.cache(storage) as cache:
        driver = Driver(one, cache)
        salted = cache.sequence(PROMPT, cache.new_namespace(model="tiny", tenant_salt="b"))
        driver.prefetch(salted)
        assert cache.match(salted).num_tokens == 0
        assert cache.stats()["counters"]["prefetch_misses"] == 1
        assert driver.ask_storage(PROMPT).hits == (0, 0, 44)


def test_new_weights_make_the_old_version_unreachable(one):
    """K5: at once, and its pages serve the new version."""
    with one.cache(host_pages=0) as cache:
        driver = Driver(one, cache)
        driver.ask(PROMPT)
        old, driver.namespace = driver.namespace, cache.new_namespace(model="tiny", weights_version="2")
        cache.retire_namespace(old)
        assert driver.ask(PROMPT).hits == (0, 0, 0)
        assert driver.ask(PROMPT).hits == (44, 0, 0)
        driver.fill_device()
        assert cache.stats()["pages"]["device"]["full"]["free"] == DEVICE_PAGES


# ---- forgetting


def free_pages(cache: jaxcache.Cache) -> tuple[int, int]:
    pages = cache.stats()["pages"]
    return pages["device"]["full"]["free"], pages["host"]["full"]["free"]


def test_reset_then_serve(rig):
    """S1, X6: while stores and a prefetch are under way every page is freed, storage keeps its own."""
    with rig.cache(jaxcache.MemoryStorage()) as cache:
        driver = Driver(rig, cache)
        driver.ask(OTHER)
        driver.drain()
        driver.ask(PROMPT)
        driver.step()
        cache.prefetch(driver.sequence(random_tokens(9, 60)))
        cache.reset()
        assert cache.match(driver.sequence(PROMPT)).num_tokens == 0
        driver.drain()
        assert free_pages(cache) == (DEVICE_PAGES, HOST_PAGES)
        assert driver.ask_storage(OTHER).hits == (0, 0, 44)
        for hits in ((0, 0, 0), (44, 0, 0)):
            got = driver.ask(PROMPT)
            assert got.hits == hits
            check_equal(got, want(rig))


def test_forgetting_the_device_then_serving_from_host(driver):
    """A model step failed after it was given the pools: they are gone, host memory serves on."""
    for array in jax.tree.leaves(driver.pools):
        array.delete()
    with pytest.raises(ValueError, match="stale pools"):
        driver.cache.step(driver.pools)
    driver.cache.forget_device()
    driver.pools = driver.cache.init_pools()
    got = driver.ask(PROMPT)
    assert got.hits == (0, 44, 0)
    check_equal(got, want(driver.rig))


def test_an_engine_that_sleeps_zeroes_its_pools_while_requests_run(driver):
    """The device content goes away: running leases end, nothing is allocated, and no hit reads what is not there."""
    lease = driver.cache.admit(driver.sequence(OTHER), len(OTHER))
    driver.pools = jax.tree.map(lambda array: array * 0, driver.cache.apply(driver.pools))
    kept = driver.pools
    driver.cache.forget_device()
    with pytest.raises(ValueError, match="was released"):
        driver.cache.release(lease)
    with pytest.raises(ValueError, match="was released"):
        driver.cache.tables([lease], 32)
    assert driver.cache.match(driver.sequence(PROMPT)).device_tokens == 0
    assert free_pages(driver.cache)[0] == DEVICE_PAGES
    got = driver.ask(PROMPT)
    assert got.hits == (0, 44, 0)
    check_equal(got, want(driver.rig))
    assert kept is not driver.pools


def test_forgetting_the_device_while_a_load_back_is_on_its_way(driver):
    driver.fill_device()
    lease = driver.cache.admit(driver.sequence(PROMPT), 1)
    driver.pools = driver.cache.apply(driver.pools)
    driver.cache.release(lease)
    driver.cache.forget_device()
    driver.pools = driver.cache.init_pools()
    for hits in ((0, 44, 0), (44, 0, 0)):
        got = driver.ask(PROMPT)
        assert got.hits == hits
        check_equal(got, want(driver.rig))


# ---- what it says


def test_explain_names_the_tiers_and_the_first_missing_page(one):
    """S4."""
    with one.cache() as cache:
        driver = Driver(one, cache)
        driver.ask(PROMPT, num_decode=1)
        longer = driver.sequence(np.concatenate([PROMPT[:30], OTHER]))
        explanation = cache.explain(longer)
        assert (explanation.usable_tokens, explanation.found_tokens) == (28, 28)
        assert explanation.first_miss_page == 7
        assert set(explanation.tiers) == {("full", "DEVICE", Span(0, 28)), ("full", "HOST", Span(0, 28))}
        assert "never computed here" in str(explanation)
        driver.fill_device()
        assert cache.explain(longer).tiers == (("full", "HOST", Span(0, 28)),)
        assert "tokens [0, 28): full on HOST" in str(cache.explain(longer))
        assert cache.explain(driver.sequence(PROMPT[:44])).first_miss_page is None


def test_explain_names_the_lease_that_evicted(one):
    with one.cache(host_pages=0) as cache:
        driver = Driver(one, cache)
        driver.ask(PROMPT)
        driver.step()
        lease = cache.admit(driver.sequence(OTHER), (DEVICE_PAGES - 5) * PAGE_TOKENS)
        explanation = cache.explain(driver.sequence(PROMPT))
        assert explanation.first_miss_page == 5
        assert explanation.eviction == ("full", Tier.DEVICE, cache.step_number, "room", lease.id)
        assert f"full left DEVICE in step {cache.step_number}: room for lease {lease.id}." in str(explanation)
        cache.release(lease)


def test_explain_names_the_field_of_the_namespace(one):
    with one.cache() as cache:
        driver = Driver(one, cache)
        driver.ask(PROMPT)
        elsewhere = cache.sequence(PROMPT, cache.new_namespace(model="tiny", adapter="b"))
        explanation = cache.explain(elsewhere)
        assert explanation.first_miss_page == 0
        assert explanation.other_namespace == (("adapter", "b", None),)
        assert "adapter is 'b' here and None there" in str(explanation)


def test_stats_count_from_zero(one):
    """X16: a tier that never hits is there, with zero."""
    with one.cache(jaxcache.MemoryStorage()) as cache:
        driver = Driver(one, cache)
        zero = cache.stats()
        assert zero["hit_tokens"] == {"device": 0, "host": 0, "storage": 0}
        assert (zero["requests"], zero["prompt_tokens"], zero["leases"], zero["nodes"]) == (0, 0, 0, 0)
        pages = {"free": DEVICE_PAGES, "capacity": DEVICE_PAGES, "resident": 0, "pinned": 0, "evicted": 0}
        assert zero["pages"]["device"] == {"full": pages}
        assert not any(zero["transfers"].values())
        driver.ask(PROMPT)
        driver.ask(PROMPT)
        assert cache.stats()["hit_tokens"] == {"device": 44, "host": 0, "storage": 0}
        driver.fill_device()
        driver.ask(PROMPT)
        assert cache.engine.drain(10)  # copies are counted when they have ended
        stats = cache.stats()
        assert stats["hit_tokens"] == {"device": 44, "host": 44, "storage": 0}
        assert stats["prompt_tokens"] == 3 * 45 + 1
        assert stats["transfers"]["load_back_pages"] == 11
        assert stats["pages"]["host"]["full"]["resident"] == stats["transfers"]["backup_pages"]


def test_events_tell_a_router_what_is_where(one):
    """S3: from another thread, and counted."""
    with one.cache(events=True) as cache, ThreadPoolExecutor(1) as router:
        driver = Driver(one, cache)
        answer = driver.ask(PROMPT)
        keys = driver.sequence([*PROMPT, *answer.tokens]).page_keys(12)
        events = router.submit(cache.take_events).result()
        assert all(isinstance(event, BlockStored) and event.component == "full" for event in events)
        for tier in (Tier.DEVICE, Tier.HOST):
            assert [key for event in events if event.tier is tier for key in event.page_keys] == keys
        driver.fill_device()
        removed = [event for event in router.submit(cache.take_events).result() if isinstance(event, BlockRemoved)]
        assert {event.tier for event in removed} == {Tier.DEVICE}
        assert sorted(key for event in removed for key in event.page_keys) == sorted(keys)
        cache.reset()
        assert cache.take_events()[-1] == AllCleared()
        assert cache.take_events() == []
        counters = cache.stats()["counters"]
        assert counters["block_removed_events"] == len(removed)
        assert counters["all_cleared_events"] == 1


def test_events_that_were_not_asked_for(one):
    with one.cache() as cache:
        with pytest.raises(RuntimeError, match="events=True"):
            cache.take_events()
        assert "block_stored_events" not in cache.stats()["counters"]


def test_idle(one):
    with one.cache(jaxcache.MemoryStorage()) as cache:
        driver = Driver(one, cache)
        assert cache.idle
        lease = driver.admit(driver.sequence(PROMPT))
        assert not cache.idle
        driver.finish(lease)
        driver.drain()
        assert cache.idle


def test_a_profile_names_what_the_cache_does(one, tmp_path):
    """Copies and storage on their threads, calls of the loop, and the programs that move pages."""
    with jax.profiler.trace(tmp_path), one.cache(jaxcache.MemoryStorage()) as cache:
        driver = Driver(one, cache)
        for seed in (1, *range(3, 10), 1):  # the first one has left the device when it comes again
            driver.ask(random_tokens(seed, 45))
            driver.pools = cache.drain(driver.pools)
    (profile,) = tmp_path.rglob("*.xplane.pb")
    found = set(re.findall(rb"jaxcache\.[a-z_]+", profile.read_bytes()))
    assert found >= {b"jaxcache.step", b"jaxcache.apply", b"jaxcache.backup", b"jaxcache.store", b"jaxcache.load_back"}
