"""What storage is being asked for, the host pages reserved for it, and the claims of the requests that want it.

prefetch --QUERY--> agreed end --FETCH--> agreed outcome --> DRAIN -- quiet on all ranks --> DONE
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from jaxcache.core.tokens import Sequence
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
    num_waiting_admits: of those, whose admissions wait for it
    waited_for_since_ms: since when, by the agreed clock; None: not known
    """

    __slots__ = (
        "accepted",
        "agreed_end",
        "bound",
        "cancelled",
        "end",
        "id",
        "matched_end",
        "num_waiting_admits",
        "num_wanting",
        "pages",
        "progress",
        "sequence",
        "start",
        "state",
        "unresolved_tokens",
        "waited_for_since_ms",
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
        self.accepted: list[Span] = []
        self.unresolved_tokens = 0
        self.num_wanting = self.num_waiting_admits = 0
        self.cancelled = False
        self.waited_for_since_ms: int | None = None

    @property
    def is_over(self) -> bool:
        """Nothing more will come of it."""
        return self.cancelled or self.state in (PrefetchState.DRAIN, PrefetchState.DONE)

    def __repr__(self) -> str:
        return f"Prefetch({self.id}, {self.state.name}, [{self.start}, {self.end}), agreed {self.agreed_end})"


class Ticket:
    """One request's claim on a prefetch, which it may share. Give it to `admit`, or to `cancel`.

    sequence:  what it was asked for
    prefetch:  what is being read
    is_wanted: until it was used or cancelled; others may want the same prefetch longer
    is_waited_for:   its admission waits for the prefetch
    """

    __slots__ = ("is_waited_for", "is_wanted", "prefetch", "sequence")

    def __init__(self, sequence: Sequence, prefetch: Prefetch):
        self.sequence = sequence
        self.prefetch = prefetch
        self.is_wanted = True
        self.is_waited_for = False

    @property
    def state(self) -> PrefetchState:
        return self.prefetch.state

    @property
    def done(self) -> bool:
        """Nothing more will come of it."""
        return not self.is_wanted or self.prefetch.is_over

    def __repr__(self) -> str:
        return f"Ticket({'' if self.is_wanted else 'not wanted, '}{self.prefetch})"
