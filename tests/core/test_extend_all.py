"""A token for many sequences at once: as `extend` for each, in one note."""

from __future__ import annotations

import numpy as np
import pytest

from jaxcache.core.tokens import Sequence
from tests.core.helpers import FULL, Server, make_core, prompt


def sequences(server: Server, num: int = 3) -> list[Sequence]:
    return [server.sequence(prompt(5 + i, 100 * i)) for i in range(num)]


@pytest.mark.parametrize("kind", [list, tuple, np.array], ids=["list", "tuple", "array"])
def test_as_one_by_one(kind):
    together, each = Server(FULL), Server(FULL)
    some, others = sequences(together), sequences(each)
    for step in range(3):
        tokens = [7 + step, 2**31 - 1, 0]
        together.core.extend_all(some, kind(tokens))
        for sequence, token in zip(others, tokens, strict=True):
            sequence.extend([token])
    for sequence, other in zip(some, others, strict=True):
        assert bytes(sequence.data) == bytes(other.data)
        assert (sequence.num_tokens, sequence.prompt_tokens) == (other.num_tokens, other.prompt_tokens)
    together.prefill(some[0])
    together.prefill(some[0].tokens.tolist())
    together.check()


def test_nothing_for_nobody():
    """But every rank has made the call."""
    server = Server(FULL)
    before = server.core.digest
    server.core.extend_all([], [])
    assert server.core.digest != before
    assert not server.core.leases


def test_what_differs_is_in_the_digest():
    def digest(tokens: list[int], order: tuple[int, ...] = (0, 1, 2)) -> int:
        server = Server(FULL)
        leases = [server.admit(prompt(5, 100 * i)) for i in range(3)]
        server.core.extend_all([leases[i].sequence for i in order], tokens)
        return server.core.digest

    assert digest([1, 2, 3]) == digest([1, 2, 3])
    assert len({digest([1, 2, 3]), digest([1, 2, 4]), digest([2, 1, 3]), digest([1, 2, 3], (1, 0, 2))}) == 4


def test_what_cannot_be_changes_nothing():
    server = Server(FULL)
    some, foreign = sequences(server), make_core(FULL)
    stranger = foreign.sequence([1], foreign.new_namespace(model="x"))
    shared = server.sequence(prompt(6, 500))
    leases = [server.admit(shared), server.admit(shared)]
    before = server.core.digest, [bytes(sequence.data) for sequence in some]
    for wrong, tokens, error, message in (
        (some, [1, 2], ValueError, "3 sequences, but 2 tokens"),
        (some, [1, 2, -3], ValueError, "must be in"),
        (some, [1, 2, 2**31], ValueError, "must be in"),
        (some, [1, 2, 3.5], TypeError, "must be ints"),
        (some, "abc", TypeError, "flat row"),
        ([*some, stranger], [1, 2, 3, 4], ValueError, "another cache"),
        ([*some, shared], [1, 2, 3, 4], ValueError, "2 leases run on a sequence"),
        ([*some, None], [1, 2, 3, 4], TypeError, "a list of Sequence"),
        (iter(some), [1, 2, 3], TypeError, "a list of Sequence"),
    ):
        with pytest.raises(error, match=message):
            server.core.extend_all(wrong, tokens)  # pyright: ignore[reportArgumentType]
        assert (server.core.digest, [bytes(sequence.data) for sequence in some]) == before
    for lease in leases:
        server.release(lease)
