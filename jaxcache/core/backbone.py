"""The request path where a node is nothing but its full-attention pages on the device, written out by hand.

It decides exactly what Admission, Publishing and Tiers decide for every mixture of components and tiers, without asking
each residency of each component, and in one loop per operation: a third of the time. tests/core/test_backbone.py runs
the same requests both ways and compares every decision.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jaxcache.core.change_log import PUT
from jaxcache.core.lease import Lease
from jaxcache.core.radix_tree import Node
from jaxcache.core.residency import Residency
from jaxcache.core.sequence import Sequence
from jaxcache.core.tiers import Tiers


class Backbone:
    """device: the only residency that holds anything; its index on the nodes is 0."""

    def __init__(self, tiers: Tiers):
        self.tiers = tiers
        self.tree = tiers.tree
        self.device: Residency = tiers.device[0]
        self.page_tokens = tiers.page_tokens
        self.output_first = tiers.config.evict_output_first

    @staticmethod
    def suffices(tiers: Tiers) -> bool:
        return tiers.only_full

    def admit(
        self, id: int, sequence: Sequence, last: Node, num_new_tokens: int, plan_is_applied: Callable[[], bool]
    ) -> Lease:
        """Pins up to the root, makes room, and builds the table: pages of the path, then own ones."""
        device, allocator = self.device, self.device.allocator
        last.ends_here += 1
        lease = Lease(id, sequence, last, num_new_tokens, self.tiers, plan_is_applied)
        path_pages = []
        node, parent = last, last.parent
        while parent is not None:
            node.hits += 1
            pages, pins = node.pages[0], node.pins
            if not pins[0]:
                device.num_pinned += len(pages)  # pyright: ignore[reportArgumentType]
                if not node.resident_children[0]:
                    device.order.discard(node)
            pins[0] += 1
            path_pages.append(pages)
            node, parent = parent, parent.parent
        num_own = -(-lease.num_tokens // self.page_tokens) - last.end // self.page_tokens
        high = allocator.num_free
        if high < num_own:
            room = self.make_room(num_own)
            assert room, f"{device.component.name}: promised {num_own} pages"
            high = allocator.num_free
        allocator.num_free = low = high - num_own
        if path_pages:
            path_pages.reverse()
            path_pages.append(allocator.stack[low:high])
            table = np.concatenate(path_pages)
        else:
            table = allocator.stack[low:high].copy()
        table.flags.writeable = False
        lease._tables[0] = table
        return lease

    def make_room(self, num_pages: int) -> bool:
        """Evicts until `num_pages` are free, the last victim only as far as needed; False if nothing can leave."""
        tiers, tree, device, order = self.tiers, self.tree, self.device, self.device.order
        allocator = device.allocator
        free = before = allocator.num_free
        while free < num_pages:
            victim = order.first()
            if victim is None:
                break
            pages = victim.pages[0]
            assert pages is not None and not victim.pins[0] and not victim.children, f"I3, I6: {victim=}"
            surplus = len(pages) + free - num_pages
            if surplus > 0:
                victim.pages[0] = pages[:surplus]
                pages = pages[surplus:]
                id, first_page = victim.id, tree.shorten(victim, surplus)
            else:
                parent = victim.parent
                assert parent is not None
                order.discard(victim)
                victim.pages[0] = None
                siblings = parent.resident_children[0] = parent.resident_children[0] - 1
                if not siblings and not parent.pins[0] and parent.pages[0] is not None:
                    order.add_back(parent)
                id, first_page = parent.id, victim.first_page
                tree.remove(victim)
            top = free + len(pages)
            allocator.stack[free:top] = pages
            free = top
            tiers.evictions.append((id, first_page, device, tiers.step, tiers.reason, tiers.lease_id))
        allocator.num_free = free
        device.num_resident -= free - before
        tiers.num_evicted_pages[0] += free - before
        return free >= num_pages

    def insert(self, lease: Lease, end: int) -> bool:
        """Publishes the lease's own pages up to `end` if they make exactly one new node; False: nothing has changed."""
        at, node, sequence = lease._published, lease._node, lease.sequence
        page = self.page_tokens
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
        pages = table[at // page : end // page]  # tables never change: a view, unless it kept a much larger one alive
        child.pages[0] = pages if 2 * len(pages) >= len(table) else pages.copy()
        if device.log is not None:
            device.log.append((PUT, child.id, 0))
        child.pins[0] = child.ends_here = 1
        device.num_resident += len(pages)
        device.num_pinned += len(pages)
        node.resident_children[0] += 1  # the lease pins `node`, or it is a root: it is no candidate
        node.ends_here -= 1
        lease._node = child
        lease._published = end
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
