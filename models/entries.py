"""Attention over entries of pages: one vector a slot, shared by all query heads, whose first part is also its value.

A query reads all its sources in one softmax, and of a source no more than the entries that an indexer has chosen, by
scores of its own over small keys:

    index keys of the pages -> scores, block by block -> sum over cp and tp, by position -> top k -> who reads what

Runs inside a `shard_map`, as models/paged_attention.py does; pools are written before they are read. Letters in shapes
as there, and C entry width, I index heads, E slots of a row's whole table, on all ranks. Pools are [N, ..., S, C], or
hold packed entries, as `Packing` says.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from models.packing import Packing
from models.paged_attention import Block, Held, Pages, attend_sources, block_table, is_visible, key_positions


class Source(NamedTuple):
    """A pool that is read. chosen: bool[B, T, E], by position, who reads which entry; None: all that are visible"""

    held: Held
    pages: Pages
    chosen: Array | None = None
    packing: Packing | None = None


def write_entries(held: Held, pages: Pages, entries: Array, packing: Packing | None = None) -> Held:
    """Puts new entries, one for each column of `pages.write_ids`, where this rank holds their slots."""
    new = entries.astype(held.pool.dtype) if packing is None else packing.pack(entries)
    at = held.pool.at[(pages.write_ids, *held.place, pages.write_slots)]
    return held._replace(pool=at.set(new, mode="drop"))


def attend_entries(
    q: Array, sources: Sequence[Source], scale: float, sinks: Array | None = None, value_size: int | None = None
) -> Array:
    """Softmax attention over all sources; see `attend_sources`.

    q:          [B, T, H, C]; returns f32[B, T, H, value_size]
    value_size: how many of an entry's first numbers are its value; None: all
    """
    value_size = q.shape[-1] if value_size is None else value_size
    readers = [(source.pages, functools.partial(_read_source, source, q, value_size)) for source in sources]
    return attend_sources(q, readers, 1, value_size, scale, sinks)


def _read_source(source: Source, q: Array, value_size: int, i: Array) -> Block:
    entries = _read_block(source.held, source.pages, source.packing, q, i)[:, :, None]
    at = key_positions(source.pages, i)
    is_read = is_visible(source.pages, at)
    if source.chosen is not None:
        is_read = is_read & jnp.take(source.chosen, at, axis=2, mode="fill", fill_value=False)
    return Block(entries, entries[..., :value_size], is_read)


def _read_block(held: Held, pages: Pages, packing: Packing | None, q: Array, i: Array) -> Array:
    """Entries of block i on this rank, as numbers like q's: [B, width * S, C]."""
    table = block_table(pages, i, held.pool.shape[-2])
    entries = held.pool.at[(table, *held.place)].get(mode="promise_in_bounds")
    entries = entries.reshape(entries.shape[0], -1, entries.shape[-1])
    return (entries if packing is None else packing.unpack(entries)).astype(q.dtype)


def choose_entries(
    q: Array, weights: Array, held: Held, pages: Pages, top_k: int, packing: Packing | None = None
) -> Array:
    """bool[B, T, E]: the k visible entries with the largest scores, sums over index heads of weight * relu(q . key).

    q:       [B, T, I, C], of this rank's index heads
    weights: f32[B, T, I]

    Exact; ties go to the oldest entry. All ranks choose alike, as they see the same scores; these depend, bit for bit,
    on nothing but the prefix, as in `attend_sources` and for the same reasons.
    """
    b, t, num_slots = *q.shape[:2], pages.table.shape[1] * held.pool.shape[-2] * lax.axis_size("cp")

    def add_block(i: Array, scores: Array) -> Array:
        keys = _read_block(held, pages, packing, q, i)
        alike = jax.nn.relu(jnp.einsum("btic,bmc->btim", q, keys, preferred_element_type=jnp.float32))
        block = (alike * weights[..., None]).sum(axis=2)  # an einsum would copy `alike`, the largest array here
        return scores.at[:, :, key_positions(pages, i)].set(block, mode="drop")

    scores = jnp.zeros((b, t, num_slots), jnp.float32)
    scores = lax.psum(lax.fori_loop(pages.blocks[0], pages.blocks[1], add_block, scores), ("cp", "tp"))
    return best_visible(scores, is_visible(pages, jnp.arange(num_slots, dtype=jnp.int32)), top_k)


def best_visible(scores: Array, visible: Array, top_k: int) -> Array:
    """bool[B, T, E]: the k largest of those that are visible, all if they are fewer; ties go to the lowest index.

    scores: f32[B, T, E]; visible: bool[B, T, E]
    """
    b, t, num_slots = scores.shape
    scores = jnp.where(scores == 0, 0.0, scores)  # or a sort puts -0.0 below 0.0
    _, best = lax.top_k(jnp.where(visible, scores, -jnp.inf), min(top_k, num_slots))
    rows, columns = jnp.arange(b)[:, None, None], jnp.arange(t)[None, :, None]
    return jnp.zeros(scores.shape, bool).at[rows, columns, best].set(True) & visible
