"""Tiny models of every family, filled with random weights: what `python -m models.serve --model` serves by name.

Each family adds its own; `models.families` has all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.decoder import DecoderConfig

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "mlp_size": 64,
    "rope_theta": 10_000.0,
}
LATENT_SIZES: dict[str, Any] = {**SIZES, "num_kv_heads": 1}
EXPERTS: dict[str, Any] = {"num_experts": 8, "experts_per_token": 2}
TINY: dict[str, DecoderConfig] = {}
