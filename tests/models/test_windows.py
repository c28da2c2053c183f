"""Models with sliding windows: a prefix from any tier gives the logits that computing it gives."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import jaxcache
from models.decoder import WINDOW, DecoderConfig
from models.gemma3 import Gemma3Config
from models.gpt_oss import GptOssConfig, Yarn
from tests.models.serving import PAGE_TOKENS, Driver, WrongAnswer, check_equal, random_tokens, reference, rig_on

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "mlp_size": 16}
PROMPT = tuple(random_tokens(0, 45).tolist())
WIDE, NARROW = 10, 3  # more than two pages, less than one


def gemma3(window: int) -> DecoderConfig:
    """The second block has one layer of six."""
    return Gemma3Config(**SIZES, num_layers=7, rope_theta=1e6, window=window, query_scale=12.0)


def gpt_oss(window: int) -> DecoderConfig:
    yarn = Yarn(factor=4.0, original_tokens=32, truncate=False)
    experts = {"num_experts": 4, "experts_per_token": 2}
    return GptOssConfig(**SIZES, **experts, num_layers=4, rope_theta=1e4, window=window, yarn=yarn)


CASES = [
    pytest.param(make(window), shape, id=f"{make.__name__}-{window}-{shape}", marks=marks)
    for make in (gemma3, gpt_oss)
    for window, shape, marks in (
        (WIDE, (1, 1, 1), ()),
        (WIDE, (2, 2, 2), ()),
        (NARROW, (1, 1, 1), ()),
        (NARROW, (2, 2, 2), pytest.mark.slow),
    )
]


@pytest.mark.parametrize(("model", "shape"), CASES)
@pytest.mark.parametrize("tier", ["device", "host", "storage"])
def test_hit_equals_miss(make_mesh, model, shape, tier):
    mesh = make_mesh(*shape)
    rig, want = rig_on(mesh, model), reference(mesh, PROMPT, model)
    storage = jaxcache.MemoryStorage()
    with rig.cache(storage) as cache:
        driver = Driver(rig, cache)
        check_equal(driver.ask(PROMPT, by_chunk=True), want)
        if tier == "host":
            driver.fill_device()
        driver.drain()
        if tier != "storage":
            got = driver.ask(PROMPT)
            check_equal(got, want)
    if tier == "storage":
        with rig.cache(storage) as cache:
            got = Driver(rig, cache).ask_storage(PROMPT)
        check_equal(got, want)
    hits = dict(zip(("device", "host", "storage"), got.hits, strict=True))
    assert hits[tier] == sum(got.hits) == (len(PROMPT) - 1) // PAGE_TOKENS * PAGE_TOKENS


@pytest.mark.parametrize(("model", "shape"), [case for case in CASES if not case.marks])
def test_a_stale_window_shows(make_mesh, model, shape):
    """The pages of the window hold what another request left there."""
    mesh = make_mesh(*shape)
    rig, want = rig_on(mesh, model), reference(mesh, PROMPT, model)
    with rig.cache() as cache:
        driver = Driver(rig, cache)
        driver.ask(PROMPT, by_chunk=True)
        kv = driver.pools[WINDOW]["kv"]
        driver.pools[WINDOW] = {"kv": jax.device_put(np.roll(np.array(kv), 1, axis=0), kv.sharding)}
        with pytest.raises(WrongAnswer):
            check_equal(driver.ask(PROMPT, by_chunk=True), want)
