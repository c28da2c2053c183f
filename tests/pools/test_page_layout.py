"""Shapes, shardings and bytes of pages on meshes."""

import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxcache.components import FieldSpec, FullAttention
from jaxcache.pools.page_layout import page_layout

KV = FieldSpec("kv", (3, 2, 8, 2, 4), "bfloat16", ("layers", None, "slots", "heads", None))
INDEX = FieldSpec("index", (3, 8, 4), "float32", ("layers", "slots", None))
ROPE = FieldSpec("latent", (3, 1, 4), "float32", ("layers", "slots", None))


def layout_of(mesh, *fields):
    return page_layout(FullAttention("full", fields), mesh)


def test_shapes_and_offsets(make_mesh):
    layout = layout_of(make_mesh(2, 2, 2), KV, INDEX)
    kv, index = layout.fields
    assert kv.padded_shape == (4, 2, 8, 2, 4)
    assert kv.pool_spec == P(None, "pp", None, "cp", "tp", None)
    assert kv.local_shape == (2, 2, 4, 1, 4)
    assert (kv.offset, kv.local_bytes) == (0, 128)
    assert index.local_shape == (2, 4, 4)
    assert (index.offset, index.local_bytes, layout.row_bytes) == (128, 128, 256)


def test_page_bytes_exclude_padding_and_repetition(make_mesh):
    layouts = [layout_of(make_mesh(*shape), KV, INDEX, ROPE) for shape in ((1, 1, 1), (2, 1, 2), (1, 4, 2))]
    assert {layout.page_bytes for layout in layouts} == {3 * 2 * 8 * 2 * 4 * 2 + 3 * 8 * 4 * 4 + 3 * 4 * 4}


def test_few_heads_are_repeated(make_mesh):
    assert layout_of(make_mesh(1, 4, 1), KV).fields[0].padded_shape[3] == 4


def test_few_slots_are_repeated_over_cp(make_mesh):
    assert layout_of(make_mesh(2, 1, 1), ROPE).fields[0].pool_spec == P(None, "pp", None, None)


@pytest.mark.parametrize(
    ("shape", "spec", "message"),
    [
        ((1, 2, 1), FieldSpec("kv", (3, 4), "float32", ("heads", None)), "3 heads do not divide over tp=2"),
        ((2, 1, 1), FieldSpec("kv", (5, 4), "float32", ("slots", None)), "5 slots do not divide over cp=2"),
        ((1, 4, 1), FieldSpec("kv", (3, 4), "float32", ("heads", None)), "3 heads do not divide over tp=4"),
    ],
)
def test_what_does_not_divide_names_both_numbers(make_mesh, shape, spec, message):
    with pytest.raises(ValueError, match=message):
        layout_of(make_mesh(*shape), spec)


def test_rows_hold_whole_fields(make_mesh):
    odd = FieldSpec("odd", (3,), "uint8", (None,))
    layout = layout_of(make_mesh(1, 1, 1), odd, INDEX)
    assert layout.fields[1].offset % 16 == 0
    assert layout.row_bytes % 16 == 0
    assert np.dtype("float32") == layout.fields[1].dtype
