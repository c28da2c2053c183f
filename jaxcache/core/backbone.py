"""The request path where a node is nothing but its full-attention pages on the device, written out by hand.

It decides exactly what PrefixCache, Admission, Publishing and Tiers decide for every mixture of components and tiers,
without asking each residency of each component, in one function per operation: a third of the time. What is unusual,
mistakes of the caller among it, is left to the general path: these functions then change nothing and answer None or
False. tests/core/test_backbone.py runs the same requests both ways and compares every decision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jaxcache.core.change_log import PUT
from jaxcache.core.lease import Lease, read_only
from jaxcache.core.residency import Residency
from jaxcache.core.sequence import Sequence
from jaxcache.core.tiers import Tiers

if TYPE_CHECKING:
    from jaxcache.core.prefix_cache import PrefixCache


class Backbone:
    """device: the only residency that holds anything; its index on the nodes is 0."""

    def __init__(self, core: PrefixCache):
        self.core = core
        self.leases = core.leases
        self.counters = core.counters
        self.planner = core.planner
        self.tiers = core.tiers
        self.tree = core.tiers.tree
        self.device: Residency = core.tiers.device[0]
        self.page_tokens = core.tiers.page_tokens
        self.output_first = core.config.evict_output_first

    @staticmethod
    def suffices(tiers: Tiers) -> bool:
        return tiers.only_full and tiers.tenants is None and tiers.config.caching

    def admit(self, sequence: Sequence, num_new_tokens: int) -> Lease | None:
        """Pins up to the root, makes room, and builds the table: pages of the path, then own ones."""
        core, tiers, device = self.core, self.tiers, self.device
        if type(sequence) is not Sequence or type(num_new_tokens) is not int or num_new_tokens < 1:
            return None
        if sequence.namespace.owner is not core or sequence.namespace.retired:
            return None
        node, end = self.tree.find(sequence, sequence.num_tokens - 1)
        page, allocator = self.page_tokens, device.allocator
        num_found = end // page
        num_own = -(-(end + num_new_tokens) // page) - num_found
        if num_own + num_found > allocator.num_free + device.num_resident - device.num_pinned:
            return None  # it might fit: some of what was found may be pinned already
        if end < node.end:
            node = tiers.split(node, end)
        tiers.lease_id = id = core.next_lease_id
        core.next_lease_id = id + 1
        node.ends_here += 1
        lease = self.leases[id] = Lease(id, sequence, node, num_new_tokens, tiers, core.plan_is_applied)
        parts = []
        parent = node.parent
        while parent is not None:
            node.hits += 1
            pages, pins = node.pages[0], node.pins
            parts.append(pages)
            if not pins[0]:
                device.num_pinned += len(pages)  # pyright: ignore[reportArgumentType]
                if not node.resident_children[0]:
                    device.order.discard(node)
            pins[0] += 1
            node, parent = parent, parent.parent
        if allocator.num_free < num_own:
            room = self.make_room(num_own)
            assert room, f"{device.component.name}: promised {num_own} pages"
        high = allocator.num_free
        allocator.num_free = low = high - num_own
        parts.reverse()
        parts.append(allocator.stack[low:high])
        lease._tables[0] = read_only(np.concatenate(parts))
        lease._quiet_end = (num_found + num_own) * page
        if tiers.profile is not None:
            tiers.profile.admitted(sequence, lease._node)
        self._count(sequence, end)
        self.planner.note(
            "admit", id, end, sequence.namespace.checksum, sequence.checksum(end, lease._node.id), num_new_tokens
        )
        return lease

    def _count(self, sequence: Sequence, num_found_tokens: int) -> None:
        counters = self.counters
        counters["admits"] += 1
        counters["prompt_tokens"] += sequence.num_tokens
        counters["device_hit_tokens"] += num_found_tokens

    def grow(self, lease: Lease, num_computed: int, end: int) -> bool:
        """A new table with own pages up to token `end`; False: nothing has changed but what is computed."""
        lease.num_computed = num_computed
        if end > lease._quiet_end:
            device, table = self.device, lease._tables[0]
            assert table is not None
            allocator = device.allocator
            missing = -(-end // self.page_tokens) - len(table)
            if allocator.num_free < missing:
                if missing > allocator.num_free + device.num_resident - device.num_pinned:
                    return False
                self.tiers.lease_id = lease.id
                room = self.make_room(missing)
                assert room, f"{device.component.name}: promised {missing} pages"
            high = allocator.num_free
            allocator.num_free = low = high - missing
            lease._tables[0] = table = read_only(np.concatenate((table, allocator.stack[low:high])))
            lease._quiet_end = len(table) * self.page_tokens
            self.planner.note("grow", lease.id, num_computed, end - num_computed)
        if end > lease.num_tokens:
            lease.num_tokens = end
        return True

    def make_room_for(self, lease: Lease, num_pages: int) -> None:
        """Evicts for a lease and those that grow with it, as far as that goes."""
        device = self.device
        self.tiers.lease_id = lease.id
        self.make_room(min(num_pages, device.allocator.num_free + device.num_resident - device.num_pinned))

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
        """Publishes the lease's own whole pages if they make exactly one new node."""
        tiers = self.tiers
        if type(lease) is not Lease or lease._released or lease._tiers is not tiers or type(num_computed) is not int:
            return False
        sequence = lease.sequence
        if not lease.num_computed <= num_computed <= lease.num_tokens or num_computed > sequence.num_tokens:
            return False
        if sequence.namespace.retired:
            return False
        page, at, node = self.page_tokens, lease._published, lease._node
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
            num_pages = len(pages)
            child.pages[0] = pages if 2 * num_pages >= len(table) else pages.copy()
            if device.log is not None:
                device.log.append((PUT, child.id, 0))
            child.pins[0] = child.ends_here = 1
            device.num_resident += num_pages
            device.num_pinned += num_pages
            node.resident_children[0] += 1  # the lease pins `node`, or it is a root: it is no candidate
            node.ends_here -= 1
            lease._node = node = child
            lease._published = end
        lease.num_computed = num_computed
        if tiers.profile is not None:
            tiers.profile.inserted(sequence, node, at)
        self.planner.note("insert", lease.id, lease._published, node.id, num_computed)
        return True

    def release(self, lease: Lease) -> bool:
        """Gives back own pages and pins, the deepest first: it is the first to leave."""
        if type(lease) is not Lease or self.leases.get(lease.id) is not lease:
            return False
        lease._released = True
        lease._quiet_end = -1
        del self.leases[lease.id]
        lease.sequence.num_leases -= 1
        device, table = self.device, lease._tables[0]
        assert table is not None
        if lease._duplicates is not None:
            self.core.publishing.free_duplicates(lease)
        first = lease._published // self.page_tokens
        if first < len(table):
            device.allocator.free(table[first:])
        device.unpin_up(lease._node)
        lease._node.ends_here -= 1
        self.planner.note("release", lease.id)
        return True
