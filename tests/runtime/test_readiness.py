"""Waiting has a bound, and the runtime's errors are a rank's that does not answer."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import pytest

from jaxcache.agreement.readiness import wait_until_ready
from jaxcache.types import RankUnresponsive


class Pending:
    """An array that is ready after so many questions, and then fails if it has an error."""

    def __init__(self, num_questions: float, error: Exception | None = None):
        self.num_questions, self.error = num_questions, error

    def is_ready(self) -> bool:
        self.num_questions -= 1
        return self.num_questions < 0

    def block_until_ready(self):
        assert self.num_questions < 0, "blocks for ever"
        if self.error is not None:
            raise self.error
        return self


def test_what_is_ready_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(time, "sleep", None)
    wait_until_ready([], 1.0)
    wait_until_ready([jax.block_until_ready(jnp.ones(3)), Pending(0)], 1.0)


def test_waits_for_all():
    arrays = [Pending(3), Pending(0), Pending(5)]
    wait_until_ready(arrays, 60.0)
    assert all(array.num_questions < 0 for array in arrays)


def test_naps_grow_to_a_millisecond(monkeypatch):
    naps = []
    monkeypatch.setattr(time, "sleep", naps.append)
    wait_until_ready([Pending(20)], 60.0)
    assert naps[:3] == [5e-5, 1e-4, 2e-4]
    assert naps[-1] == max(naps) == 1e-3


def test_the_bound(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    with pytest.raises(RankUnresponsive, match=r"was not ready after 2.5 s"):
        wait_until_ready([Pending(2), Pending(float("inf"))], 2.5)
    assert 2.5 <= now[0] < 2.51


def test_it_ends_when_another_process_has_given_up(monkeypatch):
    """It is asked now and then, not all the time."""
    now, asked = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))

    def is_reported() -> bool:
        asked.append(now[0])
        return len(asked) == 3

    with pytest.raises(RankUnresponsive, match=r"was not ready after 1.5 s, when another process gave up"):
        wait_until_ready([Pending(2), Pending(float("inf"))], 60.0, is_reported)
    assert asked == pytest.approx([0.5, 1.0, 1.5], abs=0.01)


def test_errors_of_the_runtime_are_mapped_and_others_are_not():
    lost = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
    with pytest.raises(RankUnresponsive, match="failed: UNKNOWN: Gloo") as raised:
        wait_until_ready([Pending(1, lost)], 60.0)
    assert raised.value.__cause__ is lost
    with pytest.raises(KeyError):
        wait_until_ready([Pending(0, KeyError("mine"))], 60.0)
