"""Copies of CPU devices in one go, where that can be."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxcache.components import FieldSpec, FullAttention
from jaxcache.engine.inline_copies import back_up_now, load_back_now
from jaxcache.pools.device_pool import PageMover, init_pools
from jaxcache.pools.host_pool import HostPool
from jaxcache.pools.page_layout import page_layouts

NUM_PAGES = 16
SRC, DST = np.array([3, 14, 0], np.int32), np.array([7, 1, 9], np.int32)
FIELDS = (
    FieldSpec("kv", (2, 2, 8, 2, 64), "bfloat16", ("layers", None, "slots", "heads", None)),
    FieldSpec("scale", (2, 8), "int8", ("layers", "slots")),
    FieldSpec("large", (2, 2, 8, 2, 512), "float32", ("layers", None, "slots", "heads", None)),
)


@pytest.fixture(params=[(1, 1, 1), (2, 2, 2)], ids=str)
def parts(make_mesh, request, platform):
    """(pools of random bits, host pool)"""
    if platform != "cpu":
        pytest.skip("pages of other devices are not memory of this process")
    mesh = make_mesh(*request.param)
    layouts = page_layouts([FullAttention("full", FIELDS)], mesh)
    pools = init_pools(layouts, {"full": NUM_PAGES}, mesh)["full"]
    rng = np.random.default_rng(0)

    def bits(array):
        values = rng.integers(0, 256, (*array.shape[:-1], array.shape[-1] * array.dtype.itemsize), np.uint8)
        return jax.device_put(values.view(array.dtype), array.sharding).copy()  # numpy's memory cannot be donated

    return jax.block_until_ready({name: bits(array) for name, array in pools.items()}), HostPool(
        layouts["full"], 12, mesh
    )


def rows(pool: HostPool, name: str, device) -> np.ndarray:
    field = next(field for field in pool.layout.fields if field.spec.name == name)
    return pool.rows[device][:, field.byte_range]


def addresses(array) -> list[int]:
    return [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]


def test_the_rows_are_the_pages(parts):
    pools, pool = parts
    assert back_up_now(pools, pool, SRC, DST)
    for name, array in pools.items():
        for shard in array.addressable_shards:
            pages = np.asarray(shard.data)[SRC].reshape(len(SRC), -1).view(np.uint8)
            assert np.array_equal(rows(pool, name, shard.device)[DST], pages), name
            others = np.setdiff1d(np.arange(pool.num_pages), DST)
            assert not rows(pool, name, shard.device)[others].any()


def loaded(pools, pool, src=DST, dst=SRC):
    mover = PageMover({"full": pool.layout}, pool.layout.mesh, {"full": NUM_PAGES}, 4)
    return load_back_now(mover, "full", pools, pool, src, dst)


def test_the_pages_are_the_rows(parts):
    pools, pool = parts
    rng = np.random.default_rng(1)
    for memory in pool.rows.values():
        memory[...] = rng.integers(0, 256, memory.shape, np.uint8)
    before = {name: np.array(array, copy=True) for name, array in pools.items()}
    buffers = {name: addresses(array) for name, array in pools.items()}
    new = loaded(pools, pool)
    others = np.setdiff1d(np.arange(NUM_PAGES), SRC)
    for name, array in new.items():
        assert pools[name].is_deleted()
        assert addresses(array) == buffers[name]
        for shard in array.addressable_shards:
            pages = np.asarray(shard.data).reshape(NUM_PAGES, -1).view(np.uint8)
            assert np.array_equal(pages[SRC], rows(pool, name, shard.device)[DST]), name
        assert np.asarray(array)[others].tobytes() == before[name][others].tobytes()


def test_who_still_reads_the_pools_reads_what_was_there(parts):
    """A program that was dispatched before, and runs long: the donation waits for it."""
    pools, pool = parts
    for memory in pool.rows.values():
        memory[...] = 0
    before = np.array(pools["large"], copy=True).view(np.int32)

    @jax.jit
    def slow(x):
        bits = jax.lax.bitcast_convert_type(x, np.int32)
        return jax.lax.fori_loop(0, 1000, lambda i, y: jax.numpy.where(y == i, y, bits), bits)  # reads it every time

    slow(pools["large"]).block_until_ready()
    reading = slow(pools["large"])
    assert not reading.is_ready(), "too fast to prove anything"
    loaded(pools, pool)
    assert np.array_equal(np.asarray(reading), before)


def test_the_pools_are_still_updated_in_place(parts):
    pools, pool = parts
    assert back_up_now(pools, pool, SRC, DST)
    add = jax.jit(lambda x: x + x, donate_argnums=0)
    before = addresses(pools["large"])
    old = pools["large"]
    new = add(old)
    assert old.is_deleted()
    assert addresses(new) == before


def test_pools_that_are_not_computed_are_left_to_the_gather(parts, monkeypatch):
    pools, pool = parts
    monkeypatch.setattr(type(pools["kv"]), "is_ready", lambda self: False)
    assert not back_up_now(pools, pool, SRC, DST)
    assert not any(memory.any() for memory in pool.rows.values())
    assert loaded(pools, pool) is None
    assert not any(array.is_deleted() for array in pools.values())
