"""Lists of copies as the CUDA driver gets them: here memory of this process is copied at once."""

from __future__ import annotations

import ctypes
import threading

import numpy as np
import pytest

from jaxcache.engine.cuda_copies import CopyEngine, CudaError

PAGE_BYTES = 48


class MemoryDriver:
    """Of the driver's calls those that a `CopyEngine` makes. fails_at: the list that is refused"""

    def __init__(self, fails_at: int | None = None):
        self.lengths: list[int] = []
        self.num_waits = 0
        self.fails_at = fails_at

    def cuCtxSetCurrent(self, context) -> int:
        return 0

    def cuStreamSynchronize(self, stream) -> int:
        self.num_waits += 1
        return 0

    def cuGetErrorString(self, code, text) -> int:
        return 0

    def cuMemcpyAsync(self, target, source, num_bytes, stream) -> int:
        ctypes.memmove(target, source, num_bytes)
        return 0

    def cuMemcpyBatchAsync(self, targets, sources, sizes, count, *rest) -> int:
        if len(self.lengths) == self.fails_at:
            return 1
        self.lengths.append(count.value)
        numbers = [(ctypes.c_uint64 * count.value).from_address(at.value) for at in (targets, sources, sizes)]
        for target, source, size in zip(*numbers, strict=True):
            ctypes.memmove(target, source, size)
        return 0


def engine(driver: MemoryDriver, is_listed: bool = True) -> CopyEngine:
    copies = object.__new__(CopyEngine)
    copies._driver, copies._context, copies._stream, copies._lock = driver, None, None, threading.Lock()  # pyright: ignore
    copies.submit_batch = driver.cuMemcpyBatchAsync if is_listed else None  # pyright: ignore
    return copies


def addresses(pages: np.ndarray, page_ids: np.ndarray) -> np.ndarray:
    return np.uint64(pages.ctypes.data) + page_ids.astype(np.uint64) * np.uint64(PAGE_BYTES)


@pytest.mark.parametrize("is_listed", [True, False])
@pytest.mark.parametrize(
    ("num_pages", "lengths"), [(1, [1]), (8, [8]), (9, [8, 1]), (27, [8, 16, 3]), (256, [8, 16, 32, 64, 128, 8])]
)
def test_every_page_is_copied_once(rng, num_pages, lengths, is_listed):
    pages = rng.integers(0, 256, (300, PAGE_BYTES), np.uint8)
    targets = np.zeros_like(pages)
    src, dst = rng.permutation(300)[:num_pages], rng.permutation(300)[:num_pages]
    driver = MemoryDriver()
    engine(driver, is_listed).copy(addresses(targets, dst), addresses(pages, src), PAGE_BYTES)
    expected = np.zeros_like(pages)
    expected[dst] = pages[src]
    np.testing.assert_array_equal(targets, expected)
    assert driver.lengths == (lengths if is_listed else [])
    assert driver.num_waits == 1


def test_a_refused_list_is_an_error_after_all_before_it_have_ended():
    pages = np.zeros((27, PAGE_BYTES), np.uint8)
    driver = MemoryDriver(fails_at=1)
    at = addresses(pages, np.arange(27))
    with pytest.raises(CudaError, match="cuMemcpyBatchAsync"):
        engine(driver).copy(at, at, PAGE_BYTES)
    assert (driver.lengths, driver.num_waits) == ([8], 1)
