"""Forgetting everything at once, while anything is in flight."""

from __future__ import annotations

import pytest

from jaxcache.core import invariants
from jaxcache.core.lease import Lease
from jaxcache.core.prefetch import PrefetchState
from jaxcache.types import Match, Outcome, TransferKind, Wait, WritePolicy
from tests.core.helpers import FULL, Server, prompt, server_with_storage, state, window


def all_free(server: Server) -> bool:
    return all(r.allocator.num_free == r.allocator.num_pages for r in server.core.tiers.residencies)


def test_reset_frees_every_tier():
    """S1, X6."""
    server = Server(FULL, window(6), state(), host_pages=32)
    for first in (0, 1000, 2000):
        server.prefill(prompt(24, first))
    server.core.reset()
    server.check()
    assert all_free(server)
    assert server.core.tiers.tree.num_nodes == 0
    assert server.match(prompt(24)).num_tokens == 0
    assert server.prefill(prompt(24)) == 0
    assert server.prefill(prompt(25)) == 24
    server.check_empty()


def test_no_reset_while_leases_are_out():
    """S1: a lease is a promise."""
    server = Server(host_pages=32)
    server.prefill(prompt(16))
    lease = server.admit(prompt(17))
    with pytest.raises(RuntimeError, match="released first"):
        server.core.reset()
    server.compute(lease, 17)
    server.release(lease)
    server.core.reset()
    server.check()


def test_reset_during_a_fetch_waits_for_quiet_without_blocking():
    """S1, L6: what a thread still writes into is nobody's until it has stopped."""
    server = server_with_storage(FULL, window(6))
    server.store(prompt(40))
    ticket = server.prefetch(prompt(40))
    while ticket.state is not PrefetchState.FETCH:
        server.step(0)
    server.step(2)
    server.core.reset()
    server.check()
    assert server.host_free() == 64 - 10
    server.prefill(prompt(40))
    assert server.match(prompt(40)).num_tokens == 40
    server.settle()
    assert ticket.state is PrefetchState.DONE
    assert server.host_free() == 64 - 10
    server.check_empty()


def test_reset_during_a_store_keeps_its_pages_until_quiet():
    """S1: a store reads what it was told to read."""
    server = server_with_storage()
    server.prefill(prompt(16))
    server.step(0)
    (store,) = server.core.live_transfers()
    server.core.reset()
    server.check()
    server.core.commit({store: Outcome(done=True, quiet=False)})
    assert server.host_free() == 64 - 4
    server.core.commit({store: Outcome(done=True, quiet=True, pages={"full": 4})})
    assert server.host_free() == 64
    server.check_empty()


def test_reset_with_a_planned_load_back():
    """S1: its scatter may still come, so the device pages stay out of use until it has."""
    server = Server(device_pages=8, host_pages=32)
    server.prefill(prompt(16))
    server.flush_device()
    server.settle()
    server.release(server.admit(prompt(17)))
    server.core.reset()
    server.check()
    assert server.free() == 8 - 4
    other = server.admit(prompt(16, 1000))
    server.rank.apply()
    server.compute(other, 12)
    server.step()
    assert server.free() == 8 - 4
    server.compute(other, 16)
    server.release(other)
    server.check_empty()


def test_no_model_step_between_a_reset_and_the_scatter_that_was_on_its_way():
    """S1: the pages are free again, but the scatter comes first, so the tables are not to be had before."""
    server = Server(device_pages=8, host_pages=32)
    server.prefill(prompt(16))
    server.flush_device()
    server.settle()
    server.release(server.admit(prompt(17)))
    server.rank.apply()
    server.core.reset()
    server.core.commit({})
    assert server.free() == 8
    assert not server.core.plan_is_applied()
    server.rank.apply()
    assert server.core.plan_is_applied()
    server.prefill(prompt(16, 1000))
    server.check_empty()


@pytest.mark.parametrize("write_policy", [WritePolicy.WRITE_THROUGH, WritePolicy.WRITE_BACK])
def test_when_the_device_is_lost_running_leases_end(write_policy):
    """Their promise cannot be kept. Nothing but host memory is there afterwards, and all of the device is free."""
    server = Server(FULL, window(6), state(), host_pages=32, write_policy=write_policy)
    server.prefill(prompt(24))
    server.settle()
    leases = [server.admit(prompt(25)), server.admit(prompt(12, 1000))]
    server.rank.apply()
    server.rank.forget_device()
    server.check()
    for lease in leases:
        with pytest.raises(ValueError, match="was released"):
            server.core.release(lease)
        with pytest.raises(ValueError, match="was released"):
            _ = lease.page_tables
    assert all(r.allocator.num_free == r.allocator.num_pages for r in server.core.tiers.device)
    assert not server.core.is_busy()
    kept = 24 if write_policy is WritePolicy.WRITE_THROUGH else 0
    assert server.match(prompt(24)) == Match(kept, 0, kept, 0, ())
    assert server.prefill(prompt(25)) == kept
    server.check_empty()


@pytest.mark.parametrize("how", ["reset", "forget_device"])
def test_device_pages_wait_for_nothing_but_the_device(how):
    """A storage that hangs holds up host pages only; and what is on its way back makes the cache busy."""
    server = server_with_storage(FULL, window(6), device_pages=8, write_policy=WritePolicy.WRITE_BACK)
    server.prefill(prompt(20))
    server.prefill(prompt(32, 1000))
    server.step(0)
    server.core.commit({})
    assert server.core.stores.live and any(node_pins(server))
    getattr(server.core, how)()
    server.check()
    assert server.core.stores.live
    assert server.core.is_busy() == any(r.allocator.num_free < r.allocator.num_pages for r in server.core.tiers.device)
    server.core.commit({})
    assert all(r.allocator.num_free == r.allocator.num_pages for r in server.core.tiers.device)
    assert not server.core.is_busy()
    assert isinstance(server.try_admit(prompt(32, 2000)), Lease)


def test_pages_of_a_load_back_are_free_after_its_scatter_whatever_storage_does():
    """Else the reference loop, which waits for nothing that a storage holds up, raises MemoryError."""
    server = server_with_storage(device_pages=8)
    server.prefill(prompt(16))
    server.settle()
    server.flush_device()
    server.settle()
    server.prefill(prompt(8, 7000))
    server.step(0)
    server.core.commit({})
    server.rank.apply()
    assert server.core.live_transfers()  # and they hang
    server.release(server.admit(prompt(17)))
    server.rank.apply()
    server.core.reset()
    assert server.free() < 8 and server.core.is_busy()
    server.core.commit({})
    server.rank.apply()
    server.check()
    assert server.free() == 8 and not server.core.is_busy()
    assert isinstance(server.try_admit(prompt(32, 1000)), Lease)


def test_pages_on_their_way_back_make_the_cache_busy():
    """Else the reference loop takes a request that waits for them for one that never fits."""
    server = Server(device_pages=8, host_pages=32)
    server.prefill(prompt(16))
    server.flush_device()
    server.settle()
    server.release(server.admit(prompt(17)))
    server.rank.apply()
    server.core.reset()
    assert server.free() < 8
    assert server.core.is_busy()
    assert isinstance(server.try_admit(prompt(32, 1000)), Wait)
    server.core.commit({})
    assert not server.core.is_busy()
    server.rank.apply()
    assert isinstance(server.try_admit(prompt(32, 1000)), Lease)


def node_pins(server: Server) -> list[int]:
    return [node.pins[0] for node in invariants.all_nodes(server.core)]


def test_dropping_the_device_keeps_what_host_memory_has():
    """Design: after a failed donated step, requests come back and load what was backed up."""
    server = Server(FULL, window(6), state(), host_pages=32)
    server.prefill(prompt(24))
    server.rank.apply()
    server.rank.forget_device()
    server.check()
    assert server.match(prompt(24)) == Match(24, 0, 24, 0, ())
    lease = server.admit(prompt(30))
    server.compute(lease, 30)
    server.release(lease)
    server.check_empty()


def test_dropping_the_device_loses_what_was_not_dispatched():
    """A planned backup has nothing to read any more, and a planned load-back has nowhere to go."""
    server = server_with_storage()
    server.prefill(prompt(16))
    server.settle()
    server.prefill(prompt(24))
    assert server.planned(TransferKind.BACKUP)
    server.rank.forget_device()
    server.check()
    assert not server.core.outbox.transfers
    assert server.match(prompt(24)) == Match(16, 0, 16, 0, ())
    assert server.host_free() == 64 - 4
    server.release(server.admit(prompt(17)))
    server.rank.forget_device()
    server.check()
    assert server.free() == 32
    server.check_empty()


def test_a_request_that_waited_through_a_reset_is_served():
    """S1, L7: its ticket is cancelled, the request is not."""
    server = server_with_storage()
    server.store(prompt(40))
    ticket = server.prefetch(prompt(40))
    server.step(0)
    server.core.reset()
    lease = server.admit(ticket.sequence, ticket=ticket)
    assert lease.num_cached_tokens == 0
    server.compute(lease, 41)
    server.release(lease)
    server.check_empty()


def test_namespaces_survive_a_reset():
    server = Server()
    namespace = server.core.new_namespace(model="test")
    server.core.reset()
    assert server.core.new_namespace(model="test") is namespace
    server.prefill(server.sequence(prompt(8), namespace))
    assert server.match(prompt(8)).num_tokens == 8


def test_a_store_that_was_withdrawn_is_planned_again():
    """L1: dropping the device takes back a STORE that was not dispatched; host memory still has what it named."""
    server = server_with_storage()
    server.prefill(prompt(16))
    server.rank.apply()
    server.core.commit({})
    assert server.planned(TransferKind.STORE)
    server.rank.forget_device()
    server.check()
    assert not server.planned(TransferKind.STORE)
    server.settle()
    assert server.storage.page_keys() == server.sequence(prompt(16)).page_keys(4)
    assert server.core.counters["stored_pages"] == server.core.counters["store_pages"] == 4
    server.check_empty()


def test_a_store_that_was_withdrawn_after_storage_had_gone_is_not():
    server = server_with_storage()
    server.prefill(prompt(16))
    server.rank.apply()
    server.core.commit({})
    server.rank.detach()
    server.rank.forget_device()
    server.settle()
    assert not server.storage.page_keys()
    server.check_empty()
