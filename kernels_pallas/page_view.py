"""How a kernel sees an array of pages: as boxes, the pieces that one instruction of the copy engine moves.

    [num_pages, *page]  ==  [num_pages * boxes, rows, lanes]      the same bytes in the same order, nothing moves
                                  a page is `boxes` boxes

A box has at most 256 rows of at most 256 elements, a row is a multiple of 16 bytes: limits of Hopper's copy engine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

MAX_BOX_DIM = 256  # elements
ROW_ALIGNMENT = 16  # bytes


@dataclass(frozen=True)
class PageView:
    """boxes: of a page; rows, lanes: of a box."""

    boxes: int
    rows: int
    lanes: int

    @property
    def box_shape(self) -> tuple[int, int]:
        return self.rows, self.lanes

    def of(self, array: jax.Array) -> jax.Array:
        """[num_pages, *page] as [num_pages * boxes, rows, lanes]."""
        return array.reshape(len(array) * self.boxes, self.rows, self.lanes)

    def page(self, item: jax.Array) -> jax.Array:
        """Where boxes are counted page by page: the page of a box."""
        return item // self.boxes

    def box(self, page_id: jax.Array, item: jax.Array) -> jax.Array:
        """The box of page `page_id` that is in the same place of it as `item` in its page."""
        return page_id * self.boxes + lax.rem(item, self.boxes)


def page_view(page_shape: tuple[int, ...], dtype: Any, box_bytes: int) -> PageView:
    """The largest boxes that a page of this shape falls into. ValueError if it falls into none."""
    num_elements, itemsize = math.prod(page_shape), np.dtype(dtype).itemsize
    lanes = _largest_divisor(
        num_elements, min(MAX_BOX_DIM, box_bytes // itemsize), ROW_ALIGNMENT // math.gcd(ROW_ALIGNMENT, itemsize)
    )
    if lanes is None or np.dtype(dtype) == np.bool_:
        raise ValueError(
            f"a page of shape {page_shape} and dtype {np.dtype(dtype)} has {num_elements * itemsize} bytes: kernels "
            f"need a multiple of {ROW_ALIGNMENT} bytes, and another dtype than bool"
        )
    rows = _largest_divisor(num_elements // lanes, min(MAX_BOX_DIM, box_bytes // (lanes * itemsize)), 1)
    assert rows is not None
    return PageView(num_elements // (lanes * rows), rows, lanes)


def check_pages(pool: jax.Array, page_ids: jax.Array) -> None:
    """ValueError unless these are a pool of pages and ids."""
    if pool.ndim < 2 or not pool.size:
        raise ValueError(f"a pool is [num_pages, ...] and not empty, but this is {pool.dtype}{list(pool.shape)}")
    if page_ids.ndim != 1 or page_ids.dtype != jnp.int32 or not page_ids.size:
        raise ValueError(f"page_ids must be int32[n] with n > 0, not {page_ids.dtype}{list(page_ids.shape)}")


def _largest_divisor(number: int, at_most: int, multiple_of: int) -> int | None:
    """Of `number`, among the multiples of `multiple_of`."""
    candidates = range(at_most // multiple_of * multiple_of, 0, -multiple_of)
    return next((n for n in candidates if number % n == 0), None) if number else None
