"""Gather and scatter of pages: bytes, donation, padding, compiles."""

import jax
import numpy as np
import pytest

from jaxcache.components import FieldSpec, FullAttention
from jaxcache.pools.device_pool import PageMover, bucket_pages, init_pools
from jaxcache.pools.page_layout import page_layouts
from jaxcache.pools.spare_staging import SpareStaging
from jaxcache.runtime.compiles import compile_count

NUM_PAGES = 8
KV = FieldSpec("kv", (2, 2, 4, 2, 4), "bfloat16", ("layers", None, "slots", "heads", None))
INDEX = FieldSpec("index", (2, 4, 4), "float32", ("layers", "slots", None))


def setup(mesh, max_bucket=4, page_kernels="auto", keeps_staging=False):
    layouts = page_layouts([FullAttention("full", (KV, INDEX))], mesh)
    mover = PageMover(layouts, mesh, {"full": NUM_PAGES}, max_bucket, page_kernels, keeps_staging)
    return mover, init_pools(layouts, {"full": NUM_PAGES}, mesh)


def contents(pools):
    """Copies: a view would make later donations copy the pool."""
    return {name: np.array(array, copy=True) for name, array in pools["full"].items()}


def buffers(pools):
    return sorted(s.data.unsafe_buffer_pointer() for a in pools["full"].values() for s in a.addressable_shards)


@pytest.mark.parametrize("page_kernels", ["xla", pytest.param("pallas", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (1, 4, 1), (2, 2, 2)])
def test_scatter_then_gather_in_place(make_mesh, rng, shape, page_kernels):
    mover, pools = setup(make_mesh(*shape), page_kernels=page_kernels)
    ids = np.array([5, 0, 7], np.int32)
    staging = {
        f.spec.name: jax.device_put(
            rng.normal(size=(4, *f.padded_shape)).astype(f.dtype), mover.layouts["full"].shardings()[f.spec.name]
        )
        for f in mover.layouts["full"].fields
    }
    old, before = pools["full"], buffers(pools)
    pools = {"full": mover.scatter("full", old, ids, staging)}
    assert buffers(pools) == before
    assert all(array.is_deleted() for array in old.values())
    gathered = mover.gather("full", pools["full"], ids)
    for name, pages in contents(pools).items():
        np.testing.assert_array_equal(pages[ids], np.asarray(staging[name])[:3])
        np.testing.assert_array_equal(np.asarray(gathered[name])[:3], pages[ids])
        assert not pages[[1, 2, 3, 4, 6]].any()


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_staging_that_was_read_is_given_again(make_mesh, shape):
    """Not in the step in which its reader was dispatched: two take turns."""
    mover, pools = setup(make_mesh(*shape), keeps_staging=True)
    mover.warmup_staging()
    pools = mover.warmup(pools)
    num_compiles, seen = compile_count(), []
    for _ in range(5):
        staging = mover.staging("full", 4)
        seen.append(buffers({"full": staging}))
        pools = {"full": mover.scatter("full", pools["full"], np.array([5, 0, 7], np.int32), staging)}
        assert all(array.is_deleted() for array in staging.values())
    first, second, *later = seen
    assert not set(first) & set(second)
    assert later == [first, second, first]
    assert compile_count() == num_compiles


def test_spare_staging_is_bounded():
    spares, staging = SpareStaging(12), [{"kv": np.empty(0)} for _ in range(6)]
    for bucket, arrays in zip((4, 4, 1, 4, 1, 1), staging, strict=True):
        spares.add("full", bucket, arrays)
    assert spares.take("full", 4) is staging[1]  # the oldest had to go: 15 pages are more than 12
    assert spares.take("full", 4) is None  # the newest stays
    assert [spares.take("full", 1), spares.take("full", 1)] == [staging[2], staging[4]]
    assert spares.take("full", 1) is spares.take("window", 1) is None
    spares.add("full", 4, staging[0])
    spares.clear()
    assert spares.take("full", 4) is None


def test_padding_never_touches_the_last_page(make_mesh):
    mover, pools = setup(make_mesh(2, 2, 2))
    ones = {name: jax.numpy.ones_like(array)[:4] for name, array in pools["full"].items()}
    pools = {"full": mover.scatter("full", pools["full"], np.array([0, 1, 2], np.int32), ones)}
    for pages in contents(pools).values():
        assert pages[:3].all()
        assert not pages[3:].any()


def test_negative_ids_are_refused(make_mesh):
    mover, pools = setup(make_mesh(1, 1, 1))
    with pytest.raises(AssertionError, match="negative"):
        mover.gather("full", pools["full"], np.array([-1], np.int32))


def test_kernels_that_cannot_be_are_refused(make_mesh, platform):
    with pytest.raises(ValueError, match="page_kernels must be one of"):
        setup(make_mesh(1, 1, 1), page_kernels="triton")
    if platform == "cpu":
        with pytest.raises(ValueError, match="needs GPUs, but the devices are cpu"):
            setup(make_mesh(1, 1, 1), page_kernels="pallas")
    else:
        layouts = page_layouts([FullAttention("full", (FieldSpec("odd", (3,), "int32", (None,)),))], make_mesh())
        with pytest.raises(ValueError, match="multiple of 16 bytes"):
            PageMover(layouts, layouts["full"].mesh, {"full": 8}, 4, "pallas")


def test_warmup_leaves_pools_and_nothing_compiles_afterwards(make_mesh):
    mover, pools = setup(make_mesh(1, 2, 2))
    before = buffers(pools)
    pools = mover.warmup(pools)
    assert buffers(pools) == before
    assert not any(pages.any() for pages in contents(pools).values())
    num_compiles = compile_count()
    for num_ids in range(1, 5):
        ids = np.arange(num_ids, dtype=np.int32)
        staging = mover.gather("full", pools["full"], ids)
        pools = {"full": mover.scatter("full", pools["full"], ids, staging)}
    jax.block_until_ready(pools)
    assert compile_count() == num_compiles


def test_compiles_are_counted():
    num_compiles = compile_count()
    jax.jit(lambda x: x * 3 + 17)(np.float32(1)).block_until_ready()
    assert compile_count() == num_compiles + 1


def test_scatter_needs_no_temporary_pool(make_mesh):
    """Of float32: the CPU compiler widens fp8, and bfloat16 up to jax 0.10, in a copy of the whole pool."""
    layouts = page_layouts([FullAttention("full", (INDEX,))], make_mesh(1, 1, 1))
    pools = init_pools(layouts, {"full": 64}, layouts["full"].mesh)["full"]
    mover = PageMover(layouts, layouts["full"].mesh, {"full": 64}, 4)
    staging, ids = mover.gather("full", pools, np.zeros(4, np.int32)), np.zeros(4, np.int32)
    program = mover._scatters["full"].lower(pools, ids, staging).compile()
    assert program.memory_analysis().temp_size_in_bytes < pools["index"].nbytes / 4


def test_buckets():
    assert [bucket_pages(n) for n in (1, 2, 3, 4, 5)] == [1, 2, 4, 4, 8]
    mover_buckets = PageMover({}, None, {}, 100).buckets()
    assert mover_buckets == [1, 2, 4, 8, 16, 32, 64]
