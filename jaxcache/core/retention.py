"""Retentions: what resuming at a published end needs stays on the device until a step has come.

    root ------ full attention, to the root ------ end        all retentions together keep at most
                               |-- windows --|   state        max_retained_share of the pages of a component

Pages of full attention that several retentions need count once (`Node.retained`, as pins do); windows and states count
for each. Pages that a running request pins as well count too: what is left when it ends is known to fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from jaxcache.config import pages_of_share
from jaxcache.core.lease import Lease
from jaxcache.core.page_hash import Namespace
from jaxcache.core.planner import Counters
from jaxcache.core.radix_tree import Node
from jaxcache.core.tiers import Hold, Tiers


@dataclass(slots=True)
class Retention:
    """Of the end `node`, until the step `until` begins. num_pages: windows and states that it counts, by component."""

    node: Node
    namespace: Namespace
    lease_id: int
    until: int
    holds: list[Hold]
    num_pages: list[int]


class Retentions:
    """live: by the id of the end node. num_pages: retained device pages, by component, each at most its limit."""

    def __init__(self, tiers: Tiers, counters: Counters):
        self.tiers = tiers
        self.counters = counters
        self.live: dict[int, Retention] = {}
        self.num_pages = [0] * len(tiers.components)
        share = tiers.config.max_retained_share
        self.limits = [pages_of_share(share, device.allocator.num_pages) for device in tiers.device]
        self._ends: list[tuple[int, int]] = []  # (until, id of the end node); what is not true any more is skipped

    # ---- beginning

    def retain(self, lease: Lease, num_steps: int) -> None:
        """Keeps the deepest end of what a lease has published. Its earlier retention, of a shallower end, is over.

        What does not fit the share is not kept, and is counted. Where nothing could be resumed from the device yet,
        there is nothing to keep.
        """
        node = self._resumable(lease._node)
        if node is None:
            return
        until = self.tiers.step + num_steps
        earlier = self._earlier(lease)
        known = self.live.get(node.id)
        if known is not None:
            known.until, known.lease_id = max(known.until, until), lease.id
            self._remind(known)
            if earlier is not None and earlier is not known:
                self._release(earlier)
            return
        if earlier is not None:
            self._release(earlier)
        if self._fits(costs := self._costs(node)):
            until = until if earlier is None else max(until, earlier.until)
            self._keep(Retention(node, lease.sequence.namespace, lease.id, until, [], costs))
            return
        self.counters["retentions_refused"] += 1
        if earlier is not None:
            self._keep(earlier)

    def _resumable(self, node: Node) -> Node | None:
        """The deepest node, from this one up, at whose end a request could resume from the device alone."""
        while node.parent is not None:
            if all(self._is_there(c, node) for c in self.tiers.partial):
                return node
            node = node.parent
        return None

    def _is_there(self, c: int, node: Node) -> bool:
        """Whether the window or state that resuming at the end of a node needs is on the device."""
        if c == self.tiers.point:
            return node.pages[c] is not None
        low = self.tiers.required_start(c, node.end)
        while node.parent is not None and node.end > low:
            if node.pages[c] is None:
                return False
            node = node.parent
        return True

    def _earlier(self, lease: Lease) -> Retention | None:
        node = lease._node
        while node.parent is not None:
            retention = self.live.get(node.id)
            if retention is not None and retention.lease_id == lease.id:
                return retention
            node = node.parent
        return None

    def _top(self, c: int, node: Node) -> int:
        """Start of the topmost node that component c needs: pins end where nodes do."""
        if c == self.tiers.point:
            return node.end - 1
        low = top = self.tiers.required_start(c, node.end)
        while node.parent is not None and node.end > low:
            top = node.start
            node = node.parent
        return top

    def _costs(self, node: Node) -> list[int]:
        """Pages of windows and states; of full attention only what is not retained yet."""
        tiers = self.tiers
        page = tiers.page_tokens
        costs = [1 if c == tiers.point else (node.end - self._top(c, node)) // page for c in range(len(tiers.device))]
        if tiers.full is not None:
            end = node.end
            while node.parent is not None and not node.retained:
                node = node.parent
            costs[tiers.full] = (end - node.end) // page
        return costs

    def _fits(self, costs: list[int]) -> bool:
        return all(map(int.__le__, map(int.__add__, self.num_pages, costs), self.limits))

    def _keep(self, retention: Retention) -> None:
        tiers = self.tiers
        node = retention.node
        self.counters["retentions"] += 1
        for c, device in enumerate(tiers.device):
            retention.holds += tiers.hold(device, node, 0 if c == tiers.full else self._top(c, node))
            if c != tiers.full:
                self.num_pages[c] += retention.num_pages[c]
        self._count_full(node, 1)
        self.live[node.id] = retention
        self._remind(retention)

    def _count_full(self, node: Node, change: int) -> None:
        """One retention more, or less, needs the full attention of a path."""
        full = self.tiers.full
        while full is not None and node.parent is not None:
            if node.retained == (change < 0):  # none before, or none after
                self.num_pages[full] += change * (len(node.edge) // self.tiers.tree.page_bytes)
            node.retained += change
            node = node.parent

    def _remind(self, retention: Retention) -> None:
        heappush(self._ends, (retention.until, retention.node.id))
        if len(self._ends) > 2 * len(self.live) + 64:
            self._ends = [(retention.until, id) for id, retention in self.live.items()]
            heapify(self._ends)

    # ---- ending

    def expire(self) -> None:
        """A step has begun: those whose time has come are over."""
        while self._ends and self._ends[0][0] <= self.tiers.step:
            until, id = heappop(self._ends)
            retention = self.live.get(id)
            if retention is not None and retention.until == until:
                self._release(retention)

    def _release(self, retention: Retention) -> None:
        tiers = self.tiers
        del self.live[retention.node.id]
        for c, num_pages in enumerate(retention.num_pages):
            if c != tiers.full:
                self.num_pages[c] -= num_pages
        self._count_full(retention.node, -1)
        tiers.let_go(retention.holds)
        retention.holds = []

    def release_all(self, namespace: Namespace | None = None) -> None:
        """All of them, or those of one namespace: what is retired or lost needs none."""
        for retention in list(self.live.values()):
            if namespace is None or retention.namespace is namespace:
                self._release(retention)
