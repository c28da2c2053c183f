"""The longest prefix at which a request could resume. Read-only: no split, no touch.

Candidates are the ends of the nodes on the path (the last one may be covered in part): residency changes only there,
and a later position never needs more of a window than an earlier one that has it.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxcache.core.kinds import Kinds, Path
from jaxcache.core.node import Node
from jaxcache.core.tiers import Tiers
from jaxcache.core.tokens import Sequence
from jaxcache.types import Match


class Prefix(NamedTuple):
    """node: where num_tokens end, or inside which; the root for none. found_tokens: full attention, usable or not.

    device_tokens: leading tokens that need no load-back
    """

    num_tokens: int
    node: Node
    found_tokens: int
    device_tokens: int


class Matcher:
    """Looks into one tree."""

    def __init__(self, tiers: Tiers, kinds: Kinds):
        self.tiers = tiers
        self.tree = tiers.tree
        self.kinds = kinds
        # Where a node is nothing but full pages on the device, all that is found can be used.
        self._finds_all = not kinds.extras and not tiers.has_host and tiers.config.caching

    def match(self, sequence: Sequence, max_tokens: int | None) -> Match:
        """The public answer; asking again while the tree is the same costs next to nothing."""
        if (
            max_tokens is None
            and sequence.found_version == self.tree.version
            and sequence.match is not None
            and sequence.found_limit == sequence.num_tokens - 1
        ):
            return sequence.match
        if self._finds_all and max_tokens is None and not sequence.namespace.retired:
            _, end = self.tree.find(sequence, sequence.num_tokens - 1)
            sequence.match = Match(end, end, 0, 0, ())
            return sequence.match
        prefix = self.longest(sequence, max_tokens)
        match = self._describe(sequence, prefix)
        if prefix is sequence.prefix:
            sequence.match = match
        return match

    def _describe(self, sequence: Sequence, prefix: Prefix) -> Match:
        num_tokens, _, found, device = prefix
        branch = self.branch(sequence, prefix) if self.kinds.extras else 0
        return Match(num_tokens, device, num_tokens - device, found - num_tokens, (branch,) if branch else ())

    def branch(self, sequence: Sequence, prefix: Prefix) -> int:
        """Where making a window or state would unlock what is found beyond a prefix; 0: nowhere."""
        grid = self.tiers.grid_tokens
        branch = min(prefix.found_tokens, sequence.num_tokens - 1) // grid * grid
        return branch if branch > prefix.num_tokens else 0

    def longest(self, sequence: Sequence, max_tokens: int | None) -> Prefix:
        """The longest n <= max_tokens (and < the sequence) at which every component has what it needs."""
        limit = sequence.num_tokens - 1
        if max_tokens is not None and max_tokens < limit:
            limit = max_tokens
        if sequence.namespace.retired or not self.tiers.config.caching:
            return Prefix(0, sequence.root, 0, 0)
        node, found = self.tree.find(sequence, limit)
        if sequence.prefix is None:
            num_tokens = found
            if self.kinds.extras:
                path = self.tree.walk(sequence, limit)
                ends = self._resumable_ends(path)
                node, num_tokens = path[ends[-1]] if ends else (sequence.root, 0)
            sequence.prefix = self._prefix(num_tokens, node, found)
        return sequence.prefix

    def shorter(self, prefix: Prefix) -> list[Prefix]:
        """Where else a request could resume on the way to a prefix: longest first, in the end nothing at all."""
        path: Path = []
        node, end = prefix.node, prefix.num_tokens
        while node.parent is not None:
            path.append((node, end))
            node = node.parent
            end = node.end
        path.reverse()
        found = prefix.found_tokens
        places = self._resumable_ends(path)[-2::-1]
        return [*(self._prefix(path[i][1], path[i][0], found) for i in places), Prefix(0, node, found, 0)]

    def _resumable_ends(self, path: Path) -> list[int]:
        """Places in the path at whose ends a request could resume, shortest first."""
        places = range(len(path))
        for kind in self.kinds.extras:
            usable = kind.usable(path)
            places = [place for place in places if usable[place]]
        return list(places)

    def _prefix(self, num_tokens: int, node: Node, found_tokens: int) -> Prefix:
        device_tokens = num_tokens
        if self.tiers.has_host:
            device_tokens = self.kinds.full.device_tokens(num_tokens, node, self.kinds.extras)
        return Prefix(num_tokens, node, found_tokens, device_tokens)
