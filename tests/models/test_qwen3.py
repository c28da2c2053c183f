"""Qwen3's configurations, and what `extend` promises on every mesh; the goldens have tests of their own."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from models import decoder
from models.families import qwen3
from tests.models.steps import NUM_PAGES, PAGE_TOKENS, TOLERANCE, WIDTH, make_batch, shuffled_tables, zero_pools

SMALL = qwen3.Qwen3Config(
    vocab_size=32, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, mlp_size=8, rope_theta=1e4
)


def test_result_does_not_depend_on_the_tables_width(make_mesh, rng):
    params, extend = decoder.init_params(SMALL, make_mesh(), 0, jnp.float32), decoder.make_extend(SMALL, make_mesh(), 8)
    tables, tokens = shuffled_tables(SMALL, rng, 2), rng.integers(0, SMALL.vocab_size, (2, 12)).astype(np.int32)
    logits = []
    for width in (WIDTH, 70):
        wide = np.full((2, width), NUM_PAGES, np.int32)
        wide[:, :WIDTH] = tables["full"]
        logits.append(extend(params, zero_pools(SMALL, make_mesh()), make_batch(tokens, {"full": wide}, 0, 12, 12))[0])
    assert np.array_equal(*map(np.asarray, logits))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_repeated_heads_and_padded_layers(make_mesh, rng, axis_type):
    """Two kv heads on tp 4, three layers on pp 2: the same numbers as on one device."""
    tokens, tables = rng.integers(0, SMALL.vocab_size, (2, 12)).astype(np.int32), shuffled_tables(SMALL, rng, 2)
    logits = []
    for mesh in (make_mesh(), make_mesh(1, 4, 2, axis_type=axis_type)):
        extend, pools = decoder.make_extend(SMALL, mesh, PAGE_TOKENS), zero_pools(SMALL, mesh)
        params = decoder.init_params(SMALL, mesh, 3, jnp.float32)
        for start in (0, 6):
            out, pools = extend(params, pools, make_batch(tokens, tables, start, start + 6, 6))
        logits.append(np.asarray(out))
        assert extend._cache_size() == 1
    assert np.abs(logits[0] - logits[1]).max() <= TOLERANCE
    assert np.abs(logits[0]).max() > 0.1


def test_tied_embeddings_and_bfloat16(make_mesh, rng):
    cfg = replace(SMALL, tie_embeddings=True)
    params = decoder.init_params(cfg, make_mesh(), 0, jnp.bfloat16)
    assert "head" not in params
    tokens, pools = rng.integers(0, cfg.vocab_size, (2, 6)).astype(np.int32), zero_pools(cfg, make_mesh())
    batch = make_batch(tokens, shuffled_tables(cfg, rng, 2), 0, 6, 6)
    logits, _ = decoder.make_extend(cfg, make_mesh(), PAGE_TOKENS)(params, pools, batch)
    assert logits.dtype == jnp.float32
    assert np.isfinite(np.asarray(logits)).all()


def test_components_describe_the_pool():
    (full,) = decoder.components(SMALL, 16, "bfloat16")
    (kv,) = full.fields
    assert (full.name, kv.name, kv.dtype) == ("full", "kv", "bfloat16")
    assert kv.shape == (3, 2, 16, 2, 4)
    assert kv.axes == ("layers", None, "slots", "heads", None)


PUBLISHED = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
}


def test_config_of_a_published_model():
    cfg = qwen3.Qwen3Config.from_hf(PUBLISHED)
    assert (cfg.num_layers, cfg.num_kv_heads, cfg.mlp_size) == (48, 4, 768)
    assert (cfg.num_experts, cfg.experts_per_token, cfg.rope_theta) == (128, 8, 1e6)
    nested = {**PUBLISHED, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "num_local_experts": 128}
    del nested["rope_theta"], nested["num_experts"]
    assert qwen3.Qwen3Config.from_hf(nested) == cfg


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "qwen2"},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"use_sliding_window": True},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}},
        {"mlp_only_layers": [0]},
        {"decoder_sparse_step": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_config_refuses_what_is_not_computed(change):
    with pytest.raises(ValueError, match="does not support"):
        qwen3.Qwen3Config.from_hf({**PUBLISHED, **change})


@pytest.mark.parametrize(
    ("change", "shape", "page_tokens", "message"),
    [
        ({}, (2, 1, 1), 7, "page_tokens=7 must be a multiple of cp=2"),
        (
            {"num_heads": 6, "num_kv_heads": 3},
            (1, 2, 1),
            8,
            r"tp=2 does not divide 6 heads.*3 kv heads.*may be one of \[1\]",
        ),
        ({"vocab_size": 33}, (1, 2, 1), 8, r"33 tokens.*may be one of \[1\]"),
        ({"mlp_size": 12}, (1, 8, 1), 8, r"12 mlp entries.*may be one of \[1, 2, 4\]"),
    ],
)
def test_meshes_that_do_not_fit(make_mesh, change, shape, page_tokens, message):
    cfg = replace(SMALL, **change)
    with pytest.raises(ValueError, match=message):
        decoder.make_extend(cfg, make_mesh(*shape), page_tokens)


@pytest.mark.parametrize("change", [{"num_kv_heads": 3}, {"head_dim": 5}, {"experts_per_token": 2}])
def test_configs_that_make_no_sense(change):
    with pytest.raises(ValueError, match="must"):
        replace(SMALL, **change)
