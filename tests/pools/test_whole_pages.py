"""Whole pages: the same words on every mesh, back to the same bits, and sums that see a single bit."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxcache.components import FieldSpec, FullAttention, np_dtype
from jaxcache.pools import whole_pages
from jaxcache.pools.page_layout import PageLayout, page_layout
from jaxcache.pools.whole_pages import abstract_words, page_sums, staged, whole

NUM_PAGES = 4
KV = FieldSpec("kv", (3, 2, 8, 2, 4), "bfloat16", ("layers", None, "slots", "heads", None))
FIELDS = (
    KV,
    FieldSpec("index", (3, 8, 5), "uint8", ("layers", "slots", None)),
    FieldSpec("scale", (3, 8), "float8_e4m3fn", ("layers", "slots")),
    FieldSpec("latent", (3, 1, 4), "float32", ("layers", "slots", None)),
    FieldSpec("flags", (4, 3), "bool", ("heads", None)),
    *(FieldSpec(f"layer{i}", (8, 2, 16), "int16", ("slots", "heads", None)) for i in range(3)),  # moved as one
)
SHAPES = [(1, 1, 1), (2, 2, 2), (1, 4, 1), (1, 1, 3), (4, 2, 1)]


def layout_on(mesh) -> PageLayout:
    return page_layout(FullAttention("full", FIELDS), mesh)


def random_pages(seed: int) -> dict[str, np.ndarray]:
    """Any bits of every field, all NaNs among them: [NUM_PAGES, *shape]."""
    rng, pages = np.random.default_rng(seed), {}
    for spec in FIELDS:
        dtype, shape = np_dtype(spec.dtype), (NUM_PAGES, *spec.shape)
        high = 2 if spec.dtype == "bool" else 256
        pages[spec.name] = rng.integers(0, high, math.prod(shape) * dtype.itemsize, np.uint8).view(dtype).reshape(shape)
    return pages


def padded(layout: PageLayout, pages: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By field, as the pools have them: heads are repeated; layers that are only padding hold anything."""
    found = {}
    for f in layout.fields:
        array = pages[f.spec.name]
        for dim, (num, num_padded) in enumerate(zip(f.spec.shape, f.padded_shape, strict=True), start=1):
            if f.spec.axes[dim - 1] == "heads":
                array = np.repeat(array, num_padded // num, axis=dim)
            elif num_padded > num:
                more = array.take(range(num_padded - num), axis=dim)
                array = np.concatenate([array, more], axis=dim)
        found[f.spec.name] = array
    return found


def staging_of(layout: PageLayout, pages: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    arrays, staging = padded(layout, pages), {}
    for stack in layout.stacks:
        of_stack = [arrays[name] for name in stack.names]
        array = of_stack[0] if len(of_stack) == 1 else np.stack(of_stack, axis=1)
        staging[stack.field.spec.name] = jax.device_put(array, layout.staging_shardings()[stack.field.spec.name])
    return staging


def bits(array) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(array)).reshape(-1).view(np.uint8)


def check_round_trip(layout: PageLayout, seed: int = 0) -> None:
    """Words are the page's own bits, and give them back in any order; padding comes back as zeros."""
    pages = random_pages(seed)
    words = whole(layout, staging_of(layout, pages))
    abstract = abstract_words(layout, NUM_PAGES)
    for name, array in words.items():
        assert (array.shape, array.dtype) == (abstract[name].shape, abstract[name].dtype)
        assert array.sharding == abstract[name].sharding
        assert np.array_equal(bits(array), bits(pages[name])), name
    rows = np.array([2, 0, 0, 3], np.int32)
    back = staged(layout, words, rows)
    for stack in layout.stacks:
        array = back[stack.field.spec.name]
        assert array.sharding == layout.staging_shardings()[stack.field.spec.name]
        fields = [array] if len(stack.names) == 1 else [array[:, i] for i in range(len(stack.names))]
        for name, found in zip(stack.names, fields, strict=True):
            field = next(f for f in layout.fields if f.spec.name == name)
            expected = padded(layout, {n: a[rows] for n, a in pages.items()})[name]
            for dim, (axis, num) in enumerate(zip(field.spec.axes, field.spec.shape, strict=True), start=1):
                if axis == "layers":
                    np.moveaxis(expected, dim, 0)[num:] = 0
            assert np.array_equal(bits(found), bits(expected)), name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_words_are_the_bits_of_the_page(make_mesh, shape):
    check_round_trip(layout_on(make_mesh(*shape)))


def test_on_an_explicit_mesh(make_mesh):
    check_round_trip(layout_on(make_mesh(2, 2, 2, axis_type=AxisType.Explicit)))


@pytest.mark.mutation
def test_a_head_that_is_not_the_first_of_its_copies(make_mesh, monkeypatch):
    """With every head's copies side by side, taking the first ones would mix heads up."""
    monkeypatch.setattr(whole_pages, "_dimensions", _as_layers)
    whole_pages._whole_program.cache_clear()
    try:
        with pytest.raises(AssertionError, match="kv"):
            check_round_trip(layout_on(make_mesh(1, 4, 1)))
    finally:
        whole_pages._whole_program.cache_clear()
        whole_pages._staged_program.cache_clear()


def _as_layers(field):
    return [("layers", num, n) for num, n in zip(field.spec.shape, field.padded_shape, strict=True)]


def test_sums_are_the_same_on_every_mesh(make_mesh):
    pages = random_pages(3)
    sums = []
    for shape in SHAPES:
        layout = layout_on(make_mesh(*shape))
        sums.append(np.asarray(page_sums(layout, whole(layout, staging_of(layout, pages)))))
    assert all(np.array_equal(found, sums[0]) for found in sums)
    assert sums[0].shape == (NUM_PAGES, len(FIELDS)) and sums[0].dtype == np.uint32
    assert len(np.unique(sums[0])) == sums[0].size


def test_sums_see_a_single_bit_and_a_change_of_places(make_mesh, rng):
    layout = layout_on(make_mesh())
    words = {name: np.array(array) for name, array in whole(layout, staging_of(layout, random_pages(4))).items()}
    before = np.asarray(page_sums(layout, words))
    for _ in range(50):
        f = int(rng.integers(len(FIELDS)))
        changed = words[FIELDS[f].name].copy()
        flat = changed.reshape(NUM_PAGES, -1)
        page, at = int(rng.integers(NUM_PAGES)), int(rng.integers(flat.shape[1]))
        if rng.random() < 0.5:
            flat[page, at] ^= flat.dtype.type(1 << int(rng.integers(8 * flat.itemsize)))
        else:
            other = int(rng.integers(flat.shape[1]))
            if flat[page, at] == flat[page, other]:
                continue
            flat[page, [at, other]] = flat[page, [other, at]]
        differs = np.asarray(page_sums(layout, {**words, FIELDS[f].name: changed})) != before
        assert differs[page, f] and differs.sum() == 1
