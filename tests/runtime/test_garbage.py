"""The collector runs in `step` only and never goes through what is old, and is as it was afterwards."""

from __future__ import annotations

import gc
import weakref

import pytest

import jaxcache
from jaxcache.components import FieldSpec, FullAttention
from jaxcache.runtime import garbage
from jaxcache.runtime.garbage import GarbageControl


class Cycle:
    def __init__(self):
        self.me = self


@pytest.fixture
def control():
    assert gc.isenabled()
    control = GarbageControl()
    control.start()
    yield control
    control.stop()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def make_objects(num: int) -> list[list]:
    return [[] for _ in range(num)]


def test_only_what_is_new_is_gone_through(control):
    collections = []
    gc.callbacks.append(lambda phase, info: collections.append(phase))
    try:
        kept = make_objects(garbage.NEW_OBJECTS // 2)
        control.step(False)
        assert not collections
        kept += make_objects(garbage.NEW_OBJECTS)
        assert not collections  # not by itself
        control.step(False)
        assert collections == ["start", "stop"]
        assert gc.get_freeze_count() >= len(kept)
        assert len(gc.get_objects()) < 1000
    finally:
        gc.callbacks.pop()


def test_dead_cycles_go_at_once_or_when_nothing_runs(control, monkeypatch):
    monkeypatch.setattr(garbage, "NEW_OBJECTS", 1000)
    monkeypatch.setattr(garbage, "THAW_AFTER", 3)
    young, old = Cycle(), Cycle()
    freed = [weakref.ref(young), weakref.ref(old)]
    kept = make_objects(garbage.NEW_OBJECTS + 100)
    del young
    control.step(False)
    assert freed[0]() is None and freed[1]() is not None
    del old
    for _ in range(garbage.THAW_AFTER - 1):
        control.step(True)  # nothing runs, but it is too soon
        kept += make_objects(garbage.NEW_OBJECTS + 100)
        control.step(False)
    assert freed[1]() is not None  # it died after it was frozen
    control.step(True)
    assert freed[1]() is None
    assert kept


def test_the_last_cache_gives_the_collector_back():
    kv = FieldSpec("kv", (1, 2, 4, 1, 4), "float32", ("layers", None, "slots", "heads", None))
    config = jaxcache.CacheConfig(page_tokens=4, device_pages=8, collect_in_step=True)
    caches = [jaxcache.Cache([FullAttention("full", (kv,))], jaxcache.one_device_mesh(), config) for _ in range(2)]
    for cache in caches:
        assert not gc.isenabled()
        pools = cache.init_pools()
        cache.step(pools)
        cache.close()
        cache.close()
    assert gc.isenabled() and gc.get_freeze_count() == 0
