"""A sparse indexer: which keys a token reads, by scores of its own over small keys that lie in pages too.

    keys of the pages, slots over cp -> score, block by block -> gather over cp, in the order of positions -> top k

Runs inside a `shard_map`; every rank gets the same scores, so all choose the same keys. Letters in shapes as in
paged_attention; I index heads, M slots of a row's whole table, over all ranks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from models.paged_attention import Held, Pages, is_visible, read_entries


def score(q: Array, weights: Array, held: Held, pages: Pages) -> Array:
    """f32[B, T, W', S]: sum over index heads of weights * relu(q . key), of this rank's slots; -inf where not visible.

    q: [B, T, I, C]; weights: f32[B, T, I]; held: [N, ..., S, C], written before it is read

    Blocks begin at fixed positions, as in `attend_blocks`, and for the same reason; those that no row reads stay -inf.
    """
    b, t, rank_slots = *q.shape[:2], held.pool.shape[-2]
    width = pages.key_offsets.shape[0] // rank_slots

    def add_block(i: Array, scores: Array) -> Array:
        keys = read_entries(held, pages, i)
        alike = jax.nn.relu(jnp.einsum("btic,bmc->btim", q, keys, preferred_element_type=jnp.float32))
        block = jnp.einsum("btim,bti->btm", alike, weights)
        block = jnp.where(is_visible(pages, i), block, -jnp.inf).reshape(b, t, width, rank_slots)
        return lax.dynamic_update_slice_in_dim(scores, block, i * width, axis=2)

    nothing = jnp.full((b, t, pages.table.shape[1], rank_slots), -jnp.inf, jnp.float32)
    return lax.fori_loop(pages.blocks[0], pages.blocks[1], add_block, nothing)


def choose(scores: Array, top_k: int) -> Array:
    """bool[B, T, W', S]: which of this rank's slots are among the best k of all ranks; ties go to the lowest position.

    scores: f32[B, T, W', S]; where fewer than k are finite, slots of -inf are chosen too: who reads masks them
    """
    b, t, num_pages, rank_slots = scores.shape
    scores = jnp.where(scores == 0, 0.0, scores)  # -0.0 ties with 0.0
    everywhere = lax.all_gather(scores, "cp", axis=3, tiled=True)
    page_slots, by_position = everywhere.shape[3], everywhere.reshape(b, t, -1)
    _, best = lax.top_k(by_position, min(top_k, by_position.shape[-1]))
    rows, columns = jnp.arange(b)[:, None, None], jnp.arange(t)[None, :, None]
    chosen = jnp.zeros(by_position.shape, bool).at[rows, columns, best].set(True)
    chosen = chosen.reshape(b, t, num_pages, page_slots)
    return lax.dynamic_slice_in_dim(chosen, lax.axis_index("cp") * rank_slots, rank_slots, axis=3)


def chosen_in_block(chosen: Array, pages: Pages, i: Array) -> Array:
    """bool[B, T, width * S]: the part of block i."""
    b, t, _, rank_slots = chosen.shape
    width = pages.key_offsets.shape[0] // rank_slots
    return lax.dynamic_slice_in_dim(chosen, i * width, width, axis=2).reshape(b, t, -1)
