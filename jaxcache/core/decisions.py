"""What the core has decided: the last decisions, and a digest of all.

The digest is made of ints only, so it does not depend on PYTHONHASHSEED; equal sequences of calls and agreed outcomes
give equal digests.

Every call that changes the core notes a decision, but for a `grow` that needs no page, whose tokens are noted when they
come: who, how much, and, where content comes in (a namespace, a prompt, generated tokens), a checksum of it, so that
ranks which were given different content differ in the digest of the same step, and the log says where.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

checksum: Callable[..., int] = xxh3_64_intdigest  # of bytes; against accidents, not against attackers

_TRANSFER = ("transfer", "pages", "moves")
# name: what its numbers say, at most five. The place in this table is what enters the digest.
NUMBERS: dict[str, tuple[str, ...]] = {
    "namespace": ("namespace checksum", "node"),
    "retire": ("namespace checksum", "namespaces left"),
    "admit": ("lease", "cached tokens", "namespace checksum", "content checksum", "new tokens"),
    "grow": ("lease", "computed tokens", "new tokens"),
    "extend": ("lease", "tokens", "checksum of the new tokens"),
    "extend_all": ("sequences", "checksum of their leases", "checksum of the new tokens"),
    "insert": ("lease", "published tokens", "node", "computed tokens", "sum of states' positions"),
    "options": ("lease", "priority", "retained steps"),
    "duplicates": ("lease", "pages given back"),
    "release": ("lease",),
    "prefetch": ("transfer", "end", "namespace checksum", "content checksum"),
    "leave": ("transfer", "tickets left"),
    "stored": ("transfer",),
    "fetched": ("transfer", "agreed end", "pages left"),
    "cancel": ("transfer",),
    "quiet": ("transfer",),
    "reset": (),
    "forget_device": (),
    "attach": ("checksum of the kind",),
    "detach": (),
    "cleared": (),
    "policies": ("prefetch policy", "write policy"),
    "restore": ("nodes", "checksum of the snapshot"),
    "BACKUP": _TRANSFER,
    "LOAD_BACK": _TRANSFER,
    "STORE": _TRANSFER,
    "QUERY": _TRANSFER,
    "FETCH": _TRANSFER,
}
CODES = {name: code for code, name in enumerate(NUMBERS)}

Counters = defaultdict[str, int]  # what happened, by name, from zero
RECENT_DECISIONS = 4096  # more than two steps make


class Decisions:
    """Of one rank. step: counts `commit`s. recent: the last ones, for the report when ranks diverge."""

    def __init__(self):
        self.step = 0
        self.recent: deque[tuple] = deque(maxlen=RECENT_DECISIONS)
        self._hash = 0

    @property
    def digest(self) -> int:
        """64 bits that are equal on ranks which decided the same."""
        return self._hash & (2**64 - 1)

    def note(self, what: str, a: int = 0, b: int = 0, c: int = 0, d: int = 0, e: int = 0) -> None:
        """One decision, of a kind in `NUMBERS`. Only ints enter the digest."""
        self._hash = hash((self._hash, CODES[what], a, b, c, d, e))
        self.recent.append((self.step, what, a, b, c, d, e))

    def complete_since(self) -> int:
        """The first step of which every decision is still in `recent`."""
        return self.recent[0][0] + 1 if len(self.recent) == RECENT_DECISIONS else 0


# ---- where ranks part

Decision = tuple[int, str, int, int, int, int, int]  # step, what, and the numbers of `decisions.NUMBERS`


class DecisionLog(NamedTuple):
    """Decisions in order; every one that was made in step `since` or later is there."""

    since: int
    decisions: Sequence[Decision]


class Difference(NamedTuple):
    """The first decision of `step`, counted from 0, that is not the same everywhere; None: there is none here."""

    step: int
    place: int
    decisions: Mapping[int, Decision | None]

    def __str__(self) -> str:
        said = "; ".join(f"process {rank}: {describe(d)}" for rank, d in sorted(self.decisions.items()))
        return f"decision {self.place} of step {self.step}{self._what_differs()}: {said}"

    def _what_differs(self) -> str:
        """Of decisions of one kind: which of their numbers."""
        decisions = [decision for decision in self.decisions.values() if decision is not None]
        kinds = {decision[1]: None for decision in decisions}
        if len(decisions) < len(self.decisions) or len(kinds) != 1:
            return ""
        what = decisions[0][1]
        columns = list(zip(*(decision[2:] for decision in decisions), strict=True))
        names = [name for name, column in zip(NUMBERS.get(what, ()), columns, strict=False) if len(set(column)) > 1]
        return f" ({what}: other {' and '.join(names)})"


def describe(decision: Decision | None) -> str:
    """One decision, for people."""
    if decision is None:
        return "none"
    _, what, *numbers = decision
    named = zip(NUMBERS.get(what, ()), numbers, strict=False)
    return f"{what}({', '.join(f'{name} {_text(name, number)}' for name, number in named)})"


def _text(name: str, number: int) -> str:
    """Of a checksum only the end, which shows that it differs: the whole would confirm a guessed salt or prompt."""
    return f"..{number & 0xFFFF:04x}" if "checksum" in name else str(number)


def first_difference(logs: Mapping[int, DecisionLog]) -> Difference | None:
    """By rank; None if all are the same as far as every log reaches back."""
    since = max((log.since for log in logs.values()), default=0)
    known = {rank: [d for d in log.decisions if d[0] >= since] for rank, log in logs.items()}
    for row in zip_longest(*known.values()):
        if any(decision != row[0] for decision in row):
            return _difference(known, min(decision[0] for decision in row if decision is not None))
    return None


def _difference(known: Mapping[int, Sequence[Decision]], step: int) -> Difference:
    """Of logs that are equal up to `step`, and differ in it."""
    in_step = {rank: [d for d in decisions if d[0] == step] for rank, decisions in known.items()}
    place = next(i for i, row in enumerate(zip_longest(*in_step.values())) if any(d != row[0] for d in row))
    at = {rank: decisions[place] if place < len(decisions) else None for rank, decisions in in_step.items()}
    return Difference(step, place, at)
