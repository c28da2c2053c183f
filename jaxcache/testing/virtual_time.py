"""Time that passes when it is told to, and workers that carry out jobs in it.

    put --a worker is free--> step --pause: its rest, and the call that follows--> step --> ... --> end

No threads: `advance` lets time pass, and `wait` lets just as much pass as a job and what it waits for still take. That
is what waiting for local bytes costs in real life: this rank is late, and no other rank needs to know.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush

from jaxcache.engine.jobs import Job, Pause, Steps, Workers


class VirtualTime:
    """now_us: one rank's time in microseconds, which only grows."""

    def __init__(self):
        self.now_us = 0
        self._due: list[tuple[int, int, Callable[[Steps], None], Steps]] = []
        self._num_planned = 0

    def after(self, us: int, action: Callable[[Steps], None], steps: Steps) -> None:
        """Calls the action with the steps when so much time has passed."""
        self._num_planned += 1
        heappush(self._due, (self.now_us + us, self._num_planned, action, steps))

    def advance(self, until_us: int) -> None:
        """Time passes."""
        due = self._due
        while due and due[0][0] <= until_us:
            self._next()
        self.now_us = max(self.now_us, until_us)

    def wait(self, job: Job) -> None:
        """Time passes until it is done."""
        while not job.done():
            assert self._due, f"{job} waits for what will never be done"
            self._next()

    def _next(self) -> None:
        self.now_us, _, action, steps = heappop(self._due)
        action(steps)


class VirtualWorkers(Workers):
    """duration_us: how long a pause of a job takes, with the call that follows it."""

    def __init__(self, time: VirtualTime, num_workers: int, duration_us: Callable[[Pause], int]):
        self._time, self._num_free, self._duration_us = time, num_workers, duration_us
        self._ready: deque[Steps] = deque()
        self._is_beginning = False

    def put(self, steps: Steps) -> None:
        self._ready.append(steps)
        if not self._is_beginning:  # else the call below on the stack goes on with it
            self._begin_ready()

    def end(self) -> list[threading.Thread]:
        self._ready.clear()
        self._num_free = 0
        return []

    def _begin_ready(self) -> None:
        self._is_beginning = True
        while self._ready and self._num_free > 0:
            self._num_free -= 1
            self._step(self._ready.popleft())
        self._is_beginning = False

    def _go_on(self, steps: Steps) -> None:
        self._step(steps)
        if self._ready and not self._is_beginning:
            self._begin_ready()

    def _step(self, steps: Steps) -> None:
        pause = next(steps, None)
        if pause is None:
            self._num_free += 1
        else:
            self._time.after(self._duration_us(pause), self._go_on, steps)
