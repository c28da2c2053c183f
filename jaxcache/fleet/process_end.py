"""How a process ends: one that other ranks have left must wait for nothing, and any other for nothing for ever."""

from __future__ import annotations

import os
import sys
import traceback
from typing import NoReturn

import jax

from jaxcache.fleet import bulletin

LEAVE_S, SAY_S = 1.0, 0.1  # process 0 waits for the others; these only say that they leave


def reason(error: BaseException) -> str:
    """What the others are told of it: its type and message."""
    return "".join(traceback.format_exception_only(error)).strip()


def end_process(error: BaseException) -> NoReturn:
    """Prints the error with its traceback, tells the others what it is, and ends this process at once, with code 1.

    A normal exit would wait: jax for all processes, minutes, and then it aborts; Python for threads that wait for what
    a dead rank owes. Neither `finally` nor `atexit` runs. Process 0 goes after those that have reported, LEAVE_S later
    at most, since jax aborts the others when it goes.
    """
    traceback.print_exception(error)
    sys.stderr.flush()
    sys.stdout.flush()
    process = jax.process_index()
    bulletin.leave(process, reason(error), SAY_S if process else LEAVE_S)
    os._exit(1)
