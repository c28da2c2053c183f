"""What storing may cost the loop: a share of one thread's processor time, while requests run.

    share 0.1:  |store 2 ms|------------ rest 18 ms ------------|store 1 ms|---- rest 9 ms ----|

One worker stores at a time, unless its turn takes longer than its rest: a storage that hangs must not hold up others.
The one that begins reserves the rest that the last one needed, and corrects it at its end. (So a rest begins with the
work, and what is used comes to at most share / (1 - share).) What waits is not lost: it is stored later, or dropped and
counted where `max_queued_stores` wait already. The deadline of a STORE does not run while storing rests.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from typing import NamedTuple

from jaxcache.engine.jobs import Pause

SLICE_S = 0.05  # after so long a rest sees that no request runs any more, or that its STORE was cancelled
FIRST_S = 0.001  # what the first turn is taken to cost


class Turn(NamedTuple):
    """since_s: of the worker's processor time, what is to be made up for. reserved_s: the rest that others take."""

    since_s: float
    reserved_s: float


class StoreBudget:
    """share: in (0, 1]; 1: no limit. The serving thread says whether requests run; the threads that take turns do
    nothing else, and all their processor time counts.

    now, thread_s: seconds of a clock that only moves forward, and of the calling thread's processor time
    What is done while no request runs need not be made up for.
    """

    def __init__(self, share: float, now: Callable[[], float], thread_s: Callable[[], float]):
        self.share = share
        self._now, self._thread_s = now, thread_s
        self.is_serving = False
        self._rest_until = 0.0  # seconds, as of `now`
        self._rest_s = 0.0  # of all rests, up to `_rest_until`
        self._expected_s = self._rest_for(FIRST_S)
        self._lock = threading.Lock()
        self._worker = threading.local()  # made_up_for: its processor time at the end of its last turn

    def serves(self, is_serving: bool) -> None:
        """Whether requests run."""
        if is_serving == self.is_serving:
            return
        with self._lock:
            self.is_serving = is_serving
            left_s = self._rest_until - self._now()
            if left_s > 0:
                self._rest_until -= left_s
                self._rest_s -= left_s

    def begin(self, keep_going: Callable[[], bool]) -> Generator[Pause, None, Turn | None]:
        """Before a worker stores: rests until the share is kept or no request runs. None: `keep_going` has said no."""
        since_s = getattr(self._worker, "made_up_for", self._thread_s())
        while keep_going():
            with self._lock:
                left_s = self._rest_until - self._now()
                if left_s <= 0:
                    reserved_s = self._expected_s if self.is_serving else 0.0
                    self._rest(reserved_s)
                    return Turn(since_s, reserved_s)
            yield Pause(min(left_s, SLICE_S))
        return None

    def end(self, turn: Turn) -> None:
        """After that, on the same thread: its processor time since the end of its last turn is to be made up for."""
        used_s = self._thread_s()
        rest_s = self._rest_for(used_s - turn.since_s)
        self._worker.made_up_for = used_s
        with self._lock:
            if self.is_serving:
                self._expected_s = rest_s
                self._rest(rest_s - turn.reserved_s)

    def clock(self) -> float:
        """Seconds, less those of all rests so far: what deadlines of STOREs go by."""
        with self._lock:
            now = self._now()
            return now - self._rest_s + max(0.0, self._rest_until - now)

    def _rest_for(self, used_s: float) -> float:
        return used_s * (1 / self.share - 1)

    def _rest(self, seconds: float) -> None:
        """So much more, or less. Called with the lock held."""
        self._rest_until = max(self._rest_until, self._now()) + seconds
        self._rest_s += seconds
