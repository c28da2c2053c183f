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

from collections.abc import Iterator


def chunks(num_pages: int, size: int) -> Iterator[slice]:
    """[0, num_pages) in pieces of at most `size`."""
    for start in range(0, num_pages, size):
        yield slice(start, min(start + size, num_pages))


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
