"""What an admitted request holds until it is released, exactly once."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcache.core.radix_tree import Node
from jaxcache.core.sequence import Sequence
from jaxcache.types import PageIds

if TYPE_CHECKING:
    from jaxcache.core.tiers import Tiers

UNLIMITED = 1 << 62  # tokens
TokenPositions = list[int] | tuple[int, ...]
NO_POSITIONS: TokenPositions = ()
NO_CHECKPOINTS: Any = MappingProxyType({})  # shared by all leases of caches without recurrent states


class Lease:
    """A promise that these pages stay.

        |-- on device --|-- from host --|-- from storage --|-- own pages: new --|
        0                                          num_cached_tokens       num_tokens

    id:                 counts up; equal on every rank
    num_cached_tokens:  tokens that need not be computed
    device_tokens, host_tokens, storage_tokens: where those came from
    first_step:         the first step in which a model step may use it
    num_tokens:         how far its pages reach
    num_computed:       what the caller has reported as computed
    read_slot, write_slot: the recurrent state to read at first (None at 0 tokens); the one to write, and read later
    checkpoints:        {position: slot}: if a chunk ends at this position, write its state to this slot as well, and
                        name the position in `insert(states=...)`; `next_stop` says where chunks should end. Positions
                        come and go with `admit`, `grow` and `insert`
    """

    __slots__ = (
        "_duplicates",
        "_last_grid_point",
        "_last_room",
        "_node",
        "_pin_tops",
        "_plan_is_applied",
        "_published",
        "_quiet_end",
        "_released",
        "_state_node",
        "_stops",
        "_tables",
        "_tiers",
        "_window_starts",
        "_written",
        "checkpoints",
        "device_tokens",
        "first_step",
        "host_tokens",
        "id",
        "num_cached_tokens",
        "num_computed",
        "num_tokens",
        "read_slot",
        "sequence",
        "storage_tokens",
        "write_slot",
    )

    def __init__(
        self,
        id: int,
        sequence: Sequence,
        node: Node,
        num_new_tokens: int,
        tiers: Tiers,
        plan_is_applied: Callable[[], bool],
    ):
        self.id = id
        self.sequence = sequence
        sequence.lease_id = id
        sequence.num_leases += 1
        self._node = node  # where its pins end
        self._published = node.end  # pages below this are the tree's, pages above its own
        self.num_cached_tokens = self.num_computed = self.device_tokens = node.end
        self.num_tokens = node.end + num_new_tokens
        self.host_tokens = self.storage_tokens = 0
        self.first_step = tiers.step
        self.read_slot: int | None = None
        self.write_slot: int | None = None
        self.checkpoints: dict[int, int] = {} if tiers.point is not None else NO_CHECKPOINTS
        # How far its room reached when the present version of the pools came: what lies beyond is not computed in it.
        self._last_room = node.end if tiers.pools_version >= 0 else UNLIMITED
        self._tiers = tiers
        self._duplicates: list[tuple[int, PageIds]] | None = None  # (component, own pages that the tree has, too)
        self._plan_is_applied = plan_is_applied
        self._tables: list[PageIds | None] = [None] * len(tiers.components)
        self._pin_tops = [0] * len(tiers.components)  # start of the topmost pinned node
        self._window_starts = [0] * len(tiers.components)  # no own pages of the table below this are there
        self._state_node: Node | None = None  # whose state it still reads
        self._stops: tuple[int, ...] = ()  # where prefill chunks end
        self._written: dict[int, None] = (
            {} if tiers.point is not None else NO_CHECKPOINTS
        )  # checkpoints that the caller has written
        self._last_grid_point: int | None = None
        self._quiet_end = -1  # growing up to here only moves numbers
        self._released = False

    @property
    def page_tables(self) -> dict[str, PageIds]:
        """Page ids by component, one per page of the sequence: int32[ceil(num_tokens / page_tokens)], read-only.

        `insert` may replace ids of pages that the tree has, too. A table from before stays good until the loop has new
        ones by `Cache.tables`; with `CacheConfig.stable_tables` ids are never replaced.
        A page that is not there (behind a window) has the id num_pages. Raises RuntimeError while a plan is unapplied
        or before `first_step`, because a model step must not run then; ValueError after the release, because the pages
        may be another's by now.
        """
        is_applied = self._plan_is_applied()
        if self._released:
            raise ValueError(f"{self!r} was released: its pages may be another's by now")
        if self.first_step > self._tiers.step:
            raise RuntimeError(f"{self!r} may run from step {self.first_step} on; this is {self._tiers.step}")
        if not is_applied:
            raise RuntimeError("pages are about to move: call pools = cache.apply(pools) before a model step")
        names = [component.name for component in self._tiers.components]
        return {name: table for name, table in zip(names, self._tables, strict=True) if table is not None}

    @property
    def next_stop(self) -> int | None:
        """Where the coming chunk must end at the latest, so that a state can be checkpointed there; None: anywhere."""
        computed = self.num_computed
        for stop in self._stops:
            if stop > computed:
                return stop
        if self._tiers.point is None:
            return None
        grid = self._tiers.grid_tokens
        return (computed // grid + 1) * grid

    def _be_quiet(self, num_computed: int) -> None:
        """Notes up to where it may grow without anything but numbers changing, from `num_computed` on.

        New pages are needed where the tables end (all end at the same place); windows are left behind, and states kept,
        where a page ends.
        """
        tiers = self._tiers
        if self.first_step > tiers.step:
            self._quiet_end = -1  # nothing can be computed yet: every call is looked at
            return
        page = tiers.page_tokens
        table = self._tables[0]
        assert table is not None
        room = len(table) * page
        self._quiet_end = min(room, (num_computed // page + 1) * page - 1) if tiers.partial else room

    def __repr__(self) -> str:
        return f"Lease({self.id}, cached {self.num_cached_tokens}, room for {self.num_tokens} tokens)"


def read_only(array: np.ndarray) -> np.ndarray:
    """Marks a table that was handed out: a running program may still read it, so a change makes a new one."""
    array.setflags(False)  # pyright: ignore[reportCallIssue]  write=False takes twice as long, flags.writeable four times
    return array
