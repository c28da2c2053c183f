"""What storage is being asked for, on behalf of one or more requests, and the host pages reserved for it.

prefetch --QUERY--> agreed end --FETCH--> agreed outcome --> DRAIN -- quiet on all ranks --> DONE
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from jaxcache.core.sequence import Sequence
from jaxcache.core.tiers import Hold
from jaxcache.types import PageIds, Span


class PrefetchState(enum.Enum):
    QUERY = "asking storage"
    FETCH = "reading"
    DRAIN = "decided, waiting until no rank touches its pages"
    DONE = "done"


class Prefetch:
    """Its pages belong to it until they are the tree's, or free again.

        |---- in the tree ----|---- asked for ----------------------|
        0                   start          agreed_end             end

    id:          of its QUERY, then of its FETCH
    sequence:    of the request that asked first
    matched_end: where that request could resume without it
    bound:       the largest end still possible (shrinks from round to round until all ranks name the same)
    pages:       reserved host pages per component, in the order of the FETCH
    progress:    leading good pages per component, as last agreed
    accepted:    token spans that became the tree's; unresolved_tokens are not yet counted as used or unfulfilled
    num_wanting: requests whose tickets stand for it; without any it is cancelled
    is_held, held_since_ms: whether an admission waits for it; from when, by the agreed clock (None: not known yet)
    """

    __slots__ = (
        "accepted",
        "agreed_end",
        "bound",
        "cancelled",
        "end",
        "held_since_ms",
        "holds",
        "id",
        "is_held",
        "matched_end",
        "num_wanting",
        "pages",
        "progress",
        "sequence",
        "start",
        "state",
        "unresolved_tokens",
    )

    def __init__(self, sequence: Sequence, matched_end: int, start: int, end: int, pages: list[PageIds]):
        self.id = 0
        self.sequence = sequence
        self.matched_end = matched_end
        self.start = start
        self.end = end
        self.bound = end
        self.agreed_end = 0
        self.state = PrefetchState.QUERY
        self.pages = pages
        self.progress: Mapping[str, int] = {}
        self.holds: list[Hold] = []
        self.accepted: list[Span] = []
        self.unresolved_tokens = 0
        self.num_wanting = 0
        self.cancelled = False
        self.is_held = False
        self.held_since_ms: int | None = None

    @property
    def is_over(self) -> bool:
        """Nothing more will come of it."""
        return self.cancelled or self.state in (PrefetchState.DRAIN, PrefetchState.DONE)

    def __repr__(self) -> str:
        return f"Prefetch({self.id}, {self.state.name}, [{self.start}, {self.end}), agreed {self.agreed_end})"
