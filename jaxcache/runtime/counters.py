"""Named sums that any thread may add to."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import jax


class Counters:
    """Counts by name, from zero."""

    def __init__(self):
        self._lock = threading.Lock()
        self._sums: dict[str, float] = defaultdict(int)

    def add(self, **amounts: float) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._sums[name] += amount

    @contextmanager
    def busy(self, kind: str) -> Iterator[None]:
        """Adds the seconds spent inside to `{kind}_seconds`; in a profile it is jaxcache.{kind}."""
        start = time.perf_counter()
        try:
            with jax.profiler.TraceAnnotation(f"jaxcache.{kind}"):
                yield
        finally:
            self.add(**{f"{kind}_seconds": time.perf_counter() - start})

    def sums(self) -> dict[str, float]:
        with self._lock:
            return dict(self._sums)
