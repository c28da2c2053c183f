"""One agreement program per step with a fixed list of collectives, whatever is in flight."""

from __future__ import annotations

import re
from collections import Counter

import jax
import numpy as np
import pytest

import jaxcache
from jaxcache.agreement import collective as collective_module
from jaxcache.agreement.collective import CollectiveReduction, collective
from jaxcache.agreement.lanes import Lanes

MESHES = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2), (1, 1, 4)]
COLLECTIVE = re.compile(r"\s(all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(")
INLINE_BELOW = 1000  # operations; a CPU runs smaller programs inside the dispatch
KV = jaxcache.FieldSpec("kv", (2, 2, 4, 2, 8), "float32", ("layers", None, "slots", "heads", None))
CONFIG = jaxcache.CacheConfig(page_tokens=4, device_pages=64, host_pages=64, prefetch_min_tokens=4)


def compiled(mesh, lanes: Lanes):
    rows = np.zeros((mesh.size, lanes.num_lanes), np.int32)
    return collective(mesh, lanes.num_unanimous).lower(rows).compile()


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("lanes", [Lanes(("full",), 1), Lanes(("full", "window", "state"), 16)], ids=["few", "many"])
def test_collectives_of_the_compiled_program(make_mesh, shape, lanes, platform):
    if platform == "gpu" and shape == (1, 1, 1):
        pytest.skip("for one GPU XLA leaves the reduction out")
    found = Counter(COLLECTIVE.findall(compiled(make_mesh(*shape), lanes).as_text()))
    hops = shape[2] - 1  # without stages XLA makes one of both reductions, as they are over the same ranks
    assert found == (Counter({"all-reduce": 2, "collective-permute": hops}) if hops else Counter({"all-reduce": 1}))


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_a_dispatch_does_not_wait_for_the_other_ranks(make_mesh, shape, platform):
    """On CPU a program of few operations runs inside the dispatch, which nothing can bound."""
    if platform != "cpu":
        pytest.skip("other devices run none inside the dispatch, and their costs are not known")
    cost = compiled(make_mesh(*shape), Lanes(("full",), 1)).cost_analysis()
    assert cost["flops"] >= INLINE_BELOW


@pytest.fixture
def launches(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the rows of every launch, in a process that owns the mesh and yet uses the collective."""
    shapes = []

    class Counted(CollectiveReduction):
        def __init__(self, mesh, num_unanimous):
            super().__init__(mesh, num_unanimous)
            program = self._program
            self._program = lambda rows: (shapes.append(rows.shape), program(rows))[1]

    monkeypatch.setattr(collective_module, "reduction_of", lambda mesh: Counted)
    return shapes


@pytest.mark.parametrize("num_requests", [0, 1, 6])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 2)], ids=str)
def test_launches_per_step(make_mesh, launches, shape, num_requests):
    component = jaxcache.FullAttention("full", (KV,))
    storage = jaxcache.MemoryStorage()
    with jaxcache.Cache([component], make_mesh(*shape), CONFIG, storage=storage) as cache:
        cache._controller.fleet.processes = [0, 1]  # one process alone exchanges nothing while nothing is in flight
        pools, most = cache.init_pools(), 0
        namespace = cache.new_namespace(model="test")
        sequences = [cache.sequence([i] * 17, namespace) for i in range(num_requests)]
        for step in range(1, 8):
            pools = cache.step(pools)
            assert len(launches) == step
            if step == 1:
                leases = [cache.admit(sequence, num_new_tokens=17) for sequence in sequences]
                pools = jax.tree.map(lambda array: array + 0, pools)  # a model step
                for lease in leases:
                    cache.insert(lease, 17)
                    cache.release(lease)
            pools = cache.apply(pools)
            cache.engine.drain()
            most = max(most, len(cache.core.live_transfers()))
        assert len(set(launches)) == 1
        assert most >= min(num_requests, CONFIG.max_stores)
        assert bool(most) == bool(num_requests)


def test_one_process_alone_exchanges_only_what_is_in_flight(make_mesh, launches):
    with jaxcache.Cache([jaxcache.FullAttention("full", (KV,))], make_mesh(2, 2, 2), CONFIG) as cache:
        pools = cache.init_pools()
        for _ in range(16):
            pools = cache.step(pools)
    assert not launches
