"""Hyper-connections: several residual streams, of which each block reads one mixture and into which it writes another.

    streams [N, D] -- read, a weighted sum --> x [D] -> norm -> attention or mlp -> y [D]
                   -- mixed by a matrix whose rows and columns sum to one --> + y, weighted --> streams

All weights depend on the token's streams. Manifold-constrained: Xie et al., 2026. In shapes N is the number of streams;
others as in models/layers.py.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from models.layers import drawn, weight


class Connection(NamedTuple):
    """How a block's output gets back into the streams. write: f32[B, T, N]; mix: f32[B, T, N from, N to]"""

    write: Array
    mix: Array

    def merge(self, streams: Array, out: Array) -> Array:
        """[B, T, N, D], [B, T, D] -> [B, T, N, D]"""
        dtype = streams.dtype
        mixed = jnp.einsum("btnm,btnd->btmd", self.mix.astype(dtype), streams)
        return self.write.astype(dtype)[..., None] * out[:, :, None] + mixed


class _Scores(nnx.Module):
    """Linear in the normed streams; parts of the outputs are scaled."""

    def __init__(self, n: int, d: int, num_outputs: int, num_scales: int, norm_eps: float):
        self.fn = weight((num_outputs, n, d), (None, None, None), n * d)
        self.base = drawn((num_outputs,), (None,), 0.0, 0.5)
        self.scale = drawn((num_scales,), (None,), 1.0, 0.1)
        self.norm_eps = norm_eps

    def project(self, streams: Array) -> Array:
        """[B, T, N, D] -> f32[B, T, outputs], neither scaled nor shifted."""
        x = streams.astype(jnp.float32)
        x = x * lax.rsqrt(jnp.mean(x * x, axis=(-2, -1), keepdims=True) + self.norm_eps)
        return jnp.einsum("btnd,ond->bto", x, self.fn[...].astype(jnp.float32))


def _read(weights: Array, streams: Array) -> Array:
    return (weights[..., None] * streams).sum(axis=2).astype(streams.dtype)


class HyperConnection(_Scores):
    """rounds: so often columns, then rows, of the mixing matrix are normed. eps: what keeps its sums from zero"""

    def __init__(self, n: int, d: int, rounds: int, eps: float, norm_eps: float):
        super().__init__(n, d, (2 + n) * n, 3, norm_eps)
        self.rounds, self.eps = rounds, eps

    def __call__(self, streams: Array) -> tuple[Array, Connection]:
        """[B, T, N, D] -> what the block reads, [B, T, D], and how its output gets back."""
        n = streams.shape[2]
        scale, base = self.scale[...].astype(jnp.float32), self.base[...].astype(jnp.float32)
        scales = jnp.concatenate([jnp.broadcast_to(scale[i], (size,)) for i, size in enumerate((n, n, n * n))])
        scores = self.project(streams) * scales[None, None] + base[None, None]
        read, write, mix = jnp.split(scores, (n, 2 * n), axis=-1)
        mix = self._normed(jax.nn.softmax(mix.reshape(*mix.shape[:2], n, n), axis=-1) + self.eps, -2)
        mix = lax.fori_loop(1, self.rounds, lambda _, mix: self._normed(self._normed(mix, -1), -2), mix)
        x = _read(jax.nn.sigmoid(read) + self.eps, streams)
        return x, Connection(2 * jax.nn.sigmoid(write), mix)

    def _normed(self, mix: Array, axis: int) -> Array:
        return mix / (mix.sum(axis=axis, keepdims=True) + self.eps)


class StreamsHead(_Scores):
    """What is read of the streams behind the last layer."""

    def __init__(self, n: int, d: int, eps: float, norm_eps: float):
        super().__init__(n, d, n, 1, norm_eps)
        self.eps = eps

    def __call__(self, streams: Array) -> Array:
        """[B, T, N, D] -> [B, T, D]"""
        scale, base = self.scale[...].astype(jnp.float32), self.base[...].astype(jnp.float32)
        scores = self.project(streams) * scale[None, None] + base[None, None]
        return _read(jax.nn.sigmoid(scores) + self.eps, streams)
