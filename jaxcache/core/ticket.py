"""A running storage prefetch and the host pages that belong to it until they are the tree's, or free again."""

from __future__ import annotations

import enum
from collections.abc import Mapping

from jaxcache.core.sequence import Sequence
from jaxcache.core.tiers import Hold
from jaxcache.types import PageIds, Span


class TicketState(enum.Enum):
    QUERY = "asking storage"
    FETCH = "reading"
    DRAIN = "decided, waiting until no rank touches its pages"
    DONE = "done"


class Ticket:
    """Returned by `prefetch`; give it to `admit`, or to `cancel`.

        |---- in the tree ----|---- asked for ----------------------|
        0                   start          agreed_end             end

    matched_end: where the request could resume without it
    bound:       the largest end still possible (shrinks from round to round until all ranks name the same)
    pages:       reserved host pages per component, in the order of the FETCH
    progress:    leading good pages per component, as last agreed
    accepted:    token spans that became the tree's; unresolved_tokens are not yet counted as used or unfulfilled
    """

    __slots__ = (
        "accepted",
        "agreed_end",
        "bound",
        "cancelled",
        "end",
        "holds",
        "id",
        "matched_end",
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
        self.state = TicketState.QUERY
        self.pages = pages
        self.progress: Mapping[str, int] = {}
        self.holds: list[Hold] = []
        self.accepted: list[Span] = []
        self.unresolved_tokens = 0
        self.cancelled = False

    @property
    def done(self) -> bool:
        """Nothing more will come of it."""
        return self.state in (TicketState.DRAIN, TicketState.DONE)

    def __repr__(self) -> str:
        return f"Ticket({self.id}, {self.state.name}, [{self.start}, {self.end}), agreed {self.agreed_end})"
