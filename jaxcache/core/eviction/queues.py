"""Policies of several queues. Sizes are in pages, as they were when a node joined its queue."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain
from typing import ClassVar

from jaxcache.core.eviction.keyed import use
from jaxcache.core.eviction.order import EvictionOrder, Place
from jaxcache.core.radix_tree import Node


class Queue:
    """Nodes, oldest first, and their pages together."""

    def __init__(self):
        self.nodes: OrderedDict[Node, int] = OrderedDict()
        self.num_pages = 0

    def push(self, node: Node, num_pages: int) -> None:
        self.nodes[node] = num_pages
        self.num_pages += num_pages

    def remove(self, node: Node) -> int:
        """Returns its pages; 0 if it is not there."""
        num_pages = self.nodes.pop(node, 0)
        self.num_pages -= num_pages
        return num_pages

    def oldest(self) -> Node | None:
        return next(iter(self.nodes), None)


class Queued(EvictionOrder):
    """queues: in the order in which they are emptied if nothing else is said.

    Iterates in that order too; where the queues compete, the order of leaving is only decided by `first`.
    """

    def __init__(self, place: Place, num_queues: int):
        super().__init__(place)
        self.queues = tuple(Queue() for _ in range(num_queues))

    def num_pages(self, node: Node) -> int:
        pages = node.pages[self.place.index]
        assert pages is not None, f"{node=} is a candidate without pages"
        return len(pages)

    def move(self, node: Node, source: Queue, target: Queue) -> None:
        target.push(node, source.remove(node))

    def add_oldest(self, node: Node) -> None:
        queue = self.queues[0]
        queue.push(node, self.num_pages(node))
        queue.nodes.move_to_end(node, last=False)

    def add_back(self, node: Node) -> None:
        if node.last_used < 0:
            self.add_oldest(node)
        else:
            self.add(node)

    def discard(self, node: Node) -> None:
        for queue in self.queues:
            if node in queue.nodes:
                queue.remove(node)

    def first(self) -> Node | None:
        for queue in self.queues:
            if queue.nodes:
                return queue.oldest()
        return None

    def __iter__(self) -> Iterator[Node]:
        return chain.from_iterable(queue.nodes for queue in self.queues)

    def __contains__(self, node: Node) -> bool:
        return any(node in queue.nodes for queue in self.queues)

    def __len__(self) -> int:
        return sum(len(queue.nodes) for queue in self.queues)


class Slru(Queued):
    """Segmented LRU: what was hit is protected, up to a share of the pages; the oldest of it goes back on probation."""

    PROTECTED_SHARE = 0.8

    def __init__(self, place: Place):
        super().__init__(place, 2)
        self.probation, self.protected = self.queues

    def add(self, node: Node) -> None:
        (self.protected if node.hits else self.probation).push(node, self.num_pages(node))
        while self.protected.num_pages > self.PROTECTED_SHARE * self.place.num_pages:
            oldest = self.protected.oldest()
            assert oldest is not None
            self.move(oldest, self.protected, self.probation)


class WTinyLfu(Queued):
    """New pages prove themselves in a small window; from there they replace older ones only if used more often.

    How often counts also what was used while it was not in the cache (Einziger et al. 2017, with exact counts).
    """

    remembers: ClassVar[bool] = True
    WINDOW_SHARE = 0.01
    PROTECTED_SHARE = 0.8

    def __init__(self, place: Place):
        super().__init__(place, 3)
        self.probation, self.protected, self.window = self.queues

    def add(self, node: Node) -> None:
        if not node.hits:
            self.window.push(node, self.num_pages(node))
            return
        self.protected.push(node, self.num_pages(node))
        while self.protected.num_pages > self.PROTECTED_SHARE * self.place.num_pages:
            oldest = self.protected.oldest()
            assert oldest is not None
            self.move(oldest, self.protected, self.probation)

    def first(self) -> Node | None:
        while self.window.num_pages > self.WINDOW_SHARE * self.place.num_pages:
            newcomer, old = self.window.oldest(), self.probation.oldest() or self.protected.oldest()
            assert newcomer is not None
            if old is None or use(newcomer).count <= use(old).count:
                return newcomer
            if old in self.protected.nodes:
                self.move(old, self.protected, self.probation)
            self.move(newcomer, self.window, self.probation)  # behind the old one
            return old
        return super().first()


class S3Fifo(Queued):
    """Three queues (Yang et al. 2023): a small one filters what is used once; the main one gives second chances.

    What is remembered from before it left goes to the main queue at once. A node joins its queue when it is released:
    pinned nodes are in none.
    """

    remembers: ClassVar[bool] = True
    SMALL_SHARE = 0.1
    MAX_CHANCES = 3

    def __init__(self, place: Place):
        super().__init__(place, 2)
        self.small, self.main = self.queues
        self.chances: dict[Node, int] = {}  # hits of a node of the main queue that were spent

    def add(self, node: Node) -> None:
        is_known = node in self.chances or use(node).count > node.hits
        (self.main if is_known else self.small).push(node, self.num_pages(node))
        if len(self.chances) > 2 * len(self.main.nodes) + 1024:
            self.chances = {node: spent for node, spent in self.chances.items() if node.parent is not None}

    def first(self) -> Node | None:
        small, main = self.small, self.main
        while True:
            from_small = small.num_pages > self.SMALL_SHARE * self.place.num_pages or not main.nodes
            node = small.oldest() if from_small else main.oldest()
            if node is None:
                return None
            if from_small:
                if not node.hits or node.is_output:
                    return node
                self.chances[node] = node.hits
                self.move(node, small, main)
            else:
                spent = self.chances.get(node, 0)
                if node.hits <= spent:
                    return node
                self.chances[node] = max(spent + 1, node.hits - self.MAX_CHANCES)
                main.nodes.move_to_end(node)
