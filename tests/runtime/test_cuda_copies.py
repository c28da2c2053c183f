"""Copies between a GPU and pinned rows by the CUDA driver: bytes, at once or one by one, and its errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.engine.cuda_copies import CopyEngine, CudaCopies, CudaError
from jaxcache.pools.host_pool import pinned_memory

pytestmark = pytest.mark.gpu

NUM_ROWS, ROW_BYTES = 32, 4096


@pytest.fixture(params=["batch", "one by one"])
def copies(request, monkeypatch):
    copies = CudaCopies(jax.devices()[0])
    if request.param == "one by one":
        for engine in (copies._down, copies._up):
            monkeypatch.setattr(engine, "submit_batch", None)
    return copies


@pytest.mark.parametrize("num_ids", [5, 27])  # one list of copies, and three
@pytest.mark.parametrize("columns", [slice(0, ROW_BYTES), slice(1024, 3072)], ids=["row", "field"])
def test_there_and_back(copies, rng, columns, num_ids):
    owner, memory = pinned_memory(NUM_ROWS * ROW_BYTES, jax.devices()[0])
    rows = memory.reshape(NUM_ROWS, ROW_BYTES)
    rows[:] = 7
    num_bytes = columns.stop - columns.start
    ids = rng.permutation(NUM_ROWS)[:num_ids].astype(np.int32)
    data = rng.integers(0, 256, (num_ids + 3, num_bytes), np.uint8)
    copies.to_rows(jnp.asarray(data), rows[:, columns], ids)
    expected = np.full_like(rows, 7)
    expected[ids, columns] = data[:num_ids]
    np.testing.assert_array_equal(rows, expected)

    staged = jnp.zeros((num_ids + 3, num_bytes), jnp.uint8)
    copies.from_rows(rows[:, columns], ids[::-1], staged)
    np.testing.assert_array_equal(np.asarray(staged)[:num_ids], data[:num_ids][::-1])
    np.testing.assert_array_equal(np.asarray(staged)[num_ids:], 0)
    del owner


def test_the_driver_is_quoted():
    with pytest.raises(CudaError, match=r"cuDeviceGet: .*ordinal.* \(101\)"):
        CopyEngine(1000)
