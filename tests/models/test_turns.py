"""R10: conversations that branch inside the prompt and inside generated text, on every mesh and from every tier."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from jax.sharding import Mesh

import jaxcache
from tests.models.serving import Answer, Driver, WrongAnswer, rig_on
from tests.models.turns import TIERS, TURNS, check_turns, uncached_turns

MESHES = [(1, 1, 1), (2, 2, 2)]
SLOW_MESHES = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (1, 2, 2)]


@functools.cache
def want(mesh: Mesh) -> list[Answer]:
    return uncached_turns(rig_on(mesh))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("shape", [*MESHES, *(pytest.param(s, marks=pytest.mark.slow) for s in SLOW_MESHES)], ids=str)
def test_r10_a_conversation_that_branches_is_served_from_the_cache_as_without(make_mesh, shape, tier):
    rig = rig_on(make_mesh(*shape))
    with rig.cache(jaxcache.MemoryStorage() if tier == "storage" else None) as cache:
        check_turns(Driver(rig, cache), tier, want(rig.mesh))


def test_r10_the_turns_are_answered_differently(make_mesh):
    """Else equal tokens would prove little."""
    assert len({tuple(answer.tokens) for answer in want(make_mesh())}) > len(TURNS) // 2


@pytest.mark.mutation
def test_r10_a_wrong_page_in_a_later_turn_shows(make_mesh):
    rig = rig_on(make_mesh())
    with rig.cache() as cache:
        driver = Driver(rig, cache)
        ask, num_asked = driver.ask, 0

        def spoilt(tokens, **choices):
            nonlocal num_asked
            num_asked += 1
            if num_asked == 4:
                driver.edit_pool(lambda pool: np.negative(pool, out=pool))
            return ask(tokens, **choices)

        driver.ask = spoilt
        with pytest.raises(WrongAnswer):
            check_turns(driver, "device", want(rig.mesh))
