"""Named sums that any thread may add to."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any


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

    def busy(self, kind: str) -> Busy:
        """Adds the seconds spent inside to `{kind}_seconds`; in a profile it is jaxcache.{kind}."""
        return Busy(self, kind, self._now, self._trace(f"jaxcache.{kind}"))

    def sums(self) -> dict[str, float]:
        with self._lock:
            return dict(self._sums)


class Busy:
    """See `Counters.busy`."""

    __slots__ = ("_counters", "_kind", "_now", "_start", "_trace")

    def __init__(self, counters: Counters, kind: str, now: Callable[[], float], trace: AbstractContextManager[object]):
        self._counters, self._kind, self._now, self._trace = counters, kind, now, trace

    def __enter__(self) -> None:
        self._start = self._now()
        self._trace.__enter__()

    def __exit__(self, *raised: Any) -> None:
        self._trace.__exit__(*raised)
        self._counters.add(**{f"{self._kind}_seconds": self._now() - self._start})
