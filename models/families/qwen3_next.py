"""Qwen3-Next: three layers with a gated delta net, then one with gated attention, each before a mixture of experts.

A page of `full` holds keys and values; a state holds, of each delta net, the last inputs of its convolutions and what
its heads remember:

    h -> q, k, v, z, a, b -> convolution of q, k, v -> S = e^g S; S += k (beta (v - S k)); o = S q -> norm * silu(z)

Letters in shapes, besides those of models/layers.py: G key heads of a delta net, R value heads of each, W kernel of the
convolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from models.decoder import published_sizes, refuse_unsupported, rope_kind
from models.families.qwen3 import Qwen3Config, SparseMlp
from models.layer_plan import FULL, STATE, Keeps, Kept
from models.layers import (
    GatedMlp,
    HeldFields,
    PreNormLayer,
    Rope,
    Step,
    drawn,
    norm_weight,
    plain_rope,
    project,
    rms_norm,
    rotate,
    weight,
)
from models.paged_attention import attend, write
from models.recurrence import convolve, read_states, run_tokens, write_states
from models.stored import Stored, stored_decoder
from models.tiny import EXPERTS, SIZES, TINY

PERIOD = 4  # layers, of which the last reads everything


@dataclass(frozen=True)
class Qwen3NextConfig(Qwen3Config, model_types=("qwen3_next",)):
    """mlp_size: of one expert; rotary_dim: of a head, the first so many are rotated"""

    shared_mlp_size: int = 0
    rotary_dim: int = 0
    key_heads: int = 1
    value_heads: int = 1
    key_dim: int = 1
    value_dim: int = 1
    kernel: int = 4

    pattern: ClassVar[tuple[str, ...]] = (*(STATE,) * (PERIOD - 1), FULL)

    def __post_init__(self):
        super().__post_init__()
        if self.value_heads % self.key_heads:
            raise ValueError(f"{self.value_heads=} must be a multiple of {self.key_heads=}")

    def layer(self, kind: str) -> PreNormLayer:
        mixer = DeltaNet(self) if kind == STATE else GatedAttention(self)
        return PreNormLayer(mixer, SharedExperts(self), self.hidden_size, self.rms_norm_eps)

    def keeps(self, kind: str) -> Keeps:
        if kind == FULL:
            return {FULL: {"kv": self.keys_and_values}}
        before, g, v = self.kernel - 1, self.key_heads, self.value_heads
        return {
            STATE: {
                "qk": Kept((before, 2, g, self.key_dim), (None, None, "heads", None)),
                "v": Kept((before, v, self.value_dim), (None, "heads", None)),
                "memory": Kept((v, self.key_dim, self.value_dim), ("heads", None, None), "float32"),
            }
        }

    def rope(self, component: str) -> Rope:
        return plain_rope(self.rope_theta, self.rotary_dim)

    @property
    def split_over_tp(self) -> dict[str, int]:
        return super().split_over_tp | {"shared mlp entries": self.shared_mlp_size, "key heads": self.key_heads}

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Qwen3NextConfig:
        """From a published `config.json`; a ValueError names whatever this file does not compute."""
        rope = hf.get("rope_parameters") or {}
        sizes = published_sizes(hf)
        _refuse_unsupported(hf, sizes["num_layers"])
        share = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 0.25))
        return cls(
            **sizes,
            mlp_size=hf["moe_intermediate_size"],
            rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 10_000.0))),
            num_experts=hf["num_experts"],
            experts_per_token=hf["num_experts_per_tok"],
            norm_topk_prob=hf.get("norm_topk_prob", True),
            tie_embeddings=hf.get("tie_word_embeddings", False),
            shared_mlp_size=hf["shared_expert_intermediate_size"],
            rotary_dim=int(sizes["head_dim"] * share),
            key_heads=hf["linear_num_key_heads"],
            value_heads=hf["linear_num_value_heads"],
            key_dim=hf["linear_key_head_dim"],
            value_dim=hf["linear_value_head_dim"],
            kernel=hf["linear_conv_kernel_dim"],
        )

    def checkpoint(self) -> dict[str, Stored]:
        """Where each parameter lies in published files, which hold most norms less 1.

        g, r, e: G, R and a value's entries, w: W, u: query and gate, or what is learned and kept, x: all that one key
        head has of a projection
        """
        layer = "model.layers.{l}."
        attention, net, mlp = layer + "self_attn.", layer + "linear_attn.", layer + "mlp."
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        channels = 2 * keys + values
        stored = stored_decoder(self.tie_embeddings)
        stored = {name: stored[name] for name in stored if not name.startswith("layers.attention.w")}
        stored |= {
            "norm": Stored("model.norm.weight", "d", "d", add=1),
            "layers.attention_norm": Stored(layer + "input_layernorm.weight", "d", "ld", add=1),
            "layers.mlp_norm": Stored(layer + "post_attention_layernorm.weight", "d", "ld", add=1),
            "layers.full.attention.wqg": Stored(attention + "q_proj.weight", "huc,d", "ldhuc"),
            "layers.full.attention.wk": Stored(attention + "k_proj.weight", "kc,d", "ldkc"),
            "layers.full.attention.wv": Stored(attention + "v_proj.weight", "kc,d", "ldkc"),
            "layers.full.attention.wo": Stored(attention + "o_proj.weight", "d,hc", "lhcd"),
            "layers.full.attention.q_norm": Stored(attention + "q_norm.weight", "c", "lc", add=1),
            "layers.full.attention.k_norm": Stored(attention + "k_norm.weight", "c", "lc", add=1),
            "layers.state.attention.qkvz": Stored(net + "in_proj_qkvz.weight", "gx,d", "ldgx"),
            "layers.state.attention.ba": Stored(net + "in_proj_ba.weight", "gur,d", "ldgur"),
            "layers.state.attention.q_kernel": Stored(net + "conv1d.weight", "gc,,w", "lgcw", part=(0, channels)),
            "layers.state.attention.k_kernel": Stored(net + "conv1d.weight", "gc,,w", "lgcw", part=(keys, channels)),
            "layers.state.attention.v_kernel": Stored(
                net + "conv1d.weight", "gre,,w", "lgrew", part=(2 * keys, channels)
            ),
            "layers.state.attention.log_decay": Stored(net + "A_log", "gr", "lgr"),
            "layers.state.attention.step_bias": Stored(net + "dt_bias", "gr", "lgr"),
            "layers.state.attention.out_norm": Stored(net + "norm.weight", "e", "le"),
            "layers.state.attention.wo": Stored(net + "out_proj.weight", "d,gre", "lgred"),
            "layers.mlp.experts.router": Stored(mlp + "gate.weight", "e,d", "lde"),
            "layers.mlp.experts.down": Stored(mlp + "experts.{e}.down_proj.weight", "d,f", "lefd"),
            "layers.mlp.shared.down": Stored(mlp + "shared_expert.down_proj.weight", "d,f", "lfd"),
            "layers.mlp.shared_gate": Stored(mlp + "shared_expert_gate.weight", "o,d", "ldo"),
        }
        for name in ("gate", "up"):
            stored[f"layers.mlp.experts.{name}"] = Stored(f"{mlp}experts.{{e}}.{name}_proj.weight", "f,d", "ldef")
            stored[f"layers.mlp.shared.{name}"] = Stored(f"{mlp}shared_expert.{name}_proj.weight", "f,d", "ldf")
        return stored


def _refuse_unsupported(hf: Mapping[str, Any], num_layers: int) -> None:
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kinds = ["linear_attention" if (i + 1) % PERIOD else "full_attention" for i in range(num_layers)]
    supported = {
        "model_type": hf.get("model_type") == "qwen3_next",
        "hidden_act": hf.get("hidden_act", "silu") == "silu",
        "attention_bias": not hf.get("attention_bias", False),
        "layer_types": hf.get("layer_types", kinds) == kinds,
        "full_attention_interval": hf.get("full_attention_interval", PERIOD) == PERIOD,
        "rope_type": rope_kind(rope) == "default",
        "mlp_only_layers": not hf.get("mlp_only_layers"),
        "decoder_sparse_step": hf.get("decoder_sparse_step", 1) == 1,
    }
    refuse_unsupported("Qwen3-Next", hf, supported)


class GatedAttention(nnx.Module):
    """Grouped-query attention over pages, whose result is multiplied by the sigmoid of a gate; heads over tp."""

    def __init__(self, cfg: Qwen3NextConfig):
        d, h, k, c = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.wqg = weight((d, h, 2, c), (None, "tp", None, None), d)
        self.wk = weight((d, k, c), (None, "tp", None), d)
        self.wv = weight((d, k, c), (None, "tp", None), d)
        self.wo = weight((h, c, d), ("tp", None, None), h * c)
        self.q_norm, self.k_norm = norm_weight(c), norm_weight(c)
        self.eps = cfg.rms_norm_eps

    def __call__(self, h: Array, held: HeldFields, step: Step) -> tuple[Array, HeldFields]:
        """h: [B, T, D]; held: kv [N, ..., 2, S, K, head_dim], written before it is read."""
        view = step.views[FULL]
        both = jnp.einsum("btd,dhuc->bthuc", h, self.wqg[...])
        q, k = rms_norm(both[..., 0, :], self.q_norm, self.eps), jnp.einsum("btd,dkc->btkc", h, self.wk[...])
        k, v = rms_norm(k, self.k_norm, self.eps), jnp.einsum("btd,dkc->btkc", h, self.wv[...])
        kv = write(held["kv"], view.pages, jnp.stack([rotate(k, view), v], axis=2))
        out = attend(rotate(q, view), kv, view.pages).astype(h.dtype) * jax.nn.sigmoid(both[..., 1, :])
        return project("bthc,hcd->btd", out, self.wo), {"kv": kv}


class DeltaNet(nnx.Module):
    """A gated delta rule; key heads, and the value heads of each, over tp."""

    def __init__(self, cfg: Qwen3NextConfig):
        d, g, r = cfg.hidden_size, cfg.key_heads, cfg.value_heads // cfg.key_heads
        c, e, w = cfg.key_dim, cfg.value_dim, cfg.kernel
        self.qkvz = weight((d, g, 2 * c + 2 * r * e), (None, "tp", None), d)
        self.ba = weight((d, g, 2, r), (None, "tp", None, None), d)
        self.q_kernel, self.k_kernel = (weight((g, c, w), ("tp", None, None), w) for _ in range(2))
        self.v_kernel = weight((g, r, e, w), ("tp", None, None, None), w)
        self.log_decay = drawn((g, r), ("tp", None), 0.5, 0.3)
        self.step_bias = drawn((g, r), ("tp", None), -1.0, 0.5)
        self.out_norm = norm_weight(e)
        self.wo = weight((g, r, e, d), ("tp", None, None, None), g * r * e)
        self.cfg = cfg

    def __call__(self, h: Array, held: HeldFields, step: Step) -> tuple[Array, HeldFields]:
        """h: [B, T, D]; held: qk [N, ..., W - 1, 2, G, C], v [N, ..., W - 1, G R, E], memory [N, ..., G R, C, E]."""
        cfg, states = self.cfg, read_states(held, step)
        c, (b, t, _) = cfg.key_dim, h.shape
        mixed = jnp.einsum("btd,dgx->btgx", h, self.qkvz[...])
        g, r, e = *mixed.shape[2:3], cfg.value_heads // cfg.key_heads, cfg.value_dim
        qk = jnp.stack([mixed[..., :c], mixed[..., c : 2 * c]], axis=2)
        v, z = (x.reshape(b, t, g * r, e) for x in jnp.split(mixed[..., 2 * c :], 2, axis=-1))
        qk_kernel = jnp.stack([self.q_kernel[...], self.k_kernel[...]])
        qk, states["qk"] = convolve(qk, states["qk"], qk_kernel, step.batch)
        v, states["v"] = convolve(v, states["v"], self.v_kernel[...].reshape(g * r, e, -1), step.batch)
        qk, v = jax.nn.silu(qk), jax.nn.silu(v)
        q, k = (jnp.repeat(_unit(x), r, axis=2) for x in (qk[:, :, 0], qk[:, :, 1]))
        gates = jnp.einsum("btd,dgur->btugr", h, self.ba[...]).astype(jnp.float32).reshape(b, t, 2, g * r)
        rate = jnp.exp(self.log_decay[...].astype(jnp.float32)).reshape(-1)
        steps = jax.nn.softplus(gates[:, :, 1] + self.step_bias[...].astype(jnp.float32).reshape(-1)[None, None])
        tokens = (q * c**-0.5, k, v, jax.nn.sigmoid(gates[:, :, 0]), jnp.exp(-rate[None, None] * steps))
        out, states["memory"] = run_tokens(_delta_rule, states["memory"], tokens, step.batch)
        out = rms_norm(out, self.out_norm, cfg.rms_norm_eps) * jax.nn.silu(z.astype(jnp.float32))
        out = out.astype(h.dtype).reshape(b, t, g, r, e)
        return project("btgre,gred->btd", out, self.wo), write_states(held, step, states)


def _delta_rule(memory: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
    """memory: f32[B, heads, C, E]; token: q, k [B, heads, C], v [B, heads, E], shares learned and kept [B, heads]"""
    q, k, v, learned, kept = token
    memory = memory * kept[..., None, None]
    error = (v - (memory * k[..., None]).sum(axis=-2)) * learned[..., None]
    memory = memory + k[..., None] * error[..., None, :]
    return memory, (memory * q[..., None]).sum(axis=-2)


def _unit(x: Array) -> Array:
    return x * jax.lax.rsqrt((x * x).sum(axis=-1, keepdims=True) + 1e-6)


class SharedExperts(nnx.Module):
    """Top-k experts, and one that every token asks, by the sigmoid of a gate."""

    def __init__(self, cfg: Qwen3NextConfig):
        d = cfg.hidden_size
        self.experts, self.shared = SparseMlp(cfg), GatedMlp(d, cfg.shared_mlp_size, jax.nn.silu)
        self.shared_gate = weight((d, 1), (None, None), d)

    def __call__(self, h: Array) -> Array:
        return self.experts(h) + jax.nn.sigmoid(h @ self.shared_gate[...]) * self.shared(h)


TINY["tiny-qwen3-next"] = Qwen3NextConfig(
    **SIZES,
    **EXPERTS,
    num_layers=8,
    key_heads=2,
    value_heads=4,
    key_dim=16,
    value_dim=16,
    shared_mlp_size=64,
    rotary_dim=16,
)
