"""The processes that serve one mesh together, as the loop sees them: it waits for them, and tells them why it ends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxcache.core.decisions import Decision, describe
from jaxcache.types import RanksDiverged, RankUnresponsive, ServingEnded, TransferFault


class ProcessReport(NamedTuple):
    """What one process knows of itself.

    agreed:    the last step whose digests were equal, and what was agreed in it
    since:     decisions of this step and later ones are all there
    counts:    by name; equal on ranks that hold the same tree
    """

    step: int
    digest: int
    agreed: str
    since: int
    decisions: Sequence[Decision]
    counts: Mapping[str, int]

    @property
    def summary(self) -> str:
        last = f"{describe(self.decisions[-1])} in step {self.decisions[-1][0]}" if self.decisions else "none"
        return f"step {self.step}, digest {self.digest:#018x}, last decision {last}, {self.agreed}"


class Peers(ABC):
    """processes: the numbers of all, in order. process: of this one."""

    processes: Sequence[int]
    process: int

    @property
    @abstractmethod
    def wait_s(self) -> float:
        """How long to wait for the others, in seconds."""

    @abstractmethod
    def is_reported(self) -> bool:
        """Whether another process has given up or left."""

    @abstractmethod
    def wait_for(self, arrays: Sequence[Any]) -> None:
        """Until these are computed; RankUnresponsive if they are not in time, or failed."""

    @abstractmethod
    def watch(self, state: Callable[[], ProcessReport]) -> None:
        """From now on `state`, a bound method that another thread may call, says what this process knows of itself."""

    @abstractmethod
    def fault(self, error: ServingEnded, state: ProcessReport, is_own: bool = True) -> ServingEnded:
        """A copy or a call failed, and serving ends here. Returns what to raise.

        is_own: it failed in this process
        """

    @abstractmethod
    def unresponsive(
        self, what: str, error: RankUnresponsive, state: ProcessReport
    ) -> RankUnresponsive | TransferFault:
        """`what` did not come. Returns what to raise."""

    @abstractmethod
    def diverged(self, error: RanksDiverged, state: ProcessReport) -> RanksDiverged:
        """Every process has seen a difference in the same step. Returns what to raise."""

    @abstractmethod
    def give_up(self, error: Exception, state: ProcessReport) -> None:
        """This process cannot go on, whatever the others do."""

    @abstractmethod
    def failures(self, own: str) -> list[str]:
        """Why processes could not begin, of all that say so; own: why this one could not, or nothing."""

    @abstractmethod
    def close(self) -> None:
        """Serving has ended in an orderly way."""
