"""A whole cache to a folder and back: the same matches and the same bytes, on the same mesh and on others.

saved(...)  a cache on cp2 x tp2 x pp2 has served, and was saved: pages on the device, in host memory, and on both
here        that snapshot in a cache of another mesh, with other sizes
"""

from __future__ import annotations

import sys

import numpy as np
import pytest

import jaxcache
from jaxcache.core.tree_record import findable_nodes
from jaxcache.types import Tier
from models.decoder import DecoderConfig
from tests.core.consumer import Consumer, in_tree
from tests.models.families import LATENTS, WINDOWED, WITH_STATES
from tests.models.serving import DEVICE_PAGES, PAGE_TOKENS, Driver, check_equal, reference, rig_on
from tests.snapshots import PROMPTS, Saved, check_same, matches_of, pages_of, restored, save, served

MESHES = [(2, 2, 2), (1, 4, 1), (1, 1, 1)]
OTHERS = LATENTS | WINDOWED | WITH_STATES  # models with more than pages of keys and values


@pytest.fixture(scope="module")
def saved(make_mesh, tmp_path_factory) -> Saved:
    driver = served(rig_on(make_mesh(2, 2, 2)))
    with driver.cache:
        return save(driver, tmp_path_factory.mktemp("snapshots") / "of_eight")


@pytest.fixture
def one(make_mesh):
    return rig_on(make_mesh())


# ---- what comes back


def test_a_snapshot_has_pages_on_either_tier_and_on_both(saved):
    """So that the tests below say something."""
    device, host = ({key[1:] for key in saved.pages if key[0] is tier} for tier in (Tier.DEVICE, Tier.HOST))
    assert device & host and host - device
    assert any(match.host_tokens for match in saved.matches) and any(match.device_tokens for match in saved.matches)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_same_matches_and_bytes(make_mesh, saved, shape):
    """S2."""
    driver = restored(rig_on(make_mesh(*shape)), saved.folder)
    with driver.cache as cache:
        check_same(driver, saved)
        counters = cache.stats()["counters"]
        assert not counters.get("restore_dropped_tokens") and not counters.get("restore_dropped_pages")
        assert counters["restored_tokens"] == sum(len(node.edge) // 4 for node in findable_nodes(cache.core.tiers.tree))


@pytest.mark.parametrize("shape", [pytest.param(MESHES[0], marks=pytest.mark.slow), *MESHES[1:]], ids=str)
def test_hit_equals_miss_after_restore(make_mesh, saved, shape):
    """On the device and from host memory; as the mesh it is served on now computes it without a cache."""
    driver = restored(rig_on(make_mesh(*shape)), saved.folder)
    with driver.cache:
        tiers = np.zeros(3, np.int64)
        for prompt, match in reversed(list(zip(PROMPTS, saved.matches, strict=True))):
            got = driver.ask(prompt)
            assert match.num_tokens <= sum(got.hits)
            tiers += got.hits
            check_equal(got, reference(driver.rig.mesh, tuple(prompt.tolist())))
        assert tiers[0] and tiers[1]


def test_from_one_device_to_eight(make_mesh, one, tmp_path):
    driver = served(one)
    with driver.cache:
        saved = save(driver, tmp_path / "of_one")
    driver = restored(rig_on(make_mesh(2, 2, 2)), saved.folder)
    with driver.cache:
        check_same(driver, saved)


def test_a_restored_cache_is_saved_as_the_same(one, saved, tmp_path):
    driver = restored(one, saved.folder)
    with driver.cache:
        again = save(driver, tmp_path / "again")
    assert (again.matches, again.pages, again.order) == (saved.matches, saved.pages, saved.order)


def test_keys_events_and_digests(one, saved):
    """Consumers of events learn what is there; the page keys that storage knows are the same; ranks agree."""
    drivers = [restored(one, saved.folder, events=True) for _ in range(2)]
    consumer = Consumer(drivers[0].cache.core)
    consumer.check()
    assert consumer.held == in_tree(drivers[0].cache.core)
    assert {(*where, key) for where, keys in consumer.held.items() for key in keys} == set(saved.pages)
    assert drivers[0].cache.core.digest == drivers[1].cache.core.digest
    for driver in drivers:
        driver.cache.close()


def test_what_was_restored_to_host_memory_goes_to_storage(one, saved):
    storage = jaxcache.MemoryStorage()
    with one.cache(storage) as cache:
        driver = Driver(one, cache)
        driver.pools = cache.restore(saved.folder)
        driver.drain()
        assert cache.stats()["counters"]["stored_pages"] == sum(tier is Tier.HOST for tier, *_ in saved.pages)


def test_retired_namespaces_stay_unreachable(one, tmp_path):
    with one.cache() as cache:
        driver = Driver(one, cache)
        old = cache.new_namespace(model="tiny", weights_version="old")
        new, driver.namespace = driver.namespace, old
        driver.ask(PROMPTS[0])
        driver.namespace = new
        driver.ask(PROMPTS[1])
        cache.retire_namespace(old)
        saved = save(driver, tmp_path / "retired")
    driver = restored(one, saved.folder)
    with driver.cache as cache:
        check_same(driver, saved)
        with pytest.raises(ValueError, match="was retired"):
            cache.new_namespace(model="tiny", weights_version="old")
    with one.cache() as cache:
        cache.new_namespace(model="tiny", weights_version="old")
        with pytest.raises(ValueError, match="was retired before the snapshot"):
            cache.restore(saved.folder)


@pytest.mark.slow
@pytest.mark.parametrize("model", OTHERS.values(), ids=OTHERS)
def test_hit_equals_miss_of_every_kind_after_restore(make_mesh, tmp_path, model: DecoderConfig):
    driver = served(rig_on(make_mesh(2, 2, 2), model))
    with driver.cache:
        saved = save(driver, tmp_path / "others")
    driver = restored(rig_on(make_mesh(1, 2, 1), model), saved.folder)
    with driver.cache:
        check_same(driver, saved)
        for prompt, match in reversed(list(zip(PROMPTS, saved.matches, strict=True))):
            got = driver.ask(prompt)
            assert sum(got.hits) >= match.num_tokens
            check_equal(got, reference(driver.rig.mesh, tuple(prompt.tolist()), model))


# ---- smaller and larger caches


@pytest.mark.parametrize(
    ("sizes", "has_all"),
    [
        ({"device_pages": 20}, True),  # what leaves the device is in host memory
        ({"device_pages": 20, "host_pages": 20}, False),
        ({"host_pages": 0}, False),
        ({"device_pages": 200, "host_pages": 0}, True),
    ],
    ids=["small-device", "small-tiers", "no-host", "large-device-no-host"],
)
def test_what_fits_is_what_would_have_stayed(one, saved, sizes, has_all):
    """What was used last; without a host tier its pages go to the device, as those used longest ago."""
    driver = restored(one, saved.folder, **sizes)
    with driver.cache as cache:
        found = pages_of(cache, driver.pools)
        contents = {key[1:]: page for key, page in saved.pages.items()}
        assert all(contents[key[1:]] == page for key, page in found.items())
        num_pages = len({key[1:] for key in found})
        stats = cache.stats()
        counters = stats["counters"]
        assert counters["restored_tokens"] == num_pages * PAGE_TOKENS
        num_dropped = counters.get("restore_dropped_pages", 0)
        assert num_pages + num_dropped == len(contents) and (num_dropped == 0) == has_all
        assert counters.get("restore_dropped_tokens", 0) == num_dropped * PAGE_TOKENS
        device_pages = sizes.get("device_pages", DEVICE_PAGES)
        assert stats["pages"]["device"]["full"]["free"] == max(0, device_pages - len(contents))
        got, before = matches_of(driver), saved.matches
        assert got[-1].num_tokens == before[-1].num_tokens and got[-1].device_tokens  # the newest prompt
        assert all(now.num_tokens <= then.num_tokens for now, then in zip(got, before, strict=True))


# ---- what is refused


def test_leases_that_run_are_refused(one, tmp_path):
    with one.cache() as cache:
        driver = Driver(one, cache)
        driver.step()
        lease = driver.admit(driver.sequence(PROMPTS[0]))
        with pytest.raises(RuntimeError, match="every lease released"):
            cache.snapshot(driver.pools, tmp_path / "snapshot")
        cache.release(lease)
        cache.snapshot(driver.pools, tmp_path / "snapshot")
    assert (tmp_path / "snapshot" / "tree").is_dir()


def test_pages_that_are_still_to_be_moved_are_refused(one, tmp_path):
    """A backup that is planned, a load-back on its way, and tokens whose model step has not run."""
    folder = tmp_path / "snapshot"
    with one.cache() as cache:
        driver = Driver(one, cache)
        driver.step()
        lease = driver.admit(driver.sequence(PROMPTS[0]))
        driver.extend(lease, 0, 16, is_decode=False)
        cache.insert(lease, 16)
        cache.release(lease)
        with pytest.raises(RuntimeError, match="drain"):
            cache.snapshot(driver.pools, folder)
        driver.drain()
        driver.fill_device()
        lease = cache.admit(driver.sequence(PROMPTS[0]), 1)
        driver.pools = cache.apply(driver.pools)
        cache.release(lease)
        for _ in range(2):  # on its way; then it has come and is not where it belongs
            with pytest.raises(RuntimeError, match="drain"):
                cache.snapshot(driver.pools, folder)
            driver.pools = cache.step(driver.pools)
        assert not folder.exists()
    with one.cache(write_policy=jaxcache.WritePolicy.NONE) as cache:
        driver = Driver(one, cache)
        driver.step()
        lease = driver.admit(driver.sequence(PROMPTS[0]))
        cache.insert(lease, 16)
        cache.release(lease)
        with pytest.raises(RuntimeError, match="no model step has run"):
            cache.snapshot(driver.pools, folder)
        assert not folder.exists()


def test_a_cache_that_has_pages_is_refused(one, saved):
    with one.cache() as cache:
        driver = Driver(one, cache)
        driver.ask(PROMPTS[0])
        with pytest.raises(RuntimeError, match="this cache has pages"):
            cache.restore(saved.folder)
        assert driver.ask(PROMPTS[0]).hits == (44, 0, 0)
        cache.reset()
        driver.pools = cache.restore(saved.folder)
        assert matches_of(driver) == saved.matches


def test_pools_from_before_are_stale(one, saved):
    with one.cache() as cache:
        driver = Driver(one, cache)
        driver.step()
        before, driver.pools = driver.pools, cache.restore(saved.folder)
        with pytest.raises(ValueError, match="stale pools"):
            cache.step(before)
        driver.step()


def test_a_folder_that_has_anything_is_refused(one, saved, tmp_path):
    (tmp_path / "file").touch()
    with one.cache() as cache:
        pools = cache.init_pools()
        for folder in (tmp_path, saved.folder):
            with pytest.raises(ValueError, match="not empty"):
                cache.snapshot(pools, folder)


def test_every_difference_is_named(one, saved):
    other = rig_on(one.mesh, WINDOWED["gemma3_wide"])
    with one.cache(page_tokens=8) as cache:
        with pytest.raises(ValueError, match="cannot restore") as error:
            cache.restore(saved.folder)
        assert "page_tokens: 8 here, 4 in the snapshot" in str(error.value)
        assert "components.full.fields.kv.shape: [3, 2, 8, 2, 8] here, [3, 2, 4, 2, 8] in" in str(error.value)
    with other.cache() as cache, pytest.raises(ValueError, match="cannot restore") as error:
        cache.restore(saved.folder)
    assert "components.window.window_tokens: 10 here, nothing in the snapshot" in str(error.value)
    assert "page_tokens" not in str(error.value) and "jaxcache 0.1.0" in str(error.value)


def test_without_orbax_the_extra_is_named(one, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with one.cache() as cache, pytest.raises(ImportError, match=r"pip install 'jaxcache\[snapshot\]'"):
        cache.snapshot(cache.init_pools(), tmp_path / "snapshot")
