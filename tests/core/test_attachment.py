"""L7, K4: storage comes, goes and is cleared, and policies change, while everything is in flight."""

from __future__ import annotations

import pytest

from jaxcache.core.prefetch import PrefetchState
from jaxcache.types import PrefetchPolicy, TransferKind, Wait, WritePolicy
from tests.core.helpers import FULL, Server, make_core, prompt, server_with_storage, state, window

MIXTURE = (FULL, window(6), state(4))


@pytest.mark.parametrize("components", [(FULL,), MIXTURE], ids=len)
def test_what_host_memory_has_is_stored_when_storage_comes(components):
    """K4: under the same keys as if storage had always been there."""
    stored = []
    for attach_first in (True, False):
        server = Server(*components, host_pages=64)
        if attach_first:
            server.core.attachment.attach()
        for first in (0, 1000):
            server.prefill(prompt(24, first))
            server.prefill([*prompt(12, first), *prompt(12, first + 500)])
        server.settle()
        if not attach_first:
            assert not any(server.storage.cells[0])
            server.core.attachment.attach()
            server.settle()
        stored.append([set(cells) for cells in server.storage.cells[0]])
        server.check_empty()
    assert stored[0] == stored[1] and stored[0]


def test_back_filling_stops_where_the_queue_is_full():
    server = Server(host_pages=64, max_queued_stores=2)
    for first in (0, 1000, 2000):
        server.prefill(prompt(8, first))
    server.core.attachment.attach()
    assert (len(server.core.stores.queue), server.core.counters["dropped_stores"]) == (2, 1)


@pytest.mark.parametrize("when", [PrefetchState.QUERY, PrefetchState.FETCH])
def test_detach_with_a_prefetch_in_flight(when):
    """No leak, no lost request: the prefetch ends, its pages are freed when quiet, its request is served."""
    server = server_with_storage(*MIXTURE, prefetch_policy=PrefetchPolicy.WAIT_COMPLETE)
    server.store(prompt(40))
    ticket = server.prefetch(prompt(40))
    while ticket.state is not when:
        server.step(0)
    assert server.try_admit(ticket.sequence, ticket=ticket) == Wait("prefetch")
    server.core.attachment.detach()
    server.check()
    assert server.core.attachment.is_busy and server.host_free() < 64
    lease = server.admit(ticket.sequence, ticket=ticket)
    assert lease.num_cached_tokens == 0
    assert server.core.prefetch(server.sequence(prompt(60, 3000))) is None
    server.compute(lease, 41)
    server.release(lease)
    server.check_empty()
    assert not server.core.attachment.is_busy
    counters = server.core.counters
    assert counters["unfulfilled_aborted"] == counters["agreed_storage_tokens"] == 40 * (when is PrefetchState.FETCH)


def test_stores_under_way_end_and_queued_ones_are_dropped():
    server = server_with_storage(max_stores=1)
    for first in (0, 1000, 2000):
        server.prefill(prompt(8, first))
    server.plane.apply()
    server.core.commit({})
    assert (len(server.core.stores.live), len(server.core.stores.queue)) == (1, 2)
    server.core.attachment.detach()
    assert not server.core.stores.queue and server.core.counters["dropped_stores"] == 2
    server.prefill(prompt(8, 3000))
    server.settle()
    assert not server.core.stores.live
    server.check_empty()


@pytest.mark.parametrize("forget", ["detach", "cleared"])
def test_what_the_old_storage_got_is_not_believed_of_the_new_one(forget):
    """A STORE that ends afterwards included."""
    server = server_with_storage()
    server.prefill(prompt(8))
    server.settle()
    server.prefill(prompt(8, 1000))
    server.step(0)
    assert server.core.stores.live
    getattr(server.core.attachment, forget)()
    server.settle()
    assert not server.core.stores.believed
    server.storage.cells[0][0].clear()
    if forget == "detach":
        server.core.attachment.attach()
        server.settle()
        assert len(server.storage.cells[0][0]) == 4


def test_attaching_twice_or_to_nothing_is_refused():
    server = server_with_storage()
    digest = server.core.digest
    with pytest.raises(RuntimeError, match="detach it first"):
        server.core.attachment.attach()
    assert server.core.digest == digest
    core = make_core()
    with pytest.raises(ValueError, match="host_pages"):
        core.attachment.attach()
    with pytest.raises(RuntimeError, match="no storage is attached"):
        core.attachment.detach()
    assert not core.attachment.attached


def test_every_change_enters_the_digest():
    """Ranks that do it in different steps are found."""
    digests = [make_core(host_pages=8).digest]
    for calls in (("attach",), ("attach", "detach"), ("attach", "cleared")):
        core = make_core(host_pages=8)
        for call in calls:
            getattr(core.attachment, call)()
        digests.append(core.digest)
    core = make_core(host_pages=8)
    core.attachment.change(PrefetchPolicy.TIMEOUT, None)
    digests.append(core.digest)
    core.attachment.change(None, WritePolicy.NONE)
    digests.append(core.digest)
    assert len(set(digests)) == len(digests)


def test_a_prefetch_policy_holds_from_the_next_admission_on():
    server = server_with_storage(prefetch_policy=PrefetchPolicy.WAIT_COMPLETE)
    server.store(prompt(24))
    ticket = server.prefetch(prompt(24))
    assert server.try_admit(ticket.sequence, ticket=ticket) == Wait("prefetch")
    server.core.attachment.change(PrefetchPolicy.BEST_EFFORT, None)
    assert server.admit(ticket.sequence, ticket=ticket).num_cached_tokens == 0


def test_a_write_policy_holds_from_the_next_insert_on():
    server = Server(host_pages=64)
    server.core.attachment.change(None, WritePolicy.NONE)
    server.prefill(prompt(16))
    assert not server.planned(TransferKind.BACKUP)
    server.core.attachment.change(None, WritePolicy.WRITE_THROUGH)
    server.prefill(prompt(24))
    assert server.host_free() == 64 - 6  # what is above was backed up first
    server.check_empty()


@pytest.mark.parametrize(
    ("config", "policy"),
    [
        ({"host_pages": 8}, WritePolicy.WRITE_BACK),
        ({"host_pages": 8, "write_policy": WritePolicy.WRITE_BACK}, WritePolicy.NONE),
        ({}, WritePolicy.WRITE_THROUGH),
        ({"host_pages": 8}, "write_through"),
    ],
)
def test_policies_that_cannot_be(config, policy):
    core = make_core(**config)
    digest, before = core.digest, core.backups.policy
    with pytest.raises(ValueError, match=r"run time|host_pages|WritePolicy"):
        core.attachment.change(PrefetchPolicy.TIMEOUT, policy)
    assert (core.digest, core.backups.policy, core.prefetches.policy) == (digest, before, PrefetchPolicy.BEST_EFFORT)
