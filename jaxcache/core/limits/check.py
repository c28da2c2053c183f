"""The invariants of retentions and tenants, recomputed from scratch; part of core/invariants.py."""

from __future__ import annotations

from jaxcache.config import pages_of_share
from jaxcache.core.lease import Lease
from jaxcache.core.node import FULL, Node
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.types import Tier


def check_retentions(core: PrefixCache, nodes: list[Node]) -> None:
    """I14: retained pages add up, are pinned, have not outlived their step, and stay within their share."""
    tiers, retentions = core.tiers, core.retentions
    assert all(held.until > tiers.step for held in retentions.live.values()), "I14: a retention has outlived its step"
    needed: dict[int, int] = {}
    for held in retentions.live.values():
        node = held.node
        while node.parent is not None:
            needed[node.id] = needed.get(node.id, 0) + 1
            assert node.pins[FULL], f"I14: {node=} is retained and not pinned"
            node = node.parent
    sums = [sum(held.num_pages[c] for held in retentions.live.values()) for c in range(len(tiers.components))]
    kept = [node for node in nodes if node.id in needed]
    sums[FULL] = sum(len(node.edge) // tiers.tree.page_bytes for node in kept)
    assert all(node.retained == needed.get(node.id, 0) for node in nodes), "I14: retained"
    assert sums == retentions.num_pages, f"I14: {sums=} {retentions.num_pages=}"
    for num_pages, device in zip(sums, tiers.device, strict=True):
        most = pages_of_share(tiers.config.max_retained_share, device.allocator.num_pages)
        assert num_pages <= most, f"I14: {num_pages} pages of {device.component.name} are retained, above {most}"


def check_tenants(core: PrefixCache, nodes: list[Node]) -> None:
    """I15: the accounts of every tenant add up, and a node is on the account of its namespace."""
    tenants = core.tiers.tenants
    assert all(node.parent is not None and node.account == node.parent.account for node in nodes), (
        "I15: a strange account"
    )
    if tenants is None:
        return
    for root in core.tiers.tree.roots.values():
        name = core.tiers.tree.namespaces[root.keys[0]].fields.get("tenant", "")  # pyright: ignore[reportOptionalSubscript]
        tenant = tenants.numbers.get(name, 0)
        assert tenants.tenant_of[root.account] == tenant, f"I15: {root=} {root.account=} is not of {tenant=}"
    for lease in core.leases.values():
        namespace, account = lease.sequence.namespace, lease._node.account
        tenant = 0 if namespace.retired else tenants.numbers.get(namespace.fields.get("tenant", ""), 0)
        assert tenants.tenant_of[account] == tenant, (
            f"I15: {lease=} is charged to {account=}, which is not of {tenant=}"
        )
    for residency, accounts in zip(core.tiers.residencies, tenants.accounts, strict=True):
        resident, pinned = [0] * len(tenants.tenant_of), [0] * len(tenants.tenant_of)
        for node in nodes:
            pages = node.pages[residency.index]
            if pages is not None:
                resident[node.account] += len(pages)
                pinned[node.account] += len(pages) if node.pins[residency.index] else 0
        where = f"{residency.component.name} {residency.tier.name}"
        assert (resident, pinned) == (accounts.num_resident, accounts.num_pinned), f"I15: accounts of {where}"
        owned = [0] * len(tenants.tenant_of)
        for lease in core.leases.values() if residency.tier is Tier.DEVICE else ():
            owned[lease._node.account] += _num_owned(core, lease, residency.index)
        assert owned == accounts.num_owned, f"I15: {owned=} {accounts.num_owned=} of {where}"
        kept = (accounts.resident, accounts.pinned, accounts.owned)
        for sums, counts in zip(kept, (resident, pinned, owned), strict=True):
            again = [0] * len(tenants.shares)
            for account, tenant in enumerate(tenants.tenant_of):
                again[tenant] += counts[account]
            assert again == sums, f"I15: {again=} {sums=} of {where}"


def _num_owned(core: PrefixCache, lease: Lease, c: int) -> int:
    own = core.kinds[c].owned(lease) + [page_ids for owner, page_ids in lease._duplicates or () if owner == c]
    return sum(map(len, own))
