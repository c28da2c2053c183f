"""DeepSeek-V3.2: attention over latents that all heads share, of the keys that a sparse indexer chooses.

    norm -> latent, index key of each token -> WRITE both into their pools
         -> indexer: score every index key of the table's pages, choose the best k, the same on all ranks
         -> queries, brought into the latent space -> READ latents -> attend to the chosen -> merge over cp -> wo
         -> norm -> mlp (the first layers), or experts: routed, and shared ones that every token uses

A page holds, of every layer, two fields of the component `full`, both the same on every rank of tp:

    latent     [page_tokens, R + P]   the normed latent, of which keys and values of all heads are made, and the part of
                                      the key that is rotated, after rotation
    index_key  [page_tokens, J]       the indexer's key, after norm and rotation

or, packed in fp8, of the published sizes uint8[page_tokens, 656] and uint8[page_tokens, 132].

Letters in shapes, besides those of models/layers.py: R latent, P rotated part of a head, U the other part, V' values of
a head, Q rank of the queries, I index heads, J size of an index head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from models.decoder import FULL, SLOTS, DecoderConfig, Keeps, Kept, published_sizes, refuse_unsupported, rope_kind
from models.entries import Source, attend_entries, choose_entries, write_entries
from models.experts import Experts, Routing, SigmoidRouter
from models.layers import (
    GatedMlp,
    HeldFields,
    PreNormLayer,
    Rope,
    Step,
    View,
    drawn,
    norm_weight,
    plain_rope,
    project,
    rms_norm,
    rotate,
    weight,
)
from models.packing import Packing
from models.paged_attention import Held
from models.stored import Stored, stored_decoder, stored_mlp
from models.tiny import LATENT_SIZES, TINY
from models.yarn import Yarn, stretched_scale

DENSE, SPARSE = "dense", "sparse"  # kinds of layers
LATENT, INDEX_KEY = "latent", "index_key"  # fields of a page
INNER_EPS = 1e-6  # of the norms within attention, whatever rms_norm_eps is


@dataclass(frozen=True, kw_only=True)
class DeepseekV32Config(DecoderConfig, model_types=("deepseek_v32",)):
    """head_dim: U + P. num_kv_heads: 1, the latent. mlp_size: of a dense layer.

    dense_layers:  so many of the first layers have no experts
    index_top_k:   how many keys a token reads at most
    score_scale:   of the scores of attention
    is_packed:     whether pages hold entries packed, see models/packing.py; else as the cache's dtype says
    routing:       of the experts
    expert_size:   F of a routed expert
    shared_size:   F of all shared experts together
    """

    query_rank: int
    latent_size: int
    rotated_size: int
    value_size: int
    index_heads: int
    index_size: int
    index_top_k: int
    score_scale: float
    dense_layers: int
    routing: Routing
    expert_size: int
    shared_size: int
    yarn: Yarn | None = None
    is_packed: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.rotated_size % 2 or self.rotated_size >= self.head_dim or self.rotated_size > self.index_size:
            raise ValueError(
                f"{self.rotated_size=} must be even, less than {self.head_dim=} and at most {self.index_size=}"
            )
        if not 0 <= self.dense_layers <= self.num_layers:
            raise ValueError(f"{self.dense_layers=} must be in [0, {self.num_layers=}]")
        if self.index_top_k < 1:
            raise ValueError(f"{self.index_top_k=} must be at least 1")

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        return (DENSE,) * self.dense_layers + (SPARSE,) * (self.num_layers - self.dense_layers)

    @property
    def block_layers(self) -> int:
        return 1

    def layer(self, kind: str) -> PreNormLayer:
        mlp = GatedMlp(self.hidden_size, self.mlp_size, jax.nn.silu) if kind == DENSE else SparseMlp(self)
        return PreNormLayer(Attention(self), mlp, self.hidden_size, self.rms_norm_eps)

    def keeps(self, kind: str) -> Keeps:
        sizes = {LATENT: self.latent_size + self.rotated_size, INDEX_KEY: self.index_size}
        kept = {name: Kept((SLOTS, size), ("slots", None)) for name, size in sizes.items()}
        for name, packing in self.packings.items():
            kept[name] = Kept((SLOTS, packing.num_bytes), ("slots", None), "uint8")
        return {FULL: kept}

    @property
    def packings(self) -> dict[str, Packing]:
        """Of the fields that are packed."""
        if not self.is_packed:
            return {}
        return {LATENT: Packing(self.latent_size, self.rotated_size), INDEX_KEY: Packing(self.index_size)}

    def rope(self, component: str) -> Rope:
        args = self.rope_theta, self.rotated_size
        return self.yarn.rope(*args) if self.yarn else plain_rope(*args)

    @property
    def split_over_tp(self) -> dict[str, int]:
        experts = {"expert entries": self.expert_size, "shared expert entries": self.shared_size}
        return (
            super().split_over_tp | {"index heads": self.index_heads} | (experts if SPARSE in self.layer_kinds else {})
        )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> DeepseekV32Config:
        """From a published `config.json`; a ValueError names whatever this file does not compute."""
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        _refuse_unsupported(hf, rope)
        is_yarn, head_dim = rope_kind(rope) == "yarn", hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"]
        grown = stretched_scale(float(rope["factor"]), rope.get("mscale_all_dim") or 0.0) if is_yarn else 1.0
        routing = Routing(
            hf["n_routed_experts"],
            hf["num_experts_per_tok"],
            hf["n_group"],
            hf["topk_group"],
            hf.get("norm_topk_prob", True),
            float(hf.get("routed_scaling_factor", 1.0)),
        )
        return cls(
            **published_sizes(hf) | {"num_kv_heads": 1, "head_dim": head_dim},
            mlp_size=hf["intermediate_size"],
            rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 10_000.0))),
            tie_embeddings=hf.get("tie_word_embeddings", False),
            query_rank=hf["q_lora_rank"],
            latent_size=hf["kv_lora_rank"],
            rotated_size=hf["qk_rope_head_dim"],
            value_size=hf["v_head_dim"],
            index_heads=hf["index_n_heads"],
            index_size=hf["index_head_dim"],
            index_top_k=hf["index_topk"],
            score_scale=head_dim**-0.5 * grown**2,
            dense_layers=min(hf.get("first_k_dense_replace", 0), hf["num_hidden_layers"]),
            routing=routing,
            expert_size=hf["moe_intermediate_size"],
            shared_size=hf["moe_intermediate_size"] * hf["n_shared_experts"],
            yarn=Yarn.published(hf, rope) if is_yarn else None,
        )

    def checkpoint(self) -> dict[str, Stored]:
        """Where each parameter lies in published files; q, r, i, j as above, u: U + P or R + P, w: U + V', x: V'."""
        attention, mlp = "model.layers.{l}.self_attn.", "model.layers.{l}.mlp."
        stored = {
            name: there for name, there in stored_decoder(self.tie_embeddings).items() if ".attention.w" not in name
        }
        stored |= {
            "layers.attention.wq_down": Stored(attention + "q_a_proj.weight", "q,d", "ldq"),
            "layers.attention.q_norm": Stored(attention + "q_a_layernorm.weight", "q", "lq"),
            "layers.attention.wq": Stored(attention + "q_b_proj.weight", "hu,q", "lqhu"),
            "layers.attention.w_latent": Stored(attention + "kv_a_proj_with_mqa.weight", "u,d", "ldu"),
            "layers.attention.latent_norm": Stored(attention + "kv_a_layernorm.weight", "r", "lr"),
            "layers.attention.w_made": Stored(attention + "kv_b_proj.weight", "hw,r", "lrhw"),
            "layers.attention.wo": Stored(attention + "o_proj.weight", "d,hx", "lhxd"),
            "layers.attention.indexer.wq": Stored(attention + "indexer.wq_b.weight", "ij,q", "lqij"),
            "layers.attention.indexer.wk": Stored(attention + "indexer.wk.weight", "j,d", "ldj"),
            "layers.attention.indexer.w_heads": Stored(attention + "indexer.weights_proj.weight", "i,d", "ldi"),
            "layers.attention.indexer.k_norm": Stored(attention + "indexer.k_norm.weight", "j", "lj"),
            "layers.attention.indexer.k_norm_bias": Stored(attention + "indexer.k_norm.bias", "j", "lj"),
            "layers.mlp.router.weight": Stored(mlp + "gate.weight", "e,d", "lde"),
            "layers.mlp.router.bias": Stored(mlp + "gate.e_score_correction_bias", "e", "le"),
        }
        for name, (axes, there) in {"gate": ("df", "f,d"), "up": ("df", "f,d"), "down": ("fd", "d,f")}.items():
            routed = "ldef" if axes == "df" else "lefd"
            stored[f"layers.mlp.experts.{name}"] = Stored(f"{mlp}experts.{{e}}.{name}_proj.weight", there, routed)
            stored[f"layers.mlp.shared.{name}"] = Stored(f"{mlp}shared_experts.{name}_proj.weight", there, "l" + axes)
        return stored | stored_mlp()


def _refuse_unsupported(hf: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    num_layers = hf["num_hidden_layers"]
    num_dense = min(hf.get("first_k_dense_replace", 0), num_layers)
    kinds = [DENSE] * num_dense + [SPARSE] * (num_layers - num_dense)
    supported = {
        "model_type": hf.get("model_type") == "deepseek_v32",
        "hidden_act": hf.get("hidden_act", "silu") == "silu",
        "attention_bias": not hf.get("attention_bias", False),
        "mlp_bias": not hf.get("mlp_bias", False),
        "rope_type": rope_kind(rope) in ("default", "yarn"),
        "mlp_layer_types": (hf.get("mlp_layer_types") or kinds) == kinds,
        "layer_types": set(hf.get("layer_types") or ["indexed_attention"]) == {"indexed_attention"},
        "moe_layer_freq": hf.get("moe_layer_freq", 1) == 1,
        "scoring_func": hf.get("scoring_func", "sigmoid") == "sigmoid",
        "topk_method": hf.get("topk_method", "noaux_tc") == "noaux_tc",
        "q_lora_rank": bool(hf.get("q_lora_rank")),
        "n_shared_experts": bool(hf.get("n_shared_experts")),
    }
    refuse_unsupported("DeepSeek-V3.2", hf, supported)


class Attention(nnx.Module):
    """Query heads over tp, token slots of each page over cp; latents and the indexer are the same on every rank of tp.

    Keys and values are never made of latents: what makes them is applied to the queries, and to what was read.
    """

    def __init__(self, cfg: DeepseekV32Config):
        d, h, q, r = cfg.hidden_size, cfg.num_heads, cfg.query_rank, cfg.latent_size
        self.cfg = cfg
        self.wq_down, self.q_norm = weight((d, q), (None, None), d), norm_weight(q)
        self.wq = weight((q, h, cfg.head_dim), (None, "tp", None), q)
        self.w_latent, self.latent_norm = weight((d, r + cfg.rotated_size), (None, None), d), norm_weight(r)
        made = cfg.head_dim - cfg.rotated_size + cfg.value_size
        self.w_made = weight((r, h, made), (None, "tp", None), r)  # of a latent: keys [U], then values [V']
        self.wo = weight((h, cfg.value_size, d), ("tp", None, None), h * cfg.value_size)
        self.indexer = Indexer(cfg)

    def __call__(self, h: Array, held: HeldFields, step: Step) -> tuple[Array, HeldFields]:
        """h: [B, T, D]; held: latent [N, ..., S, R + P] and index_key [N, ..., S, J], written before they are read."""
        view = step.views[FULL]
        compressed = rms_norm(h @ self.wq_down[...], self.q_norm, INNER_EPS)
        new = {LATENT: self._latent(h, view), INDEX_KEY: self.indexer.key(h, view)}
        packings = self.cfg.packings
        held = {name: write_entries(held[name], view.pages, x, packings.get(name)) for name, x in new.items()}
        chosen = self.indexer.choose(h, compressed, held[INDEX_KEY], view)
        latents = Source(held[LATENT], view.pages, chosen, packings.get(LATENT))
        out = self._attend(compressed, latents, view).astype(h.dtype)
        return project("bthv,hvd->btd", out, self.wo), held

    def _latent(self, h: Array, view: View) -> Array:
        """[B, T, R + P]"""
        latent, rotated = jnp.split(h @ self.w_latent[...], [self.cfg.latent_size], axis=-1)
        rotated = rotate(paired(rotated)[:, :, None], view)[:, :, 0]
        return jnp.concatenate([rms_norm(latent, self.latent_norm, INNER_EPS), rotated], axis=-1)

    def _attend(self, compressed: Array, latents: Source, view: View) -> Array:
        """f32[B, T, H, V']"""
        plain = self.cfg.head_dim - self.cfg.rotated_size
        q_plain, q_rotated = jnp.split(jnp.einsum("btq,qhc->bthc", compressed, self.wq[...]), [plain], axis=-1)
        makes_keys, makes_values = jnp.split(self.w_made[...], [plain], axis=-1)
        q_latent = jnp.einsum("bthu,rhu->bthr", q_plain, makes_keys)
        q = jnp.concatenate([q_latent, rotate(paired(q_rotated), view)], axis=-1)
        mixed = attend_entries(q, (latents,), self.cfg.score_scale, value_size=self.cfg.latent_size)
        return jnp.einsum("bthr,rhv->bthv", mixed.astype(makes_values.dtype), makes_values)


class Indexer(nnx.Module):
    """Chooses the keys that a token reads, for all query heads alike; index heads over tp."""

    def __init__(self, cfg: DeepseekV32Config):
        d, q, i, j = cfg.hidden_size, cfg.query_rank, cfg.index_heads, cfg.index_size
        self.cfg = cfg
        self.wq = weight((q, i, j), (None, "tp", None), q)
        self.wk, self.w_heads = weight((d, j), (None, None), d), weight((d, i), (None, "tp"), d)
        self.k_norm = norm_weight(j)
        self.k_norm_bias = drawn((j,), (None,), 0.0, 0.1)

    def key(self, h: Array, view: View) -> Array:
        """[B, T, J]"""
        key = (h @ self.wk[...]).astype(jnp.float32)
        key = key - key.mean(axis=-1, keepdims=True)
        key = key * lax.rsqrt(jnp.mean(key * key, axis=-1, keepdims=True) + INNER_EPS)
        scale, bias = (x[...].astype(jnp.float32)[None, None] for x in (self.k_norm, self.k_norm_bias))
        return self._rotate((key * scale + bias).astype(h.dtype)[:, :, None], view)[:, :, 0]

    def choose(self, h: Array, compressed: Array, keys: Held, view: View) -> Array:
        """bool[B, T, E], see `choose_entries`."""
        cfg = self.cfg
        q = self._rotate(jnp.einsum("btq,qij->btij", compressed, self.wq[...]), view)
        weights = jnp.einsum("btd,di->bti", h, self.w_heads[...], preferred_element_type=jnp.float32)
        weights = weights * (cfg.index_heads * cfg.index_size) ** -0.5
        return choose_entries(q, weights, keys, view.pages, cfg.index_top_k, cfg.packings.get(INDEX_KEY))

    def _rotate(self, x: Array, view: View) -> Array:
        """The first entries of each head; here the halves belong together, in attention the neighbours."""
        rotated, plain = jnp.split(x, [self.cfg.rotated_size], axis=-1)
        return jnp.concatenate([rotate(rotated, view), plain], axis=-1)


class SparseMlp(nnx.Module):
    """Routed experts, and shared ones."""

    def __init__(self, cfg: DeepseekV32Config):
        d = cfg.hidden_size
        self.router = SigmoidRouter(d, cfg.routing)
        self.experts = Experts(d, cfg.expert_size, cfg.routing.num_experts, jax.nn.silu)
        self.shared = GatedMlp(d, cfg.shared_size, jax.nn.silu)

    def __call__(self, h: Array) -> Array:
        return self.experts(h, self.router(h)) + self.shared(h)


def paired(x: Array) -> Array:
    """Neighbours 0 and 1, 2 and 3, ... of the last axis become entries 0, 1, ... of its two halves."""
    return jnp.swapaxes(x.reshape(*x.shape[:-1], -1, 2), -1, -2).reshape(x.shape)


TINY["tiny-deepseek-v32"] = DeepseekV32Config(
    **LATENT_SIZES,
    num_layers=4,
    score_scale=32**-0.5,
    query_rank=48,
    latent_size=32,
    rotated_size=16,
    value_size=32,
    index_heads=16,
    index_size=32,
    index_top_k=64,
    routing=Routing(num_experts=8, top_k=2, groups=4, top_groups=2),
    expert_size=64,
    shared_size=64,
    dense_layers=1,
)
