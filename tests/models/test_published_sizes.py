"""What the cache reports of the published models: bytes of a token, of a window, of a state, without padding.

The configurations are what the publishers' `config.json` say of sizes; no weights are needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

import jaxcache
from jaxcache.components import FieldSpec
from models.decoder import DecoderConfig, components
from models.families import FAMILIES
from models.layer_plan import FULL, STATE, WINDOW

PAGE_TOKENS = 16

QWEN3_30B = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
GPT_OSS_120B = {
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 2880,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000,
    "max_position_embeddings": 131072,
}
GEMMA3_27B = {
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "hidden_size": 5376,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "intermediate_size": 21504,
    "sliding_window": 1024,
    "query_pre_attn_scalar": 168,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
NEMOTRON_H_8B = {
    "model_type": "nemotron_h",
    "vocab_size": 131072,
    "hidden_size": 4096,
    "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "attention_head_dim": 128,
    "intermediate_size": 21504,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "ssm_state_size": 128,
    "conv_kernel": 4,
    "chunk_size": 128,
    "rms_norm_eps": 1e-5,
}
QWEN3_NEXT_80B = {
    "model_type": "qwen3_next",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "full_attention_interval": 4,
    "partial_rotary_factor": 0.25,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e7,
}

DEEPSEEK_V32 = {
    "model_type": "deepseek_v32",
    "architectures": ["DeepseekV32ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}


class Case(NamedTuple):
    """token: bytes of full attention; window: of the last window_tokens - 1 tokens; state: of one

    choices: of the configuration, besides what is published
    """

    hf: dict[str, Any]
    token: int
    window: int = 0
    state: int = 0
    choices: Mapping[str, Any] = {}

    @property
    def cfg(self) -> DecoderConfig:
        return replace(FAMILIES[self.hf["model_type"]].from_hf(self.hf), **self.choices)


CASES = {
    "Qwen3-30B-A3B": Case(QWEN3_30B, 98_304),
    "gpt-oss-120b": Case(GPT_OSS_120B, 36_864, window=127 * 36_864),
    "Gemma3-27B": Case(GEMMA3_27B, 81_920, window=1023 * 52 * 2 * 16 * 128 * 2),
    "Nemotron-H-8B": Case(NEMOTRON_H_8B, 16_384, state=24 * (10_240 * 3 * 2 + 128 * 64 * 128 * 4)),
    "Qwen3-Next-80B": Case(QWEN3_NEXT_80B, 24_576, state=36 * (8_192 * 3 * 2 + 32 * 128 * 128 * 4)),
    "DeepSeek-V3.2": Case(DEEPSEEK_V32, 61 * (576 + 128) * 2),
    "DeepSeek-V3.2, packed": Case(DEEPSEEK_V32, 40_016 + 8_052, choices={"is_packed": True}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_what_the_cache_reports_is_what_the_model_needs(make_mesh, name, shape):
    """On a mesh that pads and repeats, too."""
    case = CASES[name]
    cfg = case.cfg
    parts = components(cfg, PAGE_TOKENS, "bfloat16")
    config = jaxcache.CacheConfig(page_tokens=PAGE_TOKENS, device_pages=4)
    with jaxcache.Cache(parts, make_mesh(*shape), config) as cache:
        page_bytes = cache.stats()["page_bytes"]
    assert page_bytes[FULL] == PAGE_TOKENS * case.token
    assert page_bytes.get(STATE, 0) == case.state
    if case.window:
        assert page_bytes[WINDOW] * (cfg.window_tokens - 1) == PAGE_TOKENS * case.window
    assert page_bytes.keys() == {FULL} | ({WINDOW} if case.window else set()) | ({STATE} if case.state else set())


def test_what_padding_costs():
    """Of the grid of blocks, in the pools, as a share of what is used."""
    padding = {}
    for name, case in CASES.items():
        for component in components(case.cfg, PAGE_TOKENS, "bfloat16"):
            used = sum(spec.num_bytes for spec in component.fields)
            room = sum(spec.num_bytes * (1 + spec.padding / _entries(spec)) for spec in component.fields)
            padding[name, component.name] = room / used - 1
    worst = {key: round(share, 3) for key, share in padding.items() if share > 0.001}
    assert worst == {("Gemma3-27B", FULL): 0.1, ("Gemma3-27B", WINDOW): 0.058}


def _entries(spec: FieldSpec) -> int:
    return math.prod(spec.shape) - spec.padding
