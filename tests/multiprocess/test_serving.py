"""models/serve.py over real processes: every token as from one process without a cache, on every mesh.

The storage is a folder that all processes share; each has its own pace, thread timings and hash seed. Then the same
again with a new cache, which finds in storage what the first one left there. All assertions hold in every process.
"""

from __future__ import annotations

import pytest

from tests.models.serving import Driver, rig_on, uncached
from tests.models.turns import serve_turns
from tests.multiprocess.fleets import agreed, run
from tests.multiprocess.rank import MESH_AXES, Job

pytestmark = pytest.mark.multiprocess

PP_ACROSS = ("pp", "cp", "tp")
WHOLE = ("serve_conversations", "serve_conversations", "r10")


def fleet(shape, num_processes, across=MESH_AXES, slow=True):
    name = "x".join(f"{axis}{n}" for axis, n in zip(MESH_AXES, shape, strict=True) if n > 1)
    label = f"{name}, {num_processes} processes, {across[0]} across"
    return pytest.param(shape, num_processes, across, id=label, marks=[pytest.mark.slow] if slow else [])


FLEETS = [
    fleet((1, 1, 2), 2, slow=False),
    fleet((2, 2, 1), 4, slow=False),
    fleet((2, 2, 2), 2, PP_ACROSS, slow=False),
    fleet((2, 1, 1), 2),
    fleet((1, 2, 1), 2),
    fleet((1, 2, 2), 4),
    fleet((2, 2, 2), 2),
    fleet((2, 2, 2), 4),
    fleet((2, 2, 2), 8),
    fleet((2, 4, 1), 2),
]


@pytest.fixture
def one(make_mesh):
    """One process with one device."""
    return make_mesh()


@pytest.fixture
def storage(tmp_path) -> str:
    return str(tmp_path / "storage")


@pytest.mark.parametrize(("shape", "num_processes", "across"), FLEETS)
def test_serving_over_processes_equals_one_without_a_cache(platform, one, storage, shape, num_processes, across):
    with rig_on(one).cache(caching=False, host_pages=0) as cache:
        said = [answer.tokens for answer in serve_turns(Driver(rig_on(one), cache), None)]
    job = Job(shape, WHOLE, storage, across)
    first, again, turns = agreed(run(platform, job, num_processes))
    assert first["outputs"] == uncached(one)
    assert again["outputs"] == uncached(one)
    assert first["hits"]["device"] > 0
    assert first["hits"]["host"] > 0
    assert again["hits"]["storage"] > first["hits"]["storage"]
    assert first["num_compiles"] == again["num_compiles"] == 0
    assert all(outputs == said for outputs in turns["outputs"].values())
