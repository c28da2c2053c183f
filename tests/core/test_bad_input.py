"""A mistake of the caller is named, and changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.core.helpers import FULL, Server, prompt, window
from tests.core.test_admit import everything

MIXTURES = {"full": (FULL,), "full+window": (FULL, window(6))}


@pytest.fixture(params=MIXTURES.values(), ids=MIXTURES)
def server(request: pytest.FixtureRequest) -> Server:
    return Server(*request.param)


@pytest.mark.parametrize("number", [4.0, np.float64(4), "4", None, True])
def test_numbers_of_tokens_are_integers(server, number: Any):
    lease = server.admit(prompt(8))
    server.compute(lease, 8)
    sequence = server.sequence(prompt(20, 1000))
    before = everything(server)
    for call in (
        lambda: server.core.admit(sequence, number),
        lambda: server.core.grow(lease, 8, number),
        lambda: server.core.grow_all([lease], [8], number),
        lambda: server.core.insert(lease, number),
    ):
        with pytest.raises(TypeError):
            call()
        assert everything(server) == before
    with pytest.raises(TypeError):
        server.core.grow(lease, 8.0, 1)  # pyright: ignore[reportArgumentType]
    server.check()


def test_integers_of_numpy_are_taken(server):
    lease = server.admit(prompt(8), chunk=np.int64(8))  # pyright: ignore[reportArgumentType]
    server.compute(lease, 8)
    assert server.core.grow(lease, np.int32(8), np.int64(1))  # pyright: ignore[reportArgumentType]
    lease.sequence.extend([5])
    server.insert(lease, np.int64(9))  # pyright: ignore[reportArgumentType]
    assert type(lease.num_tokens) is type(lease.num_computed) is int


def test_integers_of_numpy_decide_as_those_of_python_do():
    """Within a page nothing but numbers changes, though what another request has split could be given back."""
    cores = []
    for kind in (int, np.int64):
        server = Server(FULL, window(6))
        lease = server.admit(prompt(43))
        for end in (36, 42):
            server.compute(lease, end)
            server.insert(lease, end)
        assert server.core.grow(lease, 42, 1)
        server.prefill([*prompt(32), *prompt(8, 1000)])  # splits what the lease has pinned of the window
        assert server.core.grow(lease, kind(42), 1)
        cores.append(server.core)
    assert cores[0].sizes() == cores[1].sizes()


@pytest.mark.parametrize(
    "wish", [{"priority": -1}, {"priority": 0.0}, {"priority": True}, {"retain_steps": False}, {"retain_steps": 1.5}]
)
def test_a_wish_that_is_refused_changes_nothing(server, wish: dict[str, Any]):
    lease = server.admit(prompt(40))
    server.rank.apply()
    before = everything(server), lease.num_computed
    with pytest.raises(ValueError, match="must be an int"):
        server.core.insert(lease, 40, **wish)
    assert (everything(server), lease.num_computed) == before
