"""The longest prefix at which a request could resume. Read-only: no split, no touch.

Candidates are the ends of the nodes on the path (the last one may be covered in part): residency changes only there,
and a later position never needs more of a window than an earlier one that has it.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxcache.core.radix_tree import FULL, Node
from jaxcache.core.sequence import Sequence
from jaxcache.core.tiers import SPINE, Tiers
from jaxcache.types import Match


class Prefix(NamedTuple):
    """path: (node, end of what is used of it) up to num_tokens; found_tokens: full attention found, usable or not.

    device_tokens: leading tokens that need no load-back
    """

    num_tokens: int
    path: list[tuple[Node, int]]
    found_tokens: int
    device_tokens: int


NOTHING = Prefix(0, [], 0, 0)


def match(tiers: Tiers, sequence: Sequence, max_tokens: int | None) -> Match:
    """The public answer; asking again while the tree is the same costs next to nothing."""
    if tiers.only_full and max_tokens is None and tiers.config.caching and not sequence.namespace.retired:
        _, end = tiers.tree.find(sequence, sequence.num_tokens - 1)
        if sequence.match is None:
            sequence.match = Match(end, end, 0, 0, ())
        return sequence.match
    prefix = longest_prefix(tiers, sequence, max_tokens)
    if prefix is not sequence.prefix:
        return describe(tiers, sequence, prefix)
    if sequence.match is None:
        sequence.match = describe(tiers, sequence, prefix)
    return sequence.match


def longest_prefix(tiers: Tiers, sequence: Sequence, max_tokens: int | None) -> Prefix:
    """The longest n <= max_tokens (and < the sequence) at which every component's required(n) is resident."""
    limit = sequence.num_tokens - 1
    if max_tokens is not None and max_tokens < limit:
        limit = max_tokens
    if sequence.namespace.retired or not tiers.config.caching:
        return NOTHING
    tiers.tree.find(sequence, limit)
    if sequence.prefix is not None:
        return sequence.prefix
    path = tiers.tree.walk(sequence, limit)
    num_tokens = found = path[-1][1] if path else 0
    if tiers.partial:
        ends = resumable_ends(tiers, path)
        place, num_tokens = ends[-1] if ends else (-1, 0)
        path = path[: place + 1]
    device_tokens = _device_tokens(tiers, num_tokens, path) if tiers.has_host else num_tokens
    sequence.prefix = Prefix(num_tokens, path, found, device_tokens)
    return sequence.prefix


def resumable_ends(tiers: Tiers, path: list[tuple[Node, int]]) -> list[tuple[int, int]]:
    """(place in the path, tokens) of every end on the path at which a request could resume, shortest first."""
    if not tiers.partial:
        return [(place, end) for place, (_, end) in enumerate(path)]
    run_start = [0] * len(tiers.components)  # where the unbroken run of window pages that reaches this end begins
    ends = []
    for place, (node, end) in enumerate(path):
        usable = True
        for c in tiers.suffixes:
            if not tiers.resident(c, node):
                run_start[c] = end
            if run_start[c] > tiers.required_start(c, end):
                usable = False
        point = tiers.point
        if point is not None and (end != node.end or end % tiers.grid_tokens or not tiers.resident(point, node)):
            usable = False
        if usable:
            ends.append((place, end))
    return ends


def describe(tiers: Tiers, sequence: Sequence, prefix: Prefix) -> Match:
    num_tokens, _, found, device = prefix
    branches = ()
    if tiers.partial:
        branch = min(found, sequence.num_tokens - 1) // tiers.grid_tokens * tiers.grid_tokens
        branches = (branch,) if branch > num_tokens else ()
    return Match(num_tokens, device, num_tokens - device, found - num_tokens, branches)


def make_prefix(tiers: Tiers, num_tokens: int, path: list[tuple[Node, int]], found_tokens: int) -> Prefix:
    return Prefix(num_tokens, path, found_tokens, _device_tokens(tiers, num_tokens, path))


def _device_tokens(tiers: Tiers, num_tokens: int, path: list[tuple[Node, int]]) -> int:
    """Leading tokens of a prefix whose full attention is on the device. With a spine, which is, all or none."""
    if not tiers.has_host:
        return num_tokens
    if tiers.components[FULL] is SPINE:
        return num_tokens if all(_is_on_device(tiers, c, num_tokens, path) for c in tiers.partial) else 0
    device = 0
    for node, end in path:
        if node.pages[FULL] is None:
            break
        device = end
    return device


def _is_on_device(tiers: Tiers, c: int, num_tokens: int, path: list[tuple[Node, int]]) -> bool:
    """Whether a window or state that resuming at `num_tokens` needs is."""
    low = num_tokens - 1 if c == tiers.point else tiers.required_start(c, num_tokens)
    return all(end <= low or node.pages[c] is not None for node, end in path)
