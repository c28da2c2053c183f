"""Tenants: floors that a flood cannot take, quotas that a flood cannot exceed, and accounts that add up."""

from __future__ import annotations

import pytest

from jaxcache.config import TenantShare
from jaxcache.core import invariants
from jaxcache.core.lease import Lease
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.types import Wait, WritePolicy
from tests.core.helpers import FULL, NEXT, PAGE, make_core, prompt, state, window
from tests.core.serving import compute, flood, found, serve, start

MIXTURES = {"full": (FULL,), "full+window+state": (FULL, window(6), state(4))}
NUM_FLOOD = 1000
MINE = [prompt(16, 2000 * i) for i in range(4)]  # 16 pages, 8 window pages, 4 states
each_mixture = pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
each_policy = pytest.mark.parametrize("policy", ["lru", "adaptive"])


def core_of(*mixture, a: TenantShare | None = None, b: TenantShare | None = None, **fields) -> PrefixCache:
    shares = {name: share for name, share in (("a", a), ("b", b)) if share is not None}
    return make_core(*mixture, **{"device_pages": 40, "tenants": shares, **fields})


def spaces(core: PrefixCache, *names: str):
    return [core.new_namespace(model="test", tenant=name) for name in names]


def resident(core: PrefixCache, tenant: str, tier: str = "device", component: str = "full") -> int:
    assert core.quotas is not None
    return core.quotas.stats()[tenant][tier][component]["resident"]


# ---- floors


@each_mixture
@each_policy
@pytest.mark.parametrize(("floor", "is_kept"), [(0.4, True), (0.0, False)])
def test_a_flood_cannot_take_the_floor_of_another_on_the_device(mixture, policy, floor, is_kept):
    """E7: 1,000 requests of b, and all prompts of a are hits still; without a floor none is."""
    core = core_of(*mixture, a=TenantShare(floor=floor), eviction_policy=policy)
    a, b = spaces(core, "a", "b")
    for tokens in MINE:
        serve(core, tokens, a)
    flood(core, b, NUM_FLOOD)
    hits = [found(core, tokens, a).device_tokens for tokens in MINE]
    assert hits == ([16] * 4 if is_kept else [0] * 4)
    invariants.check(core)
    invariants.check_empty(core)


@each_mixture
@each_policy
@pytest.mark.parametrize(("floor", "is_kept"), [(0.2, True), (0.0, False)])
def test_a_flood_cannot_take_the_floor_of_another_in_host_memory(mixture, policy, floor, is_kept):
    """E7: the floor holds on every tier; on the device, which is smaller, it protects one of the four prompts."""
    core = core_of(*mixture, a=TenantShare(floor=floor), eviction_policy=policy, device_pages=20, host_pages=80)
    a, b = spaces(core, "a", "b")
    for tokens in MINE:
        serve(core, tokens, a)
    flood(core, b, NUM_FLOOD)
    hits = [found(core, tokens, a).num_tokens for tokens in MINE]
    assert hits == ([16] * 4 if is_kept else [0] * 4)
    assert resident(core, "a") == (4 if is_kept else 0)
    if is_kept:
        assert serve(core, [*MINE[0], NEXT], a) == 16
    invariants.check(core)
    invariants.check_empty(core)


def test_write_back_keeps_the_floor_in_host_memory():
    """E7, W1: what leaves the device is copied on behalf of whom it belongs to."""
    write_back = {"write_policy": WritePolicy.WRITE_BACK, "device_pages": 20, "host_pages": 80}
    core = core_of(FULL, a=TenantShare(floor=0.2), **write_back)
    a, b = spaces(core, "a", "b")
    for tokens in MINE:
        serve(core, tokens, a)
    flood(core, b, 200)
    assert [found(core, tokens, a).num_tokens for tokens in MINE] == [16] * 4
    invariants.check(core)
    invariants.check_empty(core)


def test_a_victim_of_another_is_trimmed_to_its_floor():
    """E7: six pages of eight are the floor, and six stay; not one more, not one less."""
    core = core_of(a=TenantShare(floor=0.15))
    a, b = spaces(core, "a", "b")
    serve(core, prompt(32), a)
    flood(core, b, 20)
    assert resident(core, "a") == 6
    assert found(core, prompt(32), a).num_tokens == 24


def test_a_window_may_leave_while_its_owner_has_more_than_the_floor():
    """E7: windows leave whole, so the floor may be missed by at most the pages of one of them, less one."""
    core = core_of(FULL, window(12), a=TenantShare(floor=0.2), device_pages={"full": 400, "window": 20})
    a, b = spaces(core, "a", "b")
    serve(core, prompt(12), a)
    serve(core, prompt(12, 1000), a)
    flood(core, b, 20)
    assert resident(core, "a", component="window") == 3  # the floor is 4; entries have 3 pages


def test_a_tenant_may_evict_its_own_below_its_floor():
    """E7: a floor is a promise against others."""
    core = core_of(a=TenantShare(floor=1.0))
    (a,) = spaces(core, "a")
    for i in range(50):
        serve(core, prompt(40, 1000 * i), a)
    assert found(core, prompt(40, 49_000), a).num_tokens == 40
    assert found(core, prompt(40), a).num_tokens == 0


@each_mixture
def test_floors_that_add_up_to_the_whole_cache_are_all_kept(mixture):
    """E7: admit promises only what can be had; whoever has no floor gets what the others leave."""
    core = core_of(*mixture, a=TenantShare(floor=0.6), b=TenantShare(floor=0.4))
    a, b, other = spaces(core, "a", "b", "c")
    for i in range(300):
        namespace, most = ((a, 18), (b, 12))[i % 2]
        serve(core, prompt(PAGE * (1 + i * 7 % most), 1000 * i), namespace)
        if i % 50 == 0:
            invariants.check(core)
    assert resident(core, "a") + resident(core, "b") > 30
    for i in range(300, 330):
        serve(core, prompt(PAGE * (1 + i * 7 % 18), 1000 * i), a)
    for i in range(330, 360):
        serve(core, prompt(PAGE * (1 + i * 7 % 12), 1000 * i), b)
    answer = core.admit(core.sequence(prompt(40 * PAGE), other), 40 * PAGE)
    assert answer == Wait("floors")  # nothing runs whose end would help
    assert core.admit(core.sequence(prompt(51 * PAGE), other), 51 * PAGE) == Wait("no room")
    invariants.check(core)


def test_the_one_used_longest_ago_leaves_whosever_it_is():
    """E7: above their floors tenants share as if there were none."""
    core = core_of(a=TenantShare(floor=0.1), b=TenantShare(floor=0.1))
    a, b, other = spaces(core, "a", "b", "c")
    served = [(prompt(20, 1000 * i), (a, b, other)[i % 3]) for i in range(8)]  # 5 pages each: the device is full
    for tokens, namespace in served:
        serve(core, tokens, namespace)
    for i in range(3):
        serve(core, prompt(20, 100_000 + 1000 * i), other)
        hits = [found(core, tokens, namespace).num_tokens for tokens, namespace in served]
        assert hits == [0] * (i + 1) + [20] * (7 - i)


# ---- quotas


@each_mixture
@each_policy
def test_a_flood_leaves_the_rest_to_others(mixture, policy):
    """E7: b never has more than half, so the half that somebody without limits has stays."""
    core = core_of(*mixture, b=TenantShare(quota=0.5), eviction_policy=policy)
    other, b = spaces(core, "c", "b")
    for tokens in MINE:
        serve(core, tokens, other)
    for i in range(200):
        serve(core, prompt(20, 100_000 + 1000 * i), b)
        assert all(resident(core, "b", "device", c.name) <= 20 for c in mixture)
    assert [found(core, tokens, other).num_tokens for tokens in MINE] == [16] * 4
    assert core.counters["quota_pages"] > 0
    invariants.check(core)
    invariants.check_empty(core)


def test_a_quota_holds_in_host_memory():
    """E7."""
    core = core_of(b=TenantShare(quota=0.5), host_pages=60)
    (b,) = spaces(core, "b")
    for i in range(100):
        serve(core, prompt(20, 1000 * i), b)
        assert resident(core, "b", "host") <= 30
    assert resident(core, "b", "host") == 30
    invariants.check_empty(core)


def test_what_leaves_for_the_quota_is_what_the_policy_says():
    """E7: the tenant's own oldest pages, trimmed to what is too much; `explain` says why."""
    core = core_of(b=TenantShare(quota=0.3))  # 12 pages
    (b,) = spaces(core, "b")
    for i in range(3):
        serve(core, prompt(20, 1000 * i), b)
    assert [found(core, prompt(20, 1000 * i), b).num_tokens for i in range(3)] == [8, 20, 20]
    eviction = core.explain(core.sequence(prompt(20), b)).eviction
    assert eviction is not None
    assert eviction.reason == "quota"


def test_whoever_is_over_the_quota_leaves_first():
    """E7: a request that was alone could exceed it; what it has too much leaves before older pages of others."""
    core = core_of(b=TenantShare(quota=0.25))  # 10 pages
    other, b = spaces(core, "c", "b")
    serve(core, prompt(80), other)  # 20 pages, the oldest
    serve(core, prompt(80, 1000), b)  # 20 pages, used last
    assert resident(core, "b") == 20
    serve(core, prompt(40, 2000), other)
    assert resident(core, "b") == 10
    assert found(core, prompt(80), other).num_tokens == 80


def test_whoever_is_over_the_quota_keeps_the_floor():
    """E7: what its running request owns makes it too much, but only two of its pages are above the floor."""
    core = core_of(a=TenantShare(floor=0.3, quota=0.5))  # 12 and 20 pages
    a, b, other = spaces(core, "a", "b", "c")
    serve(core, prompt(56), a)  # 14 pages
    lease = start(core, prompt(40, 1000), a)  # and 10
    serve(core, prompt(20, 2000), other)  # 5
    assert isinstance(core.admit(core.sequence(prompt(72, 3000), b), 72), Lease)  # 18, of which 7 have to leave
    assert (resident(core, "a"), resident(core, "")) == (12, 0)
    core.release(lease)


def test_a_request_over_the_quota_waits_for_others_of_its_tenant():
    """E7, A1: the answer says why; nothing has changed; others are admitted; the end of the first resolves it."""
    core = core_of(b=TenantShare(quota=0.4))  # 16 pages
    other, b = spaces(core, "c", "b")
    first = start(core, prompt(40), b)
    digest = core.digest
    second = core.sequence(prompt(28, 1000), b)
    assert core.admit(second, 28) == Wait("over quota")
    assert core.digest == digest
    assert core.counters["quota_waits"] == 1
    third = core.admit(core.sequence(prompt(28, 2000), other), 28)
    assert isinstance(third, Lease)
    assert isinstance(core.admit(core.sequence(prompt(24, 3000), b), 24), Lease)  # 10 + 6 pages
    core.release(first)
    assert isinstance(core.admit(second, 28), Lease)
    invariants.check(core)


def test_what_is_pinned_and_shared_counts_once_against_the_quota():
    """E7: a second request on the same prefix brings only what it adds."""
    core = core_of(b=TenantShare(quota=0.3))  # 12 pages
    (b,) = spaces(core, "b")
    serve(core, prompt(40), b)
    leases = [start(core, [*prompt(40), 1_000 * i], b) for i in (1, 2)]
    assert [lease.num_cached_tokens for lease in leases] == [40, 40]
    assert core.admit(core.sequence([*prompt(40), 3_000], b), 1) == Wait("over quota")


@each_mixture
def test_alone_a_request_may_exceed_the_quota(mixture):
    """E7: otherwise it would wait for ever."""
    core = core_of(*mixture, b=TenantShare(quota=0.1))
    (b,) = spaces(core, "b")
    lease = start(core, prompt(80), b)
    compute(core, lease)
    assert resident(core, "b") == 20
    core.release(lease)
    serve(core, prompt(8, 1000), b)
    assert resident(core, "b") <= 4
