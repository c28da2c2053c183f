"""The first decision that differs between logs which reach back differently far."""

from __future__ import annotations

import pytest

from jaxcache.core.decisions import RECENT_DECISIONS, DecisionLog, Decisions, Difference, first_difference

ADMIT = (3, "admit", 1, 32, 7, 9, 0)
INSERT = (3, "insert", 1, 32, 2, 9, 0)
RELEASE = (4, "release", 1, 0, 0, 0, 0)


def logs(*decisions, since=0) -> dict[int, DecisionLog]:
    return {rank: DecisionLog(since, list(log)) for rank, log in enumerate(decisions)}


def test_equal_logs():
    assert first_difference({}) is None
    assert first_difference(logs([], [])) is None
    assert first_difference(logs([ADMIT, RELEASE], [ADMIT, RELEASE], [ADMIT, RELEASE])) is None


@pytest.mark.parametrize(
    "other", [(3, "admit", 1, 16, 7, 9, 0), (3, "admit", 1, 32, 7, 8, 0), (3, "grow", 1, 32, 7, 9, 0)]
)
def test_one_number_or_name_differs(other):
    found = first_difference(logs([ADMIT, INSERT], [ADMIT, INSERT], [other, INSERT]))
    assert found == Difference(3, 0, {0: ADMIT, 1: ADMIT, 2: other})


def test_a_decision_that_only_some_made():
    assert first_difference(logs([ADMIT, RELEASE], [ADMIT, INSERT, RELEASE])) == Difference(3, 1, {0: None, 1: INSERT})
    assert first_difference(logs([ADMIT], [ADMIT, RELEASE])) == Difference(4, 0, {0: None, 1: RELEASE})
    assert first_difference(logs([], [ADMIT])) == Difference(3, 0, {0: None, 1: ADMIT})


def test_the_first_of_several():
    found = first_difference(
        logs([ADMIT, INSERT, RELEASE], [ADMIT, (3, "insert", 1, 16, 2, 9, 0), (4, "release", 2, 0, 0, 0, 0)])
    )
    assert found is not None
    assert (found.step, found.place) == (3, 1)


def test_only_what_every_log_reaches_back_to_counts():
    whole, cut = DecisionLog(0, [ADMIT, INSERT, RELEASE]), DecisionLog(4, [RELEASE])
    assert first_difference({0: whole, 1: cut}) is None
    assert first_difference({0: cut, 1: DecisionLog(0, [ADMIT])}) == Difference(4, 0, {0: RELEASE, 1: None})


def test_text():
    assert (
        str(Difference(3, 1, {1: None, 0: INSERT}))
        == "decision 1 of step 3: process 0: insert(lease 1, published tokens 32, node 2, "
        "computed tokens 9, sum of states' positions 0); "
        "process 1: none"
    )
    other = (3, "admit", 1, 16, 7, 8, 0)
    assert str(Difference(3, 0, {0: ADMIT, 1: other})).startswith(
        "decision 0 of step 3 (admit: other cached tokens and content checksum): process 0: admit(lease 1, cached "
    )


def test_decisions_say_how_far_back_they_are_complete():
    decisions = Decisions()
    for decisions.step in range(RECENT_DECISIONS):
        decisions.note("release", decisions.step)
        assert decisions.complete_since() == (0 if decisions.step < RECENT_DECISIONS - 1 else 1)
    decisions.step += 1
    decisions.note("release", 0)
    assert decisions.recent[0][0] == 1
    assert decisions.complete_since() == 2
