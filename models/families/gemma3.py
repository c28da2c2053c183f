"""Gemma 3, text only: five layers with a window, then one without, each kind with a rotary base of its own.

norm -> attention, norms on queries and keys -> norm -> add -> norm -> gated mlp with gelu -> norm -> add
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from models.decoder import (
    FULL,
    WINDOW,
    DecoderConfig,
    published_sizes,
    refuse_unsupported,
)
from models.layers import (
    GatedMlp,
    HeldFields,
    Projections,
    Rope,
    Step,
    norm_weight,
    plain_rope,
    project,
    rms_norm,
    rotate,
)
from models.paged_attention import attend, write
from models.stored import Stored, stored_decoder, stored_mlp
from models.tiny import SIZES, TINY

NORMS = ("input", "post_attention", "pre_feedforward", "post_feedforward")  # of a layer, in their order


@dataclass(frozen=True)
class Gemma3Config(DecoderConfig, model_types=("gemma3_text",)):
    """rope_theta: of layers that read everything, at positions divided by rope_factor; local_rope_theta: of the others.

    query_scale: of the scores, before the square root is taken of its inverse
    """

    tie_embeddings: bool = True
    window: int = 512
    local_rope_theta: float = 10_000.0
    rope_factor: float = 1.0
    query_scale: float = 256.0

    pattern: ClassVar[tuple[str, ...]] = (*(WINDOW,) * 5, FULL)

    def layer(self, kind: str) -> Layer:
        return Layer(self, kind)

    def rope(self, component: str) -> Rope:
        if component == WINDOW:
            return plain_rope(self.local_rope_theta, self.head_dim)
        return Rope(plain_rope(self.rope_theta, self.head_dim).frequencies / self.rope_factor)

    @property
    def window_tokens(self) -> int:
        return self.window

    @property
    def embedding_scale(self) -> float:
        return self.hidden_size**0.5

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Gemma3Config:
        """From a published `config.json`; a ValueError names whatever this file does not compute."""
        _refuse_unsupported(hf)
        full, local = _ropes(hf)
        return cls(
            **published_sizes(hf),
            mlp_size=hf["intermediate_size"],
            rope_theta=float(full.get("rope_theta", 1e6)),
            tie_embeddings=hf.get("tie_word_embeddings", True),
            window=hf["sliding_window"],
            local_rope_theta=float(local.get("rope_theta", 1e4)),
            rope_factor=float(full.get("factor", 1.0)),
            query_scale=float(hf["query_pre_attn_scalar"]),
        )

    def checkpoint(self) -> dict[str, Stored]:
        """Where each parameter lies in published files, which hold norms less 1."""
        layer, attention = "model.layers.{l}.", "model.layers.{l}.self_attn."
        names = ("attention_norm", "after_attention_norm", "mlp_norm", "after_mlp_norm")
        norms = {
            "norm": Stored("model.norm.weight", "d", "d", add=1),
            "layers.attention.q_norm": Stored(attention + "q_norm.weight", "c", "lc", add=1),
            "layers.attention.k_norm": Stored(attention + "k_norm.weight", "c", "lc", add=1),
            **{
                f"layers.{name}": Stored(f"{layer}{norm}_layernorm.weight", "d", "ld", add=1)
                for name, norm in zip(names, NORMS, strict=True)
            },
        }
        return stored_decoder(self.tie_embeddings) | stored_mlp() | norms


def _ropes(hf: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Parameters of the layers that read everything, and of the others, in either of the published forms."""
    if nested := hf.get("rope_parameters"):
        return nested["full_attention"], nested["sliding_attention"]
    full = {"rope_theta": hf.get("rope_theta", 1e6), **(hf.get("rope_scaling") or {})}
    return full, {"rope_theta": hf.get("rope_local_base_freq", 1e4)}


def _refuse_unsupported(hf: Mapping[str, Any]) -> None:
    full, local = _ropes(hf)
    kinds = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(hf["num_hidden_layers"])]
    supported = {
        "model_type": hf.get("model_type") == "gemma3_text",
        "hidden_activation": hf.get("hidden_activation", "gelu_pytorch_tanh") == "gelu_pytorch_tanh",
        "attention_bias": not hf.get("attention_bias", False),
        "layer_types": hf.get("layer_types", kinds) == kinds,
        "sliding_window_pattern": hf.get("sliding_window_pattern", 6) == 6,
        "attn_logit_softcapping": hf.get("attn_logit_softcapping") is None,
        "final_logit_softcapping": hf.get("final_logit_softcapping") is None,
        "use_bidirectional_attention": not hf.get("use_bidirectional_attention", False),
        "rope_type": full.get("rope_type", "default") in ("default", "linear")
        and local.get("rope_type", "default") == "default",
    }
    refuse_unsupported("Gemma 3", hf, supported)


class Attention(Projections):
    """Grouped-query attention over pages; heads over tp, token slots of each page over cp."""

    def __init__(self, cfg: Gemma3Config, component: str):
        super().__init__(cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim)
        self.component = component
        self.q_norm, self.k_norm = norm_weight(cfg.head_dim), norm_weight(cfg.head_dim)
        self.eps, self.scale = cfg.rms_norm_eps, cfg.query_scale**-0.5

    def __call__(self, h: Array, held: HeldFields, step: Step) -> tuple[Array, HeldFields]:
        """h: [B, T, D]; held: kv [N, ..., 2, S, K, head_dim], written before it is read."""
        view = step.views[self.component]
        q, k, v = self.qkv(h)
        q, k = rms_norm(q, self.q_norm, self.eps), rms_norm(k, self.k_norm, self.eps)
        kv = write(held["kv"], view.pages, jnp.stack([rotate(k, view), v], axis=2))
        out = attend(rotate(q, view), kv, view.pages, self.scale).astype(h.dtype)
        return project("bthc,hcd->btd", out, self.wo), {"kv": kv}


class Layer(nnx.Module):
    """Attention, then mlp, each between two norms and added to the residual."""

    def __init__(self, cfg: Gemma3Config, component: str):
        self.attention = Attention(cfg, component)
        self.mlp = GatedMlp(cfg.hidden_size, cfg.mlp_size, partial(jax.nn.gelu, approximate=True))
        self.attention_norm, self.after_attention_norm = norm_weight(cfg.hidden_size), norm_weight(cfg.hidden_size)
        self.mlp_norm, self.after_mlp_norm = norm_weight(cfg.hidden_size), norm_weight(cfg.hidden_size)
        self.eps = cfg.rms_norm_eps

    def __call__(self, h: Array, held: HeldFields, step: Step) -> tuple[Array, HeldFields]:
        out, held = self.attention(rms_norm(h, self.attention_norm, self.eps), held, step)
        h = h + rms_norm(out, self.after_attention_norm, self.eps)
        return h + rms_norm(self.mlp(rms_norm(h, self.mlp_norm, self.eps)), self.after_mlp_norm, self.eps), held


TINY["tiny-gemma3"] = Gemma3Config(**SIZES, num_layers=6, window=128)
