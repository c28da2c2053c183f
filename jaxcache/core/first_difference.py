"""Where the decisions of ranks parted: from the bounded logs that their planners keep (`Planner.recent`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

from jaxcache.core.decisions import NUMBERS

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
