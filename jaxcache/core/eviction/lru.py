"""Least recently used first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from heapq import heapify, heappop, heappush, merge
from typing import Any

from jaxcache.core.eviction.order import EvictionOrder, OrderContext
from jaxcache.core.node import Node

MISSING: Any = object()


class Lru(EvictionOrder, name="lru"):
    """Least recently used first.

    Over an OrderedDict, where every operation is O(1) also after many evictions. A parent that was used after its last
    child belongs somewhere in the middle: it waits in a heap, O(log n), which is rare.
    """

    def __init__(self, context: OrderContext):
        super().__init__(context)
        self._nodes: OrderedDict[Node, None] = OrderedDict()
        self._back: dict[Node, int] = {}  # parents in the heap, by last use; other entries of the heap are out of date
        self._heap: list[tuple[int, int, Node]] = []

    def add(self, node: Node) -> None:
        self._nodes[node] = None

    def add_as_next_victim(self, node: Node) -> None:
        self._nodes[node] = None
        self._nodes.move_to_end(node, last=False)

    def readmit(self, node: Node) -> None:
        oldest = next(iter(self._nodes), None)
        if oldest is None or node.last_used <= oldest.last_used:
            self.add_as_next_victim(node)
        else:
            self._back[node] = node.last_used
            heappush(self._heap, (node.last_used, node.id, node))
            if len(self._heap) > 2 * len(self._back) + 64:
                self._heap = [(last_used, node.id, node) for node, last_used in self._back.items()]
                heapify(self._heap)

    def discard(self, node: Node) -> None:
        if self._nodes.pop(node, MISSING) is MISSING and self._back:
            self._back.pop(node, None)

    def first(self) -> Node | None:
        oldest = next(iter(self._nodes), None)
        heap = self._heap
        if not self._back:
            heap.clear()
        while heap:
            last_used, _, node = heap[0]
            if self._back.get(node) == last_used:
                return node if oldest is None or last_used <= oldest.last_used else oldest
            heappop(heap)
        return oldest

    def __iter__(self) -> Iterator[Node]:
        back = sorted(self._back, key=lambda node: (node.last_used, node.id))
        return merge(back, self._nodes, key=lambda node: node.last_used)

    def __contains__(self, node: Node) -> bool:
        return node in self._nodes or node in self._back

    def __len__(self) -> int:
        return len(self._nodes) + len(self._back)
