"""Policies that are one sort key: a heap over the candidates, O(log n)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import Any, ClassVar

from jaxcache.core.eviction.order import EvictionOrder, OrderContext
from jaxcache.core.node import Node

GENERATED, USUAL = 0, 1  # generated text leaves before all else, if the cache is configured so


class Keyed(EvictionOrder):
    """The smallest key leaves first. An entry of the heap whose key is not the node's present one is out of date."""

    def __init__(self, context: OrderContext):
        super().__init__(context)
        self._keys: dict[Node, tuple] = {}
        self._heap: list[tuple[tuple, int, Node]] = []

    @abstractmethod
    def key(self, node: Node) -> tuple:
        """Of a node that has become a candidate."""

    def add(self, node: Node) -> None:
        self._add(node, (USUAL, *self.key(node)))

    def add_as_next_victim(self, node: Node) -> None:
        self._add(node, (GENERATED, *self.key(node)))

    def readmit(self, node: Node) -> None:
        if node.last_used < 0:
            self.add_as_next_victim(node)
        else:
            self.add(node)

    def _add(self, node: Node, key: tuple) -> None:
        self._keys[node] = key
        heappush(self._heap, (key, node.id, node))
        if len(self._heap) > 2 * len(self._keys) + 64:
            self._heap = [(key, node.id, node) for node, key in self._keys.items()]
            heapify(self._heap)

    def discard(self, node: Node) -> None:
        self._keys.pop(node, None)

    def first(self) -> Node | None:
        heap = self._heap
        while heap:
            key, _, node = heap[0]
            if self._keys.get(node) is key:
                return node
            heappop(heap)
        return None

    def __iter__(self) -> Iterator[Node]:
        return iter(sorted(self._keys, key=lambda node: (self._keys[node], node.id)))

    def __contains__(self, node: Node) -> bool:
        return node in self._keys

    def __len__(self) -> int:
        return len(self._keys)


class Lfu(Keyed, name="lfu"):
    """Least frequently used while it was in the cache."""

    def key(self, node: Node) -> tuple:
        return node.hits, node.last_used


class Priority(Keyed, name="priority"):
    """Lowest priority first (see `insert`), least recently used among equals."""

    by_priority: ClassVar[bool] = True

    def key(self, node: Node) -> tuple:
        return node.priority, node.last_used


class Fifo(Keyed, name="fifo"):
    """What came first leaves first, used or not."""

    remembers: ClassVar[bool] = True

    def key(self, node: Node) -> tuple:
        return (use(node).born,)


def use(node: Node) -> Any:
    """What the profile says of a node; a policy that remembers is told of every node before it is a candidate."""
    assert node.use is not None, f"{node=} was never used"
    return node.use
