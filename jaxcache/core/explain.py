"""Why a prompt missed: what of it is where, where it first differs, and why what is missing is not there.

The answer is for those who may see the prompt. So it says nothing of namespaces whose private fields differ from those
of the prompt's: neither their fields, nor whether they hold a page, nor what their leases did.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from jaxcache.core.kinds import Kinds, Path
from jaxcache.core.lease import Lease
from jaxcache.core.match import Matcher
from jaxcache.core.missing import Missing
from jaxcache.core.node import Node
from jaxcache.core.tiers import Eviction, Tiers
from jaxcache.core.tokens import Sequence
from jaxcache.types import Span, Tier


class Limit(enum.Enum):
    """Why no request can resume at the end of what is found, whatever else is there."""

    LAST_TOKEN = "at least the last token of a prompt has to be computed"
    GRID = "requests resume at multiples of {grid_tokens} tokens only (of page_tokens and every chunk_tokens)"
    RETIRED = "its namespace was retired"


@dataclass(frozen=True)
class Explanation:
    """What a cache knows of a prompt.

    num_tokens:      of the prompt
    usable_tokens:   where a request could resume
    found_tokens:    leading tokens of which the cache holds at least full attention
    resumable_tokens: where one could resume if nothing were missing of what is found: a whole page, on the grid of
                     states, and before the last token. Beyond usable_tokens it is the branch point of `match`
    limit:           why that is not found_tokens; None: it is
    grid_tokens:     requests resume at multiples of this only
    missing:         the windows and states that keep a request from resuming there, why they are not there, and what
                     would make them
    first_miss_page: the first page that is not there, or None if all whole pages are
    tiers:           (component, tier, span): where the found pages are; the span of a state is empty, at its end
    eviction:        when and why the first missing page left; None if it was never there, or left long ago. Its lease
                     is named while it runs, if its namespace has the private fields of the prompt's; else it is 0
    lost:            the same for all windows and states that are missing within the found tokens, needed or not
    other_namespace: public fields that differ from a namespace with the same private fields in which the prompt's first
                     page is cached: (name, here, there)
    """

    num_tokens: int
    usable_tokens: int
    found_tokens: int
    resumable_tokens: int
    limit: Limit | None
    grid_tokens: int
    missing: tuple[Missing, ...]
    first_miss_page: int | None
    tiers: tuple[tuple[str, str, Span], ...]
    eviction: Eviction | None
    lost: tuple[tuple[Span, Eviction], ...]
    other_namespace: tuple[tuple[str, str | None, str | None], ...]

    def __str__(self) -> str:
        lines = [f"{self.usable_tokens} of {self.num_tokens} tokens can be used; {self.found_tokens} are found."]
        lines += [f"  {_where(span)}: {name} on {tier}" for name, tier, span in self.tiers]
        if self.limit is not None:
            why = self.limit.value.format(grid_tokens=self.grid_tokens)
            lines.append(f"No request can resume at {self.found_tokens}: {why}.")
        if self.missing:
            lines.append(f"To resume at {self.resumable_tokens}:")
            lines += map(str, self.missing)
        if self.first_miss_page is not None:
            lines.append(f"The first page that is not there: {self.first_miss_page}. {self._why()}")
        return "\n".join(lines)

    def _why(self) -> str:
        if self.eviction is not None:
            return _sentence(self.eviction)
        if self.other_namespace:
            parts = [f"{name} is {here!r} here and {there!r} there" for name, here, there in self.other_namespace]
            return f"It is cached in another namespace: {'; '.join(parts)}."
        return "It was never computed here, or left long ago."


def _where(span: Span) -> str:
    return f"tokens [{span.start}, {span.stop})" if span.stop > span.start else f"after token {span.stop}"


def _sentence(eviction: Eviction) -> str:
    return (
        f"{eviction.component} left {eviction.tier.name} in step {eviction.step}: {eviction.reason}"
        + (f" for lease {eviction.lease}" if eviction.lease else "")
        + "."
    )


def explain(matcher: Matcher, sequence: Sequence, leases: Mapping[int, Lease]) -> Explanation:
    """Looks without touching anything. leases: those that run."""
    tiers, kinds = matcher.tiers, matcher.kinds
    known = _Evictions(tiers, sequence, leases)
    usable = matcher.longest(sequence, sequence.num_tokens).num_tokens
    path = tiers.tree.walk(sequence, sequence.num_tokens)
    found = path[-1][1] if path else 0
    resumable, limit = _resumable(tiers, sequence, found)
    page = tiers.page_tokens
    is_missing = found + page <= sequence.num_tokens
    first_page = bytes(sequence.data[found * 4 : (found + page) * 4])
    node = _whole_node(sequence.root, path)
    return Explanation(
        sequence.num_tokens,
        usable,
        found,
        resumable,
        limit,
        tiers.grid_tokens,
        tuple(m for kind in kinds.extras for m in kind.missing(sequence, path, resumable, known.find))
        if usable < resumable
        else (),
        found // page if is_missing else None,
        tuple(_tiers(kinds, path)),
        known.find(node.id, first_page) if is_missing else None,
        tuple(_lost(tiers, path, known)),
        _other_namespace(tiers, sequence) if is_missing and not found else (),
    )


def _resumable(tiers: Tiers, sequence: Sequence, found: int) -> tuple[int, Limit | None]:
    """The last position within what is found where a request could resume, and why there is none behind it."""
    if sequence.namespace.retired and found:
        return 0, Limit.RETIRED
    resumable = min(found, sequence.num_tokens - 1) // tiers.grid_tokens * tiers.grid_tokens
    if resumable == found:
        return resumable, None
    is_on_grid = found % tiers.grid_tokens == 0
    return resumable, Limit.LAST_TOKEN if is_on_grid else Limit.GRID


class _Evictions:
    """What may be said of evictions to those who may see a sequence."""

    def __init__(self, tiers: Tiers, sequence: Sequence, leases: Mapping[int, Lease]):
        self.tiers = tiers
        self.private = sequence.namespace.private
        self.leases = leases

    def find(self, node_id: int, what: int | bytes) -> Eviction | None:
        """A lease that is not named says no more than the step does: the prompt's owner knows which leases it has."""
        eviction = self.tiers.eviction((node_id, what))
        if eviction is None:
            return None
        lease = self.leases.get(eviction.lease)
        is_visible = lease is not None and lease.sequence.namespace.private == self.private
        return eviction if is_visible else eviction._replace(lease=0)


def _whole_node(root: Node, path: list[tuple[Node, int]]) -> Node:
    """The deepest node that agrees to its end: what is missing would hang below it."""
    whole = [node for node, end in path if end == node.end]
    return whole[-1] if whole else root


def _tiers(kinds: Kinds, path: Path):
    """Of a state the span is empty: it is that after so many tokens."""
    for node, end in path:
        for tier in (Tier.DEVICE, Tier.HOST):
            for kind in kinds:
                residency, span = (kind.device, kind.host)[tier], kind.span_of(node, end)
                if node.pages[residency.index] is not None and span is not None:
                    yield kind.name, tier.name, span


def _lost(tiers: Tiers, path: list[tuple[Node, int]], known: _Evictions):
    for node, end in path:
        for residency in tiers.residencies:
            missing = node.pages[residency.index] is None
            eviction = known.find(node.id, residency.index) if missing else None
            if eviction is not None:
                yield Span(node.start, end), eviction


def _other_namespace(tiers: Tiers, sequence: Sequence) -> tuple[tuple[str, str | None, str | None], ...]:
    here, private = sequence.namespace.fields, sequence.namespace.private
    first_page = bytes(sequence.data[: sequence.page_bytes])
    for digest, root in tiers.tree.roots.items():
        other = tiers.tree.namespaces[digest]
        if other.private == private and root is not sequence.root and first_page in root.children:
            there = other.fields
            names = sorted({**here, **there})
            return tuple((n, here.get(n), there.get(n)) for n in names if here.get(n) != there.get(n))
    return ()
