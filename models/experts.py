"""Routed experts: which of them compute a token, and what they compute. Each expert's F over tp.

Every expert is computed, and weighted by its gate or 0. In shapes E is the number of experts; others as in
models/layers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from models.layers import drawn, project, weight

BIAS_STD = 0.1  # of random parameters


def router_logits(h: Array, router: nnx.Param) -> Array:
    """[B, T, D] by [D, E] -> f32[B, T, E], computed in fp32"""
    return jnp.einsum("btd,de->bte", h.astype(jnp.float32), router[...].astype(jnp.float32))


def top_k_gates(scores: Array, weights: Array, top_k: int) -> Array:
    """f32[B, T, E]: the weights of the k experts with the largest scores, 0 elsewhere; ties go to the lowest expert."""
    _, experts = lax.top_k(scores, top_k)
    return jax.nn.one_hot(experts, scores.shape[-1], dtype=jnp.float32).sum(axis=-2) * weights


@dataclass(frozen=True)
class Routing:
    """How sigmoid scores choose experts.

    groups, top_groups: experts lie in groups, of which only so many are chosen from: those with the largest sums of
                        their two best
    normalise:          gates of a token sum to `scale`
    """

    num_experts: int
    top_k: int
    groups: int = 1
    top_groups: int = 1
    normalise: bool = True
    scale: float = 1.0

    def __post_init__(self):
        if self.num_experts % self.groups or not 1 <= self.top_groups <= self.groups:
            raise ValueError(
                f"{self.num_experts=} must be a multiple of {self.groups} groups, {self.top_groups=} of them"
            )
        if not 1 <= self.top_k <= (open_to_all := self.num_experts // self.groups * self.top_groups):
            raise ValueError(f"{self.top_k} of {open_to_all} experts cannot be chosen")


class SigmoidRouter(nnx.Module):
    """Scores are sigmoids; a bias corrects which experts are chosen, not how much they count."""

    def __init__(self, d: int, routing: Routing):
        self.weight = weight((d, routing.num_experts), (None, None), d)
        self.bias = drawn((routing.num_experts,), (None,), 0.0, BIAS_STD)
        self.routing = routing

    def __call__(self, h: Array) -> Array:
        """[B, T, D] -> f32[B, T, E], zero except for the chosen."""
        routing = self.routing
        scores = jax.nn.sigmoid(router_logits(h, self.weight))
        choice = scores + self.bias[...].astype(jnp.float32)[None, None]
        if routing.groups > 1:
            grouped = choice.reshape(*choice.shape[:-1], routing.groups, -1)
            best_two = lax.top_k(grouped, 2)[0].sum(axis=-1)
            is_open = top_k_gates(best_two, jnp.ones_like(best_two), routing.top_groups) > 0
            choice = jnp.where(is_open[..., None], grouped, -jnp.inf).reshape(choice.shape)
        gates = top_k_gates(choice, scores, routing.top_k)
        return _sum_to(gates, routing.scale) if routing.normalise else gates * routing.scale


class Experts(nnx.Module):
    """E mlps. is_gated: activation(gate) * up, then down; else activation(up), then down."""

    def __init__(self, d: int, f: int, num_experts: int, activation: Callable[[Array], Array], is_gated: bool = True):
        if is_gated:
            self.gate = weight((d, num_experts, f), (None, None, "tp"), d)
        self.up = weight((d, num_experts, f), (None, None, "tp"), d)
        self.down = weight((num_experts, f, d), (None, "tp", None), f)
        self.activation, self.is_gated = activation, is_gated

    def __call__(self, h: Array, gates: Array) -> Array:
        """h: [B, T, D]; gates: f32[B, T, E]"""
        act = jnp.einsum("btd,def->btef", h, self.up[...])
        if self.is_gated:
            act = self.activation(jnp.einsum("btd,def->btef", h, self.gate[...])) * act
        else:
            act = self.activation(act)
        return project("btef,efd->btd", act * gates.astype(h.dtype)[..., None], self.down)


class SoftplusRouter(nnx.Module):
    """Scores are square roots of softplus; a bias corrects which experts are chosen, not how much they count.

    Gates of a token sum to `scale`.
    """

    def __init__(self, d: int, num_experts: int, top_k: int, scale: float):
        self.weight = weight((d, num_experts), (None, None), d)
        self.bias = drawn((num_experts,), (None,), 0.0, BIAS_STD)
        self.top_k, self.scale = top_k, scale

    def __call__(self, h: Array, tokens: Array) -> Array:
        """[B, T, D], i32[B, T] -> f32[B, T, E], zero except for the chosen."""
        scores = _softplus_scores(h, self.weight)
        gates = top_k_gates(scores + self.bias[...].astype(jnp.float32)[None, None], scores, self.top_k)
        return _sum_to(gates, self.scale)


class HashedRouter(nnx.Module):
    """The same scores, but a table names the experts of each token of the vocabulary."""

    def __init__(self, d: int, num_experts: int, top_k: int, scale: float, vocab_size: int):
        self.weight = weight((d, num_experts), (None, None), d)
        self.table = nnx.Param(jnp.zeros((vocab_size, top_k), jnp.int32), out_sharding=(None, None), stop=num_experts)
        self.scale = scale

    def __call__(self, h: Array, tokens: Array) -> Array:
        """[B, T, D], i32[B, T] -> f32[B, T, E], zero except for the chosen."""
        experts = self.table[...].at[tokens].get(mode="clip")
        scores = _softplus_scores(h, self.weight)
        return _sum_to(jax.nn.one_hot(experts, scores.shape[-1], dtype=jnp.float32).sum(axis=-2) * scores, self.scale)


def _softplus_scores(h: Array, router: nnx.Param) -> Array:
    return jnp.sqrt(jax.nn.softplus(router_logits(h, router)))


def _sum_to(gates: Array, scale: float) -> Array:
    return gates / (gates.sum(axis=-1, keepdims=True) + 1e-20) * scale


class ClippedExperts(nnx.Module):
    """E gated mlps, of which a router weighs some, and one that computes all tokens; what they multiply is clipped."""

    def __init__(self, d: int, f: int, router: SoftplusRouter | HashedRouter, limit: float):
        self.router, self.limit, e = router, limit, router.weight.shape[-1]
        self.gate, self.up = (weight((d, e, f), (None, None, "tp"), d) for _ in range(2))
        self.down = weight((e, f, d), (None, "tp", None), f)
        self.shared_gate, self.shared_up = (weight((d, f), (None, "tp"), d) for _ in range(2))
        self.shared_down = weight((f, d), ("tp", None), f)

    def __call__(self, h: Array, tokens: Array) -> Array:
        """[B, T, D], i32[B, T] -> [B, T, D]"""
        gates = self.router(h, tokens).astype(h.dtype)
        gate, up = (jnp.einsum("btd,def->btef", h, w[...]) for w in (self.gate, self.up))
        routed = project("btef,efd->btd", self._activate(gate, up) * gates[..., None], self.down)
        act = self._activate(h @ self.shared_gate[...], h @ self.shared_up[...])
        return routed + project("btf,fd->btd", act, self.shared_down)

    def _activate(self, gate: Array, up: Array) -> Array:
        return jax.nn.silu(jnp.minimum(gate, self.limit)) * jnp.clip(up, -self.limit, self.limit)
