"""What running leases do: grow, publish what they have computed, and give back what they hold.

|-- the tree's, pinned --|-- own pages --|-- room --|
0                    published        computed   num_tokens        up to `_room_end`, where a page ends, growing only
                         |------>|                                 moves numbers: nearly always
   insert moves `published` up to the last whole computed page
"""

from __future__ import annotations

from collections.abc import Sequence as Row

from jaxcache.core import bad_input
from jaxcache.core.decisions import Counters, Decisions
from jaxcache.core.kinds import Extra, Kinds
from jaxcache.core.lease import Lease
from jaxcache.core.limits.quotas import Quotas
from jaxcache.core.node import FULL, Node
from jaxcache.core.pages import Residency
from jaxcache.core.serving import Refusal
from jaxcache.core.tiers import Tiers

NO_LIVES: list[tuple[Extra, int]] = []  # never changed


class Leases(dict[int, Lease]):
    """Those that run, by id. Changes their tables by replacing them: a running program may still read the old ones.

    uncomputed: what was said to be computed before the pools had come in which it is
    """

    def __init__(self, tiers: Tiers, kinds: Kinds, decisions: Decisions, counters: Counters, quotas: Quotas | None):
        super().__init__()
        self.tiers = tiers
        self.kinds = kinds
        self.decisions = decisions
        self.counters = counters
        self.quotas = quotas
        self.uncomputed: bad_input.Uncomputed | None = None
        self.output_first = tiers.config.evict_output_first

    # ---- growing

    def grow(self, lease: Lease, num_computed: int, num_new_tokens: int) -> bool:
        """Whether there is room for what comes after `num_computed`; what is computed is reported in either case."""
        num_new_tokens = bad_input.count("num_new_tokens", num_new_tokens, 1)
        num_computed = self._checked(lease, num_computed)
        return self._grow(lease, num_computed, num_computed + num_new_tokens)

    def _checked(self, lease: Lease, num_computed: int) -> int:
        """num_computed as an int of Python, if the lease may report it."""
        if type(num_computed) is not int:
            num_computed = bad_input.count("num_computed", num_computed)
        bad_input.check_lease(self, lease, num_computed)
        if num_computed > lease.num_computed:
            bad_input.check_may_run(self.tiers, lease)
        return num_computed

    def _grow(self, lease: Lease, num_computed: int, end: int) -> bool:
        tiers = self.tiers
        if num_computed > lease._last_room:
            self.note_uncomputed(lease, num_computed)
        if end <= lease._room_end:  # numpy's integers decide as Python's do in PrefixCache.grow
            lease.num_computed = num_computed
            lease.num_tokens = max(lease.num_tokens, end)
            return True
        lease.num_computed = num_computed
        for kind in self.kinds.extras:
            kind.report(lease, num_computed)
        if self.quotas is not None:
            self.quotas.settle(lease)
        missing = -(-end // tiers.page_tokens) - len(lease.table)
        if missing > 0:
            if not self._make_room(lease, missing):
                return False
            for kind in (self.kinds.full, *self.kinds.extras):
                kind.extend(lease, missing)
            self.decisions.note("grow", lease.id, num_computed, end - num_computed)
        lease.num_tokens = max(lease.num_tokens, end)
        lease.note_room(num_computed)
        for kind in self.kinds.extras:
            kind.grow(lease, num_computed, end)
        if self.quotas is not None:
            self.quotas.settle(lease)
        return True

    def _make_room(self, lease: Lease, missing: int) -> bool:
        """For so many pages more in each of its tables; False, and nothing has changed, if that cannot be."""
        wanted: list[tuple[Residency, int]] = [(self.kinds.full.device, missing)]
        wanted += [(kind.device, kind.num_missing_pages(missing)) for kind in self.kinds.extras]
        if any(num_pages > device.available(lease._node.account) for device, num_pages in wanted):
            return False
        for device, num_pages in wanted:
            if device.allocator.num_free < num_pages:
                room = self.tiers.make_room(device, num_pages, lease.purpose)
                assert room, f"{device.component.name}: promised {num_pages} pages"
        return True

    def note_uncomputed(self, lease: Lease, num_computed: int) -> None:
        """The loop says that so much is computed: what got room in this version of the pools can only be so in a later
        one, which has not come yet."""
        self.uncomputed = bad_input.Uncomputed(self.tiers.pools_version, lease.id, num_computed)

    def pools_have_come(self, version: int) -> None:
        """A model step has been dispatched since the version before: what has room now may be computed in it."""
        if version != self.tiers.pools_version:
            self.tiers.pools_version = version
            for lease in self.values():
                lease._last_room = lease.num_tokens

    def grow_all(self, leases: Row[Lease], num_computed: Row[int], num_new_tokens: int) -> int:
        """How many of the leases, from the first on, have room now. Where one is refused, nothing has changed."""
        tiers = self.tiers
        num_new_tokens = bad_input.count("num_new_tokens", num_new_tokens, 1)
        bad_input.check_lists(leases, num_computed)
        rest: list[int] | range = []
        uncomputed = self.uncomputed
        if set(map(type, leases)) == {Lease} and set(map(type, num_computed)) == {int}:
            before = [lease.num_computed for lease in leases], [lease.num_tokens for lease in leases]
            for i, lease in enumerate(leases):
                computed = num_computed[i]
                end = computed + num_new_tokens
                if (
                    end <= lease._room_end
                    and lease.num_computed <= computed <= lease.num_tokens
                    and lease._tiers is tiers
                ):  # as in PrefixCache.grow
                    if computed > lease._last_room:
                        self.note_uncomputed(lease, computed)
                    lease.num_computed = computed
                    if end > lease.num_tokens:
                        lease.num_tokens = end
                else:
                    rest.append(i)
        else:  # integers of numpy, or a mistake: one by one
            before = (), ()
            rest = range(len(leases))
        try:
            reported = [self._checked(leases[i], num_computed[i]) for i in rest]
        except Refusal:
            for lease, computed, num_tokens in zip(leases, *before, strict=False):
                lease.num_computed, lease.num_tokens = computed, num_tokens
            self.uncomputed = uncomputed
            raise
        for i, computed in zip(rest, reported, strict=True):
            lease = leases[i]
            if not self._grow(lease, max(computed, lease.num_computed), computed + num_new_tokens):  # named twice
                return i
        return len(leases)

    # ---- publishing

    def insert(self, lease: Lease, num_computed: int, states: Row[int], publishes: bool) -> None:
        """A lease has computed up to here, and its caller has written the checkpoints at these positions.

        publishes: whether whole pages become the tree's
        """
        if num_computed > lease._last_room:
            self.note_uncomputed(lease, num_computed)
        lease.num_computed = num_computed
        for kind in self.kinds.extras:
            kind.report(lease, num_computed)
        if states:
            assert lease._slots is not None
            lease._slots.written.update(dict.fromkeys(states))
        if publishes:
            self._publish(lease, num_computed)

    def _publish(self, lease: Lease, num_computed: int) -> None:
        tiers, full, extras = self.tiers, self.kinds.full, self.kinds.extras
        for kind in extras:
            kind.begin_insert(lease, num_computed)
        end = num_computed // tiers.page_tokens * tiers.page_tokens
        start = at = lease._published
        if at < end:
            node = lease._node
            lives = self._lives(lease, num_computed) if extras else NO_LIVES
            while at < end:
                child = self._child(lease, node, at, end, lives)
                if child is None:
                    break
                num_duplicates = full.publish(lease, child, at)
                if num_duplicates:
                    self.counters["duplicate_pages"] += num_duplicates
                for kind, live in lives:
                    kind.publish(lease, child, at, live)
                at, node = child.end, child
            if node is not lease._node:
                node.ends_here += 1
                lease._node.ends_here -= 1
                lease._node = node
            lease._published = at
        if tiers.profile is not None:
            tiers.profile.inserted(lease.sequence, lease._node, start)
        for kind in extras:
            kind.end_insert(lease, num_computed)

    def _lives(self, lease: Lease, num_computed: int) -> list[tuple[Extra, int]]:
        """Extras that have tables, and where what they publish begins."""
        starts = [(kind, kind.window_start_to_keep(lease, num_computed)) for kind in self.kinds.extras]
        return [(kind, live) for kind, live in starts if live is not None]

    def _child(self, lease: Lease, node: Node, at: int, end: int, lives: list[tuple[Extra, int]]) -> Node | None:
        """The node that holds the sequence's next pages from `at` on: found, cut to what agrees, or new.

        None if it is being loaded back: its pages cannot replace the lease's own yet.
        """
        tiers, sequence = self.tiers, lease.sequence
        tree, data, page = tiers.tree, sequence.data, tiers.page_tokens
        prompt_end = sequence.prompt_tokens // page * page
        first_page = bytes(data[at * 4 : (at + page) * 4])
        child = node.children.get(first_page)
        if child is None:
            stop = prompt_end if self.output_first and at < prompt_end < end else end
            for _, live in lives:
                if at < live < stop:
                    stop = live
            for cut in sequence.cuts:
                if at < cut < stop:
                    stop = cut
            child = tree.add(node, first_page, sequence.edge(at, stop), stop)
            child.is_output = self.output_first and at >= prompt_end
            return child
        if child.ready_step > tiers.step:
            return None
        if child.end <= end and data.startswith(child.edge, at * 4):
            stop = child.end
        else:
            stop = at + tree.common_bytes(child.edge, data, at * 4, end * 4) // 4
        for kind, live in lives:  # adopt the live part of a window only: the node is cut where it begins
            if child.pages[kind.c] is None and at < live < stop:
                stop = live
        if stop < child.end:
            child = tiers.split(child, stop)
        if child.end <= prompt_end:
            child.is_output = False
        return child

    def free_duplicates(self, lease: Lease) -> int:
        """Gives back a lease's own pages that no table of the loop names any more; returns how many."""
        num_pages = 0
        for c, page_ids in lease._duplicates or ():
            self.tiers.device[c].allocator.free(page_ids)
            num_pages += len(page_ids)
        lease._duplicates = None
        return num_pages

    # ---- the end

    def release(self, lease: Lease) -> None:
        """Gives back own pages and pins; nothing that another lease or the tree holds."""
        lease._released = True
        lease._room_end = -1
        lease.sequence.num_leases -= 1
        del self[lease.id]
        if self.quotas is not None:
            self.quotas.forget(lease)
        if lease._duplicates is not None:
            self.free_duplicates(lease)
        # Full attention last: of generated text only its pages count as unused, whatever else is there.
        for kind in (*self.kinds.extras, self.kinds.full):
            kind.release(lease)
        lease._node.ends_here -= 1
        if self.tiers.has_host:
            self._touch_host(lease._node)

    def _touch_host(self, node: Node) -> None:
        """What a request used on the device counts as used in host memory too: its deepest entry there."""
        host = self.tiers.host[FULL]
        while node.parent is not None and node.pages[host.index] is None:
            node = node.parent
        host.touch(node)
