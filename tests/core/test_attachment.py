"""L7, K4: storage comes, goes and is cleared, and policies change, while everything is in flight."""

from __future__ import annotations

import pytest

from jaxcache.core.prefetch import PrefetchState
from jaxcache.types import Outcome, PrefetchPolicy, TransferKind, Wait, WritePolicy
from tests.core.helpers import FULL, Server, make_core, prompt, server_with_storage, state, window

MIXTURE = (FULL, window(6), state(4))


@pytest.mark.parametrize("components", [(FULL,), MIXTURE], ids=len)
def test_what_host_memory_has_is_stored_when_storage_comes(components):
    """K4: under the same keys as if storage had always been there."""
    stored = []
    for attach_first in (True, False):
        server = Server(*components, host_pages=64)
        if attach_first:
            server.rank.attach()
        for first in (0, 1000):
            server.prefill(prompt(24, first))
            server.prefill([*prompt(12, first), *prompt(12, first + 500)])
        server.settle()
        if not attach_first:
            assert not server.storage.values[0]
            server.rank.attach()
            server.settle()
        stored.append(set(server.storage.values[0]))
        server.check_empty()
    assert stored[0] == stored[1] and stored[0]


def num_stored(server: Server) -> int:
    return len(server.storage.page_keys())


def test_back_filling_loses_nothing_and_lets_newcomers_go_first():
    server = Server(host_pages=256, device_pages=256, max_queued_stores=2, max_stores=1)
    for first in range(8):
        server.prefill(prompt(8, 1000 * first))
    server.rank.attach()
    server.prefill(prompt(8, 50_000))
    server.core.stores.start()
    (store,) = server.planned(TransferKind.STORE)
    assert store.moves[0].page_keys == tuple(server.sequence(prompt(8, 50_000)).page_keys(2))
    server.settle()
    assert (num_stored(server), server.core.counters["dropped_stores"]) == (18, 0)


def test_back_filling_goes_from_the_root_down():
    """A page whose parents are not stored is of no use."""
    server = Server(host_pages=64, max_stores=1)
    for end in (8, 16, 24):
        server.prefill(prompt(end))
    server.rank.attach()
    order = []
    while server.core.stores.is_waiting or server.core.stores.live:
        server.step()
        order += [key for store in server.core.stores.live.values() for key in store.keys["full"] if key not in order]
    assert order == server.sequence(prompt(24)).page_keys(6)


def test_a_node_that_is_split_before_its_turn_is_stored_whole():
    server = Server(host_pages=64)
    server.prefill(prompt(24))
    server.rank.attach()
    server.prefill([*prompt(12), *prompt(4, 3000)])
    server.settle()
    assert num_stored(server) == 7


def test_a_large_tree_is_visited_in_many_steps():
    server = Server(device_pages=400, host_pages=8, write_policy=WritePolicy.NONE)
    for first in range(300):
        server.prefill(prompt(4, 1000 * first))
    server.rank.attach()
    num_steps = 0
    while server.core.stores.is_waiting:
        server.core.commit({})
        num_steps += 1
    assert num_steps == 2


@pytest.mark.parametrize("when", [PrefetchState.QUERY, PrefetchState.FETCH])
def test_detach_with_a_prefetch_in_flight(when):
    """No leak, no lost request: the prefetch ends, its pages are freed when quiet, its request is served."""
    server = server_with_storage(*MIXTURE, prefetch_policy=PrefetchPolicy.WAIT_COMPLETE)
    server.store(prompt(40))
    ticket = server.prefetch(prompt(40))
    while ticket.state is not when:
        server.step(0)
    assert server.try_admit(ticket.sequence, ticket=ticket) == Wait("prefetch")
    server.rank.detach()
    server.check()
    assert server.core.live_transfers() and server.host_free() < 64
    lease = server.admit(ticket.sequence, ticket=ticket)
    assert lease.num_cached_tokens == 0
    assert server.core.prefetch(server.sequence(prompt(60, 3000))) is None
    server.compute(lease, 41)
    server.release(lease)
    server.check_empty()
    assert not server.core.live_transfers()
    counters = server.core.counters
    assert counters["unfulfilled_aborted"] == counters["agreed_storage_tokens"] == 40 * (when is PrefetchState.FETCH)


def test_stores_under_way_end_and_queued_ones_are_dropped():
    server = server_with_storage(max_stores=1)
    for first in (0, 1000, 2000):
        server.prefill(prompt(8, first))
    server.rank.apply()
    server.core.commit({})
    assert (len(server.core.stores.live), len(server.core.stores.queue)) == (1, 2)
    server.rank.detach()
    assert not server.core.stores.queue and server.core.counters["dropped_stores"] == 2
    server.prefill(prompt(8, 3000))
    server.settle()
    assert not server.core.stores.live
    server.check_empty()


def test_what_the_old_storage_got_is_not_believed_of_the_new_one():
    """A STORE that ends afterwards included."""
    server = server_with_storage()
    server.prefill(prompt(8))
    server.settle()
    server.prefill(prompt(8, 1000))
    server.step(0)
    assert server.core.stores.live
    server.rank.detach()
    server.settle()
    assert not server.core.stores.known_stored
    [server.storage.lose(0, "full", key) for key in server.storage.page_keys()]
    server.rank.attach()
    server.settle()
    assert num_stored(server) == 4


def test_what_storage_lost_by_a_clear_is_written_once_all_ranks_have_cleared():
    """L1: a rank that is slower would remove what the others have written since."""
    server = server_with_storage()
    server.prefill(prompt(24))
    server.settle()
    server.core.attachment.cleared()
    assert server.core.needs_exchange()
    for clock_ms in (None, 0, None, 1):
        assert not server.planned(TransferKind.STORE)
        server.core.commit({}, clock_ms)
    (store,) = server.planned(TransferKind.STORE)
    assert store.moves[0].page_keys == tuple(server.sequence(prompt(24)).page_keys(6))


@pytest.mark.parametrize("call", ["detach", "reset"])
def test_what_was_accepted_and_is_not_quiet_yet(call):
    """L9: a detach does not lose it, a reset does."""
    server = server_with_storage()
    server.store(prompt(24))
    ticket = server.prefetch(prompt(24))
    while ticket.state is not PrefetchState.FETCH:
        server.step(0)
    server.core.take_plan()
    server.core.commit({ticket.prefetch.id: Outcome(True, False, {"full": 6})})
    if call == "detach":
        server.rank.detach()
    else:
        server.core.reset()
    lease = server.admit(ticket.sequence, ticket=ticket)
    assert lease.storage_tokens == 24 * (call == "detach")
    assert server.core.counters["unfulfilled_host_capacity"] == 24 * (call == "reset")


def test_an_old_storage_that_hangs_does_not_use_up_the_stores_of_the_new_one():
    server = server_with_storage(max_stores=1)
    server.prefill(prompt(8))
    server.rank.apply()
    server.core.commit({})
    server.rank.detach()
    server.core.attachment.attach("another")
    server.core.commit({})
    assert len(server.core.stores.live) == 2


def test_a_reset_counts_the_stores_that_it_drops():
    server = server_with_storage()
    for first in (0, 1000):
        server.prefill(prompt(8, first))
    server.core.reset()
    assert server.core.counters["dropped_stores"] == 2


def test_attaching_twice_or_to_nothing_is_refused():
    server = server_with_storage()
    digest = server.core.digest
    with pytest.raises(RuntimeError, match="detach it first"):
        server.rank.attach()
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
    other = make_core(host_pages=8)
    other.attachment.attach("another kind")
    digests.append(other.digest)
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


@pytest.mark.parametrize("when", [PrefetchState.QUERY, PrefetchState.FETCH])
def test_what_is_read_while_storage_is_cleared_does_not_come(when):
    """L1: it would be in host memory and, with no STORE planned, never in storage again."""
    server = server_with_storage()
    server.store(prompt(24))
    ticket = server.prefetch(prompt(24))
    while ticket.state is not when:
        server.step(0)
    server.core.take_plan()
    server.core.attachment.cleared()
    assert ticket.done
    server.core.commit({ticket.prefetch.id: Outcome(True, True, {"full": 6}, 24, 24)}, 0)
    server.check()
    assert server.match(prompt(24)).num_tokens == 0
    assert (server.host_free(), server.core.live_transfers()) == (64, [])


def test_storage_is_not_asked_before_all_ranks_have_cleared_it():
    """It may still have, on a rank that is slower, what is about to be removed."""
    server = server_with_storage()
    server.core.attachment.cleared()
    for _ in range(2):
        assert server.core.prefetch(server.sequence(prompt(24))) is None
        server.core.commit({}, 0)
    assert server.core.prefetch(server.sequence(prompt(24))) is not None
