"""Storage prefetches: reserve host pages, QUERY, agree on an end, FETCH, agree on what came, make it the tree's.

    prefetch --QUERY--> agreed end --FETCH--> agreed outcome --accept--> tree
                 |                     |            |
                 +---- nothing there   +--cancel----+--DRAIN-- quiet on all ranks --> the other pages are free again

A prefetch has two agreed ends: its outcome, at which accepted pages become the tree's, and quiet, before which none of
its pages is freed, because some rank may still write into them. Requests that ask for the same share one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxcache.config import pages_of_share
from jaxcache.core import matching
from jaxcache.core.arrivals import Arrivals
from jaxcache.core.backups import Backups
from jaxcache.core.page_hash import Namespace
from jaxcache.core.planner import Counters, Planner
from jaxcache.core.prefetch import Prefetch, PrefetchState
from jaxcache.core.radix_tree import FULL
from jaxcache.core.sequence import Sequence
from jaxcache.core.stores import Stores
from jaxcache.core.ticket import Ticket
from jaxcache.core.tiers import Tiers
from jaxcache.types import CLOCK_MODULUS, DECLINED, NO_PAGES, Move, Outcome, PageIds, TransferKind

MAX_HELD_MS = CLOCK_MODULUS // 2  # what looks longer is a clock that went back


class Prefetches:
    """live: id of its QUERY or FETCH -> prefetch. policy: what an admission does with one that is still running."""

    def __init__(self, tiers: Tiers, planner: Planner, stores: Stores, backups: Backups, counters: Counters):
        self.tiers = tiers
        self.planner = planner
        self.stores = stores
        self.counters = counters
        self.arrivals = Arrivals(tiers, backups, counters)
        self.policy = tiers.config.prefetch_policy
        self.live: dict[int, Prefetch] = {}

    # ---- asking

    def prefetch(self, sequence: Sequence) -> Ticket | None:
        """A ticket, or None (and a counter) where asking cannot pay."""
        tiers = self.tiers
        page = tiers.page_tokens
        for host in tiers.host:
            host.serve(sequence.root)
        prefix = matching.longest_prefix(tiers, sequence, None)
        start, worthwhile = prefix.found_tokens, max(page, tiers.config.prefetch_min_tokens)
        wanted_end = self._last_end(sequence.num_tokens - 1)
        if wanted_end - prefix.num_tokens < worthwhile:
            self.counters["prefetch_too_short"] += 1
            return None
        for shared in self.live.values():
            if self._serves(shared, sequence, start, wanted_end, worthwhile):
                self.counters["joined_prefetches"] += 1
                return self._ticket(sequence, shared)
        end = min(wanted_end, self._last_end(start + self._share(FULL) * page))
        pages = self._reserve(sequence, start, end) if end - prefix.num_tokens >= worthwhile else None
        if pages is None:
            self.counters["prefetch_no_room"] += 1
            return None
        prefetch = Prefetch(sequence, prefix.num_tokens, start, end, pages)
        prefetch.id = self.planner.add(TransferKind.QUERY, self._questions(prefetch))
        self.live[prefetch.id] = prefetch
        self.counters["prefetches"] += 1
        return self._ticket(sequence, prefetch)

    def _ticket(self, sequence: Sequence, prefetch: Prefetch) -> Ticket:
        prefetch.num_wanting += 1
        content = sequence.checksum(0, 0)
        self.planner.note("prefetch", prefetch.id, prefetch.end, sequence.namespace.checksum, content)
        return Ticket(sequence, prefetch)

    def _serves(self, shared: Prefetch, sequence: Sequence, start: int, wanted_end: int, worthwhile: int) -> bool:
        """Whether what is being read already is what this sequence wants, but for less than is worth asking for.

        A window or state comes only for the end that is agreed on, so that must not lie beyond this sequence's.
        """
        stop = min(shared.end, wanted_end)
        if shared.is_over or shared.sequence.root is not sequence.root or shared.start > start:
            return False
        if wanted_end - stop >= worthwhile or (self.tiers.partial and shared.end > wanted_end):
            return False
        num_pages = stop // self.tiers.page_tokens
        return shared.sequence.page_keys(num_pages)[-1:] == sequence.page_keys(num_pages)[-1:]

    def _last_end(self, num_tokens: int) -> int:
        """The last place up to there where a request could resume."""
        return num_tokens // self.tiers.grid_tokens * self.tiers.grid_tokens

    def _share(self, c: int) -> int:
        """Host pages of component c that prefetches may still reserve."""
        host = self.tiers.host[c]
        reserved = sum(len(prefetch.pages[c]) for prefetch in self.live.values())
        allowed = pages_of_share(self.tiers.config.prefetch_host_share, host.allocator.num_pages) - reserved
        return max(0, min(allowed, host.available()))

    def _num_pages(self, c: int, start: int, end: int) -> int:
        """How many pages of component c it takes to resume at `end` (full attention: from `start` on)."""
        if c == self.tiers.point:
            return 1
        low = start if c == FULL else self.tiers.required_start(c, end)
        return max(0, end - low) // self.tiers.page_tokens

    def _reserve(self, sequence: Sequence, start: int, end: int) -> list[PageIds] | None:
        """Host pages for every component, evicting others but not what the fetched pages will hang below."""
        tiers = self.tiers
        counts = [self._num_pages(c, start, end) for c in range(len(tiers.components))]
        path = tiers.tree.walk(sequence, sequence.num_tokens - 1)
        holds = tiers.hold(tiers.host[FULL], path[-1][0], 0) if path else []
        fits = all(count <= self._share(c) for c, count in enumerate(counts))
        pages = []
        tiers.lease_id = 0  # nobody has been admitted for whom room is made here
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

    def _questions(self, prefetch: Prefetch) -> tuple[Move, ...]:
        """All pages of full attention, and the pages and states that any of the possible ends needs."""
        tiers = self.tiers
        page = tiers.page_tokens
        keys = prefetch.sequence.page_keys(prefetch.end // page)
        first_end = self._ends(prefetch.matched_end, prefetch.end)[0]
        moves = []
        for c in range(len(tiers.components)):
            if c == tiers.point:
                ends = self._ends(prefetch.matched_end, prefetch.end)
            else:
                low = prefetch.start if c == FULL else tiers.required_start(c, first_end)
                ends = list(range(low + page, prefetch.end + 1, page))
            page_keys = tuple(keys[end // page - 1] for end in ends)
            later = self._later_keys(prefetch, c, prefetch.end)
            move = Move(tiers.components[c].name, page_keys=page_keys, page_ends=tuple(ends), later_keys=later)
            moves.append(move._replace(in_order=c == FULL))
        return tuple(moves)

    def _later_keys(self, prefetch: Prefetch, c: int, end: int) -> tuple[bytes, ...]:
        """Of the whole pages of the prompt after `end`, as far as a value of storage goes that holds what is before."""
        first, unit = end // self.tiers.page_tokens, self.stores.units[c]
        sequence = prefetch.sequence
        num_whole = len(sequence.data) // sequence.page_bytes
        return tuple(sequence.page_keys(min(-(-first // unit) * unit, num_whole))[first:])

    def largest_end(self, prefetch: Prefetch, exists: Mapping[str, Any]) -> int:
        """The largest end <= bound that one rank's storage can serve, or 0. exists: component -> bools."""
        tiers = self.tiers
        there = {
            move.component: {end for end, found in zip(move.page_ends, exists[move.component], strict=True) if found}
            for move in self._questions(prefetch)
        }
        covered = prefetch.start
        while covered + tiers.page_tokens in there[tiers.components[FULL].name]:
            covered += tiers.page_tokens
        for end in reversed(self._ends(prefetch.matched_end, min(prefetch.bound, covered))):
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
                self.tiers.let_go_of_device(prefetch.holds)

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
            self._doubt(prefetch, end)
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
        prefetch.id = self.planner.add(TransferKind.FETCH, self._fetches(prefetch))
        self.live[prefetch.id] = prefetch

    def _doubt(self, prefetch: Prefetch, end: int) -> None:
        """What storage did not have beyond `end` is not believed stored any more: it will be written again."""
        for move in self._questions(prefetch):
            pairs = zip(move.page_keys, move.page_ends, strict=True)
            self.stores.doubt(move.component, tuple(key for key, page_end in pairs if page_end > end))

    def _doubt_rest(self, prefetch: Prefetch) -> None:
        """The same for what a FETCH that has ended did not get. Of one that was interrupted nothing is known."""
        keys = prefetch.sequence.page_keys(prefetch.agreed_end // self.tiers.page_tokens)
        for component, pages in zip(self.tiers.components, prefetch.pages, strict=True):
            asked = keys[len(keys) - len(pages) :]
            self.stores.doubt(component.name, tuple(asked[prefetch.progress.get(component.name, 0) :]))

    def _fetches(self, prefetch: Prefetch) -> tuple[Move, ...]:
        """What to read for the agreed end; reserved pages beyond that are free at once, nobody has seen them."""
        tiers = self.tiers
        page = tiers.page_tokens
        end = prefetch.agreed_end
        keys = prefetch.sequence.page_keys(end // page)
        moves = []
        for c in range(len(tiers.components)):
            count = self._num_pages(c, prefetch.start, end)
            tiers.host[c].allocator.free(prefetch.pages[c][count:])
            prefetch.pages[c] = prefetch.pages[c][:count]
            mine, later = tuple(keys[end // page - count :]), self._later_keys(prefetch, c, end)
            ends = tuple(range(end - (count - 1) * page, end + 1, page))
            name = tiers.components[c].name
            moves.append(Move(name, dst_page_ids=prefetch.pages[c], page_keys=mine, page_ends=ends, later_keys=later))
        return tuple(moves)

    # ---- its end

    def expire(self, clock_ms: int) -> None:
        """PrefetchPolicy.TIMEOUT: those that have held up an admission for too long are decided.

        clock_ms: stage 0's clock as agreed, modulo CLOCK_MODULUS; no other clock is ever looked at
        """
        for prefetch in list(self.live.values()):
            if not prefetch.num_held or prefetch.is_over:
                continue
            since = prefetch.held_since_ms
            held_ms = 0 if since is None else (clock_ms - since) % CLOCK_MODULUS
            if since is None or held_ms >= MAX_HELD_MS:  # the clock of another host of stage 0 was taken: count anew
                prefetch.held_since_ms = clock_ms
            elif held_ms >= self._allowance_ms(prefetch):
                self.counters["prefetch_timeouts"] += 1
                self._stop(prefetch)

    def _allowance_ms(self, prefetch: Prefetch) -> float:
        config = self.tiers.config
        num_tokens = prefetch.end - prefetch.matched_end
        allowance = config.prefetch_timeout_s * 1000 + config.prefetch_timeout_s_per_1k_tokens * num_tokens
        return min(allowance, MAX_HELD_MS - 1)

    def hold_up(self, ticket: Ticket) -> None:
        """Its admission waits for nothing but the prefetch: from now on the deadline counts."""
        if not ticket.is_held:
            ticket.is_held = True
            ticket.prefetch.num_held += 1

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

    def _decide(self, prefetch: Prefetch, reason: str) -> None:
        """The outcome: what has come so far becomes the tree's, the rest is freed when quiet."""
        prefetch.state = PrefetchState.DRAIN
        if reason == "transfer":
            self._doubt_rest(prefetch)
        self.arrivals.accept(prefetch, reason)
        num_left = sum(len(pages) for pages in prefetch.pages)
        self.planner.note("fetched", prefetch.id, prefetch.agreed_end, num_left)

    def cancel(self, ticket: Ticket) -> None:
        """This request wants nothing more of it; when nobody does, its pages are freed once every rank is quiet."""
        if ticket.is_wanted:
            self._leave(ticket)
            if not ticket.prefetch.num_wanting:
                self._abandon(ticket.prefetch)

    def _leave(self, ticket: Ticket) -> None:
        prefetch = ticket.prefetch
        prefetch.num_wanting -= 1
        prefetch.num_held -= ticket.is_held
        if not prefetch.num_held:
            prefetch.held_since_ms = None
        ticket.is_wanted = ticket.is_held = False
        self.planner.note("leave", prefetch.id, prefetch.num_wanting)

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
        self.arrivals.resolve(prefetch, "aborted", prefetch.unresolved_tokens)
        if prefetch.state is PrefetchState.FETCH:
            prefetch.state = PrefetchState.DRAIN
            self.counters["fetches_cancelled_in_flight"] += 1
        self.planner.note("cancel", prefetch.id)

    def use(self, ticket: Ticket, device_tokens: int, cached_tokens: int) -> int:
        """Settles a ticket at the admit it was made for; returns how many of the cached tokens its prefetch brought."""
        if not ticket.is_wanted:
            return 0
        self._leave(ticket)
        used = self.arrivals.use(ticket.prefetch, device_tokens, cached_tokens)
        if not ticket.prefetch.num_wanting:
            self.arrivals.settle_rest(ticket.prefetch)
        return used

    def _finish(self, prefetch: Prefetch) -> None:
        for host, pages in zip(self.tiers.host, prefetch.pages, strict=True):
            host.allocator.free(pages)
        prefetch.pages = [NO_PAGES] * len(prefetch.pages)
        self.tiers.let_go(prefetch.holds)
        prefetch.holds = []
        prefetch.state = PrefetchState.DONE
        del self.live[prefetch.id]
        self.planner.note("quiet", prefetch.id)
