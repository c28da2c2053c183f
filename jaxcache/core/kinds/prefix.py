"""Full attention: resuming at n needs every page before n. It is the tree itself, so every node has an entry of it."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from jaxcache.core.kinds.base import Extra, Kind, keep_duplicates
from jaxcache.core.lease import Lease, read_only
from jaxcache.core.node import Node
from jaxcache.core.pages import Residency
from jaxcache.types import PageIds, Span


class PrefixResidency(Residency):
    """Entries leave from the outside in: pages of a node only after those of all its children."""

    is_closed: ClassVar[bool] = True
    output_leaves_first: ClassVar[bool] = True

    __slots__ = ()

    def evictable(self, node: Node) -> bool:
        index = self.index
        return node.pages[index] is not None and not node.pins[index] and not node.resident_children[index]

    def put(self, node: Node, page_ids: PageIds) -> None:
        index = self.index
        num_pinned = self._come(node, page_ids)
        parent = node.parent
        assert parent is not None
        siblings = parent.resident_children[index]
        if not siblings:
            self.order.discard(parent)
        parent.resident_children[index] = siblings + 1
        if not num_pinned and not node.resident_children[index]:
            self._candidate(node)

    def take(self, node: Node) -> PageIds:
        index = self.index
        parent = node.parent
        assert parent is not None and not node.resident_children[index], f"I6: {node=} has children"
        page_ids = self._leave(node)
        parent.resident_children[index] = siblings = parent.resident_children[index] - 1
        if not siblings and parent.pages[index] is not None and not parent.pins[index]:
            self.order.readmit(parent)
        return page_ids

    def shorten(self, node: Node, num_pages: int) -> PageIds:
        return self._cut(node, num_pages)

    def split(self, node: Node, prefix: Node, num_pages: int) -> None:
        index = self.index
        prefix.pins[index] = node.pins[index]
        pages = node.pages[index]
        if pages is not None:
            prefix.pages[index], node.pages[index] = pages[:num_pages], pages[num_pages:]
            prefix.resident_children[index] = 1


class Prefix(Kind, name="prefix"):
    """The pages of every token."""

    residency: ClassVar[type[Residency]] = PrefixResidency

    def first_needed(self, n: int) -> int:
        return 0

    def num_entry_pages(self, num_tokens: int) -> int:
        return num_tokens // self.page_tokens

    def num_needed_pages(self, start: int, end: int) -> int:
        return max(0, end - start) // self.page_tokens

    def top_of(self, node: Node) -> int:
        return node.start

    def top_needed(self, node: Node) -> int:
        return 0

    def device_tokens(self, num_tokens: int, node: Node, extras: tuple[Extra, ...]) -> int:
        """Leading tokens of a prefix, which ends in `node`, that need no load-back."""
        while node.parent is not None and node.pages[self.c] is None:
            node = node.parent
            num_tokens = node.end
        return num_tokens

    # ---- leases

    def num_own_pages(self, num_cached: int, end: int) -> int:
        return -(-end // self.page_tokens) - num_cached // self.page_tokens

    def fits_at_once(self, num_tokens: int, node: Node, num_own: int) -> bool:
        """Whether nothing has to be loaded, and even more than a lease takes is available: without a look at the path,
        and true nearly always."""
        if num_tokens and node.pages[self.c] is None:
            return False
        return num_own + num_tokens // self.page_tokens <= self.device.available(node.account)

    def pin(self, lease: Lease) -> list[PageIds | None]:
        """Up to the root, where each node is hit. Returns what the nodes have, the deepest first."""
        c, device = self.c, self.device
        order, before, first_step = device.order, device.num_pinned, lease.first_step
        pieces = []
        node = lease._node
        parent = node.parent
        while parent is not None:
            node.hits += 1
            if node.ready_step > first_step:
                first_step = node.ready_step
            page_ids, pins = node.pages[c], node.pins
            pieces.append(page_ids)
            if not pins[c]:
                if page_ids is not None:
                    device.num_pinned += len(page_ids)
                if not node.resident_children[c]:
                    order.discard(node)
            pins[c] += 1
            node, parent = parent, parent.parent
        lease.first_step = first_step
        if device.accounts is not None:
            device.accounts.count(lease._node.account, 0, device.num_pinned - before)
        return pieces

    def pages_on_path(self, lease: Lease) -> list[PageIds | None]:
        """The same again, when what was missing has its place on the device (making room may have split some)."""
        pieces, node = [], lease._node
        while node.parent is not None:
            pieces.append(node.pages[self.c])
            node = node.parent
        return pieces

    def open(self, lease: Lease, pieces: list[PageIds | None], num_own: int) -> None:
        """Makes the table, of what `pin` has returned, as it is now, and of own pages."""
        pieces.reverse()
        pieces.append(self.device.allocator.allocate_view(num_own))
        lease.table = read_only(np.concatenate(pieces))  # pyright: ignore[reportCallIssue, reportArgumentType]

    def extend(self, lease: Lease, num_pages: int) -> None:
        lease.table = read_only(np.concatenate([lease.table, self.device.allocator.allocate_view(num_pages)]))

    def publish(self, lease: Lease, child: Node, at: int) -> int:
        """The pages of [at, child.end) become the tree's, or give way to those that it has; pinned in either case.

        Returns how many it had.
        """
        c, page = self.c, self.page_tokens
        pages = slice(at // page, child.end // page)
        theirs = child.pages[c]
        if theirs is None:
            mine = lease.table[pages]  # tables never change: a view, unless it keeps a much larger one alive
            self.device.publish(child, mine if 2 * len(mine) >= len(lease.table) else mine.copy())
            child.parent.resident_children[c] += 1  # pyright: ignore[reportOptionalMemberAccess]
            self.tiers.tree.version += 1
            return 0
        self.device.pin(child)
        keep_duplicates(lease, c, lease.table[pages])
        if not self.tiers.config.stable_tables:  # the old table was handed out
            lease.table = lease.table.copy()
            lease.table[pages] = theirs
            read_only(lease.table)
        return len(theirs)

    def release(self, lease: Lease) -> None:
        first = lease._published // self.page_tokens
        if first < len(lease.table):
            self.device.allocator.free(lease.table[first:])
        self.device.unpin_up(lease._node)

    def owned(self, lease: Lease) -> list[PageIds]:
        return [lease.table[lease._published // self.page_tokens :]]

    # ---- host memory and storage

    def may_be_in_host(self, node: Node) -> bool:
        """Closure: those of the parent are there."""
        parent = node.parent
        assert parent is not None
        return parent.parent is None or super().may_be_in_host(parent)

    def asked_ends(self, start: int, ends: list[int]) -> list[int]:
        return list(range(start + self.page_tokens, ends[-1] + 1, self.page_tokens))

    def span_of(self, node: Node, end: int) -> Span | None:
        return Span(node.start, end)
