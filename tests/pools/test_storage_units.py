"""How consecutive pages share values of storage."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcache
from jaxcache.pools.page_layout import page_layout
from jaxcache.pools.storage_cells import MAX_UNIT_PAGES, VALUE_BYTES, unit_pages
from jaxcache.pools.storage_units import chunks, cut

UNITS = st.sampled_from([1, 2, 8, 64])


@given(st.integers(0, 300), st.integers(1, 300), UNITS)
def test_a_run_is_cut_into_aligned_values(start, num_pages, unit):
    values = cut(range(start, start + num_pages), unit)
    assert [page for pages in values for page in pages] == list(range(start, start + num_pages))
    for pages in values:
        assert len(pages) in (1, 2, 4, 8, 16, 32, 64)
        assert len(pages) <= unit
        assert pages.start % len(pages) == 0


@given(st.integers(0, 300), st.integers(1, 300), UNITS)
def test_no_two_neighbours_could_be_one(start, num_pages, unit):
    for one, next_one in zip(values := cut(range(start, start + num_pages), unit), values[1:], strict=False):
        both = range(one.start, next_one.stop)
        is_value = len(one) == len(next_one) and both.start % len(both) == 0 and len(both) <= unit
        assert not is_value, f"{one} and {next_one}"


def test_a_long_run_is_mostly_whole_units():
    assert cut(range(3, 1024), 8)[:4] == [range(3, 4), range(4, 8), range(8, 16), range(16, 24)]
    assert len(cut(range(3, 1024), 8)) == 2 + (1024 - 8) // 8


def test_chunks():
    assert list(chunks(5, 2)) == [slice(0, 2), slice(2, 4), slice(4, 5)]


def component(page_bytes: int) -> jaxcache.Component:
    spec = jaxcache.FieldSpec(
        "kv", (2, 2, 4, 2, page_bytes // 128), "float32", ("layers", None, "slots", "heads", None)
    )
    return jaxcache.FullAttention("full", (spec,))


@pytest.mark.parametrize(
    ("page_bytes", "num_pages"), [(128, MAX_UNIT_PAGES), (1 << 14, 16), (1 << 16, 4), (3 << 16, 1), (1 << 20, 1)]
)
def test_a_unit_has_so_many_pages_that_values_reach_their_size(make_mesh, page_bytes, num_pages):
    layout = page_layout(component(page_bytes), make_mesh())
    assert unit_pages(layout) == num_pages
    assert num_pages == MAX_UNIT_PAGES or 2 * max(num_pages * page_bytes, VALUE_BYTES // 2 + 1) > VALUE_BYTES


def test_meshes_with_one_grid_have_the_same_unit(make_mesh):
    units = {
        unit_pages(page_layout(component(1 << 16), make_mesh(*shape), (2, 2, 2)))
        for shape in [(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 2)]
    }
    assert units == {32}
