"""Memory that CPU arrays take over, and that is used again when they are gone."""

from __future__ import annotations

import gc

import jax
import numpy as np
import pytest

from jaxcache.runtime.shard_copies import Buffers, pages_from_rows


def filled(buffers: Buffers, value: int) -> np.ndarray:
    buffer = buffers.take(4, 4096)
    buffer[...] = value
    return buffer


def test_memory_comes_back_when_the_last_view_is_gone():
    buffers = Buffers()
    buffer = filled(buffers, 1)
    address, view = buffer.ctypes.data, buffer[1:].view(np.int32)
    del buffer
    gc.collect()
    assert buffers.take(4, 4096).ctypes.data != address, "a view of it is alive"
    del view
    gc.collect()
    assert address in {buffers.take(4, 4096).ctypes.data for _ in range(2)}


def test_an_array_that_aliases_memory_keeps_it():
    """No later buffer may change what a program still reads."""
    buffers = Buffers()
    buffer = filled(buffers, 7)
    address = buffer.ctypes.data
    array = jax.device_put(buffer, jax.devices("cpu")[0])
    del buffer
    gc.collect()
    assert array.unsafe_buffer_pointer() == address, "not taken over: the reuse saves nothing"
    others = [filled(buffers, value) for value in range(3)]
    assert address not in {other.ctypes.data for other in others}
    twice = array + array
    del array
    gc.collect()
    assert (np.asarray(twice) == 14).all()


def test_sizes_do_not_mix():
    buffers = Buffers()
    for num_rows, row_bytes in [(1, 0), (1, 16), (4, 4096), (8, 2048), (3, 100)]:
        assert buffers.take(num_rows, row_bytes).shape == (num_rows, row_bytes)


@pytest.mark.parametrize("columns", [slice(0, 96), slice(16, 48)], ids=["whole rows", "one field"])
def test_rows_become_pages(columns):
    rows = np.random.default_rng(0).integers(0, 256, (10, 96), np.uint8)[:, columns]
    page_ids = np.array([7, 0, 3], np.int32)
    buffer = np.zeros((4, rows.shape[1]), np.uint8)
    assert pages_from_rows(rows, page_ids, buffer) is buffer
    assert np.array_equal(buffer[:3], rows[page_ids])
    assert not buffer[3].any()
