"""What goes from host memory to storage: STORE transfers, in flight up to a cap; later ones queue, then are dropped.

The same rule on every rank, driven by agreed outcomes only, so a slow storage can neither block the loop nor split
the ranks. A STORE pins its host pages until it is quiet, and under write_back the device pages above them until it is
decided.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import NamedTuple

import numpy as np

from jaxcache.core.decisions import Counters, Decisions
from jaxcache.core.kinds import Kinds
from jaxcache.core.node import Node
from jaxcache.core.outbox import Outbox
from jaxcache.core.tiers import Tiers
from jaxcache.types import Move, Outcome, PageIds, TransferKind

PageName = tuple[str, bytes]  # component, page key

MAX_EMPTY = 256  # nodes with nothing to store that one step looks at


class Waiting(NamedTuple):
    """A run of pages, named by the node that it follows and by its tokens: at least its first page's.

    above --[ p0 p1 p2 p3 ]-- node      a split makes      above --[ p0 p1 ]-- new --[ p2 p3 ]-- node

    So `above` and the tokens name all four pages before and after; `node` only the last two, and it may leave first.
    """

    above: Node
    edge: bytes | memoryview


class LiveStore(NamedTuple):
    """The keys of what a STORE writes, by component, and those that end a run."""

    keys: dict[str, tuple[bytes, ...]]
    run_ends: frozenset[PageName]


class Run(NamedTuple):
    """Consecutive host pages of one component on the path to a node: tokens [start, start + n * page_tokens)."""

    node: Node
    start: int
    page_ids: PageIds
    keys: list[bytes]

    def end(self, page_tokens: int) -> int:
        return self.start + len(self.keys) * page_tokens


class Stores:
    """live: by STORE id, until it is quiet. attached: whether there is a storage at all.

    known_stored:          pages that are stored, and whether a run of one STORE ended with them
    units:                 pages of a unit of storage, by component: so many may share a value
    queue:                 runs of one path that have just been backed up; they go first
    unvisited:             nodes, by their first pages, whose host pages are still to be stored, and all below them
    num_awaited_exchanges: no STORE begins, and nothing is asked, before so many exchanges of ranks have been read
    """

    def __init__(self, tiers: Tiers, kinds: Kinds, decisions: Decisions, outbox: Outbox, counters: Counters):
        self.tiers = tiers
        self.kinds = kinds
        self.decisions = decisions
        self.outbox = outbox
        self.counters = counters
        self.attached = False
        self.queue: deque[list[Waiting]] = deque()
        self.unvisited: list[Waiting] = []
        self.num_awaited_exchanges = 0
        self.live: dict[int, LiveStore] = {}
        self.known_stored: OrderedDict[PageName, bool] = OrderedDict()
        self.units = [kind.unit_pages() for kind in kinds]

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
            runs = {c: found for c in range(len(self.tiers.components)) if (found := self._runs(c, nodes))}
            if not runs:
                num_empty += 1
                if num_empty == MAX_EMPTY:
                    return  # a large tree of which little is in host memory: the rest in later steps
                continue
            moves = tuple(self._move(c, found) for c, found in runs.items())
            store = self.outbox.add(TransferKind.STORE, moves)
            keys = {move.component: move.page_keys for move in moves}
            ends = frozenset((self._name(c), run.keys[-1]) for c, found in runs.items() for run in found)
            self.live[store] = LiveStore(keys, ends)
            self._hold(store, nodes, runs)
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
        """The nodes of one path that now are where these runs were, each once, top first.

        Where the tree has changed meanwhile they may be on several paths: a run that is not below the one before it
        waits by itself.
        """
        page_bytes = self.tiers.tree.page_bytes
        path: list[Node] = []
        for i, (node, edge) in enumerate(runs):
            if path and not _is_at_or_below(node, path[-1]):
                self.queue.appendleft(runs[i:])
                break
            at = 0
            while at < len(edge):
                child = node.children.get(bytes(edge[at : at + page_bytes]))
                if child is None:
                    break
                node = child
                path.append(node)
                at += len(child.edge)
        return path

    def drop_waiting(self) -> None:
        self.counters["dropped_stores"] += len(self.queue)
        self.queue.clear()
        self.unvisited.clear()

    def exchanged(self) -> None:
        """An exchange of ranks has been read."""
        self.num_awaited_exchanges -= self.num_awaited_exchanges > 0

    def forget(self) -> None:
        """What was known to be stored, and what is being stored, may not be there."""
        self.known_stored.clear()
        self.live = dict.fromkeys(self.live, LiveStore({}, frozenset()))
        for store in self.live:
            self.tiers.holds.release_device(store)

    def forgotten(self) -> list[int]:
        """STOREs of which only quiet is awaited: whether they get further is of no interest."""
        return [id for id, store in self.live.items() if not store.keys]

    def withdraw(self, store: int) -> None:
        """Takes back one that was not applied and will not be; what it would have stored still has to be."""
        keys, _ = self.live.pop(store)
        self.tiers.holds.release(store)
        self.counters["store_pages"] -= sum(map(len, keys.values()))
        if self.attached:
            self.back_fill()

    def _may_be_held(self, node: Node) -> bool:
        """Holding an entry relies on the node's full pages in the same tier."""
        return node.pages[self.kinds.full.host.index] is not None

    def _hold(self, store: int, nodes: list[Node], runs: dict[int, list[Run]]) -> None:
        """Pins the entries that are there: a node that holds nothing may leave, and pins above it would be lost."""
        tiers = self.tiers
        for node in nodes:
            for kind in self.kinds:
                if node.pages[kind.host.index] is not None:
                    tiers.holds.add(store, kind.host, node, kind.top_of(node))
        for c, found in runs.items():
            for run in found:
                node: Node | None = run.node
                while node is not None and node.end > run.start:  # each for itself: a split or a drop may part them
                    if node not in nodes:
                        tiers.holds.add(store, tiers.host[c], node, node.start)
                    node = node.parent

    def _name(self, c: int) -> str:
        return self.tiers.components[c].name

    def _runs(self, c: int, nodes: list[Node]) -> list[Run]:
        """The host pages of component c that are there and not known to be stored. nodes: of one path, top first

        A run that begins inside a unit, where no run has ended, may leave another prompt inside one of its values,
        which is of no use here: what is before it in the unit comes, too, as a run of its own that later ones find.
        """
        page_tokens = self.tiers.page_tokens
        found: list[Run] = []
        above: list[Run] = []
        for node in nodes:
            page_ids = node.pages[self.tiers.host[c].index]
            if page_ids is None:
                continue
            keys = self.tiers.tree.keys(node)[-len(page_ids) :]
            first = node.end - len(page_ids) * page_tokens
            for part in consecutive([i for i, key in enumerate(keys) if (self._name(c), key) not in self.known_stored]):
                start = first + part.start * page_tokens
                if not (found and found[-1].end(page_tokens) == start):
                    above += self._above(c, node, start)
                found.append(Run(node, start, page_ids[part.start : part.stop], keys[part.start : part.stop]))
        return found + above

    def _above(self, c: int, node: Node, start: int) -> list[Run]:
        """What is before `start` in its unit of storage, on the path to `node`; nothing where a run has ended there."""
        page_tokens = self.tiers.page_tokens
        floor = start // (self.units[c] * page_tokens) * self.units[c] * page_tokens
        if start == node.start and start > floor:
            assert node.parent is not None
            node = node.parent
        if start == floor or self._run_ended(c, self.tiers.tree.keys(node)[(start - node.start) // page_tokens - 1]):
            return []
        last, stop = node, start
        keys: list[bytes] = []
        page_ids: list[PageIds] = []
        while node.parent is not None and start > floor:
            there = node.pages[self.tiers.host[c].index]
            first = node.end if there is None else max(floor, node.end - len(there) * page_tokens)
            if there is None or first >= start:
                break
            from_end = slice(-((node.end - first) // page_tokens), -((node.end - start) // page_tokens) or None)
            keys[:0] = self.tiers.tree.keys(node)[from_end]
            page_ids.insert(0, there[from_end])
            start = first
            node = node.parent
            if node.end != start:
                break
        return [Run(last, start, joined(page_ids), keys)] if stop > start else []

    def _run_ended(self, c: int, key: bytes) -> bool:
        """Whether a stored run, or one on its way, ends with this page."""
        name = (self._name(c), key)
        return self.known_stored.get(name, False) or any(name in store.run_ends for store in self.live.values())

    def _move(self, c: int, runs: list[Run]) -> Move:
        page = self.tiers.page_tokens
        ends = tuple(run.start + (i + 1) * page for run in runs for i in range(len(run.keys)))
        keys = tuple(key for run in runs for key in run.keys)
        return Move(self._name(c), joined([run.page_ids for run in runs]), page_keys=keys, page_ends=ends)

    def commit(self, store: int, outcome: Outcome) -> None:
        """Lets the pages go when every rank is quiet; those on the device when it is decided."""
        if not outcome.quiet:
            if outcome.done:
                self.tiers.holds.release_device(store)
            return
        keys, run_ends = self.live.pop(store)
        self.tiers.holds.release(store)
        for component, page_keys in keys.items():
            good = outcome.pages.get(component, 0)
            self.mark_stored(component, page_keys[:good], run_ends)
            self.counters["stored_pages"] += good
            self.counters["failed_store_pages"] += len(page_keys) - good
        self.decisions.note("stored", store)

    def mark_stored(self, component: str, page_keys: tuple[bytes, ...], run_ends: frozenset[PageName]) -> None:
        """These need not be written again."""
        for key in page_keys:
            name = (component, key)
            self.known_stored[name] = self.known_stored.get(name, False) or name in run_ends
            self.known_stored.move_to_end(name)
        while len(self.known_stored) > self.tiers.config.max_stored_beliefs:
            self.known_stored.popitem(last=False)

    def mark_lost(self, component: str, page_keys: tuple[bytes, ...]) -> None:
        """Storage has lost these: write them again when there is an occasion."""
        for key in page_keys:
            self.known_stored.pop((component, key), None)


def joined(page_ids: list[PageIds]) -> PageIds:
    """One array; the ids of an entry never change in place."""
    return page_ids[0] if len(page_ids) == 1 else np.concatenate(page_ids)


def consecutive(numbers: list[int]) -> list[range]:
    """Numbers in order, as ranges of consecutive ones."""
    found: list[range] = []
    for number in numbers:
        if found and number == found[-1].stop:
            found[-1] = range(found[-1].start, number + 1)
        else:
            found.append(range(number, number + 1))
    return found


def _is_at_or_below(node: Node, above: Node) -> bool:
    """Whether `above` is this node, or on the path to it."""
    at: Node | None = node
    while at is not None and at.end > above.end:
        at = at.parent
    return at is above
