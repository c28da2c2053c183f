"""Pages of a pool that is a list of arrays, one per layer (or two, keys and values apart), as most engines have them.

    layers  [num_pages, *part] each     page 7 is row 7 of all of them
    pages   [n, num_layers, *part]      page-first: what goes to host memory and to storage

One launch moves up to `Ring.layers` of them: each block stays with one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.page_view import check_pages, page_view
from kernels_pallas.ring import BLOCK_AXIS, DEFAULT_RING, Boxes, Ref, Ring

LAYER_AXIS = "layer"


def gather_layers_reference(layers: Sequence[jax.Array], page_ids: jax.Array) -> jax.Array:
    """As `gather_layers`, by XLA."""
    return jnp.stack([layer.at[page_ids].get(mode="clip") for layer in layers], axis=1)


def scatter_layers_reference(
    layers: Sequence[jax.Array], page_ids: jax.Array, pages: jax.Array
) -> tuple[jax.Array, ...]:
    """As `scatter_layers`, by XLA."""
    return tuple(
        layer.at[page_ids].set(pages[:, i], mode="drop", unique_indices=True) for i, layer in enumerate(layers)
    )


def gather_layers(
    layers: Sequence[jax.Array], page_ids: jax.Array, *, ring: Ring = DEFAULT_RING, interpret: Any = None
) -> jax.Array:
    """Copies whole pages out of all layers.

    layers:    [num_pages, *part] each, one shard, all alike; not donated
    page_ids:  int32[n], padded with `num_pages`; a padding row is undefined
    interpret: parameters of Pallas's interpreter; None compiles for the GPU
    returns:   [n, num_layers, *part]
    Moves 2 * n * num_layers * part_bytes. ValueError if a part is no multiple of 16 bytes, or layers differ.
    """
    check_layers(layers, page_ids)
    launch = _Launch(layers, page_ids, ring, interpret)
    num_boxes = len(page_ids) * len(layers) * launch.view.boxes
    staged = jax.new_ref(jnp.empty((num_boxes, *launch.view.box_shape), layers[0].dtype))
    launch([launch.view.of(layer) for layer in layers], staged, lambda stored, staged: (stored, staged))
    return jax.freeze(staged).reshape(len(page_ids), len(layers), *layers[0].shape[1:])


def scatter_layers(
    layers: Sequence[jax.Array],
    page_ids: jax.Array,
    pages: jax.Array,
    *,
    ring: Ring = DEFAULT_RING,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """Overwrites whole pages of all layers.

    layers:    [num_pages, *part] each, one shard, all alike; changed in place where the caller donates them
    page_ids:  int32[n], each at most once, padded with `num_pages`, whose rows are dropped
    pages:     [n, num_layers, *part], like the layers
    interpret: parameters of Pallas's interpreter; None compiles for the GPU
    returns:   the layers
    Moves 2 * n * num_layers * part_bytes. ValueError if a part is no multiple of 16 bytes, or layers differ.
    """
    check_layers(layers, page_ids)
    shape = (len(page_ids), len(layers), *layers[0].shape[1:])
    if pages.shape != shape or pages.dtype != layers[0].dtype:
        raise ValueError(f"pages must be {layers[0].dtype}{list(shape)}, not {pages.dtype}{list(pages.shape)}")
    launch = _Launch(layers, page_ids, ring, interpret)
    stored = [jax.new_ref(launch.view.of(layer)) for layer in layers]
    staged = pages.reshape(-1, *launch.view.box_shape)
    launch(stored, staged, lambda stored, staged: (staged, stored))
    return tuple(jax.freeze(ref).reshape(layer.shape) for ref, layer in zip(stored, layers, strict=True))


def check_layers(layers: Sequence[jax.Array], page_ids: jax.Array) -> None:
    """ValueError unless these are layers that are alike, and ids."""
    if not layers:
        raise ValueError("layers must be at least one")
    check_pages(layers[0], page_ids)
    for i, layer in enumerate(layers):
        if (layer.shape, layer.dtype) != (layers[0].shape, layers[0].dtype):
            raise ValueError(
                f"layers must be alike: layer {i} is {layer.dtype}{list(layer.shape)}, but layer 0 is "
                f"{layers[0].dtype}{list(layers[0].shape)}"
            )


Place = Callable[[jax.Array], Ref]  # of an item: of a box of one layer, counted page by page
Direction = Callable[[Place, Place], tuple[Place, Place]]  # (stored, staged) -> (source, target)


class _Launch:
    """Kernels that copy between layers and staged pages, for some layers each."""

    def __init__(self, layers: Sequence[jax.Array], page_ids: jax.Array, ring: Ring, interpret: Any):
        self.view = page_view(layers[0].shape[1:], layers[0].dtype, ring.box_bytes)
        self.num_pages, self.num_layers, self.dtype = len(layers[0]), len(layers), layers[0].dtype
        self.page_ids, self.ring, self.interpret = page_ids, ring, interpret
        self.num_items = len(page_ids) * self.view.boxes

    def __call__(self, stored: Sequence[Any], staged: Any, direction: Direction) -> None:
        """stored, staged: boxes; references where they are written."""
        for first in range(0, self.num_layers, self.ring.layers):
            some = stored[first : first + self.ring.layers]
            blocks = min(max(1, self.ring.blocks // len(some)), self.num_items)
            plgpu.kernel(
                partial(self._copy_all, first, blocks, direction),
                scratch_types=self.ring.scratch(self.view.box_shape, self.dtype),
                grid=(len(some), blocks),
                grid_names=(LAYER_AXIS, BLOCK_AXIS),
                interpret=self.interpret,
            )(*some, self.page_ids, staged)

    def _copy_all(self, first: int, blocks: int, direction: Direction, *refs: Ref) -> None:
        *stored, ids, staged, slots, barriers = refs

        def copy(i: int) -> None:
            boxes = self._boxes(stored[i], staged, first + i, ids, direction)
            self.ring.copy(boxes, blocks, slots, barriers)

        lax.switch(lax.axis_index(LAYER_AXIS), [partial(copy, i) for i in range(len(stored))])

    def _boxes(self, stored: Ref, staged: Ref, layer: int, ids: Ref, direction: Direction) -> Boxes:
        view = self.view

        def in_layer(item: jax.Array) -> Ref:
            return stored.at[view.box(ids[view.page(item)], item)]

        def in_staging(item: jax.Array) -> Ref:
            return staged.at[view.box(view.page(item) * self.num_layers + layer, item)]

        return Boxes(
            self.num_items, lambda item: ids[view.page(item)] < self.num_pages, *direction(in_layer, in_staging)
        )
