"""A storage that breaks its contract: what it raises or answers is a miss, and the users of its host pages go on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import jaxcache
from jaxcache.engine.storage_connection import MAX_FAILURES
from jaxcache.storage.base import ObjectKey
from tests.models.serving import Driver, Rig, check_equal, random_tokens, reference, rig_on

PROMPT = random_tokens(1, 45)


class Panic(BaseException):
    """What native libraries raise, such as pyo3_runtime.PanicException."""


class Breach(jaxcache.Storage):
    """Keeps values; `breaks` names the call that goes wrong, and `how` says what it then raises or answers."""

    secret = b"test"

    def __init__(self):
        self.values: dict[ObjectKey, bytes] = {}
        self.breaks, self.how = "", lambda *args: None
        self.num_breaches = 0

    def _do(self, call: str, *args: Any) -> Any:
        if self.breaks == call:
            self.num_breaches += 1
            return self.how(*args)
        return {"exists": self._exists, "get": self._get, "put": self._put}[call](*args)

    def exists(self, keys):
        return self._do("exists", keys)

    def get(self, key, buffer):
        return self._do("get", key, buffer)

    def put(self, key, buffer):
        return self._do("put", key, buffer)

    def _exists(self, keys):
        return [key in self.values for key in keys]

    def _get(self, key, buffer):
        if key in self.values:
            buffer[:] = self.values[key]
        return key in self.values

    def _put(self, key, buffer):
        self.values.setdefault(key, bytes(buffer))
        return True

    def clear(self):
        self.values.clear()


def raising(error: BaseException) -> Callable[..., Any]:
    def fails(*args):
        raise error

    return fails


def answering(value: Any) -> Callable[..., Any]:
    return lambda *args: value


def answering_each(value: Any) -> Callable[..., Any]:
    return lambda keys: [value] * len(keys)


RAISED = [
    asyncio.CancelledError(),
    SystemExit(3),
    KeyboardInterrupt(),
    GeneratorExit(),
    Panic("panic"),
    OSError("disk"),
]
NO_BOOL = [None, 1, 4096, -1, "yes", [True], np.ones(2, bool)]
NO_LIST = [None, True, [], [True], [True] * 2, [True] * 1000, {True: True}]


BREACHES = [
    *(
        pytest.param(call, raising(e), id=f"{call}-{type(e).__name__}")
        for call in ("exists", "get", "put")
        for e in RAISED
    ),
    *(pytest.param(call, answering(a), id=f"{call}-{a!r:.20}") for call in ("get", "put") for a in NO_BOOL),
    *(pytest.param("exists", answering(a), id=f"exists-{a!r:.20}") for a in NO_LIST),
    *(pytest.param("exists", answering_each(a), id=f"exists-each-{a!r:.20}") for a in NO_BOOL),
]


@pytest.fixture
def rig(make_mesh) -> Rig:
    return rig_on(make_mesh(1, 2, 1))


@pytest.mark.parametrize(("call", "how"), BREACHES)
def test_a_breach_is_a_counted_miss_and_serving_goes_on(rig, call, how):
    """Afterwards the same host pages are loaded back, stored and overwritten."""
    storage, want = Breach(), reference(rig.mesh, tuple(PROMPT.tolist()))
    with rig.cache(storage) as cache:
        driver = Driver(rig, cache)
        driver.ask(PROMPT)
        driver.drain()
    num_values = len(storage.values)
    if call == "put":
        storage.values.clear()
    with rig.cache(storage) as cache:
        driver = Driver(rig, cache)
        storage.breaks, storage.how = call, how
        answer = driver.ask_storage(PROMPT)
        check_equal(answer, want)
        assert answer.hits == (0, 0, 0)
        driver.drain()
        assert 0 < cache.stats()["transfers"]["storage_failures"] <= storage.num_breaches
        storage.breaks = ""
        cache.engine.storage_io._connection.breaker._open_until = 0.0
        cache.clear_storage()
        for _ in range(2):
            driver.fill_device()
            answer = driver.ask(PROMPT)
            check_equal(answer, want)
            assert answer.hits == (0, 44, 0)
        driver.drain()
        assert len(storage.values) >= num_values > 0
        for number in range(10):  # more than host memory holds
            driver.ask(random_tokens(20 + number, 45))
        driver.fill_device()
        answer = driver.ask_storage(PROMPT)
        check_equal(answer, want)
        assert answer.hits == (0, 0, 44)


def test_the_breaker_is_told(rig):
    storage = Breach()
    storage.breaks, storage.how = "exists", raising(Panic("panic"))
    with rig.cache(storage) as cache:
        driver = Driver(rig, cache)
        for number in range(MAX_FAILURES + 1):
            driver.prefetch(driver.sequence(random_tokens(10 + number, 45)))
        transfers = cache.stats()["transfers"]
    assert (transfers["storage_failures"], transfers["breaker_openings"]) == (MAX_FAILURES, 1)
    assert storage.num_breaches == MAX_FAILURES
