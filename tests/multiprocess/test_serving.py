"""models/serve.py over real processes: every token as from one process without a cache, on every mesh.

The storage is a folder that all processes share; each has its own pace, thread timings and hash seed. Then the same
again with a new cache, which finds in storage what the first one left there. All assertions hold in every process.
"""

from __future__ import annotations

import math

import pytest

import jaxcache
from tests.models.serving import PAGE_TOKENS, Driver, conversations, rig_on, uncached
from tests.models.turns import TIERS, uncached_turns
from tests.multiprocess.fleets import agreed, run
from tests.multiprocess.rank import MESH_AXES, Job

pytestmark = pytest.mark.multiprocess

PP_ACROSS = ("pp", "cp", "tp")
SERVE = "serve_conversations"
SERVING = (SERVE, SERVE)
MOST_OF_IT = 300  # tokens from storage; with an empty one a few dozen are stored and fetched again
ALL = ("r10", *SERVING)


def fleet(shape, num_processes, across=MESH_AXES, parts=ALL, slow=True):
    name = "x".join(f"{axis}{n}" for axis, n in zip(MESH_AXES, shape, strict=True) if n > 1)
    label = f"{name}-{num_processes}-processes-{across[0]}-across" + ("" if parts == ALL else "-serving-only")
    return pytest.param(shape, num_processes, across, parts, id=label, marks=[pytest.mark.slow] if slow else [])


FLEETS = [
    fleet((1, 1, 2), 2, slow=False),
    fleet((2, 2, 2), 2, PP_ACROSS, SERVING, slow=False),
    fleet((1, 2, 2), 4, parts=SERVING, slow=False),
    fleet((2, 1, 1), 2),
    fleet((1, 2, 1), 2),
    fleet((1, 2, 2), 4),
    fleet((2, 2, 1), 4),
    fleet((2, 2, 2), 2),
    fleet((2, 2, 2), 2, PP_ACROSS),
    fleet((2, 2, 2), 4),
    fleet((2, 2, 2), 8),
]


@pytest.fixture
def one(make_mesh):
    """One process with one device."""
    return make_mesh()


@pytest.fixture
def storage(tmp_path) -> str:
    return str(tmp_path / "storage")


@pytest.mark.parametrize(("shape", "num_processes", "across", "parts"), FLEETS)
def test_serving_over_processes_equals_one_without_a_cache(platform, one, storage, shape, num_processes, across, parts):
    results = agreed(run(platform, Job(shape, parts, storage, across), num_processes))
    first, again = results[-2:]
    assert first["outputs"] == again["outputs"] == uncached(one)
    assert all(first["hits"][tier] > 0 for tier in ("device", "host"))
    assert all(again["hits"][tier] > 0 for tier in TIERS)
    assert again["hits"]["storage"] > MOST_OF_IT
    assert first["num_compiles"] == again["num_compiles"] == 0
    for turns in results[:-2]:
        assert turns["outputs"] == [answer.tokens for answer in uncached_turns(rig_on(one))]
    check_one_process_finds_it(one, storage, shape)


def check_one_process_finds_it(one, storage: str, grid: tuple[int, int, int]) -> None:
    """L10: what a fleet has stored is there for one process with one device, on the fleet's storage grid."""
    request = conversations()[12]
    with rig_on(one).cache(jaxcache.FileStorage(storage), storage_grid=grid) as cache:
        got = Driver(rig_on(one), cache).ask_storage(request.prompt, num_decode=request.max_new_tokens)
    assert got.hits == (0, 0, (len(request.prompt) - 1) // PAGE_TOKENS * PAGE_TOKENS)
    assert got.tokens == uncached(one)[12]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "grid"),
    [((1, 1, 2), (1, 1, 2), None), ((2, 2, 1), (1, 4, 1), (2, 4, 1)), ((1, 1, 2), (1, 1, 1), (1, 1, 2))],
    ids=["pp2-again", "cp2xtp2-then-tp4", "pp2-then-pp1"],
)
def test_l10_what_one_fleet_stored_another_finds(platform, one, storage, first, second, grid):
    for shape in (first, second):
        (result,) = agreed(run(platform, Job(shape, SERVING[:1], storage, grid=grid), math.prod(shape)))
        assert result["outputs"] == uncached(one)
    assert result["hits"]["storage"] > MOST_OF_IT


@pytest.mark.slow
def test_a_wrong_page_from_storage_is_a_miss_and_would_show_otherwise(platform, one, storage):
    """The comparison of tokens can fail: one changes every value, and in the end everybody believes it."""
    parts = (SERVE, "spoil_storage", SERVE, "spoil_storage", "believe_storage", SERVE)
    results = agreed(run(platform, Job((1, 1, 2), parts, storage), 2))
    first, checked, believed = results[0], results[2], results[5]
    assert first["outputs"] == checked["outputs"] == uncached(one)
    assert checked["corrupt"] > 0
    assert believed["hits"]["storage"] > MOST_OF_IT
    assert believed["outputs"] != uncached(one)
