"""The radix tree: nodes are runs of whole pages. Knows tokens, not pages: where a node's pages are is its residencies'
business, and the arrays indexed by residency on a node are only kept here.

    root --[ 0 .. 4 pages ]-- a --[ 2 pages ]-- b            an edge is int32 tokens as bytes
                              \\--[ 7 pages ]-- c            children are keyed by the bytes of their first page

One edge is compared with one `startswith`: no copy and no work per page. A split takes views (slicing bytes would
copy). Ids count up in the order of the calls, so they are equal on every rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxcache.core.change_log import REMOVED, RETIRED, ROOT, SHORTENED, SPLIT, ChangeLog
from jaxcache.core.node import Node
from jaxcache.core.tokens import Namespace, Sequence, chain


def compact(edge: memoryview) -> memoryview | bytes:
    """An edge that does not keep a much larger prompt alive: a view of at least a quarter of it, else a copy."""
    whole: Any = edge.obj
    return edge if 4 * len(edge) >= len(whole) else bytes(edge)


class RadixTree:
    """One root per namespace.

    version: changes with whatever could change the answer to a match
    log:     where every change is noted, if events are on
    retired_roots: by id, as long as anything hangs below them
    """

    def __init__(self, page_tokens: int, num_residencies: int, log: ChangeLog | None):
        self.page_tokens = page_tokens
        self.page_bytes = page_tokens * 4
        self.num_residencies = num_residencies
        self.log = log
        self.roots: dict[bytes, Node] = {}
        self.namespaces: dict[bytes, Namespace] = {}
        self.retired_roots: dict[int, Node] = {}
        self.retired: dict[bytes, None] = {}  # digests of namespaces that must not come back
        self.version = 0
        self.num_nodes = 0
        self._last_id = 0

    def _node(self, parent: Node | None, edge: Any, first_page: bytes, end: int) -> Node:
        self._last_id += 1
        return Node(self._last_id, parent, edge, first_page, end, self.num_residencies)

    def root(self, namespace: Namespace) -> Node:
        root = self.roots.get(namespace.digest)
        if root is None:
            root = self.roots[namespace.digest] = self._node(None, b"", b"", 0)
            root.keys = [namespace.digest]
            self.namespaces[namespace.digest] = namespace
            if self.log is not None:
                self.log.append((ROOT, root.id, namespace.digest, False))
        return root

    def retire(self, namespace: Namespace) -> None:
        """Makes everything below a namespace unreachable, in O(1); its nodes leave as their pages are evicted."""
        namespace.retired = True
        self.retired[namespace.digest] = None
        root = self.roots.pop(namespace.digest, None)
        self.namespaces.pop(namespace.digest, None)
        if root is not None:
            if root.children:
                self.retired_roots[root.id] = root
            if self.log is not None:
                self.log.append((RETIRED, root.id))
        self.version += 1

    def all_roots(self) -> list[Node]:
        return [*self.roots.values(), *self.retired_roots.values()]

    def find(self, sequence: Sequence, limit: int) -> tuple[Node, int]:
        """(deepest node that agrees with a sequence's whole pages in [0, limit), end of what agrees), or (root, 0).

        Only this node may agree in part. Asking again while the tree is the same is O(1); after a change it continues
        from the node of the last time, if that is still there.
        """
        if sequence.found_version == self.version and sequence.found_limit == limit:
            return sequence.found, sequence.found_end
        data = sequence.data if type(sequence.data) is bytes else bytes(sequence.data)
        page_bytes = self.page_bytes
        stop = limit // self.page_tokens * page_bytes
        node = self._resume(sequence, stop)
        end = node.end
        offset = end * 4
        while offset < stop:
            child = node.children.get(data[offset : offset + page_bytes])
            if child is None:
                break
            if child.end > limit or not data.startswith(child.edge, offset):
                node, end = child, (offset + self.common_bytes(child.edge, data, offset, stop)) // 4
                break
            node = child
            end = node.end
            offset = end * 4
        sequence.found_version = -1  # until all of it is noted: an interrupt may come between any two of these
        sequence.found_end = 0
        sequence.prefix = sequence.match = None
        sequence.found = node
        sequence.found_end = end
        sequence.found_limit = limit
        sequence.found_version = self.version
        return node, end

    def walk(self, sequence: Sequence, limit: int) -> list[tuple[Node, int]]:
        """The way to what `find` finds: (node, end of what agrees) from the top; only the last may be partial."""
        node, end = self.find(sequence, limit)
        path = []
        while node.parent is not None:
            path.append((node, end))
            node = node.parent
            end = node.end
        path.reverse()
        return path

    @staticmethod
    def _resume(sequence: Sequence, stop: int) -> Node:
        """The deepest node that was found the last time, is still in the tree and agrees wholly, up to byte `stop`."""
        node, end = sequence.found, sequence.found_end
        while node.parent is not None and (node.end > end or node.end * 4 > stop):
            node = node.parent
        return sequence.root if node.parent is None else node

    def common_bytes(self, edge: Any, data: bytes | bytearray, offset: int, stop: int) -> int:
        """How many bytes of whole pages of `edge` agree with data[offset:stop]. Compares in growing blocks."""
        num_bytes = min(len(edge), stop - offset)
        if data.startswith(memoryview(edge)[:num_bytes], offset):  # a prompt that is sent again
            return num_bytes
        num_tokens = num_bytes // 4
        ours = np.frombuffer(edge, np.int32, num_tokens)
        theirs = np.frombuffer(data, np.int32, num_tokens, offset)
        low, block = 0, 256
        while low < num_tokens:
            high = min(low + block, num_tokens)
            differs = ours[low:high] != theirs[low:high]
            first = int(differs.argmax())
            if differs[first]:
                return (low + first) // self.page_tokens * self.page_bytes
            low = high
            block *= 4
        return num_tokens // self.page_tokens * self.page_bytes

    def add(self, parent: Node, first_page: bytes, edge: bytes | memoryview, end: int) -> Node:
        self._last_id += 1
        node = parent.children[first_page] = Node(self._last_id, parent, edge, first_page, end, self.num_residencies)
        self.version += 1
        self.num_nodes += 1
        if self.log is not None:
            self.log.added(node.id, parent.id, edge)
        return node

    def split(self, node: Node, at: int) -> Node:
        """Cuts a node at token `at`; the new node is the prefix, so leases that end at `node` still do.

        parent --[ edge ]-- node    becomes    parent --[ prefix ]-- new --[ rest ]-- node
        """
        parent = node.parent
        assert parent is not None and node.start < at < node.end and at % self.page_tokens == 0, f"{node=} {at=}"
        cut = (at - node.start) * 4
        edge = memoryview(node.edge)
        prefix = self._node(parent, compact(edge[:cut]), node.first_page, at)
        prefix.ready_step = node.ready_step
        prefix.hits = node.hits
        prefix.last_used = node.last_used
        prefix.is_output = node.is_output
        prefix.priority = node.priority
        prefix.retained = node.retained
        prefix.use = node.use
        if node.keys is not None:
            pages = cut // self.page_bytes
            prefix.keys, node.keys = node.keys[:pages], node.keys[pages:]
        parent.children[node.first_page] = prefix
        node.edge = compact(edge[cut:])
        node.first_page = bytes(node.edge[: self.page_bytes])
        node.parent = prefix
        prefix.children[node.first_page] = node
        self.version += 1
        self.num_nodes += 1
        if self.log is not None:
            self.log.append((SPLIT, node.id, prefix.id, cut // self.page_bytes))
        return prefix

    def shorten(self, node: Node, num_pages: int) -> bytes:
        """Cuts off what follows the first pages of a childless node; returns the first page of that."""
        assert not node.children, f"{node=} has children"
        page_bytes = self.page_bytes
        cut = num_pages * page_bytes
        edge = node.edge if type(node.edge) is memoryview else memoryview(node.edge)
        lost = bytes(edge[cut : cut + page_bytes])
        node.end -= (len(edge) - cut) // 4
        node.edge = edge = edge[:cut]
        if 4 * cut < len(edge.obj):  # pyright: ignore[reportArgumentType]
            node.edge = bytes(edge)  # a view would keep a much larger prompt alive
        if node.keys is not None:
            node.keys = node.keys[:num_pages]
        self.version += 1
        if self.log is not None:
            self.log.append((SHORTENED, node.id, num_pages))
        return lost

    def remove(self, node: Node) -> None:
        """Takes a childless node out; from then on its parent is None."""
        parent = node.parent
        assert parent is not None and not node.children and not node.ends_here, f"{node=} has children or a lease"
        del parent.children[node.first_page]
        node.parent = None
        if parent.parent is None and not parent.children:
            self.retired_roots.pop(parent.id, None)
        self.version += 1
        self.num_nodes -= 1
        if self.log is not None:
            self.log.append((REMOVED, node.id))

    def keys(self, node: Node) -> list[bytes]:
        """Page keys of a node's pages, chained from the namespace; computed once per node."""
        missing = []
        above = node
        while above.keys is None:
            missing.append(above)
            above = above.parent
            assert above is not None, "a root has the namespace digest as its key"
        for below in reversed(missing):
            assert below.parent is not None and below.parent.keys is not None
            below.keys = chain(below.parent.keys[-1], below.edge, self.page_bytes)
        assert node.keys is not None
        return node.keys
