"""What one rank says in the exchange of a step: whether there is one, which transfers are carried, what became of each.

Pure, and the same on every rank but for the outcomes: `Controller` and the simulation call it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.engine.storage_operation import Status
from jaxcache.types import DECLINED, Outcome


def is_due(core: PrefixCache) -> bool:
    """Whether ranks exchange anything in this step: without live storage transfers the digest, as often as wanted."""
    return core.needs_exchange() or core.step_number % core.config.agreement_every_steps == 0


def digest(core: PrefixCache) -> int:
    """64 bits of all decisions, and of what the tree holds: a tree that was damaged need not have decided anything."""
    return hash((core.digest, *core.sizes())) & (2**64 - 1)


def outcomes(core: PrefixCache, statuses: Mapping[int, Status], pays: Callable[[int], bool]) -> dict[int, Outcome]:
    """By id, of as many live storage transfers as there are lanes.

    pays: whether this rank would fetch what a QUERY, by its id, has found
    Where those are too few, the undecided ones have all but one, in the order of their ids; those which only await
    quiet share that one by turns: neither keeps the other waiting for ever.
    """
    return {id: _outcome(core, id, statuses.get(id), pays) for id in sorted(_carried(core))}


def _carried(core: PrefixCache) -> list[int]:
    live, num_lanes = core.live_transfers(), core.config.max_live_transfers
    if len(live) <= num_lanes:
        return live
    unwanted = core.unwanted_transfers()
    undecided = [id for id in live if id not in unwanted][: num_lanes - bool(unwanted)]
    turn = core.step_number % max(1, len(unwanted))
    return undecided + (unwanted[turn:] + unwanted[:turn])[: num_lanes - len(undecided)]


def _outcome(core: PrefixCache, id: int, status: Status | None, pays: Callable[[int], bool]) -> Outcome:
    if status is None:  # planned, but not applied yet
        return Outcome(done=False, quiet=False)
    if status.exists is None:
        return Outcome(status.done, status.quiet, status.pages)
    if not status.done:
        return Outcome(done=False, quiet=status.quiet)
    end = core.largest_end(id, status.exists)
    if end > 0 and not pays(id):
        end = DECLINED
    return Outcome(True, status.quiet, smallest_end=end, largest_end=end)
