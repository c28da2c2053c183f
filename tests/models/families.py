"""A tiny model with random weights of every family here; windows of more than two pages (wide) and less than one."""

from __future__ import annotations

from typing import Any

from models.decoder import DecoderConfig
from models.gemma3 import Gemma3Config
from models.gpt_oss import GptOssConfig
from models.llama import LlamaConfig
from models.qwen3 import Qwen3Config
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


FULL_ONLY: dict[str, DecoderConfig] = {
    "qwen3": Qwen3Config(**SIZES, num_layers=3, rope_theta=1e4),
    "qwen3_moe": MODEL,
    "llama": LlamaConfig(**SIZES, num_layers=3, rope_theta=1e4),
}
WINDOWED = {
    f"{make.__name__}_{width}": make(tokens)
    for make in (gemma3, gpt_oss)
    for width, tokens in (("wide", WIDE), ("narrow", NARROW))
}
FAMILIES = FULL_ONLY | WINDOWED
