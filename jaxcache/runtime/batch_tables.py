"""Page tables of a whole batch as jit wants them: int32 [max_requests, max_pages] per component, of fixed shape.

    step 7   row 0: table A   row 1: table B   row 2: table C
    step 8   row 0: table B   row 1: table D   row 2: table C     a lease's table never changes, it is replaced:
             copied rows:  1               2                      known leases' rows are copied, only D is written

A row that no request uses, and a page that is not there, has the id num_pages, which every program drops.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import compress, repeat
from operator import is_not
from typing import NamedTuple

import numpy as np

from jaxcache.core.bad_input import check_runnable
from jaxcache.core.lease import Lease
from jaxcache.core.node import FULL
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.core.serving import RefusedCall
from jaxcache.types import PageIds, StateSlots

MAX_SHAPES = 8  # of batches, such as a prefill's and a decode's, of which the last tables are kept
NOBODY = 0  # no lease has this id
EMPTY = -1  # the last row
Source = PageIds | None  # what a row of one component is made of; None: nothing


class Built(NamedTuple):
    """The last tables of one shape. rows: by component, and below each table one more row in which nothing is there

    lease_ids, sources: what each row was made of: a lease, and by component its pages at that time
    """

    lease_ids: list[int]
    sources: list[list[Source]]
    rows: list[np.ndarray]


class BatchTables:
    """Builds read-only tables of one cache's leases: a table handed to a dispatched program is never changed again."""

    def __init__(self, num_pages: Mapping[str, int]):
        self.num_pages = dict(num_pages)
        self._last: OrderedDict[tuple[int, int], Built] = OrderedDict()  # by shape

    def build(self, leases: Sequence[Lease | None], max_pages: int) -> dict[str, np.ndarray]:
        """Per component: int32[len(leases), max_pages]. ValueError for a lease with more pages."""
        shape = (len(leases), max_pages)
        last = self._last.pop(shape, None) or self._empty(*shape)
        lease_ids = [NOBODY if lease is None else lease.id for lease in leases]
        moved = None
        if lease_ids != last.lease_ids:
            known = dict(zip(last.lease_ids, range(len(leases)), strict=True))
            moved = [*map(known.get, lease_ids, repeat(EMPTY)), EMPTY]
            at = np.array(moved)
        built = Built(lease_ids, [], [])
        for c, (name, absent) in enumerate(self.num_pages.items()):
            sources, before, rows = _sources(leases, c), last.sources[c], last.rows[c]
            if moved is not None:
                before = [before[row] for row in moved]
                rows = rows.take(at, axis=0)
            changed = list(compress(range(len(leases)), map(is_not, sources, before)))
            if changed and moved is None:
                rows = rows.copy()
            for row in changed:
                pages = sources[row]
                assert pages is not None, "the row of nobody, or of a component without tables, changes"
                if len(pages) > max_pages:
                    raise ValueError(f"{leases[row]!r} has {len(pages)} pages of {name!r}, {max_pages=}")
                rows[row, : len(pages)] = pages
                rows[row, len(pages) :] = absent
            built.sources.append([*sources, None])
            built.rows.append(_read_only(rows))
        self._last[shape] = built
        if len(self._last) > MAX_SHAPES:
            self._last.popitem(last=False)
        return {name: rows[:-1] for name, rows in zip(self.num_pages, built.rows, strict=True)}

    def _empty(self, num_rows: int, max_pages: int) -> Built:
        absent = [np.full((num_rows + 1, max_pages), page, np.int32) for page in self.num_pages.values()]
        return Built([NOBODY] * num_rows, [[None] * (num_rows + 1)] * len(absent), absent)


def _sources(leases: Sequence[Lease | None], c: int) -> list[Source]:
    """`Lease.page_ids` of one component, for each of hundreds of leases in every step."""
    if c == FULL:
        return [None if lease is None else lease.table for lease in leases]
    return [None if lease is None else lease.parts[c - 1].page_ids for lease in leases]


def tables_of(
    core: PrefixCache, tables: BatchTables, leases: Sequence[Lease | None], max_pages: int
) -> dict[str, np.ndarray]:
    """What a model step reads: refused unless it may run. The loop will use no earlier tables of these leases."""
    check_runnable(core.leases, core.tiers, core.plan_is_applied(), leases)
    built = tables.build(leases, max_pages)
    changed = [lease for lease in leases if lease is not None and lease._duplicates is not None]
    if changed:
        core.tables_were_read(changed)
    return built


def state_slots_of(core: PrefixCache, leases: Sequence[Lease | None], ends: Sequence[int]) -> StateSlots | None:
    """Of rows that compute from where their leases have computed to `ends`; None without recurrent states."""
    if core.kinds.state is None:
        return None
    check_runnable(core.leases, core.tiers, core.plan_is_applied(), leases)
    if len(ends) != len(leases):
        raise RefusedCall(f"{len(leases)} leases and {len(ends)} ends: each row has one")
    nowhere = core.kinds.state.device.allocator.num_pages
    rows = [_row_slots(row, lease, end, nowhere) for row, (lease, end) in enumerate(zip(leases, ends, strict=True))]
    return StateSlots(*(_read_only(np.array(column, np.int32)) for column in zip(*rows, strict=True)))


def _row_slots(row: int, lease: Lease | None, end: int, nowhere: int) -> tuple[int, int, int]:
    if lease is None:
        return nowhere, nowhere, nowhere
    assert lease.write_slot is not None
    if not lease.num_computed < end <= lease.num_tokens:
        raise RefusedCall(f"{lease!r} has computed {lease.num_computed}: {end=} of row {row} is not in its room")
    read = lease.write_slot if lease.num_computed > lease.num_cached_tokens else lease.read_slot
    return nowhere if read is None else read, lease.write_slot, lease.checkpoints.get(end, nowhere)


def _read_only(table: np.ndarray) -> np.ndarray:
    table.flags.writeable = False
    return table
