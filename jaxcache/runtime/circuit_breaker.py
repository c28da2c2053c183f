"""Stops asking a storage that keeps failing, and tries again later. Thread-safe."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class CircuitBreaker:
    """Opens after `max_failures` in a row; after `rest_s` it lets work through again, and one failure reopens it.

    clock: seconds; the simulation has one of its own
    """

    def __init__(self, max_failures: int, rest_s: float, clock: Callable[[], float] = time.monotonic):
        self._max_failures, self._rest_s = max_failures, rest_s
        self._clock = clock
        self._lock = threading.Lock()
        self._num_failures = 0
        self._open_until = 0.0

    def is_open(self) -> bool:
        """Whether storage must not be asked now."""
        return self._clock() < self._open_until

    def succeeded(self) -> None:
        with self._lock:
            self._num_failures = 0

    def failed(self) -> bool:
        """Whether that has opened it."""
        with self._lock:
            self._num_failures += 1
            opens = self._num_failures >= self._max_failures and not self.is_open()
            if opens:
                self._open_until = self._clock() + self._rest_s
            return opens
