"""Jobs with dependencies on a few workers.

    job A --\
             >-- job C        C is handed to a worker only when A and B are done:
    job B --/                 a job that waits occupies no worker, so one is enough for any graph

A job is a sequence of steps, and between two of them it says what comes next (`Pause`): a rest, or a call of a storage.
A thread rests as long as it is told and goes on; the simulation lets time pass there.

A dependency may be any future, of this graph or another. If one failed, the job fails with the same exception and is
not run. A graph starts nothing on its own and never looks into its jobs.

The threads are daemons, and not of an executor: Python joins an executor's before `atexit` handlers run, however long
their jobs take, and from then on the executor takes no job, although other threads may still serve.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np

from jaxcache.storage.base import ObjectKey

NO_MEMORY = np.empty(0, np.uint8)


class Pause(NamedTuple):
    """What comes next in a job.

    rest_s: how long its worker rests now, in seconds
    call:   the method of a storage that is called after that; "": none
    key:    what it is called with first
    memory: what that call may write until it returns
    """

    rest_s: float = 0.0
    call: str = ""
    key: ObjectKey | None = None
    memory: np.ndarray = NO_MEMORY


class Job:
    """Something that will be done, or fail. As a `concurrent.futures.Future`, which takes ten times as long to make.

    Callbacks are called once, in the thread that ends the job or adds them; they raise nothing.
    """

    __slots__ = ("__weakref__", "_callbacks", "_error", "_is_done", "_lock", "_result")

    def __init__(self):
        self._lock = threading.Lock()
        self._is_done = False
        self._result: Any = None
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[Job], Any]] = []

    def done(self) -> bool:
        return self._is_done

    def exception(self, timeout_s: float | None = None) -> BaseException | None:
        """Waits until it is done. Raises TimeoutError."""
        if not self._is_done:
            over = threading.Event()
            self.add_done_callback(lambda _: over.set())
            if not over.wait(timeout_s):
                raise TimeoutError(f"a job is not done after {timeout_s} s")
        return self._error

    def result(self, timeout_s: float | None = None) -> Any:
        """Waits until it is done; raises what it has raised, or TimeoutError."""
        error = self.exception(timeout_s)
        if error is not None:
            raise error
        return self._result

    def add_done_callback(self, callback: Callable[[Job], Any]) -> None:
        with self._lock:
            if not self._is_done:
                self._callbacks.append(callback)
                return
        callback(self)

    def set_result(self, result: Any) -> None:
        self._end(result, None)

    def set_exception(self, error: BaseException | None) -> None:
        self._end(None, error)

    def _end(self, result: Any, error: BaseException | None) -> None:
        with self._lock:
            assert not self._is_done, "a job is done once"
            self._result, self._error, self._is_done = result, error, True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(self)


Steps = Generator[Pause, None, Any]
_Ready = SimpleQueue[Steps | None]  # jobs whose dependencies are done; None ends a thread


def at_once(work: Callable[..., Any], *args: Any) -> Steps:
    """A job of one step."""
    yield from ()
    return work(*args)


def carry_out(steps: Steps) -> Any:
    """All steps on this thread, with their rests."""
    while True:
        try:
            rest_s = next(steps).rest_s
        except StopIteration as ended:
            return ended.value
        if rest_s:
            time.sleep(rest_s)


class Workers(ABC):
    """Who carries out jobs, several at a time, each begun in the order in which it was put."""

    @abstractmethod
    def put(self, steps: Steps) -> None:
        """These steps raise nothing."""

    @abstractmethod
    def end(self) -> list[threading.Thread]:
        """Begins no further job. Returns the threads, each of which ends with the job that it runs."""


class Threads(Workers):
    """Ends with the last reference to it.

    niceness: how much lower than the process's the priority of the threads is, where the system has one for threads
    """

    def __init__(self, num_threads: int, name: str, niceness: int = 0):
        self._ready: _Ready = SimpleQueue()
        self._is_over = threading.Event()
        self._dismiss = weakref.finalize(self, _dismiss, self._ready, num_threads)
        work = partial(_work, self._ready, self._is_over, niceness)  # holds no `Threads`
        self._threads = [threading.Thread(target=work, name=f"{name}-{i}", daemon=True) for i in range(num_threads)]
        for thread in self._threads:
            thread.start()

    def put(self, steps: Steps) -> None:
        self._ready.put(steps)

    def end(self) -> list[threading.Thread]:
        self._is_over.set()
        self._dismiss()
        return self._threads


def _work(ready: _Ready, is_over: threading.Event, niceness: int) -> None:
    """A thread's outermost frame."""
    if niceness and sys.platform == "linux":  # elsewhere it would be the whole process's
        own = threading.get_native_id()
        with suppress(OSError):  # a sandbox refuses
            os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + niceness)
    while (steps := ready.get()) is not None and not is_over.is_set():
        carry_out(steps)
        del steps  # while it waits for the next, it keeps nothing of this one alive


def _dismiss(ready: _Ready, num_threads: int) -> None:
    for _ in range(num_threads):
        ready.put(None)


class JobGraph:
    """Runs jobs on its workers, each after its dependencies."""

    def __init__(self, workers: Workers):
        self.workers = workers
        self._idle = threading.Condition()
        self._open: set[Job] = set()

    @property
    def num_open(self) -> int:
        """Jobs submitted and not done."""
        return len(self._open)

    def is_open(self, job: Job) -> bool:
        """Whether it was submitted here and is not done."""
        return job in self._open

    def submit(self, steps: Steps, after: Iterable[Job] = ()) -> Job:
        """Runs `steps` once every job in `after` is done; their result or exception is the returned job's.

        After `end` they never run, and the job is never done.
        """
        job, needs = Job(), tuple(after)
        with self._idle:
            self._open.add(job)
        put = partial(self.workers.put, self._run(job, steps, needs))
        if not needs:
            put()
            return job
        remaining = _Countdown(len(needs), put)
        for need in needs:
            need.add_done_callback(lambda _: remaining.step())
        return job

    def all_of(self, jobs: Sequence[Job]) -> Job:
        """Done with the last of these; fails as the first in this order of those that fail. No worker takes part."""
        if len(jobs) == 1:
            return jobs[0]
        joined = Job()
        with self._idle:
            self._open.add(joined)

        def end() -> None:
            try:
                joined.set_exception(next((error for job in jobs if (error := job.exception())), None))
            finally:
                self._leave(joined)

        remaining = _Countdown(len(jobs), end)
        for job in jobs:
            job.add_done_callback(lambda _: remaining.step())
        return joined

    def drain(self, timeout_s: float | None = None) -> bool:
        """Waits until no job is open; False if that took longer than `timeout_s`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._idle:
            while self._open:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._idle.wait(left)
        return True

    def close(self) -> None:
        """Waits for open jobs and joins the threads."""
        self.drain()
        for thread in self.end():
            thread.join()

    def end(self) -> list[threading.Thread]:
        """Begins no further job. Returns the threads, each of which ends with the job that it runs."""
        return self.workers.end()

    def _run(self, job: Job, steps: Steps, needs: tuple[Job, ...]) -> Steps:
        try:
            for need in needs:
                need.result()
            result = yield from steps
        except BaseException as error:
            job.set_exception(error)
        else:
            job.set_result(result)
        finally:
            self._leave(job)

    def _leave(self, job: Job) -> None:
        """It is done."""
        with self._idle:
            self._open.discard(job)
            if not self._open:
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
