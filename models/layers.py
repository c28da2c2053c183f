"""Parts of layers that several families share, as one rank of a `shard_map` sees them: heads and F over tp.

Letters in shapes, besides those of paged_attention: D hidden, F mlp, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from models.paged_attention import ExtendBatch, Held, Pages, PageStates


class Rope(NamedTuple):
    """Rotary embedding over the two halves of a head.

    frequencies: float64[head_dim / 2], radians a token
    scale:       of cosine and sine
    """

    frequencies: np.ndarray
    scale: float = 1.0


def plain_rope(theta: float, head_dim: int) -> Rope:
    return Rope(theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim))


class View(NamedTuple):
    """What the layers of one component need to know of a batch.

    cos, sin: f32[B, T, 1, head_dim / 2]
    shared:   of the fields whose slots several tokens share, by how many
    states:   of the fields without slots
    """

    pages: Pages
    cos: Array
    sin: Array
    shared: dict[int, Pages]
    states: PageStates


class Step(NamedTuple):
    """What a layer needs to know of a model step. views: by component, but for states"""

    batch: ExtendBatch
    views: dict[str, View]


HeldFields = dict[str, Held]


def turns(positions: Array, rope: Rope) -> tuple[Array, Array]:
    """Cosine and sine, f32[B, T, 1, head_dim / 2], at i32[B, T]."""
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(rope.frequencies, jnp.float32)[None, None]
    cos, sin = (f(angles)[:, :, None] for f in (jnp.cos, jnp.sin))
    return (cos, sin) if rope.scale == 1 else (cos * rope.scale, sin * rope.scale)


def rotate(x: Array, view: View) -> Array:
    """In fp32. x: [B, T, heads, head_dim], of which the first entries are rotated, as many as the view has; returns x's
    dtype."""
    half = view.cos.shape[-1]
    a, b, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    rotated = [a * view.cos - b * view.sin, b * view.cos + a * view.sin, rest]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def drawn(shape: tuple[int, ...], axes: tuple[str | None, ...], mean: float, std: float) -> nnx.Param:
    """A parameter of zeros, which says what normal distribution `init_params` draws it from."""
    return nnx.Param(jnp.zeros(shape), out_sharding=axes, mean=mean, std=std)


def weight(shape: tuple[int, ...], axes: tuple[str | None, ...], fan_in: int) -> nnx.Param:
    return drawn(shape, axes, 0.0, fan_in**-0.5)


def norm_weight(width: int) -> nnx.Param:
    return drawn((width,), (None,), 1.0, 0.1)


def rms_norm(x: Array, weight: nnx.Param, eps: float) -> Array:
    """Over the last axis, in fp32; returns x's dtype."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    scale = weight[...].astype(jnp.float32)
    return (x32 * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))).astype(x.dtype)


def project(subscripts: str, x: Array, weight: nnx.Param) -> Array:
    """Back to D, from an axis that is sharded over tp; summed in fp32, returns x's dtype."""
    return lax.psum(jnp.einsum(subscripts, x, weight[...], preferred_element_type=jnp.float32), "tp").astype(x.dtype)


class Projections(nnx.Module):
    """The weights of grouped-query attention; heads over tp. What is done with them is the family's business."""

    def __init__(self, d: int, h: int, k: int, c: int):
        self.wq = weight((d, h, c), (None, "tp", None), d)
        self.wk = weight((d, k, c), (None, "tp", None), d)
        self.wv = weight((d, k, c), (None, "tp", None), d)
        self.wo = weight((h, c, d), ("tp", None, None), h * c)

    def qkv(self, x: Array) -> tuple[Array, Array, Array]:
        """[B, T, D] -> [B, T, H, head_dim], and twice [B, T, K, head_dim]"""
        q = jnp.einsum("btd,dhc->bthc", x, self.wq[...])
        return q, jnp.einsum("btd,dkc->btkc", x, self.wk[...]), jnp.einsum("btd,dkc->btkc", x, self.wv[...])


class PreNormLayer(nnx.Module):
    """Attention, then mlp, each behind a norm and added to the residual."""

    def __init__(self, attention: nnx.Module, mlp: nnx.Module, d: int, eps: float):
        self.attention, self.mlp = attention, mlp
        self.attention_norm, self.mlp_norm = norm_weight(d), norm_weight(d)
        self.eps = eps

    def __call__(self, h: Array, held: HeldFields, step: Step) -> tuple[Array, HeldFields]:
        out, held = self.attention(rms_norm(h, self.attention_norm, self.eps), held, step)
        h = h + out
        return h + self.mlp(rms_norm(h, self.mlp_norm, self.eps)), held


class GatedMlp(nnx.Module):
    """activation(gate) * up, then down."""

    def __init__(self, d: int, f: int, activation: Callable[[Array], Array]):
        self.gate = weight((d, f), (None, "tp"), d)
        self.up = weight((d, f), (None, "tp"), d)
        self.down = weight((f, d), ("tp", None), f)
        self.activation = activation

    def __call__(self, h: Array) -> Array:
        return project("btf,fd->btd", self.activation(h @ self.gate[...]) * (h @ self.up[...]), self.down)
