"""A cache on a storage that cannot be used, or that fails later: refused with a reason, or a miss that is counted."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence

import pytest

import jaxcache
from jaxcache.storage.base import ObjectKey
from tests.models.serving import PAGE_TOKENS, Driver, Rig, check_equal, random_tokens, reference, rig_on

PROMPT = random_tokens(1, 45)
OTHER = random_tokens(2, 45)


@pytest.fixture
def rig(make_mesh) -> Rig:
    return rig_on(make_mesh())


# ---- found when opening


@pytest.mark.parametrize("storage", ["a path", 7, jaxcache.MemoryStorage], ids=repr)
def test_storage_that_is_no_storage(rig, storage):
    before = threading.active_count()
    with pytest.raises(TypeError, match="storage must be a jaxcache Storage, not"):
        rig.cache(storage)
    assert threading.active_count() == before


def test_folder_of_somebody_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(jaxcache.StorageError, match=f"{tmp_path} cannot be used .*belongs to something else"):
        jaxcache.FileStorage(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_folder_that_is_a_file(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, file / "below"):
        with pytest.raises(jaxcache.StorageError, match="cannot be used as storage"):
            jaxcache.FileStorage(path)


def test_folder_on_a_full_disk(tmp_path, monkeypatch):
    def no_space(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwritev", no_space)
    with pytest.raises(jaxcache.StorageError, match="No space left on device"):
        jaxcache.FileStorage(tmp_path / "storage")


# ---- found later


class Moody(jaxcache.Storage):
    """Keeps values until its mood changes: raises, refuses, or takes for ever (until `freed`)."""

    secret = b"secret"

    def __init__(self):
        self.values: dict[ObjectKey, bytes] = {}
        self.mood = "good"
        self.freed = threading.Event()

    def _feel(self) -> bool:
        if self.mood == "raises":
            raise OSError("the disk is on fire")
        if self.mood == "stalls":
            self.freed.wait(30)
        return self.mood != "refuses"

    def exists(self, keys: Sequence[ObjectKey]) -> list[bool]:
        return [key in self.values for key in keys]

    def get(self, key: ObjectKey, buffer: memoryview) -> bool:
        if not self._feel() or key not in self.values:
            return False
        buffer[:] = self.values[key]
        return True

    def put(self, key: ObjectKey, buffer: memoryview) -> bool:
        if not self._feel():
            return False
        self.values[key] = bytes(buffer)
        return True

    def clear(self) -> None:
        self.values.clear()


@pytest.mark.parametrize(
    ("mood", "counter"),
    [("raises", "storage_failures"), ("refuses", "fetch_misses"), ("stalls", "storage_timeouts")],
)
def test_storage_that_fails_at_run_time(rig, mood, counter):
    """Serving goes on as without one, what failed is counted, and what was stored before is there when it is well."""
    storage, want = Moody(), reference(rig.mesh, tuple(PROMPT.tolist()))
    with rig.cache(storage) as cache:
        first = Driver(rig, cache)
        first.ask(PROMPT)
        first.drain()
        assert len(storage.values) == 12
    storage.mood = mood
    with rig.cache(storage, storage_deadline_s=2.0 if mood == "stalls" else 60.0) as cache:
        driver = Driver(rig, cache)
        sequence = driver.sequence(PROMPT)
        ticket = cache.prefetch(sequence)
        while not ticket.done:
            driver.step()
        got = driver.finish(driver.admit(sequence, ticket))
        assert got.hits == (0, 0, 0)
        check_equal(got, want)
        driver.ask(OTHER)  # would be stored
        driver.step()
        again = driver.ask(PROMPT)
        assert sum(again.hits) == 44
        check_equal(again, want)
        storage.freed.set()
        assert cache.stats()["transfers"][counter] > 0
        assert cache.stats()["counters"]["unfulfilled_transfer"] == 44
    storage.mood = "good"
    with rig.cache(storage) as cache:
        assert Driver(rig, cache).ask_storage(PROMPT).hits == (0, 0, 44)


class Hung(Moody):
    """Every second batch of questions, and every `put`, takes for ever (until `freed`)."""

    def __init__(self):
        super().__init__()
        self.num_questions = 0

    def exists(self, keys: Sequence[ObjectKey]) -> list[bool]:
        self.num_questions += 1
        if self.num_questions > 1:
            self.freed.wait(30)
        return [True] * len(keys)

    def put(self, key: ObjectKey, buffer: memoryview) -> bool:
        return self.freed.wait(30)


def test_a_question_that_times_out_half_answered_goes_on(rig):
    """L8: its first batch of keys was answered, the second never: what is agreed is fetched, or is a miss."""
    storage = Hung()
    with rig.cache(storage, host_pages=1024, prefetch_host_share=1.0, storage_deadline_s=0.2) as cache:
        driver = Driver(rig, cache)
        ticket = cache.prefetch(driver.sequence(random_tokens(5, 300 * PAGE_TOKENS)))
        assert ticket is not None
        deadline = time.monotonic() + 20
        while not ticket.done and time.monotonic() < deadline:
            driver.step()
        assert ticket.done
        storage.freed.set()


def test_hung_storage_never_fills_the_lanes(rig):
    """L8: more stalled stores and prefetches than lanes; every ticket is decided at its deadline all the same."""
    storage = Hung()
    storage.num_questions = 1
    limits = {"max_live_transfers": 4, "max_stores": 2, "storage_deadline_s": 0.2, "prefetch_min_tokens": PAGE_TOKENS}
    with rig.cache(storage, host_pages=256, prefetch_host_share=1.0, **limits) as cache:
        driver = Driver(rig, cache)
        driver.ask(PROMPT)
        driver.ask(OTHER)
        tickets = [cache.prefetch(driver.sequence(random_tokens(50 + i, 3 * PAGE_TOKENS))) for i in range(9)]
        deadline = time.monotonic() + 20
        while not all(ticket is not None and ticket.done for ticket in tickets) and time.monotonic() < deadline:
            driver.step()
        assert all(ticket is not None and ticket.done for ticket in tickets)
        storage.freed.set()


def test_what_storage_lost_is_stored_again(rig):
    """L1: values that vanished (cleared, evicted by a quota) are stored again once a question has missed them."""
    storage = Moody()
    with rig.cache(storage) as cache:
        driver = Driver(rig, cache)
        driver.ask(PROMPT)
        driver.drain()
        before = set(storage.values)
        assert before
        storage.clear()
        cache.reset()
        assert driver.ask_storage(PROMPT).hits == (0, 0, 0)
        driver.drain()
        assert len(before) == 12
        assert len(before & set(storage.values)) == 11, "all that was asked for; the last page has generated tokens"


def test_draining_a_hung_storage_gives_up(rig):
    """It names what is left, and the cache goes on serving."""
    storage = Hung()
    with rig.cache(storage, storage_deadline_s=0.1) as cache:
        driver = Driver(rig, cache)
        driver.ask(PROMPT)
        with pytest.raises(TimeoutError, match=r"storage transfers \[\d+\] were still running after 0.3 s"):
            cache.drain(driver.pools, timeout_s=0.3)
        assert sum(driver.ask(PROMPT).hits) == 44
        storage.freed.set()
