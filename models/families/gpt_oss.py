"""gpt-oss: a layer with a window, then one without, attention sinks, top-k of E experts with biases.

Letters in shapes, besides those of models/layers.py: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from models.decoder import FULL, WINDOW, DecoderConfig, published_sizes, refuse_unsupported, rope_kind
from models.experts import BIAS_STD, router_logits
from models.layers import (
    HeldFields,
    PreNormLayer,
    Projections,
    Rope,
    Step,
    drawn,
    project,
    rotate,
    weight,
)
from models.paged_attention import attend, write
from models.stored import Stored, stored_decoder
from models.tiny import EXPERTS, SIZES, TINY
from models.yarn import Yarn

ALPHA = 1.702  # of the gate's sigmoid


@dataclass(frozen=True)
class GptOssConfig(DecoderConfig, model_types=("gpt_oss",)):
    """mlp_size: of one expert. activation_limit: gates and values are clipped there."""

    window: int = 128
    num_experts: int = 1
    experts_per_token: int = 1
    activation_limit: float = 7.0
    yarn: Yarn | None = None

    pattern: ClassVar[tuple[str, ...]] = (WINDOW, FULL)

    def __post_init__(self):
        super().__post_init__()
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"{self.experts_per_token=} must not exceed {self.num_experts=}")

    def layer(self, kind: str) -> PreNormLayer:
        return PreNormLayer(Attention(self, kind), Experts(self), self.hidden_size, self.rms_norm_eps)

    def rope(self, component: str) -> Rope:
        return self.yarn.rope(self.rope_theta, self.head_dim) if self.yarn else super().rope(component)

    @property
    def window_tokens(self) -> int:
        return self.window

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> GptOssConfig:
        """From a published `config.json`; a ValueError names whatever this file does not compute."""
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        _refuse_unsupported(hf, rope)
        return cls(
            **published_sizes(hf),
            mlp_size=hf["intermediate_size"],
            rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 150_000.0))),
            tie_embeddings=hf.get("tie_word_embeddings", False),
            window=hf["sliding_window"],
            num_experts=hf.get("num_local_experts", hf.get("num_experts")),
            experts_per_token=hf.get("num_experts_per_tok", hf.get("experts_per_token")),
            activation_limit=float(hf.get("swiglu_limit", 7.0)),
            yarn=Yarn.published(hf, rope) if rope_kind(rope) == "yarn" else None,
        )

    def checkpoint(self) -> dict[str, Stored]:
        """Where each parameter lies in published files; u: gates and values, which take turns there."""
        attention, mlp = "model.layers.{l}.self_attn.", "model.layers.{l}.mlp."
        return stored_decoder(self.tie_embeddings) | {
            "layers.attention.bq": Stored(attention + "q_proj.bias", "hc", "lhc"),
            "layers.attention.bk": Stored(attention + "k_proj.bias", "kc", "lkc"),
            "layers.attention.bv": Stored(attention + "v_proj.bias", "kc", "lkc"),
            "layers.attention.bo": Stored(attention + "o_proj.bias", "d", "ld"),
            "layers.attention.sinks": Stored(attention + "sinks", "h", "lh"),
            "layers.mlp.router": Stored(mlp + "router.weight", "e,d", "lde"),
            "layers.mlp.router_bias": Stored(mlp + "router.bias", "e", "le"),
            "layers.mlp.gate_up": Stored(mlp + "experts.gate_up_proj", "e,d,fu", "ldefu"),
            "layers.mlp.gate_up_bias": Stored(mlp + "experts.gate_up_proj_bias", "e,fu", "lefu"),
            "layers.mlp.down": Stored(mlp + "experts.down_proj", "e,f,d", "lefd"),
            "layers.mlp.down_bias": Stored(mlp + "experts.down_proj_bias", "e,d", "led"),
        }


def _refuse_unsupported(hf: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(hf["num_hidden_layers"])]
    packed = hf.get("quantization_config")
    supported = {
        "model_type": hf.get("model_type") == "gpt_oss",
        "hidden_act": hf.get("hidden_act", "silu") == "silu",
        "attention_bias": hf.get("attention_bias", True),
        "layer_types": hf.get("layer_types", kinds) == kinds,
        "rope_type": rope_kind(rope) in ("default", "yarn"),
        "quantization_config": packed is None or packed.get("quant_method") == "mxfp4",
    }
    refuse_unsupported("gpt-oss", hf, supported)


def _bias(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    return drawn(shape, axes, 0.0, BIAS_STD)


class Attention(Projections):
    """Grouped-query attention over pages; heads over tp, token slots of each page over cp."""

    def __init__(self, cfg: GptOssConfig, component: str):
        d, h, k, c = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        super().__init__(d, h, k, c)
        self.component = component
        self.bq, self.bk, self.bv = (_bias((n, c), ("tp", None)) for n in (h, k, k))
        self.bo, self.sinks = _bias((d,), (None,)), _bias((h,), ("tp",))

    def __call__(self, h: Array, held: HeldFields, step: Step) -> tuple[Array, HeldFields]:
        """h: [B, T, D]; held: kv [N, ..., 2, S, K, head_dim], written before it is read."""
        view = step.views[self.component]
        q, k, v = (x + b[...][None, None] for x, b in zip(self.qkv(h), (self.bq, self.bk, self.bv), strict=True))
        kv = write(held["kv"], view.pages, jnp.stack([rotate(k, view), v], axis=2))
        out = attend(rotate(q, view), kv, view.pages, sinks=self.sinks[...]).astype(h.dtype)
        return project("bthc,hcd->btd", out, self.wo) + self.bo[...][None, None], {"kv": kv}


class Experts(nnx.Module):
    """Top-k of E gated experts, each expert's F over tp. Every expert is computed, and weighted by its gate or 0."""

    def __init__(self, cfg: GptOssConfig):
        d, e, f = cfg.hidden_size, cfg.num_experts, cfg.mlp_size
        self.router, self.router_bias = weight((d, e), (None, None), d), _bias((e,), (None,))
        self.gate_up, self.gate_up_bias = (
            weight((d, e, f, 2), (None, None, "tp", None), d),
            _bias((e, f, 2), (None, "tp", None)),
        )
        self.down, self.down_bias = weight((e, f, d), (None, "tp", None), f), _bias((e, d), (None, None))
        self.top_k, self.limit = cfg.experts_per_token, cfg.activation_limit

    def __call__(self, h: Array) -> Array:
        gates = self._gates(h).astype(h.dtype)
        both = jnp.einsum("btd,defu->btefu", h, self.gate_up[...]) + self.gate_up_bias[...][None, None]
        gate, up = jnp.minimum(both[..., 0], self.limit), jnp.clip(both[..., 1], -self.limit, self.limit)
        act = (up + 1) * gate * jax.nn.sigmoid(gate * ALPHA) * gates[..., None]
        return project("btef,efd->btd", act, self.down) + jnp.einsum("bte,ed->btd", gates, self.down_bias[...])

    def _gates(self, h: Array) -> Array:
        """f32[B, T, E], zero except for the top k; ties go to the lowest expert."""
        logits = router_logits(h, self.router)
        top, experts = lax.top_k(logits + self.router_bias[...].astype(jnp.float32)[None, None], self.top_k)
        hot = jax.nn.one_hot(experts, logits.shape[-1], dtype=jnp.float32)
        return (hot * jax.nn.softmax(top, axis=-1)[..., None]).sum(axis=-2)


TINY["tiny-gpt-oss"] = GptOssConfig(**SIZES, **EXPERTS, num_layers=4, window=128)
