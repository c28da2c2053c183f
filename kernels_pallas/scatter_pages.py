"""Overwrites whole pages of a pool, in place."""

from __future__ import annotations

from typing import Any

import jax

from kernels_pallas.page_view import check_pages, page_view
from kernels_pallas.ring import DEFAULT_RING, Boxes, Ring


def scatter_pages_reference(pool: jax.Array, page_ids: jax.Array, pages: jax.Array) -> jax.Array:
    """As `scatter_pages`, by XLA."""
    return pool.at[page_ids].set(pages, mode="drop", unique_indices=True)


def scatter_pages(
    pool: jax.Array, page_ids: jax.Array, pages: jax.Array, *, ring: Ring = DEFAULT_RING, interpret: Any = None
) -> jax.Array:
    """Overwrites whole pages of a pool's shard.

    pool:      [num_pages, *page], one shard; changed in place where the caller donates it
    page_ids:  int32[n], each at most once, padded with `num_pages`, whose rows are dropped
    pages:     [n, *page], like the pool
    interpret: parameters of Pallas's interpreter; None compiles for the GPU
    returns:   the pool
    Moves 2 * n * page_bytes. ValueError if pages are no multiple of 16 bytes.
    """
    check_pages(pool, page_ids)
    if pages.shape != (len(page_ids), *pool.shape[1:]) or pages.dtype != pool.dtype:
        raise ValueError(
            f"pages must be {pool.dtype}{[len(page_ids), *pool.shape[1:]]}, not {pages.dtype}{list(pages.shape)}"
        )
    view = page_view(pool.shape[1:], pool.dtype, ring.box_bytes)
    num_pages, num_items = len(pool), len(page_ids) * view.boxes

    def scatter(stored, ids, rows):
        return Boxes(
            num_items,
            is_wanted=lambda item: ids[view.page(item)] < num_pages,
            source=lambda item: rows.at[item],
            target=lambda item: stored.at[view.box(ids[view.page(item)], item)],
        )

    stored = jax.new_ref(view.of(pool))
    ring.kernel(scatter, num_items, view.box_shape, pool.dtype, interpret)(stored, page_ids, view.of(pages))
    return jax.freeze(stored).reshape(pool.shape)
