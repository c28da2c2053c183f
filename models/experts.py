"""Routed experts: who chooses them, and what they compute.

Every expert is computed, and weighted by its gate or 0. Letters in shapes, besides those of models/layers.py: E
experts, G groups of them.
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


@dataclass(frozen=True)
class Routing:
    """How a token chooses experts.

    per_token:  so many of num_experts, from the best `chosen_groups` of num_groups groups, by score plus correction
    normalized: whether the chosen scores are divided by their sum
    scale:      of the gates
    """

    num_experts: int
    per_token: int
    num_groups: int = 1
    chosen_groups: int = 1
    normalized: bool = True
    scale: float = 1.0

    def __post_init__(self):
        e, g = self.num_experts, self.num_groups
        if e % g or not 1 <= self.chosen_groups <= g:
            raise ValueError(f"{self.num_groups=} must divide {e} experts, and {self.chosen_groups=} be at most that")
        if not 1 <= self.per_token <= self.chosen_groups * (e // g):
            raise ValueError(f"{self.per_token=} experts must be in [1, {self.chosen_groups * (e // g)}]")


class SigmoidRouter(nnx.Module):
    """Scores are sigmoids; a correction helps to choose experts, but is no part of their gates."""

    def __init__(self, d: int, routing: Routing):
        self.weight = weight((d, routing.num_experts), (None, None), d)
        self.correction = nnx.Param(jnp.zeros(routing.num_experts), out_sharding=(None,), mean=0.0, std=BIAS_STD)
        self.routing = routing

    def __call__(self, h: Array) -> Array:
        """[B, T, D] -> f32[B, T, E], zero except for the chosen; ties go to the lowest group and expert."""
        routing, f32 = self.routing, jnp.float32
        scores = jax.nn.sigmoid(jnp.einsum("btd,de->bte", h.astype(f32), self.weight[...].astype(f32)))
        wanted = self._in_chosen_groups(scores + self.correction[...].astype(f32)[None, None])
        _, experts = lax.top_k(wanted, routing.per_token)
        gates = scores * jax.nn.one_hot(experts, routing.num_experts, dtype=f32).sum(axis=-2)
        if routing.normalized:
            gates = gates / (gates.sum(axis=-1, keepdims=True) + 1e-20)
        return gates * routing.scale

    def _in_chosen_groups(self, wanted: Array) -> Array:
        """-inf outside of the groups whose two best experts are wanted most."""
        routing = self.routing
        if routing.chosen_groups == routing.num_groups:
            return wanted
        groups = wanted.reshape(*wanted.shape[:-1], routing.num_groups, -1)
        best, _ = lax.top_k(groups, min(2, groups.shape[-1]))
        _, chosen = lax.top_k(best.sum(axis=-1), routing.chosen_groups)
        is_chosen = jax.nn.one_hot(chosen, routing.num_groups, dtype=jnp.int32).sum(axis=-2) > 0
        return jnp.where(is_chosen[..., None], groups, -jnp.inf).reshape(wanted.shape)


class GatedExperts(nnx.Module):
    """E experts, each activation(gate) * up, then down; each expert's F over tp."""

    def __init__(self, d: int, e: int, f: int, activation: Callable[[Array], Array]):
        self.gate = weight((d, e, f), (None, None, "tp"), d)
        self.up = weight((d, e, f), (None, None, "tp"), d)
        self.down = weight((e, f, d), (None, "tp", None), f)
        self.activation = activation

    def __call__(self, h: Array, gates: Array) -> Array:
        """h: [B, T, D]; gates: f32[B, T, E]"""
        act = self.activation(jnp.einsum("btd,def->btef", h, self.gate[...]))
        act = act * jnp.einsum("btd,def->btef", h, self.up[...]) * gates.astype(h.dtype)[..., None]
        return project("btef,efd->btd", act, self.down)
