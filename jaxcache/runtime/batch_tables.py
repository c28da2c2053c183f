"""Page tables of a whole batch as jit wants them: int32 [max_requests, max_pages] per component, of fixed shape.

    step 7   row 0: table A   row 1: table B          a table of a lease never changes, it is replaced:
    step 8   row 0: table A   row 1: table C          only row 1 is written anew, in a copy

A row that no request uses, and a page that is not there, has the id num_pages, which every program drops.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from operator import is_

import numpy as np

from jaxcache.core.lease import Lease
from jaxcache.types import PageIds

MAX_SHAPES = 8  # of batches, such as a prefill's and a decode's, of which the last tables are kept


class BatchTables:
    """Builds read-only tables: a table handed to a dispatched program is never changed afterwards."""

    def __init__(self, num_pages: Mapping[str, int]):
        self.num_pages = dict(num_pages)
        # By shape and component: the last table, and what each of its rows was made of.
        self._last: OrderedDict[tuple[int, int], list[tuple[np.ndarray, list[PageIds | None]]]] = OrderedDict()

    def build(self, leases: Sequence[Lease | None], max_pages: int) -> dict[str, np.ndarray]:
        """Per component: int32[len(leases), max_pages]. ValueError for a lease with more pages."""
        shape = (len(leases), max_pages)
        last = self._last.pop(shape, None) or [
            (_read_only(np.full(shape, absent, np.int32)), [None] * len(leases)) for absent in self.num_pages.values()
        ]
        new = []
        for c, (name, absent) in enumerate(self.num_pages.items()):
            sources = [None if lease is None else lease._tables[c] for lease in leases]
            changed = [row for row, is_same in enumerate(map(is_, sources, last[c][1])) if not is_same]
            table = last[c][0]
            if changed:
                table = _read_only(_rewritten(table.copy(), changed, leases, sources, name, absent))
            new.append((table, sources))
        self._last[shape] = new
        if len(self._last) > MAX_SHAPES:
            self._last.popitem(last=False)
        return {name: table for name, (table, _) in zip(self.num_pages, new, strict=True)}


def _rewritten(
    table: np.ndarray,
    rows: Sequence[int],
    leases: Sequence[Lease | None],
    sources: Sequence[PageIds | None],
    name: str,
    absent: int,
) -> np.ndarray:
    """The table itself, with these rows made of their sources."""
    for row in rows:
        source = sources[row]
        table[row] = absent
        if source is not None:
            if len(source) > table.shape[1]:
                raise ValueError(f"{leases[row]!r} has {len(source)} pages of {name!r}, max_pages={table.shape[1]}")
            table[row, : len(source)] = source
    return table


def _read_only(table: np.ndarray) -> np.ndarray:
    table.flags.writeable = False
    return table
