"""Where the decisions of ranks parted: from the bounded logs that their planners keep (`Planner.recent`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

Decision = tuple[int, str, int, int, int]  # step, what, a, b, c


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
        return f"decision {self.place} of step {self.step}: {said}"


def describe(decision: Decision | None) -> str:
    """One decision, for people."""
    if decision is None:
        return "none"
    _, what, *numbers = decision
    return f"{what}({', '.join(map(str, numbers))})"


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
