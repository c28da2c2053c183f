"""Jobs with dependencies on a few threads.

    job A --\
             >-- job C        C is handed to a thread only when A and B are done:
    job B --/                 a job that waits occupies no thread, so one thread is enough for any graph

A dependency may be any future, of this graph or another. If one failed, the job fails with the same exception and is
not run. A graph starts nothing on its own and never looks into its jobs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

Job = Future


class JobGraph:
    """Runs jobs on `num_threads` threads, each after its dependencies."""

    def __init__(self, num_threads: int, name: str):
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._idle = threading.Condition()
        self._num_open = 0

    @property
    def num_open(self) -> int:
        """Jobs submitted and not done."""
        return self._num_open

    def submit(self, work: Callable[[], Any], after: Iterable[Job] = ()) -> Job:
        """Runs `work` once every job in `after` is done; its result or exception is the returned job's."""
        job, needs = Job(), tuple(after)
        with self._idle:
            self._num_open += 1
        remaining = _Countdown(len(needs) + 1, lambda: self._executor.submit(self._run, job, work, needs))
        for need in needs:
            need.add_done_callback(lambda _: remaining.step())
        remaining.step()
        return job

    def drain(self, timeout_s: float | None = None) -> bool:
        """Waits until no job is open; False if that took longer than `timeout_s`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._idle:
            while self._num_open:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._idle.wait(left)
        return True

    def close(self) -> None:
        """Waits for open jobs and joins the threads."""
        self.drain()
        self._executor.shutdown(wait=True)

    def _run(self, job: Job, work: Callable[[], Any], needs: tuple[Job, ...]) -> None:
        try:
            for need in needs:
                need.result()
            result = work()
        except BaseException as error:
            job.set_exception(error)
        else:
            job.set_result(result)
        finally:
            self._closed_one()

    def _closed_one(self) -> None:
        with self._idle:
            self._num_open -= 1
            if not self._num_open:
                self._idle.notify_all()


class _Countdown:
    """Calls `action` once, at the last of `count` steps, whichever thread takes it."""

    def __init__(self, count: int, action: Callable[[], Any] | None):
        self._count, self._action = count, action  # the action is dropped once taken: futures keep their callbacks
        self._lock = threading.Lock()

    def step(self) -> None:
        with self._lock:
            self._count -= 1
            if self._count:
                return
            action, self._action = self._action, None
        assert action is not None
        action()
