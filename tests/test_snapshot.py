"""A whole cache to a folder and back: the same matches and the same bytes, on the same mesh and on others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.serving import Driver, check_equal, random_tokens, reference, rig_on

PROMPTS = [random_tokens(seed, 20 + 7 * seed) for seed in range(5)]


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "snapshot"


def test_same_mesh(make_mesh, folder):
    rig = rig_on(make_mesh())
    with rig.cache() as cache:
        driver = Driver(rig, cache)
        for prompt in PROMPTS:
            driver.ask(prompt)
        driver.drain()
        before = [cache.match(driver.sequence(prompt)) for prompt in PROMPTS]
        cache.snapshot(driver.pools, folder)
    with rig.cache() as cache:
        driver = Driver(rig, cache)
        driver.pools = cache.restore(folder)
        assert [cache.match(driver.sequence(prompt)) for prompt in PROMPTS] == before
        for prompt in PROMPTS:
            check_equal(driver.ask(prompt), reference(rig.mesh, tuple(prompt.tolist())))
