"""What happens to a simulated serving loop from outside, written down before it runs: a list of operations.

Each has a seed of its own, so that a run with some of them left out is the same where the rest is the same.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxcache.testing.mixing import mix

RATES = {  # how many of 1,000 steps have one
    "arrive": 245,
    "arrive_twice": 6,
    "give_up": 4,
    "abort": 8,
    "retract": 8,
    "cancel": 12,
    "reset": 2,
    "forget_device": 2,
    "detach": 2,
    "attach": 40,
    "retire": 2,
    "change_policy": 6,
    "clear_storage": 2,
}
PER_STEPS = 1000


class Operation(NamedTuple):
    """Number `index` of the whole schedule: in `step`, what `kind` says, with all its chances from `seed`."""

    index: int
    step: int
    kind: str
    seed: int


def schedule(seed: int, num_steps: int) -> list[Operation]:
    """Of all steps, in order. One of fewer steps is the beginning of one of more."""
    operations: list[Operation] = []
    for step in range(num_steps):
        for number, (kind, rate) in enumerate(RATES.items()):
            chance = mix(seed, step, number)
            if chance % PER_STEPS < rate:
                operations.append(Operation(len(operations), step, kind, chance // PER_STEPS))
    return operations
