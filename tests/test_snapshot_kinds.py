"""Snapshots of every kind of component and dtype, on real pools with random bits in them, between meshes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

import jaxcache
from jaxcache.components import Component, FieldSpec, FullAttention, RecurrentState, SlidingWindow
from jaxcache.core import invariants
from jaxcache.types import Tier
from tests.snapshots import order_of, pages_of

PAGE = 4
COMPONENTS = (
    FullAttention(
        "full",
        (
            FieldSpec("kv", (3, 2, PAGE, 2, 8), "bfloat16", ("layers", None, "slots", "heads", None)),
            FieldSpec("scale", (3, PAGE), "float8_e4m3fn", ("layers", "slots")),
        ),
    ),
    SlidingWindow(
        "window",
        tuple(FieldSpec(f"layer{i}", (PAGE, 2, 16), "int8", ("slots", "heads", None)) for i in range(3)),
        window_tokens=10,
    ),
    RecurrentState(
        "state",
        (
            FieldSpec("ssm", (5, 2, 8), "float32", ("layers", "heads", None)),
            FieldSpec("conv", (5, 3), "uint16", ("layers", None)),
        ),
        chunk_tokens=8,
    ),
)
SIZES = {"full": 40, "window": 32, "state": 24}
HOST_SIZES = {"full": 120, "window": 120, "state": 60}


class Loop:
    """Serves prompts without a model: each of its pages gets random bits, and a state is made at every checkpoint."""

    components: tuple[Component, ...] = COMPONENTS

    def __init__(self, mesh: Mesh, folder: Path | None = None, storage: jaxcache.Storage | None = None, **changes: Any):
        config = {"page_tokens": PAGE, "device_pages": SIZES, "host_pages": HOST_SIZES, "max_transfer_pages": 8}
        self.cache = jaxcache.Cache(self.components, mesh, jaxcache.CacheConfig(**{**config, **changes}), storage)
        self.pools = self.cache.init_pools() if folder is None else self.cache.restore(folder)
        self.namespace = self.cache.new_namespace(model="none", tenant_salt="secret")
        self.rng = np.random.default_rng(7)

    def ask(self, tokens: list[int]) -> int:
        """Returns how many tokens were cached."""
        cache = self.cache
        self.pools = cache.apply(cache.step(self.pools))
        sequence = cache.sequence(tokens, self.namespace)
        lease = cache.admit(sequence, len(tokens) - cache.match(sequence).num_tokens)
        assert isinstance(lease, jaxcache.Lease), lease
        self.pools = cache.apply(self.pools)
        while lease.first_step > cache.step_number:
            self.pools = cache.apply(cache.step(self.pools))
        first = lease.num_cached_tokens // PAGE
        written = {name: table[first:] for name, table in lease.page_tables.items()}
        written["state"] = np.array([lease.write_slot, *lease.checkpoints.values()])
        self.pools = {name: self._written(name, page_ids) for name, page_ids in written.items()}
        cache.insert(lease, len(tokens), states=list(lease.checkpoints))
        cache.release(lease)
        self.pools = cache.apply(self.pools)
        return lease.num_cached_tokens

    def _written(self, component: str, page_ids: np.ndarray) -> dict[str, jax.Array]:
        written = {}
        for field in self.cache.layouts[component].fields:
            pool = self.pools[component][field.spec.name]
            pages = np.array(pool)
            for page_id in page_ids[page_ids < len(pages)]:
                pages[page_id] = self._page(field)
            written[field.spec.name] = jax.device_put(pages, pool.sharding)
        return written

    def _page(self, field) -> np.ndarray:
        """Random bits; heads are repeated, and padded layers hold anything."""
        num_bytes = int(np.prod(field.spec.shape)) * field.dtype.itemsize
        page = self.rng.integers(0, 256, num_bytes, np.uint8).view(field.dtype).reshape(field.spec.shape)
        for dim, (num, padded) in enumerate(zip(field.spec.shape, field.padded_shape, strict=True)):
            if field.spec.axes[dim] == "heads":
                page = np.repeat(page, padded // num, axis=dim)
            else:
                page = np.concatenate([page, page.take(range(padded - num), axis=dim)], axis=dim)
        return page

    def matches(self) -> list[jaxcache.Match]:
        return [self.cache.match(self.cache.sequence(prompt, self.namespace)) for prompt in PROMPTS]

    def save(self, folder: Path) -> None:
        self.pools = self.cache.drain(self.pools)
        self.cache.snapshot(self.pools, folder)


def prompts() -> list[list[int]]:
    """Some begin alike; too many for the device."""
    rng = random.Random(3)
    made: list[list[int]] = []
    for i in range(9):
        start = made[rng.randrange(i)][: rng.randrange(8, 30)] if i % 3 else []
        made.append([*start, *(rng.randrange(1000) for _ in range(30))])
    return made


PROMPTS = prompts()


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
WAYS = [((2, 1, 2), (1, 4, 1), AUTO), ((2, 2, 2), (2, 2, 2), EXPLICIT), ((1, 1, 1), (1, 1, 2), AUTO)]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "to_shape", "axis_type"), WAYS, ids=str)
def test_every_kind_of_page_on_another_mesh(make_mesh, tmp_path, shape, to_shape, axis_type):
    loop = Loop(make_mesh(*shape))
    with loop.cache as cache:
        for prompt in PROMPTS:
            loop.ask(prompt)
        loop.save(tmp_path / "snapshot")
        pages, matches, order = pages_of(cache, loop.pools), loop.matches(), order_of(cache)
    assert {(tier, name) for tier, name, _ in pages} == {(t, c.name) for t in Tier if t < 2 for c in COMPONENTS}
    assert any(match.host_tokens for match in matches)
    again = Loop(make_mesh(*to_shape, axis_type=axis_type), tmp_path / "snapshot")
    with again.cache as cache:
        invariants.check(cache.core)
        assert pages_of(cache, again.pools) == pages
        assert again.matches() == matches and order_of(cache) == order
        assert again.ask(PROMPTS[-1]) == matches[-1].num_tokens > 0


def test_small_parts_and_a_cache_that_goes_on(make_mesh, tmp_path, monkeypatch):
    """Many checkpoints for one snapshot; the restored cache serves more, and is saved in its turn."""
    monkeypatch.setattr("jaxcache.runtime.snapshot.PART_BYTES", 5000)
    loop = Loop(make_mesh())
    with loop.cache as cache:
        for prompt in PROMPTS[:5]:
            loop.ask(prompt)
        loop.save(tmp_path / "first")
        pages = pages_of(cache, loop.pools)
    assert len(list((tmp_path / "first").glob("part-*"))) > 3
    again = Loop(make_mesh(), tmp_path / "first", eviction_policy="lfu", host_pages=0, device_pages=150)
    with again.cache as cache:
        assert {key[1:]: page for key, page in pages.items()} == {
            key[1:]: page for key, page in pages_of(cache, again.pools).items()
        }
        for prompt in PROMPTS[5:]:
            again.ask(prompt)
        again.save(tmp_path / "second")
        pages = pages_of(cache, again.pools)
    last = Loop(make_mesh(), tmp_path / "second", host_pages=0, device_pages=150)
    with last.cache as cache:
        assert pages_of(cache, last.pools) == pages


def test_secrets_stand_in_no_metadata(make_mesh, tmp_path, capfd):
    """Metadata are for everybody to look at, and Orbax logs them if they are damaged."""
    loop = Loop(make_mesh())
    with loop.cache:
        loop.ask(PROMPTS[0])
        loop.save(tmp_path / "snapshot")
    assert (tmp_path / "snapshot").stat().st_mode & 0o777 == 0o700
    metadata = tmp_path / "snapshot" / "tree" / "_CHECKPOINT_METADATA"
    assert b'"model": "none"' in metadata.read_bytes() and b"secret" not in metadata.read_bytes()
    again = Loop(make_mesh(), tmp_path / "snapshot")
    with again.cache as cache:
        assert again.matches()[0].num_tokens > 0
        assert "secret" not in repr(cache.core.tiers.tree.namespaces)
