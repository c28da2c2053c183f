"""Waiting for arrays, but not longer than a bound: the collectives of a rank that stopped stay pending for ever.

Polls, since a wait inside the runtime cannot be left again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxcache.agreement.reduction import never
from jaxcache.types import RankUnresponsive

SHORTEST_NAP_S = 5e-5
LONGEST_NAP_S = 1e-3
ASK_EVERY_S = 0.5


def wait_until_ready(arrays: Sequence[Any], timeout_s: float, is_reported: Callable[[], bool] = never) -> None:
    """Returns when all are computed.

    is_reported: asked now and then: whether another process has given up or left, so that one need not wait any longer
    Raises RankUnresponsive then, or when it takes longer, or, from the runtime's own error, when it has failed.
    """
    for array in arrays:
        if not array.is_ready():
            _poll(arrays, timeout_s, is_reported)
            break
    try:
        for array in arrays:
            array.block_until_ready()  # ready means failed, too
    except jax.errors.JaxRuntimeError as error:
        raise RankUnresponsive(f"failed: {error}") from error


def _poll(arrays: Sequence[Any], timeout_s: float, is_reported: Callable[[], bool]) -> None:
    start, nap_s = time.monotonic(), SHORTEST_NAP_S
    ask_at = start + ASK_EVERY_S
    for array in arrays:
        while not array.is_ready():
            now = time.monotonic()
            if now >= start + timeout_s:
                raise RankUnresponsive(f"was not ready after {timeout_s:g} s")
            if now >= ask_at:
                if is_reported():
                    raise RankUnresponsive(
                        f"was not ready after {now - start:.1f} s, when another process gave up or ended"
                    )
                ask_at = now + ASK_EVERY_S
            time.sleep(nap_s)
            nap_s = min(2 * nap_s, LONGEST_NAP_S)
