"""What one rank says in the exchange of a step: whether there is one, which transfers are carried, what became of each.

Pure, and the same on every rank but for the outcomes: `Controller` and the simulation call it.
"""

from __future__ import annotations

from collections.abc import Mapping

from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.runtime.storage_operation import Status
from jaxcache.types import Outcome


def is_due(core: PrefixCache) -> bool:
    """Whether ranks exchange anything in this step: without live storage transfers the digest, as often as wanted."""
    return bool(core.live_transfers()) or core.step_number % core.config.agreement_every_steps == 0


def digest(core: PrefixCache) -> int:
    """64 bits of all decisions, and of what the tree holds: a tree that was damaged need not have decided anything."""
    return hash((core.digest, *core.counts().values())) & (2**64 - 1)


def outcomes(core: PrefixCache, statuses: Mapping[int, Status]) -> dict[int, Outcome]:
    """By id, of as many live storage transfers as there are lanes.

    Undecided ones first, in the order of their ids, so that those which only await quiet never keep others waiting.
    """
    unwanted = dict.fromkeys(core.unwanted_transfers())
    carried = sorted(core.live_transfers(), key=lambda id: (id in unwanted, id))[: core.config.max_live_transfers]
    return {id: _outcome(core, id, statuses.get(id)) for id in sorted(carried)}


def _outcome(core: PrefixCache, id: int, status: Status | None) -> Outcome:
    if status is None:  # planned, but not applied yet
        return Outcome(done=False, quiet=False)
    if status.exists is None:
        return Outcome(status.done, status.quiet, status.pages)
    if not status.done:
        return Outcome(done=False, quiet=status.quiet)
    end = core.largest_end(id, status.exists)
    return Outcome(True, status.quiet, smallest_end=end, largest_end=end)
