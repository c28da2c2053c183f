"""What changed in the tree and its residencies, as flat tuples: what the public events are made of, in another thread.

    serving thread --append--> changes --take--> runtime/events.py

Nothing is hashed or copied here. Appending and taking are single operations on a deque, so they need no lock; every
number has one thread that writes it.

    (ROOT, root id, namespace digest, whether it is retired)
    (RETIRED, root id)                                              nothing is added below it any more
    (ADDED, node id, parent's id, token bytes)
    (SPLIT, node id, id of the new prefix, pages of the prefix)     entries go where Residency.split puts them
    (SHORTENED, node id, pages left)                                entries are cut with it
    (REMOVED, node id)                                              with the entries that it still has
    (PUT, node id, residency index)
    (TAKEN, node id, residency index)
    (RESTARTED, changes)                                            nothing before counts; these make what is there
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

from jaxcache.core.node import Node

ROOT, RETIRED, ADDED, SPLIT, SHORTENED, REMOVED, PUT, TAKEN, RESTARTED = range(9)

MAX_LOGGED_BYTES = 256 * 2**20  # tokens that the log alone may keep alive


class Tree(Protocol):
    """What is there now. roots: of namespaces, by digest; retired_roots: by id"""

    roots: dict[bytes, Node]
    retired_roots: dict[int, Node]

    def all_roots(self) -> list[Node]: ...


class ChangeLog:
    """append: what the tree and the residencies call. Bounded: the thread that takes may be slow or not there."""

    def __init__(self, max_changes: int):
        self.max_changes = max_changes
        self._changes: deque[tuple[Any, ...]] = deque()
        self.append = self._changes.append
        self._logged_bytes = 0  # written by the serving thread
        self._taken_bytes = 0  # written by the thread that takes

    def __len__(self) -> int:
        return len(self._changes)

    def added(self, node_id: int, parent_id: int, edge: bytes | memoryview) -> None:
        self._logged_bytes += len(edge)
        self.append((ADDED, node_id, parent_id, edge))

    def take(self) -> Iterator[tuple[Any, ...]]:
        """What has been logged until now, oldest first. From any thread, but one at a time."""
        for _ in range(len(self._changes)):
            try:
                change = self._changes.popleft()
            except IndexError:  # restarted meanwhile
                return
            if change[0] == ADDED:
                self._taken_bytes += len(change[3])
            yield change

    def overflows(self) -> bool:
        return len(self._changes) > self.max_changes or self._logged_bytes - self._taken_bytes > MAX_LOGGED_BYTES

    def restart(self, tree: Tree) -> None:
        """Forgets what nobody took and logs what is there now, as one change; between two calls of the core only."""
        changes: list[tuple[Any, ...]] = []
        for roots, retired in ((tree.roots.values(), False), (tree.retired_roots.values(), True)):
            for root in roots:
                assert root.keys is not None, f"{root=} has its namespace's digest as its key"
                changes.append((ROOT, root.id, root.keys[0], retired))
        stack = [child for root in tree.all_roots() for child in root.children.values()]
        while stack:
            node = stack.pop()
            assert node.parent is not None
            changes.append((ADDED, node.id, node.parent.id, node.edge))
            changes += [(PUT, node.id, index) for index, pages in enumerate(node.pages) if pages is not None]
            stack += node.children.values()
        changes += [(RETIRED, root.id) for root in tree.retired_roots.values()]
        self._changes.clear()
        self._logged_bytes = self._taken_bytes
        self.append((RESTARTED, changes))
