"""Compression of tokens: one entry for each group of `rate` tokens, and what is kept of a group that is not complete.

An entry is, channel by channel, a mean of its tokens' values under a softmax of their gates. Such a mean can be taken
token by token: all that it needs of the tokens before is the largest gate, the sum of weights, and the sum of weighted
values. So between any two tokens the state is three numbers a channel, however many tokens a group has:

    rate 4, groups that overlap:        entry of group w = mean over a-values of w - 1 and b-values of w
    token      0  1  2  3 | 4  5  6  7 | 8 ...
    entry      b0 b0 b0 b0  b1 b1 b1 b1   sums in the making; at a boundary they are complete: the entry is written
    next       a0 a0 a0 a0  a1 a1 a1 a1   and what `next` has summed is what the entry of the next group begins with

Tokens are added one after the other, in a fixed order, wherever chunks begin: so is the result the same, bit for bit.
The state after a page's last token lies in that page (`PageStates`). Letters in shapes as in models/layers.py; G groups
that a chunk touches, C channels. Sums are f32[..., 3, C]: largest gate, weights, weighted values; of no tokens EMPTY.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from models.layers import drawn, norm_weight, weight
from models.paged_attention import MASKED, ExtendBatch, Held, PageStates

BIAS_STD = 0.5  # of random parameters
EMPTY = np.array([[MASKED], [0], [0]], np.float32)


class Gated(NamedTuple):
    """What tokens are to an entry: f32[..., C] each."""

    values: Array
    gates: Array


def joined(a: Gated, b: Gated) -> Gated:
    """Side by side: channels do not know of each other."""
    return Gated(*(jnp.concatenate(both, axis=-1) for both in zip(a, b, strict=True)))


def halves(tokens: Gated) -> tuple[Gated, Gated]:
    values, gates = (jnp.split(x, 2, axis=-1) for x in tokens)
    return Gated(values[0], gates[0]), Gated(values[1], gates[1])


def _empty_like(sums: Array) -> Array:
    return jnp.broadcast_to(EMPTY.reshape(*(1,) * (sums.ndim - 2), 3, 1), sums.shape)


def _or_empty(condition: Array, sums: Array) -> Array:
    """condition: bool, of the shape of sums but for the last two dimensions"""
    return jnp.where(condition[..., None, None], sums, _empty_like(sums))


def _add_token(sums: Array, token: Gated, is_there: Array) -> Array:
    peak, total, mixed = (sums[..., i, :] for i in range(3))
    new_peak = jnp.maximum(peak, token.gates)
    rescale, added = jnp.exp(peak - new_peak), jnp.exp(token.gates - new_peak)
    more = jnp.stack([new_peak, total * rescale + added, mixed * rescale + token.values * added], axis=-2)
    return jnp.where(is_there[..., None, None], more, sums)


def _mean(sums: Array) -> Array:
    """f32[..., C]; zero of no tokens."""
    total = sums[..., 1, :]
    return sums[..., 2, :] / jnp.where(total > 0, total, 1)


class Groups(NamedTuple):
    """Which groups the tokens of a chunk belong to: those of row b begin with group first[b], starts[b] // rate.

    first:    i32[B]
    columns:  i32[min(T, rate), B, G]   the n-th token of the chunk in each group
    is_there: bool[min(T, rate), B, G]
    """

    first: Array
    columns: Array
    is_there: Array

    @classmethod
    def of(cls, batch: ExtendBatch, rate: int) -> Groups:
        num_columns, (first, inside) = batch.tokens.shape[1], jnp.divmod(batch.starts, rate)
        steps = jnp.arange(min(num_columns, rate), dtype=jnp.int32)[:, None, None]
        starts = jnp.arange(-(-num_columns // rate) + 1, dtype=jnp.int32)[None, None] * rate - inside[None, :, None]
        columns = jnp.maximum(starts, 0) + steps
        is_there = (columns < starts + rate) & (columns < batch.num_new[None, :, None])
        return cls(first, columns, is_there)

    def after(self, state: Array, before: Array | None = None) -> Array:
        """[B, G, 3, C]: the first group of each row goes on from a state [B, 3, C], others from the group before.

        before: [B, G, 3, C]; None: nothing
        """
        shape = (state.shape[0], self.columns.shape[2] - 1, *state.shape[1:])
        later = jnp.broadcast_to(EMPTY[None, None], shape) if before is None else before[:, :-1]
        return jnp.concatenate([state[:, None], later], axis=1)

    def add(self, sums: Array, tokens: Gated) -> Array:
        """Adds a chunk's tokens, [B, T, C], to the sums of their groups, in order."""

        def step(sums: Array, at: tuple[Array, Array]) -> tuple[Array, None]:
            columns, is_there = at
            new = (jnp.take_along_axis(x, columns[..., None], axis=1, mode="clip") for x in tokens)
            return _add_token(sums, Gated(*new), is_there), None

        return lax.scan(step, sums, (self.columns, self.is_there))[0]

    def at(self, positions: Array, sums: Array, rate: int) -> Array:
        """[B, P, 3, C]: sums [B, G, 3, C] of the groups in which positions, i32[B, P], lie."""
        places = positions // rate - self.first[:, None]
        return jnp.take_along_axis(sums, places[..., None, None], axis=1, mode="clip")


class Compressor(nnx.Module):
    """Projections of a compressor: values and gates of each token, and the norm of an entry."""

    def __init__(self, d: int, width: int, entry: int, rate: int):
        self.wkv, self.wgate = (weight((d, width), (None, None), d) for _ in range(2))
        self.bias = drawn((rate, width), (None, None), 0.0, BIAS_STD)
        self.norm = norm_weight(entry)

    def project(self, x: Array, positions: Array) -> Gated:
        """[B, T, D] -> f32[B, T, width] each; a gate's bias is that of the token's place in its group."""
        values, gates = (
            jnp.einsum("btd,dc->btc", x, w[...], preferred_element_type=jnp.float32) for w in (self.wkv, self.wgate)
        )
        bias = self.bias[...].astype(jnp.float32)
        return Gated(values, gates + jnp.take(bias, positions % bias.shape[0], axis=0, mode="clip"))


def compress(tokens: Gated, held: Held, states: PageStates, batch: ExtendBatch, rate: int) -> tuple[Array, Held]:
    """Entries of groups by themselves, f32[B, ceil(T / rate), C], and the new state.

    held: f32[N, ..., 3, C]; at a boundary EMPTY
    """
    groups = Groups.of(batch, rate)
    entry = groups.add(groups.after(_or_empty(batch.starts % rate > 0, _read(held, states))), tokens)
    ends = _or_empty(states.ends % rate > 0, groups.at(states.ends, entry, rate))
    return _mean(entry)[:, :-1], _write(held, states, ends)


def compress_overlapping(
    earlier: Gated, own: Gated, held: Held, states: PageStates, batch: ExtendBatch, rate: int
) -> tuple[Array, Held]:
    """Entries of a group's own tokens and of the group before, f32[B, ceil(T / rate), C], and the new state.

    earlier: what tokens are to the entry of the next group; own: to that of their own
    held:    f32[N, ..., 2, 3, C], sums of the entry in the making, and of the next; at a boundary the latter are EMPTY
    """
    groups, old = Groups.of(batch, rate), _read(held, states)
    following = groups.add(groups.after(_or_empty(batch.starts % rate > 0, old[:, 1])), earlier)
    first = groups.after(_or_empty(batch.starts > 0, old[:, 0]), following)
    entry = groups.add(first, own)
    is_inside = states.ends % rate > 0
    begun, at_boundary, next_begun = (groups.at(states.ends, sums, rate) for sums in (entry, first, following))
    begun = jnp.where(is_inside[..., None, None], begun, at_boundary)
    return _mean(entry)[:, :-1], _write(held, states, jnp.stack([begun, _or_empty(is_inside, next_begun)], axis=2))


def _read(held: Held, states: PageStates) -> Array:
    return held.pool.at[(states.read_ids, *held.place)].get(mode="promise_in_bounds")


def _write(held: Held, states: PageStates, new: Array) -> Held:
    return held._replace(pool=held.pool.at[(states.write_ids, *held.place)].set(new, mode="drop"))
