"""What goes from host memory to storage: STORE transfers, in flight up to a cap; later ones queue, then are dropped.

The same rule on every rank, driven by agreed outcomes only, so a slow storage can neither block the loop nor split
the ranks. A STORE pins its host pages until it is quiet.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import NamedTuple

import numpy as np

from jaxcache.core.planner import Counters, Planner
from jaxcache.core.radix_tree import Node
from jaxcache.core.tiers import Hold, Tiers
from jaxcache.types import Move, Outcome, PageIds, TransferKind


class Waiting(NamedTuple):
    """An entry of component c that covers [start, node.end) of its path (the node may be split while it waits)."""

    node: Node
    c: int
    start: int


class LiveStore(NamedTuple):
    """What a STORE pins until it is quiet, and the keys of what it writes, by component."""

    holds: list[Hold]
    keys: dict[str, tuple[bytes, ...]]


class Stores:
    """live: STORE id -> what it pins. attached: whether there is a storage at all."""

    def __init__(self, tiers: Tiers, planner: Planner, counters: Counters):
        self.tiers = tiers
        self.planner = planner
        self.counters = counters
        self.attached = False
        self.queue: deque[list[Waiting]] = deque()
        self.live: dict[int, LiveStore] = {}
        self.believed: OrderedDict[tuple[str, bytes], None] = OrderedDict()

    def later(self, entries: list[tuple[Node, int]]) -> None:
        """Queues entries (of one path) that have just been backed up."""
        if not self.attached:
            return
        if len(self.queue) >= self.tiers.config.max_queued_stores:
            self.counters["dropped_stores"] += 1
            return
        point = self.tiers.point
        self.queue.append([Waiting(n, c, n.end - 1 if c == point else n.start) for n, c in entries])

    def start(self) -> None:
        """Plans queued stores while fewer than max_stores are in flight. Only between requests: it pins pages."""
        while self.queue and len(self.live) < self.tiers.config.max_stores:
            waiting = [entry for entry in self.queue.popleft() if self._may_be_held(entry.node)]
            moves = tuple(move for c in self.tiers.top_first if (move := self._move(c, waiting)) is not None)
            if not moves:
                self.counters["empty_stores"] += 1
                continue
            store = self.planner.add(TransferKind.STORE, moves)
            self.live[store] = LiveStore(self._hold(waiting), {move.component: move.page_keys for move in moves})
            self.counters["store_pages"] += sum(len(move.src_page_ids) for move in moves)

    def back_fill(self) -> None:
        """Queues everything that is in host memory, parents first; the rest is dropped and counted."""
        num = len(self.tiers.components)
        stack = list(self.tiers.tree.roots.values())[::-1]
        while stack:
            node = stack.pop()
            stack += list(node.children.values())[::-1]
            entries = [(node, c) for c in self.tiers.top_first if node.pages[c + num] is not None]
            if entries:
                self.later(entries)

    def forget(self) -> None:
        """What was believed stored, and what is being stored, may not be there."""
        self.believed.clear()
        self.live = {id: LiveStore(store.holds, {}) for id, store in self.live.items()}

    def _may_be_held(self, node: Node) -> bool:
        """Holding an entry relies on the node's full pages in the same tier."""
        full = self.tiers.full
        return node.parent is not None and (full is None or node.pages[self.tiers.host[full].index] is not None)

    def _hold(self, waiting: list[Waiting]) -> list[Hold]:
        """Pins the entries that are there: a node that holds nothing may leave, and pins above it would be lost."""
        tiers = self.tiers
        holds = []
        for entry in waiting:
            host = tiers.host[entry.c]
            for node in self._nodes(entry):
                if node.pages[host.index] is not None:
                    holds += tiers.hold(host, node, node.end - 1 if entry.c == tiers.point else node.start)
        return holds

    def _move(self, c: int, waiting: list[Waiting]) -> Move | None:
        """The host pages of component c that are still there and not believed stored."""
        name = self.tiers.components[c].name
        pages: list[PageIds] = []
        keys: list[bytes] = []
        for entry in waiting:
            if entry.c == c:
                for node in self._nodes(entry):
                    page_ids = node.pages[self.tiers.host[c].index]
                    if page_ids is not None:
                        pages.append(page_ids)
                        keys += self.tiers.tree.keys(node)[-len(page_ids) :]
        new = [i for i, key in enumerate(keys) if (name, key) not in self.believed]
        if not new:
            return None
        return Move(name, np.concatenate(pages)[new], page_keys=tuple(keys[i] for i in new))

    @staticmethod
    def _nodes(entry: Waiting) -> list[Node]:
        """The nodes that cover an entry now, top first."""
        nodes = []
        node = entry.node
        while node.parent is not None and node.end > entry.start:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def commit(self, store: int, outcome: Outcome) -> None:
        """Lets the pages go when every rank is quiet."""
        if not outcome.quiet:
            return
        holds, keys = self.live.pop(store)
        self.tiers.let_go(holds)
        for component, page_keys in keys.items():
            good = outcome.pages.get(component, 0)
            self.believe(component, page_keys[:good])
            self.counters["stored_pages"] += good
            self.counters["failed_store_pages"] += len(page_keys) - good
        self.planner.note("stored", 9, store)

    def believe(self, component: str, page_keys: tuple[bytes, ...]) -> None:
        """These need not be written again."""
        for key in page_keys:
            self.believed[(component, key)] = None
            self.believed.move_to_end((component, key))
        while len(self.believed) > self.tiers.config.max_stored_beliefs:
            self.believed.popitem(last=False)

    def doubt(self, component: str, page_keys: tuple[bytes, ...]) -> None:
        """Storage has lost these: write them again when there is an occasion."""
        for key in page_keys:
            self.believed.pop((component, key), None)
