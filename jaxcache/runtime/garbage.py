"""Python's garbage collector, kept away from the tree: going through 10^5 nodes stops a loop for 0.1 s and more.

    step, few new objects    nothing: the collector is off
    step, many new objects   those are gone through (ms), and what is left is frozen: it is never gone through again
    step, nothing runs       now and then all is thawed and gone through, for cycles that died after they were frozen

The collector is the process's, and so is what is counted here: it stays off while any cache of the process asks for it.
"""

from __future__ import annotations

import gc
import os
from typing import ClassVar

NEW_OBJECTS = 5_000  # containers made and not freed since the last time; about 2 ms to go through
THAW_AFTER = 100  # times of freezing


class GarbageControl:
    """Between `start` and `stop`, collects in `step` only. One for each cache that asks."""

    running: ClassVar[list[GarbageControl]] = []
    num_freezes: ClassVar[int] = 0  # since all was gone through
    _was_enabled: ClassVar[bool] = True
    _is_watching_forks: ClassVar[bool] = False

    def __init__(self):
        self.is_idle = True

    def start(self) -> None:
        """An application's own `gc.freeze` is undone when the last one stops."""
        if not self.running:
            GarbageControl._was_enabled = gc.isenabled()
            gc.disable()
            gc.collect()
            _freeze(0)
        if not self._is_watching_forks:
            GarbageControl._is_watching_forks = True
            os.register_at_fork(after_in_child=_stop_all)  # there nobody calls `step`
        self.running.append(self)

    def step(self, is_idle: bool) -> None:
        """To be called in every step of the loop. is_idle: nobody waits for a token here."""
        self.is_idle = is_idle
        if self not in self.running:
            return
        if self.num_freezes >= THAW_AFTER and all(control.is_idle for control in self.running):
            gc.unfreeze()
            gc.collect()
            _freeze(0)
        elif gc.get_count()[0] >= NEW_OBJECTS:
            gc.collect()
            _freeze(self.num_freezes + 1)

    def stop(self) -> None:
        """The collector is as it was, once the last one has stopped. Harmless when repeated."""
        if self in self.running:
            self.running.remove(self)
            if not self.running:
                _give_back()


def _freeze(num_freezes: int) -> None:
    gc.freeze()
    GarbageControl.num_freezes = num_freezes


def _stop_all() -> None:
    if GarbageControl.running:
        GarbageControl.running.clear()
        _give_back()


def _give_back() -> None:
    gc.unfreeze()
    if GarbageControl._was_enabled:
        gc.enable()
