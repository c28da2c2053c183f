"""Policies of several queues, whose sizes are in pages.

A node of 8 pages counts 8 from when it joins a queue; trimmed to 5 it counts 8 until it is the queue's oldest.

S3Fifo:    new --> small --> main <--> (chances)       Slru:  new --> probation <--> protected <-- hit
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain
from typing import ClassVar

from jaxcache.core.eviction.keyed import use
from jaxcache.core.eviction.lru import Lru
from jaxcache.core.eviction.order import EvictionOrder, OrderContext
from jaxcache.core.node import Node


class Queue:
    """Nodes, oldest first, and their pages together; a parent comes in where its last use belongs (see Lru)."""

    def __init__(self, context: OrderContext):
        self.index = context.index
        self.order = Lru(context)
        self.sizes: dict[Node, int] = {}
        self.num_pages = 0

    def push(self, node: Node) -> None:
        self.order.add(node)
        self._count(node)

    def push_oldest(self, node: Node) -> None:
        self.order.add_as_next_victim(node)
        self._count(node)

    def push_back(self, node: Node) -> None:
        self.order.readmit(node)
        self._count(node)

    def _count(self, node: Node) -> None:
        pages = node.pages[self.index]
        assert pages is not None, f"{node=} is a candidate without pages"
        self.num_pages += len(pages) - self.sizes.get(node, 0)
        self.sizes[node] = len(pages)

    def again(self, node: Node) -> None:
        """Goes to the end."""
        self.order.discard(node)
        self.order.add(node)

    def remove(self, node: Node) -> None:
        self.order.discard(node)
        self.num_pages -= self.sizes.pop(node)

    def oldest(self) -> Node | None:
        """Counts its pages anew: the first one is trimmed in place, and no call says so."""
        node = self.order.first()
        if node is not None:
            self._count(node)
        return node

    def exceeds(self, num_pages: float) -> bool:
        self.oldest()
        return self.num_pages > num_pages

    def __iter__(self) -> Iterator[Node]:
        return iter(self.order)

    def __contains__(self, node: Node) -> bool:
        return node in self.sizes

    def __len__(self) -> int:
        return len(self.sizes)


class Queued(EvictionOrder):
    """queues: in the order in which they are emptied if nothing else is said.

    Iterates in that order too; where the queues compete, the order of leaving is only decided by `first`.
    """

    def __init__(self, context: OrderContext, num_queues: int):
        super().__init__(context)
        self.queues = tuple(Queue(context) for _ in range(num_queues))

    @abstractmethod
    def queue_of(self, node: Node) -> Queue:
        """Which queue a node joins that becomes a candidate."""

    def add(self, node: Node) -> None:
        self.queue_of(node).push(node)

    def add_as_next_victim(self, node: Node) -> None:
        self.queues[0].push_oldest(node)

    def readmit(self, node: Node) -> None:
        if node.last_used < 0:
            self.add_as_next_victim(node)
        else:
            self.queue_of(node).push_back(node)

    def move(self, node: Node, source: Queue, target: Queue) -> None:
        source.remove(node)
        target.push(node)

    def discard(self, node: Node) -> None:
        for queue in self.queues:
            if node in queue:
                queue.remove(node)

    def first(self) -> Node | None:
        for queue in self.queues:
            if queue:
                return queue.oldest()
        return None

    def __iter__(self) -> Iterator[Node]:
        return chain.from_iterable(self.queues)

    def __contains__(self, node: Node) -> bool:
        return any(node in queue for queue in self.queues)

    def __len__(self) -> int:
        return sum(len(queue) for queue in self.queues)


class Slru(Queued, name="slru"):
    """Segmented LRU: new ones are on probation, so a scan takes nothing from those that were hit.

    What was hit is protected, up to a share of the pages; the oldest of it goes back on probation.
    """

    PROTECTED_SHARE = 0.8

    def __init__(self, context: OrderContext):
        super().__init__(context, 2)
        self.probation, self.protected = self.queues

    def queue_of(self, node: Node) -> Queue:
        return self.protected if node.hits else self.probation

    def add(self, node: Node) -> None:
        super().add(node)
        self._bound()

    def readmit(self, node: Node) -> None:
        super().readmit(node)
        self._bound()

    def _bound(self) -> None:
        while self.protected.exceeds(self.PROTECTED_SHARE * self.context.num_pages):
            oldest = self.protected.oldest()
            assert oldest is not None
            self.move(oldest, self.protected, self.probation)


class S3Fifo(Queued, name="s3fifo"):
    """Three queues (Yang et al. 2023): a small one filters what is used once; the main one gives second chances.

    What is remembered from before it left goes to the main queue at once. A node joins its queue when it is released:
    pinned nodes are in none.
    spent: hits of the nodes of the main queue that were spent; away: the same of those discarded last, by node id
    """

    remembers: ClassVar[bool] = True
    SMALL_SHARE = 0.1
    MAX_CHANCES = 3
    MIN_AWAY = 64

    def __init__(self, context: OrderContext):
        super().__init__(context, 2)
        self.small, self.main = self.queues
        self.spent: dict[Node, int] = {}
        self.away: OrderedDict[int, int] = OrderedDict()  # pinned ones, which come back, and some that left

    def queue_of(self, node: Node) -> Queue:
        spent = self.away.pop(node.id, None)
        if spent is None and use(node).count <= node.hits:
            return self.small
        self.spent[node] = spent or 0
        return self.main

    def discard(self, node: Node) -> None:
        super().discard(node)
        spent = self.spent.pop(node, None)
        if spent is not None:
            self.away[node.id] = spent
            while len(self.away) > len(self.spent) + self.MIN_AWAY:
                self.away.popitem(last=False)

    def first(self) -> Node | None:
        small, main = self.small, self.main
        while True:
            from_small = small.exceeds(self.SMALL_SHARE * self.context.num_pages) or not main
            node = small.oldest() if from_small else main.oldest()
            if node is None:
                return None
            if from_small:
                if not node.hits or node.is_output:
                    return node
                self.spent[node] = node.hits
                self.move(node, small, main)
            else:
                spent = self.spent[node]
                if node.hits <= spent:
                    return node
                self.spent[node] = max(spent + 1, node.hits - self.MAX_CHANCES)
                main.again(node)
