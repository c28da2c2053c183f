"""What one model step of one request reads and writes, as contents of pages: the same on every rank."""

from __future__ import annotations

from typing import NamedTuple

from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.core.sequence import Sequence
from jaxcache.testing.page_content import content, contents


class ModelStep(NamedTuple):
    """Of the tokens [begin, end).

    reads, writes:             (component, number of the first page, contents); pages before `first` are not touched
    state_before, state_after: contents of the recurrent state; None: there is none
    """

    begin: int
    end: int
    reads: list[tuple[int, int, list[bytes]]]
    writes: list[tuple[int, int, list[bytes]]]
    state_before: bytes | None
    state_after: bytes | None


def model_step(core: PrefixCache, sequence: Sequence, begin: int, end: int) -> ModelStep:
    """Reads all that resuming at `begin` requires."""
    tiers, page = core.tiers, core.config.page_tokens
    reads, writes = [], []
    state_before = state_after = None
    for c in range(len(core.components)):
        if c == tiers.point:
            state_before = content(c, sequence, begin) if begin else None
            state_after = content(c, sequence, end)
            continue
        first = tiers.required_start(c, begin) // page
        reads.append((c, first, contents(c, sequence, first, -(-begin // page), begin)))
        writes.append((c, begin // page, contents(c, sequence, begin // page, -(-end // page), end)))
    return ModelStep(begin, end, reads, writes, state_before, state_after)
