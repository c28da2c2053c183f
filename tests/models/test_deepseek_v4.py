"""DeepSeek-V4 alone: what an indexer chooses, pages of several entries, published configurations and their bytes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxcache
from models.decoder import components, make_extend
from models.entries import choose_entries
from models.families.deepseek_v4 import DeepseekV4Config, packed_components
from models.layer_plan import FULL, WINDOW
from models.paged_attention import BLOCK_TOKENS, ExtendBatch, Held, plan_pages
from tests.models.families import FAMILIES
from tests.models.serving import Answer, Driver, check_equal, random_tokens, reference, rig_on

MODEL = FAMILIES["deepseek_v4_wide"]

# ---- the indexer


@pytest.mark.parametrize("rate", [4, 8], ids=["slots over cp", "slots repeated"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 1)])
def test_the_best_visible_entries_are_chosen_and_of_equal_ones_the_oldest(make_mesh, shape, rate):
    """Keys are whole numbers, so that scores are exact, and many are equal; some are zero, with either sign."""
    page_tokens, num_tokens, top_k, rng = 8, 64, 5, np.random.default_rng(0)
    slots = page_tokens // rate
    keys = rng.integers(-1, 2, (16, slots, 2)).astype(np.float32)
    q, weights = rng.integers(-1, 2, (1, num_tokens, 4, 2)).astype(np.float32), np.ones((1, num_tokens, 4), np.float32)
    weights[..., 2:] = -1
    table = rng.permutation(16)[None, :8].astype(np.int32)
    none = np.zeros((1, num_tokens), np.int32)
    batch = ExtendBatch(none, none[:, 0], np.full(1, num_tokens, np.int32), {FULL: table}, none[:, :1])
    over_cp, heads = "cp" if slots >= shape[0] else None, P(None, None, "tp", None)
    mesh = make_mesh(*shape)

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(heads, P(None, None, "tp"), P(None, over_cp), P()),
        out_specs=P(),
        check_vma=False,
    )
    def choose(q, weights, pool, batch):
        pages = plan_pages(batch, FULL, 16, page_tokens, BLOCK_TOKENS, tokens_per_slot=rate)
        return choose_entries(q, weights, Held(pool, ()), pages, top_k)

    chosen = np.asarray(jax.jit(choose)(q, weights, keys, batch))[0]
    entries = keys[table[0]].reshape(-1, 2)
    scores = (np.maximum(q[0] @ entries.T, 0) * weights[0][..., None]).sum(axis=1)
    for t in range(num_tokens):
        visible = (t + 1) // rate
        best = np.argsort(-scores[t, :visible], kind="stable")[:top_k]
        assert np.flatnonzero(chosen[t]).tolist() == sorted(best)


# ---- pages larger than groups: of 8 tokens, four and two entries


PROMPT, OTHER = random_tokens(1, 45), random_tokens(2, 45)


def want(rig, prompt: np.ndarray) -> Answer:
    return reference(rig.mesh, tuple(prompt.tolist()), rig.model, rig.page_tokens)


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["device", "host", "storage"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_hit_equals_miss_in_large_pages(make_mesh, shape, tier):
    """All whole pages of a prompt that comes back, and of one that parts at 26: two chunks have published the window
    of 24, which lies in the middle of the second."""
    rig, storage = rig_on(make_mesh(*shape), MODEL, page_tokens=8), jaxcache.MemoryStorage()
    for prompt, found in ((PROMPT, 40), (np.concatenate([PROMPT[:26], OTHER[:9]]), 24)):
        with rig.cache(storage if tier == "storage" else None) as cache:
            driver = Driver(rig, cache)
            driver.ask(PROMPT, by_chunk=True)
            driver.drain()
            if tier == "host":
                driver.fill_device()
            got = driver.ask(prompt) if tier != "storage" else None
        if tier == "storage":
            with rig.cache(storage) as cache:
                got = Driver(rig, cache).ask_storage(prompt)
        assert got is not None and sum(got.hits) == got.hits[["device", "host", "storage"].index(tier)] == found
        check_equal(got, want(rig, prompt))
        assert np.array_equal(got.logits, want(rig, prompt).logits)


def test_pages_hold_whole_groups(make_mesh):
    with pytest.raises(ValueError, match="page_tokens=6 must be a multiple of the 4 tokens of a hca slot"):
        make_extend(MODEL, make_mesh(), 6)


# ---- published configurations


FLASH: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "vocab_size": 129280,
    "hidden_size": 4096,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_lora_rank": 1024,
    "o_groups": 8,
    "hidden_act": "silu",
    "swiglu_limit": 10.0,
    "rms_norm_eps": 1e-06,
    "sliding_window": 128,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "num_nextn_predict_layers": 1,
    "compress_ratios": [0, 0, *(4, 128) * 20, 4, 0],
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-06,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "num_hash_layers": 3,
    "tie_word_embeddings": False,
}


def test_config_of_the_published_model():
    cfg = DeepseekV4Config.from_hf(FLASH)
    assert [cfg.attention.count(kind) for kind in ("window", "csa", "hca")] == [2, 21, 20]
    assert cfg.layer_kinds[:5] == ("window_hashed", "window_hashed", "csa_hashed", "hca_scored", "csa_scored")
    assert (cfg.csa_rate, cfg.hca_rate, cfg.window, cfg.rotated, cfg.far_theta) == (4, 128, 128, 64, 160_000.0)
    assert cfg.yarn is not None and (cfg.yarn.factor, cfg.rope(FULL).scale) == (16, 1.0)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_bytes_of_the_published_model(make_mesh, shape):
    """Per token, and per window of 128 tokens, which is one page. Gates and values of the last four tokens would take
    860,160 bytes; sums of these say the same in fewer."""
    cfg = DeepseekV4Config.from_hf(FLASH)
    full, window = packed_components(cfg, 128)
    assert sum(field.num_bytes for field in full.fields) == 3850.25 * 128
    sizes = {field.name: field.num_bytes for field in window.fields}
    assert sizes == {"kv": 43 * 584 * 128, "csa_state": 21 * 2 * 3 * 640 * 4, "hca_state": 20 * 3 * 512 * 4}
    assert sizes["csa_state"] + sizes["hca_state"] == 445_440 < 21 * 4 * 2 * (2 * 512 + 2 * 128) * 4 == 860_160
    config = jaxcache.CacheConfig(page_tokens=128, device_pages=4)
    with jaxcache.Cache((full, window), make_mesh(*shape), config) as cache:
        assert cache.stats()["page_bytes"] == {FULL: 492_832, WINDOW: 3_214_336 + 445_440}
    computed, _ = components(cfg, 128, "bfloat16")
    assert sum(field.num_bytes for field in computed.fields) == 6880 * 128
    assert window.name == WINDOW and window.required(1280) == (1153, 1280)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "deepseek_v3"},
        {"compress_ratios": [0, 8] * 22},
        {"layer_types": ["full_attention"] * 43},
        {"mlp_layer_types": ["moe", "hash_moe"] + ["moe"] * 41},
        {"mlp_layer_types": ["hash_moe"] * 3 + ["dense"] * 40},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"scoring_func": "sigmoid"},
        {"topk_method": "greedy"},
        {"norm_topk_prob": False},
        {"n_shared_experts": 2},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"mlp_bias": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_config_refuses_what_is_not_computed(change):
    named = "rope_parameters" if "rope_scaling" in change else next(iter(change))
    with pytest.raises(ValueError, match=f"does not support {named}="):
        DeepseekV4Config.from_hf({**FLASH, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"attention": ("csa", "full", "csa")},
        {"window": 1},
        {"streams": 1},
        {"csa_rate": 1},
        {"num_kv_heads": 2},
        {"rotated": 10},
        {"groups": 3},
        {"experts_per_token": 5},
    ],
    ids=lambda change: next(iter(change)),
)
def test_configs_that_make_no_sense(change):
    with pytest.raises(ValueError, match=f"self.{next(iter(change))}="):
        replace(MODEL, **change)
