"""What keeps a request from resuming at the end of what is found: windows and states that are not there, and why.

    |--------------- full attention is found ---------------|
    0        usable                     resumable_tokens    found_tokens
             what can be resumed today  |                   the last token has to be computed; states lie on a grid
                                        `-- windows and states missing here: `Missing`

The kinds make them (core/kinds), and core/explain.py asks.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from jaxcache.types import Span, Tier


class Eviction(NamedTuple):
    """Why something is not there any more. For the operator: what `explain` says of it is less."""

    component: str
    tier: Tier
    step: int
    reason: str
    lease: int  # for which room was made; 0: for none


class Cause(enum.Enum):
    """Why a window or state is not there."""

    EVICTED = "it left"
    NO_SLOT = "no slot was free for it"
    NOT_REPORTED = "the loop computed past it and did not report it in insert(states=...)"
    NEVER_MADE = "it was never made"


@dataclass(frozen=True)
class Missing:
    """What one component lacks to resume at a position.

    span:     tokens of a window that are neither on the device nor in host memory; of a state, (n, n)
    held:     (tier, span) of what is there: of the window; of states the nearest ones, before and after
    eviction: when and why it left, if it was evicted
    remedies: what would make or keep it, best first
    """

    component: str
    span: Span
    cause: Cause
    eviction: Eviction | None
    held: tuple[tuple[str, Span], ...]
    remedies: tuple[str, ...]

    @property
    def is_state(self) -> bool:
        return self.span.start == self.span.stop

    def __str__(self) -> str:
        start, stop = self.span
        what = f"the state at {start} is" if self.is_state else f"tokens [{start}, {stop}) are"
        lines = [f"  {self.component}: {what} missing: {self._why()}."]
        if self.held:
            places = [
                f"{span.start} on {tier}" if self.is_state else f"[{span.start}, {span.stop}) on {tier}"
                for tier, span in self.held
            ]
            lines.append(f"    There are: {', '.join(places)}.")
        lines += [f"    {remedy}" for remedy in self.remedies]
        return "\n".join(lines)

    def _why(self) -> str:
        if self.eviction is not None:
            _, tier, step, reason, lease = self.eviction
            subject = "it" if self.is_state else "they"
            return f"{subject} left {tier.name} in step {step} ({reason}{f' for lease {lease}' if lease else ''})"
        if self.cause is not Cause.NEVER_MADE:
            return self.cause.value
        if self.is_state:
            return "no chunk that was reported ended there, or it left long ago"
        return "the request that computed them had gone on past this window when it published, or they left long ago"
