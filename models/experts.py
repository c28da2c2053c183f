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

from models.layers import project, weight

BIAS_STD = 0.1  # of random parameters


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
        self.bias = nnx.Param(jnp.zeros(routing.num_experts), out_sharding=(None,), mean=0.0, std=BIAS_STD)
        self.routing = routing

    def __call__(self, h: Array) -> Array:
        """[B, T, D] -> f32[B, T, E], zero except for the chosen."""
        routing = self.routing
        logits = jnp.einsum("btd,de->bte", h.astype(jnp.float32), self.weight[...].astype(jnp.float32))
        scores = jax.nn.sigmoid(logits)
        choice = scores + self.bias[...].astype(jnp.float32)[None, None]
        if routing.groups > 1:
            grouped = choice.reshape(*choice.shape[:-1], routing.groups, -1)
            best_two = lax.top_k(grouped, 2)[0].sum(axis=-1)
            is_open = top_k_gates(best_two, jnp.ones_like(best_two), routing.top_groups) > 0
            choice = jnp.where(is_open[..., None], grouped, -jnp.inf).reshape(choice.shape)
        gates = top_k_gates(choice, scores, routing.top_k)
        if routing.normalise:
            gates = gates / (gates.sum(axis=-1, keepdims=True) + 1e-20)
        return gates * routing.scale


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
