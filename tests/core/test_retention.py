"""Bounded retention: what is kept, until when, how much of it at most, and that it always ends."""

from __future__ import annotations

import pytest

from jaxcache.config import TenantShare
from jaxcache.core.lease import Lease
from jaxcache.types import Wait
from tests.core.helpers import FULL, NEXT, PAGE, Server, make_core, prompt, state, window
from tests.core.serving import flood, found, serve, start

KEPT = prompt(16)  # four pages
ALL = (FULL, window(6), state(4))
MIXTURES = {"full": (FULL,), "full+window": (FULL, window(6)), "full+window+state": ALL, "window+state": ALL[1:]}


def keep(server: Server, tokens: list[int], retain_steps: int) -> int:
    return serve(server.core, tokens, server.namespace, retain_steps=retain_steps)


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_it_survives_a_flood_and_ends_at_its_step(mixture):
    """E7, X15: full attention to the root, the window and the state stay on the device; not one step longer."""
    core = make_core(*mixture, device_pages=32)
    namespace = core.new_namespace(model="test")
    serve(core, KEPT, namespace, retain_steps=100)
    until = core.step_number + 100
    flood(core, namespace, 30)
    assert found(core, KEPT, namespace).device_tokens == 16
    while core.step_number < until - 1:
        core.commit({})
    assert core.retentions.live
    core.commit({})
    assert not core.retentions.live
    assert all(device.num_pinned == 0 for device in core.tiers.device)
    flood(core, namespace, 30)
    assert found(core, KEPT, namespace).num_tokens == 0


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_without_it_the_flood_takes_everything(mixture):
    """The flood of the test above is one."""
    core = make_core(*mixture, device_pages=32)
    namespace = core.new_namespace(model="test")
    serve(core, KEPT, namespace)
    flood(core, namespace, 30)
    assert found(core, KEPT, namespace).num_tokens == 0


def test_all_together_keep_at_most_their_share():
    """E7, X15: a quarter of 32 pages; what does not fit is not kept, and is counted; room comes back at the end."""
    server = Server(device_pages=32)
    for i in range(5):
        keep(server, prompt(12, 1000 * i), 20)
    assert server.core.tiers.device[0].num_pinned == 6
    assert server.core.counters["retentions_refused"] == 3
    for _ in range(20):
        server.step()
    keep(server, prompt(32, 9000), 20)
    assert server.core.tiers.device[0].num_pinned == 8
    server.check_empty()


def test_a_share_of_whole_pages_is_as_many_pages():
    """E7: 0.29 * 100 is a little less than 29; retentions and tenants round alike."""
    server = Server(device_pages=100, max_retained_share=0.29, tenants={"a": TenantShare(floor=0.29)})
    assert server.core.retentions.limits == [29]
    assert server.core.tiers.tenants.accounts[0].floors[1] == 29
    keep(server, prompt(29 * PAGE), 20)
    assert server.core.tiers.device[0].num_pinned == 29
    server.check_empty()


def test_a_shared_prefix_counts_once():
    """E7: and as long as any of those who share it."""
    server = Server(device_pages=32)  # 8 pages may be kept
    for i, steps in enumerate((10, 30, 30)):
        keep(server, [*prompt(20), *prompt(4, 5000 + 1000 * i)], steps)
    assert server.core.counters["retentions_refused"] == 0
    assert server.core.retentions.num_pages == [8]
    for _ in range(10):
        server.step()
    assert server.core.retentions.num_pages == [7]
    keep(server, prompt(8, 70_000), 10)
    assert server.core.counters["retentions_refused"] == 1
    server.check_empty()


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_retentions_never_fill_the_cache(mixture):
    """X15: whatever was asked for, three quarters of the device are there for a request."""
    core = make_core(*mixture, device_pages=32)
    namespace = core.new_namespace(model="test")
    for i in range(50):
        serve(core, prompt(4 * (1 + i % 5), 1000 * i), namespace, retain_steps=100_000)
    assert core.counters["retentions_refused"]
    for device in core.tiers.device:
        assert device.num_pinned <= 8
    assert isinstance(core.admit(core.sequence(prompt(24 * PAGE, 90_000), namespace), 24 * PAGE), Lease)


def test_asking_again_keeps_it_until_the_later_step():
    """E7: one entry per end, which is never kept for less."""
    server = Server()
    keep(server, KEPT, 20)
    for steps in (5, 40, 1):
        keep(server, [*KEPT, NEXT], steps)
    assert [held.until for held in server.core.retentions.live.values()] == [server.core.step_number - 2 + 40]
    server.check_empty()


def test_a_request_that_goes_on_keeps_its_newest_end_only():
    """E7: an agent's every turn and every page of it asks; the windows and states of earlier ends are not kept too."""
    server = Server(*ALL, device_pages=40)
    lease = server.admit(KEPT, chunk=32)
    for end in range(4, 17, 4):
        server.compute(lease, end)
        server.insert(lease, end, retain_steps=50)
        server.check()
    assert [held.node.end for held in server.core.retentions.live.values()] == [16]
    assert server.core.retentions.num_pages == [4, 2, 1]
    assert server.core.counters["retentions_refused"] == 0
    server.release(lease)
    server.check_empty()


def test_a_refused_end_leaves_the_earlier_one_kept():
    """E7: four pages of 16 may be kept; the fifth page asks in vain."""
    server = Server(device_pages=16)
    lease = server.admit(prompt(20))
    for end in (16, 20):
        server.compute(lease, end)
        server.insert(lease, end, retain_steps=50)
    assert [held.node.end for held in server.core.retentions.live.values()] == [16]
    assert server.core.counters["retentions_refused"] == 1
    server.release(lease)
    server.flush_device()
    assert server.match(prompt(20)).num_tokens == 16
    server.check_empty()


def test_the_deepest_end_that_can_be_resumed_is_kept():
    """E7: the state is at 16; the pages after it could not be resumed, and are not kept."""
    server = Server(FULL, state(16), device_pages=40)
    serve(server.core, prompt(24), server.namespace, retain_steps=50)
    assert [held.node.end for held in server.core.retentions.live.values()] == [16]
    assert server.core.retentions.num_pages == [4, 1]
    server.check_empty()


def test_a_split_of_what_is_kept_changes_nothing():
    """I2, I14: pins and counts are on both parts, and all are given back."""
    server = Server(*ALL, device_pages=40)
    keep(server, KEPT, 12)
    lease = start(server.core, [*KEPT[:8], *prompt(8, 7000)], server.namespace)
    server.insert(lease, lease.num_computed)
    server.check()
    server.release(lease)
    assert server.core.retentions.num_pages == [4, 3, 1]
    for _ in range(12):
        server.step()
    assert server.core.retentions.num_pages == [0, 0, 0]
    server.check_empty()


@pytest.mark.parametrize("how", ["reset", "forget_device", "retire"])
def test_what_is_lost_or_retired_is_not_kept(how):
    """E7, S1: nothing is pinned that nobody can find."""
    server = Server(*ALL, device_pages=40, host_pages=40)
    keep(server, KEPT, 1000)
    if how == "retire":
        other = server.core.new_namespace(model="other")
        serve(server.core, KEPT, other, retain_steps=1000)
        server.core.retire_namespace(server.namespace)
        assert [held.namespace for held in server.core.retentions.live.values()] == [other]
        server.core.retire_namespace(other)
    else:
        getattr(server.core, how)()
    assert not server.core.retentions.live
    assert server.core.retentions.num_pages == [0, 0, 0]
    server.check()
    server.check_empty()


def test_a_request_that_needs_what_is_kept_waits_until_it_ends():
    """E7, A1: somebody's end will make room, so the cache is not idle."""
    server = Server(device_pages=16)
    keep(server, KEPT, 10)
    big = server.sequence(prompt(15 * PAGE, 5000))
    assert server.try_admit(big) == Wait("no room")
    assert server.core.is_busy()
    for _ in range(10):
        server.step()
    assert not server.core.is_busy()
    assert isinstance(server.try_admit(big), Lease)


def test_a_shorter_hit_does_not_wait_for_a_retention():
    """A1: nothing but a retention is in the way of the long hit, and it may last for ever."""
    server = Server(device_pages=16, host_pages=64)
    long = prompt(14 * PAGE, 5000)
    server.prefill(long)
    server.flush_device()
    keep(server, KEPT, 1000)
    lease = server.admit([*long, NEXT], chunk=1)
    assert lease.num_cached_tokens < 14 * PAGE
    assert server.core.retentions.live


def test_it_is_part_of_the_digest():
    """E7, I8."""
    digests = []
    for steps in (0, 5, 5, 6):
        server = Server()
        keep(server, KEPT, steps)
        digests.append(server.core.digest)
    assert digests[1] == digests[2]
    assert len(set(digests)) == 3


@pytest.mark.parametrize("steps", [True, 2.0, "3", None, -1, 101])
def test_steps_are_an_int_up_to_a_limit(steps):
    """E7, X15: nothing is kept for ever."""
    server = Server(max_retain_steps=100)
    lease = server.admit(prompt(8))
    server.compute(lease, 8)
    digest = server.core.digest
    with pytest.raises(ValueError, match="retain_steps"):
        server.core.insert(lease, 8, retain_steps=steps)
    assert server.core.digest == digest
    server.core.insert(lease, 8, retain_steps=100)


@pytest.mark.parametrize("share", [-0.1, 1 - 1e-12, 1.0, 2])
def test_the_share_is_less_than_everything(share):
    """X15."""
    with pytest.raises(ValueError, match="max_retained_share"):
        make_core(max_retained_share=share)


def test_asking_often_costs_no_memory():
    """X15: reminders of ends that were moved are thrown away."""
    server = Server(max_retain_steps=10_000)
    lease = server.admit(KEPT)
    server.compute(lease, 16)
    for i in range(1000):
        server.core.insert(lease, 16, retain_steps=1000 + i)
    assert len(server.core.retentions._ends) < 200
    server.release(lease)
    server.check_empty()
