"""DeepSeek-V4: a window in every layer, and older tokens compressed: every 4 tokens, of which an indexer chooses, or
every 128; hyper-connections; experts that are looked up by token in the first layers.

    streams -> read one -> norm -> q (low rank), kv, one for all heads -> WRITE kv into the window's page
      compressor: projections of this chunk's tokens, and the state of the token before -> WRITE new entries, new state
      -> READ window and visible (CSA: chosen) entries, one softmax with sinks -> rotate back -> grouped projection
    -> into the streams -> read one -> norm -> routed experts and a shared one -> into the streams

What a page holds, of each layer; C is 512 and X 128 in the published model:

    component  field          shape                    of                  what it is
    window     kv             [page_tokens, C]         every layer         key and value of a token
    window     csa_state      f32[2, 3, C + X]         a layer of 4        sums after the page's last token, see
    window     hca_state      f32[3, C]                a layer of 128      models/compressor.py; half of them or all are
                                                                           empty at a page's end
    full       csa            [page_tokens / 4, C]     a layer of 4        entry of 4 tokens and of the 4 before
    full       csa_index      [page_tokens / 4, X]     a layer of 4        key of that entry for the indexer
    full       hca            [page_tokens / 128, C]   a layer of 128      entry of 128 tokens

An entry w of r tokens is at position w * r, and read by tokens t with w < (t + 1) // r. Pages are multiples of the
largest rate. Heads, index heads and output groups are over tp; what pages hold is the same on all ranks of tp.

Letters in shapes, besides those of models/layers.py: C entry and head width, R low rank of queries, I index heads, X
their width, G output groups, O low rank of a group, N streams.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jaxcache.components import Component, FieldSpec
from models.compressor import Compressor, compress, compress_overlapping, halves, joined
from models.decoder import DecoderConfig, components, published_sizes, refuse_unsupported, rope_kind
from models.entries import Source, attend_entries, choose_entries, write_entries
from models.experts import ClippedExperts, HashedRouter, SoftplusRouter
from models.hyper_connection import HyperConnection, StreamsHead
from models.layer_plan import FULL, SLOTS, WINDOW, Keeps, Kept
from models.layers import HeldFields, Rope, Step, View, drawn, norm_weight, plain_rope, project, rms_norm, turns, weight
from models.paged_attention import Held
from models.stored import Stored
from models.tiny import EXPERTS, LATENT_SIZES, TINY
from models.yarn import Yarn

CSA, HCA = "csa", "hca"
HASHED, SCORED = "hashed", "scored"
KINDS = {"sliding_attention": WINDOW, "compressed_sparse_attention": CSA, "heavily_compressed_attention": HCA}
UNKNOWN = "unknown"
RATIOS = {0: WINDOW, 4: CSA, 128: HCA}


@dataclass(frozen=True)
class DeepseekV4Config(DecoderConfig, model_types=("deepseek_v4",)):
    """Sizes besides those of all decoders.

    attention:    of each layer: "window", "csa" or "hca"
    num_hashed:   in so many layers, the first, a table says which experts compute a token
    csa_rate, hca_rate: how many tokens an entry of such a layer stands for
    rotated:      how many of a head's last entries are rotated
    far_theta:    of the rotary embedding in layers that compress; yarn stretches only that
    limit:        of what an expert multiplies
    num_blocks:   pipelines have at most so many stages that compute
    mlp_size:     of one expert
    """

    attention: tuple[str, ...] = ()
    num_hashed: int = 0
    window: int = 128
    csa_rate: int = 4
    hca_rate: int = 128
    query_rank: int = 1
    rotated: int = 2
    far_theta: float = 160_000.0
    yarn: Yarn | None = None
    groups: int = 1
    group_rank: int = 1
    index_heads: int = 1
    index_size: int = 2
    index_top_k: int = 1
    num_experts: int = 1
    experts_per_token: int = 1
    routed_scale: float = 1.0
    limit: float = 10.0
    streams: int = 2
    mix_rounds: int = 20
    mix_eps: float = 1e-6
    num_blocks: int = 2

    def __post_init__(self):
        super().__post_init__()
        if len(self.attention) != self.num_layers or not set(self.attention) <= {WINDOW, CSA, HCA}:
            raise ValueError(
                f"{self.attention=} must be one of {WINDOW}, {CSA} and {HCA} for each of {self.num_layers=}"
            )
        if self.window < 2 or self.num_kv_heads != 1 or self.streams < 2:
            raise ValueError(f"{self.window=} and {self.streams=} must be at least 2, and {self.num_kv_heads=} 1")
        if min(self.csa_rate, self.hca_rate) < 2:
            raise ValueError(f"{self.csa_rate=} and {self.hca_rate=} must be at least 2")
        if self.rotated % 2 or self.rotated > min(self.head_dim, self.index_size):
            raise ValueError(f"{self.rotated=} must be even, and within {self.head_dim=} and {self.index_size=}")
        if self.num_heads % self.groups or self.experts_per_token > self.num_experts:
            raise ValueError(
                f"{self.groups=} must divide {self.num_heads=}; {self.experts_per_token=} are of {self.num_experts=}"
            )

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """Such as csa_scored: what is read of older tokens, and who chooses experts."""
        return tuple(f"{kind}_{HASHED if i < self.num_hashed else SCORED}" for i, kind in enumerate(self.attention))

    @property
    def block_layers(self) -> int:
        """Few blocks, as all have room for as many layers of each kind."""
        return -(-self.num_layers // self.num_blocks)

    def layer(self, kind: str) -> Layer:
        return Layer(self, *kind.split("_"))

    def keeps(self, kind: str) -> Keeps:
        c, x, attention = self.head_dim, self.index_size, kind.split("_")[0]
        window = {"kv": _entries(c, 1)}
        if attention == HCA:
            window["hca_state"] = Kept((3, c), (None, None), "float32")
            return {FULL: {"hca": _entries(c, self.hca_rate)}, WINDOW: window}
        if attention == CSA:
            window["csa_state"] = Kept((2, 3, c + x), (None, None, None), "float32")
            return {FULL: {"csa": _entries(c, self.csa_rate), "csa_index": _entries(x, self.csa_rate)}, WINDOW: window}
        return {WINDOW: window}

    def rope(self, component: str) -> Rope:
        """Of `full`: in layers that compress, their window included."""
        if component == WINDOW:
            return plain_rope(self.rope_theta, self.rotated)
        return self.yarn.rope(self.far_theta, self.rotated) if self.yarn else plain_rope(self.far_theta, self.rotated)

    @property
    def window_tokens(self) -> int:
        return self.window

    @property
    def num_streams(self) -> int:
        return self.streams

    def leave_streams(self) -> StreamsHead:
        return StreamsHead(self.streams, self.hidden_size, self.mix_eps, self.rms_norm_eps)

    @property
    def split_over_tp(self) -> dict[str, int]:
        return super().split_over_tp | {"output groups": self.groups, "index heads": self.index_heads}

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> DeepseekV4Config:
        """From a published `config.json`, or one that the reference has saved, whose names differ; a ValueError names
        whatever this file does not compute."""
        near, far = _ropes(hf)
        attention = _attention(hf)
        _refuse_unsupported(hf, attention, near, far)
        rates = hf.get("compress_rates") or {}
        return cls(
            **published_sizes(hf),
            mlp_size=hf["moe_intermediate_size"],
            rope_theta=float(near["rope_theta"]),
            tie_embeddings=hf.get("tie_word_embeddings", False),
            attention=attention,
            num_hashed=_routers(hf).count("hash_moe"),
            window=hf["sliding_window"],
            csa_rate=rates.get("compressed_sparse_attention", 4),
            hca_rate=rates.get("heavily_compressed_attention", 128),
            query_rank=hf["q_lora_rank"],
            rotated=hf["qk_rope_head_dim"],
            far_theta=float(far["rope_theta"]),
            yarn=Yarn.published(hf, {"attention_factor": 1.0, **far}) if rope_kind(far) == "yarn" else None,
            groups=hf["o_groups"],
            group_rank=hf["o_lora_rank"],
            index_heads=hf["index_n_heads"],
            index_size=hf["index_head_dim"],
            index_top_k=hf["index_topk"],
            num_experts=hf["n_routed_experts"],
            experts_per_token=hf["num_experts_per_tok"],
            routed_scale=float(hf.get("routed_scaling_factor", 1.0)),
            limit=float(hf["swiglu_limit"]),
            streams=hf["hc_mult"],
            mix_rounds=hf["hc_sinkhorn_iters"],
            mix_eps=float(hf["hc_eps"]),
        )

    def checkpoint(self) -> dict[str, Stored]:
        """Where each parameter lies in published files. Letters besides those of `Stored`: r, g, o, i, x, n as above, s
        places of a group, m scores of a connection, q parts of them with a scale, t experts of a token."""
        layer, attention, mlp = "layers.{l}.", "layers.{l}.attn.", "layers.{l}.ffn."
        stored = {
            "embed": Stored("embed.weight", "v,d", "vd"),
            "norm": Stored("norm.weight", "d", "d"),
            "leave.fn": Stored("hc_head_fn", "m,nd", "mnd"),
            "leave.base": Stored("hc_head_base", "m", "m"),
            "leave.scale": Stored("hc_head_scale", "q", "q"),
            "layers.attention_norm": Stored(layer + "attn_norm.weight", "d", "ld"),
            "layers.mlp_norm": Stored(layer + "ffn_norm.weight", "d", "ld"),
            "layers.attention.wq_a": Stored(attention + "wq_a.weight", "r,d", "ldr"),
            "layers.attention.wq_b": Stored(attention + "wq_b.weight", "hc,r", "lrhc"),
            "layers.attention.wkv": Stored(attention + "wkv.weight", "c,d", "ldc"),
            "layers.attention.wo_a": Stored(attention + "wo_a.weight", "go,hc", "lgohc"),
            "layers.attention.wo_b": Stored(attention + "wo_b.weight", "d,go", "lgod"),
            "layers.attention.q_norm": Stored(attention + "q_norm.weight", "r", "lr"),
            "layers.attention.kv_norm": Stored(attention + "norm.weight", "c", "lc"),
            "layers.attention.sinks": Stored(attention + "attn_sink", "h", "lh"),
            "layers.attention.index_q": Stored(attention + "indexer.wq_b.weight", "ix,r", "lrix"),
            "layers.attention.index_weights": Stored(attention + "indexer.weights_proj.weight", "i,d", "ldi"),
            "layers.mlp.router.weight": Stored(mlp + "gate.weight", "e,d", "lde"),
            "layers.mlp.router.bias": Stored(mlp + "gate.bias", "e", "le"),
            "layers.mlp.router.table": Stored(mlp + "gate.tid2eid", "v,t", "lvt"),
        }
        if not self.tie_embeddings:
            stored["head"] = Stored("head.weight", "v,d", "vd")
        for name, there in (("compressor", "compressor."), ("index_compressor", "indexer.compressor.")):
            stored |= {
                f"layers.attention.{name}.wkv": Stored(attention + there + "wkv.weight", "c,d", "ldc"),
                f"layers.attention.{name}.wgate": Stored(attention + there + "wgate.weight", "c,d", "ldc"),
                f"layers.attention.{name}.bias": Stored(attention + there + "ape", "s,c", "lsc"),
                f"layers.attention.{name}.norm": Stored(attention + there + "norm.weight", "c", "lc"),
            }
        for name, there in (("attention", "attn"), ("mlp", "ffn")):
            stored |= {
                f"layers.{name}_streams.fn": Stored(f"{layer}hc_{there}_fn", "m,nd", "lmnd"),
                f"layers.{name}_streams.base": Stored(f"{layer}hc_{there}_base", "m", "lm"),
                f"layers.{name}_streams.scale": Stored(f"{layer}hc_{there}_scale", "q", "lq"),
            }
        for name, there in (("gate", "w1"), ("up", "w3")):
            stored[f"layers.mlp.{name}"] = Stored(f"{mlp}experts.{{e}}.{there}.weight", "f,d", "ldef")
            stored[f"layers.mlp.shared_{name}"] = Stored(f"{mlp}shared_experts.{there}.weight", "f,d", "ldf")
        stored["layers.mlp.down"] = Stored(mlp + "experts.{e}.w2.weight", "d,f", "lefd")
        stored["layers.mlp.shared_down"] = Stored(mlp + "shared_experts.w2.weight", "d,f", "lfd")
        return stored


def _entries(width: int, rate: int) -> Kept:
    return Kept((SLOTS, width), ("slots", None), tokens_per_slot=rate)


def packed_components(cfg: DeepseekV4Config, page_tokens: int) -> tuple[Component, ...]:
    """The published layout in bytes, which is declared here and not computed with: of an entry all that is not rotated
    as fp8, a scale of a byte for each 64 of them, filled up to 8, and the rotated rest as bf16; of an index key fp8 and
    one fp32 scale. States stay as they are."""
    still = cfg.head_dim - cfg.rotated
    entry_bytes, index_bytes = still + -(-still // 512) * 8 + 2 * cfg.rotated, cfg.index_size + 4

    def packed(spec: FieldSpec) -> FieldSpec:
        if "slots" not in spec.axes:
            return spec
        num_bytes = index_bytes if spec.name == "csa_index" else entry_bytes
        padding = spec.padding // spec.shape[-1] * num_bytes
        return replace(spec, shape=(*spec.shape[:-1], num_bytes), dtype="uint8", padding=padding)

    declared = components(cfg, page_tokens, "bfloat16")
    return tuple(replace(part, fields=tuple(map(packed, part.fields))) for part in declared)


def _attention(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """Of each layer; UNKNOWN for what is none of ours. Ratios are published of further layers too, which predict."""
    if (kinds := hf.get("layer_types")) is not None:
        return tuple(KINDS.get(kind, UNKNOWN) for kind in kinds)
    return tuple(RATIOS.get(ratio, UNKNOWN) for ratio in hf["compress_ratios"][: hf["num_hidden_layers"]])


def _routers(hf: Mapping[str, Any]) -> list[str]:
    layers = hf["num_hidden_layers"]
    num_hashed = min(hf.get("num_hash_layers", 0), layers)
    return hf.get("mlp_layer_types") or ["hash_moe"] * num_hashed + ["moe"] * (layers - num_hashed)


def _ropes(hf: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The rotary embeddings of layers with a window alone, and of those that compress."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if "compress" in rope:
        return rope["main"], rope["compress"]
    return {"rope_theta": hf["rope_theta"]}, {**rope, "rope_theta": hf["compress_rope_theta"]}


def _refuse_unsupported(
    hf: Mapping[str, Any], attention: tuple[str, ...], near: Mapping[str, Any], far: Mapping[str, Any]
) -> None:
    routers = _routers(hf)
    supported = {
        "model_type": hf.get("model_type") == "deepseek_v4",
        "layer_types": UNKNOWN not in attention or "layer_types" not in hf,
        "compress_ratios": UNKNOWN not in attention or "layer_types" in hf,
        "mlp_layer_types": routers == sorted(routers) and set(routers) <= {"hash_moe", "moe"},
        "rope_parameters": rope_kind(near) == "default" and rope_kind(far) in ("default", "yarn"),
        "scoring_func": hf.get("scoring_func") == "sqrtsoftplus",
        "topk_method": hf.get("topk_method", "noaux_tc") == "noaux_tc",
        "norm_topk_prob": hf.get("norm_topk_prob", True),
        "n_shared_experts": hf.get("n_shared_experts") == 1,
        "hidden_act": hf.get("hidden_act", "silu") == "silu",
        "attention_bias": not hf.get("attention_bias", False),
        "mlp_bias": not hf.get("mlp_bias", False),
    }
    refuse_unsupported("DeepSeek-V4", hf, supported)


def rotate_last(x: Array, cos: Array, sin: Array) -> Array:
    """Turns neighbouring pairs of the last entries, in fp32. x: [B, T, heads, C]; cos, sin: f32[B, T, 1, pairs]"""
    pairs = cos.shape[-1]
    still, moved = x[..., : -2 * pairs], x[..., -2 * pairs :].astype(jnp.float32)
    a, b = moved[..., ::2], moved[..., 1::2]
    moved = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(moved.shape)
    return jnp.concatenate([still, moved.astype(x.dtype)], axis=-1)


def _rms(x: Array, eps: float) -> Array:
    return (x * lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True) + eps)).astype(x.dtype)


class Layer(nnx.Module):
    def __init__(self, cfg: DeepseekV4Config, attention: str, router: str):
        n, d, eps = cfg.streams, cfg.hidden_size, cfg.rms_norm_eps
        self.attention = {WINDOW: Attention, CSA: SparseAttention, HCA: DenseAttention}[attention](cfg)
        self.mlp = ClippedExperts(d, cfg.mlp_size, self._router(cfg, router), cfg.limit)
        self.attention_norm, self.mlp_norm = norm_weight(d), norm_weight(d)
        self.attention_streams, self.mlp_streams = (
            HyperConnection(n, d, cfg.mix_rounds, cfg.mix_eps, eps) for _ in range(2)
        )
        self.eps = eps

    @staticmethod
    def _router(cfg: DeepseekV4Config, router: str) -> SoftplusRouter | HashedRouter:
        sizes = (cfg.hidden_size, cfg.num_experts, cfg.experts_per_token, cfg.routed_scale)
        return HashedRouter(*sizes, cfg.vocab_size) if router == HASHED else SoftplusRouter(*sizes)

    def __call__(self, h: Array, held: HeldFields, step: Step) -> tuple[Array, HeldFields]:
        """h: [B, T, N, D]"""
        x, back = self.attention_streams(h)
        out, held = self.attention(rms_norm(x, self.attention_norm, self.eps), held, step)
        h = back.merge(h, out)
        x, back = self.mlp_streams(h)
        return back.merge(h, self.mlp(rms_norm(x, self.mlp_norm, self.eps), step.batch.tokens)), held


class Attention(nnx.Module):
    """Over the window alone, and what all kinds share."""

    def __init__(self, cfg: DeepseekV4Config):
        d, h, c, r = cfg.hidden_size, cfg.num_heads, cfg.head_dim, cfg.query_rank
        g, o = cfg.groups, cfg.group_rank
        self.wq_a, self.wq_b = weight((d, r), (None, None), d), weight((r, h, c), (None, "tp", None), r)
        self.wkv = weight((d, c), (None, None), d)
        self.wo_a = weight((g, o, h // g, c), ("tp", None, None, None), h // g * c)
        self.wo_b = weight((g, o, d), ("tp", None, None), g * o)
        self.q_norm, self.kv_norm = norm_weight(r), norm_weight(c)
        self.sinks = drawn((h,), ("tp",), 0.0, 1.0)
        self.eps, self.scale = cfg.rms_norm_eps, c**-0.5

    def view(self, step: Step) -> View:
        """Whose rotary embedding is used."""
        return step.views[WINDOW]

    def compress(self, x: Array, low: Array, held: HeldFields, step: Step) -> tuple[tuple[Source, ...], HeldFields]:
        """What is read besides the window, and what is kept then. low: [B, T, R], of queries"""
        return (), held

    def __call__(self, x: Array, held: HeldFields, step: Step) -> tuple[Array, HeldFields]:
        """x: [B, T, D]; pools are written before they are read."""
        view, window = self.view(step), step.views[WINDOW].pages
        low = rms_norm(x @ self.wq_a[...], self.q_norm, self.eps)
        q = _rms(jnp.einsum("btr,rhc->bthc", low, self.wq_b[...]), self.eps)
        kv = rms_norm(x @ self.wkv[...], self.kv_norm, self.eps)
        kv = rotate_last(kv[:, :, None], view.cos, view.sin)[:, :, 0]
        held = {**held, "kv": write_entries(held["kv"], window, kv)}
        older, held = self.compress(x, low, held, step)
        sources = (Source(held["kv"], window), *older)
        out = attend_entries(rotate_last(q, view.cos, view.sin), sources, self.scale, self.sinks[...])
        out = rotate_last(out, view.cos, -view.sin).astype(x.dtype)
        groups, _, heads, c = self.wo_a.shape
        out = jnp.einsum("btghc,gohc->btgo", out.reshape(*x.shape[:2], groups, heads, c), self.wo_a[...])
        return project("btgo,god->btd", out, self.wo_b), held


class CompressedAttention(Attention):
    """Reads entries of older tokens too."""

    def __init__(self, cfg: DeepseekV4Config):
        super().__init__(cfg)
        self.cfg = cfg

    def view(self, step: Step) -> View:
        return step.views[FULL]

    def write(self, entries: Array, norm: nnx.Param, held: Held, rate: int, step: Step) -> Held:
        """Norms and rotates the entries that are complete with this chunk, [B, T', C], and puts them into pages."""
        entries = rms_norm(entries, norm, self.eps)
        places = (step.batch.starts // rate)[:, None] + jnp.arange(entries.shape[1], dtype=jnp.int32)[None]
        entries = rotate_last(entries[:, :, None], *turns(places * rate, self.cfg.rope(FULL)))[:, :, 0]
        return write_entries(held, step.views[FULL].shared[rate], entries)


class DenseAttention(CompressedAttention):
    """Reads all entries: HCA."""

    def __init__(self, cfg: DeepseekV4Config):
        super().__init__(cfg)
        self.compressor = Compressor(cfg.hidden_size, cfg.head_dim, cfg.head_dim, cfg.hca_rate)

    def compress(self, x: Array, low: Array, held: HeldFields, step: Step) -> tuple[tuple[Source, ...], HeldFields]:
        rate, view = self.cfg.hca_rate, step.views[FULL]
        tokens = self.compressor.project(x, view.pages.positions)
        entries, state = compress(tokens, held["hca_state"], step.views[WINDOW].states, step.batch, rate)
        hca = self.write(entries.astype(x.dtype), self.compressor.norm, held["hca"], rate, step)
        return (Source(hca, view.shared[rate]),), {**held, "hca": hca, "hca_state": state}


class SparseAttention(CompressedAttention):
    """Reads the entries that the indexer chooses: CSA."""

    def __init__(self, cfg: DeepseekV4Config):
        super().__init__(cfg)
        d, r, c, i, x = cfg.hidden_size, cfg.query_rank, cfg.head_dim, cfg.index_heads, cfg.index_size
        self.compressor = Compressor(d, 2 * c, c, cfg.csa_rate)
        self.index_compressor = Compressor(d, 2 * x, x, cfg.csa_rate)
        self.index_q, self.index_weights = weight((r, i, x), (None, "tp", None), r), weight((d, i), (None, "tp"), d)

    def compress(self, x: Array, low: Array, held: HeldFields, step: Step) -> tuple[tuple[Source, ...], HeldFields]:
        cfg, rate, view = self.cfg, self.cfg.csa_rate, step.views[FULL]
        sides = (halves(of.project(x, view.pages.positions)) for of in (self.compressor, self.index_compressor))
        earlier, own = (joined(*both) for both in zip(*sides, strict=True))
        entries, state = compress_overlapping(
            earlier, own, held["csa_state"], step.views[WINDOW].states, step.batch, rate
        )
        entries, keys = jnp.split(entries.astype(x.dtype), (cfg.head_dim,), axis=-1)
        csa = self.write(entries, self.compressor.norm, held["csa"], rate, step)
        index = self.write(keys, self.index_compressor.norm, held["csa_index"], rate, step)
        q = rotate_last(jnp.einsum("btr,rix->btix", low, self.index_q[...]), view.cos, view.sin)
        scale = (cfg.index_heads * cfg.index_size) ** -0.5
        weights = jnp.einsum("btd,di->bti", x, self.index_weights[...]).astype(jnp.float32) * scale
        chosen = choose_entries(q, weights, index, view.shared[rate], cfg.index_top_k)
        return (Source(csa, view.shared[rate], chosen),), {**held, "csa": csa, "csa_index": index, "csa_state": state}


TINY["tiny-deepseek-v4"] = DeepseekV4Config(  # pages must be multiples of 16 tokens
    **LATENT_SIZES,
    **EXPERTS,
    num_layers=4,
    attention=("window", "csa", "hca", "csa"),
    hca_rate=16,
    num_hashed=1,
    query_rank=64,
    rotated=16,
    groups=2,
    group_rank=32,
    index_heads=4,
    index_size=32,
    index_top_k=16,
)
