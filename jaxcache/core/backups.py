"""Write policies: which device pages are copied to host memory and when, and which host pages go on to storage.

    insert, enough hits --> BACKUP now            write_through, write_through_selective
    device eviction     --> BACKUP, then leave    write_back
    BACKUP planned      --> STORE, queued, capped

Host memory is prefix-closed except under write_back: ancestors are backed up before descendants, and a window or state
after its full pages. A backup counts as done when it is planned (snapshot semantics).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from jaxcache.core.decisions import Counters
from jaxcache.core.kinds import Kind, Kinds
from jaxcache.core.lease import Lease
from jaxcache.core.node import Node
from jaxcache.core.outbox import Outbox
from jaxcache.core.pages import Purpose
from jaxcache.core.stores import Stores, joined
from jaxcache.core.tiers import Tiers
from jaxcache.types import Move, PageIds, TransferKind, WritePolicy

ON_INSERT = (WritePolicy.WRITE_THROUGH, WritePolicy.WRITE_THROUGH_SELECTIVE)


class Copy(NamedTuple):
    """An entry on its way to host memory."""

    kind: Kind
    node: Node
    host_pages: PageIds


class Backups:
    """Plans BACKUP, and tells `stores` what there is to store."""

    def __init__(
        self,
        tiers: Tiers,
        kinds: Kinds,
        outbox: Outbox,
        stores: Stores,
        counters: Counters,
        drop_subtree: Callable[[Node, Purpose], None],
    ):
        """drop_subtree: of a node whose full pages find no room in host memory"""
        self.tiers = tiers
        self.kinds = kinds
        self.outbox = outbox
        self.stores = stores
        self.counters = counters
        self.use(tiers.config.write_policy if tiers.has_host else WritePolicy.NONE)
        if tiers.writes_back:
            for kind in kinds:
                kind.device.spill = partial(self._spill, kind, drop_subtree if kind is kinds.full else None)

    def use(self, policy: WritePolicy) -> None:
        self.policy = policy
        self.on_insert = policy in ON_INSERT

    def after_insert(self, lease: Lease, old_end: int) -> None:
        """Backs up what is new on the path that a lease has published, and what could not be before, top first.

        Called if the policy is to copy `on_insert`.
        """
        num = len(self.tiers.components)
        chain = []
        node = lease._node
        while node.parent is not None:
            pages = node.pages
            for c in range(num):
                if pages[c] is not None and pages[c + num] is None:
                    chain.append(node)
                    break
            else:
                if node.end <= old_end:
                    break
            node = node.parent
        if self.policy is WritePolicy.WRITE_THROUGH_SELECTIVE:
            chain = [node for node in chain if node.hits >= self.tiers.config.selective_hits]
        if chain:
            self.back_up(chain[::-1], lease.purpose)

    def back_up(self, nodes: list[Node], purpose: Purpose) -> None:
        """Plans one BACKUP of what these nodes (of one path, top first) lack in host memory, as far as it fits.

        Making room for one must not take the full pages of another, or of what is above them: the path is pinned.
        """
        tiers, full_host = self.tiers, self.kinds.full.host
        copies = []
        full_host.pin_up(nodes[-1])
        for node in nodes:
            for kind in self.kinds:
                wanted = node.pages[kind.device.index] is not None and node.pages[kind.host.index] is None
                if wanted and node.ready_step <= tiers.step and kind.may_be_in_host(node):
                    copies += self._copy(kind, node, purpose)
        full_host.unpin_up(nodes[-1])
        self._plan(copies)

    def _spill(
        self, kind: Kind, drop_subtree: Callable[[Node, Purpose], None] | None, victim: Node, purpose: Purpose
    ) -> None:
        """write_back: the entry leaves the device through host memory; full pages with all below if that is full."""
        copies = []
        if victim.pages[kind.host.index] is None:
            copies = self._copy(kind, victim, purpose)
            self._plan(copies)
        if copies or drop_subtree is None or victim.pages[kind.host.index] is not None:
            self.tiers.drop(kind.device, victim, purpose)
        else:
            drop_subtree(victim, purpose)

    def _copy(self, kind: Kind, node: Node, purpose: Purpose) -> list[Copy]:
        """Puts one entry into host memory. Others leave there for its own tenant, whatever it leaves the device for."""
        tiers, host = self.tiers, kind.host
        pages = node.pages[kind.device.index]
        assert pages is not None
        num_pages = len(pages)
        if num_pages > host.allocator.num_free and not (
            host.available(node.account) >= num_pages
            and tiers.make_room(host, num_pages, Purpose(purpose.lease, node.account))
        ):
            self.counters["skipped_backup_pages"] += num_pages
            return []
        host_pages = host.allocator.allocate(num_pages)
        tiers.put(host, node, host_pages)
        return [Copy(kind, node, host_pages)]

    def _plan(self, copies: list[Copy]) -> None:
        """One move per component. A copy whose pages were needed again at once is left out."""
        copies = [copy for copy in copies if copy.node.pages[copy.kind.host.index] is copy.host_pages]
        if not copies:
            return
        moves = []
        num_pages = 0
        for kind in self.kinds:
            mine = [copy for copy in copies if copy.kind is kind]
            if mine:
                targets = joined([copy.host_pages for copy in mine])
                moves.append(Move(kind.name, joined([device_pages(copy) for copy in mine]), targets))
                num_pages += len(targets)
        self.outbox.add(TransferKind.BACKUP, tuple(moves))
        self.counters["backup_pages"] += num_pages
        nodes = {copy.node.id: copy.node for copy in copies}
        self.stores.later(list(nodes.values()))


def device_pages(copy: Copy) -> PageIds:
    pages = copy.node.pages[copy.kind.device.index]
    assert pages is not None
    return pages
