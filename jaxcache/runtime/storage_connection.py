"""An attached storage, with what belongs to it alone: one that hangs or fails holds up no other that comes after it."""

from __future__ import annotations

from jaxcache.runtime.circuit_breaker import CircuitBreaker
from jaxcache.runtime.job_graph import JobGraph
from jaxcache.storage.base import Storage

MAX_FAILURES = 3
REST_S = 5.0


class StorageConnection:
    """jobs: the threads that call it. breaker: whether it may be asked now."""

    def __init__(self, storage: Storage, num_threads: int):
        self.storage = storage
        self.breaker = CircuitBreaker(MAX_FAILURES, REST_S)
        self.jobs = JobGraph(num_threads, "jaxcache-storage")
