"""Page tables of a whole batch as jit wants them: int32 [max_requests, max_pages] per component, of fixed shape.

    step 7   row 0: table A   row 1: table B   row 2: table C
    step 8   row 0: table B   row 1: table D   row 2: table C     a lease's table never changes, it is replaced:
             copied rows:  1               2                      known rows are copied, only D is written anew

A row that no request uses, and a page that is not there, has the id num_pages, which every program drops.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from operator import is_
from typing import NamedTuple

import numpy as np

from jaxcache.core.bad_input import check_runnable
from jaxcache.core.lease import Lease
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.types import PageIds

MAX_SHAPES = 8  # of batches, such as a prefill's and a decode's, of which the last tables are kept
EMPTY = -1  # the last row
Sources = list[PageIds | None]  # what each row is made of; None: nothing


class Built(NamedTuple):
    """A table of one component and, below it, one more row in which nothing is there."""

    rows: np.ndarray
    sources: Sources

    def following(self, sources: Sources, leases: Sequence[Lease | None], name: str) -> Built:
        """The table of these sources; leases, name: for the error."""
        if all(map(is_, sources, self.sources)):
            return self
        known = {id(source): row for row, source in enumerate(self.sources)}  # self.sources keeps them alive
        copied = [known.get(id(source), EMPTY) for source in sources]
        rows = self.rows.take([*copied, EMPTY], axis=0)
        for row in [row for row, at in enumerate(copied) if at == EMPTY]:
            source = sources[row]
            if source is not None:
                if len(source) > rows.shape[1]:
                    raise ValueError(f"{leases[row]!r} has {len(source)} pages of {name!r}, max_pages={rows.shape[1]}")
                rows[row, : len(source)] = source
        return Built(_read_only(rows), sources)


class BatchTables:
    """Builds read-only tables: a table handed to a dispatched program is never changed afterwards."""

    def __init__(self, num_pages: Mapping[str, int]):
        self.num_pages = dict(num_pages)
        self._last: OrderedDict[tuple[int, int], list[Built]] = OrderedDict()  # by shape, of every component

    def build(self, leases: Sequence[Lease | None], max_pages: int) -> dict[str, np.ndarray]:
        """Per component: int32[len(leases), max_pages]. ValueError for a lease with more pages."""
        shape = (len(leases), max_pages)
        last = self._last.pop(shape, None) or [
            Built(_read_only(np.full((len(leases) + 1, max_pages), absent, np.int32)), [None] * len(leases))
            for absent in self.num_pages.values()
        ]
        self._last[shape] = built = [
            last[c].following([None if lease is None else lease._tables[c] for lease in leases], leases, name)
            for c, name in enumerate(self.num_pages)
        ]
        if len(self._last) > MAX_SHAPES:
            self._last.popitem(last=False)
        return {name: table.rows[:-1] for name, table in zip(self.num_pages, built, strict=True)}


def tables_of(
    core: PrefixCache, tables: BatchTables, leases: Sequence[Lease | None], max_pages: int
) -> dict[str, np.ndarray]:
    """What a model step reads: refused unless it may run. The loop will use no earlier tables of these leases."""
    check_runnable(core, leases)
    built = tables.build(leases, max_pages)
    changed = [lease for lease in leases if lease is not None and lease._duplicates is not None]
    if changed:
        core.tables_were_read(changed)
    return built


def _read_only(table: np.ndarray) -> np.ndarray:
    table.flags.writeable = False
    return table
