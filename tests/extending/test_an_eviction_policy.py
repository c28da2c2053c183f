"""A new eviction policy is one file: the class `NewestFirst`, were it in the folder jaxcache/core/eviction.

It pays where a loop goes round over more than fits: least recently used then always drops what comes next.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jaxcache.core.eviction import POLICIES
from jaxcache.core.eviction.order import EvictionOrder, OrderContext
from jaxcache.core.node import Node
from tests.core.driver import MIXTURES, drive
from tests.core.helpers import PAGE, Server, prompt


class NewestFirst(EvictionOrder):
    """The most recently used leaves first."""

    def __init__(self, context: OrderContext):
        super().__init__(context)
        self._nodes: dict[Node, None] = {}  # best victim last

    def add(self, node: Node) -> None:
        self._nodes[node] = None

    def add_as_next_victim(self, node: Node) -> None:
        self._nodes[node] = None

    def readmit(self, node: Node) -> None:
        """It was used no later than its child, which was the newest."""
        self._nodes[node] = None

    def discard(self, node: Node) -> None:
        self._nodes.pop(node, None)

    def first(self) -> Node | None:
        return next(reversed(self._nodes), None)

    def __iter__(self) -> Iterator[Node]:
        return reversed(self._nodes)

    def __contains__(self, node: Node) -> bool:
        return node in self._nodes

    def __len__(self) -> int:
        return len(self._nodes)


@pytest.fixture(autouse=True)
def named():
    """As `class NewestFirst(EvictionOrder, name="newest")` says it, while the tests of this file run."""

    class Named(NewestFirst, name="newest"):
        pass

    yield
    assert POLICIES.pop("newest") is Named


def found_in_rounds(policy: str, num_prompts: int = 6, num_rounds: int = 5) -> int:
    """Tokens that a loop over six prompts of seven pages found, where 30 pages fit."""
    server = Server(device_pages=30, eviction_policy=policy)
    found = 0
    for _ in range(num_rounds):
        for i in range(num_prompts):
            tokens = prompt(7 * PAGE, 1000 * i)
            found += server.match(tokens).device_tokens
            server.prefill(tokens)
    return found


def test_it_keeps_what_a_loop_comes_back_to():
    assert found_in_rounds("lru") == 0 < found_in_rounds("newest")


def test_it_can_be_looked_at():
    server = Server(device_pages=30, eviction_policy="newest")
    for i in range(3):
        server.prefill(prompt(4 * PAGE, 1000 * i))
    order = server.core.tiers.device[0].order
    assert next(iter(order)) is order.first() is max(order, key=lambda node: node.last_used)


@pytest.mark.parametrize("mixture", MIXTURES, ids="-".join)
def test_random_serving_goes_well_with_it(mixture):
    """Two ranks agree, and no page is read that is wrong or gone."""
    assert drive(4711, 100, mixture=mixture, eviction_policy="newest").counters["evicted_pages"]
