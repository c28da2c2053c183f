"""Who shares limits with whom, whose account a page is on, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxcache.config import TenantShare
from jaxcache.core import invariants
from jaxcache.core.lease import Lease
from tests.core.helpers import FULL, NEXT, PAGE, make_core, prompt, state, window
from tests.core.serving import flood, found, serve, start
from tests.core.test_tenants import core_of, resident, spaces

ROOT = Path(__file__).parent.parent.parent


def test_namespaces_of_one_tenant_share_its_limits():
    """E7: two weights versions together have what one would have."""
    core = core_of(a=TenantShare(floor=0.2, quota=0.5))
    one, two = (core.new_namespace(model="test", weights_version=v, tenant="a") for v in "12")
    (b,) = spaces(core, "b")
    for i in range(10):
        serve(core, prompt(20, 1000 * i), (one, two)[i % 2])
        assert resident(core, "a") <= 20
    flood(core, b, 50)
    assert resident(core, "a") == 8


def test_who_is_not_listed_has_no_limits():
    """E7: no tenant, or one that the configuration does not know."""
    core = core_of(a=TenantShare(floor=0.5))
    nobody = core.new_namespace(model="test")
    (unknown,) = spaces(core, "unknown")
    serve(core, prompt(20), nobody)
    serve(core, prompt(20, 1000), unknown)
    assert resident(core, "") == 10
    flood(core, unknown, 30)
    assert resident(core, "") == 40


def test_a_retired_namespace_has_no_floor_and_leaves_first():
    """E7, K5: pages that nobody can find are protected by nothing, however recently they were used."""
    core = core_of(a=TenantShare(floor=0.5))
    (a,) = spaces(core, "a")
    other = core.new_namespace(model="test")
    serve(core, prompt(60, 5000), other)  # 15 pages, the oldest
    serve(core, prompt(80), a)  # 20 pages
    core.retire_namespace(a)
    assert (resident(core, "a"), resident(core, "")) == (0, 35)
    serve(core, prompt(100, 9000), other)  # 25 pages: 20 have to leave
    assert found(core, prompt(60, 5000), other).num_tokens == 60
    invariants.check(core)
    invariants.check_empty(core)


def test_a_lease_of_a_retired_namespace_may_end():
    """K5: its pages changed hands while they were pinned."""
    core = core_of(FULL, window(6), state(4), a=TenantShare(floor=0.5, quota=0.6))
    (a,) = spaces(core, "a")
    serve(core, prompt(16), a)
    lease = start(core, [*prompt(16), NEXT], a)
    core.retire_namespace(a)
    invariants.check(core)
    assert core.grow(lease, 17, 8)
    core.release(lease)
    invariants.check(core)
    invariants.check_empty(core)


def test_accounts_of_retired_namespaces_are_used_again():
    """E7: a new weights version every minute must not make every eviction slower for ever."""
    core = core_of(a=TenantShare(floor=0.5))
    for version in range(100):
        namespace = core.new_namespace(model="test", weights_version=str(version), tenant="a")
        serve(core, prompt(20), namespace)
        assert found(core, prompt(20), namespace).num_tokens == 20
        core.retire_namespace(namespace)
    assert core.tiers.tenants is not None
    assert len(core.tiers.tenants.tenant_of) < 12  # a device of 40 pages has room for 8 versions
    invariants.check(core)


def test_a_split_and_a_branch_stay_on_the_account_of_their_namespace():
    """E7: or a flood could take pages of a prompt that another request has branched from."""
    core = core_of(a=TenantShare(floor=0.5))
    a, b = spaces(core, "a", "b")
    serve(core, prompt(40), a)
    serve(core, [*prompt(20), *prompt(20, 7000)], a)
    flood(core, b, 100)
    assert found(core, prompt(40), a).num_tokens == 40
    assert found(core, [*prompt(20), *prompt(20, 7000)], a).num_tokens == 40
    invariants.check(core)


def test_stats_name_limits_in_pages():
    """S3: of every tenant, tier and component."""
    core = core_of(FULL, state(4), a=TenantShare(0.25, 0.5), device_pages={"full": 40, "state": 9}, host_pages=10)
    (a,) = spaces(core, "a")
    serve(core, prompt(16), a)
    assert core.quotas is not None
    assert core.quotas.stats() == {
        "": {
            "device": {"full": pages(0, 0, 40), "state": pages(0, 0, 9)},
            "host": {"full": pages(0, 0, 10), "state": pages(0, 0, 10)},
        },
        "a": {
            "device": {"full": pages(4, 10, 20), "state": pages(2, 2, 4)},
            "host": {"full": pages(4, 2, 5), "state": pages(2, 2, 5)},
        },
    }


def pages(num_resident: int, floor: int, quota: int) -> dict[str, int]:
    return {"resident": num_resident, "pinned": 0, "floor": floor, "quota": quota}


def test_without_tenants_nothing_is_counted():
    core = make_core(FULL)
    assert core.quotas is None
    assert all(residency.accounts is None for residency in core.tiers.residencies)
    assert all(residency.accounts is not None for residency in core_of(a=TenantShare()).tiers.residencies)


def test_the_same_digest_under_another_pythonhashseed():
    """R9: no decision about tenants depends on the order of a set or on hashes of names."""
    code = (
        "from jaxcache import TenantShare; from tests.core.driver import drive; "
        "shares = {'b': TenantShare(0.2, 0.5), 'a': TenantShare(0.1, 0.4)}; "
        "print(drive(3, 120, mixture=('full', 'window', 'state'), device_pages=80, tenants=shares).digest)"
    )
    digests = set()
    for hash_seed in ("0", "4711"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        digests.add(done.stdout.strip())
    assert len(digests) == 1
    assert digests != {""}


# ---- what is refused


@pytest.mark.parametrize(
    ("floor", "quota"), [(-0.1, 1.0), (0.5, 0.4), (0.0, 0.0), (0.0, 1.1), (True, 1.0), ("a", 1.0), (0.0, None)]
)
def test_shares_that_make_no_sense(floor, quota):
    with pytest.raises(ValueError, match=r"floor|quota"):
        TenantShare(floor, quota)


@pytest.mark.parametrize("tenants", [["a"], {"a": 0.5}, {"": TenantShare()}, {1: TenantShare()}])
def test_tenants_that_make_no_sense(tenants):
    with pytest.raises(ValueError, match="tenants must be"):
        make_core(tenants=tenants)


def test_floors_must_fit():
    make_core(tenants={name: TenantShare(floor=floor) for name, floor in (("a", 0.6), ("b", 0.3), ("c", 0.1))})
    with pytest.raises(ValueError, match="add up"):
        make_core(tenants={"a": TenantShare(floor=0.6), "b": TenantShare(floor=0.5)})


def test_a_request_of_a_retired_namespace_is_nobody_elses():
    """E7: an account that is used again belongs to the new namespace only."""
    core = make_core(device_pages=40, tenants={"a": TenantShare(floor=0.2), "b": TenantShare(floor=0.2)})
    old = core.new_namespace(model="1", tenant="a")
    late = core.sequence(prompt(20 * PAGE, 5000), old)
    core.retire_namespace(old)
    new = core.new_namespace(model="2", tenant="b")
    kept = prompt(8 * PAGE)
    serve(core, kept, new)
    lease = core.admit(late, 20 * PAGE)
    assert isinstance(lease, Lease)
    assert core.tiers.tenants is not None
    assert core.tiers.tenants.accounts[0].owned == [20, 0, 0]  # nobody's
    other = core.new_namespace(model="3")
    serve(core, prompt(12 * PAGE, 9000), other)
    assert found(core, kept, new).num_tokens == 8 * PAGE
    invariants.check(core)


PAGELESS = (window(1),)  # a lease whose pages are all published pins none of them, and owns none


def test_a_lease_without_pages_keeps_its_account():
    """E7, I15: it may still grow, which must not be charged to the next namespace that gets an account."""
    core = core_of(*PAGELESS, a=TenantShare(floor=0.2), b=TenantShare(floor=0.2))
    (old,) = spaces(core, "a")
    lease = core.admit(core.sequence(prompt(3 * PAGE), old), 2 * PAGE)
    assert isinstance(lease, Lease)
    core.insert(lease, 2 * PAGE)
    assert core.tiers.tenants is not None
    accounts = core.tiers.tenants.accounts[1]  # of the window; the spine has pages
    assert accounts.num_owned == accounts.num_resident == [0, 0]
    core.retire_namespace(old)
    spaces(core, "b")
    assert core.grow(lease, 2 * PAGE, 5 * PAGE)
    assert accounts.owned == [5, 0, 0]
    invariants.check(core)
    core.release(lease)
    invariants.check(core)
    accounts = len(core.tiers.tenants.tenant_of)
    spine = core.tiers.device[0]
    assert core.tiers.make_room(core.tiers.device[0], spine.allocator.num_pages)
    core.new_namespace(model="next", tenant="b")
    assert len(core.tiers.tenants.tenant_of) == accounts  # the old one is used again
    invariants.check_empty(core)


def test_a_lease_of_a_late_request_keeps_its_account():
    """E7, I15: admitted after its namespace was retired, when nothing of it was left; it ends at the root."""
    core = core_of(*PAGELESS, a=TenantShare(floor=0.2), b=TenantShare(floor=0.2))
    (old,) = spaces(core, "a")
    late = core.sequence(prompt(3 * PAGE), old)
    core.retire_namespace(old)
    lease = core.admit(late, 3 * PAGE)
    assert isinstance(lease, Lease)
    core.insert(lease, 2 * PAGE)
    for version in "123":
        serve(core, prompt(PAGE, 3000), core.new_namespace(model=version, tenant="b"))
        invariants.check(core)
    assert core.grow(lease, 2 * PAGE, 5 * PAGE)
    assert core.tiers.tenants is not None
    assert core.tiers.tenants.accounts[0].owned[1:] == [0, 0]
    invariants.check(core)


def test_accounts_are_used_again_although_the_oldest_is_in_use():
    """E7: a request that runs for hours must not keep all accounts that were retired after its own."""
    core = core_of(a=TenantShare(floor=0.5))
    first = core.new_namespace(model="first", tenant="a")
    lease = start(core, prompt(8), first)
    core.retire_namespace(first)
    for version in range(100):
        namespace = core.new_namespace(model="test", weights_version=str(version), tenant="a")
        serve(core, prompt(20), namespace)
        core.retire_namespace(namespace)
    assert core.tiers.tenants is not None
    assert len(core.tiers.tenants.tenant_of) < 20
    core.release(lease)
    invariants.check(core)


def test_accounts_of_namespaces_that_never_had_a_page_are_used_again():
    core = core_of(a=TenantShare(floor=0.5))
    for version in range(20):
        core.retire_namespace(core.new_namespace(model="test", weights_version=str(version), tenant="a"))
    assert core.tiers.tenants is not None
    assert len(core.tiers.tenants.tenant_of) == 2
