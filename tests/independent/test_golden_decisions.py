"""Equal calls give equal answers and decisions, not only today: the committed checksums of 3,360 runs.

A change that is to change no decision must leave all of them as they are.
"""

from __future__ import annotations

from contextlib import suppress

import pytest

from jaxcache.core.tiers import Tiers
from tests.independent import golden_decisions
from tests.independent.content import Violation
from tests.independent.golden_decisions import ROUNDS, key_of, kinds, run
from tests.independent.setting import EVICTION_POLICIES, MIXTURES

KINDS = list(kinds())
QUICK = 9  # one run of every ninth kind: of each mixture, and of each policy with each way to write


def differing(every: int, rounds: int) -> list[str]:
    """The runs that differ, by name; of each `every`-th kind one, of another round each."""
    golden = golden_decisions.read()
    found = []
    for i, kind in enumerate(KINDS[::every]):
        for number in range(rounds):
            number = (number + i) % ROUNDS
            if run(kind, number).checksum() != golden[key_of(kind)][number]:
                found.append(f"{key_of(kind)} {number}")
    return found


def test_there_is_one_for_every_run():
    golden = golden_decisions.read()
    assert list(golden) == [key_of(kind) for kind in KINDS]
    assert {len(checksums) for checksums in golden.values()} == {ROUNDS}
    assert ROUNDS * len(KINDS) >= 300 * len(MIXTURES)
    quick = KINDS[::QUICK]
    assert {kind.mixture for kind in quick} == set(MIXTURES)
    assert len({(kind.eviction_policy, kind.write_policy) for kind in quick}) == len(EVICTION_POLICIES) * 4


def test_some_runs_decide_as_ever():
    assert not differing(QUICK, 1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_runs_decide_as_ever():
    assert not differing(1, ROUNDS)


@pytest.mark.mutation
def test_another_victim_shows(monkeypatch):
    """One page more than needed leaves, now and then."""
    trim = Tiers.trim

    def trim_less(self, residency, victim, num_pages):
        return trim(self, residency, victim, num_pages + 1)

    monkeypatch.setattr(Tiers, "trim", trim_less)
    with suppress(Violation):  # a tenant's floor is broken: the fuzzer itself has noticed
        assert differing(QUICK, 1)
