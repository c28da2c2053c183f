"""Host rows: shapes, views, and both kinds of memory."""

import jax
import numpy as np
import pytest

from jaxcache.components import FieldSpec, FullAttention
from jaxcache.pools.host_pool import HostPool, pinned_memory, plain_memory
from jaxcache.pools.page_layout import page_layout

KV = FieldSpec("kv", (2, 4, 2), "bfloat16", ("layers", "slots", None))
INDEX = FieldSpec("index", (2, 4), "float32", ("layers", "slots"))


def test_field_rows_are_views_of_the_rows(make_mesh):
    mesh = make_mesh(2, 1, 1)
    layout = page_layout(FullAttention("full", (KV, INDEX)), mesh)
    pool = HostPool(layout, 3, mesh)
    assert pool.num_bytes == 2 * 3 * layout.row_bytes
    for device, rows in pool.rows.items():
        index = pool.field_rows(device, layout.fields[1])
        assert index.shape == (3, 2, 2)
        index[1] = 7.0
        assert rows[1].any()
        assert not rows[[0, 2]].any()


def test_no_pages(make_mesh):
    mesh = make_mesh(1, 1, 1)
    pool = HostPool(page_layout(FullAttention("full", (KV,)), mesh), 0, mesh)
    assert pool.num_bytes == 0


@pytest.mark.parametrize("allocate", [plain_memory, pinned_memory])
def test_memory_is_zeroed_and_writable(allocate):
    owner, memory = allocate(1000, jax.local_devices()[0])
    assert memory.shape == (1000,)
    assert not memory.any()
    memory[:] = np.arange(1000, dtype=np.uint16).astype(np.uint8)
    assert memory[999] == 999 % 256
    del memory, owner


def test_pinned_memory_that_jax_may_not_take_says_what_to_set(monkeypatch):
    """As a GPU raises it: on a CPU all memory is pinned alike, without a limit."""

    def refuse(*args, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Failed to allocate 1000 bytes for host_memory")

    monkeypatch.setattr(jax, "device_put", refuse)
    with pytest.raises(MemoryError, match=r"1000 bytes of pinned host memory .* XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"):
        pinned_memory(1000, jax.local_devices()[0])
