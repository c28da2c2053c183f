"""What the engine does not do itself: bytes of devices, threads, clocks. All of it, and nothing else, is behind here.

                      the product (device_effects.py)        the simulation (testing/virtual_plane.py)
    gather, load      programs on a mesh, copies to rows     rows of bytes that say what they stand for
    workers           threads                                a queue in virtual time
    now               time.monotonic                         a virtual clock

What is decided (which jobs wait for which, what a transfer has brought, when it is given up) is the engine's, and runs
unchanged in both.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from jaxcache.engine.jobs import Job, Steps, Workers
from jaxcache.types import PageIds

Pools = dict[str, Any]  # what a component has on the devices, by name


@dataclass(frozen=True, eq=False)
class Loading:
    """Host pages on their way to the device.

    copies: jobs that bring them next to it; none: they are in the pools already
    staged: what these fill, for `scatter`
    """

    copies: Sequence[Steps]
    staged: Any = None


class Effects(ABC):
    """Every method but `workers`' jobs is called on the serving thread.

    max_pages:  of one gather or load
    page_bytes: by component, what a page has in this process
    """

    max_pages: int
    page_bytes: Mapping[str, int]

    @abstractmethod
    def gather(self, pools: Pools, component: str, src: PageIds, dst: PageIds, is_free: bool) -> Sequence[Steps]:
        """Takes device pages as they are now; the jobs returned copy them to the host pages `dst`.

        is_free: no job uses these host pages. Only then it may be done already, and nothing is returned.
        """

    @abstractmethod
    def load(self, pools: Pools, component: str, src: PageIds, dst: PageIds, is_free: bool) -> Loading:
        """Prepares the copies of the host pages `src`; `scatter` puts them at the device pages `dst`.

        is_free: no job writes these host pages. Only then they may be in `pools` already.
        """

    @abstractmethod
    def scatter(self, pools: Pools, component: str, dst: PageIds, staged: Any) -> None:
        """Puts what has been loaded into `pools`."""

    @abstractmethod
    def forget_device(self) -> None:
        """The pools are lost, or given up: keeps nothing that was made of them, nor memory beside them."""

    @abstractmethod
    def workers(self, name: str, num_workers: int, niceness: int) -> Workers:
        """niceness: how much less urgent than all else their jobs are."""

    @abstractmethod
    def wait(self, job: Job) -> None:
        """Returns when it is done."""

    @abstractmethod
    def now(self) -> float:
        """Seconds of a clock that only moves forward."""

    @abstractmethod
    def thread_s(self) -> float:
        """Seconds of processor time that the calling thread has used."""

    @abstractmethod
    def trace(self, name: str) -> AbstractContextManager[object]:
        """Around what is to be found in a profile under that name."""

    @abstractmethod
    def at_exit(self, end: Callable[[], list[threading.Thread]]) -> None:
        """Calls `end` at the end of the interpreter, and waits a while for the threads that it returns."""

    @abstractmethod
    def ends_at_exit(self) -> bool:
        """The engine closes. True: the interpreter ends, so that has been done instead; False: it will not be."""
