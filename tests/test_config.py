"""CacheConfig is a value: it can be hashed, compared, copied, and nobody changes it afterwards."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest

from jaxcache.config import CacheConfig, TenantShare
from tests.core.helpers import FULL, make_core, window

SHARES = {"b": TenantShare(quota=0.5), "a": TenantShare(floor=0.2)}
PAGES = {"full": 32, "window": 16}


def config(**fields) -> CacheConfig:
    return CacheConfig(**{"page_tokens": 4, "device_pages": PAGES, "host_pages": PAGES, "tenants": SHARES, **fields})


def test_equal_configs_have_equal_hashes():
    reordered = config(tenants=dict(reversed(SHARES.items())), device_pages=dict(reversed(PAGES.items())))
    assert config() == reordered
    assert hash(config()) == hash(reordered)
    assert len({config(), reordered, config(host_pages=8), config(tenants={})}) == 3
    assert hash(CacheConfig(4, 8)) == hash(CacheConfig(4, 8, tenants={}))


@pytest.mark.parametrize("name", ["tenants", "device_pages", "host_pages"])
def test_the_callers_dict_may_change_afterwards(name):
    given = dict(SHARES) if name == "tenants" else dict(PAGES)
    made = config(**{name: given})
    before = hash(made)
    given.clear()
    assert made == config()
    assert hash(made) == before


@pytest.mark.parametrize("name", ["tenants", "device_pages", "host_pages"])
def test_mappings_read_like_the_dict_that_was_given_and_cannot_be_written(name):
    given = {"tenants": SHARES, "device_pages": PAGES, "host_pages": PAGES}[name]
    held = getattr(config(), name)
    assert held == given
    assert given == held
    assert {key: held[key] for key in held} == given
    assert repr(held) == repr(given)
    assert held.get("nobody") is None
    with pytest.raises(TypeError):
        held["a"] = 1


@pytest.mark.parametrize("again", [replace, copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_are_equal(again):
    made = again(config())
    assert made == config()
    assert hash(made) == hash(config())


def test_replace_checks_and_converts():
    assert replace(config(), tenants={}) == config(tenants={})
    assert hash(replace(config(tenants={}), tenants=SHARES)) == hash(config())
    with pytest.raises(ValueError, match="tenants must be"):
        replace(config(), tenants={"": TenantShare()})


@pytest.mark.parametrize("grid", [(2, 2), [2, 2, 1], (2, 0, 1), (2, True, 1), "2,2,1", 8])
def test_a_storage_grid_is_three_positive_ints(grid):
    with pytest.raises(ValueError, match="storage_grid must be three positive ints"):
        config(storage_grid=grid)
    assert config(storage_grid=(2, 4, 1)).storage_grid == (2, 4, 1)


def test_the_core_takes_it():
    core = make_core(FULL, window(6), device_pages=PAGES, host_pages=PAGES, tenants=SHARES)
    assert [residency.allocator.num_pages for residency in core.tiers.residencies] == [32, 16, 32, 16]
    assert core.tiers.tenants is not None
    assert core.tiers.tenants.names == ("", "a", "b")
    assert make_core(tenants={}).tiers.tenants is None


@pytest.mark.parametrize("seconds", [0, -1.0, True, "60", None, float("nan"), float("inf")])
def test_the_bound_on_waiting_for_ranks_is_checked(seconds):
    with pytest.raises(ValueError, match="agreement_timeout_s"):
        config(agreement_timeout_s=seconds)


def test_stores_leave_a_lane_to_prefetches_and_one_to_what_only_awaits_quiet():
    with pytest.raises(ValueError, match="max_live_transfers"):
        config(max_stores=3, max_live_transfers=4)
    assert config(max_stores=2, max_live_transfers=4).max_live_transfers == 4


def test_page_kernels_are_named():
    with pytest.raises(ValueError, match=r"page_kernels must be one of \('auto', 'pallas', 'xla'\), not 'cuda'"):
        config(page_kernels="cuda")
