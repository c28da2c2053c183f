"""Events: which pages came and went, for routers that send a request to the replica that has its prefix.

    core --ChangeLog--> EventStream --BlockStored, BlockRemoved, AllCleared--> any thread that takes them

The core notes changes of nodes; here a mirror of its nodes turns them into changes of pages, and hashes the page keys.
A replay of the events holds exactly the (tier, component, page key) that the tree holds and a request can find.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxcache.core import change_log
from jaxcache.core.tiers import Tiers
from jaxcache.core.tokens import chain
from jaxcache.core.tree import compact
from jaxcache.types import AllCleared, BlockRemoved, BlockStored, Event

PIECE_PAGES, YIELD_S = 32, 1e-6  # pages hashed at once, and how long others are let in after them

COUNTERS: dict[type, str] = {
    BlockStored: "block_stored_events",
    BlockRemoved: "block_removed_events",
    AllCleared: "all_cleared_events",
}


class Space:
    """What lies below one root. retired: nothing of it can be found, so nothing of it is said any more."""

    __slots__ = ("digest", "nodes", "retired")

    def __init__(self, digest: bytes, retired: bool):
        self.digest = digest
        self.retired = retired
        self.nodes: dict[int, MirrorNode] = {}  # by id, without the root


class MirrorNode:
    """A run of pages. edge: token bytes; keys: one per page; holds: by residency. A root has its digest as a key."""

    __slots__ = ("edge", "holds", "keys", "parent_key", "space")

    def __init__(self, space: Space, parent_key: bytes, edge: bytes | memoryview, keys: list[bytes], holds: list[bool]):
        self.space = space
        self.parent_key = parent_key
        self.edge = edge
        self.keys = keys
        self.holds = holds


class EventStream:
    """The events of one cache, for one consumer: what is taken is gone."""

    def __init__(self, tiers: Tiers):
        assert tiers.log is not None, "events are on"
        self._log = tiers.log
        self._page_tokens = tiers.page_tokens
        self._page_bytes = tiers.tree.page_bytes
        self._residencies = [(r.tier, r.component.name, r.component.is_paged) for r in tiers.residencies]
        self._nodes: dict[int, MirrorNode] = {}
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._counts = dict.fromkeys(COUNTERS.values(), 0)
        self._actions = {
            change_log.ROOT: self._root,
            change_log.RETIRED: self._retired,
            change_log.ADDED: self._added,
            change_log.SPLIT: self._split,
            change_log.SHORTENED: self._shortened,
            change_log.REMOVED: self._removed,
            change_log.PUT: self._put,
            change_log.TAKEN: self._taken,
            change_log.RESTARTED: self._restarted,
        }

    def take(self) -> list[Event]:
        """What happened since the last time, oldest first. Thread-safe; hashes what was stored since."""
        with self._lock:
            self._apply(self._log.take())
            events, self._events = self._events, []
            for event in events:
                self._counts[COUNTERS[type(event)]] += 1
        return events

    def counts(self) -> dict[str, int]:
        """How many events of each kind were taken."""
        return dict(self._counts)

    # ---- what is said

    def _say_stored(self, node: MirrorNode, index: int) -> None:
        if node.space.retired:
            return
        tier, component, is_paged = self._residencies[index]
        first = 0 if is_paged else len(node.keys) - 1
        parent_key = node.keys[first - 1] if first else node.parent_key
        token_ids = np.frombuffer(node.edge, np.int32)[first * self._page_tokens :]
        keys = tuple(node.keys[first:])
        digest = node.space.digest
        self._events.append(BlockStored(digest, tier, component, keys, parent_key, token_ids, self._page_tokens))

    def _say_removed(self, node: MirrorNode, index: int, first: int = 0) -> None:
        if node.space.retired:
            return
        tier, component, is_paged = self._residencies[index]
        first = first if is_paged else len(node.keys) - 1
        self._events.append(BlockRemoved(tier, component, tuple(node.keys[first:])))

    def _say_all_removed(self, node: MirrorNode, first: int = 0) -> None:
        for index, held in enumerate(node.holds):
            if held:
                self._say_removed(node, index, first)

    # ---- the mirror, one method for each kind of change

    def _apply(self, changes: Iterable[tuple[Any, ...]]) -> None:
        for kind, *details in changes:
            self._actions[kind](*details)

    def _node(self, id: int) -> MirrorNode:
        node = self._nodes.get(id)
        assert node is not None, f"I13: node {id} was never added"
        return node

    def _root(self, id: int, digest: bytes, retired: bool) -> None:
        self._nodes[id] = MirrorNode(Space(digest, retired), b"", b"", [digest], [])

    def _retired(self, id: int) -> None:
        space = self._node(id).space
        for node in space.nodes.values():
            self._say_all_removed(node)
        space.retired = True
        del self._nodes[id]

    def _added(self, id: int, parent_id: int, edge: bytes | memoryview) -> None:
        parent = self._node(parent_id)
        parent_key = parent.keys[-1]
        keys = _keys(parent_key, edge, self._page_bytes)
        node = MirrorNode(parent.space, parent_key, edge, keys, [False] * len(self._residencies))
        self._nodes[id] = parent.space.nodes[id] = node

    def _split(self, id: int, prefix_id: int, num_pages: int) -> None:
        """Says nothing: every page stays where it is."""
        node = self._node(id)
        space = node.space
        edge = memoryview(node.edge)
        cut = num_pages * self._page_bytes
        pairs = zip(node.holds, self._residencies, strict=True)
        holds = [held and is_paged for held, (_, _, is_paged) in pairs]
        prefix = MirrorNode(space, node.parent_key, compact(edge[:cut]), node.keys[:num_pages], holds)
        node.edge, node.keys, node.parent_key = compact(edge[cut:]), node.keys[num_pages:], prefix.keys[-1]
        self._nodes[prefix_id] = space.nodes[prefix_id] = prefix

    def _shortened(self, id: int, num_pages: int) -> None:
        node = self._node(id)
        self._say_all_removed(node, num_pages)
        node.keys = node.keys[:num_pages]
        node.edge = compact(memoryview(node.edge)[: num_pages * self._page_bytes])

    def _removed(self, id: int) -> None:
        node = self._node(id)
        self._say_all_removed(node)
        del self._nodes[id], node.space.nodes[id]

    def _put(self, id: int, index: int) -> None:
        node = self._node(id)
        assert not node.holds[index], f"I13: node {id} has an entry in {self._residencies[index]} already"
        node.holds[index] = True
        self._say_stored(node, index)

    def _taken(self, id: int, index: int) -> None:
        node = self._node(id)
        assert node.holds[index], f"I13: node {id} has no entry in {self._residencies[index]}"
        node.holds[index] = False
        self._say_removed(node, index)

    def _restarted(self, changes: list[tuple[Any, ...]]) -> None:
        self._nodes.clear()
        self._events.append(AllCleared())
        self._apply(changes)


def _keys(parent_key: bytes, edge: bytes | memoryview, page_bytes: int) -> list[bytes]:
    """As `chain`, by pieces of 40 us: hashing a page keeps the interpreter's lock, for which the serving thread would
    wait 5 ms each time that it needs it again."""
    keys: list[bytes] = []
    for start in range(0, len(edge), PIECE_PAGES * page_bytes):
        piece = memoryview(edge)[start : start + PIECE_PAGES * page_bytes]
        keys += chain(keys[-1] if keys else parent_key, piece, page_bytes)
        time.sleep(YIELD_S)
    return keys
