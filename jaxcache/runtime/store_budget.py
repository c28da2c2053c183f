"""What storing may cost the loop: a share of one thread's processor time, while requests run.

    share 0.1:  |store 2 ms|------------ rest 18 ms ------------|store 1 ms|---- rest 9 ms ----|

What waits is not lost: it is stored later, or dropped and counted where `max_queued_stores` wait already. The deadline
of a STORE does not run while storing rests.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SLICE_S = 0.05  # after so long a rest sees that no request runs any more, or that its STORE was cancelled


class StoreBudget:
    """share: in (0, 1]; 1: no limit. The serving thread says whether requests run; workers work and rest, all at once.

    What is done while no request runs need not be made up for.
    """

    def __init__(self, share: float):
        self.share = share
        self.is_serving = False
        self._rest_until = 0.0  # monotonic seconds
        self._rest_s = 0.0  # of all rests, up to `_rest_until`
        self._lock = threading.Lock()

    def serves(self, is_serving: bool) -> None:
        """Whether requests run."""
        if is_serving == self.is_serving:
            return
        with self._lock:
            self.is_serving = is_serving
            left_s = self._rest_until - time.monotonic()
            if left_s > 0:
                self._rest_until -= left_s
                self._rest_s -= left_s

    @contextmanager
    def work(self) -> Iterator[None]:
        """Around what a worker does for a STORE: its processor time is to be made up for."""
        start = time.thread_time()
        try:
            yield
        finally:
            rest_s = (time.thread_time() - start) * (1 / self.share - 1)
            with self._lock:
                if self.is_serving:
                    self._rest_until = max(self._rest_until, time.monotonic()) + rest_s
                    self._rest_s += rest_s

    def rest(self, keep_going: Callable[[], bool]) -> None:
        """Before more is done: until the share is kept, no request runs, or `keep_going` says no."""
        while keep_going() and (left_s := self._rest_until - time.monotonic()) > 0:
            time.sleep(min(left_s, SLICE_S))

    def clock(self) -> float:
        """Monotonic seconds, less those of all rests so far: what deadlines of STOREs go by."""
        with self._lock:
            now = time.monotonic()
            return now - self._rest_s + max(0.0, self._rest_until - now)
