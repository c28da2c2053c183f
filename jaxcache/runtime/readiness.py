"""Waiting for arrays, but not longer than a bound: the collectives of a rank that stopped stay pending for ever.

Polls, since a wait inside the runtime cannot be left again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax

from jaxcache.types import RankUnresponsive

SHORTEST_NAP_S = 5e-5
LONGEST_NAP_S = 1e-3


def wait_until_ready(arrays: Sequence[Any], timeout_s: float) -> None:
    """Returns when all are computed.

    Raises RankUnresponsive when that takes longer, or, from the runtime's own error, when their computation failed.
    """
    deadline, nap_s = time.monotonic() + timeout_s, SHORTEST_NAP_S
    for array in arrays:
        while not array.is_ready():
            if time.monotonic() >= deadline:
                raise RankUnresponsive(f"was not ready after {timeout_s:g} s")
            time.sleep(nap_s)
            nap_s = min(2 * nap_s, LONGEST_NAP_S)
    try:
        for array in arrays:
            array.block_until_ready()  # ready means failed, too
    except jax.errors.JaxRuntimeError as error:
        raise RankUnresponsive(f"failed: {error}") from error
