"""Copies whole pages out of a pool, in the order of their ids."""

from __future__ import annotations

from typing import Any

import jax

from kernels_pallas.page_view import check_pages, page_view
from kernels_pallas.ring import DEFAULT_RING, Boxes, Ring


def gather_pages_reference(pool: jax.Array, page_ids: jax.Array) -> jax.Array:
    """As `gather_pages`, by XLA."""
    return pool.at[page_ids].get(mode="clip")


def gather_pages(
    pool: jax.Array, page_ids: jax.Array, *, ring: Ring = DEFAULT_RING, interpret: Any = None
) -> jax.Array:
    """Copies whole pages out of a pool's shard, in the order of `page_ids`.

    pool:      [num_pages, *page], one shard; not donated
    page_ids:  int32[n], padded with `num_pages`; a padding row is undefined
    interpret: parameters of Pallas's interpreter; None compiles for the GPU
    returns:   [n, *page]
    Moves 2 * n * page_bytes. ValueError if pages are no multiple of 16 bytes.
    """
    check_pages(pool, page_ids)
    view = page_view(pool.shape[1:], pool.dtype, ring.box_bytes)
    num_pages, num_items = len(pool), len(page_ids) * view.boxes

    def gather(stored, ids, rows):
        return Boxes(
            num_items,
            is_wanted=lambda item: ids[view.page(item)] < num_pages,
            source=lambda item: stored.at[view.box(ids[view.page(item)], item)],
            target=lambda item: rows.at[item],
        )

    out = jax.ShapeDtypeStruct((num_items, *view.box_shape), pool.dtype)
    rows = ring.kernel(gather, num_items, view.box_shape, pool.dtype, interpret, out)(view.of(pool), page_ids)
    return rows.reshape(len(page_ids), *pool.shape[1:])
