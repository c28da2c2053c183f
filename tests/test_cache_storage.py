"""A cache on a storage that cannot be used, or that fails later: refused with a reason, or a miss that is counted."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

import pytest

import jaxcache
from jaxcache.storage.base import ObjectKey
from tests.models.serving import Driver, Rig, check_equal, random_tokens, reference, rig_on

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
    with rig.cache(storage, storage_deadline_s=0.5 if mood == "stalls" else 60.0) as cache:
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
