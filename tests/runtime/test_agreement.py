"""What ranks agree on: packing, and two reductions that must give the same."""

import numpy as np
import pytest

from jaxcache.agreement import collective as collective_module
from jaxcache.agreement.collective import CollectiveReduction, agreement_on, collective
from jaxcache.agreement.lanes import FIRST_SLOT, ID, NEUTRAL, AgreedReport, Lanes
from jaxcache.agreement.reduction import LocalReduction, reduce_rows
from jaxcache.types import Outcome, RanksDiverged, TransferFault

MESHES = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2), (1, 1, 4)]
LANES = Lanes(("full", "window", "state"), 3)
OUTCOMES = {
    7: Outcome(False, False, {"full": 5, "window": 2, "state": 0}),
    9: Outcome(True, True, {"full": 0, "window": 0, "state": 0}, 64, 64),
}


def said(digest, outcomes, clock_ms=0, ok=True, step=5):
    return LANES.pack(step, digest, outcomes, clock_ms, ok)


def agree_of(*packed, mesh_shape=None):
    """Every row reduced as ranks of cp."""
    rows = np.stack([own.row for own in packed])
    return reduce_rows(rows, mesh_shape or {"cp": len(rows), "tp": 1, "pp": 1}, LANES.num_unanimous).tobytes()


def random_rows(rng, num_ranks, num_lanes=40):
    return rng.integers(-(2**31), 2**31, (num_ranks, num_lanes)).astype(np.int32)


def test_one_rank_gets_back_what_it_said():
    own = said(123, OUTCOMES, 4567)
    assert LANES.unpack(agree_of(own), own) == AgreedReport(5, OUTCOMES, 4567)


@pytest.mark.parametrize("which", [0, 1])
def test_outcomes_are_minima_and_queries_both_ends(which):
    other = {7: Outcome(True, True, {"full": 3, "window": 4}), 9: Outcome(True, False, {}, 128, 128)}
    both = said(1, OUTCOMES), said(1, other)
    assert LANES.unpack(agree_of(*both), both[which]).outcomes == {
        7: Outcome(False, False, {"full": 3, "window": 2, "state": 0}),
        9: Outcome(True, False, {"full": 0, "window": 0, "state": 0}, 64, 128),
    }


@pytest.mark.parametrize("lane", range(ID + 2, LANES.slot_lanes))
@pytest.mark.parametrize("slot", range(3))
def test_every_lane_counts(slot, lane):
    """One rank alone says less, in one lane of one of three transfers: that one changes, and no other."""
    outcomes = {id: Outcome(True, True, dict.fromkeys(LANES.components, 5), 64, 64) for id in (3, 5, 8)}
    own = said(1, outcomes)
    row = own.row.copy()
    row[FIRST_SLOT + slot * LANES.slot_lanes + lane] -= 1
    agreed = LANES.unpack(row.tobytes(), own).outcomes
    assert [id for id in outcomes if agreed[id] != outcomes[id]] == [(3, 5, 8)[slot]]


@pytest.mark.parametrize("digest", [0, 1, 2**31, 2**32, 2**63, 2**64 - 1])
def test_digests(digest):
    own, other = said(digest, {}), said(digest ^ (1 << 40), {})
    assert LANES.unpack(agree_of(own, own), own).outcomes == {}
    for rank in (own, other):
        with pytest.raises(RanksDiverged, match=f"step=5.*{rank.digest:#018x}"):
            LANES.unpack(agree_of(own, other), rank)


@pytest.mark.parametrize("others", [{}, {7: OUTCOMES[7]}, {8: OUTCOMES[7], 9: OUTCOMES[9]}, {9: OUTCOMES[9]}])
def test_different_live_transfers_are_a_divergence(others):
    own, other = said(1, OUTCOMES), said(1, others)
    for rank in (own, other):
        with pytest.raises(RanksDiverged, match=rf"step=5.*\[{', '.join(map(str, rank.outcomes))}\]"):
            LANES.unpack(agree_of(own, other), rank)


def test_a_fault_anywhere_is_a_fault_everywhere():
    own, other = said(1, {}), said(1, {}, ok=False)
    for rank in (own, other):
        with pytest.raises(TransferFault, match="step=5"):
            LANES.unpack(agree_of(own, other), rank)


def test_a_fault_of_all_is_one():
    own = said(1, OUTCOMES, ok=False)
    with pytest.raises(TransferFault, match="step=5"):
        LANES.unpack(agree_of(own), own)


def test_large_ids_and_absent_slots_never_collide():
    row = said(1, {2**31 - 1: OUTCOMES[7], 2**40: OUTCOMES[7]}).row
    ids = row[FIRST_SLOT : LANES.num_unanimous : LANES.slot_lanes]
    assert NEUTRAL not in ids[:2].tolist() and ids[2] == NEUTRAL


@pytest.mark.parametrize("shape", MESHES)
def test_the_collective_is_the_definition_on_every_rank(make_mesh, rng, shape):
    mesh = make_mesh(*shape)
    program = collective(mesh, 30)
    for _ in range(5):
        rows = random_rows(rng, mesh.size)
        expected = reduce_rows(rows, dict(mesh.shape), 30)
        np.testing.assert_array_equal(np.asarray(program(rows)), np.broadcast_to(expected, rows.shape))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_all_forms_agree(make_mesh, rng, shape):
    mesh = make_mesh(*shape)
    forms = [form(mesh, 30) for form in (LocalReduction, CollectiveReduction, CollectiveReduction)]
    forms[-1]._view = np.asarray  # as on GPUs
    rows = random_rows(rng, mesh.size)
    for form in forms:
        form.start(rows)
    expected = reduce_rows(rows, dict(mesh.shape), 30).tobytes()
    assert [form.finish(60.0) for form in forms] == [expected] * 3


def forwards_nothing(value, num_stages):
    return value


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("ALL_AXES", ("cp", "pp")),
        ("ALL_AXES", ("tp", "pp")),
        ("ALL_AXES", ("cp", "tp")),
        ("ATTENTION_AXES", ("cp",)),
        ("ATTENTION_AXES", ("tp",)),
        ("_from_stage_0", forwards_nothing),
    ],
)
def test_every_axis_matters(make_mesh, rng, monkeypatch, name, mutant):
    mesh = make_mesh(2, 2, 2)
    rows = random_rows(rng, mesh.size)
    monkeypatch.setattr(collective_module, name, mutant)
    reduced = np.asarray(collective.__wrapped__(mesh, 30)(rows))
    assert not np.array_equal(reduced, np.broadcast_to(reduce_rows(rows, dict(mesh.shape), 30), rows.shape))


@pytest.mark.parametrize("form", [None, CollectiveReduction])
def test_issue_and_read(make_mesh, form):
    agreement = agreement_on(make_mesh(2, 2, 2), ("full", "window", "state"), 3, form)
    assert agreement.read(60.0) is None
    agreement.issue(4, 99, OUTCOMES, 1234, True)
    with pytest.raises(AssertionError, match="has not been read"):
        agreement.issue(5, 99, OUTCOMES, 1235, True)
    assert agreement.read(60.0) == AgreedReport(4, OUTCOMES, 1234)
    assert agreement.read(60.0) is None


@pytest.mark.parametrize("form", [None, CollectiveReduction])
def test_a_fault_here_is_raised_at_the_read(make_mesh, form):
    agreement = agreement_on(make_mesh(1, 2, 1), ("full",), 1, form)
    agreement.issue(4, 99, {}, 0, False)
    with pytest.raises(TransferFault, match="step=4"):
        agreement.read(60.0)
