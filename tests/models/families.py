"""A tiny model with random weights of every family here.

Windows of more than two pages (wide) and of less than one (narrow); states at the ends of pages, or of every second
(coarse).
"""

from __future__ import annotations

from typing import Any

from models.decoder import DecoderConfig
from models.experts import Routing
from models.families.deepseek_v4 import DeepseekV4Config
from models.families.deepseek_v32 import DeepseekV32Config
from models.families.gemma3 import Gemma3Config
from models.families.gpt_oss import GptOssConfig
from models.families.llama import LlamaConfig
from models.families.nemotron_h import NemotronHConfig
from models.families.qwen3 import Qwen3Config
from models.families.qwen3_next import Qwen3NextConfig
from models.yarn import Yarn
from tests.models.serving import MODEL, PAGE_TOKENS

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_size": 16,
}
WIDE, NARROW = 10, 3
assert NARROW < PAGE_TOKENS and WIDE > 2 * PAGE_TOKENS


def gemma3(window: int) -> DecoderConfig:
    """The second block has one layer of six."""
    return Gemma3Config(**SIZES, num_layers=7, rope_theta=1e6, window=window, query_scale=12.0)


def gpt_oss(window: int) -> DecoderConfig:
    yarn = Yarn(factor=4.0, original_tokens=32, truncate=False)
    sizes = {**SIZES, "num_experts": 4, "experts_per_token": 2}
    return GptOssConfig(**sizes, num_layers=4, rope_theta=1e4, window=window, yarn=yarn)


def deepseek_v4(window: int) -> DecoderConfig:
    """Entries of two tokens, and of a page; with a narrow window, a layer that looks its experts up."""
    attention = {"csa_rate": 2, "hca_rate": PAGE_TOKENS, "window": window, "query_rank": 16, "rotated": 4}
    index = {"index_heads": 16, "index_size": 8, "index_top_k": 6, "groups": 2, "group_rank": 8}
    experts = {"num_experts": 4, "experts_per_token": 2, "routed_scale": 1.5, "limit": 1.5}
    kinds = {"attention": ("hca", "csa"), "num_hashed": 1} if window == NARROW else {"attention": ("csa", "hca", "csa")}
    sizes = {**SIZES, "num_kv_heads": 1, "num_layers": len(kinds["attention"]), "mix_rounds": 3}
    return DeepseekV4Config(**sizes, **attention, **index, **experts, **kinds, rope_theta=1e4)


def deepseek_v32(is_packed: bool) -> DecoderConfig:
    """A dense layer and two with experts; a token reads six keys at most. No stage of two has as many layers."""
    sizes = {**SIZES, "num_kv_heads": 1, "head_dim": 12}
    attention = {"query_rank": 12, "latent_size": 16, "rotated_size": 4, "value_size": 6, "score_scale": 0.4}
    index = {"index_heads": 16, "index_size": 8, "index_top_k": 6}
    routing = Routing(num_experts=6, top_k=2, groups=3, top_groups=2, scale=1.5)
    experts = {"routing": routing, "expert_size": 10, "shared_size": 8, "dense_layers": 1}
    return DeepseekV32Config(
        **sizes, **attention, **index, **experts, num_layers=3, rope_theta=1e4, is_packed=is_packed
    )


LATENTS = {"deepseek_v32": deepseek_v32(False), "deepseek_v32_packed": deepseek_v32(True)}
FULL_ONLY: dict[str, DecoderConfig] = {
    "qwen3": Qwen3Config(**SIZES, num_layers=3, rope_theta=1e4),
    "qwen3_moe": MODEL,
    "llama": LlamaConfig(**SIZES, num_layers=3, rope_theta=1e4),
    **LATENTS,
}
WINDOWED = {
    f"{make.__name__}_{width}": make(tokens)
    for make in (gemma3, gpt_oss, deepseek_v4)
    for width, tokens in (("wide", WIDE), ("narrow", NARROW))
}


def nemotron_h(grid_tokens: int) -> DecoderConfig:
    """Every kind of layer, in two blocks that differ."""
    state = {"heads": 4, "head_size": 8, "groups": 2, "state_size": 8, "state_grid_tokens": grid_tokens}
    experts = {"expert_size": 16, "shared_size": 8, "routing": Routing(num_experts=4, top_k=2, groups=2, scale=1.5)}
    kinds = ("full", "state", "moe", "state", "full", "mlp")
    return NemotronHConfig(**SIZES, **state, **experts, num_layers=6, kinds=kinds, rope_theta=1.0)


def qwen3_next(grid_tokens: int) -> DecoderConfig:
    """The second block has no layer that reads everything."""
    net = {"key_heads": 2, "value_heads": 4, "key_dim": 8, "value_dim": 8, "state_grid_tokens": grid_tokens}
    experts = {"num_experts": 4, "experts_per_token": 2, "shared_mlp_size": 8, "rotary_dim": 4}
    return Qwen3NextConfig(**SIZES, **net, **experts, num_layers=6, rope_theta=1e4)


WITH_STATES = {
    f"{make.__name__}_{name}": make(tokens)
    for make in (nemotron_h, qwen3_next)
    for name, tokens in (("fine", 1), ("coarse", 2 * PAGE_TOKENS))
}
FAMILIES = FULL_ONLY | WINDOWED | WITH_STATES
