"""Python's garbage collector, kept away from the tree: going through 10^5 nodes stops a loop for 0.1 s and more.

    step, few new objects    nothing: the collector is off
    step, many new objects   those are gone through (ms), and what is left is frozen: it is never gone through again
    step, idle               now and then all is thawed and gone through, for cycles that died after they were frozen

The collector is the process's: this is for loops that ask for it, and while any cache of the process does.
"""

from __future__ import annotations

import gc
from typing import ClassVar

NEW_OBJECTS = 5_000  # containers made and not freed since the last time; about 2 ms to go through
THAW_AFTER = 100  # times of freezing


class GarbageControl:
    """Between `start` and `stop`, collects in `step` only."""

    _running: ClassVar[list[GarbageControl]] = []  # of this process
    _was_enabled: ClassVar[bool] = True

    def __init__(self):
        self.num_freezes = 0  # since all was gone through

    def start(self) -> None:
        if not self._running:
            GarbageControl._was_enabled = gc.isenabled()
            gc.disable()
        self._running.append(self)
        self._collect_all()

    def step(self, is_idle: bool) -> None:
        """To be called in every step of the loop. is_idle: nobody waits for a token."""
        if is_idle and self.num_freezes >= THAW_AFTER:
            self._collect_all()
        elif gc.get_count()[0] >= NEW_OBJECTS:
            gc.collect()
            gc.freeze()
            self.num_freezes += 1

    def stop(self) -> None:
        """The collector is as it was, once the last one has stopped. Harmless when repeated."""
        if self not in self._running:
            return
        self._running.remove(self)
        if not self._running:
            gc.unfreeze()
            if self._was_enabled:
                gc.enable()

    def _collect_all(self) -> None:
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        self.num_freezes = 0
