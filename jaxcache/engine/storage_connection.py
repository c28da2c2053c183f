"""An attached storage, with what belongs to it alone: one that hangs or fails holds up no other that comes after it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from jaxcache.engine.effects import Effects
from jaxcache.engine.jobs import JobGraph
from jaxcache.storage.base import Storage

MAX_FAILURES = 3
REST_S = 5.0
STORE_NICENESS = 10


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


class StorageConnection:
    """jobs: the threads that ask it. stores: those that write to it, so that no rest of theirs holds up a read.
    breaker: whether it may be asked now; after too many failures, not for `rest_s`."""

    def __init__(self, storage: Storage, num_threads: int, rest_s: float, effects: Effects):
        self.storage = storage
        self.breaker = CircuitBreaker(MAX_FAILURES, rest_s, effects.now)
        self.jobs = JobGraph(effects.workers("jaxcache-storage", num_threads, 0))
        self.stores = JobGraph(effects.workers("jaxcache-store", num_threads, STORE_NICENESS))

    @property
    def num_open(self) -> int:
        """Calls that are waiting or under way."""
        return self.jobs.num_open + self.stores.num_open

    def drain(self, timeout_s: float | None = None) -> bool:
        """Waits until there are none; False if that took longer."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        return all(
            graph.drain(None if deadline is None else deadline - time.monotonic()) for graph in (self.jobs, self.stores)
        )

    def close(self) -> None:
        """Waits for the calls that are under way."""
        self.jobs.close()
        self.stores.close()

    def end(self) -> list[threading.Thread]:
        """Begins no further call. Returns the threads, each of which ends with the call that it makes."""
        return [*self.jobs.end(), *self.stores.end()]
