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
from jaxcache.core.decisions import Counters
from jaxcache.core.kinds import Kinds
from jaxcache.core.lease import Lease
from jaxcache.core.node import FULL, Node
from jaxcache.core.tiers import Tiers
from jaxcache.core.tokens import Namespace


@dataclass(slots=True, eq=False)
class Retention:
    """Of the end `node`, which its leases asked for until some step. num_pages: windows and states, by component."""

    node: Node
    namespace: Namespace
    untils: dict[int, int]  # by lease id
    num_pages: list[int]

    @property
    def until(self) -> int:
        return max(self.untils.values())


class Retentions:
    """live: by the id of the end node. of_lease: each lease has one, of the deepest end that it asked for.

    num_pages: retained device pages, by component, each at most its limit
    """

    def __init__(self, tiers: Tiers, kinds: Kinds, counters: Counters):
        self.tiers = tiers
        self.kinds = kinds
        self.counters = counters
        self.live: dict[int, Retention] = {}
        self.of_lease: dict[int, Retention] = {}
        self.num_pages = [0] * len(tiers.components)
        share = tiers.config.max_retained_share
        self.limits = [pages_of_share(share, device.allocator.num_pages) for device in tiers.device]
        self._ends: list[tuple[int, int]] = []  # (until, id of the end node); what is not true any more is skipped

    # ---- beginning

    def retain(self, lease: Lease, num_steps: int) -> None:
        """Keeps the deepest end of what a lease has published, instead of the one that it asked for before.

        What does not fit the share is not kept, and is counted. Where nothing could be resumed from the device yet,
        there is nothing to keep.
        """
        node = self._resumable(lease._node)
        if node is None:
            return
        until = self.tiers.step + num_steps
        earlier = self.of_lease.get(lease.id)
        if earlier is not None:
            until = max(until, earlier.untils[lease.id])
        retention = self.live.get(node.id)
        if retention is None:
            costs = self._costs(node)
            if not self._fits(node, costs, earlier):
                self.counters["retentions_refused"] += 1
                return
            costs[FULL] = 0  # counted by node
            retention = Retention(node, lease.sequence.namespace, {}, costs)
            self._keep(retention)
        retention.untils[lease.id] = until
        self._remind(retention)
        self.of_lease[lease.id] = retention
        if earlier is not None and earlier is not retention:
            del earlier.untils[lease.id]
            if earlier.untils and earlier.until > self.tiers.step:  # the time of the others may be over already
                self._remind(earlier)
            else:
                self._release(earlier)

    def _resumable(self, node: Node) -> Node | None:
        """The deepest node, from this one up, at whose end a request could resume from the device alone."""
        while node.parent is not None:
            if all(kind.is_there(node) for kind in self.kinds.extras):
                return node
            node = node.parent
        return None

    def _costs(self, node: Node) -> list[int]:
        """Pages of windows and states; of full attention only what is not retained yet."""
        above = node
        while above.parent is not None and not above.retained:
            above = above.parent
        new_tokens = node.end - above.end
        extras = [kind.num_entry_pages(node.end - kind.top_needed(node)) for kind in self.kinds.extras]
        return [new_tokens // self.tiers.page_tokens, *extras]

    def _fits(self, node: Node, costs: list[int], earlier: Retention | None) -> bool:
        """Whether so many pages more may be retained, when the earlier retention of the same lease is over."""
        tiers = self.tiers
        if earlier is not None and len(earlier.untils) == 1:
            costs = [cost - old for cost, old in zip(costs, earlier.num_pages, strict=True)]
        for c, device in enumerate(tiers.device):
            if self.num_pages[c] + costs[c] > self.limits[c]:
                return False
            if tiers.tenants is not None and not tiers.tenants.accounts[device.index].may_retain(
                node.account, costs[c]
            ):
                return False
        return True

    def _keep(self, retention: Retention) -> None:
        tiers, node = self.tiers, retention.node
        self.counters["retentions"] += 1
        self._count(retention, 1)
        for kind in self.kinds:
            tiers.holds.add(retention, kind.device, node, kind.top_needed(node))
        self.live[node.id] = retention

    def _count(self, retention: Retention, change: int) -> None:
        """Adds a retention (change 1) or takes it away (-1): all its pages of windows and states, and of full attention
        those that no other retention needs."""
        tiers, node = self.tiers, retention.node
        changes = [change * num_pages for num_pages in retention.num_pages]
        while node.parent is not None:
            if node.retained == (change < 0):  # none before, or none after
                changes[FULL] += change * (len(node.edge) // tiers.tree.page_bytes)
            node.retained += change
            node = node.parent
        for c, device in enumerate(tiers.device):
            self.num_pages[c] += changes[c]
            if tiers.tenants is not None:
                tiers.tenants.accounts[device.index].retain(retention.node.account, changes[c])

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
        """Its pages take their places by their own last use: that they were kept is none."""
        del self.live[retention.node.id]
        for lease_id in retention.untils:
            del self.of_lease[lease_id]
        self._count(retention, -1)
        self.tiers.holds.release(retention, is_use=False)

    def release_all(self, namespace: Namespace | None = None) -> None:
        """All of them, or those of one namespace: what is retired or lost needs none."""
        for retention in list(self.live.values()):
            if namespace is None or retention.namespace is namespace:
                self._release(retention)
