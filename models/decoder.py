"""What all decoders here are: blocks of layers over stages, their parameters on a mesh, and one `extend`.

Owns the layout of parameters and the order of a step. Never allocates, frees or moves a page: layers write where the
page tables say, into pools that are donated to the step.

    mesh ("cp", "tp", "pp")      stage 0 ----- h -----> stage 1 ----- h -----> last stage -----> logits, everywhere
                                 blocks over pp; in each block its layers, one after the other

A block is one round of the family's pattern of components, such as five layers with a window and one without:

    layer      0 1 2 3 4 5   6 7 8 9 ..        window  [N, blocks, 5, 2, page_tokens, K, head_dim]
    component  w w w w w f   w w w w ..        full    [N, blocks, 2, page_tokens, K, head_dim]

Layers beyond the last, in a block or a stage that is not full, are zero and do nothing.
"""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxcache.components import Component, FieldSpec, FullAttention, SlidingWindow
from models.layers import Rope, View, norm_weight, plain_rope, rms_norm, view, weight
from models.paged_attention import ExtendBatch, plan_pages

Params = dict[str, Any]
Pools = dict[str, dict[str, Array]]
FULL, WINDOW = "full", "window"


@dataclass(frozen=True)
class DecoderConfig(ABC):
    """What every family's configuration has. pattern: the components of a block's layers, FULL or WINDOW, FULL last."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    rope_theta: float
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False

    pattern: ClassVar[tuple[str, ...]] = (FULL,)

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ValueError(f"{self.num_heads=} must be a multiple of {self.num_kv_heads=}, and {self.head_dim=} even")

    @abstractmethod
    def layer(self) -> nnx.Module:
        """One layer: (h [B, T, D], pool, where in the pool, View) -> (h, pool)."""

    def rope(self, component: str) -> Rope:
        return plain_rope(self.rope_theta, self.head_dim)

    @property
    def window_tokens(self) -> int:
        """How many tokens a layer with a window reads, the newest included."""
        raise NotImplementedError

    @property
    def embedding_scale(self) -> float:
        return 1.0

    @property
    def num_blocks(self) -> int:
        return -(-self.num_layers // len(self.pattern))


def published_sizes(hf: Mapping[str, Any]) -> dict[str, Any]:
    """What every family's `config.json` calls alike."""
    heads = hf["num_attention_heads"]
    return {
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
        "rms_norm_eps": hf["rms_norm_eps"],
    }


def refuse_unsupported(family: str, hf: Mapping[str, Any], supported: Mapping[str, bool]) -> None:
    """ValueError that names each setting which is not supported, and says what `config.json` says of it."""
    told = {name: hf.get(name, hf.get("rope_parameters") or hf.get("rope_scaling")) for name in supported}
    if bad := [f"{name}={told[name]!r}" for name, is_good in supported.items() if not is_good]:
        raise ValueError(f"{family} here does not support {', '.join(bad)}")


def components(cfg: DecoderConfig, page_tokens: int, dtype: str) -> tuple[Component, ...]:
    """What one page holds, unsharded: keys and values of every layer of a component."""

    def fields(component: str) -> tuple[FieldSpec, ...]:
        in_block = _in_block(cfg, component)
        shape = (cfg.num_blocks, *in_block, 2, page_tokens, cfg.num_kv_heads, cfg.head_dim)
        axes = ("layers", *(None for _ in in_block), None, "slots", "heads", None)
        return (FieldSpec("kv", shape, dtype, axes),)

    full = FullAttention(FULL, fields(FULL))
    if WINDOW not in cfg.pattern:
        return (full,)
    return full, SlidingWindow(WINDOW, fields(WINDOW), window_tokens=cfg.window_tokens)


def _in_block(cfg: DecoderConfig, component: str) -> tuple[int, ...]:
    """The dimension that counts a component's layers in a block, where there are several."""
    count = cfg.pattern.count(component)
    return (count,) if count > 1 else ()


def pool_specs(cfg: DecoderConfig) -> dict[str, dict[str, P]]:
    """Of the pools of each component: [N, blocks, (layers of a block,) 2, page_tokens, K, head_dim]."""
    names = dict.fromkeys(cfg.pattern)
    return {c: {"kv": P(None, "pp", *(None for _ in _in_block(cfg, c)), None, "cp", "tp", None)} for c in names}


class Decoder(nnx.Module):
    """The model as one rank of a `shard_map` sees it: its parameters are that rank's shards."""

    def __init__(self, cfg: DecoderConfig):
        make_layers = nnx.vmap(cfg.layer, axis_size=cfg.num_layers, transform_metadata={nnx.PARTITION_NAME: "pp"})
        self.layers = make_layers()
        v, d = cfg.vocab_size, cfg.hidden_size
        self.cfg, self.norm = cfg, norm_weight(d)
        self.embed = weight((v, d), ("tp", None), d if cfg.tie_embeddings else 1)
        self.head = self.embed if cfg.tie_embeddings else weight((v, d), ("tp", None), d)

    def __call__(self, pools: dict[str, Array], batch: ExtendBatch) -> tuple[Array, dict[str, Array]]:
        """pools: by component, of this rank; returns f32[B, logits_at, V], the same on every rank."""
        views = {name: self._view(name, batch, pool) for name, pool in pools.items()}
        h, pools = self._run_stages(self._embed(batch.tokens), pools, views)
        h = jnp.take_along_axis(h, batch.logits_at[..., None], axis=1, mode="clip")
        h = lax.psum(jnp.where(lax.axis_index("pp") == lax.axis_size("pp") - 1, h, 0), "pp")
        h = rms_norm(h, self.norm, self.cfg.rms_norm_eps)
        logits = jnp.einsum("bkd,vd->bkv", h, self.head[...], preferred_element_type=jnp.float32)
        return lax.all_gather(logits, "tp", axis=2, tiled=True), pools

    def _view(self, component: str, batch: ExtendBatch, pool: Array) -> View:
        window_tokens = self.cfg.window_tokens if component == WINDOW else None
        return view(plan_pages(batch, component, pool, window_tokens), self.cfg.rope(component))

    def _embed(self, tokens: Array) -> Array:
        """i32[B, T] -> [B, T, D]; each tp rank knows its part of the vocabulary."""
        rows = self.embed[...]
        local = tokens - lax.axis_index("tp") * rows.shape[0]
        is_local = (local >= 0) & (local < rows.shape[0])
        h = lax.psum(jnp.where(is_local[..., None], rows.at[local].get(mode="clip"), 0), "tp")
        return h if self.cfg.embedding_scale == 1 else h * jnp.asarray(self.cfg.embedding_scale, h.dtype)

    def _run_stages(self, h: Array, pools: dict[str, Array], views: dict[str, View]) -> tuple[Array, dict[str, Array]]:
        """Stage after stage; a stage that is not at work skips its layers and leaves its pools alone."""
        stage, num_stages = lax.axis_index("pp"), lax.axis_size("pp")
        for active in range(num_stages):
            h, pools = lax.cond(stage == active, self._run_blocks, lambda h, pools, _: (h, pools), h, pools, views)
            h = h if active == num_stages - 1 else lax.ppermute(h, "pp", [(active, active + 1)])
        return h, pools

    def _run_blocks(self, h: Array, pools: dict[str, Array], views: dict[str, View]) -> tuple[Array, dict[str, Array]]:
        """The blocks of this stage."""
        graphdef, state = nnx.split(self.layers)
        period, num_local = len(self.cfg.pattern), next(iter(pools.values())).shape[1]
        first = lax.axis_index("pp") * num_local * period
        is_padded = num_local * period * lax.axis_size("pp") != self.cfg.num_layers

        def run_layer(h: Array, pools: dict[str, Array], state: Any, component: str, place: tuple):
            h, pool = nnx.merge(graphdef, state)(h, pools[component], place, views[component])
            return h, {**pools, component: pool}

        def run_block(carry: tuple[Array, dict[str, Array]], xs: tuple[Any, Array]):
            """Neighbours of one component in a loop: XLA copies a pool that one body writes twice."""
            blocks, i = xs
            for component, js in itertools.groupby(range(period), self.cfg.pattern.__getitem__):
                start, *rest = js
                before = self.cfg.pattern[:start].count(component)

                def run_one(carry, xs, component=component, start=start, before=before):
                    state, k = xs
                    place = (i, before + k) if _in_block(self.cfg, component) else (i,)
                    run = functools.partial(run_layer, state=state, component=component, place=place)
                    if not is_padded:
                        return run(*carry), None
                    is_real = first + i * period + start + k < self.cfg.num_layers
                    return lax.cond(is_real, run, lambda h, pools: (h, pools), *carry), None

                places = slice(start, start + 1 + len(rest))
                states = jax.tree.map(lambda x, places=places: x[places], blocks)
                if rest:
                    carry, _ = lax.scan(run_one, carry, (states, jnp.arange(1 + len(rest))))
                else:
                    carry, _ = run_one(carry, (jax.tree.map(lambda x: x[0], states), 0))
            return carry, None

        blocks = jax.tree.map(lambda x: x.reshape(num_local, period, *x.shape[1:]), state)
        carry, _ = lax.scan(run_block, (h, pools), (blocks, jnp.arange(num_local)))
        return carry


def make_extend(
    cfg: DecoderConfig, mesh: Mesh, page_tokens: int
) -> Callable[[Params, Pools, ExtendBatch], tuple[Array, Pools]]:
    """Compiles, once per shape, the step that prefills chunks and decodes.

    extend(params, pools, batch) -> (logits f32[B, logits_at, V], replicated; pools)
    pools: {component: {"kv": [N, blocks, ..., 2, page_tokens, K, head_dim]}}, see `pool_specs`, blocks and K padded;
           donated, updated in place
    """
    _check_mesh(cfg, mesh)
    if page_tokens % mesh.shape["cp"]:
        raise ValueError(f"{page_tokens=} must be a multiple of cp={mesh.shape['cp']}")
    graphdef, _ = nnx.split(_abstract_model(cfg))
    param_shardings = jax.tree.map(lambda target: target.sharding, param_targets(cfg, mesh, jnp.float32))
    param_specs = jax.tree.map(lambda sharding: sharding.spec, param_shardings)
    specs = pool_specs(cfg)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(param_specs, specs, P()), out_specs=(P(), specs), check_vma=False
    )
    def forward(params: Params, pools: Pools, batch: ExtendBatch) -> tuple[Array, Pools]:
        model = nnx.merge(graphdef, params)
        logits, written = model({name: fields["kv"] for name, fields in pools.items()}, batch)
        return logits, {name: {"kv": pool} for name, pool in written.items()}

    replicated = NamedSharding(mesh, P())
    pool_shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))
    in_shardings = (param_shardings, pool_shardings, replicated)
    return jax.jit(forward, donate_argnums=1, in_shardings=in_shardings, out_shardings=(replicated, pool_shardings))


def init_params(cfg: DecoderConfig, mesh: Mesh, seed: int, dtype: DTypeLike) -> Params:
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


def abstract_params(cfg: DecoderConfig) -> Params:
    """Shapes of the parameters as published: nothing padded, nothing sharded."""
    return nnx.to_pure_dict(nnx.state(_abstract_model(cfg)))


def param_targets(cfg: DecoderConfig, mesh: Mesh, dtype: DTypeLike) -> Params:
    """Shapes, dtypes and shardings of the parameters on `mesh`.

    Layers are padded with zeros to whole blocks, as many on every stage. Kv heads fewer than tp are repeated, each
    tp / kv_heads times in a row: entry i of a padded axis of n is entry i * kv_heads // n.
    """
    _check_mesh(cfg, mesh)

    def padded(n: int, axis: str | None) -> int:
        if axis == "pp":
            multiple = mesh.shape["pp"] * len(cfg.pattern)
            return -(-n // multiple) * multiple
        return max(n, mesh.shape["tp"]) if axis == "tp" else n

    def target(leaf: jax.ShapeDtypeStruct, spec: P) -> jax.ShapeDtypeStruct:
        shape = tuple(padded(n, axis) for n, axis in zip(leaf.shape, spec, strict=True))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(_abstract_model(cfg))))
    return jax.tree.map(target, abstract_params(cfg), specs)


def _check_mesh(cfg: DecoderConfig, mesh: Mesh) -> None:
    if set(mesh.axis_names) != {"cp", "tp", "pp"}:
        raise ValueError(f"{mesh.axis_names=} must be cp, tp and pp")
    tp = mesh.shape["tp"]
    if not _fits(cfg, tp):
        fit = [n for n in range(1, cfg.num_heads + 1) if _fits(cfg, n)]
        raise ValueError(
            f"{tp=} does not divide {cfg.num_heads} heads, {cfg.num_kv_heads} kv heads, {cfg.mlp_size} mlp entries and "
            f"{cfg.vocab_size} tokens (of kv heads it may be a multiple: they are repeated); tp may be one of {fit}"
        )


def _fits(cfg: DecoderConfig, tp: int) -> bool:
    divides = math.gcd(cfg.num_heads, cfg.mlp_size, cfg.vocab_size) % tp == 0
    return divides and (cfg.num_kv_heads % tp == 0 or tp % cfg.num_kv_heads == 0)


def _abstract_model(cfg: DecoderConfig) -> Decoder:
    with nnx.use_eager_sharding(False):
        return nnx.eval_shape(lambda: Decoder(cfg))


class Stored(NamedTuple):
    """Where a parameter lies in published files.

    name:   of its tensors, with a field for each axis that is spread over several: {l} and {e}
    stored: its axes there, a comma between the stored dimensions
    axes:   the parameter's own
    add:    what is to be added to each entry

    Axes are letters in lower case: v, d, f as in models/layers.py, l layer, h query heads, k kv heads, c head_dim, e
    expert.
    """

    name: str
    stored: str
    axes: str
    add: float = 0.0


def stored_decoder(cfg: DecoderConfig) -> dict[str, Stored]:
    """What all families here publish alike, by parameter: embeddings, projections, and the norm before attention."""
    layer, attention = "model.layers.{l}.", "model.layers.{l}.self_attn."
    stored = {
        "embed": Stored("model.embed_tokens.weight", "v,d", "vd"),
        "norm": Stored("model.norm.weight", "d", "d"),
        "layers.attention.wq": Stored(attention + "q_proj.weight", "hc,d", "ldhc"),
        "layers.attention.wk": Stored(attention + "k_proj.weight", "kc,d", "ldkc"),
        "layers.attention.wv": Stored(attention + "v_proj.weight", "kc,d", "ldkc"),
        "layers.attention.wo": Stored(attention + "o_proj.weight", "d,hc", "lhcd"),
        "layers.attention_norm": Stored(layer + "input_layernorm.weight", "d", "ld"),
        "layers.mlp_norm": Stored(layer + "post_attention_layernorm.weight", "d", "ld"),
    }
    if not cfg.tie_embeddings:
        stored["head"] = Stored("lm_head.weight", "v,d", "vd")
    return stored


def stored_mlp() -> dict[str, Stored]:
    """A `GatedMlp`, as published."""
    mlp = "model.layers.{l}.mlp."
    return {f"layers.mlp.{name}": Stored(f"{mlp}{name}_proj.weight", "f,d", "ldf") for name in ("gate", "up")} | {
        "layers.mlp.down": Stored(mlp + "down_proj.weight", "d,f", "lfd")
    }
