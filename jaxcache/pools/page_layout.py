"""How one component's pages lie on the mesh: shapes, shardings and bytes. Owns no memory and never touches any.

one page, unsharded                      one rank's row (bytes, the same on device and in host memory)
kv   [layers, 2, slots, heads, dim]      | kv: its layers, slots, heads | index: its layers, slots |
index[layers, slots, dim]                0                              offset             row_bytes
layers -> pp (padded), slots -> cp (or repeated), heads -> tp (or repeated); None is never sharded

Neighbouring fields that are alike, such as the layers of a pool that is a list of arrays, are moved as one stack.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcache.components.base import Component, FieldSpec, np_dtype

MESH_AXES = ("cp", "tp", "pp")
MESH_AXIS_OF = {"layers": "pp", "slots": "cp", "heads": "tp"}
ROW_ALIGNMENT = 16  # bytes; what the widest vector copies of a page ask for

Coordinates = tuple[int, ...]  # of one rank, in the mesh's own axis order
Grid = tuple[int, int, int]  # cp, tp, pp


@dataclass(frozen=True)
class FieldLayout:
    """One field of a page on the mesh.

    padded_shape: of a page, all ranks together
    axes:         for each dimension the mesh axis that shards it, or None
    local_shape:  of one rank's share
    offset:       where that share starts in the row, in bytes
    """

    spec: FieldSpec
    padded_shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    local_shape: tuple[int, ...]
    offset: int

    @cached_property
    def dtype(self) -> np.dtype:
        return np_dtype(self.spec.dtype)

    @cached_property
    def local_bytes(self) -> int:
        return math.prod(self.local_shape) * self.dtype.itemsize

    @cached_property
    def byte_range(self) -> slice:
        return slice(self.offset, self.offset + self.local_bytes)

    @property
    def pool_spec(self) -> PartitionSpec:
        """Of an array [pages, *padded_shape]; pages are never sharded."""
        return PartitionSpec(None, *self.axes)


@dataclass(frozen=True)
class Stack:
    """What is moved as one array: a field, or neighbouring fields that are alike, one after the other in a row.

    names: of these fields
    field: of the array [pages, *local_shape] that holds them all; of several, its first dimension counts them
    """

    names: tuple[str, ...]
    field: FieldLayout


@dataclass(frozen=True)
class PageLayout:
    """One component's pages on a mesh with the axes cp, tp and pp.

    grid: the storage grid (cp, tp, pp), see `storage_cells`
    """

    component: str
    fields: tuple[FieldLayout, ...]
    row_bytes: int
    mesh: Mesh
    grid: Grid

    @property
    def page_bytes(self) -> int:
        """Bytes of a page over all ranks, without padding and repetition."""
        return sum(f.spec.num_bytes for f in self.fields)

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """All fields, in order."""
        return tuple(_stack(list(fields)) for _, fields in groupby(self.fields, _likeness))

    def shardings(self) -> dict[str, NamedSharding]:
        """Of the arrays [pages, ...] of each field."""
        return {f.spec.name: NamedSharding(self.mesh, f.pool_spec) for f in self.fields}

    def staging_shardings(self) -> dict[str, NamedSharding]:
        """Of the arrays [pages, ...] of each stack, by the name of its first field."""
        return {s.field.spec.name: NamedSharding(self.mesh, s.field.pool_spec) for s in self.stacks}

    def coordinates(self, device) -> Coordinates:
        """Where a device sits in the mesh."""
        found = np.argwhere(self.mesh.devices == device)
        assert len(found) == 1, f"{device=} is not in the mesh exactly once"
        return tuple(int(i) for i in found[0])


def page_layout(component: Component, mesh: Mesh, grid: Grid | None = None) -> PageLayout:
    """Lays a component's fields out on the mesh; ValueError if a dimension cannot be sharded.

    grid: of its cells in storage; None: the mesh
    """
    check_axes(mesh)
    fields, offset = [], 0
    for spec in component.fields:
        field = _field_layout(spec, mesh, offset)
        fields.append(field)
        offset = _round_up(offset + field.local_bytes, ROW_ALIGNMENT)
    cp, tp, pp = (mesh.shape[axis] for axis in MESH_AXES)
    return PageLayout(component.name, tuple(fields), offset, mesh, grid or (cp, tp, pp))


def check_axes(mesh: Mesh) -> None:
    if set(mesh.axis_names) != set(MESH_AXES):
        raise ValueError(f"{mesh.axis_names=} must be the axes {MESH_AXES}, in any order")


def page_layouts(components: Sequence[Component], mesh: Mesh, grid: Grid | None = None) -> dict[str, PageLayout]:
    """One layout per component, by name, in order."""
    return {component.name: page_layout(component, mesh, grid) for component in components}


def pool_shardings(components: Sequence[Component], mesh: Mesh) -> dict[str, dict[str, NamedSharding]]:
    """How `Cache.init_pools` shards its arrays [pages, *page], by component and field: what a model step is compiled
    for. ValueError for a dimension that the mesh does not divide."""
    return {name: layout.shardings() for name, layout in page_layouts(components, mesh).items()}


def local_devices(mesh: Mesh) -> tuple:
    """This process's devices of the mesh, in mesh order."""
    return tuple(device for device in mesh.devices.flat if device.process_index == device.client.process_index())


def _field_layout(spec: FieldSpec, mesh: Mesh, offset: int) -> FieldLayout:
    placed = [_dimension(spec, dim, mesh) for dim in range(len(spec.shape))]
    padded_shape, axes = tuple(n for n, _ in placed), tuple(axis for _, axis in placed)
    local = tuple(n if axis is None else n // mesh.shape[axis] for n, axis in placed)
    return FieldLayout(spec, padded_shape, axes, local, offset)


def _likeness(field: FieldLayout) -> tuple:
    """Equal for neighbours that may be stacked: nothing lies between them in a row."""
    is_alone = field.local_bytes % ROW_ALIGNMENT
    return field.dtype, field.padded_shape, field.axes, field.offset if is_alone else None


def _stack(fields: list[FieldLayout]) -> Stack:
    first, n = fields[0], len(fields)
    names = tuple(f.spec.name for f in fields)
    if n == 1:
        return Stack(names, first)
    spec = FieldSpec(names[0], (n, *first.spec.shape), first.spec.dtype, (None, *first.spec.axes))
    local_shape = (n, *first.local_shape)
    return Stack(names, FieldLayout(spec, (n, *first.padded_shape), (None, *first.axes), local_shape, first.offset))


def _dimension(spec: FieldSpec, dim: int, mesh: Mesh) -> tuple[int, str | None]:
    """The padded extent of one dimension, and the mesh axis that shards it."""
    num, name = spec.shape[dim], spec.axes[dim]
    if name is None:
        return num, None
    axis = MESH_AXIS_OF[name]
    num_ranks = mesh.shape[axis]
    if name == "layers":
        return _round_up(num, num_ranks), axis
    if name == "slots" and num < num_ranks:
        return num, None
    if name == "heads" and num < num_ranks and num_ranks % num == 0:
        return num_ranks, axis
    if num % num_ranks:
        raise ValueError(f"field {spec.name!r}: {num} {name} do not divide over {axis}={num_ranks}")
    return num, axis


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
