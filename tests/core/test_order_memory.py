"""What orders of eviction keep: in proportion to the candidates, however long they are used, and no node that left."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from jaxcache.core.eviction import POLICIES, policy
from jaxcache.core.eviction.adaptive import Adaptive
from jaxcache.core.eviction.lru import Lru
from jaxcache.core.eviction.order import EvictionOrder, OrderContext
from jaxcache.core.eviction.queues import S3Fifo
from jaxcache.core.eviction.reuse_profile import ReuseProfile
from jaxcache.core.node import Node
from jaxcache.types import Tier

NUM_PAGES = 100


def make(name: str) -> EvictionOrder:
    return policy(name)(OrderContext(0, NUM_PAGES, Tier.DEVICE, False, ReuseProfile(16, 16 * NUM_PAGES, 0, True)))


class Watched(Node):
    """Can be looked for: other nodes have no weak references."""


class Candidates:
    """Makes nodes below one root, each with a page, a use of its own and an id."""

    def __init__(self, order: EvictionOrder):
        self.order = order
        self.root = Node(0, None, b"", b"", 0, 1)
        self.num = 0

    def node(self, last_used: int = 0, hits: int = 0, num_pages: int = 1) -> Watched:
        self.num += 1
        node = Watched(self.num, self.root, bytes(64), b"", 16, 1)
        node.pages[0] = np.arange(num_pages, dtype=np.int32)
        node.last_used, node.hits = last_used, hits
        assert self.order.context.profile is not None
        self.order.context.profile.arrived(node)
        return node


def churn(order: EvictionOrder, num: int) -> list[weakref.ref[Watched]]:
    """A few stay; others come, used or as parents, and go."""
    candidates = Candidates(order)
    for i in range(4):
        order.add(candidates.node(last_used=i))
    gone = []
    for i in range(num):
        node = candidates.node(last_used=10 + i, hits=i % 3)
        (order.readmit if i % 2 else order.add)(node)
        order.discard(node)
        gone.append(weakref.ref(node))
    return gone


def test_lru_forgets_parents_that_left_though_nobody_asks_who_is_first():
    order = make("lru")
    assert isinstance(order, Lru)
    candidates = Candidates(order)
    order.add(candidates.node())
    kept = [candidates.node(last_used=1 + i) for i in range(10)]
    for node in kept:
        order.readmit(node)
    for i in range(1000):
        parent = candidates.node(last_used=100 + i)
        order.readmit(parent)
        order.discard(parent)
    assert len(order._heap) <= 2 * len(order._back) + 64
    assert list(order)[1:] == kept


@pytest.mark.parametrize("learned_leads", [False, True])
def test_adaptive_keeps_no_heap_that_nobody_cleans(learned_leads):
    """Neither order is asked for long: the other one leads."""
    order = make("adaptive")
    assert isinstance(order, Adaptive)
    order.duel.learned_leads = learned_leads
    churn(order, 2000)
    assert len(order._heap) <= 2 * len(order._cells) + 64
    assert len(order._lru._heap) <= 2 * len(order._lru._back) + 64
    assert order.first() is not None and len(order) == len(list(order)) == 4


@pytest.mark.parametrize("name", POLICIES)
def test_nodes_that_left_are_not_kept(name):
    """Nor their edges and pages, but for a few in the heaps."""
    order = make(name)
    gone = churn(order, 2000)
    gc.collect()
    assert sum(node() is not None for node in gone) <= 2 * len(order) + 65


def test_s3fifo_remembers_the_chances_of_few_that_left():
    """Of a node that is only pinned it knows them when it comes back."""
    order = make("s3fifo")
    assert isinstance(order, S3Fifo)
    candidates = Candidates(order)
    gone = []
    for _ in range(500):
        node = candidates.node(hits=1, num_pages=NUM_PAGES)
        order.add(node)
        assert order.first() is node and node in order.main  # it was hit, and has no more chances there
        order.discard(node)
        order.add(node)
        assert node in order.main and order.spent[node] == 1
        order.discard(node)
        gone.append(weakref.ref(node))
    del node
    gc.collect()
    assert not any(node() for node in gone)
    assert len(order.away) <= 64 and not order.spent
