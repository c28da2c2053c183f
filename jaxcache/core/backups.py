"""Write policies: which device pages are copied to host memory and when, and which host pages go on to storage.

    insert, enough hits --> BACKUP now            write_through, write_through_selective
    device eviction     --> BACKUP, then leave    write_back
    BACKUP planned      --> STORE, queued, capped

Host memory is prefix-closed except under write_back: ancestors are backed up before descendants, and a window or state
after its full pages. A backup counts as done when it is planned (snapshot semantics).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxcache.core.backbone import Backbone
from jaxcache.core.planner import Counters, Planner
from jaxcache.core.radix_tree import FULL, Node
from jaxcache.core.stores import Stores, joined
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

    def __init__(
        self,
        tiers: Tiers,
        planner: Planner,
        stores: Stores,
        backbone: Backbone | None,
        counters: Counters,
        drop_subtree: Callable[[Node], None],
    ):
        self.tiers = tiers
        self.drop_subtree = drop_subtree  # of a node that can go nowhere
        self.backbone = backbone
        self.planner = planner
        self.stores = stores
        self.counters = counters
        self.use(tiers.config.write_policy if tiers.has_host else WritePolicy.NONE)

    def use(self, policy: WritePolicy) -> None:
        self.policy = policy
        self.on_insert = policy in ON_INSERT

    def after_insert(self, node: Node, old_end: int) -> None:
        """Backs up what is new on the path of `node`, and what could not be backed up before, top first.

        Called if the policy is to copy `on_insert`.
        """
        num = len(self.tiers.components)
        chain = []
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
            self.back_up(chain[::-1])

    def back_up(self, nodes: list[Node]) -> None:
        """Plans one BACKUP of what these nodes (of one path, top first) lack in host memory, as far as it fits.

        Making room for one must not take the full pages of another, or of what is above them: the path is pinned.
        """
        tiers = self.tiers
        num = len(tiers.components)
        full_host = tiers.host[FULL]
        copies = []
        full_host.pin_up(nodes[-1])
        for node in nodes:
            pages = node.pages
            for c in range(len(tiers.components)):
                wanted = pages[c] is not None and pages[c + num] is None
                if wanted and node.ready_step <= tiers.step and self._host_full_is_there(node, c):
                    copies += self._copy(node, c)
        full_host.unpin_up(nodes[-1])
        self._plan(copies)

    def spill(self, c: int, victim: Node) -> None:
        """write_back: the entry leaves the device through host memory, or with all below it if that is full."""
        copies = []
        if victim.pages[self.tiers.host[c].index] is None:
            copies = self._copy(victim, c)
            self._plan(copies)
        if copies or c != FULL or victim.pages[self.tiers.host[c].index] is not None:
            self.tiers.drop(self.tiers.device[c], victim)
        else:
            self.drop_subtree(victim)

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
        above = node.parent if c == FULL else node
        assert above is not None
        return above.parent is None or above.pages[tiers.host[FULL].index] is not None

    def _copy(self, node: Node, c: int) -> list[Copy]:
        """Puts one entry into host memory."""
        tiers = self.tiers
        host = tiers.host[c]
        pages = node.pages[c]
        assert pages is not None
        num_pages = len(pages)
        host.serve(node)
        has_room = num_pages <= host.allocator.num_free
        if not has_room and not (host.available() >= num_pages and tiers.make_room(host, num_pages)):
            self.counters["skipped_backup_pages"] += num_pages
            return []
        host_pages = host.allocator.allocate(num_pages)
        tiers.put(host, node, host_pages)
        return [Copy(node, c, host_pages)]

    def _plan(self, copies: list[Copy]) -> None:
        """One move per component. A copy whose pages were needed again at once is left out."""
        tiers = self.tiers
        num = len(tiers.components)
        copies = [copy for copy in copies if copy.node.pages[copy.c + num] is copy.host_pages]
        if not copies:
            return
        moves = []
        num_pages = 0
        for c in range(len(tiers.components)):
            mine = [copy for copy in copies if copy.c == c]
            if mine:
                targets = joined([copy.host_pages for copy in mine])
                moves.append(Move(tiers.components[c].name, joined([device_pages(copy) for copy in mine]), targets))
                num_pages += len(targets)
        self.planner.add(TransferKind.BACKUP, tuple(moves))
        self.counters["backup_pages"] += num_pages
        nodes = {copy.node.id: copy.node for copy in copies}
        self.stores.later(list(nodes.values()))


def device_pages(copy: Copy) -> PageIds:
    pages = copy.node.pages[copy.c]
    assert pages is not None
    return pages
