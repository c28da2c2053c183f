"""How consecutive pages share the values of storage, so that small pages do not make small values.

A value holds 1, 2, 4 ... `unit` consecutive pages of a prompt; where it may begin follows from its size alone:

    page            0 1 2 3 4 5 6 7 8 9                 unit = 8
    may be values  [0 .. 7] [0 .. 3] [4 .. 7] [0 1] [2 3] ... [0] [1] ...
    run 3 .. 9            [3][4 5 6 7][8 9]

It has the key of its last page, which says all that is before it, and its size is in its name: so a reader that knows a
prompt knows the names of all values that may hold a page, and what is found is what was asked for, to the bit. A run
ends anywhere, so a hit may end inside a unit; a prompt that leaves another's inside a value finds what ends before it.
"""

from __future__ import annotations

from jaxcache.pools.page_layout import PageLayout
from jaxcache.pools.storage_cells import largest_cell_bytes

VALUE_BYTES = 256 << 10  # where larger values of FileStorage are no faster per byte
MAX_UNIT_PAGES = 64


def unit_pages(layout: PageLayout) -> int:
    """So many pages that the largest cell's values reach VALUE_BYTES; equal for all meshes with one storage grid."""
    num_pages = min(max(VALUE_BYTES // max(largest_cell_bytes(layout), 1), 1), MAX_UNIT_PAGES)
    return 1 << (num_pages.bit_length() - 1)


def cut(run: range, unit: int) -> list[range]:
    """The values of a run of pages."""
    values, at = [], run.start
    while at < run.stop:
        size = min(unit, at & -at or unit)
        while at + size > run.stop:
            size //= 2
        values.append(range(at, at + size))
        at += size
    return values
