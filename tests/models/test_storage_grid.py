"""L10: what one mesh has stored, another finds, where both cut pages by the same storage grid. Equal bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import jaxcache
from jaxcache.pools.storage_cells import storage_cells
from tests.models.serving import MODEL, PAGE_TOKENS, Answer, Driver, check_equal, random_tokens, reference, rig_on

PROMPT = random_tokens(1, 45)
NUM_STORED = len(PROMPT) // PAGE_TOKENS * PAGE_TOKENS
CHANGES = [
    ((2, 2, 1), (1, 4, 1), (2, 4, 1)),
    ((1, 1, 2), (1, 1, 1), (1, 1, 2)),
    ((1, 1, 1), (2, 2, 2), (2, 2, 2)),
    pytest.param((1, 4, 1), (2, 2, 1), (2, 4, 1), marks=pytest.mark.slow),
    pytest.param((1, 1, 1), (1, 1, 2), (1, 1, 2), marks=pytest.mark.slow),
    pytest.param((2, 2, 2), (1, 2, 1), (2, 2, 2), marks=pytest.mark.slow),
]


def write(mesh, storage, grid) -> np.ndarray:
    """Serves the prompt once and stores it. Returns what its pages hold: [pages, layers, 2, slots, heads, dim]."""
    with rig_on(mesh).cache(storage, storage_grid=grid) as cache:
        driver = Driver(rig_on(mesh), cache)
        driver.ask(PROMPT)
        driver.drain()
        return pages_of(driver)


def read(mesh, storage, grid) -> tuple[Answer, np.ndarray]:
    with rig_on(mesh).cache(storage, storage_grid=grid) as cache:
        driver = Driver(rig_on(mesh), cache)
        return driver.ask_storage(PROMPT), pages_of(driver)


def pages_of(driver: Driver) -> np.ndarray:
    """The stored pages on the device, without padding and repeated heads."""
    sequence = driver.sequence(PROMPT)
    path = driver.cache.core.tiers.tree.walk(sequence, sequence.num_tokens - 1)
    ids = np.concatenate([node.pages[0] for node, _ in path])
    kv = np.array(driver.pools["full"]["kv"])[ids, : MODEL.num_layers]
    return kv[..., :: kv.shape[4] // MODEL.num_kv_heads, :]


@pytest.mark.parametrize(("first", "second", "grid"), CHANGES, ids=str)
def test_l10_another_mesh_with_the_same_grid_finds_what_was_stored(make_mesh, first, second, grid):
    storage = jaxcache.MemoryStorage()
    stored = write(make_mesh(*first), storage, grid)
    got, found = read(make_mesh(*second), storage, grid)
    assert got.hits == (0, 0, NUM_STORED)
    assert np.array_equal(found, stored)
    check_equal(got, reference(make_mesh(*second), tuple(PROMPT.tolist())))


def test_another_grid_is_a_miss(make_mesh):
    storage = jaxcache.MemoryStorage()
    write(make_mesh(), storage, (1, 1, 2))
    got, _ = read(make_mesh(), storage, None)
    assert got.hits == (0, 0, 0)


@pytest.mark.mutation
def test_one_wrong_cell_shows(make_mesh, monkeypatch):
    """Two heads that change places when they are put back."""
    storage = jaxcache.MemoryStorage()
    write(make_mesh(1, 2, 1), storage, (1, 2, 1))
    mesh = make_mesh()
    with rig_on(mesh).cache(storage, storage_grid=(1, 2, 1)) as cache:
        part = cache.engine.storage_io._parts["full"]
        (share,) = part.shares
        names = [cell.name for cell in share.cells]
        swapped = tuple(replace(cell, name=name) for cell, name in zip(share.cells, names[::-1], strict=True))
        swapped_part = replace(part, shares=(replace(share, cells=swapped),))
        monkeypatch.setitem(cache.engine.storage_io._parts, "full", swapped_part)
        got = Driver(rig_on(mesh), cache).ask_storage(PROMPT)
    assert got.hits == (0, 0, NUM_STORED)
    with pytest.raises(AssertionError):
        check_equal(got, reference(mesh, tuple(PROMPT.tolist())))


def test_a_grid_that_does_not_fit_is_refused(make_mesh):
    with pytest.raises(ValueError, match="storage grid's tp=1 must be a multiple of the mesh's tp=2"):
        rig_on(make_mesh(1, 2, 1)).cache(storage_grid=(1, 1, 1))
    with pytest.raises(ValueError, match="'kv': 4 slots do not divide over the storage grid's cp=3"):
        rig_on(make_mesh()).cache(storage_grid=(3, 1, 1))


def test_where_the_grid_is_the_mesh_nothing_is_copied(make_mesh):
    layout = rig_on(make_mesh(2, 2, 1)).cache().layouts["full"]
    for rank in np.ndindex(2, 2, 1):
        assert [cell.start for cell in storage_cells(layout, rank)] == [0]
