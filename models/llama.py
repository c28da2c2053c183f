"""Llama (and SmolLM2): grouped-query attention and SwiGLU, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from models.decoder import DecoderConfig, Stored, stored_decoder, stored_mlp
from models.layers import GatedMlp, View, norm_weight, project, rms_norm, rotate, weight
from models.paged_attention import attend, write


@dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    def layer(self) -> Layer:
        return Layer(self)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> LlamaConfig:
        """From a published `config.json`; a ValueError names whatever this file does not compute."""
        _refuse_unsupported(hf)
        rope = hf.get("rope_parameters") or {}
        return cls(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=hf["num_attention_heads"],
            num_kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
            head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            mlp_size=hf["intermediate_size"],
            rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 10_000.0))),
            rms_norm_eps=hf["rms_norm_eps"],
            tie_embeddings=hf.get("tie_word_embeddings", False),
        )


def _refuse_unsupported(hf: Mapping[str, Any]) -> None:
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    supported = {
        "model_type": hf.get("model_type") == "llama",
        "hidden_act": hf.get("hidden_act", "silu") == "silu",
        "attention_bias": not hf.get("attention_bias", False),
        "mlp_bias": not hf.get("mlp_bias", False),
        "rope_type": rope.get("rope_type", rope.get("type", "default")) == "default",
    }
    if bad := [f"{name}={hf.get(name, rope)!r}" for name, good in supported.items() if not good]:
        raise ValueError(f"Llama here does not support {', '.join(bad)}")


class Attention(nnx.Module):
    """Grouped-query attention over pages; heads over tp, token slots of each page over cp."""

    def __init__(self, cfg: LlamaConfig):
        d, h, k, c = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.wq = weight((d, h, c), (None, "tp", None), d)
        self.wk = weight((d, k, c), (None, "tp", None), d)
        self.wv = weight((d, k, c), (None, "tp", None), d)
        self.wo = weight((h, c, d), ("tp", None, None), h * c)

    def __call__(self, h: Array, pool: Array, place: tuple, view: View) -> tuple[Array, Array]:
        """h: [B, T, D]; pool: [N, L, 2, S, K, head_dim], written at `place` before it is read."""
        q = jnp.einsum("btd,dhc->bthc", h, self.wq[...])
        k = jnp.einsum("btd,dkc->btkc", h, self.wk[...])
        v = jnp.einsum("btd,dkc->btkc", h, self.wv[...])
        pool = write(pool, place, view.pages, jnp.stack([rotate(k, view), v], axis=2))
        out = attend(rotate(q, view), pool, place, view.pages).astype(h.dtype)
        return project("bthc,hcd->btd", out, self.wo), pool


class Layer(nnx.Module):
    """Attention, then mlp, each behind a norm and added to the residual."""

    def __init__(self, cfg: LlamaConfig):
        self.attention = Attention(cfg)
        self.mlp = GatedMlp(cfg.hidden_size, cfg.mlp_size, jax.nn.silu)
        self.attention_norm = norm_weight(cfg.hidden_size)
        self.mlp_norm = norm_weight(cfg.hidden_size)
        self.eps = cfg.rms_norm_eps

    def __call__(self, h: Array, pool: Array, place: tuple, view: View) -> tuple[Array, Array]:
        out, pool = self.attention(rms_norm(h, self.attention_norm, self.eps), pool, place, view)
        h = h + out
        return h + self.mlp(rms_norm(h, self.mlp_norm, self.eps)), pool


def checkpoint(cfg: LlamaConfig) -> dict[str, Stored]:
    """Where each parameter lies in published files."""
    return stored_decoder(cfg) | stored_mlp()
