"""Snapshots of fleets: every process writes and reads its share; other fleets and one process restore them."""

from __future__ import annotations

import pytest

from tests.models.serving import Driver, conversations, rig_on, uncached
from tests.multiprocess.fleets import agreed, run
from tests.multiprocess.rank import Job, num_resident, snapshot_folder

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


@pytest.fixture
def one(make_mesh):
    return make_mesh()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (((1, 1, 2), 2), ((1, 1, 2), 2)),
        (((2, 2, 2), 4), ((1, 2, 2), 2)),
        (((2, 2, 2), 8), ((1, 4, 1), 4)),
    ],
    ids=["pp2-again", "eight-then-four", "cp2xtp2xpp2-then-tp4"],
)
def test_hit_equals_miss_after_restore_of_a_fleet(platform, one, tmp_path, first, second):
    storage = str(tmp_path / "storage")
    (saved,) = agreed(run(platform, Job(first[0], ("save_snapshot",), storage), first[1]))
    (restored,) = agreed(run(platform, Job(second[0], ("restore_snapshot",), storage), second[1]))
    assert saved["outputs"] == restored["outputs"] == uncached(one)
    assert saved["pages"] == restored["pages"] and all(saved["pages"].values())
    assert restored["first"] > 0
    with rig_on(one).cache() as cache:
        driver = Driver(rig_on(one), cache)
        driver.pools = cache.restore(snapshot_folder(storage))
        assert num_resident(cache) == saved["pages"]
        request = conversations()[-1]
        got = driver.ask(request.prompt, num_decode=request.max_new_tokens)
        assert sum(got.hits) == restored["first"]
        assert got.tokens == uncached(one)[-1]


def test_a_process_that_cannot_see_the_folder_is_named(platform, tmp_path):
    storage = str(tmp_path / "storage")
    results = run(platform, Job((1, 1, 2), ("save_snapshot", "refuse_snapshot"), storage), 2)
    said = [process[1] for process in results]
    assert [one["kind"] for one in said] == ["RefusedValue", "RefusedCall"]
    assert all(one["says"] and not one["nodes"] for one in said)
