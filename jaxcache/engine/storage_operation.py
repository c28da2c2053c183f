r"""One live STORE, QUERY or FETCH on this process: what it has delivered, and whether anyone still works on it.

    running --last job ended--> done and quiet
       \--deadline, cancel, failure--> done, its results frozen --last job ended--> quiet

A job asks `keep_going` before every page. A native call cannot be interrupted: its pages stay taken until it returns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from jaxcache.engine.jobs import Job
from jaxcache.engine.storage_connection import StorageConnection
from jaxcache.types import Transfer, TransferKind


@dataclass(frozen=True, slots=True)
class Status:
    """What this process knows of a live storage transfer.

    done:   nothing more will be delivered
    quiet:  no thread touches its host pages any more
    pages:  leading good pages per component so far; a QUERY has none
    exists: QUERY: bool[n] per component, false where unknown; else None
    ok:     it ended by itself: no failure, deadline or cancel cut it short
    """

    done: bool
    quiet: bool
    pages: Mapping[str, int] = field(default_factory=dict)
    exists: Mapping[str, np.ndarray] | None = None
    ok: bool = True


class StorageOperation:
    """Results of one transfer, filled by workers and read by the serving thread.

    connection: the storage that it began with, and stays with
    now:        seconds that its deadline goes by
    """

    def __init__(
        self,
        transfer: Transfer,
        connection: StorageConnection | None,
        deadline_s: float,
        now: Callable[[], float],
    ):
        self.transfer = transfer
        self.connection = connection
        self._good = {move.component: np.zeros(len(move.page_keys), bool) for move in transfer.moves}
        self.busy_s = 0.0  # that threads have worked on it, all together
        self._now = now
        self._deadline = now() + deadline_s
        self._lock = threading.Lock()
        self._num_open = 0
        self._stopped = False
        self._ok = True

    def keep_going(self) -> bool:
        """Whether a result could still count. Only the serving thread looks at the clock, in `expire`."""
        return not self._stopped

    def deliver(self, component: str, pages: slice, good: np.ndarray) -> None:
        """Pages of a component turned out good or bad; too late is the same as bad."""
        with self._lock:
            if self.keep_going():
                self._good[component][pages] = good

    def stop(self) -> None:
        """Nothing more counts: cancelled, failed or not even asked."""
        with self._lock:
            self._stop()

    def expire(self) -> bool:
        """Stops it if its deadline has passed while it was running; True if so."""
        with self._lock:
            if self._is_done() or self._now() < self._deadline:
                return False
            self._stop()
            return True

    def add_job(self) -> None:
        """A job will touch the transfer's pages; called before the job is submitted."""
        with self._lock:
            self._num_open += 1

    def job_ended(self, job: Job) -> None:
        """That job does not touch them any more."""
        with self._lock:
            if job.exception() is not None:
                self._stop()
            self._num_open -= 1

    def worked(self, seconds: float) -> None:
        """A thread has worked on it for so long."""
        with self._lock:
            self.busy_s += seconds

    @property
    def is_done(self) -> bool:
        """Nothing more will be delivered."""
        with self._lock:
            return self._is_done()

    def status(self) -> Status:
        """A consistent view; once done, it stays the same but for `quiet`."""
        with self._lock:
            done, quiet = self._is_done(), self._num_open == 0
            if self.transfer.kind is TransferKind.QUERY:  # touches no host page, so it is quiet as soon as it is done
                exists = {name: good.copy() for name, good in self._good.items()}
                return Status(done, done, {}, exists, self._ok)
            pages = {name: _num_leading(good) for name, good in self._good.items()}
            return Status(done, quiet, pages, None, self._ok)

    def _stop(self) -> None:
        if not self._stopped:
            self._stopped, self._ok = True, False

    def _is_done(self) -> bool:
        return self._stopped or self._num_open == 0


def _num_leading(good: np.ndarray) -> int:
    """How many of the first entries are true. good: bool[n]"""
    num_pages = good.tobytes().find(b"\0")
    return len(good) if num_pages < 0 else num_pages
