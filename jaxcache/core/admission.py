"""Admission: pins the longest resumable prefix, makes room, plans the load-back. All or nothing, in one transaction.

Everything is checked before anything changes: `available = free + resident - pinned - newly pinned` is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from jaxcache.core import matching
from jaxcache.core.backups import Backups
from jaxcache.core.lease import Lease, read_only
from jaxcache.core.matching import Prefix
from jaxcache.core.missing import Cause
from jaxcache.core.planner import Counters, Planner
from jaxcache.core.radix_tree import FULL, Node
from jaxcache.core.sequence import Sequence
from jaxcache.core.tiers import Hold, Tiers
from jaxcache.types import Move, TransferKind


class Need(NamedTuple):
    """Per component: nodes to load back, top first; and the position above which nodes are needed."""

    loads: list[list[Node]]
    lows: list[int]


class Loading(NamedTuple):
    """A load-back pins what it writes until it has been scattered, even if its lease is released before."""

    holds: list[Hold]
    until_step: int


class Admission:
    """loading: load-backs that are not scattered yet."""

    def __init__(self, tiers: Tiers, planner: Planner, backups: Backups, counters: Counters):
        self.tiers = tiers
        self.planner = planner
        self.backups = backups
        self.counters = counters
        self.loading: list[Loading] = []

    def longest(self, sequence: Sequence, max_tokens: int | None, num_new_tokens: int) -> tuple[Prefix, Need | None]:
        """The longest prefix whose load-back is worth it, and what it takes; (prefix, None) if that does not fit."""
        prefix = matching.longest_prefix(self.tiers, sequence, max_tokens)
        if prefix.device_tokens < prefix.num_tokens and not self._worth_loading(prefix):
            prefix = next(self._shorter(prefix))
        return prefix, self._need(prefix, num_new_tokens)

    def longest_that_fits(
        self, sequence: Sequence, max_tokens: int | None, num_new_tokens: int
    ) -> tuple[Prefix, Need | None]:
        """The same, with a shorter prefix if need be; (prefix, None) if not even nothing at all fits."""
        prefix, need = self.longest(sequence, max_tokens, num_new_tokens)
        shorter = self._shorter(prefix)
        while need is None and prefix.num_tokens:
            prefix = next(shorter)
            need = self._need(prefix, num_new_tokens)
        return prefix, need

    def _shorter(self, longest: Prefix) -> Iterator[Prefix]:
        """Prefixes of a prefix whose load-back is worth it: longest first, in the end nothing at all."""
        tiers = self.tiers
        for place, end in matching.resumable_ends(tiers, longest.path)[-2::-1]:
            shorter = matching.make_prefix(tiers, end, longest.path[: place + 1], longest.found_tokens)
            if self._worth_loading(shorter):
                yield shorter
        yield Prefix(0, [], longest.found_tokens, 0)

    def _worth_loading(self, prefix: Prefix) -> bool:
        """Whether its load-back is not below the threshold (nothing to load is always worth it)."""
        host_tokens = prefix.num_tokens - prefix.device_tokens
        return not host_tokens or host_tokens >= self.tiers.config.load_back_min_tokens

    def _need(self, prefix: Prefix, num_new_tokens: int) -> Need | None:
        """What admitting at this prefix takes; None if it does not fit. Changes nothing."""
        tiers = self.tiers
        page = tiers.page_tokens
        num_tokens, path = prefix.num_tokens, prefix.path
        own_pages = -(-(num_tokens + num_new_tokens) // page) - num_tokens // page
        loads: list[list[Node]] = []
        lows: list[int] = []
        for c, device in enumerate(tiers.device):
            is_point = c == tiers.point
            low = 0 if c == FULL else num_tokens - 1 if is_point else tiers.required_start(c, num_tokens)
            wanted = 1 if is_point else own_pages
            missing = []
            start = 0
            for node, end in path:
                if end > low and (node.pages[c] is None or not node.pins[c]):
                    wanted += 1 if is_point else (end - start) // page
                    if node.pages[c] is None:
                        missing.append(node)
                start = end
            if wanted > device.available():
                return None
            loads.append(missing)
            lows.append(low)
        return Need(loads, lows)

    def admit(
        self,
        id: int,
        sequence: Sequence,
        prefix: Prefix,
        need: Need,
        num_new_tokens: int,
        plan_is_applied: Callable[[], bool],
    ) -> Lease:
        """Carries out what `longest` has found to fit."""
        tiers = self.tiers
        path = prefix.path
        if path and path[-1][1] < path[-1][0].end:
            prefix, need = self._cut(prefix, need)
            path = prefix.path
        last = path[-1][0] if path else sequence.root
        last.ends_here += 1
        lease = Lease(id, sequence, last, num_new_tokens, tiers, plan_is_applied)
        for node, _ in path:
            node.hits += 1
            if node.ready_step > lease.first_step:
                lease.first_step = node.ready_step
        for c, device in enumerate(tiers.device):
            lease._pin_tops[c] = device.pin_up(last, need.lows[c])
        if tiers.point is not None and path:
            lease._state_node = last
        self._allocate(lease, need)
        lease._be_quiet(prefix.num_tokens)
        if tiers.partial:
            self._plan_stops(lease, prefix)
            self.checkpoints(lease, prefix.num_tokens, lease.num_tokens)
        return lease

    def _cut(self, prefix: Prefix, need: Need) -> tuple[Prefix, Need]:
        """Splits the last node at the prefix, so that nothing beyond is pinned with it."""
        node, end = prefix.path[-1]
        front = self.tiers.split(node, end)
        loads = [[front if load is node else load for load in nodes] for nodes in need.loads]
        return prefix._replace(path=[*prefix.path[:-1], (front, end)]), Need(loads, need.lows)

    def _allocate(self, lease: Lease, need: Need) -> None:
        """Makes room, puts loaded nodes on the device, and builds the tables."""
        tiers = self.tiers
        page = tiers.page_tokens
        own_pages = -(-lease.num_tokens // page) - lease.num_cached_tokens // page
        sources = self._hold_sources(need) if tiers.writes_back else []
        moves = []
        for c, nodes in enumerate(need.loads):
            wanted = own = 1 if c == tiers.point else own_pages
            if nodes:
                wanted += self._num_pages_to_load(c, nodes)
            if tiers.device[c].allocator.num_free < wanted:
                room = self.backups.make_room_on_device(c, wanted)
                assert room, f"{tiers.components[c].name}: promised {wanted} pages"
            if nodes:
                moves.append(self._load(c, nodes))
            self._build_table(lease, c, need.lows[c], own)
        if moves:
            tiers.let_go(sources)
            self._plan_load(lease, need, tuple(moves))

    def _num_pages_to_load(self, c: int, nodes: list[Node]) -> int:
        num_pages = 0
        for node in nodes:
            pages = node.pages[self.tiers.host[c].index]
            assert pages is not None, f"I6: {node=} is neither on the device nor in host memory"
            num_pages += len(pages)
        return num_pages

    def _hold_sources(self, need: Need) -> list[Hold]:
        """Under write_back, making room on the device may evict host pages; not those that are about to be loaded."""
        tiers = self.tiers
        return [
            held
            for c, nodes in enumerate(need.loads)
            for node in nodes
            for held in tiers.hold(tiers.host[c], node, node.end - 1 if c == tiers.point else node.start)
        ]

    def _load(self, c: int, nodes: list[Node]) -> Move:
        tiers = self.tiers
        sources, targets = [], []
        for node in nodes:
            source = node.pages[tiers.host[c].index]
            assert source is not None
            target = tiers.device[c].allocator.allocate(len(source))
            tiers.put(tiers.device[c], node, target)
            tiers.host[c].touch(node)
            node.ready_step = tiers.step + 1
            sources.append(source)
            targets.append(target)
        return Move(tiers.components[c].name, np.concatenate(sources), np.concatenate(targets))

    def _plan_load(self, lease: Lease, need: Need, moves: tuple[Move, ...]) -> None:
        tiers = self.tiers
        self.planner.add(TransferKind.LOAD_BACK, moves)
        self.counters["load_back_pages"] += sum(len(move.src_page_ids) for move in moves)
        lease.first_step = max(lease.first_step, tiers.step + 1)
        holds = [
            held
            for c, nodes in enumerate(need.loads)
            for node in nodes
            for held in tiers.hold(tiers.device[c], node, node.end - 1 if c == tiers.point else node.start)
        ]
        self.loading.append(Loading(holds, tiers.step + 1))

    def _build_table(self, lease: Lease, c: int, low: int, num_own: int) -> None:
        """The lease's pages of component c: the nodes' as they are now (making room may split some), then own."""
        tiers = self.tiers
        node = lease._node
        allocator = tiers.device[c].allocator
        if c == tiers.point:
            states = node.pages[c]
            lease.write_slot = allocator.allocate_one()
            lease.read_slot = None if states is None else states.item(0)
            return
        if node.parent is None:
            table = allocator.allocate(num_own)
        else:
            at = node.end // tiers.page_tokens
            table = np.empty(at + num_own, np.int32)
            table[at:] = allocator.allocate_view(num_own)
            while node.parent is not None and node.end > low:
                cached = node.pages[c]
                assert cached is not None, f"{node=} is not on the device"
                table[at - len(cached) : at] = cached
                at -= len(cached)
                node = node.parent
            if at:
                table[:at] = allocator.num_pages
                lease._window_starts[c] = at * tiers.page_tokens
        lease._tables[c] = read_only(table)

    # ---- checkpoints of states

    def _plan_stops(self, lease: Lease, prefix: Prefix) -> None:
        """Prefill chunks end where a missing window or state would have helped, and at the prompt's last grid point.

        A prompt that ends there itself, sent again, has to resume one grid point earlier: unless there are two stops
        already, that is one, too.
        """
        grid = self.tiers.grid_tokens
        num_prompt = lease.sequence.prompt_tokens
        branch = min(prefix.found_tokens, lease.sequence.num_tokens - 1) // grid * grid
        stops = [branch] if branch > prefix.num_tokens else []
        if self.tiers.point is not None:
            last = num_prompt // grid * grid
            if last == num_prompt and not stops:
                stops.append(last - grid)
            stops.append(last)
        lease._stops = tuple(sorted(dict.fromkeys(stop for stop in stops if stop > prefix.num_tokens)))

    def checkpoints(self, lease: Lease, low: int, high: int) -> None:
        """Slots for the states to keep in (low, high]; a missing slot only costs a later hit."""
        tiers = self.tiers
        point = tiers.point
        if point is None:
            return
        for stop in lease._stops:
            if low < stop <= high and stop not in lease.checkpoints:
                self._checkpoint(lease, point, stop)
        last = high // tiers.grid_tokens * tiers.grid_tokens
        if last > low and last > lease.sequence.prompt_tokens and last not in lease.checkpoints:
            earlier = lease._last_grid_point
            if earlier in lease.checkpoints:  # while decoding only the last grid point is kept
                lease.checkpoints[last] = lease.checkpoints.pop(earlier)
                lease._written.pop(earlier, None)
            else:
                self._checkpoint(lease, point, last)
            lease._last_grid_point = last

    def _checkpoint(self, lease: Lease, point: int, position: int) -> None:
        device = self.tiers.device[point]
        if device.allocator.num_free or (device.available() and self.backups.make_room_on_device(point, 1)):
            lease.checkpoints[position] = device.allocator.allocate_one()
        elif position <= lease.sequence.num_tokens:
            self.tiers.note_unmade(lease.sequence, position, Cause.NO_SLOT)

    # ---- later

    def scattered(self) -> bool:
        """Load-backs whose step has come are scattered by the next apply, before anything else: their pins go.

        Returns whether there are any.
        """
        due = [loading for loading in self.loading if loading.until_step <= self.tiers.step]
        for loading in due:
            self.tiers.let_go(loading.holds)
        self.loading = [loading for loading in self.loading if loading.until_step > self.tiers.step]
        return bool(due)
