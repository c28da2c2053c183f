"""R10: conversations that branch inside the prompt and inside generated text, on every mesh and from every tier."""

from __future__ import annotations

import numpy as np
import pytest

import jaxcache
from tests.models.serving import Driver, WrongAnswer, rig_on
from tests.models.turns import TIERS, TURNS, check_turns

MESHES = [(1, 1, 1), (2, 2, 2)]
SLOW_MESHES = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (1, 2, 2)]


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("shape", [*MESHES, *(pytest.param(s, marks=pytest.mark.slow) for s in SLOW_MESHES)], ids=str)
def test_r10_a_conversation_that_branches_is_served_from_the_cache_as_without(make_mesh, shape, tier):
    rig = rig_on(make_mesh(*shape))
    with rig.cache(jaxcache.MemoryStorage() if tier == "storage" else None) as cache:
        answers = check_turns(rig, Driver(rig, cache), tier)
    assert len({tuple(answer) for answer in answers}) > len(TURNS) // 2  # else equal tokens would prove little


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
            check_turns(rig, driver, "device")
