"""Residencies that keep the accounts of tenants. Every change is within one namespace, so its sum is one account's.

Every call notes its account, whose victim may be another one then. Hits, priorities and what counts as generated text
matter as well, and change without a call; but only in an operation of the same account, which makes a call before the
next victim is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator

from jaxcache.components.base import Component, Reach
from jaxcache.core.change_log import ChangeLog
from jaxcache.core.radix_tree import Node
from jaxcache.core.residency import FreeResidency, PointResidency, PrefixResidency, Residency
from jaxcache.core.tenants import Groups
from jaxcache.types import PageIds, Tier


class TenantResidency(Residency):
    """groups: the order of eviction, which knows who may lose what. To stand before the kinds of residency."""

    def __init__(
        self,
        component: Component,
        tier: Tier,
        index: int,
        num_pages: int,
        order: Groups,
        clock: Iterator[int],
        log: ChangeLog | None,
    ):
        super().__init__(component, tier, index, num_pages, order, clock, log)
        self.groups = order

    def serve(self, node: Node) -> None:
        self.groups.served = self.groups.tenants.tenant_of[node.group]
        self.groups.note(node.group)

    def available(self) -> int:
        return self.allocator.num_free + self.groups.promised()

    def victim(self, num_pages: int) -> Node | None:
        self.groups.wanted = num_pages
        return self.groups.first()

    def leaving(self, victim: Node, num_pages: int) -> int:
        return self.groups.leaving(victim, num_pages)

    def why(self, reason: str) -> str:
        """A quota is a reason only where its own tenant has to give: others lose host pages just for the room."""
        return "quota" if self.groups.own_only else reason

    def put(self, node: Node, page_ids: PageIds) -> None:
        if not node.last_used:  # what has just come was not used long ago
            node.last_used = next(self.clock)
        before = self.num_pinned
        super().put(node, page_ids)
        self.groups.count(node.group, len(page_ids), self.num_pinned - before)

    def split(self, node: Node, prefix: Node, num_pages: int) -> None:
        super().split(node, prefix, num_pages)
        self.groups.note(node.group)

    def touch(self, node: Node) -> None:
        super().touch(node)
        self.groups.note(node.group)

    def demote(self, node: Node) -> None:
        super().demote(node)
        self.groups.note(node.group)

    def file_again(self, node: Node) -> None:
        super().file_again(node)
        self.groups.note(node.group)

    def take(self, node: Node) -> PageIds:
        page_ids = super().take(node)
        self.groups.count(node.group, -len(page_ids), 0)
        return page_ids

    def shorten(self, node: Node, num_pages: int) -> PageIds:
        page_ids = super().shorten(node, num_pages)
        self.groups.count(node.group, -len(page_ids), 0)
        return page_ids

    def pin(self, node: Node) -> None:
        before = self.num_pinned
        super().pin(node)
        self.groups.count(node.group, 0, self.num_pinned - before)

    def pin_up(self, node: Node, top: int = 0) -> int:
        before = self.num_pinned
        end = super().pin_up(node, top)
        self.groups.count(node.group, 0, self.num_pinned - before)
        return end

    def unpin_up(self, node: Node, top: int = 0, is_use: bool = True) -> None:
        before = self.num_pinned
        super().unpin_up(node, top, is_use)
        self.groups.count(node.group, 0, self.num_pinned - before)


class TenantPrefixResidency(TenantResidency, PrefixResidency):
    """Full attention."""


class TenantFreeResidency(TenantResidency, FreeResidency):
    """Sliding windows."""


class TenantPointResidency(TenantResidency, PointResidency):
    """Recurrent states."""


TENANT_RESIDENCIES: dict[Reach, type[TenantResidency]] = {
    Reach.PREFIX: TenantPrefixResidency,
    Reach.SUFFIX: TenantFreeResidency,
    Reach.POINT: TenantPointResidency,
}
