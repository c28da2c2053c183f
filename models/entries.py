"""Attention over entries of pages: one vector a slot, shared by all query heads, of whose first part values are made.

A query may read no more than the entries that an indexer has chosen, by scores of its own over small keys:

    index keys of the pages -> scores, block by block -> sum over cp and tp, by position -> top k -> who reads what

Runs inside a `shard_map`, as models/paged_attention.py does; pools are written before they are read. Letters in shapes
as there, and C entry width, I index heads, E slots of a row's whole table, on all ranks. Pools are [N, ..., S, C].
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from models.packing import Packing
from models.paged_attention import Block, Held, Pages, attend_sources, block_table, is_visible, key_positions


class Entries(NamedTuple):
    """The entries that a row's table leads to.

    packing: how a slot of the pool holds an entry; None: as it is
    """

    held: Held
    pages: Pages
    packing: Packing | None = None

    def write(self, new: Array) -> Entries:
        """Puts new entries, [B, T, C], where this rank holds their slots."""
        new = new.astype(self.held.pool.dtype) if self.packing is None else self.packing.pack(new)
        at = self.held.pool.at[(self.pages.write_ids, *self.held.place, self.pages.write_slots)]
        return self._replace(held=self.held._replace(pool=at.set(new, mode="drop")))

    def read(self, i: Array) -> Array:
        """Those of block i on this rank: [B, width * S, C]."""
        table = block_table(self.pages, i, self.held.pool.shape[-2])
        entries = self.held.pool.at[(table, *self.held.place)].get(mode="promise_in_bounds")
        entries = entries.reshape(entries.shape[0], -1, entries.shape[-1])
        return entries if self.packing is None else self.packing.unpack(entries)


def attend_entries(q: Array, entries: Entries, chosen: Array, value_size: int, scale: float) -> Array:
    """Softmax attention; see `attend_sources`.

    q:      [B, T, H, C]; returns f32[B, T, H, value_size], a mean of the first entries of each vector
    chosen: bool[B, T, E], which entries a token reads
    """

    def read(i: Array) -> Block:
        read, at = entries.read(i).astype(q.dtype)[:, :, None], key_positions(entries.pages, i)
        is_read = is_visible(entries.pages, at) & jnp.take(chosen, at, axis=2, mode="fill", fill_value=False)
        return Block(read, read[..., :value_size], is_read)

    return attend_sources(q, [(entries.pages.blocks, read)], 1, value_size, scale)


def choose_entries(q: Array, weights: Array, keys: Entries, top_k: int) -> Array:
    """bool[B, T, E]: the k visible entries with the largest scores, sums over index heads of weight * relu(q . key).

    q:       [B, T, I, C], of this rank's index heads
    weights: f32[B, T, I]

    Exact; ties go to the oldest entry. All ranks choose alike, as they see the same scores; these depend, bit for bit,
    on nothing but the prefix, as in `attend_sources` and for the same reasons.
    """
    (b, t), pages, pool = q.shape[:2], keys.pages, keys.held.pool
    num_slots = pages.table.shape[1] * pool.shape[-2] * lax.axis_size("cp")

    def add_block(i: Array, scores: Array) -> Array:
        read = keys.read(i).astype(q.dtype)
        alike = jax.nn.relu(jnp.einsum("btic,bmc->btim", q, read, preferred_element_type=jnp.float32))
        return scores.at[:, :, key_positions(pages, i)].set(jnp.einsum("btim,bti->btm", alike, weights), mode="drop")

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
