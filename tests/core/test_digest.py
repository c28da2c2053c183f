"""The digest of all decisions differs as soon as content does, though every length and id is the same."""

from __future__ import annotations

import pytest

from jaxcache.core.decisions import NUMBERS
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.types import TransferKind
from tests.core.helpers import FULL, make_core, prompt, server_with_storage, state, window

LENGTH = 40


class Loop:
    """One core in the middle of a request; each call may be given other content."""

    def __init__(self, *components):
        self.core: PrefixCache = make_core(*components)
        self.namespace = self.core.new_namespace(model="test", adapter="a")
        self.other = self.core.new_namespace(model="test", adapter="b")
        self.lease = self.core.admit(self.core.sequence(prompt(8), self.namespace), 9)
        self.core.grow(self.lease, 8, 8)

    def admit(self, place: int) -> None:
        tokens = prompt(LENGTH)
        tokens[place] += 1
        self.core.admit(self.core.sequence(tokens, self.namespace), LENGTH)

    def extend(self, token: int) -> None:
        self.lease.sequence.extend([token])


def digest(*components, **calls) -> int:
    loop = Loop(*components)
    for name, value in calls.items():
        getattr(loop, name)(value)
    return loop.core.digest


@pytest.mark.parametrize("components", [(FULL,), (FULL, window(8), state())], ids=["full", "every kind"])
def test_any_token_of_a_prompt(components):
    digests = [digest(*components, admit=place) for place in (0, LENGTH // 2, LENGTH - 1)]
    assert len(set(digests)) == 3


@pytest.mark.parametrize("components", [(FULL,), (FULL, window(8), state())], ids=["full", "every kind"])
def test_a_generated_token_before_it_fills_a_page(components):
    assert digest(*components, extend=7) != digest(*components, extend=8)
    assert digest(*components, extend=7) == digest(*components, extend=7)


def test_a_prompt_of_which_much_is_found():
    """The node at which a hit ends stands for the tokens before it; where trees are the same, so are those."""
    digests = []
    for place in (0, LENGTH - 1):
        loop = Loop()
        for tokens in (prompt(LENGTH), [1, *prompt(LENGTH - 1, 1)]):  # two prompts of one length are there
            lease = loop.core.admit(loop.core.sequence(tokens, loop.namespace), LENGTH)
            loop.core.insert(lease, LENGTH)
            loop.core.release(lease)
        again = prompt(LENGTH) if place else [1, *prompt(LENGTH - 1, 1)]
        loop.core.admit(loop.core.sequence([*again, 5], loop.namespace), 1)
        digests.append(loop.core.digest)
    assert digests[0] != digests[1]


def test_which_namespace_a_request_is_in_and_which_is_retired():
    for call in (
        lambda loop, namespace: loop.core.admit(loop.core.sequence(prompt(LENGTH), namespace), LENGTH),
        lambda loop, namespace: loop.core.retire_namespace(namespace),
    ):
        loop, again, other = Loop(), Loop(), Loop()
        call(loop, loop.namespace), call(again, again.namespace), call(other, other.other)
        assert loop.core.digest == again.core.digest != other.core.digest


def test_the_fields_of_a_new_namespace():
    loop, other = Loop(), Loop()
    loop.core.new_namespace(model="test", adapter="c")
    other.core.new_namespace(model="test", adapter="d")
    assert loop.core.digest != other.core.digest


def test_what_is_prefetched():
    servers = [server_with_storage() for _ in range(2)]
    for server, first in zip(servers, (0, 1000), strict=True):
        server.core.prefetch(server.sequence(prompt(LENGTH, first)))
    assert servers[0].core.digest != servers[1].core.digest


def test_one_sequence_under_two_leases_cannot_be_extended():
    """Each request would append its own tokens to the other's."""
    core = make_core()
    sequence = core.sequence(prompt(8), core.new_namespace(model="test"))
    first, second = core.admit(sequence, 8), core.admit(sequence, 8)
    digest = core.digest
    with pytest.raises(ValueError, match="2 leases run on this sequence"):
        sequence.extend([7])
    assert sequence.num_tokens == 8 and core.digest == digest
    core.release(first)
    sequence.extend([7])
    core.release(second)
    assert sequence.num_tokens == 9


def test_every_kind_of_transfer_has_a_name():
    assert all(kind.name in NUMBERS for kind in TransferKind)
    assert all(len(names) <= 5 for names in NUMBERS.values())
