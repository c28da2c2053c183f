"""Whether serving goes on, and the one way in which it ends.

    call -- checks --> Refusal: nothing has changed, and serving goes on
              `-- changes --> done
                       `--> any other exception: the tree may be half changed, so serving has ended

A tree that is half changed would give wrong pages, so from then on every call that changes anything raises
`ServingEnded`, whose cause is the exception. A call checks everything before its first change; what it refuses it says
with one of the three errors below, which are ValueError, TypeError and RuntimeError to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from jaxcache.types import ServingEnded

P = ParamSpec("P")
T = TypeVar("T")


class Refusal(Exception):
    """The call cannot be; nothing has changed."""


class RefusedValue(Refusal, ValueError):
    """For what was passed."""


class RefusedType(Refusal, TypeError):
    """For the type of what was passed."""


class RefusedCall(Refusal, RuntimeError):
    """For when it was called: something else has to come first."""


class Serving:
    """ended: why it has; None: it goes on. leases: those that run."""

    __slots__ = ("ended", "leases")

    def __init__(self, leases: Mapping[int, Any]):
        self.ended: ServingEnded | None = None
        self.leases = leases

    def check(self) -> None:
        """Raises ServingEnded if it has."""
        if self.ended is not None:
            raise self.ended.with_traceback(None)  # or it would get longer with every call

    def interrupted(self, error: BaseException, call: str) -> None:
        """`error` comes out of a call: unless that refused, it had perhaps begun to change something."""
        if not isinstance(error, Refusal):
            self.end(error, call)

    def end(self, error: BaseException, call: str) -> None:
        """For good. What ended it first counts."""
        if self.ended is None:
            self.ended = error if isinstance(error, ServingEnded) else _interrupted(error, call)
        for lease in self.leases.values():
            lease._room_end = -1  # even what is only a number: `grow` comes here


def _interrupted(error: BaseException, call: str) -> ServingEnded:
    ended = ServingEnded(
        f"serving has ended: {call} was interrupted by {error!r} and may have left the cache half changed. "
        "Make a new Cache; what is in storage is still there"
    )
    ended.__cause__ = error
    return ended


def changes(call: Callable[P, T]) -> Callable[P, T]:
    """For every method that changes the cache, of an object with a `serving`: ends it unless it returns or refuses.

    What is called for every request has the same four lines by hand: `guarded` takes as long as some of these calls.
    """

    @wraps(call)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        serving: Serving = args[0].serving  # pyright: ignore[reportAttributeAccessIssue]
        if serving.ended is not None:
            serving.check()
        try:
            return call(*args, **kwargs)
        except BaseException as error:
            serving.interrupted(error, call.__name__)
            raise

    guarded.changes = True  # pyright: ignore[reportAttributeAccessIssue]  for the test that counts them
    return guarded
