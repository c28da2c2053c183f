"""What of a rank's row is a value in storage, and how it gets there and back. Knows rows and bytes, and no mesh.

row  |  cell  |  cell  | padding |       one value for each cell, or for the cells of consecutive pages together
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxcache.pools.page_layout import FieldLayout


@dataclass(frozen=True)
class Block:
    """One field's part of a cell.

    index:  in the rank's share of the field, one slice per dimension
    ranges: the same in the coordinates of the unpadded field, e.g. "0:2,:,0:8,1:2,:"
    offset: in the value, in bytes
    """

    field: FieldLayout
    index: tuple[slice, ...]
    ranges: str
    offset: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(part.stop - part.start for part in self.index)

    @property
    def byte_range(self) -> slice:
        """In the value."""
        return slice(self.offset, self.offset + math.prod(self.shape) * self.field.dtype.itemsize)

    def of_row(self, row: np.ndarray) -> np.ndarray:
        """A view of the block, typed, in a rank's row."""
        return row[self.field.byte_range].view(self.field.dtype).reshape(self.field.local_shape)[self.index]

    def of_value(self, value: np.ndarray) -> np.ndarray:
        """A view of the block, typed, in the value."""
        return value[self.byte_range].view(self.field.dtype).reshape(self.shape)


@dataclass(frozen=True)
class Cell:
    """One value of one rank's page.

    name:      says what it holds: equal names, equal bytes, on every mesh
    num_bytes: of the value
    start:     where it lies in the row, in one piece; None: it must be cut out
    is_writer: whether this rank stores it; other ranks that hold it do not
    """

    name: str
    blocks: tuple[Block, ...]
    num_bytes: int
    start: int | None
    is_writer: bool

    def value(self, row: np.ndarray) -> np.ndarray:
        """uint8[num_bytes]: the row's own memory if the cell lies there in one piece, else a copy."""
        if self.start is not None:
            return self.room(row)
        value = np.zeros(self.num_bytes, np.uint8)
        for block in self.blocks:
            block.of_value(value)[...] = block.of_row(row)
        return value

    def room(self, row: np.ndarray) -> np.ndarray:
        """uint8[num_bytes] to read a value into, before `put_back`; the row's own memory where that is possible."""
        if self.start is not None:
            return row[self.start : self.start + self.num_bytes]
        return np.empty(self.num_bytes, np.uint8)

    def values(self, rows: np.ndarray, page_ids: np.ndarray) -> np.ndarray:
        """uint8[len(page_ids), num_bytes]: of several pages, copied. rows: uint8[num_pages, row_bytes]"""
        if self.start is not None:
            return rows[page_ids, self.start : self.start + self.num_bytes]
        return np.stack([self.value(rows[page_id]) for page_id in page_ids])

    def put_values(self, values: np.ndarray, rows: np.ndarray, page_ids: np.ndarray) -> None:
        """Writes `values`, as above, to their places in the rows."""
        if self.start is not None:
            rows[page_ids, self.start : self.start + self.num_bytes] = values
            return
        for value, page_id in zip(values, page_ids, strict=True):
            self.put_back(value, rows[page_id])

    def put_back(self, value: np.ndarray, row: np.ndarray) -> None:
        """Writes a value that was read into `room` to its places in the row."""
        if self.start is None:
            for block in self.blocks:
                block.of_row(row)[...] = block.of_value(value)


@dataclass(frozen=True, slots=True)
class Share:
    """One local rank's share of a component's pages.

    rows:  uint8[num_pages, row_bytes]
    cells: what of a row is stored apart
    """

    rows: np.ndarray
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Part:
    """One component's share of this process.

    unit: how many consecutive pages may share a value of storage
    """

    component: str
    shares: tuple[Share, ...]
    unit: int

    @cached_property
    def cell_names(self) -> tuple[str, ...]:
        """Of all shares, each once."""
        return tuple(dict.fromkeys(cell.name for share in self.shares for cell in share.cells))
