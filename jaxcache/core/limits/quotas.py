"""Quotas of tenants: who is over the quota leaves first, waits at admission, and gives way when it inserts.

Made only if tenants are configured: nothing here costs anything without.
"""

from __future__ import annotations

from typing import Any

from jaxcache.core.decisions import Counters
from jaxcache.core.kinds import Kinds
from jaxcache.core.lease import Lease
from jaxcache.core.limits.tenants import Tenants
from jaxcache.core.match import Prefix
from jaxcache.core.tiers import Tiers
from jaxcache.core.tokens import Sequence
from jaxcache.types import Tier


class Quotas:
    """Knows for each lease its account, and its own pages of every component."""

    def __init__(self, tenants: Tenants, tiers: Tiers, kinds: Kinds, counters: Counters):
        self.tenants = tenants
        self.tiers = tiers
        self.kinds = kinds
        self.counters = counters
        self._owned: dict[int, tuple[int, list[int]]] = {}

    # ---- what leases own

    def settle(self, lease: Lease) -> None:
        """Counts anew the pages that belong to a lease and not (yet) to the tree: something has changed."""
        _, before = self._owned.get(lease.id, (0, [0] * len(self.kinds)))
        account = lease._node.account
        now = [sum(map(len, kind.owned(lease))) for kind in self.kinds]
        for c, page_ids in lease._duplicates or ():
            now[c] += len(page_ids)
        for kind, old, new in zip(self.kinds, before, now, strict=True):
            self.tenants.accounts[kind.device.index].own(account, new - old)
        self._owned[lease.id] = account, now

    def forget(self, lease: Lease) -> None:
        """It is released."""
        account, owned = self._owned.pop(lease.id)
        for kind, num_pages in zip(self.kinds, owned, strict=True):
            self.tenants.accounts[kind.device.index].own(account, -num_pages)

    # ---- admission

    def over(self, sequence: Sequence, prefix: Prefix, num_new_tokens: int) -> bool:
        """Whether a request has to wait for others of its tenant: what they all pin or own would exceed its quota.

        What the tenant's retentions pin counts too. A request that is alone may exceed the quota while it runs, so that
        nothing waits for ever.
        """
        tenant_of = self.tenants.tenant_of
        tenant = tenant_of[sequence.root.account]
        if not tenant or not any(tenant_of[account] == tenant for account, _ in self._owned.values()):
            return False
        end = prefix.num_tokens + num_new_tokens
        for kind in self.kinds:
            accounts = self.tenants.accounts[kind.device.index]
            need = kind.need(prefix.num_tokens, prefix.node, end)
            num_pages = accounts.pinned[tenant] + accounts.owned[tenant] + need.num_pages
            if num_pages > accounts.quotas[tenant]:
                return True
        return False

    def floors_block(self, num_new_tokens: int) -> bool:
        """Whether a chunk that finds no room would have it but for the floors of other tenants."""
        return all(kind.num_own_pages(0, num_new_tokens) <= kind.device.allocator.num_pages for kind in self.kinds)

    # ---- insert

    def enforce(self, lease: Lease) -> None:
        """What the tenant of a lease has beyond its quota leaves at once, on every tier, as far as it may leave."""
        tenant = self.tenants.tenant_of[lease._node.account]
        if not tenant:
            return
        purpose = lease.purpose._replace(reason="quota")
        for residency in self.tiers.residencies:
            accounts = self.tenants.accounts[residency.index]
            excess = accounts.excess(tenant)
            if excess > 0:
                before = accounts.resident[tenant]
                self.tiers.make_room(residency, residency.allocator.num_free + excess, purpose)
                self.counters["quota_pages"] += before - accounts.resident[tenant]

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
        accounts = self.tenants.accounts[index]
        return {
            "resident": accounts.resident[tenant],
            "pinned": accounts.pinned[tenant],
            "floor": accounts.floors[tenant],
            "quota": accounts.quotas[tenant],
        }
