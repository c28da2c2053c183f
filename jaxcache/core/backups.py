"""Write policies: which device pages are copied to host memory and when, and which host pages go on to storage.

    insert, enough hits --> BACKUP now            write_through, write_through_selective
    device eviction     --> BACKUP, then leave    write_back
    BACKUP planned      --> STORE, queued, capped

Host memory is prefix-closed except under write_back: ancestors are backed up before descendants, and a window or state
after its full pages. A backup counts as done when it is planned (snapshot semantics).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxcache.core.backbone import Backbone
from jaxcache.core.planner import Counters, Planner
from jaxcache.core.radix_tree import Node
from jaxcache.core.stores import Stores
from jaxcache.core.tiers import Tiers
from jaxcache.types import Move, PageIds, TransferKind, WritePolicy

ON_INSERT = (WritePolicy.WRITE_THROUGH, WritePolicy.WRITE_THROUGH_SELECTIVE)


class Copy(NamedTuple):
    """An entry of component c on its way to host memory."""

    node: Node
    c: int
    host_pages: PageIds


class Backups:
    """Plans BACKUP, and tells `stores` what there is to store."""

    def __init__(self, tiers: Tiers, planner: Planner, stores: Stores, backbone: Backbone | None, counters: Counters):
        self.tiers = tiers
        self.backbone = backbone
        self.planner = planner
        self.stores = stores
        self.counters = counters
        self.policy = tiers.config.write_policy if tiers.has_host else WritePolicy.NONE
        self.on_insert = self.policy in ON_INSERT

    def after_insert(self, node: Node, old_end: int) -> None:
        """Backs up what is new on the path of `node`, and what could not be backed up before, top first.

        Called if the policy is to copy `on_insert`.
        """
        num = len(self.tiers.components)
        chain = []
        while node.parent is not None:
            if any(node.pages[c] is not None and node.pages[c + num] is None for c in range(num)):
                chain.append(node)
            elif node.end <= old_end:
                break
            node = node.parent
        if self.policy is WritePolicy.WRITE_THROUGH_SELECTIVE:
            chain = [node for node in chain if node.hits >= self.tiers.config.selective_hits]
        if chain:
            self.back_up(chain[::-1])

    def back_up(self, nodes: list[Node]) -> None:
        """Plans one BACKUP of what these nodes (of one path, top first) lack in host memory, as far as it fits."""
        tiers = self.tiers
        copies = []
        for node in nodes:
            for c in tiers.top_first:
                wanted = node.pages[c] is not None and node.pages[tiers.host[c].index] is None
                if wanted and node.ready_step <= tiers.step and self._host_full_is_there(node, c):
                    copies += self._copy(node, c, spare=node.parent if c == tiers.full else node)
        self._plan(copies)

    def spill(self, c: int, victim: Node) -> None:
        """write_back: the entry leaves the device through host memory, or with all below it if that is full."""
        copies = []
        if victim.pages[self.tiers.host[c].index] is None:
            copies = self._copy(victim, c, spare=None)
            self._plan(copies)
        if copies or c != self.tiers.full or victim.pages[self.tiers.host[c].index] is not None:
            self.tiers.drop(self.tiers.device[c], victim)
        else:
            self.tiers.drop_subtree(victim)

    def make_room_on_device(self, c: int, num_pages: int) -> bool:
        """Evicts device pages of component c until `num_pages` are free."""
        if self.backbone is not None:
            return self.backbone.make_room(num_pages)
        tiers = self.tiers
        device = tiers.device[c]
        if not tiers.writes_back:
            return tiers.make_room(device, num_pages)
        while device.allocator.num_free < num_pages:
            victim = device.victim(num_pages)
            if victim is None:
                return False
            wanted = device.leaving(victim, num_pages - device.allocator.num_free)
            self.spill(c, tiers.trim(device, victim, wanted))
        return True

    def _host_full_is_there(self, node: Node, c: int) -> bool:
        """Prefix closure of host memory: the parent's full pages for full attention, the node's own for the rest."""
        tiers = self.tiers
        if tiers.full is None:
            return True
        above = node.parent if c == tiers.full else node
        assert above is not None
        return above.parent is None or above.pages[tiers.host[tiers.full].index] is not None

    def _copy(self, node: Node, c: int, spare: Node | None) -> list[Copy]:
        """Puts one entry into host memory, making room without touching the full pages of `spare` and above."""
        tiers = self.tiers
        host = tiers.host[c]
        pages = node.pages[c]
        assert pages is not None
        holds = tiers.hold(tiers.host[tiers.full], spare, 0) if spare is not None and tiers.full is not None else []
        host.serve(node)
        fits = host.available() >= len(pages) and tiers.make_room(host, len(pages))
        if fits:
            tiers.put(host, node, host.allocator.allocate(len(pages)))
        else:
            self.counters["skipped_backup_pages"] += len(pages)
        tiers.let_go(holds)
        host_pages = node.pages[host.index]
        return [] if host_pages is None else [Copy(node, c, host_pages)]

    def _plan(self, copies: list[Copy]) -> None:
        """One move per component. A copy whose pages were needed again at once is left out."""
        tiers = self.tiers
        copies = [copy for copy in copies if copy.node.pages[tiers.host[copy.c].index] is copy.host_pages]
        if not copies:
            return
        moves = []
        for c in tiers.top_first:
            mine = [copy for copy in copies if copy.c == c]
            if mine:
                source = np.concatenate([device_pages(copy) for copy in mine])
                moves.append(Move(tiers.components[c].name, source, np.concatenate([copy.host_pages for copy in mine])))
        self.planner.add(TransferKind.BACKUP, tuple(moves))
        self.counters["backup_pages"] += sum(len(move.src_page_ids) for move in moves)
        nodes = {copy.node.id: copy.node for copy in copies}
        hosted = [
            (node, c) for node in nodes.values() for c in tiers.top_first if node.pages[tiers.host[c].index] is not None
        ]
        self.stores.later(hosted)


def device_pages(copy: Copy) -> PageIds:
    pages = copy.node.pages[copy.c]
    assert pages is not None
    return pages
