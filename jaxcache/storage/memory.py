"""Storage in a dictionary: the reference engine, and the one for tests. Lives and dies with its process."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Sequence
from typing import final

from jaxcache.storage.base import ObjectKey, Storage, flat_bytes


@final
class MemoryStorage(Storage):
    """Copies in `put` and in `get`, so that nobody holds its memory.

    quota_bytes: the oldest values leave before their sum would exceed it; None: no limit. A value above it is refused.
    """

    def __init__(self, quota_bytes: int | None = None) -> None:
        if quota_bytes is not None and quota_bytes <= 0:
            raise ValueError(f"{quota_bytes=} must be positive")
        self.secret = os.urandom(32)
        self._quota_bytes = quota_bytes
        self._lock = threading.Lock()
        self._values: dict[ObjectKey, bytes] = {}  # oldest first
        self._used_bytes = 0
        self._counters = Counter(puts=0, put_failures=0, duplicates=0, gets=0, hits=0, evicted=0)

    def exists(self, keys: Sequence[ObjectKey]) -> list[bool]:
        with self._lock:
            return [key in self._values for key in keys]

    def get(self, key: ObjectKey, buffer: memoryview) -> bool:
        payload = flat_bytes(buffer)
        with self._lock:
            value = self._values.get(key)
            hit = value is not None and len(value) == len(payload)
            self._counters.update(gets=1, hits=int(hit))
        if value is None or not hit:
            return False
        payload[:] = value
        return True

    def put(self, key: ObjectKey, buffer: memoryview) -> bool:
        value = bytes(flat_bytes(buffer))
        with self._lock:
            self._counters["puts"] += 1
            if key in self._values:
                self._counters["duplicates"] += 1
                return True
            if self._quota_bytes is not None and not self._make_room(len(value), self._quota_bytes):
                self._counters["put_failures"] += 1
                return False
            self._values[key] = value
            self._used_bytes += len(value)
        return True

    def clear(self) -> None:
        with self._lock:
            self._values.clear()
            self._used_bytes = 0

    def stats(self) -> dict[str, int]:
        with self._lock:
            return {**self._counters, "used_bytes": self._used_bytes}

    def _make_room(self, num_bytes: int, quota_bytes: int) -> bool:
        if num_bytes > quota_bytes:
            return False
        while self._used_bytes + num_bytes > quota_bytes:
            self._used_bytes -= len(self._values.pop(next(iter(self._values))))
            self._counters["evicted"] += 1
        return True
