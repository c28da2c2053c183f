"""The victims of many accounts, so that choosing among them does not look at all of them.

    accounts of a queue: 7 --order--> node used at 31     heap of the queue: (12, id, 9), (31, id, 7), (40, id, 8)
                         8 --order--> node used at 40                         first --> the victim of account 9
                         9 --order--> node used at 12

A queue is what leaves equally readily: one tenant's accounts, or all that are retired. An account is asked for its
victim only after it has changed, so 4,000 idle accounts cost nothing.

Invariant: the entry of an account that has not changed since it was asked is what its order would answer now.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from jaxcache.core.eviction.order import EvictionOrder
from jaxcache.core.radix_tree import Node

Entry = tuple[int, int, int]  # last use of an account's victim, its node's id, the account


class Victims:
    """Of one (component, tier). orders: by account, and the caller's to change."""

    def __init__(self, num_queues: int, orders: list[EvictionOrder]):
        self._orders = orders
        self._queue_of: list[int] = []
        self._nodes: list[Node | None] = []
        self._entries: list[Entry | None] = []  # an entry of a heap that is not the same object here is out of date
        self._heaps: list[list[Entry]] = [[] for _ in range(num_queues)]
        self._changed: list[dict[int, None]] = [{} for _ in range(num_queues)]

    def open(self, account: int, queue: int) -> None:
        """An account without pages: the next one, or one that is used again."""
        if account == len(self._queue_of):
            self._queue_of.append(queue)
            self._nodes.append(None)
            self._entries.append(None)
        else:
            self.move(account, queue)

    def move(self, account: int, queue: int) -> None:
        self._changed[self._queue_of[account]].pop(account, None)
        self._queue_of[account] = queue
        self._nodes[account] = self._entries[account] = None
        self.changed(account)

    def changed(self, account: int) -> None:
        """Something has happened to a node of an account: its victim may be another one, or of another last use."""
        self._changed[self._queue_of[account]][account] = None

    def all_changed(self) -> None:
        for account in range(len(self._queue_of)):
            self.changed(account)

    def first(self, queue: int) -> Node | None:
        """The least recently used one of the victims of a queue's accounts."""
        heap, changed = self._heaps[queue], self._changed[queue]
        if changed:
            for account in changed:
                self._ask(account, heap)
            changed.clear()
        while heap:
            account = heap[0][2]
            if self._entries[account] is heap[0]:
                return self._nodes[account]
            heappop(heap)
        return None

    def _ask(self, account: int, heap: list[Entry]) -> None:
        node, before = self._orders[account].first(), self._entries[account]
        if node is None:
            self._nodes[account] = self._entries[account] = None
        elif before is None or before[1] != node.id or before[0] != node.last_used:
            self._nodes[account] = node
            self._entries[account] = entry = (node.last_used, node.id, account)
            heappush(heap, entry)
            if len(heap) > 2 * len(self._entries) + 64:
                heap[:] = [entry for entry in heap if self._entries[entry[2]] is entry]
                heapify(heap)
