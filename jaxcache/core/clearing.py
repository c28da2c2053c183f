"""Forgetting everything at once, while transfers are in flight: reset, and what is left after the device was lost.

Pages that a transfer in flight may still touch go to limbo, owned by nobody, until the transfers that were live then
are quiet; all others are free at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxcache.core.radix_tree import Node
from jaxcache.core.residency import Residency
from jaxcache.core.tiers import Hold
from jaxcache.types import PageIds, Tier, TransferKind

if TYPE_CHECKING:
    from jaxcache.core.prefix_cache import PrefixCache


class Limbo(NamedTuple):
    """Pages to be freed once none of `transfer_ids` is live and `until_step` has come."""

    transfer_ids: list[int]
    until_step: int
    pages: list[tuple[Residency, PageIds]]


class Clearing:
    """limbo: pages on their way to being free."""

    def __init__(self, core: PrefixCache):
        self.core = core
        self.limbo: list[Limbo] = []

    def clear_all(self) -> None:
        """reset: no node stays."""
        core = self.core
        core.prefetches.abandon_all()
        core.stores.drop_waiting()
        self._keep({}, {})
        core.tiers.tree.retired_roots.clear()
        core.tiers.evictions.clear()
        if core.tiers.log is not None:
            core.tiers.log.restart(core.tiers.tree)

    def keep_host(self) -> None:
        """drop_device: nodes stay that host memory holds down from the root; undispatched backups are lost."""
        core = self.core
        tiers = core.tiers
        lost = self._withdraw_plan()
        for loading in core.admission.loading:
            tiers.let_go(loading.holds)
        core.admission.loading.clear()
        kept: dict[int, Node] = {}
        stack = [child for root in tiers.tree.all_roots() for child in root.children.values()]
        while stack:
            node = stack.pop()
            if tiers.full is None or _in_host(tiers.host[tiers.full], node, lost):
                kept[node.id] = node
                stack += node.children.values()
        self._keep(kept, lost)

    def settle(self) -> None:
        """Frees what nobody touches any more."""
        live = self.core.live_transfers()
        for limbo in self.limbo:
            if limbo.until_step <= self.core.tiers.step and not any(id in live for id in limbo.transfer_ids):
                for residency, page_ids in limbo.pages:
                    residency.allocator.free(page_ids)
                limbo.pages.clear()
        self.limbo = [limbo for limbo in self.limbo if limbo.pages]

    def _withdraw_plan(self) -> dict[int, np.ndarray]:
        """Takes back what was planned and cannot happen now; returns the host pages that will never be filled."""
        core = self.core
        lost: dict[int, list[PageIds]] = {}
        stays = []
        indices = {residency.component.name: residency.index for residency in core.tiers.host}
        for transfer in core.planner.transfers:
            if transfer.kind is TransferKind.BACKUP:
                for move in transfer.moves:
                    lost.setdefault(indices[move.component], []).append(move.dst_page_ids)
            elif transfer.kind is TransferKind.STORE:
                core.stores.withdraw(transfer.id)
            elif transfer.kind is not TransferKind.LOAD_BACK:
                stays.append(transfer)
        core.planner.transfers[:] = stays
        return {index: np.concatenate(pages) for index, pages in lost.items()}

    def _keep(self, kept: dict[int, Node], lost: dict[int, np.ndarray]) -> None:
        """Removes all other nodes, and every device entry."""
        tiers = self.core.tiers
        holders = self._holders()
        nodes = _children_first(tiers.tree.all_roots())
        pinned = {(r.index, node.id) for node in nodes for r in tiers.residencies if node.pins[r.index]}
        for holds in holders:
            tiers.let_go(holds)
        pages: list[tuple[Residency, PageIds]] = []
        for node in nodes:
            for residency in tiers.residencies:
                if node.pages[residency.index] is None:
                    continue
                if residency.tier is Tier.DEVICE or node.id not in kept or not _in_host(residency, node, lost):
                    page_ids = residency.take(node)
                    if (residency.index, node.id) in pinned:
                        pages.append((residency, page_ids))
                    else:
                        residency.allocator.free(page_ids)
            holds_nothing = not node.children and all(entry is None for entry in node.pages)
            if node.id not in kept or (tiers.full is None and holds_nothing):
                tiers.tree.remove(node)
        for holds in holders:
            holds[:] = [held for held in holds if held.node.parent is not None]
            for held in holds:
                held.residency.pin_up(held.node, held.top)
        if pages:
            self.limbo.append(Limbo(self.core.live_transfers(), tiers.step + 1, pages))
        tiers.tree.version += 1

    def _holders(self) -> list[list[Hold]]:
        core = self.core
        owners = [*core.stores.live.values(), *core.prefetches.live.values(), *core.admission.loading]
        return [owner.holds for owner in owners]


def _in_host(residency: Residency, node: Node, lost: dict[int, np.ndarray]) -> bool:
    pages = node.pages[residency.index]
    if pages is None:
        return False
    return residency.index not in lost or not np.isin(pages, lost[residency.index]).any()


def _children_first(roots: list[Node]) -> list[Node]:
    nodes = []
    stack = [child for root in roots for child in root.children.values()]
    while stack:
        node = stack.pop()
        nodes.append(node)
        stack += node.children.values()
    return nodes[::-1]
