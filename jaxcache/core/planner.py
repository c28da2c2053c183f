"""What the core has decided: the transfers that the runtime must now do, and a digest of all decisions.

Transfer ids are consecutive and equal on every rank. The digest is made of ints only, so it does not depend on
PYTHONHASHSEED; equal sequences of calls and agreed outcomes give equal digests.
"""

from __future__ import annotations

from collections import defaultdict, deque

from jaxcache.core.decisions import CODES
from jaxcache.types import Move, Plan, Transfer, TransferKind

Counters = defaultdict[str, int]  # what happened, by name, from zero
NOTHING_TO_DO = Plan(())
RECENT_DECISIONS = 4096  # more than two steps make


class Planner:
    """step: counts `commit`s. recent: the last notes, for the report when ranks diverge."""

    def __init__(self):
        self.step = 0
        self.transfers: list[Transfer] = []
        self.recent: deque[tuple] = deque(maxlen=RECENT_DECISIONS)
        self._last_id = 0
        self._hash = 0

    @property
    def digest(self) -> int:
        """64 bits that are equal on ranks which decided the same."""
        return self._hash & (2**64 - 1)

    def note(self, what: str, a: int = 0, b: int = 0, c: int = 0, d: int = 0, e: int = 0) -> None:
        """One decision, of a kind in `decisions.NUMBERS`. Only ints enter the digest."""
        self._hash = hash((self._hash, CODES[what], a, b, c, d, e))
        self.recent.append((self.step, what, a, b, c, d, e))

    def complete_since(self) -> int:
        """The first step of which every decision is still in `recent`."""
        return self.recent[0][0] + 1 if len(self.recent) == RECENT_DECISIONS else 0

    def add(self, kind: TransferKind, moves: tuple[Move, ...]) -> int:
        self._last_id += 1
        self.transfers.append(Transfer(self._last_id, kind, self.step, moves))
        self.note(kind.name, self._last_id, sum(len(m.src_page_ids) for m in moves), len(moves))
        return self._last_id

    def take(self) -> Plan:
        if not self.transfers:
            return NOTHING_TO_DO
        plan = Plan(tuple(self.transfers))
        self.transfers.clear()
        return plan
