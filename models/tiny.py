"""Tiny models of every family, filled with random weights: what `python -m models.serve --model` serves by name."""

from __future__ import annotations

from typing import Any

from models.decoder import DecoderConfig
from models.deepseek_v4 import DeepseekV4Config
from models.deepseek_v32 import DeepseekV32Config
from models.experts import Routing
from models.gemma3 import Gemma3Config
from models.gpt_oss import GptOssConfig
from models.llama import LlamaConfig
from models.nemotron_h import NemotronHConfig
from models.qwen3 import Qwen3Config
from models.qwen3_next import Qwen3NextConfig

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "mlp_size": 64,
    "rope_theta": 10_000.0,
}
EXPERTS: dict[str, Any] = {"num_experts": 8, "experts_per_token": 2}


def _nemotron_h() -> DecoderConfig:
    kinds = ("state", "moe", "state", "full", "mlp", "state", "moe", "full")
    mamba = {"heads": 8, "head_size": 16, "groups": 2, "state_size": 16}
    experts = {"expert_size": 64, "shared_size": 64, "routing": Routing(num_experts=8, top_k=2)}
    return NemotronHConfig(**SIZES, **mamba, **experts, num_layers=len(kinds), kinds=kinds)


def _qwen3_next() -> DecoderConfig:
    net: dict[str, Any] = {"key_heads": 2, "value_heads": 4, "key_dim": 16, "value_dim": 16}
    return Qwen3NextConfig(**SIZES, **EXPERTS, **net, num_layers=8, shared_mlp_size=64, rotary_dim=16)


def _deepseek_v32() -> DecoderConfig:
    attention: dict[str, Any] = {"query_rank": 48, "latent_size": 32, "rotated_size": 16, "value_size": 32}
    index: dict[str, Any] = {"index_heads": 16, "index_size": 32, "index_top_k": 64}
    routing = Routing(num_experts=8, top_k=2, groups=4, top_groups=2)
    experts: dict[str, Any] = {"routing": routing, "expert_size": 64, "shared_size": 64, "dense_layers": 1}
    sizes = {**SIZES, "num_kv_heads": 1, "score_scale": 32**-0.5}
    return DeepseekV32Config(**sizes, **attention, **index, **experts, num_layers=4)


def _deepseek_v4() -> DecoderConfig:
    """Pages must be multiples of 16 tokens."""
    attention: dict[str, Any] = {"attention": ("window", "csa", "hca", "csa"), "hca_rate": 16, "num_hashed": 1}
    ranks: dict[str, Any] = {"query_rank": 64, "rotated": 16, "groups": 2, "group_rank": 32}
    index: dict[str, Any] = {"index_heads": 4, "index_size": 32, "index_top_k": 16}
    return DeepseekV4Config(**{**SIZES, "num_kv_heads": 1}, **EXPERTS, **attention, **ranks, **index, num_layers=4)


TINY: dict[str, DecoderConfig] = {
    "tiny-moe": Qwen3Config(**SIZES, **EXPERTS, num_layers=4),
    "tiny-llama": LlamaConfig(**SIZES, num_layers=4),
    "tiny-gemma3": Gemma3Config(**SIZES, num_layers=6, window=128),
    "tiny-gpt-oss": GptOssConfig(**SIZES, **EXPERTS, num_layers=4, window=128),
    "tiny-nemotron-h": _nemotron_h(),
    "tiny-qwen3-next": _qwen3_next(),
    "tiny-deepseek-v32": _deepseek_v32(),
    "tiny-deepseek-v4": _deepseek_v4(),
}
