"""Rows that become pages of a staging array."""

from __future__ import annotations

import numpy as np
import pytest

from jaxcache.engine.shard_copies import pages_from_rows


@pytest.mark.parametrize("columns", [slice(0, 96), slice(16, 48)], ids=["whole rows", "one field"])
def test_rows_become_pages(columns):
    rows = np.random.default_rng(0).integers(0, 256, (10, 96), np.uint8)[:, columns]
    page_ids = np.array([7, 0, 3], np.int32)
    buffer = np.zeros((4, rows.shape[1]), np.uint8)
    assert pages_from_rows(rows, page_ids, buffer) is buffer
    assert np.array_equal(buffer[:3], rows[page_ids])
    assert not buffer[3].any()
