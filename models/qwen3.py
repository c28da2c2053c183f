"""Qwen3 and Qwen3-MoE: what they cache, their parameters on a mesh, and one `extend` for prefill and decode.

Owns the parameters' layout and the forward pass. Never allocates, frees or moves a page: it writes where the page
tables say, into pools that are donated to it.

    mesh ("cp", "tp", "pp")      stage 0 ----- h -----> stage 1 ----- h -----> last stage -----> logits, everywhere
                                 layers over pp; in each layer:
    norm -> q, k, v -> WRITE k, v into the pool -> READ the table's pages -> attend -> merge over cp -> wo, sum over tp
         -> norm -> mlp, or top-k experts -> sum over tp

Letters in shapes, besides those of paged_attention: D hidden, F mlp, E experts, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxcache.components import Component, FieldSpec, FullAttention
from models.paged_attention import ExtendBatch, Pages, attend, plan_pages, write

Params = dict[str, Any]
Pools = dict[str, dict[str, Array]]
POOL_SPEC = P(None, "pp", None, "cp", "tp", None)  # [N, L, 2, page_tokens, K, head_dim]


@dataclass(frozen=True)
class Qwen3Config:
    """The architecture. num_experts 0: every layer has one dense mlp; mlp_size is that of one expert otherwise."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    rope_theta: float
    rms_norm_eps: float = 1e-6
    num_experts: int = 0
    experts_per_token: int = 0
    norm_topk_prob: bool = True
    tie_embeddings: bool = False

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ValueError(f"{self.num_heads=} must be a multiple of {self.num_kv_heads=}, and {self.head_dim=} even")
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"{self.experts_per_token=} must not exceed {self.num_experts=}")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Qwen3Config:
        """From a published `config.json`; a ValueError names whatever this file does not compute."""
        _refuse_unsupported(hf)
        rope = hf.get("rope_parameters") or {}
        moe = hf["model_type"] == "qwen3_moe"
        return cls(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=hf["num_attention_heads"],
            num_kv_heads=hf["num_key_value_heads"],
            head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            mlp_size=hf["moe_intermediate_size" if moe else "intermediate_size"],
            rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 10_000.0))),
            rms_norm_eps=hf["rms_norm_eps"],
            num_experts=hf.get("num_experts", hf.get("num_local_experts", 0)) if moe else 0,
            experts_per_token=hf["num_experts_per_tok"] if moe else 0,
            norm_topk_prob=hf.get("norm_topk_prob", False),
            tie_embeddings=hf.get("tie_word_embeddings", False),
        )


def _refuse_unsupported(hf: Mapping[str, Any]) -> None:
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    supported = {
        "model_type": hf.get("model_type") in ("qwen3", "qwen3_moe"),
        "hidden_act": hf.get("hidden_act", "silu") == "silu",
        "attention_bias": not hf.get("attention_bias", False),
        "use_sliding_window": not hf.get("use_sliding_window", False),
        "rope_type": rope.get("rope_type", rope.get("type", "default")) == "default",
        "mlp_only_layers": not hf.get("mlp_only_layers"),
        "decoder_sparse_step": hf.get("decoder_sparse_step", 1) == 1,
    }
    if bad := [f"{name}={hf.get(name, rope)!r}" for name, good in supported.items() if not good]:
        raise ValueError(f"Qwen3 here does not support {', '.join(bad)}")


def components(cfg: Qwen3Config, page_tokens: int, dtype: str) -> tuple[Component, ...]:
    """What one page holds, unsharded: keys and values of every layer."""
    shape = (cfg.num_layers, 2, page_tokens, cfg.num_kv_heads, cfg.head_dim)
    return (FullAttention("full", (FieldSpec("kv", shape, dtype, ("layers", None, "slots", "heads", None)),)),)


class Step(NamedTuple):
    """What every layer needs to know of a batch, on one rank. cos, sin: f32[B, T, 1, head_dim / 2]"""

    pages: Pages
    cos: Array
    sin: Array


def _plan_step(cfg: Qwen3Config, batch: ExtendBatch, pool: Array) -> Step:
    pages = plan_pages(batch, "full", pool)
    inverse = cfg.rope_theta ** (-np.arange(0, cfg.head_dim, 2, dtype=np.float64) / cfg.head_dim)
    angles = pages.positions.astype(jnp.float32)[..., None] * jnp.asarray(inverse, jnp.float32)[None, None]
    return Step(pages, jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None])


def _weight(shape: tuple[int, ...], axes: tuple[str | None, ...], fan_in: int) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape), out_sharding=axes, mean=0.0, std=fan_in**-0.5)


def _norm_weight(width: int) -> nnx.Param:
    return nnx.Param(jnp.zeros(width), out_sharding=(None,), mean=1.0, std=0.1)


def _rms_norm(x: Array, weight: nnx.Param, eps: float) -> Array:
    """Over the last axis, in fp32; returns x's dtype."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    scale = weight[...].astype(jnp.float32)
    return (x32 * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))).astype(x.dtype)


def _rotate(x: Array, step: Step) -> Array:
    """RoPE over halves of the last axis, in fp32. x: [B, T, heads, head_dim]; returns x's dtype."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * step.cos - b * step.sin, b * step.cos + a * step.sin], axis=-1).astype(x.dtype)


def _project(subscripts: str, x: Array, weight: nnx.Param) -> Array:
    """Back to D, from an axis that is sharded over tp; summed in fp32, returns x's dtype."""
    return lax.psum(jnp.einsum(subscripts, x, weight[...], preferred_element_type=jnp.float32), "tp").astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention over pages; heads over tp, token slots of each page over cp."""

    def __init__(self, cfg: Qwen3Config):
        d, h, k, c = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.wq = _weight((d, h, c), (None, "tp", None), d)
        self.wk = _weight((d, k, c), (None, "tp", None), d)
        self.wv = _weight((d, k, c), (None, "tp", None), d)
        self.wo = _weight((h, c, d), ("tp", None, None), h * c)
        self.q_norm, self.k_norm = _norm_weight(c), _norm_weight(c)
        self.eps = cfg.rms_norm_eps

    def __call__(self, h: Array, pool: Array, layer: Array, step: Step) -> tuple[Array, Array]:
        """h: [B, T, D]; pool: [N, L, 2, S, K, head_dim], written at `layer` before it is read."""
        q = _rms_norm(jnp.einsum("btd,dhc->bthc", h, self.wq[...]), self.q_norm, self.eps)
        k = _rms_norm(jnp.einsum("btd,dkc->btkc", h, self.wk[...]), self.k_norm, self.eps)
        v = jnp.einsum("btd,dkc->btkc", h, self.wv[...])
        pool = write(pool, layer, step.pages, jnp.stack([_rotate(k, step), v], axis=2))
        out = attend(_rotate(q, step), pool, layer, step.pages).astype(h.dtype)
        return _project("bthc,hcd->btd", out, self.wo), pool


class DenseMlp(nnx.Module):
    """SwiGLU; F over tp."""

    def __init__(self, cfg: Qwen3Config):
        d, f = cfg.hidden_size, cfg.mlp_size
        self.gate = _weight((d, f), (None, "tp"), d)
        self.up = _weight((d, f), (None, "tp"), d)
        self.down = _weight((f, d), ("tp", None), f)

    def __call__(self, h: Array) -> Array:
        act = jax.nn.silu(h @ self.gate[...]) * (h @ self.up[...])
        return _project("btf,fd->btd", act, self.down)


class SparseMlp(nnx.Module):
    """Top-k of E SwiGLU experts, each expert's F over tp. Every expert is computed, and weighted by its gate or 0."""

    def __init__(self, cfg: Qwen3Config):
        d, e, f = cfg.hidden_size, cfg.num_experts, cfg.mlp_size
        self.router = _weight((d, e), (None, None), d)
        self.gate = _weight((d, e, f), (None, None, "tp"), d)
        self.up = _weight((d, e, f), (None, None, "tp"), d)
        self.down = _weight((e, f, d), (None, "tp", None), f)
        self.top_k, self.norm_topk_prob = cfg.experts_per_token, cfg.norm_topk_prob

    def __call__(self, h: Array) -> Array:
        gates = self._gates(h).astype(h.dtype)
        act = jax.nn.silu(jnp.einsum("btd,def->btef", h, self.gate[...]))
        act = act * jnp.einsum("btd,def->btef", h, self.up[...]) * gates[..., None]
        return _project("btef,efd->btd", act, self.down)

    def _gates(self, h: Array) -> Array:
        """f32[B, T, E], zero except for the top k; ties go to the lowest expert."""
        logits = jnp.einsum("btd,de->bte", h.astype(jnp.float32), self.router[...].astype(jnp.float32))
        top, experts = lax.top_k(jax.nn.softmax(logits, axis=-1), self.top_k)
        if self.norm_topk_prob:
            top = top / top.sum(axis=-1, keepdims=True)
        return (jax.nn.one_hot(experts, logits.shape[-1], dtype=jnp.float32) * top[..., None]).sum(axis=-2)


class Layer(nnx.Module):
    """Attention, then mlp, each behind a norm and added to the residual."""

    def __init__(self, cfg: Qwen3Config):
        self.attention = Attention(cfg)
        self.mlp = SparseMlp(cfg) if cfg.num_experts else DenseMlp(cfg)
        self.attention_norm = _norm_weight(cfg.hidden_size)
        self.mlp_norm = _norm_weight(cfg.hidden_size)
        self.eps = cfg.rms_norm_eps

    def __call__(self, h: Array, pool: Array, layer: Array, step: Step) -> tuple[Array, Array]:
        out, pool = self.attention(_rms_norm(h, self.attention_norm, self.eps), pool, layer, step)
        h = h + out
        return h + self.mlp(_rms_norm(h, self.mlp_norm, self.eps)), pool


class Qwen3(nnx.Module):
    """The model as one rank of a `shard_map` sees it: its parameters are that rank's shards."""

    def __init__(self, cfg: Qwen3Config):
        make_layers = nnx.vmap(
            functools.partial(Layer, cfg), axis_size=cfg.num_layers, transform_metadata={nnx.PARTITION_NAME: "pp"}
        )
        self.layers = make_layers()
        v, d = cfg.vocab_size, cfg.hidden_size
        self.cfg, self.norm = cfg, _norm_weight(d)
        self.embed = _weight((v, d), ("tp", None), d if cfg.tie_embeddings else 1)
        self.head = self.embed if cfg.tie_embeddings else _weight((v, d), ("tp", None), d)

    def __call__(self, pool: Array, batch: ExtendBatch) -> tuple[Array, Array]:
        """pool: [N, L on this stage, 2, S, K, head_dim]; returns f32[B, logits_at, V], the same on every rank."""
        step = _plan_step(self.cfg, batch, pool)
        h, pool = self._run_stages(self._embed(batch.tokens), pool, step)
        h = jnp.take_along_axis(h, batch.logits_at[..., None], axis=1, mode="clip")
        h = lax.psum(jnp.where(lax.axis_index("pp") == lax.axis_size("pp") - 1, h, 0), "pp")
        h = _rms_norm(h, self.norm, self.cfg.rms_norm_eps)
        logits = jnp.einsum("bkd,vd->bkv", h, self.head[...], preferred_element_type=jnp.float32)
        return lax.all_gather(logits, "tp", axis=2, tiled=True), pool

    def _embed(self, tokens: Array) -> Array:
        """i32[B, T] -> [B, T, D]; each tp rank knows its part of the vocabulary."""
        rows = self.embed[...]
        local = tokens - lax.axis_index("tp") * rows.shape[0]
        is_local = (local >= 0) & (local < rows.shape[0])
        return lax.psum(jnp.where(is_local[..., None], rows.at[local].get(mode="clip"), 0), "tp")

    def _run_stages(self, h: Array, pool: Array, step: Step) -> tuple[Array, Array]:
        """Stage after stage; a stage that is not at work skips its layers and leaves its pool alone."""
        stage, num_stages = lax.axis_index("pp"), lax.axis_size("pp")
        for active in range(num_stages):
            h, pool = lax.cond(stage == active, self._run_layers, lambda h, pool, step: (h, pool), h, pool, step)
            h = h if active == num_stages - 1 else lax.ppermute(h, "pp", [(active, active + 1)])
        return h, pool

    def _run_layers(self, h: Array, pool: Array, step: Step) -> tuple[Array, Array]:
        """The layers of this stage; those that only pad the stages to equal length do nothing."""
        graphdef, state = nnx.split(self.layers)
        num_local, is_padded = pool.shape[1], pool.shape[1] * lax.axis_size("pp") != self.cfg.num_layers

        def run(carry: tuple[Array, Array], xs: tuple[nnx.State, Array]) -> tuple[tuple[Array, Array], None]:
            layer, i = nnx.merge(graphdef, xs[0]), xs[1]
            if not is_padded:
                return layer(*carry, i, step), None
            is_real = lax.axis_index("pp") * num_local + i < self.cfg.num_layers
            return lax.cond(is_real, lambda h, pool: layer(h, pool, i, step), lambda h, pool: (h, pool), *carry), None

        carry, _ = lax.scan(run, (h, pool), (state, jnp.arange(num_local)))
        return carry


def make_extend(
    cfg: Qwen3Config, mesh: Mesh, page_tokens: int
) -> Callable[[Params, Pools, ExtendBatch], tuple[Array, Pools]]:
    """Compiles, once per shape, the step that prefills chunks and decodes.

    extend(params, pools, batch) -> (logits f32[B, logits_at, V], replicated; pools)
    pools: {"full": {"kv": [N, L, 2, page_tokens, K, head_dim]}}, POOL_SPEC, L and K padded; donated, updated in place
    """
    _check_mesh(cfg, mesh)
    if page_tokens % mesh.shape["cp"]:
        raise ValueError(f"{page_tokens=} must be a multiple of cp={mesh.shape['cp']}")
    graphdef, _ = nnx.split(_abstract_model(cfg))
    param_shardings = jax.tree.map(lambda target: target.sharding, param_targets(cfg, mesh, jnp.float32))
    param_specs = jax.tree.map(lambda sharding: sharding.spec, param_shardings)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(param_specs, POOL_SPEC, P()), out_specs=(P(), POOL_SPEC), check_vma=False
    )
    def forward(params: Params, pool: Array, batch: ExtendBatch) -> tuple[Array, Array]:
        return nnx.merge(graphdef, params)(pool, batch)

    def extend(params: Params, pools: Pools, batch: ExtendBatch) -> tuple[Array, Pools]:
        logits, kv = forward(params, pools["full"]["kv"], batch)
        return logits, {"full": {"kv": kv}}

    replicated = NamedSharding(mesh, P())
    pool_shardings = {"full": {"kv": NamedSharding(mesh, POOL_SPEC)}}
    in_shardings = (param_shardings, pool_shardings, replicated)
    return jax.jit(extend, donate_argnums=1, in_shardings=in_shardings, out_shardings=(replicated, pool_shardings))


def init_params(cfg: Qwen3Config, mesh: Mesh, seed: int, dtype: DTypeLike) -> Params:
    """Random parameters, sharded; the same numbers on every mesh. Each process makes all of them, one by one."""
    rng = np.random.default_rng(seed)
    params = (param for _, param in nnx.to_flat_state(nnx.state(_abstract_model(cfg))))

    def draw(target: jax.ShapeDtypeStruct) -> Array:
        param = next(params)
        values = _pad_param(param.mean + param.std * rng.standard_normal(param.shape, np.float32), target.shape)
        return jax.make_array_from_callback(target.shape, target.sharding, values.astype(target.dtype).__getitem__)

    return jax.tree.map(draw, param_targets(cfg, mesh, dtype))


def _pad_param(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Axis 0 grows by zeros, any other by repeating each entry."""
    for axis, n in enumerate(shape[1:], start=1):
        values = np.repeat(values, n // values.shape[axis], axis=axis)
    return np.pad(values, [(0, shape[0] - values.shape[0])] + [(0, 0)] * (values.ndim - 1))


def abstract_params(cfg: Qwen3Config) -> Params:
    """Shapes of the parameters as published: nothing padded, nothing sharded."""
    return nnx.to_pure_dict(nnx.state(_abstract_model(cfg)))


def param_targets(cfg: Qwen3Config, mesh: Mesh, dtype: DTypeLike) -> Params:
    """Shapes, dtypes and shardings of the parameters on `mesh`.

    Layers are padded with zeros to a multiple of pp. Kv heads fewer than tp are repeated, each tp / kv_heads times in
    a row: entry i of a padded axis of n is entry i * kv_heads // n.
    """
    _check_mesh(cfg, mesh)

    def target(leaf: jax.ShapeDtypeStruct, spec: P) -> jax.ShapeDtypeStruct:
        shape = tuple(_padded(n, axis, mesh) for n, axis in zip(leaf.shape, spec, strict=True))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(_abstract_model(cfg))))
    return jax.tree.map(target, abstract_params(cfg), specs)


def _padded(n: int, axis: str | None, mesh: Mesh) -> int:
    if axis == "pp":
        return -(-n // mesh.shape["pp"]) * mesh.shape["pp"]
    return max(n, mesh.shape["tp"]) if axis == "tp" else n


def _check_mesh(cfg: Qwen3Config, mesh: Mesh) -> None:
    if set(mesh.axis_names) != {"cp", "tp", "pp"}:
        raise ValueError(f"{mesh.axis_names=} must be cp, tp and pp")
    tp = mesh.shape["tp"]
    if cfg.vocab_size % tp or cfg.num_heads % tp or cfg.mlp_size % tp:
        raise ValueError(f"{cfg.vocab_size=}, {cfg.num_heads=} and {cfg.mlp_size=} must be multiples of {tp=}")
    if cfg.num_kv_heads % tp and tp % cfg.num_kv_heads:
        raise ValueError(f"{cfg.num_kv_heads=} and {tp=}: one must be a multiple of the other")


def _abstract_model(cfg: Qwen3Config) -> Qwen3:
    with nnx.use_eager_sharding(False):
        return nnx.eval_shape(lambda: Qwen3(cfg))


def checkpoint(cfg: Qwen3Config) -> dict[str, tuple[str, str, str]]:
    """parameter: (its name in the published files, its axes there, the parameter's axes).

    Axes are letters as in the module docstring, in lower case (c: head_dim); a comma separates the stored dimensions.
    The name has a field for each axis that is spread over several tensors: {l} and {e}.
    """
    layer, attention = "model.layers.{l}.", "model.layers.{l}.self_attn."
    stored = {
        "embed": ("model.embed_tokens.weight", "v,d", "vd"),
        "norm": ("model.norm.weight", "d", "d"),
        "layers.attention.wq": (attention + "q_proj.weight", "hc,d", "ldhc"),
        "layers.attention.wk": (attention + "k_proj.weight", "kc,d", "ldkc"),
        "layers.attention.wv": (attention + "v_proj.weight", "kc,d", "ldkc"),
        "layers.attention.wo": (attention + "o_proj.weight", "d,hc", "lhcd"),
        "layers.attention.q_norm": (attention + "q_norm.weight", "c", "lc"),
        "layers.attention.k_norm": (attention + "k_norm.weight", "c", "lc"),
        "layers.attention_norm": (layer + "input_layernorm.weight", "d", "ld"),
        "layers.mlp_norm": (layer + "post_attention_layernorm.weight", "d", "ld"),
    }
    expert, e = ("experts.{e}.", "e") if cfg.num_experts else ("", "")
    for name in ("gate", "up"):
        stored[f"layers.mlp.{name}"] = (f"{layer}mlp.{expert}{name}_proj.weight", "f,d", f"ld{e}f")
    stored["layers.mlp.down"] = (f"{layer}mlp.{expert}down_proj.weight", "d,f", f"l{e}fd")
    if cfg.num_experts:
        stored["layers.mlp.router"] = (layer + "mlp.gate.weight", "e,d", "lde")
    if not cfg.tie_embeddings:
        stored["head"] = ("lm_head.weight", "v,d", "vd")
    return stored
