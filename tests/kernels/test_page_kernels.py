"""The page kernels against their references, in Pallas's interpreter with its detector of races, and lowered for GPUs.

What only a GPU can say (in place, speed, the compiled program) is in `test_on_gpu.py` and in the benchmarks.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import copy_pages, gather_pages, layer_pages, scatter_pages
from kernels_pallas.page_view import PageView, page_view
from kernels_pallas.ring import Ring

NUM_PAGES = 10
IDS = [3, 7, NUM_PAGES, 1, NUM_PAGES, NUM_PAGES, 9, 0]  # padding in between: the last items count
DTYPES = ["float32", "bfloat16", "float16", "uint8", "int8", "float8_e4m3fn", "int32"]
SMALL = Ring(blocks=3, slots=3, box_bytes=2048, layers=2)
INTERPRETED = plgpu.InterpretGPUParams(detect_races=True)
OPERATIONS = {
    "gather_pages": gather_pages.gather_pages,
    "scatter_pages": scatter_pages.scatter_pages,
    "copy_pages": copy_pages.copy_pages,
    "gather_layers": layer_pages.gather_layers,
    "scatter_layers": layer_pages.scatter_layers,
}
REFERENCES = {
    "gather_pages": gather_pages.gather_pages_reference,
    "scatter_pages": scatter_pages.scatter_pages_reference,
    "copy_pages": copy_pages.copy_pages_reference,
    "gather_layers": layer_pages.gather_layers_reference,
    "scatter_layers": layer_pages.scatter_layers_reference,
}


def random(rng: np.random.Generator, *shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(rng.integers(0, 120, shape), dtype)


def arguments(operation: str, rng: np.random.Generator, page: tuple[int, ...] = (3, 4, 128), dtype: str = "float32"):
    """(arguments of an operation, which rows of its answer count)."""
    ids = jnp.asarray(IDS, jnp.int32)
    keep = [row for row, id in enumerate(IDS) if id < NUM_PAGES] if operation.startswith("gather") else slice(None)
    pool = random(rng, NUM_PAGES, *page, dtype=dtype)
    layers = [random(rng, NUM_PAGES, *page, dtype=dtype) for _ in range(5)]
    return {
        "gather_pages": (pool, ids),
        "scatter_pages": (pool, ids, random(rng, len(IDS), *page, dtype=dtype)),
        "copy_pages": (pool, jnp.asarray([2, 4, 5, 2, 6, 8, 5, 5], jnp.int32), ids),
        "gather_layers": (layers, ids),
        "scatter_layers": (layers, ids, random(rng, len(IDS), 5, *page, dtype=dtype)),
    }[operation], keep


def answers(function: Callable[..., Any], arguments: tuple, keep: Any, **options: Any) -> list[bytes]:
    outcome = jax.tree.leaves(jax.jit(partial(function, **options))(*arguments))
    return [np.asarray(array)[keep].tobytes() for array in outcome]


def agree(operation: str, rng: np.random.Generator, ring: Ring = SMALL, **of_arguments: Any) -> bool:
    given, keep = arguments(operation, rng, **of_arguments)
    wanted = answers(REFERENCES[operation], given, keep)
    return answers(OPERATIONS[operation], given, keep, ring=ring, interpret=INTERPRETED) == wanted


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_as_the_reference(rng, operation, dtype):
    assert agree(operation, rng, dtype=dtype)


@pytest.mark.parametrize("ring", [Ring(1, 2, 1024), Ring(2, 4, 4096), Ring(64, 3, 1 << 20, layers=5)], ids=str)
@pytest.mark.parametrize("page", [(4,), (7, 16), (3, 5, 128), (300, 8)], ids=str)
@pytest.mark.parametrize("operation", ["gather_pages", "scatter_pages", "gather_layers"])
def test_any_page_and_any_ring(rng, operation, page, ring):
    assert agree(operation, rng, ring, page=page)


def test_a_single_page(rng):
    pool = random(rng, 1, 4, 128)
    kernel = jax.jit(partial(gather_pages.gather_pages, ring=SMALL, interpret=INTERPRETED))
    np.testing.assert_array_equal(kernel(pool, jnp.zeros(1, jnp.int32)), pool)


def test_nothing_but_padding(rng):
    pool = random(rng, NUM_PAGES, 4, 128)
    kernel = jax.jit(partial(scatter_pages.scatter_pages, ring=SMALL, interpret=INTERPRETED))
    ids = jnp.full(4, NUM_PAGES, jnp.int32)
    np.testing.assert_array_equal(kernel(pool, ids, jnp.zeros_like(pool)[:4]), pool)


# ---- the views and the boundary


@pytest.mark.parametrize(
    ("page", "dtype", "view"),
    [
        ((32, 2, 64, 8, 128), "bfloat16", PageView(boxes=256, rows=64, lanes=256)),
        ((1,), "int32", None),
        ((4,), "int32", PageView(1, 1, 4)),
        ((17, 4), "float32", PageView(1, 1, 68)),
        ((257, 16), "uint8", PageView(257, 1, 16)),
        ((8, 16), "bool", None),
        ((5,), "bfloat16", None),
    ],
)
def test_view(page, dtype, view):
    if view is None:
        with pytest.raises(ValueError, match="multiple of 16 bytes"):
            page_view(page, jnp.dtype(dtype), 32 * 1024)
    else:
        assert page_view(page, jnp.dtype(dtype), 32 * 1024) == view


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pool, ids: gather_pages.gather_pages(pool[0, 0], ids), r"a pool is \[num_pages"),
        (lambda pool, ids: gather_pages.gather_pages(pool, ids.astype(jnp.int16)), "must be int32"),
        (lambda pool, ids: gather_pages.gather_pages(pool, ids[:0]), "n > 0"),
        (lambda pool, ids: scatter_pages.scatter_pages(pool, ids, pool), r"pages must be float32\[8, 4, 128\]"),
        (lambda pool, ids: copy_pages.copy_pages(pool, ids, ids[:2]), "8 pages cannot be copied to 2 places"),
        (lambda pool, ids: layer_pages.gather_layers([], ids), "at least one"),
        (lambda pool, ids: layer_pages.gather_layers([pool, pool[:2]], ids), "layer 1 is"),
        (lambda pool, ids: layer_pages.scatter_layers([pool], ids, pool), r"pages must be float32\[8, 1, 4, 128\]"),
    ],
)
def test_what_is_no_pool_is_refused(rng, call, message):
    with pytest.raises(ValueError, match=message):
        call(random(rng, NUM_PAGES, 4, 128), jnp.asarray(IDS, jnp.int32))


# ---- lowered for CUDA: shared memory, boxes and strides are checked there

REAL_PAGE = (32, 2, 64, 8, 128)  # layers, keys and values, slots, heads, dim: 8 MiB in bfloat16


@pytest.mark.parametrize("bucket", [1 << k for k in range(9)])
@pytest.mark.parametrize("operation", ["gather_pages", "scatter_pages", "copy_pages"])
def test_lowered_for_cuda(operation, bucket):
    pool = jax.ShapeDtypeStruct((1024, *REAL_PAGE), jnp.bfloat16)
    ids, pages = jax.ShapeDtypeStruct((bucket,), jnp.int32), jax.ShapeDtypeStruct((bucket, *REAL_PAGE), jnp.bfloat16)
    given = {"gather_pages": (pool, ids), "scatter_pages": (pool, ids, pages), "copy_pages": (pool, ids, ids)}
    lower(OPERATIONS[operation], *given[operation])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", ["gather_layers", "scatter_layers"])
def test_layers_lowered_for_cuda(operation, dtype):
    layers = [jax.ShapeDtypeStruct((1024, 64, 8, 128), jnp.dtype(dtype))] * 20
    ids, pages = jax.ShapeDtypeStruct((64,), jnp.int32), jax.ShapeDtypeStruct((64, 20, 64, 8, 128), jnp.dtype(dtype))
    lower(OPERATIONS[operation], layers, ids, *([pages] if operation == "scatter_layers" else []))


def test_what_does_not_fit_shared_memory_is_found_when_lowering():
    pool, ids = jax.ShapeDtypeStruct((64, *REAL_PAGE), jnp.bfloat16), jax.ShapeDtypeStruct((8,), jnp.int32)
    with pytest.raises(ValueError, match=r"(?i)shared memory|smem"):
        lower(partial(gather_pages.gather_pages, ring=Ring(slots=8)), pool, ids)


def lower(function: Callable[..., Any], *shapes: Any) -> None:
    text = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


# ---- proven by breaking them

MUTATIONS = [
    ("a load is not waited for", Ring, "copy", "plgpu.barrier_wait(barriers.at[oldest])", "pass"),
    ("a slot is filled while it is read", Ring, "copy", "plgpu.wait_smem_to_gmem(0, wait_read_only=True)", "pass"),
    ("the wrong page", PageView, "box", "page_id * self.boxes", "(page_id + 1) * self.boxes"),
    ("the wrong box of a page", PageView, "box", "lax.rem(item, self.boxes)", "0"),
    ("the last items are left out", Ring, "copy", "turns + lead", "turns + lead - 1"),
]


@pytest.mark.parametrize(("owner", "method", "old", "new"), [m[1:] for m in MUTATIONS], ids=[m[0] for m in MUTATIONS])
def test_a_broken_kernel_is_found(monkeypatch, rng, owner, method, old, new):
    monkeypatch.setattr(owner, method, mutant(owner, method, old, new))
    with pytest.raises((AssertionError, RuntimeError)):  # the detector of races raises the second
        assert agree("gather_pages", rng)


@pytest.mark.parametrize("operation", ["scatter_pages", "copy_pages", "scatter_layers"])
def test_a_padding_row_that_is_written_is_found(monkeypatch, rng, operation):
    """With ids of `num_pages` taken as those of page 2, which nothing else writes."""
    monkeypatch.setattr(
        PageView, "box", mutant(PageView, "box", "page_id * ", f"jnp.where(page_id == {NUM_PAGES}, 2, page_id) * ")
    )
    monkeypatch.setattr(Ring, "copy", mutant(Ring, "copy", "& boxes.is_wanted(inside)", ""))
    with pytest.raises((AssertionError, RuntimeError)):  # the detector of races raises the second
        assert agree(operation, rng)


def mutant(owner: type, method: str, old: str, new: str) -> Callable[..., Any]:
    source = textwrap.dedent(inspect.getsource(owner.__dict__[method]))
    assert source.count(old) == 1, f"{owner.__name__}.{method} has no longer exactly one {old!r}"
    scope = dict(vars(sys.modules[owner.__module__]))
    exec(compile("from __future__ import annotations\n" + source.replace(old, new), "<mutant>", "exec"), scope)
    return scope[method]
