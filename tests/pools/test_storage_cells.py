"""Cells of the storage grid: which bytes they are, what they are called, and that no mesh changes either."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
import pytest

from jaxcache.components import FieldSpec, FullAttention, np_dtype
from jaxcache.pools.page_layout import PageLayout, page_layout
from jaxcache.pools.storage_cells import storage_cells

KV = FieldSpec("kv", (3, 2, 8, 2, 4), "bfloat16", ("layers", None, "slots", "heads", None))
INDEX = FieldSpec("index", (3, 8, 5), "uint8", ("layers", "slots", None))
ROPE = FieldSpec("latent", (3, 1, 4), "float32", ("layers", "slots", None))
STATE = FieldSpec("state", (4, 3), "float32", ("heads", None))
FIELDS = (KV, INDEX, ROPE, STATE)
MESHES_BY_GRID = {
    (2, 4, 2): [(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 1), (1, 4, 1), (2, 2, 2), (1, 4, 2)],
    (1, 2, 3): [(1, 1, 1), (1, 2, 1), (1, 1, 3), (1, 2, 3)],
    (8, 1, 4): [(1, 1, 1), (2, 1, 2), (4, 1, 2), (8, 1, 1)],
    (1, 1, 1): [(1, 1, 1)],
}


def layout_of(mesh, grid=None, fields=FIELDS) -> PageLayout:
    return page_layout(FullAttention("full", tuple(fields)), mesh, grid)


def ranks(layout: PageLayout) -> list[tuple[int, ...]]:
    return list(np.ndindex(layout.mesh.devices.shape))


def page_of(seed: int) -> dict[str, np.ndarray]:
    """Random bits of every field, unsharded."""
    rng = np.random.default_rng(seed)
    page = {}
    for spec in FIELDS:
        dtype = np_dtype(spec.dtype)
        bits = rng.integers(0, 256, math.prod(spec.shape) * dtype.itemsize, np.uint8)
        page[spec.name] = bits.view(dtype).reshape(spec.shape)
    return page


def row_of(layout: PageLayout, page: Mapping[str, np.ndarray], rank: tuple[int, ...]) -> np.ndarray:
    """What a rank holds of a page, as the device pools are sharded."""
    row = np.zeros(layout.row_bytes, np.uint8)
    at = dict(zip(layout.mesh.axis_names, rank, strict=True))
    for field in layout.fields:
        whole = page[field.spec.name]
        for dim, (n, padded) in enumerate(zip(whole.shape, field.padded_shape, strict=True)):
            if field.spec.axes[dim] == "heads":
                whole = np.repeat(whole, padded // n, axis=dim)
            else:
                whole = np.concatenate([whole, np.zeros_like(whole.take(range(padded - n), axis=dim))], axis=dim)
        index = tuple(
            slice(None) if axis is None else slice(at[axis] * n, (at[axis] + 1) * n)
            for axis, n in zip(field.axes, field.local_shape, strict=True)
        )
        row[field.byte_range] = np.ascontiguousarray(whole[index]).reshape(-1).view(np.uint8)
    return row


def values_of(layout: PageLayout, page: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """Every value that the ranks would store, each by its one writer."""
    values: dict[str, bytes] = {}
    for rank in ranks(layout):
        row = row_of(layout, page, rank)
        for cell in storage_cells(layout, rank):
            value = cell.value(row).tobytes()
            assert len(value) == cell.num_bytes
            if cell.is_writer:
                assert cell.name not in values
                values[cell.name] = value
    return values


@pytest.mark.parametrize(("grid", "shape"), [(grid, shape) for grid, all_ in MESHES_BY_GRID.items() for shape in all_])
def test_every_mesh_stores_and_finds_the_same_values(make_mesh, grid, shape):
    page = page_of(1)
    layout = layout_of(make_mesh(*shape), grid)
    values = values_of(layout, page)
    assert values == values_of(layout_of(make_mesh(), grid), page)
    for rank in ranks(layout):
        row = np.zeros(layout.row_bytes, np.uint8)
        for cell in storage_cells(layout, rank):
            room = cell.room(row)
            room[:] = np.frombuffer(values[cell.name], np.uint8)
            cell.put_back(room, row)
        assert np.array_equal(row, row_of(layout, page, rank))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 3), (2, 1, 3)])
def test_where_the_grid_is_the_mesh_the_row_is_the_value(make_mesh, shape):
    layout = layout_of(make_mesh(*shape), None, (KV, INDEX))
    for rank in ranks(layout):
        (cell,) = storage_cells(layout, rank)
        row = np.zeros(layout.row_bytes, np.uint8)
        assert np.shares_memory(cell.value(row), row)
        assert np.shares_memory(cell.room(row), row)
        assert cell.start == 0
        assert layout.row_bytes - cell.num_bytes < 16


def test_layers_of_one_field_are_never_copied(make_mesh):
    """They lie in the row in one piece, padding behind them."""
    layout = layout_of(make_mesh(1, 1, 2), (1, 1, 2), (KV,))
    layers = layout_of(make_mesh(), (1, 1, 3), (KV,))
    assert [cell.start for rank in ranks(layout) for cell in storage_cells(layout, rank)] == [0, 0]
    assert [cell.start for cell in storage_cells(layers, (0, 0, 0))] == [0, 256, 512]


def test_heads_are_cut_out(make_mesh):
    layout = layout_of(make_mesh(), (1, 2, 1), (KV,))
    cells = storage_cells(layout, (0, 0, 0))
    assert [cell.start for cell in cells] == [None, None]
    assert [cell.num_bytes for cell in cells] == [384, 384]


def test_names_say_which_part_it_is(make_mesh):
    layout = layout_of(make_mesh(2, 2, 2), None, (KV,))
    (cell,) = storage_cells(layout, (1, 0, 1))
    assert cell.name == "kv:bfloat16[3,2,8,2,4]@2:3,:,4:8,0:1,:"


def test_names_differ_where_bytes_differ(make_mesh):
    """X9."""
    layout = layout_of(make_mesh(2, 2, 2), None, (KV, INDEX))
    cells = [cell for at in itertools.product(range(2), repeat=3) for cell in storage_cells(layout, at)]
    assert len({cell.name for cell in cells}) == 8
    assert all(cell.is_writer for cell in cells)


def test_what_several_ranks_hold_one_of_them_writes(make_mesh):
    few_heads, few_slots = layout_of(make_mesh(1, 4, 1), None, (KV,)), layout_of(make_mesh(2, 1, 1), None, (ROPE,))
    cells = [cell for rank in ranks(few_heads) for cell in storage_cells(few_heads, rank)]
    assert cells[0].name == cells[1].name != cells[2].name == cells[3].name
    assert [cell.is_writer for cell in cells] == [True, False, True, False]
    cells = [cell for rank in ranks(few_slots) for cell in storage_cells(few_slots, rank)]
    assert [cell.is_writer for cell in cells] == [True, False]
    assert cells[0].name == cells[1].name


def test_a_rank_of_nothing_but_padding_stores_nothing(make_mesh):
    layout = layout_of(make_mesh(1, 1, 4), None, (KV,))
    assert [len(storage_cells(layout, rank)) for rank in ranks(layout)] == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("shape", "grid", "spec", "message"),
    [
        ((2, 1, 1), (3, 1, 1), KV, "storage grid's cp=3 must be a multiple of the mesh's cp=2"),
        ((1, 2, 1), (1, 1, 1), KV, "storage grid's tp=1 must be a multiple of the mesh's tp=2"),
        ((1, 1, 1), (3, 1, 1), KV, "'kv': 8 slots do not divide over the storage grid's cp=3"),
        ((1, 1, 1), (1, 3, 1), KV, "'kv': 2 heads do not divide over the storage grid's tp=3"),
        (
            (1, 1, 2),
            (1, 1, 4),
            FieldSpec("kv", (5, 4), "float32", ("layers", None)),
            "'kv': the storage grid's pp=4 cuts 5 layers into parts of 2, .* the 3 of a rank with pp=2",
        ),
        (
            (2, 1, 1),
            (4, 1, 1),
            FieldSpec("kv", (2, 4), "float32", ("slots", None)),
            "'kv': the storage grid's cp=4 cuts 2 slots into parts of 2, .* the 1 of a rank with cp=2",
        ),
    ],
)
def test_a_grid_that_does_not_fit_says_why(make_mesh, shape, grid, spec, message):
    layout = layout_of(make_mesh(*shape), grid, (spec,))
    with pytest.raises(ValueError, match=message):
        storage_cells(layout, (0, 0, 0))
