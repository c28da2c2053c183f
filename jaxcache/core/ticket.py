"""One request's claim on a storage prefetch, which it may share with others that ask for the same."""

from __future__ import annotations

from jaxcache.core.prefetch import Prefetch, PrefetchState
from jaxcache.core.sequence import Sequence


class Ticket:
    """Returned by `prefetch`; give it to `admit`, or to `cancel`.

    prefetch:  what is being read
    cancelled: this request wants no more of it; others may
    """

    __slots__ = ("cancelled", "prefetch", "sequence")

    def __init__(self, sequence: Sequence, prefetch: Prefetch):
        self.sequence = sequence
        self.prefetch = prefetch
        self.cancelled = False

    @property
    def state(self) -> PrefetchState:
        return self.prefetch.state

    @property
    def done(self) -> bool:
        """Nothing more will come of it."""
        return self.cancelled or self.prefetch.is_over

    def __repr__(self) -> str:
        return f"Ticket({'cancelled, ' if self.cancelled else ''}{self.prefetch})"
