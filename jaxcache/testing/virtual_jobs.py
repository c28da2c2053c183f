"""Jobs of one rank in virtual time: they take as long as they were told, and end when somebody lets time pass.

    submit --needs are done--> begin --its duration--> end --> who waited for it begins

No threads: `advance` lets time pass, and `wait` lets just as much pass as a job and what it waits for still take. That
is what waiting for local bytes costs in real life: this rank is late, and no other rank needs to know.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from heapq import heappop, heappush


class VirtualJob(ABC):
    """What takes time. done, exception: as of a Future, for HostPageOrder."""

    __slots__ = ("_dependents", "_duration_us", "_num_needs", "is_over")

    def __init__(self):
        self.is_over = False
        self._dependents: list[VirtualJob] = []
        self._duration_us = 0
        self._num_needs = 0

    @abstractmethod
    def begin(self) -> bool:
        """All it needs is done. False: there is nothing left to do, and it is over."""

    @abstractmethod
    def end(self) -> None:
        """Its time is over."""

    def done(self) -> bool:
        return self.is_over

    def exception(self) -> None:
        return None


class VirtualJobs:
    """now_us: this rank's time in microseconds, which only grows."""

    def __init__(self):
        self.now_us = 0
        self._due: list[tuple[int, int, VirtualJob]] = []
        self._num_begun = 0

    def submit(self, job: VirtualJob, duration_us: int, after: Iterable[VirtualJob] = ()) -> None:
        """Begins it once all in `after` are done."""
        job._duration_us = duration_us
        for need in after:
            if not need.is_over:
                need._dependents.append(job)
                job._num_needs += 1
        if not job._num_needs:
            self._begin(job)

    def advance(self, until_us: int) -> None:
        """Time passes."""
        due = self._due
        while due and due[0][0] <= until_us:
            self._end_next()
        self.now_us = max(self.now_us, until_us)

    def wait(self, job: VirtualJob) -> None:
        """Time passes until it is done."""
        while not job.is_over:
            assert self._due, f"{job} waits for what will never be done"
            self._end_next()

    def _begin(self, job: VirtualJob) -> None:
        if job.begin():
            self._num_begun += 1
            heappush(self._due, (self.now_us + job._duration_us, self._num_begun, job))
        else:
            self._over(job)

    def _end_next(self) -> None:
        self.now_us, _, job = heappop(self._due)
        job.end()
        self._over(job)

    def _over(self, job: VirtualJob) -> None:
        job.is_over = True
        dependents, job._dependents = job._dependents, []
        for dependent in dependents:
            dependent._num_needs -= 1
            if not dependent._num_needs:
                self._begin(dependent)
