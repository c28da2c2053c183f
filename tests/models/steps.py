"""Model steps without a cache: a model on a mesh, zeroed pools, tables of shuffled pages, chunks of two rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from jaxcache import StateSlots
from jaxcache.pools.device_pool import init_pools
from jaxcache.pools.page_layout import page_layouts
from models import decoder
from models.paged_attention import ExtendBatch

PAGE_TOKENS = 8  # or the next multiple of what a slot holds
NUM_PAGES = 4096  # so that any pool is larger than what a step computes with
NUM_SLOTS = 1024  # of recurrent states
WIDTH = 12  # pages of a row's table
TOLERANCE = 1e-4
Tables = dict[str, np.ndarray]


@dataclass(frozen=True)
class Steps:
    """A model on a mesh with its compiled step, and what it must compute: tokens int32[rows, n], logits [rows, n, V]"""

    cfg: decoder.DecoderConfig
    mesh: Mesh
    params: decoder.Params
    extend: Callable
    tokens: np.ndarray
    logits: np.ndarray
    num_pages: int = NUM_PAGES

    def pools(self) -> decoder.Pools:
        return zero_pools(self.cfg, self.mesh, self.num_pages)

    def tables(self, rng: np.random.Generator) -> Tables:
        return shuffled_tables(self.cfg, rng, len(self.tokens))

    def run(self, pools: decoder.Pools, tables: Tables, chunks: Iterable[tuple[int, int, int]]) -> np.ndarray:
        """Computes chunks (start, stop, columns) of all rows; returns the logits of all their tokens, in order."""
        logits = []
        for start, stop, columns in chunks:
            step_logits, pools = self.extend(self.params, pools, make_batch(self.tokens, tables, start, stop, columns))
            logits.append(np.asarray(step_logits)[:, : stop - start])
        return np.concatenate(logits, axis=1)


def zero_pools(cfg: decoder.DecoderConfig, mesh: Mesh, num_pages: int = NUM_PAGES) -> decoder.Pools:
    layouts = page_layouts(decoder.components(cfg, page_tokens(cfg), "float32"), mesh)
    return init_pools(layouts, {name: num_entries(name, num_pages) for name in layouts}, mesh)


def page_tokens(cfg: decoder.DecoderConfig) -> int:
    """PAGE_TOKENS where every field allows it."""
    rates = [kept.tokens_per_slot for fields in decoder.LayerPlan(cfg).kept.values() for kept in fields.values()]
    return math.lcm(PAGE_TOKENS, *rates)


def num_entries(component: str, num_pages: int = NUM_PAGES) -> int:
    return NUM_SLOTS if component == decoder.STATE else num_pages


def make_batch(tokens: np.ndarray, tables: Tables, start: int, stop: int, columns: int) -> ExtendBatch:
    """Every row from start to stop, padded with columns that are wrong tokens."""
    rows = len(tokens)
    padded = np.full((rows, columns), 7, np.int32)
    padded[:, : stop - start] = tokens[:, start:stop]
    at = np.broadcast_to(np.arange(columns, dtype=np.int32), (rows, columns)).copy()
    starts, num_new = np.full(rows, start, np.int32), np.full(rows, stop - start, np.int32)
    return ExtendBatch(padded, starts, num_new, tables, at, state_slots(tables, start, stop))


def state_slots(tables: Tables, start: int, stop: int) -> StateSlots | None:
    """As if a chunk had written the state of its last token to that token's place in the table, and kept it nowhere."""
    if decoder.STATE not in tables:
        return None
    slots = tables[decoder.STATE]
    nowhere = np.full(len(slots), NUM_SLOTS, np.int32)
    return StateSlots(slots[:, start - 1] if start else nowhere, slots[:, stop - 1], nowhere)


def shuffled_tables(cfg: decoder.DecoderConfig, rng: np.random.Generator, rows: int) -> Tables:
    """Other pages for each component; of states a slot for each token."""
    tables = {}
    for name in decoder.LayerPlan(cfg).kept:
        width = WIDTH * PAGE_TOKENS if name == decoder.STATE else WIDTH
        tables[name] = rng.permutation(num_entries(name))[: rows * width].reshape(rows, width).astype(np.int32)
    return tables


def addresses(pools: decoder.Pools) -> list[int]:
    arrays = jax.tree.leaves(pools)
    return [shard.data.unsafe_buffer_pointer() for array in arrays for shard in array.addressable_shards]
