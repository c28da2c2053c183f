"""What a prefetch has brought becomes the tree's, and every agreed token is accounted for.

|-- host ancestors: backed up first --|-- full pages that came --|-- missing: a reason --|
0                                   start                                            agreed_end
                                                   window, state: whole at agreed_end, or not at all
"""

from __future__ import annotations

import numpy as np

from jaxcache.core import matching
from jaxcache.core.backups import Backups
from jaxcache.core.planner import Counters
from jaxcache.core.prefetch import Prefetch
from jaxcache.core.radix_tree import FULL, Node
from jaxcache.core.sequence import Sequence
from jaxcache.core.tiers import Tiers
from jaxcache.types import Span


class Arrivals:
    """Puts fetched pages into the host tier."""

    def __init__(self, tiers: Tiers, backups: Backups, counters: Counters):
        self.tiers = tiers
        self.backups = backups
        self.counters = counters

    def accept(self, prefetch: Prefetch, reason: str) -> None:
        """Takes what has come as far as it is of use. reason: why the rest of the agreed tokens is missing."""
        tiers = self.tiers
        base = min(prefetch.start, prefetch.agreed_end)
        come = prefetch.progress.get(tiers.components[FULL].name, 0)
        end = min(prefetch.agreed_end, prefetch.start + come * tiers.page_tokens)
        self.resolve(prefetch, reason, prefetch.agreed_end - max(end, base) if prefetch.agreed_end > base else 0)
        if end <= base and not (end == prefetch.agreed_end and self._has_whole(prefetch)):
            self.counters["rejected_windows_and_states"] += len(tiers.partial)
            return
        tiers.lease_id = 0  # evictions made here are on behalf of storage, not of a lease
        node = self._place(prefetch.sequence, base)
        if node is None:
            self.resolve(prefetch, "host_capacity", prefetch.unresolved_tokens)
            return
        node = self._accept_full(prefetch, node, end)
        for c in tiers.partial:
            is_whole = prefetch.progress.get(tiers.components[c].name, 0) == len(prefetch.pages[c])
            if is_whole and node.end == prefetch.agreed_end:
                self._accept_partial(prefetch, c, node)
            else:
                self.counters["rejected_windows_and_states"] += 1
        usable = matching.longest_prefix(tiers, prefetch.sequence, prefetch.agreed_end).num_tokens
        self._settle(prefetch, reason, usable, prefetch.agreed_end)

    def _has_whole(self, prefetch: Prefetch) -> bool:
        """Whether a window or a state has come, whole."""
        names = [component.name for component in self.tiers.components]
        return any(0 < len(prefetch.pages[c]) == prefetch.progress.get(names[c], 0) for c in self.tiers.partial)

    def resolve(self, prefetch: Prefetch, reason: str, tokens: int) -> None:
        """I12: every agreed token is counted once, as used or as unfulfilled for one reason."""
        assert 0 <= tokens <= prefetch.unresolved_tokens, f"I12: {prefetch=} {reason=} {tokens=}"
        prefetch.unresolved_tokens -= tokens
        if tokens:
            self.counters["storage_tokens_used" if reason == "used" else f"unfulfilled_{reason}"] += tokens

    def use(self, prefetch: Prefetch, device_tokens: int, cached_tokens: int) -> int:
        """An admission that it was made for: returns how many of the cached tokens it brought. Each counts once."""
        self._settle(prefetch, "already_present", 0, device_tokens)
        return self._settle(prefetch, "used", device_tokens, cached_tokens)

    def settle_rest(self, prefetch: Prefetch) -> None:
        """Nobody wants more of it. What is there was not taken: a load-back below the threshold, a capped hit, no room
        on the device."""
        there = matching.longest_prefix(self.tiers, prefetch.sequence, None).num_tokens
        self._settle(prefetch, "not_taken", 0, there)
        self.resolve(prefetch, "host_capacity", prefetch.unresolved_tokens)

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
        self.resolve(prefetch, reason, num_tokens)
        return num_tokens

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
        index = tiers.host[FULL].index
        if any(node.pages[index] is None for node, _ in path):
            self.backups.back_up([node for node, _ in path])
            path = tiers.tree.walk(sequence, base)
        missing = not path or path[-1][1] < base or any(node.pages[index] is None for node, _ in path)
        return None if missing else path[-1][0]

    def _accept_full(self, prefetch: Prefetch, node: Node, end: int) -> Node:
        """Hangs the fetched full pages below `node`; pages that the tree has meanwhile are duplicates."""
        tiers = self.tiers
        tree = tiers.tree
        host = tiers.host[FULL]
        data, page = prefetch.sequence.data, tiers.page_tokens
        fetched = prefetch.pages[FULL]
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
                prefetch.holds += tiers.hold(host, child, child.start)
                prefetch.accepted.append(Span(at, child.end))
            else:
                self.resolve(prefetch, "already_present", child.end - at)
            at, node = child.end, child
        prefetch.pages[FULL] = fetched[duplicate]
        return node

    def _accept_partial(self, prefetch: Prefetch, c: int, node: Node) -> None:
        """A window or a state, whole or not at all."""
        tiers = self.tiers
        host = tiers.host[c]
        fetched = prefetch.pages[c]
        duplicate = np.ones(len(fetched), bool)
        end = prefetch.agreed_end
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
                prefetch.holds += tiers.hold(host, node, node.end - 1 if c == tiers.point else node.start)
            node = node.parent
        prefetch.pages[c] = fetched[duplicate]

    def _holdable(self, node: Node) -> bool:
        return node.pages[self.tiers.host[FULL].index] is not None
