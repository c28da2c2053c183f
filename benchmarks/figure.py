"""What a benchmark has found: a median, its noise, the floor of the same run, and whether the goal is met.

Times alone do not compare: a figure stands beside a floor that was measured in the same run.

ratio = value / floor, turn by turn; noise = distance between the quartiles
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Goal:
    """What is asked of a figure's "value" or "ratio"; relation: "<=" or ">="."""

    of: str
    relation: str
    bound: float

    def __str__(self) -> str:
        return f"{self.of} {self.relation} {self.bound:g}"


@dataclass(frozen=True)
class Figure:
    """floor, ratio and ratio_noise are None where nothing limits the operation. details: what helps to read it."""

    name: str
    meaning: str
    unit: str
    value: float
    noise: float
    floor: float | None = None
    ratio: float | None = None
    ratio_noise: float | None = None
    goal: Goal | None = None
    details: dict[str, float] = field(default_factory=dict)

    @property
    def measured(self) -> float | None:
        """What the goal is about."""
        return self.ratio if self.goal is not None and self.goal.of == "ratio" else self.value

    @property
    def met(self) -> bool | None:
        """None: nothing is asked."""
        goal, measured = self.goal, self.measured
        if goal is None:
            return None
        assert measured is not None, f"{self.name}: a goal of a ratio without a floor"
        return measured <= goal.bound if goal.relation == "<=" else measured >= goal.bound

    def as_json(self) -> dict[str, Any]:
        entry = {"meaning": self.meaning, "unit": self.unit, "value": self.value, "noise": self.noise}
        if self.floor is not None:
            entry |= {"floor": self.floor, "ratio": self.ratio, "ratio_noise": self.ratio_noise}
        if self.goal is not None:
            entry |= {"goal": str(self.goal), "met": self.met}
        return entry | self.details


def figure(
    name: str,
    meaning: str,
    values: Sequence[float],
    floors: Sequence[float] = (),
    *,
    unit: str = "us",
    goal: Goal | None = None,
    details: dict[str, float] | None = None,
) -> Figure:
    """Medians of what was measured; values[i] and floors[i] were measured in the same turn."""
    value, noise = median_and_noise(values)
    if not floors:
        return Figure(name, meaning, unit, value, noise, goal=goal, details=details or {})
    ratio = median_and_noise([value / floor for value, floor in zip(values, floors, strict=True)])
    return Figure(name, meaning, unit, value, noise, statistics.median(floors), *ratio, goal, details or {})


def median_and_noise(values: Sequence[float]) -> tuple[float, float]:
    """(median, distance between the quartiles)."""
    if len(values) < 2:
        return values[0], 0.0
    quartiles = statistics.quantiles(values, n=4)
    return quartiles[1], quartiles[2] - quartiles[0]
