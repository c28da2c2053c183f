"""A recorded tree becomes that of an empty cache, which may have other sizes and other tiers.

    record --suited--> for these tiers --fitted--> for these sizes --placements--> pages are read --adopt--> the tree
                                                                     (nothing has changed until here)

What does not fit is evicted as always: by a cache of the snapshot's size, whose tiers are then cut to the real ones. So
there is one place that knows what may leave before what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from jaxcache.core.eviction.order import EvictionOrder
from jaxcache.core.node import FULL, Node
from jaxcache.core.pages import Purpose, Residency
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.core.serving import RefusedCall, RefusedValue, changes
from jaxcache.core.tokens import namespace_digest
from jaxcache.core.tree_record import NOWHERE, Origins, TreeRecord, record_of
from jaxcache.types import PageIds


class Placement(NamedTuple):
    """Of one residency: page_ids, int32[n], will hold what stands at sources, int64[n], in the snapshot."""

    page_ids: PageIds
    sources: np.ndarray


def check_quiet(core: PrefixCache) -> None:
    """Every page that the tree names is there: RuntimeError while a request runs, or a page has yet to be moved.

    STOREs, QUERYs and FETCHes may be in flight: they touch nothing that the tree has, or only read it.
    """
    if core.leases:
        raise RefusedCall(f"a snapshot needs every lease released first; held: {sorted(core.leases)[:8]}")
    if not core.plan_is_applied() or core.admission.loading:
        raise RefusedCall("pages are still to be moved: call pools = cache.drain(pools) before cache.snapshot")
    missing = core.leases.uncomputed
    if missing is not None and missing.version >= core.tiers.pools_version:
        raise RefusedCall(
            f"lease {missing.lease} was published up to {missing.end} tokens, but no model step has run on the pools "
            "since: pass on what it returned"
        )


class Restoring:
    """Of one core, which must hold nothing yet; its namespaces may be there."""

    def __init__(self, core: PrefixCache):
        self.core = core
        self.serving = core.serving

    def check(self, record: TreeRecord) -> None:
        """RuntimeError if the cache has anything; ValueError if it has a namespace that the snapshot has retired."""
        core = self.core
        if core.tiers.tree.num_nodes or core.leases or core.admission.loading or not core.plan_is_applied():
            raise RefusedCall("this cache has pages, or requests run: restore into a new one, or call reset() first")
        for digest, namespace in core.tiers.tree.namespaces.items():
            if digest in record.retired:
                raise RefusedValue(f"{namespace!r} was retired before the snapshot was made: it must not come back")

    def fitted(self, record: TreeRecord) -> TreeRecord:
        """What of it this cache can hold. Changes nothing."""
        record = self._suited(record)
        if all(
            len(placement.sources) <= residency.allocator.num_free
            for residency, placement in zip(self.core.tiers.residencies, placements(self.core, record), strict=True)
        ):
            return record
        return self._evicted(record)

    def _suited(self, record: TreeRecord) -> TreeRecord:
        """For the tiers that there are: what may not be in host memory goes to the device, if what is above it does.

        It may not where there is no host tier, or where host memory has to be closed (all policies but write_back).
        Namespaces that were retired here stay unreachable.
        """
        tiers = self.core.tiers
        num = len(tiers.components)
        first = record.first_page.copy()
        kept = np.ones(record.num_nodes, np.bool_)
        stays = [namespace_digest(fields) not in tiers.tree.retired for fields in record.namespaces]
        for i, parent in enumerate(record.parent.tolist()):
            if parent >= 0:
                kept[i] = kept[parent]
            else:
                kept[i] = stays[-1 - parent]
            above = None if parent < 0 else first[parent]
            for c, host in enumerate(tiers.host):
                is_closed = c != FULL or above is None or tiers.writes_back or above[c + num] != NOWHERE
                if first[i, c + num] != NOWHERE and not (host.allocator.num_pages and is_closed):
                    first[i, c] = first[i, c + num]
                    first[i, c + num] = NOWHERE
            if above is not None and above[FULL] == NOWHERE:
                first[i, FULL] = NOWHERE
            kept[i] &= first[i, FULL] != NOWHERE or first[i, num] != NOWHERE
        orders = [order[first[order, r] != NOWHERE] for r, order in enumerate(record.orders)]
        return replace(record, first_page=first, orders=tuple(orders)).subset(kept, stays)

    def _evicted(self, record: TreeRecord) -> TreeRecord:
        """What is left when a cache that has room for all of it is cut to the size of this one."""
        core, tiers = self.core, self.core.tiers
        num = len(tiers.components)
        needed = [len(placement.sources) for placement in placements(core, record)]
        sizes = [max(n, r.allocator.num_pages) for n, r in zip(needed, tiers.residencies, strict=True)]
        names = [component.name for component in tiers.components]
        config = replace(
            core.config,
            device_pages=dict(zip(names, sizes[:num], strict=True)),
            host_pages=dict(zip(names, sizes[num:], strict=True)),
            events=False,
        )
        large = PrefixCache(core.components, config)
        if large.tiers.tenants is not None and tiers.tenants is not None:
            for accounts, real in zip(large.tiers.tenants.accounts, tiers.tenants.accounts, strict=True):
                accounts.floors = real.floors
                accounts.quotas = [accounts.quotas[0], *real.quotas[1:]]  # of those that have limits
        origins = Restoring(large).adopt(record, placements(large, record), 0)
        for residency in [*large.tiers.host, *large.tiers.device]:
            self._cut(large, residency, tiers.residencies[residency.index].allocator.num_free, origins)
        return record_of(large, origins)

    @staticmethod
    def _cut(large: PrefixCache, residency: Residency, num_pages: int, origins: Origins) -> None:
        """Evicts until that many pages, free or not, are left; under write_back device pages go to host memory."""
        surplus = residency.allocator.num_pages - num_pages
        num = len(large.tiers.components)
        for root in (None, *large.tiers.tree.all_roots()):  # floors protect a tenant from all but itself
            large.tiers.make_room(residency, surplus, Purpose(account=0 if root is None else root.account))
            if residency.allocator.num_free >= surplus:
                break
        names = [component.name for component in large.components]
        for transfer in large.take_plan().transfers:
            for move in transfer.moves:
                c = names.index(move.component)
                origins[c + num][move.dst_page_ids] = origins[c][move.src_page_ids]
        residency.allocator.allocate(surplus)

    @changes
    def adopt(self, record: TreeRecord, placed: Sequence[Placement], checksum: int) -> Origins:
        """Makes the tree. The pages of `placed`, which `placements` named for this record, hold their content already.

        checksum: of what was restored, for the digest of decisions
        returns:  what every page now holds, as `tree_record.sources_of` says it
        """
        core, tiers = self.core, self.core.tiers
        self.check(record)
        tiers.tree.retired.update(dict.fromkeys(record.retired))
        roots = [tiers.tree.root(core.new_namespace(**fields)) for fields in record.namespaces]
        nodes = self._nodes(record, roots)
        origins = []
        for residency, placement, order in zip(tiers.residencies, placed, record.orders, strict=True):
            num_pages = residency.allocator.num_pages
            origins.append(np.full(num_pages, NOWHERE, np.int64))
            origins[-1][placement.page_ids] = placement.sources
            page_ids = residency.allocator.allocate(len(placement.page_ids))
            assert np.array_equal(page_ids, placement.page_ids), f"I1: {residency.component.name} was placed elsewhere"
            at = 0
            counts = _num_entry_pages(core, record, residency)
            for i in np.flatnonzero(record.first_page[:, residency.index] != NOWHERE).tolist():
                tiers.put(residency, nodes[i], page_ids[at : at + counts[i]])
                at += counts[i]
            _restore_order(residency.order, [nodes[i] for i in order.tolist()])
        if core.stores.attached:
            core.stores.back_fill()
        core.decisions.note("restore", record.num_nodes, checksum)
        return origins

    def _nodes(self, record: TreeRecord, roots: Sequence[Node]) -> list[Node]:
        tiers = self.core.tiers
        page_bytes = tiers.tree.page_bytes
        next(tiers.clock)  # 0 means that it was never used
        moments = {moment: next(tiers.clock) for moment in sorted({*record.last_used.tolist()} - {-1})} | {-1: -1}
        nodes: list[Node] = []
        edges = memoryview(record.tokens.tobytes())
        at = 0
        for i, parent_number in enumerate(record.parent.tolist()):
            parent = roots[-1 - parent_number] if parent_number < 0 else nodes[parent_number]
            num_pages = int(record.num_pages[i])
            edge = bytes(edges[at : at + num_pages * page_bytes])
            at += len(edge)
            node = tiers.tree.add(parent, edge[:page_bytes], edge, parent.end + num_pages * tiers.page_tokens)
            node.hits = int(record.hits[i])
            node.last_used = moments[int(record.last_used[i])]
            node.priority = int(record.priority[i])
            node.is_output = bool(record.is_output[i])
            if tiers.profile is not None:
                tiers.profile.arrived(node)
            nodes.append(node)
        return nodes


def placements(core: PrefixCache, record: TreeRecord) -> list[Placement]:
    """Which pages `adopt` will take for which of the snapshot, by residency; fewer than needed if it does not fit."""
    placed = []
    for residency in core.tiers.residencies:
        first = record.first_page[:, residency.index]
        counts = np.where(first != NOWHERE, _num_entry_pages(core, record, residency), 0)
        begins = np.repeat(first - np.append(0, np.cumsum(counts)[:-1]) if len(counts) else first, counts)
        sources = begins + np.arange(len(begins))
        free = residency.allocator.free_ids()
        placed.append(Placement(free[max(0, len(free) - len(sources)) :].copy(), sources))
    return placed


def _num_entry_pages(core: PrefixCache, record: TreeRecord, residency: Residency) -> np.ndarray:
    return record.num_entry_pages(core.kinds[residency.index % len(core.kinds)])


def _restore_order(order: EvictionOrder, recorded: list[Node]) -> None:
    """What was not in the order before has come from host memory, and was used before all that was.

    Generated text that led the order leads it again; any that stood elsewhere had been used since.
    """
    known = {node.id: None for node in recorded}
    older = sorted((node for node in order if node.id not in known), key=lambda node: node.last_used)
    nodes = [node for node in older + recorded if node in order]
    leading = list(takewhile(lambda node: node.is_output, nodes))
    for node in nodes:
        order.discard(node)
    for node in leading[::-1]:
        order.add_as_next_victim(node)
    for node in nodes[len(leading) :]:
        order.add(node)
