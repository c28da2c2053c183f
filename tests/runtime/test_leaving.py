"""How a process ends that has a cache: soon, with code 0, and without a word, whatever its threads are doing."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import xxhash

import jaxcache
from jaxcache.storage.record import HEADER_BYTES
from tests.runtime.leaving import CONFIG, KV

ROOT = Path(__file__).parents[2]
PROGRAM = "tests.runtime.leaving"
REPETITIONS = 3
PATIENCE_S = 100.0  # an end that hangs, hangs for ever


def run(tmp_path: Path, how: str, storage: str) -> list[tuple[str, str]]:
    """stdout and stderr of several that run side by side."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONWARNINGS": "error"}
    programs = [
        subprocess.Popen(
            [sys.executable, "-m", PROGRAM, how, storage, str(tmp_path / str(number))],
            cwd=ROOT,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in range(REPETITIONS)
    ]
    try:
        outputs = [program.communicate(timeout=PATIENCE_S) for program in programs]
    finally:
        for program in programs:
            program.kill()
    assert [program.returncode for program in programs] == [0] * REPETITIONS, outputs
    return outputs


def also(*values: str):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("how", "storage"),
    [
        ("falls off", "file"),
        ("falls off", "slow"),
        ("closes at exit", "hung"),
        also("falls off", "memory"),
        also("falls off", "hung"),
        also("closes at exit", "memory"),
        also("closes at exit", "file"),
        also("closes at exit", "slow"),
    ],
)
def test_leaving_while_copies_and_stores_are_under_way(tmp_path, how, storage):
    assert run(tmp_path, how, storage) == [("main ends\n", "")] * REPETITIONS
    for value in tmp_path.glob("*/values/*/*"):
        content = value.read_bytes()
        assert content[88:104] == xxhash.xxh3_128_digest(content[HEADER_BYTES:]), "published, and not whole"
    if storage == "slow":  # its calls are short enough to be waited for
        notes = [(tmp_path / str(number)).read_text().split() for number in range(REPETITIONS)]
        assert all(0 < calls.count("begins") == calls.count("ends") for calls in notes), notes


@pytest.mark.parametrize("storage", ["file", also("slow")])
def test_another_thread_serves_on_when_the_main_thread_has_ended(tmp_path, storage):
    assert run(tmp_path, "serves on", storage) == [("main ends\nserved on\n", "")] * REPETITIONS


def test_leaving_after_an_error_that_ended_serving_waits_for_no_storage(tmp_path):
    for stdout, stderr in run(tmp_path, "after a fault", "hung"):
        assert stdout == "main ends\n"
        (line,) = stderr.splitlines()
        assert line.startswith("jaxcache: process 0: a copy between device and host failed: OSError")


def test_a_cache_that_was_closed_leaves_nothing_to_do_at_exit(make_mesh, monkeypatch):
    handlers = []
    fake = SimpleNamespace(register=handlers.append, unregister=handlers.remove)
    monkeypatch.setattr("jaxcache.engine.device_effects.atexit", fake)
    with jaxcache.Cache([jaxcache.FullAttention("full", (KV,))], make_mesh(), CONFIG, jaxcache.MemoryStorage()):
        assert len(handlers) == 1
    assert not handlers


def test_a_cache_that_is_dropped_without_close_frees_its_memory_and_ends_its_threads(make_mesh):
    before = set(threading.enumerate())
    cache = jaxcache.Cache([jaxcache.FullAttention("full", (KV,))], make_mesh(), CONFIG, jaxcache.MemoryStorage())
    pool = weakref.ref(cache.engine.effects.host_pools["full"])
    own = set(threading.enumerate()) - before
    assert own
    del cache
    gc.collect()
    assert pool() is None
    for thread in own:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
