"""The invariants of docs/BEHAVIOURS.md, recomputed from scratch. Slow; for tests, simulations and suspicion.

I5, I8, I9 and I12 are about sequences of calls: the state machine and the simulation check them.
"""

from __future__ import annotations

import numpy as np

from jaxcache.core.limits.check import check_retentions, check_tenants
from jaxcache.core.node import FULL, Node
from jaxcache.core.pages import Purpose, Residency
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.types import WritePolicy


def check(core: PrefixCache) -> None:
    """Raises AssertionError naming the invariant that does not hold."""
    nodes = all_nodes(core)
    for node in nodes:
        _check_node(core, node)
    for residency in core.tiers.residencies:
        _check_residency(core, residency, nodes)
    _check_roots(core)
    _check_idle_pins(core, nodes)
    check_retentions(core, nodes)
    check_tenants(core, nodes)


def all_nodes(core: PrefixCache) -> list[Node]:
    """Every node but the roots, parents first."""
    nodes = []
    stack = [child for root in core.tiers.tree.all_roots() for child in root.children.values()]
    while stack:
        node = stack.pop()
        nodes.append(node)
        stack += node.children.values()
    assert len(nodes) == core.tiers.tree.num_nodes, f"I4: {core.tiers.tree.num_nodes=} but {len(nodes)} found"
    return nodes


def _check_node(core: PrefixCache, node: Node) -> None:
    tiers = core.tiers
    page_bytes = tiers.tree.page_bytes
    parent = node.parent
    assert parent is not None
    assert len(node.edge) and len(node.edge) % page_bytes == 0, f"I4: {node=} is not whole pages"
    assert node.first_page == bytes(node.edge[:page_bytes]), f"I4: {node=} first page"
    assert parent.children.get(node.first_page) is node, f"I4: {node=} is not its parent's child"
    assert node.start == parent.end, f"I4: {node=} does not follow {parent=}"
    assert core.kinds.full.resident(node), f"I7: {node=} has no full pages anywhere"
    if parent.parent is not None:
        device, host = tiers.device[FULL].index, tiers.host[FULL].index
        assert node.pages[device] is None or parent.pages[device] is not None, f"I6: device closure at {node=}"
        closed = tiers.config.write_policy is WritePolicy.WRITE_BACK or parent.pages[host] is not None
        assert node.pages[host] is None or closed, f"I6: host closure at {node=}"
    for residency in (tiers.device[FULL], tiers.host[FULL]):
        below = sum(child.pins[residency.index] for child in node.children.values())
        assert node.pins[residency.index] >= below, f"I2: {node=} has fewer pins than its children"


def _check_residency(core: PrefixCache, residency: Residency, nodes: list[Node]) -> None:
    index = residency.index
    held = _held_elsewhere(core, residency)
    resident = pinned = candidates = 0
    kind = core.kinds[index % len(core.kinds)]
    for node in nodes:
        pages = node.pages[index]
        assert node.pins[index] >= 0, f"I2: {node=}"
        if residency.is_closed:
            children = sum(child.pages[index] is not None for child in node.children.values())
            assert node.resident_children[index] == children, f"I6: {node=} counts its resident children wrong"
        assert (node in residency.order) == residency.evictable(node), f"I3: {node=} in {residency.tier.name} order"
        if pages is None:
            continue
        expected = kind.num_entry_pages(len(node.edge) // 4)
        assert len(pages) == expected, f"I1: {node=} has {len(pages)} pages"
        resident += len(pages)
        pinned += len(pages) if node.pins[index] else 0
        candidates += residency.evictable(node)
        held.append(pages)
    assert len(residency.order) == candidates, f"I3: {residency.tier.name} order holds strangers"
    assert (resident, pinned) == (residency.num_resident, residency.num_pinned), f"I1: sums of {residency.tier.name}"
    ids = np.concatenate([*held, residency.allocator.free_ids()])
    capacity = residency.allocator.num_pages
    assert len(ids) == capacity and len(np.unique(ids)) == capacity, (
        f"I1: {residency.component.name} {residency.tier.name}: {len(ids)} ids ({len(np.unique(ids))}) of {capacity}"
    )


def _held_elsewhere(core: PrefixCache, residency: Residency) -> list[np.ndarray]:
    """Page ids that leases and tickets own, or that are to be freed later."""
    tiers = core.tiers
    held = [pages for later in core.clearing.deferred for owner, pages in later.pages if owner is residency]
    c = residency.index % len(tiers.components)
    if residency in tiers.host:
        return held + [prefetch.pages[c] for prefetch in core.prefetches.live.values()]
    for lease in core.leases.values():
        held += core.kinds[c].owned(lease)
        held += [page_ids for owner, page_ids in lease._duplicates or () if owner == c]
    return held


def _check_roots(core: PrefixCache) -> None:
    seen: dict[int, None] = {}
    for digest, root in core.tiers.tree.roots.items():
        assert core.tiers.tree.namespaces[digest].digest == digest and root.id not in seen, f"I11: {root=}"
        assert all(pages is None for pages in root.pages), f"I11: {root=} has pages"
        seen[root.id] = None


def _check_idle_pins(core: PrefixCache, nodes: list[Node]) -> None:
    """I2: with nothing running and nothing retained, nothing is pinned."""
    device_idle = not core.leases and not core.admission.loading and not core.retentions.live
    host_idle = not core.stores.live and not core.prefetches.live
    both = core.config.write_policy is WritePolicy.WRITE_BACK
    for node in nodes:
        for residency in core.tiers.device if device_idle and (host_idle or not both) else []:
            assert node.pins[residency.index] == 0, f"I2: leaked device pin at {node=}"
        for residency in core.tiers.host if host_idle and (device_idle or not both) else []:
            assert node.pins[residency.index] == 0, f"I2: leaked host pin at {node=}"
        assert node.ends_here == 0 or core.leases, f"I2: nothing ends at {node=}"


def check_empty(core: PrefixCache) -> None:
    """I10: after everything is released, quiet and evicted, every allocator is full again, on every tier."""
    assert not core.leases and not core.live_transfers() and not core.admission.loading, "I10: something still runs"
    core.retentions.release_all()
    roots = core.tiers.tree.all_roots() or [None]
    for residency in core.tiers.residencies:  # the device first: under write_back it goes to host memory
        for root in roots:  # everybody may take all that is its own
            purpose = Purpose(account=0 if root is None else root.account)
            core.tiers.make_room(residency, residency.allocator.num_pages, purpose)
        allocator = residency.allocator
        assert allocator.num_free == allocator.num_pages, f"I10: {residency.component.name} {residency.tier.name}"
    assert core.tiers.tree.num_nodes == 0, f"I10: {core.tiers.tree.num_nodes} nodes are left"
