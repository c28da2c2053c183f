"""Named sums that any thread may add to."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager


class Counters:
    """Counts by name, from zero.

    now:   seconds
    trace: around what is to be found in a profile under a name
    """

    def __init__(self, now: Callable[[], float], trace: Callable[[str], AbstractContextManager[object]]):
        self._now, self._trace = now, trace
        self._lock = threading.Lock()
        self._sums: dict[str, float] = defaultdict(int)

    def add(self, **amounts: float) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._sums[name] += amount

    @contextmanager
    def busy(self, kind: str) -> Iterator[None]:
        """Adds the seconds spent inside to `{kind}_seconds`; in a profile it is jaxcache.{kind}."""
        start = self._now()
        try:
            with self._trace(f"jaxcache.{kind}"):
                yield
        finally:
            self.add(**{f"{kind}_seconds": self._now() - start})

    def sums(self) -> dict[str, float]:
        with self._lock:
            return dict(self._sums)
