"""What goes from host memory to storage: STORE transfers, in flight up to a cap; later ones queue, then are dropped.

The same rule on every rank, driven by agreed outcomes only, so a slow storage can neither block the loop nor split
the ranks. A STORE pins its host pages until it is quiet, and under write_back the device pages above them until it is
decided.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import NamedTuple

import numpy as np

from jaxcache.core.planner import Counters, Planner
from jaxcache.core.radix_tree import Node
from jaxcache.core.tiers import Hold, Tiers
from jaxcache.types import Move, Outcome, PageIds, TransferKind

MAX_EMPTY = 256  # nodes with nothing to store that one step looks at


class Waiting(NamedTuple):
    """A run of pages, named by the node that it follows and by its tokens: at least its first page's.

    The node at its end would not do: after a split that is only the end of the run, and it may leave before the rest
    has had its turn. `above` still ends there after any split, and if it leaves, then after all below it.
    """

    above: Node
    edge: bytes | memoryview


class LiveStore(NamedTuple):
    """What a STORE pins until it is quiet, and the keys of what it writes, by component."""

    holds: list[Hold]
    keys: dict[str, tuple[bytes, ...]]


class Stores:
    """live: STORE id -> what it pins. attached: whether there is a storage at all.

    queue:                 runs of one path that have just been backed up; they go first
    unvisited:             nodes, by their first pages, whose host pages are still to be stored, and all below them
    num_awaited_exchanges: no STORE begins, and nothing is asked, before so many exchanges of ranks have been read
    """

    def __init__(self, tiers: Tiers, planner: Planner, counters: Counters):
        self.tiers = tiers
        self.planner = planner
        self.counters = counters
        self.attached = False
        self.queue: deque[list[Waiting]] = deque()
        self.unvisited: list[Waiting] = []
        self.num_awaited_exchanges = 0
        self.live: dict[int, LiveStore] = {}
        self.believed: OrderedDict[tuple[str, bytes], None] = OrderedDict()

    def later(self, nodes: list[Node]) -> None:
        """Queues nodes (of one path, top first) of which something has just been backed up."""
        if not self.attached:
            return
        if len(self.queue) >= self.tiers.config.max_queued_stores:
            self.counters["dropped_stores"] += 1
            return
        self.queue.append([Waiting(node.parent, node.edge) for node in nodes if node.parent is not None])

    @property
    def is_waiting(self) -> bool:
        """Whether there is something to store for which no STORE was planned yet."""
        return bool(self.queue or self.unvisited)

    def start(self) -> None:
        """Plans stores while fewer than max_stores are in flight. Only between requests: it pins pages."""
        if self.num_awaited_exchanges or not self.is_waiting:
            return
        num_empty = 0
        num_live = len(self.live) - len(self.forgotten())
        while num_live < self.tiers.config.max_stores and self.is_waiting:
            found = self._found(self.queue.popleft()) if self.queue else self._visit()
            nodes = [node for node in found if self._may_be_held(node)]
            moves = tuple(move for c in self.tiers.top_first if (move := self._move(c, nodes)) is not None)
            if not moves:
                num_empty += 1
                if num_empty == MAX_EMPTY:
                    return  # a large tree of which little is in host memory: the rest in later steps
                continue
            store = self.planner.add(TransferKind.STORE, moves)
            self.live[store] = LiveStore(self._hold(nodes), {move.component: move.page_keys for move in moves})
            self.counters["store_pages"] += sum(len(move.src_page_ids) for move in moves)
            num_live += 1

    def back_fill(self) -> None:
        """Everything that is in host memory is to be stored, parents first, when nothing newer waits."""
        roots = self.tiers.tree.roots.values()
        self.unvisited = [Waiting(root, first_page) for root in roots for first_page in root.children][::-1]

    def _visit(self) -> list[Node]:
        """The next node, if it is there; what follows it comes next, the end of a node that was split included."""
        nodes = self._found([self.unvisited.pop()])
        for node in nodes:
            self.unvisited += [Waiting(node, first_page) for first_page in node.children][::-1]
        return nodes

    def _found(self, runs: list[Waiting]) -> list[Node]:
        """The nodes that now are where these runs were, each once, top first."""
        page_bytes = self.tiers.tree.page_bytes
        found: dict[int, Node] = {}
        for node, edge in runs:
            at = 0
            while at < len(edge):
                child = node.children.get(bytes(edge[at : at + page_bytes]))
                if child is None:
                    break
                found[child.id] = node = child
                at += len(child.edge)
        return list(found.values())

    def drop_waiting(self) -> None:
        self.counters["dropped_stores"] += len(self.queue)
        self.queue.clear()
        self.unvisited.clear()

    def exchanged(self) -> None:
        """An exchange of ranks has been read."""
        self.num_awaited_exchanges -= self.num_awaited_exchanges > 0

    def forget(self) -> None:
        """What was believed stored, and what is being stored, may not be there."""
        self.believed.clear()
        self.live = {id: LiveStore(store.holds, {}) for id, store in self.live.items()}
        for store in self.live.values():
            self.tiers.let_go_of_device(store.holds)

    def forgotten(self) -> list[int]:
        """STOREs of which only quiet is awaited: whether they get further is of no interest."""
        return [id for id, store in self.live.items() if not store.keys]

    def withdraw(self, store: int) -> None:
        """Takes back one that was not applied and will not be; what it would have stored still has to be."""
        holds, keys = self.live.pop(store)
        self.tiers.let_go(holds)
        self.counters["store_pages"] -= sum(map(len, keys.values()))
        if self.attached:
            self.back_fill()

    def _may_be_held(self, node: Node) -> bool:
        """Holding an entry relies on the node's full pages in the same tier."""
        full = self.tiers.full
        return full is None or node.pages[self.tiers.host[full].index] is not None

    def _hold(self, nodes: list[Node]) -> list[Hold]:
        """Pins the entries that are there: a node that holds nothing may leave, and pins above it would be lost."""
        tiers = self.tiers
        holds = []
        for node in nodes:
            for c in tiers.top_first:
                host = tiers.host[c]
                if node.pages[host.index] is not None:
                    holds += tiers.hold(host, node, node.end - 1 if c == tiers.point else node.start)
        return holds

    def _move(self, c: int, nodes: list[Node]) -> Move | None:
        """The host pages of component c that are there and not believed stored."""
        name = self.tiers.components[c].name
        pages: list[PageIds] = []
        keys: list[bytes] = []
        for node in nodes:
            page_ids = node.pages[self.tiers.host[c].index]
            if page_ids is not None:
                pages.append(page_ids)
                keys += self.tiers.tree.keys(node)[-len(page_ids) :]
        new = [i for i, key in enumerate(keys) if (name, key) not in self.believed]
        if not new:
            return None
        return Move(name, np.concatenate(pages)[new], page_keys=tuple(keys[i] for i in new))

    def commit(self, store: int, outcome: Outcome) -> None:
        """Lets the pages go when every rank is quiet; those on the device when it is decided."""
        if not outcome.quiet:
            if outcome.done:
                self.tiers.let_go_of_device(self.live[store].holds)
            return
        holds, keys = self.live.pop(store)
        self.tiers.let_go(holds)
        for component, page_keys in keys.items():
            good = outcome.pages.get(component, 0)
            self.believe(component, page_keys[:good])
            self.counters["stored_pages"] += good
            self.counters["failed_store_pages"] += len(page_keys) - good
        self.planner.note("stored", store)

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
