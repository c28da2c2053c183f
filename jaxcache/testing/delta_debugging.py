"""The smallest part of an input that still fails: Zeller's ddmin.

|---- chunk ----|---- chunk ----|---- chunk ----|     leave one out; if what is left still fails, go on with that,
                                                      else try smaller chunks, down to single elements
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def ddmin(
    elements: Sequence[T], fails: Callable[[list[T]], bool], may_try: Callable[[], bool] = lambda: True
) -> list[T]:
    """A part of `elements`, in order, that fails; unless `may_try` ended the search, every element of it is needed.

    fails: whether a part fails; all elements together do. Nothing at all is tried first
    """
    rest, num_chunks = list(elements), 2
    if rest and may_try() and fails([]):
        return []
    while len(rest) >= 2:
        chunk = -(-len(rest) // num_chunks)
        for start in range(0, len(rest), chunk):
            if not may_try():
                return rest
            smaller = rest[:start] + rest[start + chunk :]
            if fails(smaller):
                rest, num_chunks = smaller, max(num_chunks - 1, 2)
                break
        else:
            if chunk == 1:
                break
            num_chunks = min(2 * num_chunks, len(rest))
    return rest
