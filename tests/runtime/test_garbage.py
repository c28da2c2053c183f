"""The collector runs in `step` only and never goes through what is old, and is as it was afterwards."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest

import jaxcache
from jaxcache.components import FieldSpec, FullAttention
from jaxcache.runtime import garbage
from jaxcache.runtime.garbage import GarbageControl

KV = FieldSpec("kv", (1, 2, 4, 1, 4), "float32", ("layers", None, "slots", "heads", None))


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
    control.stop()
    assert is_as_it_was()


def is_as_it_was() -> bool:
    return gc.isenabled() and not gc.get_freeze_count() and not GarbageControl.running


def make_objects(num: int) -> list[list]:
    return [[] for _ in range(num)]


def make_cache() -> jaxcache.Cache:
    config = jaxcache.CacheConfig(page_tokens=4, device_pages=8, collect_in_step=True)
    return jaxcache.Cache([FullAttention("full", (KV,))], jaxcache.one_device_mesh(), config)


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
    """Where two caches are there: when nothing runs in either."""
    monkeypatch.setattr(garbage, "NEW_OBJECTS", 1000)
    monkeypatch.setattr(garbage, "THAW_AFTER", 3)
    other = GarbageControl()
    other.start()
    other.step(False)
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
    control.step(True)
    assert freed[1]() is not None  # it died after it was frozen, and the other cache serves
    other.step(True)
    assert freed[1]() is None
    assert kept
    other.stop()
    assert not gc.isenabled()


def test_the_last_cache_gives_the_collector_back():
    caches = [make_cache() for _ in range(2)]
    for cache in caches:
        assert not gc.isenabled()
        cache.step(cache.init_pools())
        cache.close()
        cache.close()
    assert is_as_it_was()


def test_so_does_one_that_has_ended():
    with make_cache() as cache:
        pools = cache.init_pools()
        cache.serving.end(MemoryError("by this test"), "step")
        with pytest.raises(jaxcache.ServingEnded):
            cache.step(pools)
        assert is_as_it_was()


def test_a_child_process_collects_as_ever():
    """In a process of its own, since jax warns of forks."""
    program = """
import gc, os
from jaxcache.runtime.garbage import GarbageControl
GarbageControl().start()
child = os.fork()
if not child:
    os._exit(0 if gc.isenabled() and not gc.get_freeze_count() and not GarbageControl.running else 1)
assert os.waitpid(child, 0)[1] == 0 and not gc.isenabled()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
