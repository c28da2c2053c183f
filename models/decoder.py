"""What all decoders here are: layers over stages, their parameters on a mesh, and one `extend`.

Owns the layout of parameters and the order of a step. Never allocates, frees or moves a page: layers write where the
page tables and state slots say, into pools that are donated to the step.

    mesh ("cp", "tp", "pp")      stage 0 ----- h -----> stage 1 ----- h -----> last stage -----> logits, everywhere
                                 blocks over pp; in each block its layers, one after the other

Where a layer's parameters and pages are, `models/layer_plan.py` says.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

import jaxcache
from jaxcache.components import Component
from models.layer_plan import FULL, SLOTS, STATE, WINDOW, Keeps, Kept, LayerPlan
from models.layers import Held, Rope, Step, View, norm_weight, plain_rope, rms_norm, turns, weight
from models.paged_attention import BLOCK_TOKENS, GPU_BLOCK_TOKENS, ExtendBatch, plan_pages, plan_states
from models.stored import Stored

Params = dict[str, Any]
Pools = dict[str, dict[str, Array]]


FAMILIES: dict[str, type[DecoderConfig]] = {}  # by what config.json calls `model_type`


@dataclass(frozen=True)
class DecoderConfig(ABC):
    """What every family's configuration has.

        class LlamaConfig(DecoderConfig, model_types=("llama",)): ...        what is loaded of such a folder

    state_grid_tokens: with a recurrent state a request resumes at multiples of so many tokens (and of the page)
    pattern: kinds of a block's layers. Here a kind is named by its component, and keeps keys and values of it.
    """

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
    state_grid_tokens: int = 1

    pattern: ClassVar[tuple[str, ...]] = (FULL,)

    def __init_subclass__(cls, model_types: tuple[str, ...] = ()):
        for model_type in model_types:
            other = FAMILIES.get(model_type, cls)
            if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):  # it may be read again
                raise ValueError(f"there is a family {model_type!r} already: {other.__module__}.{other.__qualname__}")
            FAMILIES[model_type] = cls

    @classmethod
    @abstractmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        """From a published `config.json`; a ValueError names what is not computed here."""

    @abstractmethod
    def checkpoint(self) -> dict[str, Stored]:
        """Where each parameter lies in published files."""

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ValueError(f"{self.num_heads=} must be a multiple of {self.num_kv_heads=}, and {self.head_dim=} even")

    @abstractmethod
    def layer(self, kind: str) -> nnx.Module:
        """One layer: (h [B, T, D], {field: Held}, Step) -> (h, {field: Held})."""

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """Of each layer."""
        rounds = -(-self.num_layers // len(self.pattern))
        return (self.pattern * rounds)[: self.num_layers]

    @property
    def block_layers(self) -> int:
        """How many layers a block has: stages hold whole blocks."""
        return len(self.pattern)

    def keeps(self, kind: str) -> Keeps:
        """What a layer of this kind keeps of a page, or of a state."""
        return {kind: {"kv": self.keys_and_values}}

    @property
    def keys_and_values(self) -> Kept:
        return Kept((2, SLOTS, self.num_kv_heads, self.head_dim), (None, "slots", "heads", None))

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
    def num_streams(self) -> int:
        """Residual streams: with more than one, layers get and give [B, T, streams, D]."""
        return 1

    def leave_streams(self) -> nnx.Module | None:
        """What makes [B, T, D] of several streams, behind the last layer."""
        return None

    @property
    def split_over_tp(self) -> dict[str, int]:
        """Sizes that tp must divide."""
        return {"heads": self.num_heads, "mlp entries": self.mlp_size, "tokens": self.vocab_size}

    @property
    def split_or_repeated(self) -> dict[str, int]:
        """Sizes that tp must divide, or that must divide tp: then they are repeated."""
        return {"kv heads": self.num_kv_heads}


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


def rope_kind(rope: Mapping[str, Any]) -> str:
    """Of published parameters of a rotary embedding."""
    return rope.get("rope_type", rope.get("type", "default"))


def refuse_unsupported(family: str, hf: Mapping[str, Any], supported: Mapping[str, bool]) -> None:
    """ValueError that names each setting which is not supported, and says what `config.json` says of it."""
    told = {name: hf.get(name, hf.get("rope_parameters") or hf.get("rope_scaling")) for name in supported}
    if bad := [f"{name}={told[name]!r}" for name, is_good in supported.items() if not is_good]:
        raise ValueError(f"{family} here does not support {', '.join(bad)}")


def components(cfg: DecoderConfig, page_tokens: int, dtype: str) -> tuple[Component, ...]:
    """What the cache is told of a model: its components, unsharded."""
    return LayerPlan(cfg).components(page_tokens, dtype)


class Decoder(nnx.Module):
    """The model as one rank of a `shard_map` sees it: its parameters are that rank's shards."""

    def __init__(self, cfg: DecoderConfig):
        plan = LayerPlan(cfg)
        self.layers = nnx.Dict({kind: self._stack(cfg, plan, kind) for kind in plan.kinds})
        v, d = cfg.vocab_size, cfg.hidden_size
        self.cfg, self.plan, self.norm = cfg, plan, norm_weight(d)
        self.embed = weight((v, d), ("tp", None), d if cfg.tie_embeddings else 1)
        self.head = self.embed if cfg.tie_embeddings else weight((v, d), ("tp", None), d)
        self.leave = cfg.leave_streams()

    @staticmethod
    def _stack(cfg: DecoderConfig, plan: LayerPlan, kind: str) -> nnx.Module:
        num_layers = plan.num_blocks * plan.per_block[kind]
        make = nnx.vmap(cfg.layer, axis_size=num_layers, in_axes=None, transform_metadata={nnx.PARTITION_NAME: "pp"})
        return make(kind)

    def __call__(self, pools: Pools, batch: ExtendBatch, page_tokens: int, block_tokens: int) -> tuple[Array, Pools]:
        """pools: of this rank; returns f32[B, logits_at, V], the same on every rank."""
        sizes = (page_tokens, block_tokens)
        views = {name: self._view(name, batch, fields, *sizes) for name, fields in pools.items() if name != STATE}
        h, pools = self._run_stages(self._enter(self._embed(batch.tokens)), pools, Step(batch, views))
        columns = batch.logits_at.reshape(*batch.logits_at.shape, *(1 for _ in h.shape[2:]))
        h = jnp.take_along_axis(h, columns, axis=1, mode="clip")
        h = lax.psum(jnp.where(lax.axis_index("pp") == lax.axis_size("pp") - 1, h, 0), "pp")
        h = h if self.leave is None else self.leave(h)
        h = rms_norm(h, self.norm, self.cfg.rms_norm_eps)
        logits = jnp.einsum("bkd,vd->bkv", h, self.head[...], preferred_element_type=jnp.float32)
        return lax.all_gather(logits, "tp", axis=2, tiled=True), pools

    def _view(
        self, component: str, batch: ExtendBatch, fields: dict[str, Array], page_tokens: int, block_tokens: int
    ) -> View:
        window_tokens = self.cfg.window_tokens if component == WINDOW else None
        num_pages = next(iter(fields.values())).shape[0]
        plan = functools.partial(plan_pages, batch, component, num_pages, page_tokens, block_tokens)
        pages = plan(window_tokens)
        rates = sorted({kept.tokens_per_slot for kept in self.plan.kept[component].values()} - {1})
        shared = {rate: plan(tokens_per_slot=rate) for rate in rates}
        states = plan_states(batch, component, num_pages, page_tokens)
        return View(pages, *turns(pages.positions, self.cfg.rope(component)), shared, states)

    def _embed(self, tokens: Array) -> Array:
        """i32[B, T] -> [B, T, D]; each tp rank knows its part of the vocabulary."""
        rows = self.embed[...]
        local = tokens - lax.axis_index("tp") * rows.shape[0]
        is_local = (local >= 0) & (local < rows.shape[0])
        h = lax.psum(jnp.where(is_local[..., None], rows.at[local].get(mode="clip"), 0), "tp")
        return h if self.cfg.embedding_scale == 1 else h * jnp.asarray(self.cfg.embedding_scale, h.dtype)

    def _enter(self, h: Array) -> Array:
        """[B, T, D] -> what layers get."""
        if self.cfg.num_streams == 1:
            return h
        return jnp.broadcast_to(h[:, :, None], (*h.shape[:2], self.cfg.num_streams, h.shape[2]))

    def _run_stages(self, h: Array, pools: Pools, step: Step) -> tuple[Array, Pools]:
        """Stage after stage; a stage that is not at work skips its layers and leaves its pools alone."""
        stage, num_stages = lax.axis_index("pp"), lax.axis_size("pp")
        for active in range(num_stages):
            h, pools = lax.cond(stage == active, self._run_blocks, lambda h, pools, _: (h, pools), h, pools, step)
            h = h if active == num_stages - 1 else lax.ppermute(h, "pp", [(active, active + 1)])
        return h, pools

    def _run_blocks(self, h: Array, pools: Pools, step: Step) -> tuple[Array, Pools]:
        """The blocks of this stage. Neighbours of one kind in a loop: XLA copies a pool that one body writes twice."""
        plan, stacks = self.plan, {kind: nnx.split(layers) for kind, layers in self.layers.items()}
        num_local = next(iter(next(iter(pools.values())).values())).shape[1]
        is_full = num_local * lax.axis_size("pp") == plan.num_blocks and not plan.is_ragged
        rows = jnp.minimum(lax.axis_index("pp") * num_local + jnp.arange(num_local), plan.num_blocks)
        nothing = len(plan.kinds)

        def run_layer(h: Array, pools: Pools, kind: str, block: Array, row: Array, j: Array) -> tuple[Array, Pools]:
            graphdef, stack = stacks[kind]
            at = block * plan.per_block[kind] + jnp.asarray(plan.place_at(kind))[row, j]
            state = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, at, keepdims=False), stack)
            held, owners = {}, {}
            for component, fields in plan.keeps[kind].items():
                for name in fields:
                    place = (block,)
                    if plan.per_block[component, name] > 1:
                        place = (block, jnp.asarray(plan.place_at((component, name)))[row, j])
                    held[name], owners[name] = Held(pools[component][name], place), component
            h, held = nnx.merge(graphdef, state)(h, held, step)
            for name, component in owners.items():
                pools = {**pools, component: {**pools[component], name: held[name].pool}}
            return h, pools

        def run_place(carry: tuple[Array, Pools], block: Array, row: Array, j: Array, kinds: tuple[str, ...]):
            branches = [functools.partial(run_layer, kind=kind, block=block, row=row, j=j) for kind in kinds]
            if len(kinds) == 1 and is_full:
                return branches[0](*carry)
            chosen = jnp.asarray([*(plan.kinds.index(kind) for kind in kinds), nothing])
            is_kind = jnp.asarray(plan.kind_at)[row, j] == chosen
            return lax.switch(jnp.argmax(is_kind), [*branches, lambda h, pools: (h, pools)], *carry)

        def run_block(carry: tuple[Array, Pools], xs: tuple[Array, Array]):
            for places, kinds in plan.groups:
                run = functools.partial(run_place, block=xs[0], row=xs[1], kinds=kinds)
                if len(places) == 1:
                    carry = run(carry, j=jnp.int32(places[0]))
                else:
                    carry, _ = lax.scan(lambda c, j, run=run: (run(c, j=j), None), carry, jnp.asarray(places))
            return carry, None

        carry, _ = lax.scan(run_block, (h, pools), (jnp.arange(num_local), rows))
        return carry


def make_extend(
    cfg: DecoderConfig, mesh: Mesh, page_tokens: int, block_tokens: int | None = None
) -> Callable[[Params, Pools, ExtendBatch], tuple[Array, Pools]]:
    """Compiles, once per shape, the step that prefills chunks and decodes.

    extend(params, pools, batch) -> (logits f32[B, logits_at, V], replicated; pools)
    pools: {component: {field: [N, blocks, ...]}}, as `Cache.init_pools` makes them of `components`; donated, updated
           in place
    block_tokens: keys that attention reads at a time; None: BLOCK_TOKENS, and on GPUs GPU_BLOCK_TOKENS
    """
    _check_mesh(cfg, mesh)
    if block_tokens is None:
        block_tokens = GPU_BLOCK_TOKENS if mesh.devices.flat[0].platform == "gpu" else BLOCK_TOKENS
    if page_tokens % mesh.shape["cp"]:
        raise ValueError(f"{page_tokens=} must be a multiple of cp={mesh.shape['cp']}")
    graphdef, _ = nnx.split(_abstract_model(cfg))
    param_shardings = jax.tree.map(lambda target: target.sharding, param_targets(cfg, mesh, jnp.float32))
    param_specs = jax.tree.map(lambda sharding: sharding.spec, param_shardings)
    pool_shardings = jaxcache.pool_shardings(components(cfg, page_tokens, "float32"), mesh)
    specs = jax.tree.map(lambda sharding: sharding.spec, pool_shardings)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(param_specs, specs, P()), out_specs=(P(), specs), check_vma=False
    )
    def forward(params: Params, pools: Pools, batch: ExtendBatch) -> tuple[Array, Pools]:
        return nnx.merge(graphdef, params)(pools, batch, page_tokens, block_tokens)

    replicated = NamedSharding(mesh, P())
    in_shardings = (param_shardings, pool_shardings, replicated)
    return jax.jit(forward, donate_argnums=1, in_shardings=in_shardings, out_shardings=(replicated, pool_shardings))


def init_params(cfg: DecoderConfig, mesh: Mesh, seed: int, dtype: DTypeLike) -> Params:
    """Random parameters, sharded; the same numbers on every mesh. Each process makes all of them, one by one."""
    rng = np.random.default_rng(seed)
    params = (param for _, param in nnx.to_flat_state(nnx.state(_abstract_model(cfg))))

    def draw(target: jax.ShapeDtypeStruct) -> Array:
        param = next(params)
        return put_param(_random_values(param, rng), target)

    return jax.tree.map(draw, param_targets(cfg, mesh, dtype))


def _random_values(param: Any, rng: np.random.Generator) -> np.ndarray:
    if jnp.issubdtype(param.dtype, jnp.integer):
        return rng.integers(0, param.stop, param.shape)
    return param.mean + param.std * rng.standard_normal(param.shape, np.float32)


def put_param(values: np.ndarray, target: jax.ShapeDtypeStruct) -> Array:
    """A parameter of the shape that `abstract_params` says, sharded, cast and padded as one of `param_targets`.

    Axis 0 grows by zeros, any other by repeating each entry.
    """
    for axis, n in enumerate(target.shape[1:], start=1):
        values = np.repeat(values, n // values.shape[axis], axis=axis)
    values = np.pad(values, [(0, target.shape[0] - values.shape[0])] + [(0, 0)] * (values.ndim - 1))
    return jax.make_array_from_callback(target.shape, target.sharding, values.astype(target.dtype).__getitem__)


def abstract_params(cfg: DecoderConfig) -> Params:
    """Shapes of the parameters as published: blocks are filled up, nothing else is padded, and nothing sharded."""
    return nnx.to_pure_dict(nnx.state(_abstract_model(cfg)))


def param_targets(cfg: DecoderConfig, mesh: Mesh, dtype: DTypeLike) -> Params:
    """Shapes, dtypes and shardings of the parameters on `mesh`.

    dtype: of all but integers

    Layers are padded to whole blocks, as many on every stage. Kv heads fewer than tp are repeated, each
    tp / kv_heads times in a row: entry i of a padded axis of n is entry i * kv_heads // n.
    """
    _check_mesh(cfg, mesh)
    plan = LayerPlan(cfg)

    def padded(n: int, axis: str | None) -> int:
        if axis == "pp":
            num_blocks = -(-plan.num_blocks // mesh.shape["pp"]) * mesh.shape["pp"]
            return n // plan.num_blocks * num_blocks
        return max(n, mesh.shape["tp"]) if axis == "tp" else n

    def target(leaf: jax.ShapeDtypeStruct, spec: P) -> jax.ShapeDtypeStruct:
        shape = tuple(padded(n, axis) for n, axis in zip(leaf.shape, spec, strict=True))
        of = leaf.dtype if jnp.issubdtype(leaf.dtype, jnp.integer) else dtype
        return jax.ShapeDtypeStruct(shape, of, sharding=NamedSharding(mesh, spec))

    specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(_abstract_model(cfg))))
    return jax.tree.map(target, abstract_params(cfg), specs)


def _check_mesh(cfg: DecoderConfig, mesh: Mesh) -> None:
    if set(mesh.axis_names) != {"cp", "tp", "pp"}:
        raise ValueError(f"{mesh.axis_names=} must be cp, tp and pp")
    tp = mesh.shape["tp"]
    if not _fits(cfg, tp):
        fit = [n for n in range(1, cfg.num_heads + 1) if _fits(cfg, n)]
        sizes = [f"{n} {name}" for name, n in (cfg.split_over_tp | cfg.split_or_repeated).items()]
        repeated = " and ".join(cfg.split_or_repeated)
        raise ValueError(
            f"{tp=} does not divide {', '.join(sizes)} (of {repeated} it may be a multiple: they are repeated); "
            f"tp may be one of {fit}"
        )


def _fits(cfg: DecoderConfig, tp: int) -> bool:
    divides = math.gcd(*cfg.split_over_tp.values()) % tp == 0
    return divides and all(n % tp == 0 or tp % n == 0 for n in cfg.split_or_repeated.values())


def _abstract_model(cfg: DecoderConfig) -> Decoder:
    with nnx.use_eager_sharding(False):
        return nnx.eval_shape(lambda: Decoder(cfg))
