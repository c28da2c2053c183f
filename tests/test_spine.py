"""A model without full attention: its pages hang on a spine of pages without arrays, and come back from every tier."""

from __future__ import annotations

import pytest

import jaxcache
from jaxcache.components import SlidingWindow
from jaxcache.core import invariants
from jaxcache.core.kinds import SPINE, with_spine
from jaxcache.types import Tier
from tests.core.helpers import FULL, state, window
from tests.snapshots import pages_of
from tests.test_snapshot_kinds import COMPONENTS, PROMPTS, Loop

PARTIAL = COMPONENTS[1:]  # a window and a state
SIZES = {"device_pages": {"window": 32, "state": 24}, "host_pages": {"window": 120, "state": 60}}
PROMPT = PROMPTS[3]
CACHED = (len(PROMPT) - 1) // 8 * 8  # the grid of states


class PartialLoop(Loop):
    components = PARTIAL

    def __init__(self, mesh, folder=None, storage=None, **changes):
        super().__init__(mesh, folder, storage, **{**SIZES, "storage_unit_pages": None, **changes})

    def host_pages(self):
        return {key: page for key, page in pages_of(self.cache, self.pools).items() if key[0] is Tier.HOST}


def test_full_attention_comes_first_and_a_spine_where_there_is_none():
    config = jaxcache.CacheConfig(page_tokens=4, device_pages=10, host_pages=0)
    assert with_spine((window(6), FULL), config) == ((FULL, window(6)), config)
    components, config = with_spine((window(6), state()), config)
    assert components == (SPINE, window(6), state())
    assert config.device_pages == {"spine": 1 << 16, "window": 10, "state": 10}
    assert config.host_pages == {"spine": 0, "window": 0, "state": 0}
    assert with_spine(components, config) == (components, config)


def test_the_name_of_the_spine_is_taken(make_mesh):
    with pytest.raises(ValueError, match="'spine' is what the cache calls its own component"):
        jaxcache.Cache([SlidingWindow("spine", (), 4)], make_mesh(), jaxcache.CacheConfig(4, 10))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 2)], ids=str)
def test_a_prompt_comes_back_from_device_and_host(make_mesh, shape):
    loop = PartialLoop(make_mesh(*shape))
    with loop.cache as cache:
        for prompt in PROMPTS:
            loop.ask(prompt)
        invariants.check(cache.core)
        matches = loop.matches()
        assert any(match.host_tokens for match in matches)
        assert loop.ask(PROMPTS[-1]) == matches[-1].num_tokens > 0
        assert cache.stats()["pages"]["device"]["spine"]["evicted"] == 0


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 2)], ids=str)
def test_a_prompt_comes_back_from_storage(make_mesh, shape):
    """Where nothing of a spine has to be."""
    storage = jaxcache.MemoryStorage()
    loop = PartialLoop(make_mesh(*shape), storage=storage, store_time_share=1.0)
    with loop.cache as cache:
        loop.ask(PROMPT)
        loop.pools = cache.drain(loop.pools)
        stored = loop.host_pages()
    assert {key.component for key in storage._values} == {"window", "state"}
    again = PartialLoop(make_mesh(*shape), storage=storage, prefetch_min_tokens=1, prefetch_if_faster=False)
    with again.cache as cache:
        sequence = cache.sequence(PROMPT, again.namespace)
        assert cache.prefetch(sequence) is not None
        again.pools = cache.drain(again.pools)
        assert cache.match(sequence).host_tokens == CACHED
        invariants.check(cache.core)
        came = again.host_pages()
    assert {component for _, component, _ in came} == {"spine", "window", "state"}
    assert came == {key: stored[key] for key in came}


def test_a_snapshot_of_it_comes_back(make_mesh, tmp_path):
    loop = PartialLoop(make_mesh(2, 1, 2))
    with loop.cache:
        for prompt in PROMPTS:
            loop.ask(prompt)
        loop.save(tmp_path / "snapshot")
        matches = loop.matches()
    again = PartialLoop(make_mesh(1, 2, 1), tmp_path / "snapshot")
    with again.cache as cache:
        invariants.check(cache.core)
        assert again.matches() == matches
        assert again.ask(PROMPTS[-1]) == matches[-1].num_tokens > 0
