"""What the serving loop hands over: whether it is the pools of this cache, and whether they have changed since.

    cache --- pools ---> loop --- model step ---> new arrays ---> cache
     version 7                                      version 8

A value of the pools is known by its arrays, which are looked at closely once, when they are first seen: an array never
changes its shape, dtype or sharding. Held weakly, so that no array lives longer for being known.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
from jax.sharding import AxisType

from jaxcache.pools.device_pool import DevicePools
from jaxcache.pools.page_layout import PageLayout


class PoolsCheck:
    """version: how often the loop has handed over another value than before: a model step was dispatched."""

    def __init__(self, layouts: Mapping[str, PageLayout], num_pages: Mapping[str, int]):
        self.version = 0
        self._names = {name: [f.spec.name for f in layout.fields] for name, layout in layouts.items()}
        self._wanted = [
            (name, f.spec.name, (num_pages[name], *f.padded_shape), f.dtype, layout.shardings()[f.spec.name])
            for name, layout in layouts.items()
            for f in layout.fields
        ]
        self._known: list[Any] = []  # weak references to the arrays of the present value; none: nothing was seen yet
        self._replaced: dict[int, weakref.ref] = {}  # arrays of earlier values that are still alive, by id
        axis_types = {axis_type for layout in layouts.values() for axis_type in layout.mesh.axis_types}
        self._is_explicit = AxisType.Explicit in axis_types  # then programs take nothing but the sharding itself

    def check(self, pools: DevicePools) -> None:
        """Takes note of what the loop hands over. Raises ValueError, naming the field, for what are not the pools of
        this cache, and for an earlier value of them."""
        arrays = self._arrays(pools)
        known = self._known or [_nothing] * len(arrays)
        new = [i for i, array in enumerate(arrays) if array is not known[i]()]
        for i in new:
            self._check_array(i, arrays[i])
            if self._replaced.get(id(arrays[i]), _nothing)() is arrays[i]:
                name, field, *_ = self._wanted[i]
                raise ValueError(
                    f"stale pools: a later value of {name}.{field} was passed before; pass what the last call returned"
                )
        for array, (name, field, *_) in zip(arrays, self._wanted, strict=True):
            if array.is_deleted():
                raise ValueError(f"stale pools: {name}.{field} was donated; pass what the last call returned")
        if new or not arrays:  # without arrays there is nothing to see
            self.version += bool(self._known) or not arrays
            self._note(arrays)

    def handed_back(self, pools: DevicePools) -> None:
        """The cache itself has made this value of what it was given: that is no new one."""
        self._note(self._arrays(pools))

    def forget(self) -> None:
        """Whatever comes next is looked at anew, and may have been there before: the device tier is empty."""
        self._known = []
        self._replaced.clear()

    def _arrays(self, pools: DevicePools) -> list[jax.Array]:
        if not isinstance(pools, Mapping) or set(pools) != set(self._names):
            what = sorted(map(str, pools)) if isinstance(pools, Mapping) else type(pools).__name__
            raise ValueError(f"pools must be those of all components, {sorted(self._names)}, not {what}")
        for name, fields in self._names.items():
            if not isinstance(pools[name], Mapping) or set(pools[name]) != set(fields):
                what = sorted(map(str, pools[name])) if isinstance(pools[name], Mapping) else type(pools[name]).__name__
                raise ValueError(f"pools[{name!r}] must be its arrays {sorted(fields)}, not {what}")
        return [pools[name][field] for name, fields in self._names.items() for field in fields]

    def _check_array(self, i: int, array: Any) -> None:
        name, field, shape, dtype, sharding = self._wanted[i]
        where = f"pools[{name!r}][{field!r}]"
        if not isinstance(array, jax.Array):
            raise ValueError(f"{where} must be a jax array, not {type(array).__name__}: init_pools makes one")
        if array.shape != shape:
            raise ValueError(f"{where} has the shape {array.shape}, but this cache has {shape}")
        if array.dtype != dtype:
            raise ValueError(f"{where} is {array.dtype}, but its component declares {dtype}")
        is_other = array.sharding != sharding
        if is_other and (self._is_explicit or not array.sharding.is_equivalent_to(sharding, len(shape))):
            raise ValueError(f"{where} is sharded as {array.sharding}, but this cache needs {sharding}")

    def _note(self, arrays: list[jax.Array]) -> None:
        for known, array in zip(self._known, arrays, strict=False):
            before = known()
            if before is not None and before is not array and not before.is_deleted():
                self._replaced[id(before)] = weakref.ref(before, partial(self._forget, id(before)))
        self._known = [weakref.ref(array) for array in arrays]

    def _forget(self, key: int, _: weakref.ref) -> None:
        self._replaced.pop(key, None)


def _nothing() -> None:
    """A reference to no array."""
