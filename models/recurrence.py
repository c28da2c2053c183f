"""What layers with a recurrent state share: states read and written by slots, and the short convolution before them.

Owns no array: pools are values. Letters in shapes, besides those of models/layers.py: W kernel of the convolution.

    slot  --read-->  state before the row's first token  --tokens-->  state after its last  --write-->  slot, kept slot

A column beyond `num_new` changes no state. Tokens come one after the other, so a state is the same, bit for bit,
wherever chunks begin.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from models.layers import HeldFields, Step
from models.paged_attention import ExtendBatch, Held


def read_states(held: HeldFields, step: Step) -> dict[str, Array]:
    """[B, ...] of each field; zeros for a row that begins at token 0."""
    slots = step.batch.states
    assert slots is not None, "a model with recurrent states needs state slots"
    return {name: pool.at[(slots.read, *place)].get(mode="fill", fill_value=0) for name, (pool, place) in held.items()}


def write_states(held: HeldFields, step: Step, states: dict[str, Array]) -> HeldFields:
    """Into the row's own slot, and into the one that is kept, if there is one."""
    slots = step.batch.states
    assert slots is not None, "a model with recurrent states needs state slots"
    ids = jnp.concatenate([slots.write, slots.keep])

    def write(field: Held, state: Array) -> Held:
        twice = jnp.concatenate([state, state]).astype(field.pool.dtype)
        return field._replace(pool=field.pool.at[(ids, *field.place)].set(twice, mode="drop"))

    return {name: write(held[name], state) for name, state in states.items()}


def convolve(x: Array, before: Array, kernel: Array, batch: ExtendBatch) -> tuple[Array, Array]:
    """Causal, each channel by itself, in fp32.

    x:       [B, T, ...]
    before:  [B, W - 1, ...], the inputs of the tokens before
    kernel:  [..., W]
    returns: f32[B, T, ...], and the last W - 1 inputs of each row
    """
    width, columns = kernel.shape[-1], x.shape[1]
    x = jnp.concatenate([before.astype(x.dtype), x], axis=1)
    taps = jnp.moveaxis(kernel.astype(jnp.float32), -1, 0)[:, None, None]
    out = functools.reduce(jnp.add, (x[:, i : i + columns].astype(jnp.float32) * taps[i] for i in range(width)))
    last = batch.num_new[:, None] + jnp.arange(width - 1)[None]
    return out, jnp.take_along_axis(x, last.reshape(*last.shape, *(1,) * (x.ndim - 2)), axis=1)


def run_tokens(
    update: Callable[[Array, tuple[Array, ...]], tuple[Array, Array]],
    state: Array,
    tokens: tuple[Array, ...],
    batch: ExtendBatch,
) -> tuple[Array, Array]:
    """update(state, what a token brings) -> (state, output), token after token.

    state:   f32[B, ...]
    tokens:  each [B, T, ...]
    returns: the outputs, [B, T, ...], and the state after each row's last token
    """
    columns = tokens[0].shape[1]
    is_new = jnp.arange(columns)[:, None] < batch.num_new[None]  # [T, B]

    def one(state: Array, xs: tuple[Array, tuple[Array, ...]]) -> tuple[Array, Array]:
        is_new, token = xs
        after, out = update(state, token)
        return jnp.where(is_new.reshape(-1, *(1,) * (state.ndim - 1)), after, state), out

    state, out = lax.scan(one, state, (is_new, tuple(jnp.moveaxis(x, 1, 0) for x in tokens)))
    return jnp.moveaxis(out, 0, 1), state
