"""Sliding windows: resuming at n needs the pages over the last tokens before n.

root ---- a ---- b ---- c         a lease that has gone on from b to c needs b's window no more: it is passed,
          |------| window at b    and leaves before others unless other ways go on from b
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import numpy as np

from jaxcache.components.base import Component
from jaxcache.core.decisions import Counters
from jaxcache.core.kinds.base import (
    Extra,
    FindEviction,
    Need,
    Path,
    keep_duplicates,
    last_eviction,
    num_pages_text,
    tier_name,
)
from jaxcache.core.lease import Lease, WindowTable, read_only
from jaxcache.core.missing import Cause, Missing
from jaxcache.core.node import Node
from jaxcache.core.pages import Residency
from jaxcache.core.tiers import Tiers
from jaxcache.core.tokens import Sequence
from jaxcache.types import PageIds, Span


class WindowResidency(Residency):
    """An entry may leave wherever it is: a match simply gets shorter.

    Generated text leaves before prompts, but not the window at its end: the next turn begins there.
    """

    __slots__ = ()

    def evictable(self, node: Node) -> bool:
        return node.pages[self.index] is not None and not node.pins[self.index]

    def put(self, node: Node, page_ids: PageIds) -> None:
        if not self._come(node, page_ids):
            self._candidate(node)

    def take(self, node: Node) -> PageIds:
        return self._leave(node)

    def shorten(self, node: Node, num_pages: int) -> PageIds:
        return self._cut(node, num_pages)

    def split(self, node: Node, prefix: Node, num_pages: int) -> None:
        index = self.index
        prefix.pins[index] = node.pins[index]
        pages = node.pages[index]
        if pages is not None:
            prefix.pages[index], node.pages[index] = pages[:num_pages], pages[num_pages:]
            if not prefix.pins[index]:
                self._candidate(prefix)


class Suffix(Extra):
    """The last pages before a position; `first_needed` says from where on, a multiple of the page that never falls."""

    residency: ClassVar[type[Residency]] = WindowResidency

    def usable(self, path: Path) -> list[bool]:
        run_start, found = 0, []  # where the unbroken run of window pages that reaches this end begins
        device, host = self.device.index, self.host.index
        for node, end in path:
            pages = node.pages
            if pages[device] is None and pages[host] is None:
                run_start = end
            found.append(not run_start or run_start <= self.first_needed(end))
        return found

    def num_entry_pages(self, num_tokens: int) -> int:
        return num_tokens // self.page_tokens

    def top_of(self, node: Node) -> int:
        return node.start

    # ---- leases

    def num_own_pages(self, num_cached: int, end: int) -> int:
        return -(-end // self.page_tokens) - num_cached // self.page_tokens

    def pin(self, lease: Lease, need: Need) -> None:
        lease.parts.append(WindowTable(self.device.pin_up(lease._node, need.low)))

    def open(self, lease: Lease, need: Need) -> None:
        """The nodes' pages as they are now (making room may have split some), then own ones."""
        node, allocator = lease._node, self.device.allocator
        part: WindowTable = lease.parts[self.p]
        at = node.end // self.page_tokens
        page_ids = np.empty(at + need.num_own, np.int32)
        page_ids[at:] = allocator.allocate_view(need.num_own)
        while node.parent is not None and node.end > need.low:
            cached = node.pages[self.c]
            assert cached is not None, f"{node=} is not on the device"
            page_ids[at - len(cached) : at] = cached
            at -= len(cached)
            node = node.parent
        page_ids[:at] = allocator.num_pages
        part.window_start = at * self.page_tokens
        part.page_ids = read_only(page_ids)

    def num_missing_pages(self, num_pages: int) -> int:
        return num_pages

    def extend(self, lease: Lease, num_pages: int) -> None:
        part: WindowTable = lease.parts[self.p]
        part.page_ids = read_only(np.concatenate([part.page_ids, self.device.allocator.allocate_view(num_pages)]))

    def release(self, lease: Lease) -> None:
        part: WindowTable = lease.parts[self.p]
        first = max(lease._published, part.window_start) // self.page_tokens
        if first < len(part.page_ids):
            self.device.allocator.free(part.page_ids[first:])
        self.device.unpin_up(lease._node, part.pin_top)

    def owned(self, lease: Lease) -> list[PageIds]:
        part: WindowTable = lease.parts[self.p]
        own = part.page_ids[lease._published // self.page_tokens :]
        return [own[own != self.device.allocator.num_pages]]

    def window_start_to_keep(self, lease: Lease, num_computed: int) -> int:
        """Start of the window at the newest position where the request can be resumed: on the grid, and for a prompt
        that is computed before its end, since the same prompt, sent again, has to compute its last token.

        With pages of 4 and a window of 6, computed 17 of 20 tokens: resumable at 16, which needs tokens from 10 on, so
        pages from 8 on.
        """
        newest = num_computed - (num_computed == lease.sequence.prompt_tokens)
        live = self.first_needed(newest // self.grid_tokens * self.grid_tokens)
        return min(live, num_computed // self.page_tokens * self.page_tokens)

    def report(self, lease: Lease, num_computed: int) -> None:
        """Gives back own pages, and pins, that are behind the live window."""
        part: WindowTable = lease.parts[self.p]
        live = self.window_start_to_keep(lease, num_computed)
        if live > part.window_start:
            page_ids, allocator = part.page_ids, self.device.allocator
            first, last = max(lease._published, part.window_start) // self.page_tokens, live // self.page_tokens
            if first < last:
                allocator.free(page_ids[first:last])
            page_ids = page_ids.copy()
            page_ids[:last] = allocator.num_pages
            part.page_ids = read_only(page_ids)
            part.window_start = live
        if lease._node.parent is not None and part.pin_top < live:
            self._unpin_behind(lease, part, live)

    def _unpin_behind(self, lease: Lease, part: WindowTable, live: int) -> None:
        """What only this request goes on from leaves before others: it has gone on."""
        node, top, new_top = lease._node, part.pin_top, lease._published
        is_passed = not node.children
        while node.parent is not None and node.end > top:
            if node.end <= live:
                self.device.unpin(node)
                if is_passed:
                    self.device.demote(node)
                    self.host.demote(node)
            else:
                new_top = node.start
            node = node.parent
            is_passed = is_passed and len(node.children) == 1
        part.pin_top = new_top

    # ---- publishing

    def publish(self, lease: Lease, child: Node, at: int, live: int) -> None:
        part: WindowTable = lease.parts[self.p]
        if child.end <= live:
            part.pin_top = child.end
            return
        page = self.page_tokens
        pages = slice(at // page, child.end // page)
        theirs = child.pages[self.c]
        if theirs is None:
            assert at >= part.window_start, f"window hole in {child=}: {part.window_start=}"
            self.device.publish(child, part.page_ids[pages].copy())
            self.tiers.tree.version += 1
            return
        self.device.pin(child)
        keep_duplicates(lease, self.c, part.page_ids[max(at, part.window_start) // page : pages.stop])
        if not self.tiers.config.stable_tables:  # the old table was handed out
            part.page_ids = part.page_ids.copy()
            part.page_ids[pages] = theirs
            read_only(part.page_ids)

    # ---- storage

    def asked_ends(self, start: int, ends: list[int]) -> list[int]:
        page = self.page_tokens
        return list(range(self.first_needed(ends[0]) + page, ends[-1] + 1, page))

    def servable(self, end: int, there: set[int]) -> bool:
        page = self.page_tokens
        return all(e in there for e in range(self.first_needed(end) + page, end + 1, page))

    def accept(self, node: Node, end: int, fetched: PageIds) -> tuple[PageIds, list[Node]]:
        low = self.first_needed(end)
        rest: list[PageIds] = []
        taken: list[Node] = []
        while node.parent is not None and node.end > low:
            if node.start < low:
                self.tiers.split(node, low)
            mine = fetched[(node.start - low) // self.page_tokens : (node.end - low) // self.page_tokens]
            if not self.resident(node) and self.may_be_in_host(node):
                self.tiers.put(self.host, node, mine)
                taken.append(node)
            else:
                rest.insert(0, mine)
            node = node.parent
        return np.concatenate(rest) if rest else fetched[:0], taken

    # ---- to look at

    def span_of(self, node: Node, end: int) -> Span | None:
        return Span(node.start, end)

    def missing(self, sequence: Sequence, path: Path, end: int, find_eviction: FindEviction) -> Iterator[Missing]:
        """One for each run of tokens that went missing in the same way."""
        low = self.first_needed(end)
        runs: list[Missing] = []
        held: list[tuple[str, Span]] = []
        for node, stop in path:
            span = Span(max(node.start, low), min(stop, end))
            if span.start >= span.stop:
                continue
            tier = tier_name(self, node)
            if tier is not None:
                held.append((tier, span))
                continue
            eviction = last_eviction(self, node, find_eviction)
            cause = Cause.NEVER_MADE if eviction is None else Cause.EVICTED
            last = runs[-1] if runs else None
            if last is not None and last.span.stop == span.start and last.eviction == eviction:
                runs[-1] = replace(last, span=Span(last.span.start, span.stop))
            else:
                runs.append(Missing(self.name, span, cause, eviction, (), ()))
        for run in runs:
            remedies = [f"The next request that ends a chunk at {end} (Lease.next_stop) and inserts there makes it."]
            if run.eviction is not None and run.eviction.reason == "room":
                remedies.append(f"More pages would have kept it: {self.name} has {num_pages_text(self, run.eviction)}.")
            yield replace(run, held=tuple(held), remedies=tuple(remedies))


class Window(Suffix, name="window"):
    """The pages over the last `lookback` tokens, in whole pages."""

    def __init__(self, tiers: Tiers, c: int, counters: Counters):
        super().__init__(tiers, c, counters)
        self.lookback = lookback_tokens(self.component)

    def first_needed(self, n: int) -> int:
        if not self.lookback:
            return n
        return (n - self.lookback) // self.page_tokens * self.page_tokens if n > self.lookback else 0


def lookback_tokens(component: Component) -> int:
    """How far back `required` reaches. ValueError unless it is as far everywhere: what a window needs is found by
    comparing positions."""
    far = 1 << 48
    lookback = far - component.required(far).start
    for n in (1, max(1, lookback - 1), min(lookback + 1, far)):
        if component.required(n).start != max(0, n - lookback):
            raise ValueError(
                f"component {component.name!r}: required({n}) must begin {lookback} tokens before, or at 0"
            )
    return lookback
