"""Every planted defect is found by the second fuzzer, within a bounded number of runs of fixed seeds."""

from __future__ import annotations

import pytest

from tests.independent.fuzzer import Fuzzer
from tests.independent.mutants import MUTANTS, Mutant

CALLS_PER_RUN = 2500


def runs_until_found(num_runs: int) -> int | None:
    """The first run in which something is wrong, if any. What finds it may be the oracle, or the core's own asserts; a
    mutant that does not fit the code any more is found by neither."""
    for seed in range(num_runs):
        try:
            Fuzzer(seed).run(CALLS_PER_RUN)
        except (AttributeError, NameError, TypeError):
            raise
        except Exception:
            return seed
    return None


def params() -> list:
    """Those that take long to find are slow tests."""
    return [pytest.param(m, id=m.name, marks=[pytest.mark.slow] if m.is_rare else []) for m in MUTANTS]


@pytest.mark.mutation
@pytest.mark.parametrize("mutant", params())
def test_mutant_is_found(mutant: Mutant, monkeypatch: pytest.MonkeyPatch):
    mutant.plant(monkeypatch)
    assert runs_until_found(mutant.num_runs) is not None, f"{mutant.name}: alive after {mutant.num_runs} runs"


def test_mutants_are_enough():
    names = {mutant.name for mutant in MUTANTS}
    assert len(names) == len(MUTANTS) >= 12
