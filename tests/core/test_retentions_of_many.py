"""Retentions of several requests and tenants: each keeps what it asked for, as long as it asked for it."""

from __future__ import annotations

import pytest

from jaxcache.config import TenantShare
from tests.core.helpers import FULL, PAGE, make_core, prompt, window
from tests.core.serving import compute, flood, found, serve, start

KEPT = prompt(16)
LONGER = prompt(40)


def ends(core) -> dict[int, int]:
    """By end in tokens: how many steps it is still kept."""
    return {held.node.end: held.until - core.step_number for held in core.retentions.live.values()}


@pytest.mark.parametrize("mixture", [(FULL,), (FULL, window(6))], ids=["full", "full+window"])
def test_who_goes_on_does_not_take_what_another_keeps(mixture):
    """E7: two requests keep the same end; one of them moves on, and has its own time there."""
    core = make_core(*mixture, device_pages=64, max_retained_share=0.6)
    space = core.new_namespace(model="test")
    serve(core, KEPT, space, retain_steps=1000)
    lease = start(core, LONGER, space)
    core.insert(lease, 16, retain_steps=2)
    compute(core, lease, retain_steps=2)
    core.release(lease)
    assert sorted(ends(core)) == [16, 40]
    assert ends(core)[16] > 900
    assert ends(core)[40] <= 2
    core.commit({})
    core.commit({})
    flood(core, space, 40)
    assert found(core, KEPT, space).device_tokens == 16


def test_a_request_keeps_its_longest_time():
    """Also on an end that is kept for another already."""
    core = make_core(device_pages=64)
    space = core.new_namespace(model="test")
    lease = start(core, prompt(17), space)
    core.insert(lease, 8, retain_steps=100)
    serve(core, KEPT, space, retain_steps=5)
    assert sorted(ends(core)) == [8, 16]
    core.insert(lease, 17, retain_steps=1)
    assert sorted(ends(core)) == [16]
    assert ends(core)[16] > 90


def test_it_ends_when_who_stays_has_no_time_left():
    """E7: the one whose time was longer moves on; the other's is over already."""
    core = make_core(device_pages=64, max_retained_share=0.6)
    space = core.new_namespace(model="test")
    serve(core, KEPT, space, retain_steps=10)
    lease = start(core, LONGER, space)
    core.insert(lease, 16, retain_steps=50)
    for _ in range(15):
        core.commit({})
    compute(core, lease, retain_steps=50)
    assert sorted(ends(core)) == [40]


def test_a_refusal_is_not_counted_as_a_retention():
    core = make_core(device_pages=32)
    space = core.new_namespace(model="test")
    lease = start(core, LONGER, space)
    core.insert(lease, 16, retain_steps=50)
    core.insert(lease, 40, retain_steps=50)  # ten pages; a quarter are eight
    assert (core.counters["retentions"], core.counters["retentions_refused"]) == (1, 1)
    assert sorted(ends(core)) == [16]


def test_that_it_was_kept_is_no_use():
    """M6: only an admit is an access. What was kept takes its place by its own last use."""
    core = make_core(device_pages=32)
    space = core.new_namespace(model="test")
    serve(core, KEPT, space, retain_steps=9)
    others = [prompt(16, 1000 * i) for i in range(1, 4)]
    for other in others:
        serve(core, other, space)
    while core.retentions.live:
        core.commit({})
    serve(core, prompt(20 * PAGE, 50_000), space)  # four of 32 pages are missing
    assert found(core, KEPT, space).num_tokens == 0
    assert [found(core, other, space).num_tokens for other in others] == [16] * 3


def test_retained_pages_stay_within_the_quota():
    """E7: what is retained cannot leave for the quota, so it must fit it."""
    core = make_core(device_pages=100, tenants={"a": TenantShare(quota=0.1)})
    space = core.new_namespace(model="test", tenant="a")
    serve(core, prompt(25 * PAGE), space, retain_steps=1000)
    assert core.counters["retentions_refused"] == 1
    serve(core, prompt(8 * PAGE, 1000), space, retain_steps=1000)
    assert core.counters["retentions"] == 1
    assert core.quotas is not None
    assert core.quotas.stats()["a"]["device"]["full"]["resident"] <= 10


def test_retained_pages_leave_room_for_the_floors_of_others():
    """E7: a floor that is not used yet can still be had."""
    core = make_core(device_pages=100, tenants={"a": TenantShare(floor=0.9)})
    a, other = (core.new_namespace(model="test", tenant=name) for name in ("a", "c"))
    serve(core, prompt(20 * PAGE), other, retain_steps=1000)
    assert core.counters["retentions_refused"] == 1
    serve(core, prompt(10 * PAGE, 1000), other, retain_steps=1000)
    assert core.counters["retentions"] == 1
    serve(core, prompt(90 * PAGE, 5000), a)
    assert found(core, prompt(90 * PAGE, 5000), a).num_tokens == 90 * PAGE
