"""Quotas of tenants: who is over the quota leaves first, waits at admission, and gives way when it inserts.

Made only if tenants are configured: nothing here costs anything without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcache.core.lease import Lease
from jaxcache.core.matching import Prefix
from jaxcache.core.radix_tree import FULL, Node
from jaxcache.core.residency import Residency
from jaxcache.core.sequence import Sequence
from jaxcache.core.tenants import Tenants
from jaxcache.types import Tier

if TYPE_CHECKING:
    from jaxcache.core.prefix_cache import PrefixCache


class Quotas:
    """Knows for each lease its account, and its own pages of every component."""

    def __init__(self, tenants: Tenants, core: PrefixCache):
        self.tenants = tenants
        self.tiers = core.tiers
        self.backups = core.backups
        self._owned: dict[int, tuple[int, list[int]]] = {}
        self.counters = core.counters

    def serve(self, node: Node) -> None:
        """From now on room on the device is made on behalf of the tenant that this node (or root) belongs to."""
        for device in self.tiers.device:
            device.serve(node)

    def serve_lease(self, lease: Lease) -> None:
        """The same for a lease, whose own pages may have changed."""
        self.settle(lease)
        self.serve(lease._node)

    # ---- what leases own

    def settle(self, lease: Lease) -> None:
        """Counts anew the pages that belong to a lease and not (yet) to the tree: something has changed."""
        _, before = self._owned.get(lease.id, (0, [0] * len(self.tiers.device)))
        account = lease._node.group
        now = [self._own(lease, c) for c in range(len(self.tiers.device))]
        for device, old, new in zip(self.tiers.device, before, now, strict=True):
            self.tenants.groups[device.index].own(account, new - old)
        self._owned[lease.id] = account, now

    def forget(self, lease: Lease) -> None:
        """It is released."""
        account, owned = self._owned.pop(lease.id)
        for device, num_pages in zip(self.tiers.device, owned, strict=True):
            self.tenants.groups[device.index].own(account, -num_pages)

    def _own(self, lease: Lease, c: int) -> int:
        table = lease._tables[c]
        if table is None:
            return 1 + len(lease.checkpoints)
        own = table[lease._published // self.tiers.page_tokens :]
        absent = self.tiers.device[c].allocator.num_pages
        num_own = len(own) if c == FULL else int(np.count_nonzero(own != absent))
        return num_own + sum(len(page_ids) for owner, page_ids in lease._duplicates or () if owner == c)

    # ---- admission

    def over(self, sequence: Sequence, prefix: Prefix, num_new_tokens: int) -> bool:
        """Whether a request has to wait for others of its tenant: what they all pin or own would exceed its quota.

        What the tenant's retentions pin counts too. A request that is alone may exceed the quota while it runs, so that
        nothing waits for ever.
        """
        tenant_of = self.tenants.tenant_of
        tenant = tenant_of[sequence.root.group]
        if not tenant or not any(tenant_of[account] == tenant for account, _ in self._owned.values()):
            return False
        for c, device in enumerate(self.tiers.device):
            groups = self.tenants.groups[device.index]
            num_pages = groups.pinned[tenant] + groups.owned[tenant] + self._wanted(c, prefix, num_new_tokens)
            if num_pages > groups.quotas[tenant]:
                return True
        return False

    def floors_block(self, num_new_tokens: int) -> bool:
        """Whether a chunk that finds no room would have it but for the floors of other tenants."""
        tiers = self.tiers
        wanted = -(-num_new_tokens // tiers.page_tokens)
        return all(wanted <= device.allocator.num_pages for c, device in enumerate(tiers.device) if c != tiers.point)

    def _wanted(self, c: int, prefix: Prefix, num_new_tokens: int) -> int:
        """Pages of component c that admitting at this prefix pins anew, loads back or allocates."""
        tiers = self.tiers
        page = tiers.page_tokens
        num_tokens = prefix.num_tokens
        wanted = 1 if c == tiers.point else -(-(num_tokens + num_new_tokens) // page) - num_tokens // page
        low = 0 if c == FULL else num_tokens - 1 if c == tiers.point else tiers.required_start(c, num_tokens)
        start = 0
        for node, end in prefix.path:
            if end > low and (node.pages[c] is None or not node.pins[c]):
                wanted += 1 if c == tiers.point else (end - start) // page
            start = end
        return wanted

    # ---- insert

    def enforce(self, lease: Lease) -> None:
        """What the tenant of a lease has beyond its quota leaves at once, on every tier, as far as it may leave."""
        self.settle(lease)
        tenant = self.tenants.tenant_of[lease._node.group]
        if not tenant:
            return
        for residency in self.tiers.residencies:
            groups = self.tenants.groups[residency.index]
            groups.served, groups.wanted = tenant, 0
            excess = groups.excess(tenant)
            if excess > 0:
                before = groups.resident[tenant]
                groups.own_only = True
                self._give(residency, residency.allocator.num_free + excess)
                groups.own_only = False
                self.counters["quota_pages"] += before - groups.resident[tenant]

    def _give(self, residency: Residency, num_free: int) -> None:
        if residency.tier is Tier.DEVICE:
            self.backups.make_room_on_device(residency.index, num_free)
        else:
            self.tiers.make_room(residency, num_free)

    # ---- to look at

    def stats(self) -> dict[str, Any]:
        """By tenant ("": all without limits), tier and component: pages resident, and the floor and quota in pages."""
        return {
            name: {
                tier.name.lower(): {r.component.name: self._counts(r.index, tenant) for r in residencies}
                for tier, residencies in ((Tier.DEVICE, self.tiers.device), (Tier.HOST, self.tiers.host))
            }
            for tenant, name in enumerate(self.tenants.names)
        }

    def _counts(self, index: int, tenant: int) -> dict[str, int]:
        groups = self.tenants.groups[index]
        return {
            "resident": groups.resident[tenant],
            "pinned": groups.pinned[tenant],
            "floor": groups.floors[tenant],
            "quota": groups.quotas[tenant],
        }
