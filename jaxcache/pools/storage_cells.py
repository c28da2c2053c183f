"""Which parts of a rank's row are values of their own in storage: the cells of the storage grid.

    grid (cp, tp, pp) = into how many cells slots, heads and layers are cut; a multiple of the mesh's extents
    rank's row, mesh pp1                     | layers 0:2 of kv | layers 2:4 of kv |
    cells, grid pp2                          |      cell        |       cell       |    the ranks' rows, mesh pp2

What a cell holds depends on the grid alone and never on the mesh, and its name says what that is: so ranks of any mesh
with that grid find it. A cell that lies in the row in one piece is that memory, as is the whole row where the grid is
the mesh; any other is cut out by a strided copy. Padding is in no cell.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping

import numpy as np

from jaxcache.components.base import FieldSpec
from jaxcache.pools.cells import Block, Cell, Part, Share
from jaxcache.pools.host_pool import HostPool
from jaxcache.pools.page_layout import MESH_AXES, MESH_AXIS_OF, ROW_ALIGNMENT, Coordinates, FieldLayout, PageLayout

VALUE_BYTES = 256 << 10  # where larger values of FileStorage are no faster per byte
MAX_UNIT_PAGES = 64


def storage_cells(layout: PageLayout, coordinates: Coordinates) -> tuple[Cell, ...]:
    """The cells of one rank, each once. ValueError if the layout's grid does not fit the fields or the mesh."""
    first: dict[str, Coordinates] = {}
    for rank in np.ndindex(layout.mesh.devices.shape):
        for blocks in _cells_of(layout, rank):
            first.setdefault(_name(blocks), rank)
    return tuple(_cell(blocks, first[_name(blocks)] == coordinates) for blocks in _cells_of(layout, coordinates))


def local_part(pool: HostPool, unit: int) -> Part:
    """The share of this process's devices."""
    layout = pool.layout
    shares = (Share(pool.rows[device], storage_cells(layout, layout.coordinates(device))) for device in pool.devices)
    return Part(layout.component, tuple(shares), unit)


def largest_cell_bytes(layout: PageLayout) -> int:
    """Of all cells of all ranks: follows from the grid, not from the mesh. 0 for pages without arrays."""
    ranks = np.ndindex(layout.mesh.devices.shape)
    return max((blocks[-1].byte_range.stop for rank in ranks for blocks in _cells_of(layout, rank)), default=0)


def unit_pages(layout: PageLayout) -> int:
    """So many pages that the largest cell's values reach VALUE_BYTES; equal for all meshes with one storage grid."""
    num_pages = min(max(VALUE_BYTES // max(largest_cell_bytes(layout), 1), 1), MAX_UNIT_PAGES)
    return 1 << (num_pages.bit_length() - 1)


def _cells_of(layout: PageLayout, coordinates: Coordinates) -> Iterator[tuple[Block, ...]]:
    """The blocks of each of a rank's cells that hold anything, without those that an earlier cell has."""
    rank = dict(zip(layout.mesh.axis_names, coordinates, strict=True))
    grid = dict(zip(MESH_AXES, layout.grid, strict=True))
    shares = [_share(axis, grid[axis], layout.mesh.shape[axis], rank[axis]) for axis in MESH_AXES]
    seen = set()
    for place in itertools.product(*shares):
        blocks = _blocks(layout, rank, dict(zip(MESH_AXES, place, strict=True)))
        if blocks and (name := _name(blocks)) not in seen:
            seen.add(name)
            yield blocks


def _share(axis: str, num_cells: int, num_ranks: int, rank: int) -> range:
    if num_cells % num_ranks:
        raise ValueError(f"the storage grid's {axis}={num_cells} must be a multiple of the mesh's {axis}={num_ranks}")
    each = num_cells // num_ranks
    return range(rank * each, (rank + 1) * each)


def _blocks(layout: PageLayout, rank: Mapping[str, int], place: Mapping[str, int]) -> tuple[Block, ...]:
    blocks, offset = [], 0
    for field in layout.fields:
        parts = [_part(layout, field, dim, rank, place) for dim in range(len(field.spec.shape))]
        block = Block(field, tuple(part for part, _ in parts), ",".join(text for _, text in parts), offset)
        if math.prod(block.shape):
            blocks.append(block)
            offset = -(-block.byte_range.stop // ROW_ALIGNMENT) * ROW_ALIGNMENT
    return tuple(blocks)


def _part(
    layout: PageLayout, field: FieldLayout, dim: int, rank: Mapping[str, int], place: Mapping[str, int]
) -> tuple[slice, str]:
    """A cell's part of one dimension: in the rank's share, and as text in the unpadded field."""
    name, num, num_local = field.spec.axes[dim], field.spec.shape[dim], field.local_shape[dim]
    if name is None:
        return slice(0, num_local), ":"
    axis = MESH_AXIS_OF[name]
    num_cells = layout.grid[MESH_AXES.index(axis)]
    start, stop = _cut(field.spec, dim, num_cells, place[axis])
    num_ranks = layout.mesh.shape[axis] if field.axes[dim] == axis else 1
    repeats = field.padded_shape[dim] // num if name == "heads" else 1
    first = rank[axis] * num_local // repeats if num_ranks > 1 else 0
    if start < stop and not first <= start < stop <= first + num_local:
        raise ValueError(
            f"field {field.spec.name!r}: the storage grid's {axis}={num_cells} cuts {num} {name} into parts of "
            f"{stop - start}, which do not divide the {num_local} of a rank with {axis}={num_ranks}"
        )
    return slice(start - first, max(start, stop) - first), f"{start}:{stop}"


def _cut(spec: FieldSpec, dim: int, num_cells: int, cell: int) -> tuple[int, int]:
    """[start, stop) of a cell in one dimension; depends on no mesh. stop <= start: nothing is left for it."""
    num, name = spec.shape[dim], spec.axes[dim]
    if name == "layers":
        each = -(-num // num_cells)
        return cell * each, min((cell + 1) * each, num)
    if name == "slots" and num < num_cells:
        return 0, num
    if num % num_cells and (name == "slots" or num_cells % num):
        axis = MESH_AXIS_OF[name or ""]
        raise ValueError(f"field {spec.name!r}: {num} {name} do not divide over the storage grid's {axis}={num_cells}")
    each, start = max(1, num // num_cells), cell * num // num_cells
    return start, start + each


def _name(blocks: tuple[Block, ...]) -> str:
    return ";".join(f"{_signature(block.field.spec)}@{block.ranges}" for block in blocks)


def _signature(spec: FieldSpec) -> str:
    return f"{spec.name}:{spec.dtype}[{','.join(map(str, spec.shape))}]"


def _cell(blocks: tuple[Block, ...], is_writer: bool) -> Cell:
    return Cell(_name(blocks), blocks, blocks[-1].byte_range.stop, _start_in_row(blocks), is_writer)


def _start_in_row(blocks: tuple[Block, ...]) -> int | None:
    """One block in one piece, or whole fields in a row: nothing else may lie between."""
    if len(blocks) == 1:
        share = np.empty(blocks[0].field.local_shape, blocks[0].field.dtype)
        block = share[blocks[0].index]
        skipped = block.ctypes.data - share.ctypes.data
        return blocks[0].field.offset + skipped if block.flags.c_contiguous else None
    is_whole = all(block.shape == block.field.local_shape for block in blocks)
    is_in_row = all(block.field.offset == blocks[0].field.offset + block.offset for block in blocks)
    return blocks[0].field.offset if is_whole and is_in_row else None
