"""Copies between a GPU's memory and pinned host rows by its copy engines, without a copy in between.

    staging shard [bucket, n bytes]        host rows [num_pages, row_bytes]
      page 0  ------------------------------>  row 17, at the field's offset
      page 1  ------------------------------>  row 4

jax moves whole arrays only: a page would reach its row through a second pinned buffer and a memcpy, which takes five
cores at the speed of the link. The driver takes a list of addresses. Its streams are not those of XLA, so programs run
on meanwhile; what XLA has in these buffers must be there (BACKUP), or be read only afterwards (LOAD_BACK).
"""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from typing import Any

import numpy as np

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_IN_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
FIRST_LIST = 8  # copies; each list is twice as long as the one before, and is handed over while that one is copied


class CudaError(RuntimeError):
    """A call of the CUDA driver failed."""


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = (("order", ctypes.c_int), ("source", _Location), ("target", _Location), ("flags", ctypes.c_uint))


@cache
def driver() -> ctypes.CDLL | None:
    """The CUDA driver, if there is one."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    library.cuCtxSetCurrent.argtypes = (_POINTER,)
    library.cuDevicePrimaryCtxRetain.argtypes = (_POINTER, ctypes.c_int)
    library.cuStreamCreate.argtypes = (_POINTER, ctypes.c_uint)
    library.cuStreamSynchronize.argtypes = (_POINTER,)
    library.cuMemcpyAsync.argtypes = (ctypes.c_uint64, ctypes.c_uint64, _SIZE, _POINTER)
    return library


class CopyEngine:
    """One direction of one GPU: a stream of its own. May be used by several threads.

    submit_batch: the driver's call for a list of copies (16 KiB pages: 17 instead of 6 GB/s); None: one call for each
    """

    def __init__(self, ordinal: int):
        """ordinal: of the GPU in this process. CudaError if the driver refuses."""
        library = driver()
        assert library is not None
        self._driver, self._context, self._stream = library, _POINTER(), _POINTER()
        self._lock = threading.Lock()  # a list of copies is submitted as one
        device = ctypes.c_int()
        self._check(library.cuDeviceGet(ctypes.byref(device), ordinal), "cuDeviceGet")
        retained = library.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), device)
        self._check(retained, "cuDevicePrimaryCtxRetain")  # XLA's own, which lives as long as the process
        self._enter()
        self._check(library.cuStreamCreate(ctypes.byref(self._stream), _NON_BLOCKING), "cuStreamCreate")
        try:
            self.submit_batch = library.cuMemcpyBatchAsync
        except AttributeError:  # before CUDA 12.8
            self.submit_batch = None

    def copy(self, targets: np.ndarray, sources: np.ndarray, num_bytes: int) -> None:
        """Copies `num_bytes` from each source to its target, and waits; releases the interpreter lock meanwhile.

        targets, sources: uint64[n], addresses of device or pinned memory that stays until this returns
        """
        self._enter()
        try:
            with self._lock:
                self._submit(targets, sources, num_bytes)
        finally:  # also if only some were submitted: the caller's memory may go when this returns
            done = self._driver.cuStreamSynchronize(self._stream)
        self._check(done, "cuStreamSynchronize")

    def _submit(self, targets: np.ndarray, sources: np.ndarray, num_bytes: int) -> None:
        if self.submit_batch is not None:
            self._submit_all(targets, sources, num_bytes)
            return
        for target, source in zip(targets.tolist(), sources.tolist(), strict=True):
            self._check(self._driver.cuMemcpyAsync(target, source, num_bytes, self._stream), "cuMemcpyAsync")

    def _submit_all(self, targets: np.ndarray, sources: np.ndarray, num_bytes: int) -> None:
        sizes = np.full(len(targets), num_bytes, np.uintp)
        first, length = 0, FIRST_LIST
        while first < len(targets):
            self._submit_list(*(numbers[first : first + length] for numbers in (targets, sources, sizes)))
            first, length = first + length, 2 * length

    def _submit_list(self, targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray) -> None:
        assert self.submit_batch is not None
        attributes, first, failed = _Attributes(_IN_STREAM_ORDER), _SIZE(0), _SIZE()
        self._check(
            self.submit_batch(
                _POINTER(targets.ctypes.data),
                _POINTER(sources.ctypes.data),
                _POINTER(sizes.ctypes.data),
                _SIZE(len(targets)),
                ctypes.byref(attributes),
                ctypes.byref(first),
                _SIZE(1),
                ctypes.byref(failed),
                self._stream,
            ),
            "cuMemcpyBatchAsync",
        )

    def _enter(self) -> None:
        """The driver's context is the thread's."""
        self._check(self._driver.cuCtxSetCurrent(self._context), "cuCtxSetCurrent")

    def _check(self, code: int, call: str) -> None:
        if code:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, ctypes.byref(text))
            raise CudaError(f"{call}: {(text.value or b'unknown error').decode()} ({code})")


class CudaCopies:
    """Both directions between one GPU and the rows of its host pools."""

    def __init__(self, device: Any):
        self._down, self._up = CopyEngine(device.local_hardware_id), CopyEngine(device.local_hardware_id)

    def to_rows(self, pages: Any, rows: np.ndarray, page_ids: np.ndarray) -> None:
        """rows[page_ids] = pages.

        pages: jax array on this GPU, [at least len(page_ids), ...] of n bytes each
        rows:  uint8[num_pages, n], a column range of pinned host rows
        """
        addresses = _row_addresses(rows, page_ids)  # while a program makes the pages
        self._down.copy(addresses, _staged_addresses(pages, rows, len(page_ids)), rows.shape[1])

    def from_rows(self, rows: np.ndarray, page_ids: np.ndarray, pages: Any) -> None:
        """pages[:len(page_ids)] = rows[page_ids]; the array must be this caller's alone, and be read only later."""
        addresses = _row_addresses(rows, page_ids)
        self._up.copy(_staged_addresses(pages, rows, len(page_ids)), addresses, rows.shape[1])


def _staged_addresses(pages: Any, rows: np.ndarray, num_pages: int) -> np.ndarray:
    assert pages.nbytes == len(pages) * rows.shape[1], f"{pages.nbytes=} {len(pages)=} {rows.shape=}"
    base = pages.block_until_ready().unsafe_buffer_pointer()
    return np.uint64(base) + np.arange(num_pages, dtype=np.uint64) * np.uint64(rows.shape[1])


def _row_addresses(rows: np.ndarray, page_ids: np.ndarray) -> np.ndarray:
    assert rows.strides[1] == 1, f"{rows.strides=}"
    return np.uint64(rows.ctypes.data) + page_ids.astype(np.uint64) * np.uint64(rows.strides[0])
