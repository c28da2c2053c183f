"""The longest prefix at which a request could resume. Read-only: no split, no touch.

Candidates are the ends of the nodes on the path (the last one may be covered in part): residency changes only there,
and a later position never needs more of a window than an earlier one that has it.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxcache.core.radix_tree import Node
from jaxcache.core.sequence import Sequence
from jaxcache.core.tiers import Tiers
from jaxcache.types import Match


class Prefix(NamedTuple):
    """path: (node, end of what is used of it) up to num_tokens; found_tokens: full attention found, usable or not."""

    num_tokens: int
    path: list[tuple[Node, int]]
    found_tokens: int


NOTHING = Prefix(0, [], 0)


def longest_prefix(tiers: Tiers, sequence: Sequence, max_tokens: int | None) -> Prefix:
    """The longest n <= max_tokens (and < the sequence) at which every component's required(n) is resident."""
    limit = sequence.num_tokens - 1
    if max_tokens is not None and max_tokens < limit:
        limit = max_tokens
    cached = sequence.match_cache
    if cached is not None and cached[0] == tiers.tree.version and cached[1] == limit:
        return cached[2]
    if sequence.root.parent is not None or sequence.namespace.retired or not tiers.config.caching:
        return NOTHING
    path = tiers.tree.walk(sequence, limit)
    ends = resumable_ends(tiers, path)
    found = path[-1][1] if path else 0
    if ends:
        prefix = Prefix(ends[-1][1], path[: ends[-1][0] + 1], found)
    else:
        prefix = Prefix(0, [], found)
    sequence.match_cache = (tiers.tree.version, limit, prefix)
    return prefix


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
    """The public answer."""
    num_tokens, path, found = prefix
    device = device_tokens(tiers, prefix)
    grid = tiers.grid_tokens
    branch = min(found, sequence.num_tokens - 1) // grid * grid
    branches = (branch,) if tiers.partial and branch > num_tokens else ()
    return Match(num_tokens, device, num_tokens - device, max(0, found - num_tokens), branches)


def device_tokens(tiers: Tiers, prefix: Prefix) -> int:
    """Leading tokens of a prefix that need no load-back (without full attention: all or nothing)."""
    if tiers.full is None:
        return prefix.num_tokens if not any(missing_on_device(tiers, prefix)) else 0
    device = 0
    for node, end in prefix.path:
        if node.pages[tiers.full] is None:
            break
        device = end
    return device


def missing_on_device(tiers: Tiers, prefix: Prefix) -> list[list[Node]]:
    """Per component, the nodes of the path that resuming needs and that are only in host memory, top first."""
    missing = []
    for c in range(len(tiers.components)):
        low = tiers.required_start(c, prefix.num_tokens)
        if c == tiers.point:
            low = prefix.num_tokens - 1
        missing.append([node for node, end in prefix.path if end > low and node.pages[c] is None])
    return missing
