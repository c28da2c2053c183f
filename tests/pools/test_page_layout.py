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
    """K3."""
    with pytest.raises(ValueError, match=message):
        layout_of(make_mesh(*shape), spec)


def test_rows_hold_whole_fields(make_mesh):
    odd = FieldSpec("odd", (3,), "uint8", (None,))
    layout = layout_of(make_mesh(1, 1, 1), odd, INDEX)
    assert layout.fields[1].offset % 16 == 0
    assert layout.row_bytes % 16 == 0
    assert np.dtype("float32") == layout.fields[1].dtype


def test_fields_that_are_alike_are_moved_as_one(make_mesh):
    layers = [FieldSpec(f"layer{i}", (8, 2, 4), "bfloat16", ("slots", "heads", None)) for i in range(3)]
    layout = layout_of(make_mesh(2, 2, 1), KV, *layers, INDEX)
    assert [stack.names for stack in layout.stacks] == [("kv",), ("layer0", "layer1", "layer2"), ("index",)]
    kv, stack, index = (stack.field for stack in layout.stacks)
    assert (kv, index) == (layout.fields[0], layout.fields[4])
    assert (stack.padded_shape, stack.local_shape) == ((3, 8, 2, 4), (3, 4, 1, 4))
    assert stack.pool_spec == P(None, None, "cp", "tp", None)
    assert stack.byte_range == slice(layout.fields[1].byte_range.start, layout.fields[3].byte_range.stop)


@pytest.mark.parametrize(
    "other",
    [
        FieldSpec("other", (8, 4), "int16", ("slots", None)),  # the same bytes
        FieldSpec("other", (8, 4), "bfloat16", (None, None)),
        FieldSpec("other", (8, 8), "bfloat16", ("slots", None)),
    ],
)
def test_fields_that_differ_are_moved_apart(make_mesh, other):
    layer = FieldSpec("layer", (8, 4), "bfloat16", ("slots", None))
    assert [stack.names for stack in layout_of(make_mesh(), layer, other).stacks] == [("layer",), ("other",)]


def test_fields_with_gaps_between_them_are_moved_apart(make_mesh):
    odd = [FieldSpec(f"odd{i}", (3,), "float32", (None,)) for i in range(2)]
    assert [stack.names for stack in layout_of(make_mesh(), *odd).stacks] == [("odd0",), ("odd1",)]
