"""What keeps a request from resuming at the end of what is found: windows and states that are not there, and why.

    |--------------- full attention is found ---------------|
    0        usable                     resumable_tokens    found_tokens
             what can be resumed today  |                   the last token has to be computed; states lie on a grid
                                        `-- windows and states missing here: `Missing`

Looks without touching anything, and says nothing that only another tenant may know: see core/explain.py.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from jaxcache.core.radix_tree import Node
from jaxcache.core.sequence import Sequence
from jaxcache.core.tiers import Eviction, Tiers
from jaxcache.types import Span, Tier

Path = list[tuple[Node, int]]
FindEviction = Callable[[int, int], Eviction | None]  # of an entry: node id, residency index


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


def missing(tiers: Tiers, sequence: Sequence, path: Path, end: int, find_eviction: FindEviction) -> tuple[Missing, ...]:
    """What resuming at `end` lacks. path: of the sequence, (node, end of what agrees), beyond `end` too."""
    found: list[Missing] = []
    for c in tiers.suffixes:
        found += _of_window(tiers, c, path, end, find_eviction)
    if tiers.point is not None:
        found += _of_state(tiers, tiers.point, sequence, path, end, find_eviction)
    return tuple(found)


# ---- windows


def _of_window(tiers: Tiers, c: int, path: Path, end: int, find_eviction: FindEviction) -> Iterator[Missing]:
    """One for each run of tokens that went missing in the same way."""
    low = tiers.required_start(c, end)
    runs: list[Missing] = []
    held: list[tuple[str, Span]] = []
    for node, stop in path:
        span = Span(max(node.start, low), min(stop, end))
        if span.start >= span.stop:
            continue
        tier = _tier(tiers, c, node)
        if tier is not None:
            held.append((tier, span))
            continue
        eviction = _eviction(tiers, c, node, find_eviction)
        cause = Cause.NEVER_MADE if eviction is None else Cause.EVICTED
        run = Missing(tiers.components[c].name, span, cause, eviction, (), ())
        last = runs[-1] if runs else None
        if last is not None and last.span.stop == span.start and last.eviction == eviction:
            runs[-1] = replace(last, span=Span(last.span.start, span.stop))
        else:
            runs.append(run)
    for run in runs:
        name = run.component
        remedies = [f"The next request that ends a chunk at {end} (Lease.next_stop) and inserts there makes it."]
        if run.eviction is not None and run.eviction.reason == "room":
            remedies.append(f"More pages would have kept it: {name} has {_num_pages(tiers, c, run.eviction)}.")
        yield replace(run, held=tuple(held), remedies=tuple(remedies))


# ---- states


def _of_state(
    tiers: Tiers, c: int, sequence: Sequence, path: Path, end: int, find_eviction: FindEviction
) -> Iterator[Missing]:
    at_end = next((node for node, stop in path if stop == end == node.end), None)
    if at_end is not None and tiers.resident(c, at_end):
        return
    eviction = None if at_end is None else _eviction(tiers, c, at_end, find_eviction)
    unmade = tiers.unmade_state(sequence, end) if eviction is None else None
    cause = Cause.EVICTED if eviction is not None else unmade or Cause.NEVER_MADE
    yield Missing(
        tiers.components[c].name,
        Span(end, end),
        cause,
        eviction,
        tuple(_nearest(tiers, c, path, end)),
        tuple(_remedies_of_state(tiers, c, end, cause, eviction)),
    )


def _nearest(tiers: Tiers, c: int, path: Path, end: int) -> Iterator[tuple[str, Span]]:
    """The last state before `end`, and the first after it, which may lie where the sequence goes another way."""
    states = [(tier, Span(node.end, node.end)) for node, _ in path if (tier := _tier(tiers, c, node))]
    yield from [state for state in states if state[1].stop < end][-1:]
    yield from [state for state in states if state[1].stop > end][:1]


def _remedies_of_state(tiers: Tiers, c: int, end: int, cause: Cause, eviction: Eviction | None) -> Iterator[str]:
    yield (
        f"The next request that ends a chunk at {end} (Lease.next_stop), writes the state to its slot of "
        f"Lease.checkpoints and says insert(..., states=[{end}]) makes it."
    )
    name = tiers.components[c].name
    if cause is Cause.NO_SLOT:
        num_pages = tiers.device[c].allocator.num_pages
        yield f"More slots would have kept it: {name} has {num_pages} on the device, three for each request that runs."
    elif eviction is not None and eviction.reason == "room":
        yield f"More slots would have kept it: {name} has {_num_pages(tiers, c, eviction)}."
    elif eviction is not None and eviction.reason == "max_states_per_path":
        yield f"A larger max_states_per_path would have kept it: it is {tiers.config.max_states_per_path}."


# ---- both


def _tier(tiers: Tiers, c: int, node: Node) -> str | None:
    """Where an entry is, the device first; None: nowhere."""
    if node.pages[tiers.device[c].index] is not None:
        return Tier.DEVICE.name
    return Tier.HOST.name if node.pages[tiers.host[c].index] is not None else None


def _eviction(tiers: Tiers, c: int, node: Node, find_eviction: FindEviction) -> Eviction | None:
    """The last one of an entry: it may have been on both tiers."""
    both = [find_eviction(node.id, residency.index) for residency in (tiers.device[c], tiers.host[c])]
    known = [eviction for eviction in both if eviction is not None]
    return max(known, key=lambda eviction: (eviction.step, eviction.tier), default=None)


def _num_pages(tiers: Tiers, c: int, eviction: Eviction) -> str:
    residency = (tiers.device, tiers.host)[eviction.tier][c]
    return f"{residency.allocator.num_pages} on {'the device' if eviction.tier is Tier.DEVICE else 'the host'}"
