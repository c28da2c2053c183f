"""What an admitted request holds until it is released, once: pins up to a node, and a part for each component."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxcache.core.node import Node
from jaxcache.core.pages import Purpose
from jaxcache.core.tiers import Tiers
from jaxcache.core.tokens import Sequence
from jaxcache.types import NO_PAGES, PageIds

UNLIMITED = 1 << 62  # tokens
TokenPositions = list[int] | tuple[int, ...]
NO_POSITIONS: TokenPositions = ()
NO_CHECKPOINTS: Any = MappingProxyType({})  # of all leases of caches without recurrent states


class WindowTable:
    """A lease's pages of a window.

    page_ids:     int32[pages of the room], read-only once handed out: a change makes another array
    pin_top:      start of the topmost node that is pinned
    window_start: no own page below this is there any more
    """

    __slots__ = ("page_ids", "pin_top", "window_start")

    def __init__(self, pin_top: int):
        self.page_ids: PageIds = NO_PAGES
        self.pin_top = pin_top
        self.window_start = 0


class Slots:
    """A lease's slots of recurrent states.

    checkpoints: {position: slot}, of which the caller has filled `written`
    node:        whose state it still reads
    """

    __slots__ = ("checkpoints", "last_grid_point", "node", "read", "write", "written")

    page_ids = None  # it has no table

    def __init__(self):
        self.read: int | None = None
        self.write = -1
        self.checkpoints: dict[int, int] = {}
        self.written: dict[int, None] = {}
        self.node: Node | None = None
        self.last_grid_point: int | None = None


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
    table:              page ids of full attention, int32[pages of the room], read-only: a change makes another array
    parts:              of the extras, in their order: a `WindowTable` or `Slots` each
    """

    __slots__ = (
        "_duplicates",
        "_last_room",
        "_node",
        "_plan_is_applied",
        "_published",
        "_released",
        "_room_end",
        "_slots",
        "_stops",
        "_tiers",
        "device_tokens",
        "first_step",
        "host_tokens",
        "id",
        "num_cached_tokens",
        "num_computed",
        "num_tokens",
        "parts",
        "sequence",
        "storage_tokens",
        "table",
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
        # How far its room reached when the present version of the pools came: what lies beyond is not computed in it.
        self._last_room = node.end if tiers.pools_version >= 0 else UNLIMITED
        self._tiers = tiers
        self._duplicates: list[tuple[int, PageIds]] | None = None  # (component, own pages that the tree has, too)
        self._plan_is_applied = plan_is_applied
        self.table: PageIds = NO_PAGES
        self.parts: list[Any] = []
        self._slots: Slots | None = None
        self._stops: tuple[int, ...] = ()  # where prefill chunks end
        self._room_end = -1  # growing up to here only moves numbers
        self._released = False

    @property
    def read_slot(self) -> int | None:
        """The recurrent state to read at first; None at 0 tokens."""
        return None if self._slots is None else self._slots.read

    @property
    def write_slot(self) -> int | None:
        """The recurrent state to write, and to read later; None without recurrent states."""
        return None if self._slots is None else self._slots.write

    @property
    def checkpoints(self) -> dict[int, int]:
        """{position: slot}: if a chunk ends at this position, write its state to this slot as well, and name the
        position in `insert(states=...)`; `next_stop` says where chunks should end. Positions come and go with `admit`,
        `grow` and `insert`."""
        return NO_CHECKPOINTS if self._slots is None else self._slots.checkpoints

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
        full, *extras = [component.name for component in self._tiers.components]
        tables = {n: part.page_ids for n, part in zip(extras, self.parts, strict=True) if part.page_ids is not None}
        return {full: self.table, **tables}

    @property
    def page_ids(self) -> list[PageIds | None]:
        """By component; None: it has no table."""
        return [self.table, *(part.page_ids for part in self.parts)]

    @property
    def next_stop(self) -> int | None:
        """Where the coming chunk must end at the latest, so that a state can be checkpointed there; None: anywhere."""
        computed = self.num_computed
        for stop in self._stops:
            if stop > computed:
                return stop
        if self._slots is None:
            return None
        grid = self._tiers.grid_tokens
        return (computed // grid + 1) * grid

    @property
    def purpose(self) -> Purpose:
        """Of room that is made for it."""
        return Purpose(self.id, self._node.account)

    def note_room(self, num_computed: int) -> None:
        """Notes up to where it may grow by moving numbers alone.

        With pages of 16, 20 tokens computed and tables of 3 pages: up to 48, where the tables end; with a window or a
        state up to 31, since at 32 a page ends: windows are left behind there, and states kept.
        """
        tiers = self._tiers
        if self.first_step > tiers.step:
            self._room_end = -1  # nothing can be computed yet: every call is looked at
            return
        page = tiers.page_tokens
        room = len(self.table) * page
        self._room_end = min(room, (num_computed // page + 1) * page - 1) if self.parts else room

    def __repr__(self) -> str:
        return f"Lease({self.id}, cached {self.num_cached_tokens}, room for {self.num_tokens} tokens)"


def read_only(array: np.ndarray) -> np.ndarray:
    """Marks a table that was handed out: a running program may still read it, so a change makes a new one."""
    array.setflags(False)  # pyright: ignore[reportCallIssue]  write=False takes twice as long, flags.writeable four times
    return array
