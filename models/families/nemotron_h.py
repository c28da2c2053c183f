"""Nemotron-H: layers with Mamba2, a few with attention without positions, plain or routed mlps, each by itself.

A page of `full` holds keys and values; a state holds, of each Mamba2 layer, the last inputs of its convolutions and
what its heads remember:

    h -> z, x, b, c, dt -> convolution of x, b, c -> S = e^(-dt a) S + (dt x) b; y = S c + skip x -> norm(y silu(z))

Letters in shapes, besides those of models/layers.py: M heads of Mamba2, P entries of each, Q groups of heads that share
b and c, N entries of those, W kernel of the convolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from models.decoder import DecoderConfig, published_sizes, refuse_unsupported
from models.experts import Experts, Routing, SigmoidRouter
from models.layer_plan import FULL, STATE, Keeps, Kept
from models.layers import HeldFields, Projections, Step, drawn, norm_weight, project, rms_norm, weight
from models.paged_attention import attend, write
from models.recurrence import convolve, read_states, run_tokens, write_states
from models.stored import Stored
from models.tiny import SIZES, TINY

MLP, MOE = "mlp", "moe"
KINDS = {"linear_attention": STATE, "full_attention": FULL, "mlp": MLP, "moe": MOE}
LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}


@dataclass(frozen=True)
class NemotronHConfig(DecoderConfig, model_types=("nemotron_h",)):
    """rope_theta: not used, attention knows no positions. kinds: of the layers."""

    kinds: tuple[str, ...] = ()
    heads: int = 1
    head_size: int = 1
    groups: int = 1
    state_size: int = 1
    kernel: int = 4
    min_step: float = 0.001
    expert_size: int = 0
    shared_size: int = 0
    routing: Routing | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.heads % self.groups or len(self.kinds) != self.num_layers:
            raise ValueError(f"{self.heads=} must be a multiple of {self.groups=}, and {self.kinds=} one a layer")

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        return self.kinds

    @property
    def block_layers(self) -> int:
        """About one layer with attention a block, and two blocks at least."""
        return -(-self.num_layers // max(2, self.kinds.count(FULL)))

    def layer(self, kind: str) -> Layer:
        return Layer(self, kind)

    def keeps(self, kind: str) -> Keeps:
        before = self.kernel - 1
        state = {
            "x": Kept((before, self.heads, self.head_size), (None, "heads", None)),
            "bc": Kept((before, 2, self.groups, self.state_size), (None, None, "heads", None)),
            "memory": Kept((self.heads, self.head_size, self.state_size), ("heads", None, None), "float32"),
        }
        return {FULL: {FULL: {"kv": self.keys_and_values}}, STATE: {STATE: state}}.get(kind, {})

    @property
    def split_over_tp(self) -> dict[str, int]:
        sizes = super().split_over_tp | {"Mamba2 heads": self.heads}
        return sizes | {"expert entries": self.expert_size, "shared entries": self.shared_size}

    @property
    def split_or_repeated(self) -> dict[str, int]:
        return super().split_or_repeated | {"groups": self.groups}

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> NemotronHConfig:
        """From a published `config.json`; a ValueError names whatever this file does not compute."""
        types = hf.get("layers_block_type") or [LETTERS[letter] for letter in hf["hybrid_override_pattern"]]
        eps = hf.get("layer_norm_epsilon", hf.get("rms_norm_eps", 1e-5))
        hf = {**hf, "num_hidden_layers": len(types), "rms_norm_eps": eps, "layers_block_type": types}
        _refuse_unsupported(hf)
        has_experts = "moe" in types
        return cls(
            **published_sizes({"head_dim": hf.get("attention_head_dim"), **hf}),
            mlp_size=hf["intermediate_size"],
            rope_theta=1.0,
            tie_embeddings=hf.get("tie_word_embeddings", False),
            kinds=tuple(KINDS[name] for name in types),
            heads=hf["mamba_num_heads"],
            head_size=hf["mamba_head_dim"],
            groups=hf["n_groups"],
            state_size=hf["ssm_state_size"],
            kernel=hf["conv_kernel"],
            min_step=hf.get("time_step_min", 0.001),
            expert_size=hf["moe_intermediate_size"] if has_experts else 0,
            shared_size=hf["moe_shared_expert_intermediate_size"] if has_experts else 0,
            routing=_routing(hf) if has_experts else None,
        )

    def checkpoint(self) -> dict[str, Stored]:
        """Where each parameter lies in published files. m, p, q, n, w: M, P, Q, N, W; u: b and c."""
        mixer = "backbone.layers.{l}.mixer."
        inner, shared = self.heads * self.head_size, self.groups * self.state_size
        channels = inner + 2 * shared
        rows = inner + channels + self.heads

        def projected(axes: str, start: int) -> Stored:
            return Stored(mixer + "in_proj.weight", axes + ",d", "ld" + axes, part=(start, rows))

        def convolved(axes: str, start: int) -> tuple[Stored, Stored]:
            kernel = Stored(mixer + "conv1d.weight", axes + ",,w", f"l{axes}w", part=(start, channels))
            return kernel, Stored(mixer + "conv1d.bias", axes, "l" + axes, part=(start, channels))

        x_kernel, x_bias = convolved("mp", 0)
        bc_kernel, bc_bias = convolved("uqn", inner)
        stored = {
            "embed": Stored("backbone.embeddings.weight", "v,d", "vd"),
            "norm": Stored("backbone.norm_f.weight", "d", "d"),
            "layers.norm": Stored("backbone.layers.{l}.norm.weight", "d", "ld"),
            "layers.full.mixer.wq": Stored(mixer + "q_proj.weight", "hc,d", "ldhc"),
            "layers.full.mixer.wk": Stored(mixer + "k_proj.weight", "kc,d", "ldkc"),
            "layers.full.mixer.wv": Stored(mixer + "v_proj.weight", "kc,d", "ldkc"),
            "layers.full.mixer.wo": Stored(mixer + "o_proj.weight", "d,hc", "lhcd"),
            "layers.state.mixer.wz": projected("mp", 0),
            "layers.state.mixer.wx": projected("mp", inner),
            "layers.state.mixer.wbc": projected("uqn", 2 * inner),
            "layers.state.mixer.wdt": projected("m", inner + channels),
            "layers.state.mixer.x_kernel": x_kernel,
            "layers.state.mixer.x_bias": x_bias,
            "layers.state.mixer.bc_kernel": bc_kernel,
            "layers.state.mixer.bc_bias": bc_bias,
            "layers.state.mixer.log_decay": Stored(mixer + "A_log", "m", "lm"),
            "layers.state.mixer.step_bias": Stored(mixer + "dt_bias", "m", "lm"),
            "layers.state.mixer.skip": Stored(mixer + "D", "m", "lm"),
            "layers.state.mixer.out_norm": Stored(mixer + "norm.weight", "mp", "lmp"),
            "layers.state.mixer.wo": Stored(mixer + "out_proj.weight", "d,mp", "lmpd"),
            "layers.mlp.mixer.up": Stored(mixer + "up_proj.weight", "f,d", "ldf"),
            "layers.mlp.mixer.down": Stored(mixer + "down_proj.weight", "d,f", "lfd"),
            "layers.moe.mixer.router.weight": Stored(mixer + "gate.weight", "e,d", "lde"),
            "layers.moe.mixer.router.bias": Stored(mixer + "gate.e_score_correction_bias", "e", "le"),
            "layers.moe.mixer.experts.up": Stored(mixer + "experts.{e}.up_proj.weight", "f,d", "ldef"),
            "layers.moe.mixer.experts.down": Stored(mixer + "experts.{e}.down_proj.weight", "d,f", "lefd"),
            "layers.moe.mixer.shared.up": Stored(mixer + "shared_experts.up_proj.weight", "f,d", "ldf"),
            "layers.moe.mixer.shared.down": Stored(mixer + "shared_experts.down_proj.weight", "d,f", "lfd"),
        }
        if not self.tie_embeddings:
            stored["head"] = Stored("lm_head.weight", "v,d", "vd")
        return stored


def _routing(hf: Mapping[str, Any]) -> Routing:
    return Routing(
        num_experts=hf["n_routed_experts"],
        top_k=hf["num_experts_per_tok"],
        groups=hf.get("n_group", 1),
        top_groups=hf.get("topk_group", 1),
        normalise=hf.get("norm_topk_prob", True),
        scale=float(hf.get("routed_scaling_factor", 1.0)),
    )


def _refuse_unsupported(hf: Mapping[str, Any]) -> None:
    supported = {
        "model_type": hf.get("model_type") == "nemotron_h",
        "layers_block_type": set(hf["layers_block_type"]) <= set(KINDS) and "full_attention" in hf["layers_block_type"],
        "mamba_hidden_act": hf.get("mamba_hidden_act", "silu") == "silu",
        "mlp_hidden_act": hf.get("mlp_hidden_act", "relu2") == "relu2",
        "attention_bias": not hf.get("attention_bias", False),
        "mlp_bias": not hf.get("mlp_bias", False),
        "use_bias": not hf.get("use_bias", False),
        "mamba_proj_bias": not hf.get("mamba_proj_bias", False),
        "use_conv_bias": hf.get("use_conv_bias", True),
        "sliding_window": hf.get("sliding_window") is None,
        "moe_latent_size": hf.get("moe_latent_size") is None,
        "n_shared_experts": hf.get("n_shared_experts", 1) == 1,
        "residual_in_fp32": not hf.get("residual_in_fp32", False),
    }
    refuse_unsupported("Nemotron-H", hf, supported)


class Layer(nnx.Module):
    """Behind a norm, and added to the residual: attention, Mamba2, or an mlp."""

    def __init__(self, cfg: NemotronHConfig, kind: str):
        mixers = {FULL: Attention, STATE: Mamba2, MLP: PlainMlp, MOE: SharedExperts}
        self.mixer, self.norm, self.eps = mixers[kind](cfg), norm_weight(cfg.hidden_size), cfg.rms_norm_eps

    def __call__(self, h: Array, held: HeldFields, step: Step) -> tuple[Array, HeldFields]:
        out, held = self.mixer(rms_norm(h, self.norm, self.eps), held, step)
        return h + out, held


class Attention(Projections):
    """Grouped-query attention over pages, without positions; heads over tp, token slots of each page over cp."""

    def __init__(self, cfg: NemotronHConfig):
        super().__init__(cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim)

    def __call__(self, h: Array, held: HeldFields, step: Step) -> tuple[Array, HeldFields]:
        """h: [B, T, D]; held: kv [N, ..., 2, S, K, head_dim], written before it is read."""
        pages, (q, k, v) = step.views[FULL].pages, self.qkv(h)
        kv = write(held["kv"], pages, jnp.stack([k, v], axis=2))
        return project("bthc,hcd->btd", attend(q, kv, pages).astype(h.dtype), self.wo), {"kv": kv}


class Mamba2(nnx.Module):
    """A state space with scalar decay; heads over tp, groups too, or repeated where they do not divide."""

    def __init__(self, cfg: NemotronHConfig):
        d, m, p, q, n, w = cfg.hidden_size, cfg.heads, cfg.head_size, cfg.groups, cfg.state_size, cfg.kernel
        self.wz, self.wx = (weight((d, m, p), (None, "tp", None), d) for _ in range(2))
        self.wbc = weight((d, 2, q, n), (None, None, "tp", None), d)
        self.wdt = weight((d, m), (None, "tp"), d)
        self.x_kernel, self.x_bias = weight((m, p, w), ("tp", None, None), w), drawn((m, p), ("tp", None), 0.0, 0.3)
        self.bc_kernel = weight((2, q, n, w), (None, "tp", None, None), w)
        self.bc_bias = drawn((2, q, n), (None, "tp", None), 0.0, 0.3)
        self.log_decay, self.step_bias = drawn((m,), ("tp",), 0.5, 0.3), drawn((m,), ("tp",), -1.0, 0.5)
        self.skip, self.out_norm = drawn((m,), ("tp",), 1.0, 0.3), drawn((m, p), ("tp", None), 1.0, 0.1)
        self.wo = weight((m, p, d), ("tp", None, None), m * p)
        self.cfg = cfg

    def __call__(self, h: Array, held: HeldFields, step: Step) -> tuple[Array, HeldFields]:
        """h: [B, T, D]; held: x [N, ..., W - 1, M, P], bc [N, ..., W - 1, 2, Q, N], memory [N, ..., M, P, N]."""
        states = read_states(held, step)
        x, bc = (jnp.einsum(s, h, w[...]) for s, w in (("btd,dmp->btmp", self.wx), ("btd,duqn->btuqn", self.wbc)))
        x, states["x"] = convolve(x, states["x"], self.x_kernel[...], step.batch)
        bc, states["bc"] = convolve(bc, states["bc"], self.bc_kernel[...], step.batch)
        x, bc = (jax.nn.silu(y + bias[...][None, None]) for y, bias in ((x, self.x_bias), (bc, self.bc_bias)))
        heads_of_group = x.shape[2] // bc.shape[3]
        b, c = (jnp.repeat(bc[:, :, i], heads_of_group, axis=2) for i in range(2))
        steps = jnp.einsum("btd,dm->btm", h, self.wdt[...]).astype(jnp.float32) + self.step_bias[...][None, None]
        steps = jnp.maximum(jax.nn.softplus(steps), self.cfg.min_step)
        kept = jnp.exp(-jnp.exp(self.log_decay[...].astype(jnp.float32))[None, None] * steps)
        tokens = (x * steps[..., None], b, c, kept)
        out, states["memory"] = run_tokens(_remember, states["memory"], tokens, step.batch)
        out = out + self.skip[...][None, None, :, None] * x
        z = jnp.einsum("btd,dmp->btmp", h, self.wz[...]).astype(jnp.float32)
        out = self._norm(out * jax.nn.silu(z)) * self.out_norm[...][None, None]
        return project("btmp,mpd->btd", out.astype(h.dtype), self.wo), write_states(held, step, states)

    def _norm(self, y: Array) -> Array:
        """f32[B, T, M, P], over all entries of a group, which several ranks may share."""
        tp, (b, t, m, p) = lax.axis_size("tp"), y.shape
        num_local = max(1, self.cfg.groups // tp)
        squares = (y * y).reshape(b, t, num_local, -1).sum(axis=-1)
        if tp > self.cfg.groups:
            ranks = jnp.arange(tp) * self.cfg.groups // tp
            shares = lax.all_gather(squares, "tp", axis=3) * (ranks == ranks[lax.axis_index("tp")])[None, None, None]
            squares = shares.sum(axis=-1)
        mean = squares / (self.cfg.heads * p // self.cfg.groups)
        scale = lax.rsqrt(mean + self.cfg.rms_norm_eps)
        return y * jnp.repeat(scale, m // num_local, axis=2)[..., None]


def _remember(memory: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
    """memory: f32[B, M, P, N]; token: x [B, M, P], b and c [B, M, N], how much is kept [B, M]"""
    x, b, c, kept = token
    memory = memory * kept[..., None, None] + x[..., None] * b[..., None, :]
    return memory, (memory * c[..., None, :]).sum(axis=-1)


def _relu2(x: Array) -> Array:
    return jnp.square(jax.nn.relu(x))


class PlainMlp(nnx.Module):
    """down(relu(up)^2); F over tp."""

    def __init__(self, cfg: NemotronHConfig, size: int | None = None):
        d, f = cfg.hidden_size, size or cfg.mlp_size
        self.up, self.down = weight((d, f), (None, "tp"), d), weight((f, d), ("tp", None), f)

    def __call__(self, h: Array, held: HeldFields, step: Step) -> tuple[Array, HeldFields]:
        return project("btf,fd->btd", _relu2(h @ self.up[...]), self.down), held


class SharedExperts(nnx.Module):
    """Top-k experts, and one that every token asks."""

    def __init__(self, cfg: NemotronHConfig):
        assert cfg.routing is not None, "layers with experts need a routing"
        self.router = SigmoidRouter(cfg.hidden_size, cfg.routing)
        self.experts = Experts(cfg.hidden_size, cfg.expert_size, cfg.routing.num_experts, _relu2, is_gated=False)
        self.shared = PlainMlp(cfg, cfg.shared_size)

    def __call__(self, h: Array, held: HeldFields, step: Step) -> tuple[Array, HeldFields]:
        shared, held = self.shared(h, held, step)
        return self.experts(h, self.router(h)) + shared, held


TINY["tiny-nemotron-h"] = NemotronHConfig(
    **SIZES,
    num_layers=8,
    kinds=("state", "moe", "state", "full", "mlp", "state", "moe", "full"),
    heads=8,
    head_size=16,
    groups=2,
    state_size=16,
    expert_size=64,
    shared_size=64,
    routing=Routing(num_experts=8, top_k=2),
)
