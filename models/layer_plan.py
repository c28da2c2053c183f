"""Which kinds of layers a decoder has, in what order, and where each keeps its share of a page.

A plan is a grid of blocks; a stage of a pipeline holds whole blocks. Layers of one kind are stacked, and so is what the
layers keep in one field, by block:

    layer   0 1 2 3   4 5 6 7   8 9         blocks of 4; s a state, f full attention, the last block is not full
    kind    s s s f   s s s f   s s . .     parameters of s: [3 blocks x 3, ...], of f: [3 x 1, ...]
    page    0 1 2 0   0 1 2 0   0 1         state: [slots, 3, 3, ...], full: [pages, 3, 2, page_tokens, K, head_dim]

Entries that no layer has, in a block or a stage that is not full, are padding. A plan is the same on every mesh.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from jaxcache.components import Component, FieldSpec, FullAttention, RecurrentState, SlidingWindow

FULL, WINDOW, STATE = "full", "window", "state"
SLOTS = -1  # as a dimension: the slots of a page


class Kept(NamedTuple):
    """What one layer keeps in one field of a page, or of a state, unsharded: see `FieldSpec`. dtype None: the cache's

    shape: its dimension with the axis "slots" is SLOTS: page_tokens / tokens_per_slot
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: str | None = None
    tokens_per_slot: int = 1


Keeps = Mapping[str, Mapping[str, Kept]]  # by component and field


class Layers(Protocol):
    """What a plan is made of: see `DecoderConfig`."""

    @property
    def layer_kinds(self) -> tuple[str, ...]: ...
    @property
    def block_layers(self) -> int: ...
    @property
    def window_tokens(self) -> int: ...
    @property
    def state_grid_tokens(self) -> int: ...
    def keeps(self, kind: str) -> Keeps: ...


class LayerPlan:
    """The grid of a decoder's layers.

    kinds:     all of them, in order of appearance
    groups:    runs of neighbouring places of a block, and the kinds that layers there may have
    per_block: places for layers of each kind in a block, and for those that keep each (component, field)
    """

    def __init__(self, cfg: Layers):
        self.cfg = cfg
        size, kinds = cfg.block_layers, cfg.layer_kinds
        self.kinds = tuple(dict.fromkeys(kinds))
        self.block_layers = size
        self.blocks = [kinds[i : i + size] for i in range(0, len(kinds), size)]
        self.num_blocks = len(self.blocks)
        self.keeps = {kind: cfg.keeps(kind) for kind in self.kinds}
        self.per_block: dict[str | tuple[str, str], int] = {}
        for kind in self.kinds:
            self.per_block[kind] = max(block.count(kind) for block in self.blocks)
        for component, fields in self.kept.items():
            for field in fields:
                self.per_block[component, field] = max(len(self._keepers(b, component, field)) for b in self.blocks)

    @cached_property
    def kept(self) -> dict[str, dict[str, Kept]]:
        """Every field of every component; FULL first, as the cache's messages name it."""
        merged: dict[str, dict[str, Kept]] = {}
        for keeps in self.keeps.values():
            for component, fields in keeps.items():
                for name, field in fields.items():
                    if merged.setdefault(component, {}).setdefault(name, field) != field:
                        raise ValueError(f"layers keep {component}.{name} in two shapes")
        return dict(sorted(merged.items(), key=lambda item: (FULL, WINDOW, STATE).index(item[0])))

    def _keepers(self, block: tuple[str, ...], component: str, field: str) -> list[int]:
        return [j for j, kind in enumerate(block) if field in self.keeps[kind].get(component, ())]

    @cached_property
    def groups(self) -> list[tuple[list[int], tuple[str, ...]]]:
        """One kind at each place, where all blocks are alike; else any kind may be anywhere."""
        full = self.blocks[0]
        if any(block != full[: len(block)] for block in self.blocks):
            return [(list(range(self.block_layers)), self.kinds)]
        runs = itertools.groupby(range(len(full)), full.__getitem__)
        return [(list(places), (kind,)) for kind, places in runs]

    @cached_property
    def is_ragged(self) -> bool:
        """Whether a place of some block has no layer."""
        return len(self.blocks[-1]) < self.block_layers

    @cached_property
    def kind_at(self) -> np.ndarray:
        """i32[num_blocks + 1, block_layers]: index in `kinds`, or len(kinds) for no layer; of the last row, all."""
        at = np.full((self.num_blocks + 1, self.block_layers), len(self.kinds), np.int32)
        for i, block in enumerate(self.blocks):
            at[i, : len(block)] = [self.kinds.index(kind) for kind in block]
        return at

    def place_at(self, what: str | tuple[str, str]) -> np.ndarray:
        """i32[num_blocks + 1, block_layers]: how many of a kind, or keepers of a field, come before in its block."""
        at = np.zeros((self.num_blocks + 1, self.block_layers), np.int32)
        for i, block in enumerate(self.blocks):
            is_one = np.zeros(self.block_layers + 1, np.int32)
            ones = [j for j, kind in enumerate(block) if kind == what] if isinstance(what, str) else []
            ones = self._keepers(block, *what) if isinstance(what, tuple) else ones
            is_one[1:][ones] = 1
            at[i] = np.cumsum(is_one)[:-1]
        return at

    def layers_of(self, kind: str) -> tuple[int, ...]:
        """The layer whose parameters each entry of the kind's stack is; -1: padding."""
        stack = []
        for i, block in enumerate(self.blocks):
            layers = [i * self.block_layers + j for j, of in enumerate(block) if of == kind]
            stack += layers + [-1] * (self.per_block[kind] - len(layers))
        return tuple(stack)

    def components(self, page_tokens: int, dtype: str) -> tuple[Component, ...]:
        """What one page holds, unsharded: every field of every layer."""
        return tuple(self._component(name, page_tokens, dtype) for name in self.kept)

    def _component(self, name: str, page_tokens: int, dtype: str) -> Component:
        kept = self.kept[name].items()
        fields = tuple(self._field(name, field, of_layer, page_tokens, dtype) for field, of_layer in kept)
        if name == WINDOW:
            return SlidingWindow(name, fields, window_tokens=self.cfg.window_tokens)
        if name == STATE:
            return RecurrentState(name, fields, chunk_tokens=self.cfg.state_grid_tokens)
        return FullAttention(name, fields)

    def _field(self, component: str, name: str, kept: Kept, page_tokens: int, dtype: str) -> FieldSpec:
        if page_tokens % kept.tokens_per_slot:
            raise ValueError(f"{page_tokens=} must be a multiple of the {kept.tokens_per_slot} tokens of a {name} slot")
        shape = tuple(page_tokens // kept.tokens_per_slot if n == SLOTS else n for n in kept.shape)
        count = self.per_block[component, name]
        in_block = (count,) if count > 1 else ()
        num_layers = sum(len(self._keepers(block, component, name)) for block in self.blocks)
        return FieldSpec(
            name,
            (self.num_blocks, *in_block, *shape),
            kept.dtype or dtype,
            ("layers", *(None for _ in in_block), *kept.axes),
            tokens_per_slot=kept.tokens_per_slot,
            padding=(self.num_blocks * count - num_layers) * math.prod(shape),
        )
