"""What goes on from host memory to storage, and that a slow or failing storage is in nobody's way."""

from __future__ import annotations

import pytest

from jaxcache.core.pages import UNTOLD
from jaxcache.types import Outcome, TransferKind
from tests.core.helpers import FULL, Server, prompt, server_with_storage, state, window

STORE = TransferKind.STORE


def commit(server: Server, outcomes: dict[int, Outcome] | None = None) -> None:
    server.core.commit(outcomes or {})
    server.check()


def stored(server: Server) -> int:
    return sum(len(move.src_page_ids) for transfer in server.planned(STORE) for move in transfer.moves)


def test_a_store_follows_the_backup():
    """L1: of the same pages, named by their keys."""
    server = server_with_storage(FULL, window(6), state())
    server.prefill(prompt(24))
    (backup,) = server.core.outbox.transfers
    commit(server)
    (_, store) = server.core.outbox.transfers
    for copied, kept in zip(backup.moves, store.moves, strict=True):
        assert kept.component == copied.component
        assert kept.src_page_ids.tolist() == copied.dst_page_ids.tolist()
    keys = server.sequence(prompt(24)).page_keys(6)
    assert [move.page_keys for move in store.moves] == [tuple(keys), tuple(keys[3:]), tuple(keys[4:])]


def test_what_is_stored_is_not_written_again():
    """L1: although it left host memory and came back."""
    server = server_with_storage(host_pages=4)
    server.prefill(prompt(16))
    server.settle()
    server.prefill(prompt(16, 1000))
    server.settle()
    assert server.core.counters["stored_pages"] == 8
    server.prefill(prompt(16), max_cached_tokens=0)
    server.settle()
    assert server.core.counters["backup_pages"] == 12
    assert server.core.counters["stored_pages"] == 8


def test_a_failed_store_is_not_believed():
    """L1, X11: nothing is served later as if it had been written whole."""
    server = server_with_storage(host_pages=4)
    server.prefill(prompt(16))
    commit(server)
    (store,) = server.planned(STORE)
    server.core.take_plan()
    commit(server, {store.id: Outcome(done=True, quiet=True, pages={"full": 3})})
    assert list(server.core.stores.known_stored) == [("full", key) for key in store.moves[0].page_keys[:3]]
    assert server.core.counters["failed_store_pages"] == 1


def test_beliefs_are_bounded():
    """L1."""
    server = server_with_storage(max_stored_beliefs=3)
    for first in (0, 1000, 2000):
        server.prefill(prompt(8, first))
        server.settle()
    last = server.sequence(prompt(8, 2000)).page_keys(2)
    assert [key for _, key in server.core.stores.known_stored][-2:] == last
    assert len(server.core.stores.known_stored) == 3


def test_stores_in_flight_are_capped_and_then_dropped():
    """L1: by one rule on all ranks, and counted."""
    server = server_with_storage(max_stores=1, max_queued_stores=2)
    for first in range(0, 6000, 1000):
        server.prefill(prompt(8, first))
        server.step(0)
    assert len(server.core.stores.live) == 1
    assert len(server.core.stores.queue) == 2
    assert server.core.counters["dropped_stores"] == 3
    server.settle()
    assert server.core.counters["stored_pages"] == 6


def test_a_store_pins_its_host_pages_until_it_is_quiet():
    """L1: done is not enough, a thread may still read them."""
    server = server_with_storage(host_pages=4)
    server.prefill(prompt(16))
    server.step(0)
    (store,) = server.core.live_transfers()
    commit(server, {store: Outcome(done=True, quiet=False, pages={"full": 0})})
    assert server.core.tiers.host[0].num_pinned == 4
    server.prefill(prompt(8, 1000))
    assert server.core.counters["skipped_backup_pages"] == 2
    commit(server, {store: Outcome(done=True, quiet=True, pages={"full": 4})})
    assert server.core.tiers.host[0].num_pinned == 0


def test_a_split_while_a_store_waits_stores_every_page_once():
    """L1, W3."""
    server = server_with_storage(FULL, window(6), max_stores=1)
    server.prefill(prompt(8, 1000))
    server.step(0)
    server.prefill(prompt(16))
    server.release(server.admit([*prompt(12), 77]))
    server.release(server.admit([*prompt(4), 77]))
    server.settle()
    keys = set(server.sequence(prompt(16)).page_keys(4))
    assert set(server.storage.page_keys()) >= keys
    assert server.core.counters["stored_pages"] == server.core.counters["store_pages"] == 2 + 2 + 4 + 3


def test_without_storage_nothing_is_stored():
    server = Server(host_pages=32)
    server.prefill(prompt(16))
    server.settle()
    assert server.core.counters["store_pages"] == 0
    assert server.core.prefetch(server.sequence(prompt(40))) is None


def only_in_front(server: Server, *leaving: int) -> None:
    """Another prompt shares the first half of `prompt(16)`; the other half leaves these residencies."""
    server.release(server.admit([*prompt(8), 77]))
    (_, (end, _)) = server.core.tiers.tree.walk(server.sequence(prompt(16)), 16)
    for index in leaving:
        server.core.tiers.drop(server.core.tiers.residencies[index], end)
    server.check()


LEAVING = pytest.mark.parametrize("leaving", [[1], [0, 1]], ids=["host memory", "the tree"])


@LEAVING
def test_what_is_left_of_a_node_that_was_split_in_the_queue_is_stored(leaving):
    """L1: or it would be neither stored nor counted as dropped."""
    server = server_with_storage(max_stores=1)
    server.prefill(prompt(8, 1000))
    server.step(0)
    server.prefill(prompt(16))
    only_in_front(server, *leaving)
    server.settle()
    keys = server.sequence(prompt(16)).page_keys(4)
    assert [key in server.storage.page_keys() for key in keys] == [True, True, False, False]


@LEAVING
def test_what_is_left_of_a_node_that_was_split_before_the_walk_came_is_stored(leaving):
    """L1, L7."""
    server = Server(host_pages=64)
    server.prefill(prompt(16))
    server.rank.attach()
    only_in_front(server, *leaving)
    server.settle()
    assert server.storage.page_keys() == server.sequence(prompt(16)).page_keys(2)


def test_a_run_that_came_back_longer_is_stored_once():
    """All that counts is what is there when its turn comes."""
    server = server_with_storage(max_stores=1)
    server.prefill(prompt(8, 1000))
    server.step(0)
    server.prefill([7] * 16)
    server.prefill([7] * 24)
    server.core.tiers.drop_subtree(server.core.tiers.tree.walk(server.sequence([7] * 16), 8)[0][0], UNTOLD)
    server.prefill([7] * 32)
    server.settle()
    assert set(server.storage.page_keys()) >= set(server.sequence([7] * 32).page_keys(8))
    assert server.core.counters["stored_pages"] == server.core.counters["store_pages"] == 2 + 8


def test_a_store_of_a_storage_that_is_gone_is_cancelled():
    """What it has begun ends before its host pages are let go."""
    server = server_with_storage()
    server.prefill(prompt(40))
    server.step(0)
    (store,) = server.core.live_transfers()
    server.rank.detach()
    assert server.core.unwanted_transfers() == [store]
    server.step(2)
    assert server.core.tiers.host[0].num_pinned == 10
    server.settle()
    assert 0 < len(server.storage.page_keys()) < 10
    assert server.core.tiers.host[0].num_pinned == server.core.counters["failed_store_pages"] == 0
    server.check_empty()
