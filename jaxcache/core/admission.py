"""Admission: pins the longest resumable prefix, makes room, plans the load-back. All or nothing, in one transaction.

Everything is checked before anything changes: `available = free + resident - pinned - newly pinned` is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxcache.core.decisions import Counters
from jaxcache.core.kinds import Kind, Kinds, Need
from jaxcache.core.lease import Lease
from jaxcache.core.match import Matcher, Prefix
from jaxcache.core.node import Node
from jaxcache.core.outbox import Outbox
from jaxcache.core.tiers import Tiers
from jaxcache.core.tokens import Sequence
from jaxcache.types import Move, Tier, TransferKind


class Needs(NamedTuple):
    """What admitting at a prefix takes.

    num_own: pages of full attention that will be the lease's own
    extras:  what each extra needs
    loads:   every entry that is only in host memory: by component, top first
    """

    num_own: int
    extras: list[Need]
    loads: list[tuple[Kind, Node]]


NOTHING: list[Any] = []  # never changed


class Admission:
    """loading: by LOAD_BACK id, the step until which it pins what it writes, even if its lease is released."""

    def __init__(self, tiers: Tiers, kinds: Kinds, matcher: Matcher, outbox: Outbox, counters: Counters):
        self.tiers = tiers
        self.kinds = kinds
        self.matcher = matcher
        self.outbox = outbox
        self.counters = counters
        self.loading: dict[int, int] = {}

    def longest(self, sequence: Sequence, max_tokens: int | None, num_new_tokens: int) -> tuple[Prefix, Needs | None]:
        """The longest prefix whose load-back is worth it, and what it takes; (prefix, None) if that does not fit."""
        prefix = self.matcher.longest(sequence, max_tokens)
        if prefix.device_tokens < prefix.num_tokens and not self._worth_loading(prefix):
            prefix = next(filter(self._worth_loading, self.matcher.shorter(prefix)))
        return prefix, self._needs(prefix, num_new_tokens)

    def longest_that_fits(
        self, sequence: Sequence, max_tokens: int | None, num_new_tokens: int
    ) -> tuple[Prefix, Needs | None]:
        """The same, with a shorter prefix if need be; (prefix, None) if not even nothing at all fits."""
        prefix, needs = self.longest(sequence, max_tokens, num_new_tokens)
        shorter = iter(self.matcher.shorter(prefix) if needs is None and prefix.num_tokens else ())
        while needs is None and (found := next(filter(self._worth_loading, shorter), None)) is not None:
            prefix, needs = found, self._needs(found, num_new_tokens)
        return prefix, needs

    def _worth_loading(self, prefix: Prefix) -> bool:
        """Whether its load-back is not below the threshold (nothing to load is always worth it)."""
        host_tokens = prefix.num_tokens - prefix.device_tokens
        return not host_tokens or host_tokens >= self.tiers.config.load_back_min_tokens

    def _needs(self, prefix: Prefix, num_new_tokens: int) -> Needs | None:
        """What admitting at this prefix takes; None if it does not fit. Changes nothing."""
        num_tokens, node, _, _ = prefix
        full, extras = self.kinds.full, self.kinds.extras
        end = num_tokens + num_new_tokens
        num_own = full.num_own_pages(num_tokens, end)
        loads: list[tuple[Kind, Node]] = NOTHING
        if not full.fits_at_once(num_tokens, node, num_own):
            need = full.need(num_tokens, node, end)
            if need.num_pages > full.device.available(node.account):
                return None
            loads = [(full, load) for load in need.loads]
        if not extras:
            return Needs(num_own, NOTHING, loads)
        needs = [kind.need(num_tokens, node, end) for kind in extras]
        for kind, need in zip(extras, needs, strict=True):
            if need.num_pages > kind.device.available(node.account):
                return None
            if need.loads:
                loads = [*loads, *((kind, load) for load in need.loads)]
        return Needs(num_own, needs, loads)

    def admit(
        self,
        id: int,
        sequence: Sequence,
        prefix: Prefix,
        needs: Needs,
        num_new_tokens: int,
        plan_is_applied: Callable[[], bool],
    ) -> Lease:
        """Carries out what `longest` has found to fit."""
        if prefix.num_tokens < prefix.node.end:
            prefix, needs = self._cut(prefix, needs)
        prefix.node.ends_here += 1
        lease = Lease(id, sequence, prefix.node, num_new_tokens, self.tiers, plan_is_applied)
        full, extras = self.kinds.full, self.kinds.extras
        pieces = full.pin(lease)
        for kind, need in zip(extras, needs.extras):  # noqa: B905  of the same length, and mostly empty
            kind.pin(lease, need)
        if needs.loads:
            self._load_back(lease, needs)
        else:
            if full.device.allocator.num_free < needs.num_own:
                self._make_room(lease, full, needs.num_own)
            full.open(lease, pieces, needs.num_own)
            for kind, need in zip(extras, needs.extras):  # noqa: B905
                if kind.device.allocator.num_free < need.num_own:
                    self._make_room(lease, kind, need.num_own)
                kind.open(lease, need)
        lease.note_room(prefix.num_tokens)
        if extras:
            self._plan_stops(lease, prefix)
        return lease

    def _cut(self, prefix: Prefix, needs: Needs) -> tuple[Prefix, Needs]:
        """Splits the last node at the prefix, so that nothing beyond is pinned with it."""
        node = prefix.node
        front = self.tiers.split(node, prefix.num_tokens)
        if needs.loads:
            needs = needs._replace(loads=[(kind, front if load is node else load) for kind, load in needs.loads])
        return prefix._replace(node=front), needs

    def _make_room(self, lease: Lease, kind: Kind, num_pages: int) -> None:
        """As was promised."""
        room = self.tiers.make_room(kind.device, num_pages, lease.purpose)
        assert room, f"{kind.name}: promised {num_pages} pages"

    def _load_back(self, lease: Lease, needs: Needs) -> None:
        """Opens a lease whose entries are partly in host memory only: they get a place on the device."""
        tiers = self.tiers
        # Under write_back, making room on the device may evict host pages: not those that are about to be loaded.
        if tiers.writes_back:
            self._hold("sources", needs.loads, Tier.HOST)
        full, moves = self.kinds.full, []
        self._load(lease, full, needs.num_own, needs.loads, moves)
        full.open(lease, full.pages_on_path(lease), needs.num_own)
        for kind, need in zip(self.kinds.extras, needs.extras, strict=True):
            self._load(lease, kind, need.num_own, needs.loads, moves)
            kind.open(lease, need)
        tiers.holds.release("sources")
        load_back = self.outbox.add(TransferKind.LOAD_BACK, tuple(moves))
        self.counters["load_back_pages"] += sum(len(move.src_page_ids) for move in moves)
        lease.first_step = max(lease.first_step, tiers.step + 1)
        self.loading[load_back] = tiers.step + 1
        self._hold(load_back, needs.loads, Tier.DEVICE)

    def _hold(self, owner: int | str, entries: list[tuple[Kind, Node]], tier: Tier) -> None:
        for kind, node in entries:
            self.tiers.holds.add(owner, (kind.device, kind.host)[tier], node, kind.top_of(node))

    def _load(self, lease: Lease, kind: Kind, num_own: int, loads: list[tuple[Kind, Node]], moves: list[Move]) -> None:
        """Makes room for a component's own pages and for what is loaded, which goes there; adds the move, if any."""
        tiers = self.tiers
        nodes = [node for of, node in loads if of is kind]
        self._make_room(lease, kind, num_own + sum(_num_host_pages(kind, node) for node in nodes))
        if not nodes:
            return
        sources, targets = [], []
        for node in nodes:
            source = node.pages[kind.host.index]
            assert source is not None
            target = kind.device.allocator.allocate(len(source))
            tiers.put(kind.device, node, target)
            kind.host.touch(node)
            node.ready_step = tiers.step + 1
            sources.append(source)
            targets.append(target)
        moves.append(Move(kind.name, np.concatenate(sources), np.concatenate(targets)))

    def _plan_stops(self, lease: Lease, prefix: Prefix) -> None:
        """Prefill chunks end where a missing window or state would have helped, and where an extra wants it."""
        branch = self.matcher.branch(lease.sequence, prefix)
        stops = [branch] if branch else []
        for kind in self.kinds.extras:
            stops += kind.stops(lease.sequence.prompt_tokens, bool(branch))
        lease._stops = tuple(sorted({stop for stop in stops if stop > prefix.num_tokens}))
        for kind in self.kinds.extras:
            kind.grow(lease, prefix.num_tokens, lease.num_tokens)

    # ---- later

    def scattered(self) -> bool:
        """Load-backs whose step has come are scattered by the next apply, before anything else: their pins go.

        Returns whether there are any.
        """
        due = [load_back for load_back, until_step in self.loading.items() if until_step <= self.tiers.step]
        for load_back in due:
            self.tiers.holds.release(load_back)
            del self.loading[load_back]
        return bool(due)


def _num_host_pages(kind: Kind, node: Node) -> int:
    pages = node.pages[kind.host.index]
    assert pages is not None, f"I6: {node=} is neither on the device nor in host memory"
    return len(pages)
