"""The policy that learns: what is least worth keeping leaves first, by the reuse that was seen of its kind and age.

Candidates lie in cells, one for each (weight, kind, age); a cell has one value, so the best victim is the oldest entry
of the cheapest cell that is not empty. Entries move on as they age, whenever the profile values everything anew.

Beside the cells stands the order of lru, which decides as long as what was learned does not pay (duel.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import ClassVar

from jaxcache.core.eviction.keyed import use
from jaxcache.core.eviction.lru import Lru
from jaxcache.core.eviction.order import EvictionOrder, OrderContext
from jaxcache.core.node import Node

Cell = tuple[int, int, int]  # weight (a power of two), kind, age


class Adaptive(EvictionOrder, name="adaptive"):
    """Windows and states are weighed by the tokens that they spare per page; pages of full attention are all equal.

    Iterates by the values of now, and by ages as `first` saw them last: looking changes nothing.
    """

    remembers: ClassVar[bool] = True

    def __init__(self, context: OrderContext):
        super().__init__(context)
        assert context.profile is not None, "the policy remembers"
        self.profile = context.profile
        self._cells: dict[Cell, OrderedDict[Node, None]] = {}
        self._cell_of: dict[Node, Cell] = {}
        self._heap: list[tuple[float, Cell]] = []  # every cell that is not empty, and some that are
        self._version = -1
        self.duel = context.profile.duels[context.tier]
        self._lru = Lru(context)

    @staticmethod
    def moment(context: OrderContext) -> int:
        """0 while lru decides; else what was learned by then."""
        assert context.profile is not None, "the policy remembers"
        return context.profile.version if context.profile.duels[context.tier].learned_leads else 0

    def add(self, node: Node) -> None:
        self._put(node, self._cell(node))
        self._lru.add(node)

    def add_as_next_victim(self, node: Node) -> None:
        self._put(node, self._cell(node))
        self._lru.add_as_next_victim(node)

    def readmit(self, node: Node) -> None:
        self._put(node, self._cell(node))
        self._lru.readmit(node)

    def _cell(self, node: Node) -> Cell:
        at, kind = use(node).at, use(node).kind
        return self._weight(node), kind, self.profile.age(at)

    def _weight(self, node: Node) -> int:
        """log2 of tokens spared per page: those down from the nearest entry above."""
        if not self.context.is_partial:
            return 0
        above = node.parent
        while above is not None and above.parent is not None and above.pages[self.context.index] is None:
            above = above.parent
        pages = node.pages[self.context.index]
        assert above is not None and pages is not None, f"{node=} is no candidate"
        return ((node.end - above.end) // len(pages)).bit_length()

    def _put(self, node: Node, cell: Cell) -> None:
        nodes = self._cells.get(cell)
        if nodes is None:
            nodes = self._cells[cell] = OrderedDict()
        if not nodes:
            heappush(self._heap, (self._value(cell), cell))
        nodes[node] = None
        self._cell_of[node] = cell
        if len(self._heap) > 2 * len(self._cells) + 64:
            self._index()

    def _index(self) -> None:
        """Cells that are empty go, and the heap is made anew."""
        self._cells = {cell: nodes for cell, nodes in self._cells.items() if nodes}
        self._heap = [(self._value(cell), cell) for cell in self._cells]
        heapify(self._heap)

    def _value(self, cell: Cell) -> float:
        weight, kind, age = cell
        return float(self.profile.value[kind, age]) * (1 << weight)

    def discard(self, node: Node) -> None:
        cell = self._cell_of.pop(node, None)
        if cell is not None:
            del self._cells[cell][node]
            self._lru.discard(node)

    def first(self) -> Node | None:
        if not self.duel.learned_leads:
            return self._lru.first()
        if self._version != self.profile.version:
            self._refresh()
        heap = self._heap
        while heap:
            nodes = self._cells[heap[0][1]]
            if nodes:
                return next(iter(nodes))
            heappop(heap)
        return None

    def _refresh(self) -> None:
        """Moves what has aged, oldest ages first so that nothing moves twice, and values the cells anew."""
        age_now = self.profile.age
        for (weight, kind, age), nodes in sorted(self._cells.items(), key=lambda item: -item[0][2]):
            while nodes:
                oldest = next(iter(nodes))
                now = age_now(use(oldest).at)
                if now <= age:
                    break
                del nodes[oldest]
                self._put(oldest, (weight, kind, now))
        self._index()
        self._version = self.profile.version

    def __iter__(self) -> Iterator[Node]:
        if not self.duel.learned_leads:
            yield from self._lru
            return
        for cell in sorted(self._cells, key=lambda cell: (self._value(cell), cell)):
            yield from self._cells[cell]

    def __contains__(self, node: Node) -> bool:
        return node in self._cell_of

    def __len__(self) -> int:
        return len(self._cell_of)
