"""Where the nodes' pages are: one residency per (component, tier), and the page ids that are free.

    capacity = free + resident (on nodes, evictable or pinned) + held by leases, tickets, transfers
    available = free + resident - pinned            exact, because every pin also pins full attention up to the root

An entry is `node.pages[index]`. The order of eviction holds exactly the entries that may leave: unpinned and, for
full attention, without a resident child (closure: pages leave from the outside in).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple

import numpy as np

from jaxcache.components.base import Component
from jaxcache.core.change_log import PUT, TAKEN, ChangeLog
from jaxcache.core.eviction import EvictionOrder
from jaxcache.core.limits.tenants import Accounts
from jaxcache.core.node import Node
from jaxcache.types import PageIds, Tier


class Purpose(NamedTuple):
    """Why room is made, or an entry leaves.

    lease:   for which; 0: for none
    account: on whose behalf: the pages of its own tenant leave as far as they may, others' down to their floors
    reason:  "room"; "quota": only the tenant's own leave; or, of a state, what has made it useless
    """

    lease: int = 0
    account: int = 0
    reason: str = "room"


UNTOLD = Purpose()


class PageAllocator:
    """Ids 0 .. num_pages - 1. The ids below `num_free` in `stack` are free; the next to go is on top."""

    __slots__ = ("num_free", "num_pages", "stack")

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self.stack = np.arange(num_pages - 1, -1, -1, dtype=np.int32)
        self.num_free = num_pages

    def allocate(self, n: int) -> PageIds:
        """n free ids; the caller has made sure that they are there."""
        return self.allocate_view(n).copy()

    def allocate_view(self, n: int) -> PageIds:
        """The same as a view, to be copied before anything is freed."""
        high = self.num_free
        self.num_free = low = high - n
        assert low >= 0, f"I1: {n=} pages of {high} free"
        return self.stack[low:high]

    def allocate_one(self) -> int:
        """A free id; the caller has made sure that there is one."""
        assert self.num_free, "I1: no page is free"
        self.num_free -= 1
        return self.stack.item(self.num_free)

    def free_one(self, page_id: int) -> None:
        assert self.num_free < self.num_pages, f"I1: freed more than there are: {page_id=}"
        self.stack[self.num_free] = page_id
        self.num_free += 1

    def free(self, page_ids: PageIds) -> None:
        """More than there are do not fit into the stack: ValueError."""
        low = self.num_free
        self.num_free = high = low + len(page_ids)
        self.stack[low:high] = page_ids

    def free_ids(self) -> PageIds:
        return self.stack[: self.num_free]


class Residency(ABC):
    """The entries of one (component, tier). `index` is its place in the nodes' arrays.

    is_closed: entries hang together from the root: a node has one only if its parent has
    output_leaves_first: whether what lies on generated text leaves before what lies on prompts
    accounts: the accounts of tenants, which are the order of eviction then; None: nobody has limits
    spill:  what carries a victim to another tier before it leaves; None: victims are dropped
    """

    is_closed: ClassVar[bool] = False
    output_leaves_first: ClassVar[bool] = False

    __slots__ = (
        "accounts",
        "allocator",
        "clock",
        "component",
        "index",
        "log",
        "num_pinned",
        "num_resident",
        "order",
        "spill",
        "tier",
    )

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
        self.accounts = order if isinstance(order, Accounts) else None
        self.clock = clock  # uses, counted over all residencies
        self.log = log  # as the tree's
        self.spill: Callable[[Node, Purpose], None] | None = None
        self.num_resident = 0
        self.num_pinned = 0

    # ---- room

    def available(self, account: int = 0) -> int:
        """Pages that an allocation for an account could have, evicting whatever may leave."""
        if self.accounts is not None:
            return self.allocator.num_free + self.accounts.promised(account)
        return self.allocator.num_free + self.num_resident - self.num_pinned

    def victim(self, num_pages: int, purpose: Purpose = UNTOLD) -> tuple[Node | None, int]:
        """What leaves next while room is made for `num_pages`, and how many of its pages may."""
        if self.accounts is not None:
            return self.accounts.victim(purpose.account, num_pages, purpose.reason == "quota")
        return self.order.first(), self.allocator.num_pages

    # ---- entries

    @abstractmethod
    def evictable(self, node: Node) -> bool:
        """Whether the entry on a node is in the order of eviction."""

    @abstractmethod
    def put(self, node: Node, page_ids: PageIds) -> None:
        """Makes an entry; the pages belong to the tree from now on."""

    def publish(self, node: Node, page_ids: PageIds) -> None:
        """`put` and one more pin: what a lease has computed is no candidate."""
        index, num_pages = self.index, len(page_ids)
        assert node.pages[index] is None, f"I1: {node=} has pages already"
        node.pages[index] = page_ids
        node.pins[index] += 1
        self.num_resident += num_pages
        self.num_pinned += num_pages
        if self.log is not None:
            self.log.append((PUT, node.id, index))
        if self.accounts is not None:
            if not node.last_used:  # what has just come was not used long ago
                node.last_used = next(self.clock)
            self.accounts.count(node.account, num_pages, num_pages)

    @abstractmethod
    def take(self, node: Node) -> PageIds:
        """Removes an unpinned entry; its pages belong to the caller."""

    @abstractmethod
    def shorten(self, node: Node, num_pages: int) -> PageIds:
        """Cuts an unpinned entry to the first pages of its node, in its place; the others belong to the caller."""

    @abstractmethod
    def split(self, node: Node, prefix: Node, num_pages: int) -> None:
        """Shares an entry and its pins between a node and its new prefix of `num_pages` pages."""

    def _come(self, node: Node, page_ids: PageIds) -> int:
        """What `put` does for every kind; returns how many of the pages are pinned."""
        index = self.index
        assert node.pages[index] is None, f"I1: {node=} has pages already"
        node.pages[index] = page_ids
        if self.log is not None:
            self.log.append((PUT, node.id, index))
        num_pages = len(page_ids)
        num_pinned = num_pages if node.pins[index] else 0
        self.num_resident += num_pages
        self.num_pinned += num_pinned
        if self.accounts is not None:
            if not node.last_used:  # what has just come was not used long ago
                node.last_used = next(self.clock)
            self.accounts.count(node.account, num_pages, num_pinned)
        return num_pinned

    def _leave(self, node: Node) -> PageIds:
        """What `take` does for every kind."""
        index = self.index
        page_ids = node.pages[index]
        assert page_ids is not None and not node.pins[index], f"I3: {node=} is pinned"
        node.pages[index] = None
        if self.log is not None:
            self.log.append((TAKEN, node.id, index))
        self.num_resident -= len(page_ids)
        if self.accounts is not None:
            self.accounts.count(node.account, -len(page_ids), 0)
        self.order.discard(node)
        return page_ids

    def _cut(self, node: Node, num_pages: int) -> PageIds:
        """`shorten` of an entry of a page for each page of the node."""
        pages = node.pages[self.index]
        assert pages is not None and not node.pins[self.index], f"I3: {node=}"
        node.pages[self.index] = pages[:num_pages]
        num_left = len(pages) - num_pages
        self.num_resident -= num_left
        if self.accounts is not None:
            self.accounts.count(node.account, -num_left, 0)
        return pages[num_pages:]

    def _candidate(self, node: Node) -> None:
        if node.is_output and self.output_leaves_first:
            self.order.add_as_next_victim(node)
        else:
            self.order.add(node)

    # ---- pins

    def pin_up(self, node: Node, top: int = 0) -> int:
        """Pins a node and its ancestors down to position `top`; returns the start of the topmost one."""
        index, account, before = self.index, node.account, self.num_pinned
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
        if self.accounts is not None:
            self.accounts.count(account, 0, self.num_pinned - before)
        return node.end

    def pin(self, node: Node) -> None:
        self.pin_up(node, node.end - 1)

    def unpin_up(self, node: Node, top: int = 0, is_use: bool = True) -> None:
        """Takes back what `pin_up` did, the deepest node first: it is the first to leave. is_use: it counts as one."""
        index, order, output_leaves_first = self.index, self.order, self.output_leaves_first
        account, before = node.account, self.num_pinned
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
                            order.readmit(node)
                        elif node.is_output and output_leaves_first:
                            order.add_as_next_victim(node)
                        else:
                            order.add(node)
            node = node.parent  # pyright: ignore[reportAssignmentType]
        if self.accounts is not None:
            self.accounts.count(account, 0, self.num_pinned - before)

    def unpin(self, node: Node) -> None:
        self.unpin_up(node, node.end - 1)

    # ---- the order of eviction

    def touch(self, node: Node) -> None:
        """Counts as used now, if it is a candidate."""
        if node in self.order:
            self.order.discard(node)
            self.order.add(node)
        if self.accounts is not None:
            self.accounts.note(node.account)

    def demote(self, node: Node) -> None:
        """Leaves before all others, if it is a candidate: the next use makes it an ordinary one again."""
        if node in self.order:
            self.order.discard(node)
            self.order.add_as_next_victim(node)
        if self.accounts is not None:
            self.accounts.note(node.account)

    def reorder(self, node: Node) -> None:
        """Takes its place anew, if it is a candidate: what its place depends on has changed."""
        if node in self.order:
            self.order.discard(node)
            self._candidate(node)
        if self.accounts is not None:
            self.accounts.note(node.account)
