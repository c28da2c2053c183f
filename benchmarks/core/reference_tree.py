"""The yardstick for the core: the smallest radix tree that does the same lookups, without any feature.

One component, one tier, no namespaces, pins by node, no statistics, no transfers. It is a floor for plain Python, not
a cache: comparing the core with it in the same run says what all the features cost.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np


class Run:
    """A node: its tokens, its page ids, its children by their first page."""

    __slots__ = ("children", "edge", "first", "pages", "parent", "pins")

    def __init__(self, parent: Run | None, edge: bytes, pages: np.ndarray):
        self.parent = parent
        self.edge = edge
        self.first = b""
        self.pages = pages
        self.children: dict[bytes, Run] = {}
        self.pins = 0


class ReferenceTree:
    """match, lock, insert, unlock, evict over int32 tokens as bytes. old: unlocked runs, oldest first."""

    def __init__(self, page_tokens: int, num_pages: int):
        self.page_bytes = page_tokens * 4
        self.root = Run(None, b"", np.empty(0, np.int32))
        self.root.pins = 1
        self.free = np.arange(num_pages, dtype=np.int32)
        self.num_free = num_pages
        self.old: OrderedDict[Run, None] = OrderedDict()

    def match(self, tokens: bytes) -> tuple[Run, int]:
        """(deepest run, bytes that agree); splits a run that agrees in part."""
        page_bytes, node, at = self.page_bytes, self.root, 0
        stop = len(tokens) // page_bytes * page_bytes
        while at < stop:
            child = node.children.get(tokens[at : at + page_bytes])
            if child is None:
                break
            if tokens.startswith(child.edge, at):
                at += len(child.edge)
                node = child
                continue
            agreed = self._agreed(child.edge, tokens, at)
            node, at = self._split(child, agreed), at + agreed
            break
        return node, at

    def _agreed(self, edge: bytes, tokens: bytes, at: int) -> int:
        num = min(len(edge), len(tokens) - at) // 4
        differs = np.frombuffer(edge, np.int32, num) != np.frombuffer(tokens, np.int32, num, at)
        first = int(differs.argmax())
        same = first if differs[first] else num
        return same * 4 // self.page_bytes * self.page_bytes

    def _split(self, node: Run, cut: int) -> Run:
        assert node.parent is not None
        k = cut // self.page_bytes
        prefix = Run(node.parent, node.edge[:cut], node.pages[:k])
        prefix.first, prefix.pins = node.first, node.pins
        node.parent.children[node.first] = prefix
        node.edge, node.pages, node.parent = node.edge[cut:], node.pages[k:], prefix
        node.first = node.edge[: self.page_bytes]
        prefix.children[node.first] = node
        if not prefix.pins:
            self.old[prefix] = None
        return prefix

    def lock(self, node: Run) -> None:
        while node.parent is not None:
            if not node.pins:
                del self.old[node]
            node.pins += 1
            node = node.parent

    def unlock(self, node: Run) -> None:
        while node.parent is not None:
            node.pins -= 1
            if not node.pins:
                self.old[node] = None
            node = node.parent

    def insert(self, node: Run, at: int, tokens: bytes) -> Run:
        """Adds what follows `at` below a locked node, and locks it."""
        stop = len(tokens) // self.page_bytes * self.page_bytes
        if at >= stop:
            return node
        count = (stop - at) // self.page_bytes
        self.make_room(count)
        self.num_free -= count
        child = Run(node, tokens[at:stop], self.free[self.num_free : self.num_free + count].copy())
        child.first = child.edge[: self.page_bytes]
        node.children[child.first] = child
        child.pins = 1
        return child

    def make_room(self, num_pages: int) -> None:
        while self.num_free < num_pages:
            self.evict_one()

    def evict_one(self) -> None:
        """The oldest unlocked run without children; unlocking goes bottom-up, so leaves are older than parents."""
        for node in self.old:
            if not node.children:
                break
        else:
            raise MemoryError("everything is locked")
        del self.old[node]
        assert node.parent is not None
        del node.parent.children[node.first]
        self.free[self.num_free : self.num_free + len(node.pages)] = node.pages
        self.num_free += len(node.pages)

    def table(self, node: Run) -> np.ndarray:
        """The page ids down to a run, which a model needs to read them."""
        parts = []
        while node.parent is not None:
            parts.append(node.pages)
            node = node.parent
        return np.concatenate(parts[::-1]) if parts else self.root.pages

    def serve(self, tokens: bytes) -> int:
        """One request: returns the bytes that were found."""
        node, found = self.match(tokens)
        self.lock(node)
        node = self.insert(node, found, tokens)
        self.table(node)
        self.unlock(node)
        return found
