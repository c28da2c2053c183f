"""The request path where a node is nothing but its full-attention pages on the device, written out by hand.

It decides exactly what Admission, Publishing and Tiers decide for every mixture of components and tiers, without asking
each residency of each component, and in one loop per operation: a third of the time. tests/core/test_backbone.py runs
the same requests both ways and compares every decision.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jaxcache.core.change_log import PUT
from jaxcache.core.lease import Lease, read_only
from jaxcache.core.residency import Residency
from jaxcache.core.sequence import Sequence
from jaxcache.core.tiers import Tiers


class Backbone:
    """device: the only residency that holds anything; its index on the nodes is 0."""

    def __init__(self, tiers: Tiers, plan_is_applied: Callable[[], bool]):
        self.tiers = tiers
        self.plan_is_applied = plan_is_applied
        self.tree = tiers.tree
        self.device: Residency = tiers.device[0]
        self.page_tokens = tiers.page_tokens
        self.output_first = tiers.config.evict_output_first

    @staticmethod
    def suffices(tiers: Tiers) -> bool:
        return tiers.only_full and tiers.tenants is None

    def admit(self, id: int, sequence: Sequence, num_new_tokens: int, max_cached_tokens: int | None) -> Lease | None:
        """Pins up to the root, makes room, and builds the table: pages of the path, then own ones.

        None: nothing has changed; whether it fits at all, the general path finds out.
        """
        tiers, device = self.tiers, self.device
        if sequence.namespace.retired or not tiers.config.caching:
            return None
        limit = sequence.num_tokens - 1
        if max_cached_tokens is not None and max_cached_tokens < limit:
            limit = max_cached_tokens
        node, end = self.tree.find(sequence, limit)
        page = self.page_tokens
        num_found = end // page
        num_own = -(-(end + num_new_tokens) // page) - num_found
        allocator = device.allocator
        if num_own + num_found > allocator.num_free + device.num_resident - device.num_pinned:
            return None  # it might fit: some of what was found may be pinned already
        if end < node.end:
            node = tiers.split(node, end)
        node.ends_here += 1
        tiers.lease_id = id
        lease = Lease(id, sequence, node, num_new_tokens, tiers, self.plan_is_applied)
        path_pages = []
        parent = node.parent
        while parent is not None:
            node.hits += 1
            pages, pins = node.pages[0], node.pins
            path_pages.append(pages)
            if not pins[0]:
                device.num_pinned += len(pages)  # pyright: ignore[reportArgumentType]
                if not node.resident_children[0]:
                    device.order.discard(node)
            pins[0] += 1
            node, parent = parent, parent.parent
        high = allocator.num_free
        if high < num_own:
            room = self.make_room(num_own)
            assert room, f"{device.component.name}: promised {num_own} pages"
            high = allocator.num_free
        allocator.num_free = low = high - num_own
        path_pages.reverse()
        path_pages.append(allocator.stack[low:high])
        table = np.concatenate(path_pages)
        lease._tables[0] = read_only(table)
        lease._quiet_end = len(table) * page
        return lease

    def grow(self, lease: Lease, end: int) -> bool:
        """A new table with own pages up to token `end`; False: nothing has changed."""
        device, table = self.device, lease._tables[0]
        assert table is not None
        allocator = device.allocator
        missing = -(-end // self.page_tokens) - len(table)
        high = allocator.num_free
        if high < missing:
            if missing > high + device.num_resident - device.num_pinned:
                return False
            self.tiers.lease_id = lease.id
            room = self.make_room(missing)
            assert room, f"{device.component.name}: promised {missing} pages"
            high = allocator.num_free
        allocator.num_free = low = high - missing
        lease._tables[0] = table = read_only(np.concatenate((table, allocator.stack[low:high])))
        lease._quiet_end = len(table) * self.page_tokens
        return True

    def make_room(self, num_pages: int) -> bool:
        """Evicts until `num_pages` are free, the last victim only as far as needed; False if nothing can leave."""
        tiers, tree, device = self.tiers, self.tree, self.device
        allocator, order = device.allocator, device.order
        stack, remember = allocator.stack, tiers.evictions.append
        reason = (device, tiers.step, tiers.reason, tiers.lease_id)
        free = before = allocator.num_free
        while free < num_pages:
            victim = order.first()
            if victim is None:
                break
            pages, parent = victim.pages[0], victim.parent
            assert pages is not None and parent is not None and not victim.pins[0], f"I3: {victim=}"
            surplus = len(pages) + free - num_pages
            if surplus > 0:
                victim.pages[0] = pages[:surplus]
                pages = pages[surplus:]
                remember((victim.id, tree.shorten(victim, surplus), *reason))
            else:
                order.discard(victim)
                victim.pages[0] = None
                tree.remove(victim)
                siblings = parent.resident_children[0] = parent.resident_children[0] - 1
                if not siblings and not parent.pins[0] and parent.pages[0] is not None:
                    order.add_back(parent)
                remember((parent.id, victim.first_page, *reason))
            top = free + len(pages)
            stack[free:top] = pages
            free = top
        allocator.num_free = free
        device.num_resident -= free - before
        tiers.num_evicted_pages[0] += free - before
        return free >= num_pages

    def insert(self, lease: Lease, num_computed: int) -> bool:
        """Publishes the lease's own whole pages if they make exactly one new node; False: nothing has changed."""
        tiers, sequence = self.tiers, lease.sequence
        at, node = lease._published, lease._node
        page = self.page_tokens
        end = num_computed // page * page
        if at < end:
            first_page = bytes(sequence.data[at * 4 : (at + page) * 4])
            prompt_end = sequence.prompt_tokens // page * page
            if first_page in node.children or (self.output_first and at < prompt_end < end):
                return False
            if sequence.cuts and any(at < cut < end for cut in sequence.cuts):
                return False
            child = self.tree.add(node, first_page, sequence.edge(at, end), end)
            child.is_output = self.output_first and at >= prompt_end
            device, table = self.device, lease._tables[0]
            assert table is not None
            pages = table[at // page : end // page]  # tables never change: a view, if it keeps no much larger one alive
            child.pages[0] = pages if 2 * len(pages) >= len(table) else pages.copy()
            if device.log is not None:
                device.log.append((PUT, child.id, 0))
            child.pins[0] = child.ends_here = 1
            num_pages = (end - at) // page
            device.num_resident += num_pages
            device.num_pinned += num_pages
            node.resident_children[0] += 1  # the lease pins `node`, or it is a root: it is no candidate
            node.ends_here -= 1
            lease._node = child
            lease._published = end
        if tiers.profile is not None:
            tiers.profile.inserted(sequence, lease._node, at)
        return True

    def release(self, lease: Lease) -> None:
        """Gives back own pages and pins, the deepest first: it is the first to leave."""
        device = self.device
        table = lease._tables[0]
        assert table is not None
        first = lease._published // self.page_tokens
        if first < len(table):
            device.allocator.free(table[first:])
        device.unpin_up(lease._node)
        lease._node.ends_here -= 1
