"""Page tables of a whole batch as jit wants them: int32 [max_requests, max_pages] per component, of fixed shape.

A row that no request uses, and a page that is not there, has the id num_pages, which every program drops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jaxcache.core.lease import Lease


class BatchTables:
    """Builds fresh read-only tables: a table handed to a dispatched program is never changed afterwards."""

    def __init__(self, num_pages: Mapping[str, int]):
        self.num_pages = dict(num_pages)

    def build(self, leases: Sequence[Lease | None], max_pages: int) -> dict[str, np.ndarray]:
        """Per component: int32[len(leases), max_pages]. Raises RuntimeError while a plan is unapplied."""
        tables = {name: np.full((len(leases), max_pages), absent, np.int32) for name, absent in self.num_pages.items()}
        for row, lease in enumerate(leases):
            if lease is not None:
                for name, table in lease.page_tables.items():
                    if len(table) > max_pages:
                        raise ValueError(f"{lease!r} has {len(table)} pages of {name!r}, {max_pages=}")
                    tables[name][row, : len(table)] = table
        for table in tables.values():
            table.flags.writeable = False
        return tables
