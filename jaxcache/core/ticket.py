"""One request's claim on a storage prefetch, which it may share with others that ask for the same."""

from __future__ import annotations

from jaxcache.core.prefetch import Prefetch, PrefetchState
from jaxcache.core.sequence import Sequence


class Ticket:
    """Returned by `prefetch`; give it to `admit`, or to `cancel`.

    sequence:  what it was asked for
    prefetch:  what is being read
    is_wanted: until it was used or cancelled; others may want the same prefetch longer
    is_held:   its admission waits for the prefetch
    """

    __slots__ = ("is_held", "is_wanted", "prefetch", "sequence")

    def __init__(self, sequence: Sequence, prefetch: Prefetch):
        self.sequence = sequence
        self.prefetch = prefetch
        self.is_wanted = True
        self.is_held = False

    @property
    def state(self) -> PrefetchState:
        return self.prefetch.state

    @property
    def done(self) -> bool:
        """Nothing more will come of it."""
        return not self.is_wanted or self.prefetch.is_over

    def __repr__(self) -> str:
        return f"Ticket({'' if self.is_wanted else 'not wanted, '}{self.prefetch})"
