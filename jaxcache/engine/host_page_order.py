"""Who touches which host page, and so who waits for whom.

    writer (BACKUP, FETCH)  waits for the page's last writer and all readers since
    reader (LOAD_BACK, STORE)  waits for the page's last writer

Used on the serving thread only, in plan order; that order is what makes the waits acyclic.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np


class Pending(Protocol):
    """What touches pages until it is done: a future, or the simulation's virtual job."""

    def done(self) -> bool: ...

    def exception(self) -> BaseException | None: ...


J = TypeVar("J", bound=Pending)


@dataclass(slots=True)
class _Use(Generic[J]):
    writer: J | None = None
    readers: list[J] = field(default_factory=list)

    def is_over(self) -> bool:
        return not _pending(job for job in (self.writer, *self.readers) if job)


MIN_KEPT = 1024


class HostPageOrder(Generic[J]):
    """The last jobs on every host page of one component."""

    def __init__(self):
        self._uses: dict[int, _Use[J]] = {}
        self._forget_at = MIN_KEPT

    def before_read(self, page_ids: np.ndarray) -> list[J]:
        """The jobs that a reader of these pages must wait for."""
        return _pending(use.writer for use in self._found(page_ids) if use.writer)

    def before_write(self, page_ids: np.ndarray) -> list[J]:
        """The jobs that a writer of these pages must wait for."""
        return _pending(job for use in self._found(page_ids) for job in (use.writer, *use.readers) if job)

    def add_reader(self, page_ids: np.ndarray, job: J) -> None:
        for page_id in page_ids.tolist():
            use = self._uses.setdefault(page_id, _Use())
            use.readers = [*_pending(use.readers), job]

    def add_writer(self, page_ids: np.ndarray, job: J) -> None:
        for page_id in page_ids.tolist():
            self._uses[page_id] = _Use(job)
        if len(self._uses) > self._forget_at:
            self.forget_done()
            self._forget_at = max(MIN_KEPT, 2 * len(self._uses))

    def forget_done(self) -> None:
        """Drops pages that nobody touches any more."""
        self._uses = {page_id: use for page_id, use in self._uses.items() if not use.is_over()}

    def __len__(self) -> int:
        return len(self._uses)

    def _found(self, page_ids: np.ndarray) -> list[_Use[J]]:
        return [self._uses[page_id] for page_id in page_ids.tolist() if page_id in self._uses]


def _pending(jobs: Iterable[J]) -> list[J]:
    """Each job once, in order, without those that have succeeded; a failed one stays, so that it is noticed."""
    return [job for job in dict.fromkeys(jobs) if not job.done() or job.exception() is not None]
