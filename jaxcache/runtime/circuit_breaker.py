"""Stops asking a storage that keeps failing, and tries again later. Thread-safe."""

from __future__ import annotations

import threading
from collections.abc import Callable


class CircuitBreaker:
    """Opens after `max_failures` in a row; after `rest_s` it lets work through again, and one failure reopens it.

    now: seconds
    """

    def __init__(self, max_failures: int, rest_s: float, now: Callable[[], float]):
        self._max_failures, self._rest_s = max_failures, rest_s
        self._now = now
        self._lock = threading.Lock()
        self._num_failures = 0
        self._open_until = 0.0

    def is_open(self) -> bool:
        """Whether storage must not be asked now."""
        return self._now() < self._open_until

    def succeeded(self) -> None:
        with self._lock:
            self._num_failures = 0

    def failed(self) -> bool:
        """Whether that has opened it."""
        with self._lock:
            self._num_failures += 1
            opens = self._num_failures >= self._max_failures and not self.is_open()
            if opens:
                self._open_until = self._now() + self._rest_s
            return opens
