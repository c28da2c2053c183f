"""Why a prompt missed: what of it is where, where it first differs, and when and why what is missing left.

The answer is for those who may see the prompt. So it says nothing of namespaces whose private fields differ from those
of the prompt's: neither their fields, nor whether they hold a page, nor what their leases did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxcache.core.lease import Lease
from jaxcache.core.matching import longest_prefix
from jaxcache.core.radix_tree import Node
from jaxcache.core.sequence import Sequence
from jaxcache.core.tiers import Eviction, Tiers
from jaxcache.types import Span


@dataclass(frozen=True)
class Explanation:
    """What a cache knows of a prompt.

    num_tokens:      of the prompt
    usable_tokens:   where a request could resume
    found_tokens:    leading tokens of which the cache holds at least full attention
    first_miss_page: the first page that is not there, or None if all whole pages are
    tiers:           (component, tier, span): where the found pages are
    eviction:        when and why the first missing page left; None if it was never there, or left long ago. Its lease
                     is named while it runs, if its namespace has the private fields of the prompt's; else it is 0
    lost:            the same for windows and states that are missing within the found tokens
    other_namespace: public fields that differ from a namespace with the same private fields in which the prompt's first
                     page is cached: (name, here, there)
    """

    num_tokens: int
    usable_tokens: int
    found_tokens: int
    first_miss_page: int | None
    tiers: tuple[tuple[str, str, Span], ...]
    eviction: Eviction | None
    lost: tuple[tuple[Span, Eviction], ...]
    other_namespace: tuple[tuple[str, str | None, str | None], ...]

    def __str__(self) -> str:
        lines = [f"{self.usable_tokens} of {self.num_tokens} tokens can be used; {self.found_tokens} are found."]
        lines += [f"  tokens [{span.start}, {span.stop}): {name} on {tier}" for name, tier, span in self.tiers]
        if self.first_miss_page is not None:
            lines.append(f"The first page that is not there: {self.first_miss_page}. {self._why()}")
        for span, eviction in self.lost:
            lines.append(f"  tokens [{span.start}, {span.stop}): {_sentence(eviction)}")
        return "\n".join(lines)

    def _why(self) -> str:
        if self.eviction is not None:
            return _sentence(self.eviction)
        if self.other_namespace:
            parts = [f"{name} is {here!r} here and {there!r} there" for name, here, there in self.other_namespace]
            return f"It is cached in another namespace: {'; '.join(parts)}."
        return "It was never computed here, or left long ago."


def _sentence(eviction: Eviction) -> str:
    return (
        f"{eviction.component} left {eviction.tier.name} in step {eviction.step}: {eviction.reason}"
        + (f" for lease {eviction.lease}" if eviction.lease else "")
        + "."
    )


def explain(tiers: Tiers, sequence: Sequence, leases: Mapping[int, Lease]) -> Explanation:
    """Looks without touching anything. leases: those that run."""
    known = _Evictions(tiers, sequence, leases)
    prefix = longest_prefix(tiers, sequence, sequence.num_tokens)
    path = tiers.tree.walk(sequence, sequence.num_tokens)
    found = path[-1][1] if path else 0
    page = tiers.page_tokens
    missing = found + page <= sequence.num_tokens
    first_page = bytes(sequence.data[found * 4 : (found + page) * 4])
    node = _whole_node(sequence.root, path)
    return Explanation(
        sequence.num_tokens,
        prefix.num_tokens,
        found,
        found // page if missing else None,
        tuple(_tiers(tiers, path)),
        known.find(node.id, first_page) if missing else None,
        tuple(_lost(tiers, path, known)),
        _other_namespace(tiers, sequence) if missing and not found else (),
    )


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


def _tiers(tiers: Tiers, path: list[tuple[Node, int]]):
    for node, end in path:
        for residency in tiers.residencies:
            if node.pages[residency.index] is not None:
                yield residency.component.name, residency.tier.name, Span(node.start, end)


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
