"""Storage that is attached, detached and cleared while a cache serves: no wrong token, no leak, no lost request."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import jaxcache
from jaxcache.core import invariants
from jaxcache.storage.base import ObjectKey
from tests.models.serving import Driver, Rig, check_equal, random_tokens, reference, rig_on

PROMPT = random_tokens(1, 45)


@pytest.fixture
def rig(make_mesh) -> Rig:
    return rig_on(make_mesh())


class Slow(jaxcache.MemoryStorage):
    """Reads nothing before it may."""

    def __init__(self):
        super().__init__()
        self.may_read = threading.Event()

    def get(self, key: ObjectKey, buffer: memoryview) -> bool:
        return self.may_read.wait(30) and super().get(key, buffer)


def answer(rig: Rig) -> object:
    return reference(rig.mesh, tuple(PROMPT.tolist()))


def test_attach_then_what_was_cached_before_is_stored(rig):
    storage = jaxcache.MemoryStorage()
    with rig.cache() as cache:
        driver = Driver(rig, cache)
        driver.ask(PROMPT)
        driver.drain()
        cache.attach_storage(storage)
        driver.drain()
        assert cache.stats()["counters"]["stored_pages"] == 12
    with rig.cache(storage) as cache:
        got = Driver(rig, cache).ask_storage(PROMPT)
        check_equal(got, answer(rig))
        assert got.hits == (0, 0, 44)


def test_detach_while_a_prefetch_reads(rig):
    storage = Slow()
    with rig.cache() as cache:
        driver = Driver(rig, cache)
        driver.ask(PROMPT)
        cache.attach_storage(storage)
        driver.drain()
        cache.reset()
        sequence = driver.sequence(PROMPT)
        ticket = cache.prefetch(sequence)
        while ticket.prefetch.agreed_end == 0:
            driver.step()
        driver.step()
        cache.detach_storage()
        assert cache.storage is None and cache.storage_in_use(storage)
        got = driver.finish(driver.admit(sequence, ticket))
        check_equal(got, answer(rig))
        assert got.hits == (0, 0, 0) and cache.storage_in_use(storage)
        storage.may_read.set()
        driver.drain()
        assert not cache.storage_in_use(storage)
        invariants.check(cache.core)
        invariants.check_empty(cache.core)


def test_another_storage_after_the_first(rig, tmp_path: Path):
    """What the first has is not believed of the second."""
    first, second = jaxcache.MemoryStorage(), jaxcache.FileStorage(tmp_path / "second")
    with rig.cache(first) as cache:
        driver = Driver(rig, cache)
        driver.ask(PROMPT)
        driver.drain()
        cache.detach_storage()
        cache.attach_storage(second)
        driver.drain()
    with rig.cache(second) as cache:
        assert Driver(rig, cache).ask_storage(PROMPT).hits == (0, 0, 44)


def test_clear(rig):
    """What host memory holds is written again."""
    storage = jaxcache.MemoryStorage()
    with rig.cache(storage) as cache:
        driver = Driver(rig, cache)
        driver.ask(PROMPT)
        driver.drain()
        before = cache.stats()["counters"]["stored_pages"]
        cache.clear_storage()
        driver.drain()
        assert cache.stats()["counters"]["stored_pages"] == 2 * before
        cache.reset()
        assert driver.ask_storage(PROMPT).hits == (0, 0, 44)


class Broken(jaxcache.MemoryStorage):
    """Raises whatever is asked."""

    def exists(self, keys: Sequence[ObjectKey]) -> list[bool]:
        raise jaxcache.StorageError("down")

    def get(self, key: ObjectKey, buffer: memoryview) -> bool:
        raise jaxcache.StorageError("down")

    def put(self, key: ObjectKey, buffer: memoryview) -> bool:
        raise jaxcache.StorageError("down")

    def clear(self) -> None:
        raise jaxcache.StorageError("down")


def test_the_failures_of_the_old_storage_are_not_held_against_the_new_one(rig):
    with rig.cache(Broken()) as cache:
        driver = Driver(rig, cache)
        for seed in range(4):
            driver.ask(random_tokens(seed, 45))
        driver.drain()
        assert cache.stats()["transfers"]["breaker_openings"] >= 1
        cache.detach_storage()
        cache.attach_storage(jaxcache.MemoryStorage())
        driver.drain()
        assert cache.stats()["counters"]["stored_pages"] == 48


def test_a_storage_that_cannot_be_emptied_is_written_to_again(rig):
    with rig.cache(Broken()) as cache:
        with pytest.raises(jaxcache.StorageError, match="down"):
            cache.clear_storage()
        Driver(rig, cache).drain()


class Hung(jaxcache.MemoryStorage):
    """Answers nothing before it may."""

    def __init__(self):
        super().__init__()
        self.may_answer, self.is_asked = threading.Event(), threading.Event()

    def exists(self, keys: Sequence[ObjectKey]) -> list[bool]:
        self.is_asked.set()
        self.may_answer.wait(30)
        return super().exists(keys)

    def put(self, key: ObjectKey, buffer: memoryview) -> bool:
        return self.may_answer.wait(30) and super().put(key, buffer)


def test_an_old_storage_that_hangs_does_not_hold_up_the_new_one(rig):
    old, new = Hung(), jaxcache.MemoryStorage()
    with rig.cache(old) as cache:
        driver = Driver(rig, cache)
        for seed in range(5):
            driver.ask(random_tokens(seed, 45))
        driver.step()
        cache.detach_storage()
        cache.attach_storage(new)
        deadline = time.monotonic() + 20
        while cache.stats()["counters"].get("stored_pages", 0) < 60 and time.monotonic() < deadline:
            driver.step()
        assert cache.stats()["counters"]["stored_pages"] == 60
        assert cache.storage_in_use(old) and cache.storage_in_use(new)
        old.may_answer.set()
        driver.drain()
        assert not cache.storage_in_use(old) and cache.storage_in_use(new)


def detached_while_asked(rig, cache, storage):
    driver = Driver(rig, cache)
    assert cache.prefetch(driver.sequence(PROMPT)) is not None
    driver.step()
    assert storage.is_asked.wait(10)
    cache.detach_storage()
    return driver


def test_a_storage_whose_question_is_unanswered_is_in_use(rig):
    """A call under way cannot be taken back: the storage must not be closed below it."""
    storage = Hung()
    with rig.cache(storage) as cache:
        driver = detached_while_asked(rig, cache, storage)
        for _ in range(5):
            driver.step()
        assert not cache.core.live_transfers() and cache.storage_in_use(storage)
        storage.may_answer.set()
        cache.engine.drain()
        assert not cache.storage_in_use(storage)


def storage_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("jaxcache-storage")}


def test_a_detached_storage_leaves_no_threads(rig):
    before = storage_threads()
    with rig.cache(jaxcache.MemoryStorage()) as cache:
        driver = Driver(rig, cache)
        driver.ask(PROMPT)
        driver.drain()
        assert storage_threads() - before
        cache.detach_storage()
        assert not storage_threads() - before


def test_the_threads_of_a_detached_storage_end_once_it_has_answered(rig):
    before, storage = storage_threads(), Hung()
    with rig.cache(storage) as cache:
        driver = detached_while_asked(rig, cache, storage)
        driver.step()
        assert storage_threads() - before
        storage.may_answer.set()
        cache.engine.drain()
        driver.step()
        assert not storage_threads() - before


class Finishing:
    """Jobs of which the last ends right after the first look."""

    def __init__(self):
        self.num_looks, self.is_closed = 0, False

    @property
    def num_open(self) -> int:
        self.num_looks += 1
        return int(self.num_looks == 1)

    def close(self) -> None:
        self.is_closed = True


def test_a_storage_whose_last_call_ends_while_it_is_looked_at_is_closed(rig):
    with rig.cache(jaxcache.MemoryStorage()) as cache:
        jobs = cache.engine.storage_io._connection.jobs = Finishing()
        cache.engine.set_storage(None)
        cache.engine.set_storage(None)
        cache.engine.poll()
        assert jobs.is_closed


def test_a_detached_storage_is_asked_no_more(rig):
    """Not even for what was planned and not yet begun."""
    storage = Hung()
    with rig.cache(storage) as cache:
        driver = Driver(rig, cache)
        assert cache.prefetch(driver.sequence(PROMPT)) is not None
        cache.detach_storage()
        driver.step()
        cache.engine.drain()
        assert not storage.is_asked.is_set()


def test_what_is_refused_changes_nothing(rig):
    with rig.cache() as cache:
        digest = cache.core.digest
        with pytest.raises(TypeError, match="must be a jaxcache Storage, not str"):
            cache.attach_storage("a path")
        with pytest.raises(RuntimeError, match="no storage is attached"):
            cache.detach_storage()
        with pytest.raises(RuntimeError, match="no storage is attached"):
            cache.clear_storage()
        with pytest.raises(ValueError, match="run time"):
            cache.set_policies(write_policy=jaxcache.WritePolicy.WRITE_BACK)
        assert (cache.core.digest, cache.storage) == (digest, None)
        cache.attach_storage(jaxcache.MemoryStorage())
        with pytest.raises(RuntimeError, match="detach it first"):
            cache.attach_storage(jaxcache.MemoryStorage())
    with pytest.raises(RuntimeError, match="closed"):
        cache.detach_storage()
    with pytest.raises(RuntimeError, match="closed"):
        cache.set_policies(prefetch_policy=jaxcache.PrefetchPolicy.TIMEOUT)


def test_storage_without_a_host_tier(rig):
    before = threading.active_count()
    with pytest.raises(ValueError, match="a host tier to read into"):
        rig.cache(jaxcache.MemoryStorage(), host_pages=0)
    assert threading.active_count() == before


def test_policies_at_run_time(rig):
    storage = jaxcache.MemoryStorage()
    with rig.cache(storage) as cache:
        driver = Driver(rig, cache)
        cache.set_policies(write_policy=jaxcache.WritePolicy.NONE, prefetch_policy=jaxcache.PrefetchPolicy.TIMEOUT)
        check_equal(driver.ask(PROMPT), answer(rig))
        assert "backup_pages" not in cache.stats()["counters"]
        cache.set_policies(write_policy=jaxcache.WritePolicy.WRITE_THROUGH)
        check_equal(driver.ask(PROMPT), answer(rig))
        assert cache.stats()["counters"]["backup_pages"] == 12
        sequence = driver.sequence(random_tokens(7, 45))
        ticket = cache.prefetch(sequence)
        assert cache.admit(sequence, 16, ticket) == jaxcache.Wait("prefetch")
        cache.set_policies(prefetch_policy=jaxcache.PrefetchPolicy.BEST_EFFORT)
        assert cache.admit(sequence, 16, ticket)
        policies = cache.config.prefetch_policy, cache.config.write_policy
        assert policies == (jaxcache.PrefetchPolicy.BEST_EFFORT, jaxcache.WritePolicy.WRITE_THROUGH)


def test_a_prefetch_that_holds_up_a_request_for_too_long(rig):
    """L5: stage 0's clock decides, not the storage."""
    storage = Slow()
    config = {"prefetch_policy": jaxcache.PrefetchPolicy.TIMEOUT, "prefetch_timeout_s": 0.2}
    with rig.cache(storage, **config) as cache:
        driver = Driver(rig, cache)
        driver.ask(PROMPT)
        driver.drain()
        cache.reset()
        sequence = driver.sequence(PROMPT)
        ticket = cache.prefetch(sequence)
        num_waits = 0
        while not cache.admit(sequence, 16, ticket):
            num_waits += 1
            driver.step()
        assert num_waits > 1 and ticket.done
        assert cache.stats()["counters"]["prefetch_timeouts"] == 1
        storage.may_read.set()
        driver.drain()
