"""Copies whole pages within a pool, in place: for forks, and for tails that one request goes on writing."""

from __future__ import annotations

from typing import Any

import jax

from kernels_pallas.page_view import check_pages, page_view
from kernels_pallas.ring import DEFAULT_RING, Boxes, Ring


def copy_pages_reference(pool: jax.Array, from_ids: jax.Array, to_ids: jax.Array) -> jax.Array:
    """As `copy_pages`, by XLA."""
    pages = pool.at[from_ids].get(mode="clip")
    return pool.at[to_ids].set(pages, mode="drop", unique_indices=True)


def copy_pages(
    pool: jax.Array, from_ids: jax.Array, to_ids: jax.Array, *, ring: Ring = DEFAULT_RING, interpret: Any = None
) -> jax.Array:
    """Overwrites the pages `to_ids` of a pool's shard with its pages `from_ids`.

    pool:      [num_pages, *page], one shard; changed in place where the caller donates it
    from_ids:  int32[n]
    to_ids:    int32[n], each at most once and none of `from_ids`; where it is `num_pages`, nothing is copied
    interpret: parameters of Pallas's interpreter; None compiles for the GPU
    returns:   the pool
    Moves 2 * n * page_bytes. ValueError if pages are no multiple of 16 bytes.
    """
    check_pages(pool, from_ids)
    check_pages(pool, to_ids)
    if from_ids.shape != to_ids.shape:
        raise ValueError(f"{len(from_ids)} pages cannot be copied to {len(to_ids)} places")
    view = page_view(pool.shape[1:], pool.dtype, ring.box_bytes)
    num_pages, num_items = len(pool), len(from_ids) * view.boxes

    def copy(stored, sources, targets):
        return Boxes(
            num_items,
            is_wanted=lambda item: targets[view.page(item)] < num_pages,
            source=lambda item: stored.at[view.box(sources[view.page(item)], item)],
            target=lambda item: stored.at[view.box(targets[view.page(item)], item)],
        )

    stored = jax.new_ref(view.of(pool))
    ring.kernel(copy, num_items, view.box_shape, pool.dtype, interpret)(stored, from_ids, to_ids)
    return jax.freeze(stored).reshape(pool.shape)
