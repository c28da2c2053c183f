"""Forgetting everything at once, while transfers are in flight: reset, and what is left after the device was lost.

Host pages that a transfer in flight may still touch are freed when the transfers that were live then are quiet; device
pages into which a load-back will still be scattered, when it has been. All others are free at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from jaxcache.core.admission import Admission
from jaxcache.core.holds import Hold
from jaxcache.core.kinds import Kinds
from jaxcache.core.node import Node
from jaxcache.core.outbox import Outbox
from jaxcache.core.pages import Purpose, Residency
from jaxcache.core.prefetches import Prefetches
from jaxcache.core.stores import Stores
from jaxcache.core.tiers import Tiers
from jaxcache.types import PageIds, Tier, TransferKind


class DeferredFree(NamedTuple):
    """Pages that belong to no node any more, to be freed once no transfer of these is live and the step has come."""

    transfer_ids: list[int]
    until_step: int
    pages: list[tuple[Residency, PageIds]]


class Owners(Protocol):
    """The cache: who holds pages of it, beside leases."""

    tiers: Tiers
    kinds: Kinds
    outbox: Outbox
    stores: Stores
    prefetches: Prefetches
    admission: Admission

    def live_transfers(self) -> list[int]: ...


class Clearing:
    """deferred: pages on their way to being free."""

    def __init__(self, core: Owners):
        self.core = core
        self.deferred: list[DeferredFree] = []

    def frees_device_pages(self) -> bool:
        """Whether some of them are on the device."""
        return any(residency.tier is Tier.DEVICE for deferred in self.deferred for residency, _ in deferred.pages)

    def clear_all(self) -> None:
        """reset: no node stays."""
        core = self.core
        core.prefetches.abandon_all()
        core.stores.drop_waiting()
        self._keep({}, {})
        core.tiers.tree.retired_roots.clear()
        core.tiers.evictions.clear()
        core.tiers.unmade.clear()
        if core.tiers.log is not None:
            core.tiers.log.restart(core.tiers.tree)

    def keep_host(self) -> None:
        """forget_device: nodes stay that host memory holds down from the root; undispatched backups are lost."""
        core = self.core
        tiers = core.tiers
        lost = self._withdraw_plan()
        for load_back in core.admission.loading:
            tiers.holds.release(load_back)
        core.admission.loading.clear()
        kept: dict[int, Node] = {}
        stack = [child for root in tiers.tree.all_roots() for child in root.children.values()]
        while stack:
            node = stack.pop()
            if _in_host(core.kinds.full.host, node, lost):
                kept[node.id] = node
                stack += node.children.values()
        self._keep(kept, lost)

    def settle(self) -> None:
        """Frees what nobody touches any more."""
        live = self.core.live_transfers()
        for deferred in self.deferred:
            if deferred.until_step <= self.core.tiers.step and not any(id in live for id in deferred.transfer_ids):
                for residency, page_ids in deferred.pages:
                    residency.allocator.free(page_ids)
                deferred.pages.clear()
        self.deferred = [deferred for deferred in self.deferred if deferred.pages]

    def drop(self, top: Node, purpose: Purpose) -> None:
        """write_back: a device page that finds no room in host memory leaves with all below it.

        Transfers that are decided and not quiet may still touch host pages of that: they are freed later.
        """
        tiers = self.core.tiers
        below = {node.id: None for node in [top, *_children_first([top])]}
        transfer_ids: list[int] = []
        touched: dict[int, list[PageIds]] = {}
        for id in self.core.live_transfers():
            mine = tiers.holds.release_at(id, below)
            if mine:
                transfer_ids.append(id)
            for held in mine:
                for page_ids in _held_pages(held, top):
                    touched.setdefault(held.residency.index, []).append(page_ids)
        tiers.touched = {index: np.concatenate(pages) for index, pages in touched.items()}
        tiers.drop_subtree(top, purpose)
        if tiers.held_back:
            self.deferred.append(DeferredFree(transfer_ids, 0, tiers.held_back))
        tiers.touched, tiers.held_back = {}, []

    def _withdraw_plan(self) -> dict[int, np.ndarray]:
        """Takes back what was planned and cannot happen now; returns the host pages that will never be filled."""
        core = self.core
        lost: dict[int, list[PageIds]] = {}
        stays = []
        indices = {residency.component.name: residency.index for residency in core.tiers.host}
        for transfer in core.outbox.transfers:
            if transfer.kind is TransferKind.BACKUP:
                for move in transfer.moves:
                    lost.setdefault(indices[move.component], []).append(move.dst_page_ids)
            elif transfer.kind is TransferKind.STORE:
                core.stores.withdraw(transfer.id)
            elif transfer.kind is not TransferKind.LOAD_BACK:
                stays.append(transfer)
        core.outbox.transfers[:] = stays
        return {index: np.concatenate(pages) for index, pages in lost.items()}

    def _keep(self, kept: dict[int, Node], lost: dict[int, np.ndarray]) -> None:
        """Removes all other nodes, and every device entry."""
        tiers = self.core.tiers
        nodes = _children_first(tiers.tree.all_roots())
        pinned = {(r.index, node.id) for node in nodes for r in tiers.residencies if node.pins[r.index]}
        tiers.holds.suspend()
        scattered = {
            (held.residency.index, held.node.id): None
            for load_back in self.core.admission.loading
            for held in tiers.holds[load_back]
        }
        pages: dict[Tier, list[tuple[Residency, PageIds]]] = {Tier.DEVICE: [], Tier.HOST: []}
        for node in nodes:
            for residency in tiers.residencies:
                if node.pages[residency.index] is None:
                    continue
                if residency.tier is Tier.DEVICE or node.id not in kept or not _in_host(residency, node, lost):
                    page_ids = residency.take(node)
                    if (residency.index, node.id) in (scattered if residency.tier is Tier.DEVICE else pinned):
                        pages[residency.tier].append((residency, page_ids))
                    else:
                        residency.allocator.free(page_ids)
            if node.id not in kept:
                tiers.tree.remove(node)
        tiers.holds.resume()
        for transfer_ids, deferred in (([], pages[Tier.DEVICE]), (self.core.live_transfers(), pages[Tier.HOST])):
            if deferred:
                self.deferred.append(DeferredFree(transfer_ids, tiers.step + 1, deferred))
        tiers.tree.version += 1


def _held_pages(held: Hold, top: Node) -> Iterator[PageIds]:
    """What a hold pins at and below `top`, by node."""
    node = held.node
    while node.end > held.top and node is not top.parent:
        page_ids = node.pages[held.residency.index]
        if page_ids is not None:
            yield page_ids
        assert node.parent is not None
        node = node.parent


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
