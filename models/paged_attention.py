"""Attention over pages: what a batch asks for, where a rank writes, and what it reads. Shared by the model families.

Owns no array: pools are values. Never reads a page before this layer's new entries are in it, or XLA copies the pool.

    position p of a row     page table[p // page_tokens], slot p % page_tokens
    slots of a page         | cp rank 0 | cp rank 1 | ...     every rank holds its share of every page

Runs inside a `shard_map` over ("cp", "tp", "pp"): tables are the same on every rank, pools are that rank's shard.
Letters in shapes: B rows, T columns of new tokens, W table width, S slots of a page on this rank, H query heads, K kv
heads, G = H / K, N pages. Pools are [N, ..., 2, S, K, head_dim]; a layer's place is its index in what lies between.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxcache import StateSlots

BLOCK_TOKENS = 256  # keys that attention reads at a time
GPU_BLOCK_TOKENS = 2048  # there the host looks at the device after each block
Place = tuple[Any, ...]
MASKED = -1e30  # finite: exp(MASKED - MASKED) must not be nan; what it lets in is multiplied by zero later


class Held(NamedTuple):
    """What one layer keeps in one field: pool[page, *place]."""

    pool: Array
    place: Place


class ExtendBatch(NamedTuple):
    """Row b computes the tokens at positions starts[b] .. starts[b] + num_new[b] - 1; further columns are padding.

    tokens:      i32[B, T]
    starts:      i32[B]
    num_new:     i32[B]     0: the row is padding
    page_tables: {component: i32[B, W]}, padded with num_pages
    logits_at:   i32[B, K]  columns whose logits are wanted
    states:      where recurrent states are read and written, if the model has any: see `Cache.state_slots`
    """

    tokens: Array
    starts: Array
    num_new: Array
    page_tables: dict[str, Array]
    logits_at: Array
    states: StateSlots | None = None


class Pages(NamedTuple):
    """Where one rank writes and reads one component's pages in this step; the same for every layer.

    Where r tokens share a slot, slot p of a sequence is that of the tokens p * r .. p * r + r - 1; it is written with
    the last of them, and a token reads the slots that are complete with itself. C = ceil(T / r) slots can be.

    positions:    i32[B, T]         of the newest slot that a token reads: with r = 1 its own position
    oldest:       i32[B, T]         of the oldest slot that a token reads
    write_ids:    i32[B, C]         N where this rank writes nothing
    write_slots:  i32[B, C]         on this rank
    table:        i32[B, W']        to read; W' is a multiple of a block's width, padding is the last page and masked
    key_offsets:  i32[width * S]    of this rank's slots, from the start of a block; NOWHERE: another rank reads them
    block_tokens: i32[]             slots of a block, on all ranks
    blocks:       i32[2]            [first, stop) of those that hold a key which any row reads
    """

    positions: Array
    oldest: Array
    write_ids: Array
    write_slots: Array
    table: Array
    key_offsets: Array
    block_tokens: Array
    blocks: Array


NOWHERE = 1 << 30  # beyond any position


def plan_pages(
    batch: ExtendBatch,
    component: str,
    num_pages: int,
    page_tokens: int,
    block_tokens: int,
    window_tokens: int | None = None,
    tokens_per_slot: int = 1,
) -> Pages:
    """Slots of a page are over cp; every rank holds and writes all of them where they are fewer than cp.

    block_tokens:    keys that are read at a time; those of a page at least
    window_tokens:   how many tokens, the newest included, a token reads; None: all
    tokens_per_slot: how many tokens share a slot; more than one only without a window
    """
    cp, r = lax.axis_size("cp"), tokens_per_slot
    page_slots = page_tokens // r
    is_repeated = page_slots < cp
    rank_slots = page_slots if is_repeated else page_slots // cp
    first_slot = 0 if is_repeated else rank_slots * lax.axis_index("cp")
    width = max(1, block_tokens // page_slots)
    table = batch.page_tables[component]
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % width)), constant_values=num_pages)
    num_columns = batch.tokens.shape[1]
    positions = batch.starts[:, None] + jnp.arange(num_columns, dtype=jnp.int32)[None]
    oldest = jnp.zeros_like(positions) if window_tokens is None else jnp.maximum(positions - window_tokens + 1, 0)
    first_write, stops = batch.starts // r, (batch.starts + batch.num_new) // r
    written = first_write[:, None] + jnp.arange(-(-num_columns // r), dtype=jnp.int32)[None]
    ids = jnp.take_along_axis(table, written // page_slots, axis=1, mode="fill", fill_value=num_pages)
    slots = written % page_slots - first_slot
    is_written = (written < stops[:, None]) & (slots >= 0) & (slots < rank_slots)
    slots_of_page = first_slot + jnp.arange(rank_slots, dtype=jnp.int32)
    page_starts = jnp.arange(width, dtype=jnp.int32) * page_slots
    key_offsets = (page_starts[:, None] + slots_of_page[None]).reshape(-1)
    if is_repeated:
        key_offsets = jnp.where(lax.axis_index("cp") == 0, key_offsets, NOWHERE)
    longest = stops.max()
    first = jnp.where(batch.num_new > 0, oldest[:, 0], longest).min() // (width * page_slots)
    stop = jnp.maximum(-(-longest // (width * page_slots)), 1)
    return Pages(
        positions=(positions + 1) // r - 1,
        oldest=oldest,
        write_ids=jnp.where(is_written, ids, num_pages),
        write_slots=slots,
        table=jnp.minimum(table, num_pages - 1),
        key_offsets=key_offsets,
        block_tokens=jnp.int32(width * page_slots),
        blocks=jnp.stack([jnp.minimum(first, stop - 1), stop]),
    )


class PageStates(NamedTuple):
    """Where layers read and write what a page keeps once: the state after its last token, or after the newest one.

    read_ids:  i32[B]     the page of the token before the first new one; any page if there is none
    write_ids: i32[B, P]  the pages that get new tokens; N: none
    ends:      i32[B, P]  the position after the last token that such a page has then
    """

    read_ids: Array
    write_ids: Array
    ends: Array


def plan_states(batch: ExtendBatch, component: str, num_pages: int, page_tokens: int) -> PageStates:
    """Every rank holds all of it, and must write the same."""
    table, stops = batch.page_tables[component], batch.starts + batch.num_new
    most = (batch.tokens.shape[1] + page_tokens - 2) // page_tokens + 1
    pages = (batch.starts // page_tokens)[:, None] + jnp.arange(most, dtype=jnp.int32)[None]
    ids = jnp.take_along_axis(table, pages, axis=1, mode="fill", fill_value=num_pages)
    last = jnp.maximum(batch.starts - 1, 0)[:, None] // page_tokens
    return PageStates(
        read_ids=jnp.minimum(jnp.take_along_axis(table, last, axis=1, mode="clip")[:, 0], num_pages - 1),
        write_ids=jnp.where(pages * page_tokens < stops[:, None], ids, num_pages),
        ends=jnp.minimum((pages + 1) * page_tokens, stops[:, None]),
    )


def write(held: Held, pages: Pages, kv: Array) -> Held:
    """Puts the new keys and values, [B, T, 2, K, head_dim], where this rank holds their slots."""
    at = held.pool.at[(pages.write_ids, *held.place, slice(None), pages.write_slots)]
    return held._replace(pool=at.set(kv.astype(held.pool.dtype), mode="drop"))


def attend(q: Array, held: Held, pages: Pages, scale: float | None = None, sinks: Array | None = None) -> Array:
    """Softmax attention over the pages of the table; see `attend_sources`.

    q:     [B, T, H, head_dim]; returns f32[B, T, H, head_dim]
    scale: of the scores; None: head_dim ** -0.5
    sinks: f32[H], a score of each head that takes its share of the weights, and has no value
    """
    rank_slots, num_kv_heads, head_dim = held.pool.shape[-3:]

    def read(i: Array) -> Block:
        table = block_table(pages, i, rank_slots)
        keys, values = (held.pool.at[(table, *held.place, j)].get(mode="promise_in_bounds") for j in (0, 1))
        keys, values = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (keys, values))
        return Block(keys, values, is_visible(pages, key_positions(pages, i)))

    default = head_dim**-0.5
    return attend_sources(q, [(pages, read)], num_kv_heads, head_dim, default if scale is None else scale, sinks)


def block_table(pages: Pages, i: Array, rank_slots: int) -> Array:
    """i32[B, width]: the columns of block i."""
    width = pages.key_offsets.shape[0] // rank_slots
    return lax.dynamic_slice_in_dim(pages.table, i * width, width, axis=1)


def key_positions(pages: Pages, i: Array) -> Array:
    """i32[width * S]: of the keys of block i on this rank."""
    return i * pages.block_tokens + pages.key_offsets


def is_visible(pages: Pages, at: Array) -> Array:
    """bool[B, T, M]: whether a token may read the keys at positions i32[M]."""
    at = at[None, None]
    return (at <= pages.positions[..., None]) & (at >= pages.oldest[..., None])


class Block(NamedTuple):
    """Keys [B, M, K, C], values [B, M, K, C'], and whether a token reads them, bool[B, T, M]; M is width * S."""

    keys: Array
    values: Array
    is_read: Array


Read = Callable[[Array], Block]  # of block i


def attend_sources(
    q: Array,
    sources: Sequence[tuple[Pages, Read]],
    num_kv_heads: int,
    value_dim: int,
    scale: float,
    sinks: Array | None = None,
) -> Array:
    """One softmax over all sources, read a block of columns of a table at a time, merged over cp by log-sum-exp.

    q:     [B, T, H, C]; returns f32[B, T, H, value_dim]
    sinks: see `attend`

    Blocks that no row reads are not read, blocks begin at fixed positions, and a masked one changes nothing, not even
    rounding: so a token's result depends, bit for bit, neither on the table's width, nor on the other rows, nor on
    where its chunk began; only B and T matter, which choose the compiled program.
    """
    (b, t, h, c), k = q.shape, num_kv_heads
    q = q.reshape(b, t, k, h // k, c).transpose(0, 2, 3, 1, 4).reshape(b, k, -1, c)  # [B, K, G * T, C]
    zeros = jnp.zeros((*q.shape[:-1], value_dim), jnp.float32)
    partial = (jnp.full_like(zeros[..., :1], MASKED), zeros[..., :1], zeros)
    for pages, read in sources:
        add_block = functools.partial(_attend_block, q, read, scale)
        partial = lax.fori_loop(pages.blocks[0], pages.blocks[1], add_block, partial)
    peak, total, mixed = partial
    top = lax.pmax(peak, "cp")
    if sinks is not None:
        sinks = jnp.repeat(sinks.astype(jnp.float32).reshape(1, k, h // k), t, axis=2)[..., None]  # [1, K, G * T, 1]
        top = jnp.maximum(top, sinks)
    rescaled = jnp.exp(peak - top)
    total, mixed = lax.psum((total * rescaled, mixed * rescaled), "cp")
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    return (mixed / total).reshape(b, k, h // k, t, value_dim).transpose(0, 3, 1, 2, 4).reshape(b, t, h, value_dim)


def _attend_block(
    q: Array, read: Read, scale: float, i: Array, partial: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    """Adds block i to (maximum, sum of weights, weighted values), f32[B, K, G * T, 1, 1, value_dim]."""
    peak, total, mixed = partial
    keys, values, is_read = read(i)
    is_read = jnp.tile(is_read, (1, q.shape[2] // is_read.shape[1], 1))[:, None]
    scores = jnp.einsum("bkrc,bmkc->bkrm", q, keys, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(is_read, scores, MASKED)
    new_peak = jnp.maximum(peak, scores.max(axis=-1, keepdims=True))
    rescale, weights = jnp.exp(peak - new_peak), jnp.exp(scores - new_peak)
    mix = jnp.einsum("bkrm,bmkc->bkrc", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return new_peak, total * rescale + weights.sum(axis=-1, keepdims=True), mixed * rescale + mix
