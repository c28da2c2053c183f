"""Whole pages: what a page holds, whatever mesh it lies on. Layers are not padded, heads are not repeated.

    staging  {stack: [pages, fields, *padded page]} --whole--> {field: [pages, *words of a page]} --staged--> staging
             of one mesh                                       of any mesh

A page is unsigned words of its elements' width, so that nothing interprets its numbers on the way. In a dimension that
is neither padded nor repeated the words are sharded as the page is; the others are on every rank of their axis.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxcache.components.base import FieldSpec
from jaxcache.pools.device_pool import Staging
from jaxcache.pools.page_layout import FieldLayout, PageLayout, Stack

Words = dict[str, jax.Array]  # by field: uint[pages, *page_words(spec)]

MAX_WORD_BYTES = 4  # jax has no wider ones unless it is told


def page_words(spec: FieldSpec, dtype: np.dtype) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of the words of one page. Wider elements are several words, in one more dimension."""
    word_bytes = min(dtype.itemsize, MAX_WORD_BYTES)
    words = dtype.itemsize // word_bytes
    return (*spec.shape, *([words] if words > 1 else [])), np.dtype(f"uint{8 * word_bytes}")


def abstract_words(layout: PageLayout, num_pages: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What `whole` returns for so many pages, and `staged` takes."""
    shardings = _word_shardings(layout)
    found = {}
    for f in layout.fields:
        shape, dtype = page_words(f.spec, f.dtype)
        found[f.spec.name] = jax.ShapeDtypeStruct((num_pages, *shape), dtype, sharding=shardings[f.spec.name])
    return found


def whole(layout: PageLayout, staging: Staging) -> Words:
    """Dispatches the making of whole pages. staging: as PageMover.gather returns it; not donated"""
    return _whole_program(layout)(jax.device_put(staging, _staging_shardings(layout)))


def staged(layout: PageLayout, words: Words, rows: np.ndarray) -> Staging:
    """Dispatches the making of staging arrays of words[rows]: as PageMover.scatter takes them.

    rows: int32[bucket]
    """
    staging = _staged_program(layout)(words, rows)
    return jax.device_put(staging, layout.staging_shardings())


def page_sums(layout: PageLayout, words: Words) -> jax.Array:
    """Dispatches uint32[pages, fields], on every device: a sum of each page, the same on every mesh.

    It differs whenever a single word of a page does, and else by chance in all but one of 2^32 cases.
    """
    return _sums_program(layout)(words)


def _auto_mesh(mesh: Mesh) -> Mesh:
    """Where jax may choose how what it computes is sharded on the way."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _staging_shardings(layout: PageLayout) -> dict[str, NamedSharding]:
    """As layout.staging_shardings(), on that mesh."""
    mesh = _auto_mesh(layout.mesh)
    return {s.field.spec.name: NamedSharding(mesh, s.field.pool_spec) for s in layout.stacks}


def _word_shardings(layout: PageLayout) -> dict[str, NamedSharding]:
    mesh = _auto_mesh(layout.mesh)
    return {f.spec.name: NamedSharding(mesh, PartitionSpec(None, *_word_axes(f))) for f in layout.fields}


def _word_axes(field: FieldLayout) -> list[str | None]:
    dimensions = zip(field.axes, field.spec.shape, field.padded_shape, strict=True)
    return [axis if num == padded else None for axis, num, padded in dimensions]


@functools.cache
def _whole_program(layout: PageLayout):
    """jit staging -> words."""

    def whole_pages(staging):
        words = {}
        for stack in layout.stacks:
            array = staging[stack.field.spec.name]
            fields = [array] if len(stack.names) == 1 else [array[:, i] for i in range(len(stack.names))]
            for name, pages in zip(stack.names, fields, strict=True):
                words[name] = _unpadded(pages, _first_field(layout, stack))
        return words

    return jax.jit(whole_pages, out_shardings=_word_shardings(layout))


@functools.cache
def _staged_program(layout: PageLayout):
    """jit (words, rows) -> staging."""

    def staging_of(words, rows):
        staging = {}
        for stack in layout.stacks:
            field = _first_field(layout, stack)
            fields = [_padded(words[name][rows], field) for name in stack.names]
            staging[stack.field.spec.name] = fields[0] if len(fields) == 1 else jnp.stack(fields, axis=1)
        return staging

    return jax.jit(staging_of, out_shardings=_staging_shardings(layout))


@functools.cache
def _sums_program(layout: PageLayout):
    """jit words -> sums."""

    def sums(words):
        return jnp.stack([_page_sums(words[f.spec.name]) for f in layout.fields], axis=1)

    return jax.jit(sums, out_shardings=NamedSharding(_auto_mesh(layout.mesh), PartitionSpec()))


def _first_field(layout: PageLayout, stack: Stack) -> FieldLayout:
    """That all fields of a stack are like."""
    return next(f for f in layout.fields if f.spec.name == stack.names[0])


def _unpadded(pages: jax.Array, field: FieldLayout) -> jax.Array:
    """[pages, *padded_shape] -> words of [pages, *shape]: a head that is repeated stands there once."""
    dtype = page_words(field.spec, field.dtype)[1]
    words = pages.astype(dtype) if pages.dtype == bool else jax.lax.bitcast_convert_type(pages, dtype)
    for dim, (name, num, padded) in enumerate(_dimensions(field), start=1):
        if name == "heads":
            words = jax.lax.slice_in_dim(words, 0, padded, padded // num, axis=dim)
        else:
            words = jax.lax.slice_in_dim(words, 0, num, axis=dim)
    return words


def _padded(words: jax.Array, field: FieldLayout) -> jax.Array:
    """The other way round; padded layers are zero."""
    for dim, (name, num, padded) in enumerate(_dimensions(field), start=1):
        if name == "heads":
            words = jnp.repeat(words, padded // num, axis=dim)
        else:
            widths = [(0, 0)] * words.ndim
            widths[dim] = (0, padded - num)
            words = jnp.pad(words, widths)
    return words.astype(bool) if field.dtype == bool else jax.lax.bitcast_convert_type(words, field.dtype)


def _dimensions(field: FieldLayout):
    """(axis name, extent, padded extent) of the dimensions of a page."""
    return zip(field.spec.axes, field.spec.shape, field.padded_shape, strict=True)


def _page_sums(words: jax.Array) -> jax.Array:
    """uint32[pages]: every word times an odd number that its place in the page says, modulo 2^32.

    An odd number has an inverse, so one changed word always changes the sum. No reshape: that would move shards.
    """
    place = jnp.zeros(words.shape, jnp.uint32)
    for dim in range(1, words.ndim):
        stride = math.prod(words.shape[dim + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim) * jnp.uint32(stride)
    weight = (place + jnp.uint32(1)) * jnp.uint32(0x9E3779B1)
    weight = (weight ^ (weight >> 15)) * jnp.uint32(0x85EBCA77)
    weight = (weight ^ (weight >> 13)) | jnp.uint32(1)
    return (words.astype(jnp.uint32) * weight).sum(axis=tuple(range(1, words.ndim)), dtype=jnp.uint32)
