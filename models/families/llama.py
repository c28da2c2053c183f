"""Llama (and SmolLM2): grouped-query attention and SwiGLU, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from models.decoder import DecoderConfig, published_sizes, refuse_unsupported, rope_kind
from models.layers import GatedMlp, HeldFields, PreNormLayer, Projections, Step, project, rotate
from models.paged_attention import attend, write
from models.stored import Stored, stored_decoder, stored_mlp
from models.tiny import SIZES, TINY


@dataclass(frozen=True)
class LlamaConfig(DecoderConfig, model_types=("llama",)):
    def layer(self, kind: str) -> PreNormLayer:
        return PreNormLayer(
            Attention(self, kind),
            GatedMlp(self.hidden_size, self.mlp_size, jax.nn.silu),
            self.hidden_size,
            self.rms_norm_eps,
        )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> LlamaConfig:
        """From a published `config.json`; a ValueError names whatever this file does not compute."""
        _refuse_unsupported(hf)
        rope = hf.get("rope_parameters") or {}
        return cls(
            **published_sizes(hf),
            mlp_size=hf["intermediate_size"],
            rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 10_000.0))),
            tie_embeddings=hf.get("tie_word_embeddings", False),
        )

    def checkpoint(self) -> dict[str, Stored]:
        """Where each parameter lies in published files."""
        return stored_decoder(self.tie_embeddings) | stored_mlp()


def _refuse_unsupported(hf: Mapping[str, Any]) -> None:
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    supported = {
        "model_type": hf.get("model_type") == "llama",
        "hidden_act": hf.get("hidden_act", "silu") == "silu",
        "attention_bias": not hf.get("attention_bias", False),
        "mlp_bias": not hf.get("mlp_bias", False),
        "rope_type": rope_kind(rope) == "default",
    }
    refuse_unsupported("Llama", hf, supported)


class Attention(Projections):
    """Grouped-query attention over pages; heads over tp, token slots of each page over cp."""

    def __init__(self, cfg: LlamaConfig, component: str):
        super().__init__(cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim)
        self.component = component

    def __call__(self, h: Array, held: HeldFields, step: Step) -> tuple[Array, HeldFields]:
        """h: [B, T, D]; held: kv [N, ..., 2, S, K, head_dim], written before it is read."""
        view = step.views[self.component]
        q, k, v = self.qkv(h)
        kv = write(held["kv"], view.pages, jnp.stack([rotate(k, view), v], axis=2))
        out = attend(rotate(q, view), kv, view.pages).astype(h.dtype)
        return project("bthc,hcd->btd", out, self.wo), {"kv": kv}


TINY["tiny-llama"] = LlamaConfig(**SIZES, num_layers=4)
