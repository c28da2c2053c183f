"""The contract of a component: one kind of state with its own page ids. Never imports jax.

A component states once what must be present to resume at token n; matching, pinning, load-back, backup, storage
queries, commits and eviction are derived from it.

    kind
    "prefix"  |################|         pages [0, n)                      full attention
    "window"  |           #####|         pages over the last tokens        sliding window
    "state"   |                #         one state, exactly at n           recurrent state
              0                n
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from jaxcache.types import Span

AXES = ("layers", "slots", "heads", None)


@dataclass(frozen=True)
class FieldSpec:
    """One array inside a component's page, unsharded.

    shape: of one page (of one state for recurrent components), e.g. (layers, 2, page_tokens, kv_heads, head_dim)
    dtype: a numpy or ml_dtypes name, e.g. "bfloat16"
    axes:  for each dimension "layers" (sharded over pp), "slots" (token slots, over cp), "heads" (over tp), or None
    tokens_per_slot: how many tokens share a slot (compressed caches); slots times this is page_tokens
    padding: how many entries of the shape no layer uses, such as those that fill up a grid of layers
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]
    tokens_per_slot: int = 1
    padding: int = 0

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"field {self.name!r}: {self.shape=} and {self.axes=} must have one axis per dimension")
        if any(n < 1 for n in self.shape):
            raise ValueError(f"field {self.name!r}: every dimension of {self.shape=} must be at least 1")
        named = [axis for axis in self.axes if axis is not None]
        if any(axis not in AXES for axis in named) or len(set(named)) != len(named):
            raise ValueError(f"field {self.name!r}: {self.axes=} must be distinct names of {AXES[:-1]}, or None")
        if not 0 <= self.padding < math.prod(self.shape):
            raise ValueError(f"field {self.name!r}: {self.padding=} must be in [0, {math.prod(self.shape)})")
        np_dtype(self.dtype)

    @property
    def page_tokens(self) -> int | None:
        """How many tokens this field takes a page to be; None if it has no token slots."""
        return self.shape[self.axes.index("slots")] * self.tokens_per_slot if "slots" in self.axes else None

    @property
    def num_bytes(self) -> int:
        """Of one page, without padding."""
        return (math.prod(self.shape) - self.padding) * np_dtype(self.dtype).itemsize


def np_dtype(name: str) -> np.dtype:
    """numpy's dtype of that name; bfloat16 and the fp8 types come from ml_dtypes."""
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        try:
            return np.dtype(getattr(ml_dtypes, name))
        except (AttributeError, TypeError):
            raise ValueError(f"dtype {name!r} is known neither to numpy nor to ml_dtypes") from None


@dataclass(frozen=True)
class Component(ABC):
    """A kind of state, declared: its name, its arrays, and what must be present to resume.

    kind:     what is kept, published and evicted together, by the name of a class in core/kinds
    is_paged: has a page for each page of tokens; otherwise one entry stands for all that is before it
    """

    name: str
    fields: tuple[FieldSpec, ...]
    kind: ClassVar[str]
    is_paged: ClassVar[bool] = True

    def __post_init__(self):
        if not self.name.isidentifier():
            raise ValueError(f"component {self.name!r}: the name must be a Python identifier")
        names = [spec.name for spec in self.fields]
        if len(set(names)) != len(names):
            raise ValueError(f"component {self.name!r}: field names must differ, not {names}")

    @property
    def grid_tokens(self) -> int:
        """A request can resume only at multiples of this."""
        return 1

    @abstractmethod
    def required(self, n: int) -> Span:
        """The tokens whose pages must be present to resume at token n; an empty span at n means the state at n."""
