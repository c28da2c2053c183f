"""Storage prefetches: reserve host pages, QUERY, agree on an end, FETCH, agree on what came, make it the tree's.

    prefetch --QUERY--> agreed end --FETCH--> agreed outcome --accept--> tree
                 |                     |            |
                 +---- nothing there   +--cancel----+--DRAIN-- quiet on all ranks --> the other pages are free again

A ticket has two agreed ends: its outcome, at which accepted pages become the tree's, and quiet, before which none of
its pages is freed, because some rank may still write into them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxcache.config import pages_of_share
from jaxcache.core import matching
from jaxcache.core.backups import Backups
from jaxcache.core.planner import Counters, Planner
from jaxcache.core.radix_tree import Node
from jaxcache.core.sequence import Sequence
from jaxcache.core.stores import Stores
from jaxcache.core.ticket import Ticket, TicketState
from jaxcache.core.tiers import Tiers
from jaxcache.types import NO_PAGES, Move, Outcome, PageIds, Span, TransferKind


class Prefetches:
    """live: ticket id (of its QUERY or FETCH) -> ticket."""

    def __init__(self, tiers: Tiers, planner: Planner, stores: Stores, backups: Backups, counters: Counters):
        self.tiers = tiers
        self.planner = planner
        self.stores = stores
        self.backups = backups
        self.counters = counters
        self.live: dict[int, Ticket] = {}

    # ---- asking

    def prefetch(self, sequence: Sequence) -> Ticket | None:
        """A ticket, or None (and a counter) where asking cannot pay."""
        tiers = self.tiers
        page = tiers.page_tokens
        if tiers.full is None:
            self.counters["prefetch_unsupported"] += 1
            return None
        for host in tiers.host:
            host.serve(sequence.root)
        prefix = matching.longest_prefix(tiers, sequence, None)
        start = prefix.found_tokens
        end = (
            min(sequence.num_tokens - 1, start + self._share(tiers.full) * page)
            // tiers.grid_tokens
            * tiers.grid_tokens
        )
        if end - prefix.num_tokens < max(page, tiers.config.prefetch_min_tokens):
            self.counters["prefetch_too_short"] += 1
            return None
        pages = self._reserve(sequence, start, end)
        if pages is None:
            self.counters["prefetch_no_room"] += 1
            return None
        ticket = Ticket(sequence, prefix.num_tokens, start, end, pages)
        ticket.id = self.planner.add(TransferKind.QUERY, self._questions(ticket))
        self.live[ticket.id] = ticket
        self.counters["prefetches"] += 1
        return ticket

    def _share(self, c: int) -> int:
        """Host pages of component c that prefetches may still reserve."""
        host = self.tiers.host[c]
        reserved = sum(len(ticket.pages[c]) for ticket in self.live.values())
        allowed = pages_of_share(self.tiers.config.prefetch_host_share, host.allocator.num_pages) - reserved
        return max(0, min(allowed, host.available()))

    def _num_pages(self, c: int, start: int, end: int) -> int:
        """How many pages of component c it takes to resume at `end` (full attention: from `start` on)."""
        if c == self.tiers.point:
            return 1
        low = start if c == self.tiers.full else self.tiers.required_start(c, end)
        return max(0, end - low) // self.tiers.page_tokens

    def _reserve(self, sequence: Sequence, start: int, end: int) -> list[PageIds] | None:
        """Host pages for every component, evicting others but not what the fetched pages will hang below."""
        tiers = self.tiers
        counts = [self._num_pages(c, start, end) for c in range(len(tiers.components))]
        path = tiers.tree.walk(sequence, sequence.num_tokens - 1)
        full = tiers.host[tiers.full] if tiers.full is not None else None
        holds = tiers.hold(full, path[-1][0], 0) if path and full is not None else []
        fits = all(count <= self._share(c) for c, count in enumerate(counts))
        pages = []
        if fits:
            for host, count in zip(tiers.host, counts, strict=True):
                room = tiers.make_room(host, count)
                assert room, f"{host.component.name}: promised {count} pages"
                pages.append(host.allocator.allocate(count))
        tiers.let_go(holds)
        return pages if fits else None

    def _ends(self, low: int, end: int) -> list[int]:
        """Where a request could resume, in (low, end]."""
        grid = self.tiers.grid_tokens
        return list(range((low // grid + 1) * grid, end + 1, grid))

    def _questions(self, ticket: Ticket) -> tuple[Move, ...]:
        """All pages of full attention, and the pages and states that any of the possible ends needs."""
        tiers = self.tiers
        page = tiers.page_tokens
        keys = ticket.sequence.page_keys(ticket.end // page)
        first_end = self._ends(ticket.matched_end, ticket.end)[0]
        moves = []
        for c in tiers.top_first:
            if c == tiers.point:
                ends = self._ends(ticket.matched_end, ticket.end)
            else:
                low = ticket.start if c == tiers.full else tiers.required_start(c, first_end)
                ends = list(range(low + page, ticket.end + 1, page))
            page_keys = tuple(keys[end // page - 1] for end in ends)
            moves.append(Move(tiers.components[c].name, page_keys=page_keys, page_ends=tuple(ends)))
        return tuple(moves)

    def largest_end(self, ticket: Ticket, exists: Mapping[str, Any]) -> int:
        """The largest end <= bound that one rank's storage can serve, or 0. exists: component -> bools."""
        tiers = self.tiers
        there = {
            move.component: {end for end, found in zip(move.page_ends, exists[move.component], strict=True) if found}
            for move in self._questions(ticket)
        }
        assert tiers.full is not None
        covered = ticket.start
        while covered + tiers.page_tokens in there[tiers.components[tiers.full].name]:
            covered += tiers.page_tokens
        for end in reversed(self._ends(ticket.matched_end, min(ticket.bound, covered))):
            if all(self._servable(c, end, there[tiers.components[c].name]) for c in tiers.partial):
                return end
        return 0

    def _servable(self, c: int, end: int, there: set[int]) -> bool:
        """Whether the window or state that resuming at `end` needs is there, whole."""
        if c == self.tiers.point:
            return end in there
        page = self.tiers.page_tokens
        return all(e in there for e in range(self.tiers.required_start(c, end) + page, end + 1, page))

    # ---- agreed outcomes

    def commit(self, ticket: Ticket, outcome: Outcome) -> None:
        if ticket.state is TicketState.QUERY:
            self._commit_query(ticket, outcome)
        elif ticket.state is TicketState.FETCH:
            ticket.progress = outcome.pages
            if outcome.done:
                self.decide(ticket)
        if ticket.state is TicketState.DRAIN and outcome.quiet:
            self._finish(ticket)

    def _commit_query(self, ticket: Ticket, outcome: Outcome) -> None:
        if not outcome.done:
            return
        if not ticket.cancelled and outcome.smallest_end != outcome.largest_end:
            ticket.bound = outcome.smallest_end
            return
        end = outcome.smallest_end
        if not ticket.cancelled:
            self._doubt(ticket, end)
        if ticket.cancelled or end <= ticket.matched_end:
            self.counters["prefetch_misses"] += not ticket.cancelled
            ticket.state = TicketState.DRAIN
            return
        del self.live[ticket.id]
        ticket.agreed_end = end
        ticket.unresolved_tokens = max(0, end - ticket.start)
        self.counters["agreed_storage_tokens"] += ticket.unresolved_tokens
        ticket.state = TicketState.FETCH
        ticket.id = self.planner.add(TransferKind.FETCH, self._fetches(ticket))
        self.live[ticket.id] = ticket

    def _doubt(self, ticket: Ticket, end: int) -> None:
        """What storage did not have beyond `end` is not believed stored any more: it will be written again."""
        for move in self._questions(ticket):
            pairs = zip(move.page_keys, move.page_ends, strict=True)
            self.stores.doubt(move.component, tuple(key for key, page_end in pairs if page_end > end))

    def _fetches(self, ticket: Ticket) -> tuple[Move, ...]:
        """What to read for the agreed end; reserved pages beyond that are free at once, nobody has seen them."""
        tiers = self.tiers
        page = tiers.page_tokens
        end = ticket.agreed_end
        keys = ticket.sequence.page_keys(end // page)
        moves = []
        for c in tiers.top_first:
            count = self._num_pages(c, ticket.start, end)
            tiers.host[c].allocator.free(ticket.pages[c][count:])
            ticket.pages[c] = ticket.pages[c][:count]
            mine = tuple(keys[end // page - count : end // page])
            moves.append(Move(tiers.components[c].name, dst_page_ids=ticket.pages[c], page_keys=mine))
        return tuple(moves)

    def decide(self, ticket: Ticket) -> None:
        """The outcome: what has come so far becomes the tree's, the rest is freed when quiet."""
        assert ticket.state is TicketState.FETCH
        ticket.state = TicketState.DRAIN
        if not ticket.cancelled:
            self._accept(ticket)
        self.planner.note("fetched", 11, ticket.id, ticket.agreed_end, sum(len(pages) for pages in ticket.pages))

    def cancel(self, ticket: Ticket) -> None:
        """Nothing more is wanted; pages are freed when every rank is quiet. Blocks nobody."""
        if ticket.cancelled:
            return
        ticket.cancelled = True
        self.resolve(ticket, "aborted", ticket.unresolved_tokens)
        if ticket.state is TicketState.FETCH:
            ticket.state = TicketState.DRAIN
        self.planner.note("cancel", 12, ticket.id)

    def resolve(self, ticket: Ticket, reason: str, tokens: int) -> None:
        """I12: every agreed token is counted once, as used or as unfulfilled for one reason."""
        assert 0 <= tokens <= ticket.unresolved_tokens, f"I12: {ticket=} {reason=} {tokens=}"
        ticket.unresolved_tokens -= tokens
        if tokens:
            self.counters["storage_tokens_used" if reason == "used" else f"unfulfilled_{reason}"] += tokens

    def use(self, ticket: Ticket, device_tokens: int, cached_tokens: int) -> int:
        """Settles a ticket's tokens at the admit it was made for; returns how many of the cached ones it brought.

        What is there and was not taken: a load-back below the threshold, a capped hit, no room on the device.
        """
        there = matching.longest_prefix(self.tiers, ticket.sequence, None).num_tokens
        spans, ticket.accepted = ticket.accepted, []
        used = min(_tokens_in(spans, device_tokens, cached_tokens), ticket.unresolved_tokens)
        self.resolve(ticket, "used", used)
        for reason, start, stop in (("already_present", 0, device_tokens), ("not_taken", cached_tokens, there)):
            self.resolve(ticket, reason, min(_tokens_in(spans, start, stop), ticket.unresolved_tokens))
        self.resolve(ticket, "host_capacity", ticket.unresolved_tokens)
        return used

    def _finish(self, ticket: Ticket) -> None:
        for host, pages in zip(self.tiers.host, ticket.pages, strict=True):
            host.allocator.free(pages)
        ticket.pages = [NO_PAGES] * len(ticket.pages)
        self.tiers.let_go(ticket.holds)
        ticket.holds = []
        ticket.state = TicketState.DONE
        del self.live[ticket.id]
        self.planner.note("quiet", 13, ticket.id)

    # ---- what came becomes the tree's

    def _accept(self, ticket: Ticket) -> None:
        tiers = self.tiers
        assert tiers.full is not None
        base = min(ticket.start, ticket.agreed_end)
        come = ticket.progress.get(tiers.components[tiers.full].name, 0)
        end = min(ticket.agreed_end, ticket.start + come * tiers.page_tokens)
        self.resolve(ticket, "transfer", ticket.agreed_end - max(end, base) if ticket.agreed_end > base else 0)
        self._doubt(ticket, max(end, base))
        node = self._place(ticket.sequence, base)
        if node is None:
            self.resolve(ticket, "host_capacity", ticket.unresolved_tokens)
            return
        node = self._accept_full(ticket, node, end)
        for c in tiers.partial if node.end == ticket.agreed_end else ():
            if ticket.progress.get(tiers.components[c].name, 0) == len(ticket.pages[c]):
                self._accept_partial(ticket, c, node)
        usable = matching.longest_prefix(tiers, ticket.sequence, ticket.agreed_end).num_tokens
        self.resolve(ticket, "transfer", _tokens_in(ticket.accepted, usable, ticket.agreed_end))

    def _place(self, sequence: Sequence, base: int) -> Node | None:
        """The node that ends at `base`, with every full page up to there in host memory; None if that cannot be had."""
        tiers = self.tiers
        assert tiers.full is not None
        if sequence.namespace.retired:
            return None
        path = tiers.tree.walk(sequence, base)
        if not base:
            return sequence.root
        if not path or path[-1][1] < base:
            return None
        if base < path[-1][0].end:
            tiers.split(path[-1][0], base)
            path = tiers.tree.walk(sequence, base)
        index = tiers.host[tiers.full].index
        if any(node.pages[index] is None for node, _ in path):
            self.backups.back_up([node for node, _ in path])
            path = tiers.tree.walk(sequence, base)
        missing = not path or path[-1][1] < base or any(node.pages[index] is None for node, _ in path)
        return None if missing else path[-1][0]

    def _accept_full(self, ticket: Ticket, node: Node, end: int) -> Node:
        """Hangs the fetched full pages below `node`; pages that the tree has meanwhile are duplicates."""
        tiers = self.tiers
        tree = tiers.tree
        assert tiers.full is not None
        host = tiers.host[tiers.full]
        data, page = ticket.sequence.data, tiers.page_tokens
        fetched = ticket.pages[tiers.full]
        duplicate = np.ones(len(fetched), bool)
        at = node.end
        while at < end:
            first_page = bytes(data[at * 4 : at * 4 + tree.page_bytes])
            child = node.children.get(first_page)
            if child is None:
                child = tree.add(node, first_page, ticket.sequence.edge(at, end), end)
                if tiers.profile is not None:
                    tiers.profile.arrived(child)
            else:
                stop = at + tree.common_bytes(child.edge, data, at * 4, end * 4) // 4
                child = child if stop == child.end else tiers.split(child, stop)
            mine = slice((at - ticket.start) // page, (child.end - ticket.start) // page)
            if child.pages[host.index] is None:
                tiers.put(host, child, fetched[mine])
                duplicate[mine] = False
                ticket.holds += tiers.hold(host, child, child.start)
                ticket.accepted.append(Span(at, child.end))
            else:
                self.resolve(ticket, "already_present", child.end - at)
            at, node = child.end, child
        ticket.pages[tiers.full] = fetched[duplicate]
        return node

    def _accept_partial(self, ticket: Ticket, c: int, node: Node) -> None:
        """A window or a state, whole or not at all."""
        tiers = self.tiers
        host = tiers.host[c]
        fetched = ticket.pages[c]
        duplicate = np.ones(len(fetched), bool)
        end = ticket.agreed_end
        low = end - 1 if c == tiers.point else tiers.required_start(c, end)
        while node.parent is not None and node.end > low:
            if node.start < low and c != tiers.point:
                tiers.split(node, low)
            if not tiers.resident(c, node) and self._holdable(node):
                first = 0 if c == tiers.point else (node.start - low) // tiers.page_tokens
                count = 1 if c == tiers.point else len(node.edge) // tiers.tree.page_bytes
                mine = slice(first, first + count)
                tiers.put(host, node, fetched[mine])
                duplicate[mine] = False
                ticket.holds += tiers.hold(host, node, node.end - 1 if c == tiers.point else node.start)
            node = node.parent
        ticket.pages[c] = fetched[duplicate]

    def _holdable(self, node: Node) -> bool:
        full = self.tiers.full
        return full is None or node.pages[self.tiers.host[full].index] is not None


def _tokens_in(spans: list[Span], start: int, stop: int) -> int:
    """How many tokens of the spans lie in [start, stop)."""
    return sum(max(0, min(span.stop, stop) - max(span.start, start)) for span in spans)
