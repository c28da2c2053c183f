"""Publishing: a lease's computed pages become the tree's, and pages that a window has left behind are given back.

|-- the tree's, pinned --|-- own pages --|-- room --|
0                    published        computed   num_tokens
                         |------>|  insert moves `published` up to the last whole computed page
"""

from __future__ import annotations

import numpy as np

from jaxcache.core.lease import Lease, read_only
from jaxcache.core.missing import Cause
from jaxcache.core.planner import Counters, Planner
from jaxcache.core.radix_tree import FULL, Node
from jaxcache.core.residency import Residency
from jaxcache.core.tiers import Tiers
from jaxcache.types import PageIds


class Publishing:
    """Changes the tables of leases by replacing them: a running program may still read the old ones."""

    def __init__(self, tiers: Tiers, planner: Planner, counters: Counters):
        self.tiers = tiers
        self.planner = planner
        self.counters = counters
        self.output_first = tiers.config.evict_output_first
        self.stable_tables = tiers.config.stable_tables
        # Of generated text only pages of full attention count as unused (`Node.last_used`), whatever else is there.
        self.full_last = (*tiers.partial, FULL)

    def report(self, lease: Lease, num_computed: int) -> None:
        """The caller has computed up to here."""
        lease.num_computed = num_computed
        if self.tiers.suffixes:
            self._leave_behind(lease, num_computed)

    # ---- windows

    def live_start(self, lease: Lease, c: int, num_computed: int) -> int:
        """Start of the window of the newest position at which the request could be resumed, not of its current one.

        Of a prompt that is computed this is a position before its end: the same prompt, sent again, has to compute its
        last token at least.
        """
        grid, page = self.tiers.grid_tokens, self.tiers.page_tokens
        newest = num_computed - (num_computed == lease.sequence.prompt_tokens)
        return min(self.tiers.required_start(c, newest // grid * grid), num_computed // page * page)

    def _leave_behind(self, lease: Lease, num_computed: int) -> None:
        """Gives back own window pages, and pins, that are behind the live window."""
        tiers = self.tiers
        page = tiers.page_tokens
        for c in tiers.suffixes:
            live = self.live_start(lease, c, num_computed)
            if live > lease._window_starts[c]:
                table, allocator = lease._tables[c], tiers.device[c].allocator
                assert table is not None
                first, last = max(lease._published, lease._window_starts[c]) // page, live // page
                if first < last:
                    allocator.free(table[first:last])
                table = table.copy()
                table[:last] = allocator.num_pages
                lease._tables[c] = read_only(table)
                lease._window_starts[c] = live
            if lease._node.parent is not None and lease._pin_tops[c] < live:
                self._unpin_behind(lease, c, live)

    def _unpin_behind(self, lease: Lease, c: int, live: int) -> None:
        """What only this request goes on from leaves before others: it has gone on."""
        device, host = self.tiers.device[c], self.tiers.host[c]
        node, top, new_top = lease._node, lease._pin_tops[c], lease._published
        is_passed = not node.children
        while node.parent is not None and node.end > top:
            if node.end <= live:
                device.unpin(node)
                if is_passed:
                    device.demote(node)
                    host.demote(node)
            else:
                new_top = node.start
            node = node.parent
            is_passed = is_passed and len(node.children) == 1
        lease._pin_tops[c] = new_top

    # ---- insert

    def insert(self, lease: Lease, num_computed: int) -> None:
        tiers = self.tiers
        page = tiers.page_tokens
        if lease._state_node is not None and num_computed > lease.num_cached_tokens:
            assert tiers.point is not None
            tiers.device[tiers.point].unpin(lease._state_node)
            lease._state_node = None
        end = num_computed // page * page
        start = at = lease._published
        node = lease._node
        if at < end:
            lives = [(c, self.live_start(lease, c, num_computed)) for c in tiers.suffixes] if tiers.suffixes else ()
            fresh: dict[int, PageIds] = {}
            while at < end:
                child = self._child(lease, node, at, end, lives)
                if child is None:
                    break
                self._publish_full(lease, child, at, fresh)
                for c, live in lives:
                    self._publish_window(lease, child, c, at, live, fresh)
                at, node = child.end, child
            for c, table in fresh.items():
                lease._tables[c] = read_only(table)
            if node is not lease._node:
                node.ends_here += 1
                lease._node.ends_here -= 1
                lease._node = node
            lease._published = at
        if tiers.profile is not None:
            tiers.profile.inserted(lease.sequence, lease._node, start)
        if not lease.checkpoints:
            return
        at = lease._published
        for position in [position for position in lease.checkpoints if position <= min(at, num_computed)]:
            self._publish_state(lease, position, lease.checkpoints.pop(position))

    def _replace(self, lease: Lease, c: int, fresh: dict[int, PageIds], pages: slice, page_ids: PageIds) -> None:
        """Writes the tree's ids into a new table; the old one was handed out. Not where tables are to be stable."""
        if self.stable_tables:
            return
        if c not in fresh:
            table = lease._tables[c]
            assert table is not None
            fresh[c] = table.copy()
        fresh[c][pages] = page_ids

    def _child(self, lease: Lease, node: Node, at: int, end: int, lives) -> Node | None:
        """The node that holds the sequence's next pages from `at` on: found, cut to what agrees, or new.

        None if it is being loaded back: its pages cannot replace the lease's own yet.
        """
        tiers = self.tiers
        tree = tiers.tree
        data = lease.sequence.data
        prompt_end = lease.sequence.prompt_tokens // tiers.page_tokens * tiers.page_tokens
        first_page = bytes(data[at * 4 : at * 4 + tree.page_bytes])
        child = node.children.get(first_page)
        if child is None:
            stop = prompt_end if self.output_first and at < prompt_end < end else end
            for _, live in lives:
                if at < live < stop:
                    stop = live
            for cut in lease.sequence.cuts:
                if at < cut < stop:
                    stop = cut
            child = tree.add(node, first_page, lease.sequence.edge(at, stop), stop)
            child.is_output = self.output_first and at >= prompt_end
            return child
        if child.ready_step > tiers.step:
            return None
        if child.end <= end and data.startswith(child.edge, at * 4):
            stop = child.end
        else:
            stop = at + tree.common_bytes(child.edge, data, at * 4, end * 4) // 4
        for c, live in lives:  # adopt the live part of a window only: the node is cut where it begins
            if child.pages[c] is None and at < live < stop:
                stop = live
        if stop < child.end:
            child = tiers.split(child, stop)
        if child.end <= prompt_end:
            child.is_output = False
        return child

    def _publish_full(self, lease: Lease, child: Node, at: int, fresh: dict[int, PageIds]) -> None:
        """Gives the tree our pages, or, where it has its own, frees ours as duplicates; and pins."""
        tiers = self.tiers
        c = FULL
        device, table = tiers.device[c], lease._tables[c]
        assert table is not None
        page = tiers.page_tokens
        pages = slice(at // page, child.end // page)
        theirs = child.pages[c]
        device.pin(child)
        if theirs is None:
            tiers.put(device, child, table[pages].copy())
        else:
            self._keep_duplicates(lease, c, table[pages])
            self._replace(lease, c, fresh, pages, theirs)
            self.counters["duplicate_pages"] += len(theirs)

    def _publish_window(self, lease: Lease, child: Node, c: int, at: int, live: int, fresh: dict[int, PageIds]) -> None:
        """The same for a window, of which only the live part is kept."""
        if child.end <= live:
            lease._pin_tops[c] = child.end
            return
        tiers = self.tiers
        device, table = tiers.device[c], lease._tables[c]
        assert table is not None
        page = tiers.page_tokens
        pages = slice(at // page, child.end // page)
        theirs = child.pages[c]
        device.pin(child)
        if theirs is None:
            assert at >= lease._window_starts[c], f"window hole in {child=}: {lease._window_starts=}"
            tiers.put(device, child, table[pages].copy())
        else:
            self._keep_duplicates(lease, c, table[max(at, lease._window_starts[c]) // page : pages.stop])
            self._replace(lease, c, fresh, pages, theirs)

    @staticmethod
    def _keep_duplicates(lease: Lease, c: int, page_ids: PageIds) -> None:
        """The loop still has a table with these: they are the lease's own until it has another one, or is released."""
        if lease._duplicates is None:
            lease._duplicates = []
        lease._duplicates.append((c, page_ids))

    def free_duplicates(self, lease: Lease) -> int:
        """Gives back a lease's own pages that no table of the loop names any more; returns how many."""
        num_pages = 0
        for c, page_ids in lease._duplicates or ():
            self.tiers.device[c].allocator.free(page_ids)
            num_pages += len(page_ids)
        lease._duplicates = None
        return num_pages

    # ---- states

    def _publish_state(self, lease: Lease, position: int, slot: int) -> None:
        """Hands a checkpoint to the node that ends exactly there."""
        tiers = self.tiers
        assert tiers.point is not None
        device = tiers.device[tiers.point]
        if lease._written.pop(position, False) is False:
            device.allocator.free_one(slot)
            self.counters["unwritten_states"] += 1
            tiers.note_unmade(lease.sequence, position, Cause.NOT_REPORTED)
            return
        node = lease._node
        while node.parent is not None and node.start >= position:
            node = node.parent
        if node.end > position:
            node = tiers.split(node, position)
        assert node.end == position, f"{node=} {position=}"
        if node.pages[device.index] is None:
            tiers.put(device, node, np.array([slot], np.int32))
        else:
            device.allocator.free_one(slot)
        self._thin_out(node, lease.sequence.prompt_tokens)

    def _thin_out(self, newest: Node, prompt_tokens: int) -> None:
        """Which states above `newest` are kept, and which leave first.

        root --- S -+- p1 --- e1 --- p2 --- newest        passed: p1, e1, p2, which only lead to `newest`
                    `- ...                                shared: S, from where other ways go on

        Of those in the text that this request has generated none is kept. Of the others, with `newest`, at most
        max_states_per_path on the device: the shallow ones go first, and those that are passed before those that are
        shared. What is passed and kept leaves before other states when room is needed.
        """
        tiers = self.tiers
        assert tiers.point is not None
        device, host = tiers.device[tiers.point], tiers.host[tiers.point]
        passed, shared = self._states_above(newest)
        generated = [node for node in passed if node.end > prompt_tokens]
        passed = passed[len(generated) :]
        self._drop_states(host, generated, "a later state of the same answer")
        self._drop_states(device, generated, "a later state of the same answer")
        kept = [node for node in [*passed[::-1], *shared[::-1]] if node.pages[device.index] is not None]
        num_surplus = max(0, len(kept) + 1 - tiers.config.max_states_per_path)
        self._drop_states(device, kept[:num_surplus], "max_states_per_path")
        for node in passed:  # the shallowest is the first to leave
            device.demote(node)
            host.demote(node)

    def _states_above(self, newest: Node) -> tuple[list[Node], list[Node]]:
        """The nodes above with a state, deepest first: those whose only way on is `newest`, and all above them."""
        tiers = self.tiers
        assert tiers.point is not None
        passed: list[Node] = []
        shared: list[Node] = []
        found, node = passed, newest.parent
        while node is not None and node.parent is not None:
            if len(node.children) > 1:
                found = shared
            if tiers.resident(tiers.point, node):
                found.append(node)
            node = node.parent
        return passed, shared

    def _drop_states(self, residency: Residency, nodes: list[Node], reason: str) -> None:
        """What is pinned stays."""
        self.tiers.reason = reason
        for node in nodes:
            if node.pages[residency.index] is not None and not node.pins[residency.index]:
                self.tiers.drop(residency, node)
        self.tiers.reason = "room"

    # ---- release

    def release(self, lease: Lease) -> None:
        """Gives back own pages and pins; nothing that another lease or the tree holds."""
        tiers = self.tiers
        if lease._duplicates is not None:
            self.free_duplicates(lease)
        for c in self.full_last:
            device = tiers.device[c]
            if c == tiers.point:
                assert lease.write_slot is not None
                for slot in (lease.write_slot, *lease.checkpoints.values()):
                    device.allocator.free_one(slot)
                if lease._state_node is not None:
                    device.unpin(lease._state_node)
                continue
            table = lease._tables[c]
            assert table is not None
            first = max(lease._published, lease._window_starts[c]) // tiers.page_tokens
            if first < len(table):
                device.allocator.free(table[first:])
            device.unpin_up(lease._node, lease._pin_tops[c])
        lease._node.ends_here -= 1
        if tiers.has_host:
            self._touch_host(lease._node)

    def _touch_host(self, node: Node) -> None:
        """What a request used on the device counts as used in host memory too: its deepest entry there."""
        host = self.tiers.host[FULL]
        while node.parent is not None and node.pages[host.index] is None:
            node = node.parent
        host.touch(node)
