"""Qwen3 and Qwen3-MoE: grouped-query attention with norms on queries and keys, dense or sparse SwiGLU.

    norm -> q, k, v -> WRITE k, v into the pool -> READ the table's pages -> attend -> merge over cp -> wo, sum over tp
         -> norm -> mlp, or top-k experts -> sum over tp

Letters in shapes, besides those of models/layers.py: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from models.decoder import DecoderConfig, published_sizes, refuse_unsupported, rope_kind
from models.experts import Experts, router_logits, top_k_gates
from models.layers import (
    GatedMlp,
    HeldFields,
    PreNormLayer,
    Projections,
    Step,
    norm_weight,
    project,
    rms_norm,
    rotate,
    weight,
)
from models.paged_attention import attend, write
from models.stored import Stored, stored_decoder, stored_mlp
from models.tiny import EXPERTS, SIZES, TINY


@dataclass(frozen=True)
class Qwen3Config(DecoderConfig, model_types=("qwen3", "qwen3_moe")):
    """num_experts 0: every layer has one dense mlp; mlp_size is that of one expert otherwise."""

    num_experts: int = 0
    experts_per_token: int = 0
    norm_topk_prob: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"{self.experts_per_token=} must not exceed {self.num_experts=}")

    def layer(self, kind: str) -> PreNormLayer:
        mlp = SparseMlp(self) if self.num_experts else GatedMlp(self.hidden_size, self.mlp_size, jax.nn.silu)
        return PreNormLayer(Attention(self, kind), mlp, self.hidden_size, self.rms_norm_eps)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Qwen3Config:
        """From a published `config.json`; a ValueError names whatever this file does not compute."""
        _refuse_unsupported(hf)
        rope = hf.get("rope_parameters") or {}
        moe = hf["model_type"] == "qwen3_moe"
        return cls(
            **published_sizes(hf),
            mlp_size=hf["moe_intermediate_size" if moe else "intermediate_size"],
            rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 10_000.0))),
            num_experts=hf.get("num_experts", hf.get("num_local_experts", 0)) if moe else 0,
            experts_per_token=hf["num_experts_per_tok"] if moe else 0,
            norm_topk_prob=hf.get("norm_topk_prob", False),
            tie_embeddings=hf.get("tie_word_embeddings", False),
        )

    def checkpoint(self) -> dict[str, Stored]:
        """Where each parameter lies in published files."""
        layer, attention = "model.layers.{l}.", "model.layers.{l}.self_attn."
        stored = stored_decoder(self.tie_embeddings) | {
            "layers.attention.q_norm": Stored(attention + "q_norm.weight", "c", "lc"),
            "layers.attention.k_norm": Stored(attention + "k_norm.weight", "c", "lc"),
        }
        if not self.num_experts:
            return stored | stored_mlp()
        for name in ("gate", "up"):
            stored[f"layers.mlp.{name}"] = Stored(f"{layer}mlp.experts.{{e}}.{name}_proj.weight", "f,d", "ldef")
        stored["layers.mlp.down"] = Stored(layer + "mlp.experts.{e}.down_proj.weight", "d,f", "lefd")
        stored["layers.mlp.router"] = Stored(layer + "mlp.gate.weight", "e,d", "lde")
        return stored


def _refuse_unsupported(hf: Mapping[str, Any]) -> None:
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    supported = {
        "model_type": hf.get("model_type") in ("qwen3", "qwen3_moe"),
        "hidden_act": hf.get("hidden_act", "silu") == "silu",
        "attention_bias": not hf.get("attention_bias", False),
        "use_sliding_window": not hf.get("use_sliding_window", False),
        "rope_type": rope_kind(rope) == "default",
        "mlp_only_layers": not hf.get("mlp_only_layers"),
        "decoder_sparse_step": hf.get("decoder_sparse_step", 1) == 1,
    }
    refuse_unsupported("Qwen3", hf, supported)


class Attention(Projections):
    """Grouped-query attention over pages; heads over tp, token slots of each page over cp."""

    def __init__(self, cfg: Qwen3Config, component: str):
        super().__init__(cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim)
        self.component = component
        self.q_norm, self.k_norm = norm_weight(cfg.head_dim), norm_weight(cfg.head_dim)
        self.eps = cfg.rms_norm_eps

    def __call__(self, h: Array, held: HeldFields, step: Step) -> tuple[Array, HeldFields]:
        """h: [B, T, D]; held: kv [N, ..., 2, S, K, head_dim], written before it is read."""
        view = step.views[self.component]
        q, k, v = self.qkv(h)
        q, k = rms_norm(q, self.q_norm, self.eps), rms_norm(k, self.k_norm, self.eps)
        kv = write(held["kv"], view.pages, jnp.stack([rotate(k, view), v], axis=2))
        out = attend(rotate(q, view), kv, view.pages).astype(h.dtype)
        return project("bthc,hcd->btd", out, self.wo), {"kv": kv}


class SparseMlp(Experts):
    """Top-k of E SwiGLU experts, by a softmax over all."""

    def __init__(self, cfg: Qwen3Config):
        super().__init__(cfg.hidden_size, cfg.mlp_size, cfg.num_experts, jax.nn.silu)
        self.router = weight((cfg.hidden_size, cfg.num_experts), (None, None), cfg.hidden_size)
        self.top_k, self.norm_topk_prob = cfg.experts_per_token, cfg.norm_topk_prob

    def __call__(self, h: Array) -> Array:
        shares = jax.nn.softmax(router_logits(h, self.router), axis=-1)
        gates = top_k_gates(shares, shares, self.top_k)
        return super().__call__(h, gates / gates.sum(axis=-1, keepdims=True) if self.norm_topk_prob else gates)


TINY["tiny-moe"] = Qwen3Config(**SIZES, **EXPERTS, num_layers=4)
