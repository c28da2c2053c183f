"""Who touches which host page, and so who waits for whom.

    writer (BACKUP, FETCH)  waits for the page's last writer and all readers since
    reader (LOAD_BACK, STORE)  waits for the page's last writer

Used on the serving thread only, in plan order; that order is what makes the waits acyclic.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar

import numpy as np


class Pending(Protocol):
    """What touches pages until it is done: a future, or the simulation's virtual job."""

    def done(self) -> bool: ...

    def exception(self) -> BaseException | None: ...


J = TypeVar("J", bound=Pending)


MIN_KEPT = 1024


class HostPageOrder(Generic[J]):
    """The last jobs on every host page of one component: its writer, and its readers since."""

    def __init__(self):
        self._writers: dict[int, J] = {}
        self._readers: dict[int, tuple[J, ...]] = {}  # pages read together share one
        self._forget_at = MIN_KEPT

    def before_read(self, page_ids: np.ndarray) -> list[J]:
        """The jobs that a reader of these pages must wait for."""
        return _pending(self._writers_of(page_ids.tolist()))

    def before_write(self, page_ids: np.ndarray) -> list[J]:
        """The jobs that a writer of these pages must wait for."""
        pages = page_ids.tolist()
        return _pending(self._writers_of(pages) + self._readers_of(pages))

    def add_reader(self, page_ids: np.ndarray, job: J) -> None:
        before: tuple[J, ...] | None = ()
        now = (job,)
        for page_id in page_ids.tolist():
            if (found := self._readers.get(page_id)) is not before:
                before, now = found, (*_pending(found or ()), job)
            self._readers[page_id] = now
        self._forget_some()

    def add_writer(self, page_ids: np.ndarray, job: J) -> None:
        pages = page_ids.tolist()
        self._writers |= dict.fromkeys(pages, job)
        if self._readers:
            for page_id in pages:
                self._readers.pop(page_id, None)
        self._forget_some()

    def forget_done(self) -> None:
        """Drops jobs that nobody has to wait for any more."""
        self._writers = {page_id: job for page_id, job in self._writers.items() if _pending([job])}
        self._readers = {page_id: jobs for page_id, jobs in self._readers.items() if _pending(jobs)}

    def __len__(self) -> int:
        """Pages of which a job is kept."""
        return len(self._writers.keys() | self._readers.keys())

    def _forget_some(self) -> None:
        kept = len(self._writers) + len(self._readers)
        if kept > self._forget_at:
            self.forget_done()
            self._forget_at = max(MIN_KEPT, 2 * (len(self._writers) + len(self._readers)))

    def _writers_of(self, pages: list[int]) -> list[J]:
        return [job for job in map(self._writers.get, pages) if job is not None]

    def _readers_of(self, pages: list[int]) -> list[J]:
        return [job for page_id in pages for job in self._readers.get(page_id, ())] if self._readers else []


def _pending(jobs: Iterable[J]) -> list[J]:
    """Each job once, in order, without those that have succeeded; a failed one stays, so that it is noticed."""
    return [job for job in dict.fromkeys(jobs) if not job.done() or job.exception() is not None]
