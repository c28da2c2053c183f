"""A simulation that failed: its error, and the smallest part of its schedule that was found to fail as well."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from jaxcache.testing.simulation import FAILURES, Operation, Report, Settings, Simulation, schedule

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """How a run ended.

    settings:   of the smallest run
    operations: what happened in it from outside
    error:      how it ended, in `step`
    repeats:    False: the same run passed when it was tried again, so it depends on more than its seed
    """

    settings: Settings
    operations: list[Operation]
    step: int
    error: Exception
    repeats: bool = True

    @property
    def where(self) -> str:
        """The line that raised the error."""
        *_, frame = traceback.extract_tb(self.error.__traceback__)
        return f"{frame.filename}:{frame.lineno} in {frame.name}"

    def command(self) -> str:
        """The command line that repeats it; of a whole schedule nothing need be chosen."""
        settings = self.settings
        options = {
            "mesh": ",".join(map(str, settings.mesh)),
            "steps": settings.num_steps,
            "seed": settings.seed,
            "faults": ",".join(settings.faults) or "none",
            "components": ",".join(settings.components),
            "check-every": settings.check_every,
        }
        if len(self.operations) < len(schedule(settings.seed, settings.num_steps)):
            options["only"] = ",".join(str(operation.index) for operation in self.operations) or "none"
        return "python -m jaxcache simulate " + " ".join(f"--{name} {value}" for name, value in options.items())


def simulate(
    settings: Settings,
    operations: Sequence[Operation] | None = None,
    progress: Callable[[int], object] = lambda num_steps: None,
    reduce_seconds: float = 60.0,
) -> Report | Failure:
    """One run; if it fails, so many seconds (or what one run takes) are spent on finding a smaller one that fails.

    operations: of the schedule, if not all of it; progress: told of steps that are done
    """
    if operations is None:
        operations = schedule(settings.seed, settings.num_steps)
    outcome = attempt(settings, operations, progress)
    return reduced(outcome, reduce_seconds) if isinstance(outcome, Failure) else outcome


def attempt(
    settings: Settings, operations: Sequence[Operation], progress: Callable[[int], object] = lambda num_steps: None
) -> Report | Failure:
    """One run. A failure says no more than what had happened until then."""
    simulation = Simulation(settings, operations)
    try:
        return simulation.run(progress)
    except FAILURES as error:
        step = simulation.step
        shorter = replace(settings, num_steps=step + 1)
        return Failure(shorter, [operation for operation in operations if operation.step <= step], step, error)


def reduced(failure: Failure, seconds: float) -> Failure:
    """A smaller one of the same kind, as small as can be found in so many seconds of the wall clock."""
    end = time.monotonic() + seconds
    smallest = failure

    def fails(operations: list[Operation]) -> bool:
        nonlocal smallest
        outcome = attempt(smallest.settings, operations)
        if not isinstance(outcome, Failure) or type(outcome.error) is not type(failure.error):
            return False  # another error is another failure
        smallest = outcome
        return True

    if not fails(failure.operations):  # nothing but the seed should matter
        return replace(failure, repeats=False)
    ddmin(failure.operations, fails, lambda: time.monotonic() < end)
    return smallest


def ddmin(
    elements: Sequence[T], fails: Callable[[list[T]], bool], may_try: Callable[[], bool] = lambda: True
) -> list[T]:
    """Zeller's ddmin: a part of `elements`, in order, that fails; unless `may_try` ended the search, each is needed.

    |---- chunk ----|---- chunk ----|---- chunk ----|     leave one out; if what is left still fails, go on with that,
                                                          else try smaller chunks, down to single elements

    fails: whether a part fails; all elements together do. Nothing at all is tried first
    """
    rest, num_chunks = list(elements), 2
    if rest and may_try() and fails([]):
        return []
    while len(rest) >= 2:
        chunk = -(-len(rest) // num_chunks)
        for start in range(0, len(rest), chunk):
            if not may_try():
                return rest
            smaller = rest[:start] + rest[start + chunk :]
            if fails(smaller):
                rest, num_chunks = smaller, max(num_chunks - 1, 2)
                break
        else:
            if chunk == 1:
                break
            num_chunks = min(2 * num_chunks, len(rest))
    return rest
