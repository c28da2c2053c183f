"""Storage prefetches: reserve host pages, QUERY, agree on an end, FETCH, agree on what came, make it the tree's.

    prefetch --QUERY--> agreed end --FETCH--> agreed outcome --accept--> tree
                 |                     |            |
                 +---- nothing there   +--cancel----+--DRAIN-- quiet on all ranks --> the other pages are free again

A prefetch has two agreed ends: its outcome, at which accepted pages become the tree's, and quiet, before which none of
its pages is freed, because some rank may still write into them. Requests that ask for the same share one.

Every agreed token is accounted for (I12), as used or as unfulfilled for one reason:

    |-- host ancestors: backed up first --|-- full pages that came --|-- missing: a reason --|
    0                                   start                                            agreed_end
                                                       window, state: whole at agreed_end, or not at all
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxcache.config import pages_of_share
from jaxcache.core.backups import Backups
from jaxcache.core.decisions import Counters, Decisions
from jaxcache.core.kinds import Kind, Kinds
from jaxcache.core.match import Matcher
from jaxcache.core.node import Node
from jaxcache.core.outbox import Outbox
from jaxcache.core.pages import Purpose
from jaxcache.core.prefetch import Prefetch, PrefetchState, Ticket
from jaxcache.core.stores import Stores
from jaxcache.core.tiers import Tiers
from jaxcache.core.tokens import Namespace, Sequence
from jaxcache.types import CLOCK_MODULUS, DECLINED, NO_PAGES, Move, Outcome, PageIds, Span, TransferKind

MAX_WAIT_MS = CLOCK_MODULUS // 2  # what looks longer is a clock that went back


class Prefetches:
    """live: id of its QUERY or FETCH -> prefetch. policy: what an admission does with one that is still running."""

    def __init__(
        self,
        tiers: Tiers,
        kinds: Kinds,
        matcher: Matcher,
        decisions: Decisions,
        outbox: Outbox,
        stores: Stores,
        backups: Backups,
        counters: Counters,
    ):
        self.tiers = tiers
        self.kinds = kinds
        self.matcher = matcher
        self.decisions = decisions
        self.outbox = outbox
        self.stores = stores
        self.backups = backups
        self.counters = counters
        self.policy = tiers.config.prefetch_policy
        self.live: dict[int, Prefetch] = {}

    # ---- asking

    def prefetch(self, sequence: Sequence) -> Ticket | None:
        """A ticket, or None (and a counter) where asking cannot pay."""
        tiers = self.tiers
        page = tiers.page_tokens
        prefix = self.matcher.longest(sequence, None)
        start, worthwhile = prefix.found_tokens, max(page, tiers.config.prefetch_min_tokens)
        wanted_end = self._last_end(sequence.num_tokens - 1)
        if wanted_end - prefix.num_tokens < worthwhile:
            self.counters["prefetch_too_short"] += 1
            return None
        for shared in self.live.values():
            if self._serves(shared, sequence, start, wanted_end, worthwhile):
                self.counters["joined_prefetches"] += 1
                return self._ticket(sequence, shared)
        end = min(wanted_end, self._last_end(start + self._share(sequence, self.kinds.full) * page))
        pages = self._reserve(sequence, start, end) if end - prefix.num_tokens >= worthwhile else None
        if pages is None:
            self.counters["prefetch_no_room"] += 1
            return None
        prefetch = Prefetch(sequence, prefix.num_tokens, start, end, pages)
        prefetch.id = self.outbox.add(TransferKind.QUERY, self._questions(prefetch))
        self.live[prefetch.id] = prefetch
        self.counters["prefetches"] += 1
        return self._ticket(sequence, prefetch)

    def _ticket(self, sequence: Sequence, prefetch: Prefetch) -> Ticket:
        prefetch.num_wanting += 1
        content = sequence.checksum(0, 0)
        self.decisions.note("prefetch", prefetch.id, prefetch.end, sequence.namespace.checksum, content)
        return Ticket(sequence, prefetch)

    def _serves(self, shared: Prefetch, sequence: Sequence, start: int, wanted_end: int, worthwhile: int) -> bool:
        """Whether what is being read already is what this sequence wants, but for less than is worth asking for.

        A window or state comes only for the end that is agreed on, so that must not lie beyond this sequence's.
        """
        stop = min(shared.end, wanted_end)
        if shared.is_over or shared.sequence.root is not sequence.root or shared.start > start:
            return False
        if wanted_end - stop >= worthwhile or (self.kinds.extras and shared.end > wanted_end):
            return False
        num_pages = stop // self.tiers.page_tokens
        return shared.sequence.page_keys(num_pages)[-1:] == sequence.page_keys(num_pages)[-1:]

    def _last_end(self, num_tokens: int) -> int:
        """The last place up to there where a request could resume."""
        return num_tokens // self.tiers.grid_tokens * self.tiers.grid_tokens

    def _share(self, sequence: Sequence, kind: Kind) -> int:
        """Host pages of a component that prefetches may still reserve, for a sequence."""
        reserved = sum(len(prefetch.pages[kind.c]) for prefetch in self.live.values())
        most = pages_of_share(self.tiers.config.prefetch_host_share, kind.host.allocator.num_pages)
        return max(0, min(most - reserved, kind.host.available(sequence.root.account)))

    def _reserve(self, sequence: Sequence, start: int, end: int) -> list[PageIds] | None:
        """Host pages for every component, evicting others but not what the fetched pages will hang below."""
        tiers = self.tiers
        counts = [kind.num_reserved_pages(start, end) for kind in self.kinds]
        path = tiers.tree.walk(sequence, sequence.num_tokens - 1)
        if path:
            tiers.holds.add("a reservation", self.kinds.full.host, path[-1][0], 0)
        fits = all(count <= self._share(sequence, kind) for kind, count in zip(self.kinds, counts, strict=True))
        pages = []
        if fits:
            for kind, count in zip(self.kinds, counts, strict=True):
                room = tiers.make_room(kind.host, count, Purpose(0, sequence.root.account))
                assert room, f"{kind.name}: promised {count} pages"
                pages.append(kind.host.allocator.allocate(count))
        tiers.holds.release("a reservation")
        return pages if fits else None

    def _ends(self, low: int, end: int) -> list[int]:
        """Where a request could resume, in (low, end]."""
        grid = self.tiers.grid_tokens
        return list(range((low // grid + 1) * grid, end + 1, grid))

    def _questions(self, prefetch: Prefetch) -> tuple[Move, ...]:
        """All pages of full attention, and the pages and states that any of the possible ends needs."""
        page = self.tiers.page_tokens
        keys = prefetch.sequence.page_keys(prefetch.end // page)
        ends = self._ends(prefetch.matched_end, prefetch.end)
        moves = []
        for kind in self.kinds:
            page_ends = tuple(kind.asked_ends(prefetch.start, ends))
            page_keys = tuple(keys[end // page - 1] for end in page_ends)
            later = self._later_keys(prefetch, kind, prefetch.end)
            is_full = kind is self.kinds.full
            moves.append(Move(kind.name, NO_PAGES, NO_PAGES, page_keys, page_ends, later, in_order=is_full))
        return tuple(moves)

    def _later_keys(self, prefetch: Prefetch, kind: Kind, end: int) -> tuple[bytes, ...]:
        """Of the whole pages of the prompt after `end`, as far as a value of storage goes that holds what is before."""
        first, unit = end // self.tiers.page_tokens, self.stores.units[kind.c]
        sequence = prefetch.sequence
        num_whole = len(sequence.data) // sequence.page_bytes
        return tuple(sequence.page_keys(min(-(-first // unit) * unit, num_whole))[first:])

    def largest_end(self, prefetch: Prefetch, exists: Mapping[str, Any]) -> int:
        """The largest end <= bound that one rank's storage can serve, or 0. exists: component -> bools."""
        there = {
            move.component: {end for end, found in zip(move.page_ends, exists[move.component], strict=True) if found}
            for move in self._questions(prefetch)
        }
        covered, page = prefetch.start, self.tiers.page_tokens
        while covered + page in there[self.kinds.full.name]:
            covered += page
        for end in reversed(self._ends(prefetch.matched_end, min(prefetch.bound, covered))):
            if all(kind.servable(end, there[kind.name]) for kind in self.kinds.extras):
                return end
        return 0

    # ---- agreed outcomes

    def commit(self, prefetch: Prefetch, outcome: Outcome) -> None:
        if prefetch.state is PrefetchState.QUERY:
            self._commit_query(prefetch, outcome)
        elif prefetch.state is PrefetchState.FETCH:
            prefetch.progress = outcome.pages
            if outcome.done:
                self._decide(prefetch, "transfer")
        if prefetch.state is PrefetchState.DRAIN:
            if outcome.quiet:
                self._finish(prefetch)
            else:
                self.tiers.holds.release_device(prefetch.id)

    def _commit_query(self, prefetch: Prefetch, outcome: Outcome) -> None:
        if not outcome.done:
            return
        if not prefetch.cancelled and outcome.smallest_end == DECLINED:  # what is stored stays so
            self.counters["prefetch_declined"] += 1
            prefetch.state = PrefetchState.DRAIN
            return
        if not prefetch.cancelled and outcome.smallest_end != outcome.largest_end:
            prefetch.bound = outcome.smallest_end
            return
        end = outcome.smallest_end
        if not prefetch.cancelled:
            self._forget_beyond(prefetch, end)
        if prefetch.cancelled or end <= prefetch.matched_end:
            self.counters["prefetch_misses"] += not prefetch.cancelled
            prefetch.state = PrefetchState.DRAIN
            return
        del self.live[prefetch.id]
        prefetch.agreed_end = end
        prefetch.unresolved_tokens = max(0, end - prefetch.start)
        self.counters["agreed_storage_tokens"] += prefetch.unresolved_tokens
        self.counters["agreed_fetches"] += 1
        prefetch.state = PrefetchState.FETCH
        prefetch.id = self.outbox.add(TransferKind.FETCH, self._fetches(prefetch))
        self.live[prefetch.id] = prefetch

    def _forget_beyond(self, prefetch: Prefetch, end: int) -> None:
        """What storage did not have beyond `end` is not known as stored any more: it will be written again."""
        for move in self._questions(prefetch):
            pairs = zip(move.page_keys, move.page_ends, strict=True)
            self.stores.mark_lost(move.component, tuple(key for key, page_end in pairs if page_end > end))

    def _forget_rest(self, prefetch: Prefetch) -> None:
        """The same for what a FETCH that has ended did not get. Of one that was interrupted nothing is known."""
        keys = prefetch.sequence.page_keys(prefetch.agreed_end // self.tiers.page_tokens)
        for kind, pages in zip(self.kinds, prefetch.pages, strict=True):
            asked = keys[len(keys) - len(pages) :]
            self.stores.mark_lost(kind.name, tuple(asked[prefetch.progress.get(kind.name, 0) :]))

    def _fetches(self, prefetch: Prefetch) -> tuple[Move, ...]:
        """What to read for the agreed end; reserved pages beyond that are free at once, nothing has seen them."""
        page = self.tiers.page_tokens
        end = prefetch.agreed_end
        keys = prefetch.sequence.page_keys(end // page)
        moves = []
        for kind in self.kinds:
            count = kind.num_needed_pages(prefetch.start, end)
            pages = prefetch.pages[kind.c]
            assert count <= len(pages), f"{kind.name}: reserved {len(pages)} pages, {end=} needs {count}"
            kind.host.allocator.free(pages[count:])
            prefetch.pages[kind.c] = pages = pages[:count]
            ends = tuple(range(end - (count - 1) * page, end + 1, page))
            later = self._later_keys(prefetch, kind, end)
            moves.append(Move(kind.name, NO_PAGES, pages, tuple(keys[end // page - count :]), ends, later))
        return tuple(moves)

    # ---- what has come becomes the tree's

    def _decide(self, prefetch: Prefetch, reason: str) -> None:
        """The outcome: what has come so far becomes the tree's, the rest is freed when quiet."""
        prefetch.state = PrefetchState.DRAIN
        if reason == "transfer":
            self._forget_rest(prefetch)
        self._accept(prefetch, reason)
        num_left = sum(len(pages) for pages in prefetch.pages)
        self.decisions.note("fetched", prefetch.id, prefetch.agreed_end, num_left)

    def _accept(self, prefetch: Prefetch, reason: str) -> None:
        """Takes what has come as far as it is of use. reason: why the rest of the agreed tokens is missing."""
        tiers, full = self.tiers, self.kinds.full
        base = min(prefetch.start, prefetch.agreed_end)
        end = min(prefetch.agreed_end, prefetch.start + prefetch.progress.get(full.name, 0) * tiers.page_tokens)
        self._resolve(prefetch, reason, prefetch.agreed_end - max(end, base) if prefetch.agreed_end > base else 0)
        whole = [kind for kind in self.kinds.extras if self._is_whole(prefetch, kind)]
        has_any = any(len(prefetch.pages[kind.c]) for kind in whole)
        if end <= base and not (end == prefetch.agreed_end and has_any):
            self.counters["rejected_windows_and_states"] += len(self.kinds.extras)
            return
        node = self._place(prefetch.sequence, base)
        if node is None:
            self._resolve(prefetch, "host_capacity", prefetch.unresolved_tokens)
            return
        node = self._accept_full(prefetch, node, end)
        for kind in self.kinds.extras:
            if kind in whole and node.end == prefetch.agreed_end:
                prefetch.pages[kind.c], taken = kind.accept(node, prefetch.agreed_end, prefetch.pages[kind.c])
                for at in taken:
                    tiers.holds.add(prefetch.id, kind.host, at, kind.top_of(at))
            else:
                self.counters["rejected_windows_and_states"] += 1
        usable = self.matcher.longest(prefetch.sequence, prefetch.agreed_end).num_tokens
        self._settle(prefetch, reason, usable, prefetch.agreed_end)

    @staticmethod
    def _is_whole(prefetch: Prefetch, kind: Kind) -> bool:
        return prefetch.progress.get(kind.name, 0) == len(prefetch.pages[kind.c])

    def _place(self, sequence: Sequence, base: int) -> Node | None:
        """The node that ends at `base`, with every full page up to there in host memory; None if that cannot be had."""
        tiers = self.tiers
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
        index = self.kinds.full.host.index
        if any(node.pages[index] is None for node, _ in path):
            self.backups.back_up([node for node, _ in path], Purpose(0, sequence.root.account))
            path = tiers.tree.walk(sequence, base)
        missing = not path or path[-1][1] < base or any(node.pages[index] is None for node, _ in path)
        return None if missing else path[-1][0]

    def _accept_full(self, prefetch: Prefetch, node: Node, end: int) -> Node:
        """Hangs the fetched full pages below `node`; pages that the tree has meanwhile are duplicates."""
        tiers, full = self.tiers, self.kinds.full
        tree, host = tiers.tree, full.host
        data, page = prefetch.sequence.data, tiers.page_tokens
        fetched = prefetch.pages[full.c]
        duplicate = np.ones(len(fetched), bool)
        at = node.end
        while at < end:
            first_page = bytes(data[at * 4 : at * 4 + tree.page_bytes])
            child = node.children.get(first_page)
            if child is None:
                child = tree.add(node, first_page, prefetch.sequence.edge(at, end), end)
                if tiers.profile is not None:
                    tiers.profile.arrived(child)
            else:
                stop = at + tree.common_bytes(child.edge, data, at * 4, end * 4) // 4
                child = child if stop == child.end else tiers.split(child, stop)
            mine = slice((at - prefetch.start) // page, (child.end - prefetch.start) // page)
            if child.pages[host.index] is None:
                tiers.put(host, child, fetched[mine])
                duplicate[mine] = False
                tiers.holds.add(prefetch.id, host, child, child.start)
                prefetch.accepted.append(Span(at, child.end))
            else:
                self._resolve(prefetch, "already_present", child.end - at)
            at, node = child.end, child
        prefetch.pages[full.c] = fetched[duplicate]
        return node

    # ---- the account of agreed tokens

    def _resolve(self, prefetch: Prefetch, reason: str, tokens: int) -> None:
        """I12: every agreed token is counted once, as used or as unfulfilled for one reason."""
        assert 0 <= tokens <= prefetch.unresolved_tokens, f"I12: {prefetch=} {reason=} {tokens=}"
        prefetch.unresolved_tokens -= tokens
        if tokens:
            self.counters["storage_tokens_used" if reason == "used" else f"unfulfilled_{reason}"] += tokens

    def _settle(self, prefetch: Prefetch, reason: str, start: int, stop: int) -> int:
        """Counts the accepted tokens in [start, stop), which then no longer count as unresolved."""
        rest, num_tokens = [], 0
        for span in prefetch.accepted:
            low, high = max(span.start, start), min(span.stop, stop)
            if low >= high:
                rest.append(span)
                continue
            num_tokens += high - low
            rest += [part for part in (Span(span.start, low), Span(high, span.stop)) if part.start < part.stop]
        prefetch.accepted = rest
        self._resolve(prefetch, reason, num_tokens)
        return num_tokens

    def use(self, ticket: Ticket, device_tokens: int, cached_tokens: int) -> int:
        """Settles a ticket at the admit it was made for; returns how many of the cached tokens its prefetch brought."""
        if not ticket.is_wanted:
            return 0
        self._leave(ticket)
        prefetch = ticket.prefetch
        self._settle(prefetch, "already_present", 0, device_tokens)
        used = self._settle(prefetch, "used", device_tokens, cached_tokens)
        if not prefetch.num_wanting:
            # What is there was not taken: a load-back below the threshold, a capped hit, no room on the device.
            there = self.matcher.longest(prefetch.sequence, None).num_tokens
            self._settle(prefetch, "not_taken", 0, there)
            self._resolve(prefetch, "host_capacity", prefetch.unresolved_tokens)
        return used

    # ---- its end

    def expire(self, clock_ms: int) -> None:
        """PrefetchPolicy.TIMEOUT: those that have kept an admission waiting for too long are decided.

        clock_ms: stage 0's clock as agreed, modulo CLOCK_MODULUS; no other clock is ever looked at
        """
        for prefetch in list(self.live.values()):
            if not prefetch.num_waiting_admits or prefetch.is_over:
                continue
            since = prefetch.waited_for_since_ms
            waited_ms = 0 if since is None else (clock_ms - since) % CLOCK_MODULUS
            if since is None or waited_ms >= MAX_WAIT_MS:  # the clock of another host of stage 0 was taken: count anew
                prefetch.waited_for_since_ms = clock_ms
            elif waited_ms >= self._allowance_ms(prefetch):
                self.counters["prefetch_timeouts"] += 1
                self._stop(prefetch)

    def _allowance_ms(self, prefetch: Prefetch) -> float:
        config = self.tiers.config
        num_tokens = prefetch.end - prefetch.matched_end
        allowance = config.prefetch_timeout_s * 1000 + config.prefetch_timeout_s_per_1k_tokens * num_tokens
        return min(allowance, MAX_WAIT_MS - 1)

    def wait_for(self, ticket: Ticket) -> None:
        """Its admission waits for nothing but the prefetch: from now on the deadline counts."""
        if not ticket.is_waited_for:
            ticket.is_waited_for = True
            ticket.prefetch.num_waiting_admits += 1

    def take_what_came(self, ticket: Ticket) -> None:
        """What is agreed so far becomes the tree's, and nothing more is wanted; unless others want all of it: then this
        request goes without."""
        if ticket.prefetch.num_wanting > 1:
            self._leave(ticket)
        else:
            self._stop(ticket.prefetch)

    def _stop(self, prefetch: Prefetch) -> None:
        if prefetch.state is PrefetchState.FETCH:
            self._decide(prefetch, "deadline")
        else:
            self._abandon(prefetch)

    def cancel(self, ticket: Ticket) -> None:
        """This request wants nothing more of it; when none does, its pages are freed once every rank is quiet."""
        if ticket.is_wanted:
            self._leave(ticket)
            if not ticket.prefetch.num_wanting:
                self._abandon(ticket.prefetch)

    def _leave(self, ticket: Ticket) -> None:
        prefetch = ticket.prefetch
        prefetch.num_wanting -= 1
        prefetch.num_waiting_admits -= ticket.is_waited_for
        if not prefetch.num_waiting_admits:
            prefetch.waited_for_since_ms = None
        ticket.is_wanted = ticket.is_waited_for = False
        self.decisions.note("leave", prefetch.id, prefetch.num_wanting)

    def abandon_all(self, namespace: Namespace | None = None) -> None:
        """Those that are not decided (of one namespace, or all) are not wanted any more; their requests go on."""
        for prefetch in self.live.values():
            if not prefetch.is_over and (namespace is None or prefetch.sequence.namespace is namespace):
                self._abandon(prefetch)

    def over(self) -> list[int]:
        """Those of which only quiet is awaited."""
        return [id for id, prefetch in self.live.items() if prefetch.is_over]

    def _abandon(self, prefetch: Prefetch) -> None:
        prefetch.cancelled = True
        self._resolve(prefetch, "aborted", prefetch.unresolved_tokens)
        if prefetch.state is PrefetchState.FETCH:
            prefetch.state = PrefetchState.DRAIN
            self.counters["fetches_cancelled_in_flight"] += 1
        self.decisions.note("cancel", prefetch.id)

    def _finish(self, prefetch: Prefetch) -> None:
        for kind, pages in zip(self.kinds, prefetch.pages, strict=True):
            kind.host.allocator.free(pages)
        prefetch.pages = [NO_PAGES] * len(prefetch.pages)
        self.tiers.holds.release(prefetch.id)
        prefetch.state = PrefetchState.DONE
        del self.live[prefetch.id]
        self.decisions.note("quiet", prefetch.id)
