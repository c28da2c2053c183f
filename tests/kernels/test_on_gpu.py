"""What only a GPU can say of the page kernels: the compiled program against the reference, in place, at real sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import copy_pages, gather_pages, layer_pages, scatter_pages

pytestmark = pytest.mark.gpu

NUM_PAGES = 64
DTYPES = ["float32", "bfloat16", "uint8", "float8_e4m3fn"]
PAGES = [(32,), (8, 2, 16, 8, 64), (3, 5, 128), (1 << 20,)]  # elements; from 32 bytes to 4 MiB


@pytest.fixture
def random(rng):
    def make(*shape: int, dtype: str) -> jax.Array:
        return jnp.asarray(rng.integers(0, 120, shape), dtype)

    return make


@pytest.fixture
def ids(rng) -> jax.Array:
    """16 places, of which three are padding."""
    chosen = rng.permutation(NUM_PAGES)[:16].astype(np.int32)
    chosen[[2, 14, 15]] = NUM_PAGES
    return jnp.asarray(chosen)


def same(got: jax.Array, wanted: jax.Array, rows: np.ndarray | slice = slice(None)) -> bool:
    return np.asarray(got)[rows].tobytes() == np.asarray(wanted)[rows].tobytes()


@pytest.mark.parametrize("page", PAGES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pages(random, ids, rng, dtype, page):
    pool, pages = random(NUM_PAGES, *page, dtype=dtype), random(len(ids), *page, dtype=dtype)
    real = np.asarray(ids) < NUM_PAGES
    gathered = jax.jit(gather_pages.gather_pages)(pool, ids)
    assert same(gathered, gather_pages.gather_pages_reference(pool, ids), real)

    scatter = jax.jit(scatter_pages.scatter_pages, donate_argnums=0)
    wanted = scatter_pages.scatter_pages_reference(pool, ids, pages)
    before = pool.unsafe_buffer_pointer()
    old, pool = pool, scatter(pool, ids, pages)
    assert pool.unsafe_buffer_pointer() == before and old.is_deleted()
    assert same(pool, wanted)

    others = np.setdiff1d(np.arange(NUM_PAGES), np.asarray(ids))
    sources = jnp.asarray(rng.choice(others, len(ids)), jnp.int32)
    wanted = copy_pages.copy_pages_reference(pool, sources, ids)
    pool = jax.jit(copy_pages.copy_pages, donate_argnums=0)(pool, sources, ids)
    assert pool.unsafe_buffer_pointer() == before
    assert same(pool, wanted)


@pytest.mark.parametrize("num_layers", [1, 20])
def test_layers(random, ids, num_layers):
    layers = [random(NUM_PAGES, 16, 8, 64, dtype="bfloat16") for _ in range(num_layers)]
    real = np.asarray(ids) < NUM_PAGES
    gathered = jax.jit(layer_pages.gather_layers)(layers, ids)
    assert same(gathered, layer_pages.gather_layers_reference(layers, ids), real)

    pages = random(len(ids), num_layers, 16, 8, 64, dtype="bfloat16")
    wanted = layer_pages.scatter_layers_reference(layers, ids, pages)
    before = [layer.unsafe_buffer_pointer() for layer in layers]
    layers = jax.jit(layer_pages.scatter_layers, donate_argnums=0)(layers, ids, pages)
    assert [layer.unsafe_buffer_pointer() for layer in layers] == before
    assert all(same(layer, right) for layer, right in zip(layers, wanted, strict=True))
