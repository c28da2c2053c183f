"""Where the nodes' pages are: one residency per (component, tier).

    capacity = free + resident (on nodes, evictable or pinned) + held by leases, tickets, transfers
    available = free + resident - pinned            exact, because every pin also pins full attention up to the root

An entry is `node.pages[index]`. The order of eviction holds exactly the entries that may leave: unpinned and, for
prefix components, without a resident child (closure: pages leave from the outside in).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from jaxcache.components.base import Component, Reach
from jaxcache.core.change_log import PUT, TAKEN, ChangeLog
from jaxcache.core.eviction import EvictionOrder
from jaxcache.core.page_allocator import PageAllocator
from jaxcache.core.radix_tree import Node
from jaxcache.types import PageIds, Tier


class Residency(ABC):
    """The entries of one (component, tier). `index` is its place in the nodes' arrays.

    output_leaves_first: whether what lies on generated text leaves before what lies on prompts
    """

    output_leaves_first: ClassVar[bool] = True

    __slots__ = ("allocator", "clock", "component", "index", "log", "num_pinned", "num_resident", "order", "tier")

    def __init__(
        self,
        component: Component,
        tier: Tier,
        index: int,
        num_pages: int,
        order: EvictionOrder,
        clock: Iterator[int],
        log: ChangeLog | None,
    ):
        self.component = component
        self.tier = tier
        self.index = index
        self.allocator = PageAllocator(num_pages)
        self.order = order
        self.clock = clock  # uses, counted over all residencies
        self.log = log  # as the tree's
        self.num_resident = 0
        self.num_pinned = 0

    def available(self) -> int:
        """Pages that an allocation could have, evicting whatever may leave."""
        return self.allocator.num_free + self.num_resident - self.num_pinned

    def serve(self, node: Node) -> None:  # noqa: B027
        """From now on room is made on behalf of the tenant that this node (or root) belongs to, if there are any."""

    def victim(self, num_pages: int) -> Node | None:
        """Who leaves next while room is made for `num_pages`."""
        return self.order.first()

    def leaving(self, victim: Node, num_pages: int) -> int:
        """How many pages the best victim has to give when `num_pages` are missing, if it can be trimmed."""
        return num_pages

    def why(self, reason: str) -> str:
        """Why an entry leaves while room is made, on all tiers together, for `reason`."""
        return reason

    @abstractmethod
    def evictable(self, node: Node) -> bool:
        """Whether the entry on a node is in the order of eviction."""

    @abstractmethod
    def put(self, node: Node, page_ids: PageIds) -> None:
        """Makes an entry; the pages belong to the tree from now on."""

    @abstractmethod
    def take(self, node: Node) -> PageIds:
        """Removes an unpinned entry; its pages belong to the caller."""

    def shorten(self, node: Node, num_pages: int) -> PageIds:
        """Keeps the first pages of an unpinned entry, in its place in the order; the others belong to the caller."""
        pages = node.pages[self.index]
        assert pages is not None and not node.pins[self.index], f"I3: {node=}"
        node.pages[self.index] = pages[:num_pages]
        self.num_resident -= len(pages) - num_pages
        return pages[num_pages:]

    @abstractmethod
    def split(self, node: Node, prefix: Node, num_pages: int) -> None:
        """Shares an entry and its pins between a node and its new prefix of `num_pages` pages."""

    def _candidate(self, node: Node) -> None:
        if node.is_output and self.output_leaves_first:
            self.order.add_oldest(node)
        else:
            self.order.add(node)

    def pin(self, node: Node) -> None:
        index = self.index
        if not node.pins[index]:
            pages = node.pages[index]
            if pages is not None:
                self.num_pinned += len(pages)
                self.order.discard(node)
        node.pins[index] += 1

    def unpin(self, node: Node) -> None:
        self.unpin_up(node, node.end - 1)

    def pin_up(self, node: Node, top: int = 0) -> int:
        """Pins a node and its ancestors down to position `top`; returns the start of the topmost one."""
        index = self.index
        if top < 0:
            top = 0  # where the root ends
        while node.end > top:
            pins = node.pins
            if not pins[index]:
                pages = node.pages[index]
                if pages is not None:
                    self.num_pinned += len(pages)
                    if not node.resident_children[index]:
                        self.order.discard(node)
            pins[index] += 1
            node = node.parent  # pyright: ignore[reportAssignmentType]
        return node.end

    def unpin_up(self, node: Node, top: int = 0, is_use: bool = True) -> None:
        """Takes back what `pin_up` did, the deepest node first: it is the first to leave. is_use: it counts as one."""
        index, order, output_leaves_first = self.index, self.order, self.output_leaves_first
        now = next(self.clock)
        if top < 0:
            top = 0  # where the root ends
        while node.end > top:
            pins = node.pins
            pins[index] = left = pins[index] - 1
            if left <= 0:
                assert not left, f"I2: {node=} {self.component.name} {self.tier.name}"
                pages = node.pages[index]
                if is_use:
                    node.last_used = -1 if node.is_output and output_leaves_first else now
                if pages is not None:
                    self.num_pinned -= len(pages)
                    if not node.resident_children[index]:
                        if not is_use:
                            order.add_back(node)
                        elif node.is_output and output_leaves_first:
                            order.add_oldest(node)
                        else:
                            order.add(node)
            node = node.parent  # pyright: ignore[reportAssignmentType]

    def touch(self, node: Node) -> None:
        """Counts as used now, if it is a candidate."""
        if node in self.order:
            self.order.discard(node)
            self.order.add(node)

    def demote(self, node: Node) -> None:
        """Leaves before all others, if it is a candidate: the next use makes it an ordinary one again."""
        if node in self.order:
            self.order.discard(node)
            self.order.add_oldest(node)

    def file_again(self, node: Node) -> None:
        """Takes its place anew, if it is a candidate: what its place depends on has changed."""
        if node in self.order:
            self.order.discard(node)
            self._candidate(node)


class PrefixResidency(Residency):
    """Full attention: entries leave from the outside in."""

    __slots__ = ()

    def evictable(self, node: Node) -> bool:
        index = self.index
        return node.pages[index] is not None and not node.pins[index] and not node.resident_children[index]

    def put(self, node: Node, page_ids: PageIds) -> None:
        index = self.index
        assert node.pages[index] is None, f"I1: {node=} has pages already"
        node.pages[index] = page_ids
        if self.log is not None:
            self.log.append((PUT, node.id, index))
        num_pages = len(page_ids)
        self.num_resident += num_pages
        parent = node.parent
        assert parent is not None
        siblings = parent.resident_children[index]
        if not siblings:
            self.order.discard(parent)
        parent.resident_children[index] = siblings + 1
        if node.pins[index]:
            self.num_pinned += num_pages
        elif not node.resident_children[index]:
            self._candidate(node)

    def take(self, node: Node) -> PageIds:
        index = self.index
        page_ids = node.pages[index]
        parent = node.parent
        assert page_ids is not None and parent is not None
        assert not node.pins[index] and not node.resident_children[index], f"I3, I6: {node=} is pinned or has children"
        node.pages[index] = None
        if self.log is not None:
            self.log.append((TAKEN, node.id, index))
        self.num_resident -= len(page_ids)
        self.order.discard(node)
        parent.resident_children[index] = siblings = parent.resident_children[index] - 1
        if not siblings and parent.pages[index] is not None and not parent.pins[index]:
            self.order.add_back(parent)
        return page_ids

    def split(self, node: Node, prefix: Node, num_pages: int) -> None:
        index = self.index
        prefix.pins[index] = node.pins[index]
        pages = node.pages[index]
        if pages is not None:
            prefix.pages[index], node.pages[index] = pages[:num_pages], pages[num_pages:]
            prefix.resident_children[index] = 1


class FreeResidency(Residency):
    """Sliding windows: an entry may leave wherever it is (a match simply gets shorter).

    Generated text leaves before prompts, but not the window or state at its end: the next turn begins there, and finds
    nothing of this one without it.
    """

    __slots__ = ()

    output_leaves_first: ClassVar[bool] = False

    def evictable(self, node: Node) -> bool:
        return node.pages[self.index] is not None and not node.pins[self.index]

    def put(self, node: Node, page_ids: PageIds) -> None:
        assert node.pages[self.index] is None, f"I1: {node=} has pages already"
        node.pages[self.index] = page_ids
        if self.log is not None:
            self.log.append((PUT, node.id, self.index))
        self.num_resident += len(page_ids)
        if node.pins[self.index]:
            self.num_pinned += len(page_ids)
        else:
            self._candidate(node)

    def take(self, node: Node) -> PageIds:
        page_ids = node.pages[self.index]
        assert page_ids is not None
        assert not node.pins[self.index], f"I3: {node=} is pinned"
        node.pages[self.index] = None
        if self.log is not None:
            self.log.append((TAKEN, node.id, self.index))
        self.num_resident -= len(page_ids)
        self.order.discard(node)
        return page_ids

    def split(self, node: Node, prefix: Node, num_pages: int) -> None:
        index = self.index
        prefix.pins[index] = node.pins[index]
        pages = node.pages[index]
        if pages is not None:
            prefix.pages[index], node.pages[index] = pages[:num_pages], pages[num_pages:]
            if not prefix.pins[index]:
                self._candidate(prefix)


class PointResidency(FreeResidency):
    """Recurrent states: one slot, at the end of its node; a split leaves it and its pins there."""

    __slots__ = ()

    def split(self, node: Node, prefix: Node, num_pages: int) -> None:
        pass


RESIDENCIES: dict[Reach, type[Residency]] = {
    Reach.PREFIX: PrefixResidency,
    Reach.SUFFIX: FreeResidency,
    Reach.POINT: PointResidency,
}
