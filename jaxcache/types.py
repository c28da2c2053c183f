"""The values that the parts of jaxcache hand to each other. Imports nothing of ours, and never jax.

    calls, agreed outcomes ---> core ---> Plan = (Transfer, ...) ---> runtime ---> Outcome ---> agreement ---> core

A `Transfer` describes an effect and never performs it. Page ids are int32 host integers, equal on every rank.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

PageIds = np.ndarray  # int32[n], read-only once handed out
NO_PAGES: PageIds = np.empty(0, np.int32)
NO_PAGES.flags.writeable = False

DECLINED = -1  # instead of an end that storage can serve, by a rank that computes faster than storage brings pages
CLOCK_MODULUS = 1 << 31  # ms; the agreed clock wraps after 24 days


class Tier(enum.IntEnum):
    """Where a page is."""

    DEVICE = 0
    HOST = 1
    STORAGE = 2


class TransferKind(enum.Enum):
    """What a transfer does. Ranks agree on the outcomes of `STORE`, `QUERY`, `FETCH`; the others cannot differ."""

    BACKUP = "device to host"
    LOAD_BACK = "host to device"
    STORE = "host to storage"
    QUERY = "asks storage"
    FETCH = "storage to host"


class WritePolicy(enum.Enum):
    """When device pages are copied to the host tier."""

    NONE = "none"
    WRITE_THROUGH = "write_through"
    WRITE_THROUGH_SELECTIVE = "write_through_selective"
    WRITE_BACK = "write_back"


class PrefetchPolicy(enum.Enum):
    """What `admit` does with a ticket that is still running."""

    BEST_EFFORT = "best_effort"  # takes what has come; of a prefetch that two share nothing: the other may want it all
    WAIT_COMPLETE = "wait_complete"  # waits for the end
    TIMEOUT = "timeout"  # waits for so long, then as best_effort


class Span(NamedTuple):
    """Tokens [start, stop)."""

    start: int
    stop: int


class Move(NamedTuple):
    """The pages of one component in one transfer, in order.

    src_page_ids: int32[n]  device ids (BACKUP), host ids (LOAD_BACK, STORE), else empty
    dst_page_ids: int32[n]  host ids (BACKUP, FETCH), device ids (LOAD_BACK), else empty
    page_keys:    n chained keys (STORE, FETCH, QUERY), else empty
    page_ends:    n positions in tokens: where each page (or the state) ends (STORE, FETCH, QUERY), else empty;
                  consecutive pages may share values of storage
    later_keys:   keys of the pages after the last that a value which holds some of these may hold, too (QUERY, FETCH)
    in_order:     no page is of use without those before it (QUERY)
    """

    component: str
    src_page_ids: PageIds = NO_PAGES
    dst_page_ids: PageIds = NO_PAGES
    page_keys: tuple[bytes, ...] = ()
    page_ends: tuple[int, ...] = ()
    later_keys: tuple[bytes, ...] = ()
    in_order: bool = False


class Transfer(NamedTuple):
    """A described copy. Ids are consecutive and equal on every rank; `step` is the step in which it was planned."""

    id: int
    kind: TransferKind
    step: int
    moves: tuple[Move, ...]


class Plan(NamedTuple):
    """What the runtime must do now, in this order."""

    transfers: tuple[Transfer, ...]


class Outcome(NamedTuple):
    """What one process (before the agreement) or every rank (after it) says about a live storage transfer.

    done:         nothing more will be delivered
    quiet:        no thread touches the transfer's host pages any more
    pages:        FETCH: how many leading pages of each component are good; a failed or pending one counts zero
    smallest_end, largest_end:
                  QUERY: min and max over ranks of "the largest end <= bound that I can serve", or DECLINED; equal for
                  one rank
    """

    done: bool
    quiet: bool
    pages: Mapping[str, int] = MappingProxyType({})
    smallest_end: int = 0
    largest_end: int = 0


class StateSlots(NamedTuple):
    """Where a model step reads and writes the recurrent states of a batch; num_pages: nowhere.

    read:  int32[rows]  the state before the first token of a row; nowhere: it is zero
    write: int32[rows]  for the state after the last one
    keep:  int32[rows]  for the same state, where it is kept for later requests: a slot of `Lease.checkpoints`
    """

    read: np.ndarray
    write: np.ndarray
    keep: np.ndarray


class Match(NamedTuple):
    """The longest resumable prefix; looking changes nothing.

    num_tokens:      where a request could resume
    device_tokens:   leading tokens of it that need no load-back
    host_tokens:     num_tokens - device_tokens
    unusable_tokens: full attention found beyond num_tokens, for want of a window or state
    branch_points:   positions where making a window or state in this prefill would unlock them next time
    """

    num_tokens: int
    device_tokens: int
    host_tokens: int
    unusable_tokens: int
    branch_points: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """`admit` cannot now; nothing has changed. Falsy, so `if lease := cache.admit(...)` works."""

    reason: str

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True, slots=True, eq=False)
class BlockStored:
    """Consecutive pages of one component are there now; a request in this namespace may find them.

    Key i is sha256(key i - 1, token ids of page i as int32 bytes). `parent_key` stands before the first: the key of the
    page before it, or the namespace digest. A recurrent state is one page: the one at whose end it was made.

    token_ids: int32[len(page_keys) * page_tokens], read-only
    """

    namespace_digest: bytes
    tier: Tier
    component: str
    page_keys: tuple[bytes, ...]
    parent_key: bytes
    token_ids: np.ndarray
    page_tokens: int


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """These pages of one component have left this tier, or can no longer be found."""

    tier: Tier
    component: str
    page_keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class AllCleared:
    """Nothing is there, whatever was stored before; what is still there is stored again after this."""


Event = BlockStored | BlockRemoved | AllCleared


class ServingEnded(RuntimeError):
    """This cache can serve no longer, and every later call says so; what is in storage is still there."""


class RanksDiverged(ServingEnded):
    """Ranks hold different caches; serving must stop."""


class RankUnresponsive(ServingEnded):
    """A rank died, stopped, or is elsewhere: what needs all ranks did not come within `agreement_timeout_s`."""


class TransferFault(ServingEnded):
    """A copy between device and host failed; serving must stop."""
