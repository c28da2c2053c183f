"""An attached storage, with what belongs to it alone: one that hangs or fails holds up no other that comes after it."""

from __future__ import annotations

import threading
import time

from jaxcache.runtime.circuit_breaker import CircuitBreaker
from jaxcache.runtime.effects import Effects
from jaxcache.runtime.job_graph import JobGraph
from jaxcache.storage.base import Storage

MAX_FAILURES = 3
REST_S = 5.0
STORE_NICENESS = 10


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
