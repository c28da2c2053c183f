"""Making room: what leaves first, what never leaves, and what it costs."""

from __future__ import annotations

import gc
import sys

import pytest

from jaxcache.components.base import Component
from jaxcache.core.eviction.lru import Lru
from jaxcache.core.kinds.window import WindowResidency
from jaxcache.core.pages import Residency
from jaxcache.types import Match, TransferKind, WritePolicy
from tests.core.helpers import FULL, PAGE, Server, prompt, state, window


def test_write_through_drops_from_the_device_what_host_memory_has():
    """E1: nothing is copied at eviction."""
    server = Server(device_pages=4, host_pages=16)
    server.prefill(prompt(16))
    server.rank.apply()
    server.admit(prompt(16, 1000))
    assert server.match(prompt(16)).host_tokens == 16
    assert not server.core.outbox.transfers


def test_without_a_host_copy_an_evicted_page_is_gone():
    """E1."""
    server = Server(device_pages=4)
    server.prefill(prompt(16))
    server.admit(prompt(16, 1000))
    assert server.match(prompt(16)).num_tokens == 0


def test_write_back_copies_what_leaves_the_device():
    """E1: and nothing earlier."""
    server = Server(device_pages=4, host_pages=16, write_policy=WritePolicy.WRITE_BACK)
    server.prefill(prompt(16))
    assert not server.core.outbox.transfers
    lease = server.admit(prompt(12, 1000))
    (backup,) = server.core.outbox.transfers
    assert (backup.kind, len(backup.moves[0].src_page_ids)) == (TransferKind.BACKUP, 3)
    server.compute(lease, 12)
    server.release(lease)
    assert (server.match(prompt(16)).device_tokens, server.match(prompt(16)).host_tokens) == (4, 12)
    lease = server.admit([*prompt(15), 77])
    server.compute(lease, 16)


def test_full_attention_leaves_from_the_outside_in():
    """E2: page by page, and no more pages than needed."""
    server = Server(device_pages=8)
    for end in (8, 16, 28):
        server.prefill(prompt(end))
    for num_pages, left in ((1, 28), (2, 24), (4, 16), (5, 12), (7, 4), (8, 0)):
        server.release(server.admit(prompt(num_pages * PAGE, 1000)))
        assert server.match(prompt(28)).num_tokens == left


def test_least_recently_used_first():
    """E4."""
    server = Server(device_pages=8)
    for first in (0, 1000, 2000, 3000):
        server.prefill(prompt(8, first))
    server.prefill(prompt(9))
    server.release(server.admit(prompt(12, 5000)))
    assert [server.match(prompt(8, first)).num_tokens for first in (0, 1000, 2000, 3000)] == [8, 0, 4, 8]


def test_windows_and_states_leave_wherever_they_are():
    """E2: a match simply gets shorter; full attention stays."""
    server = Server(FULL, window(6), device_pages={"full": 64, "window": 6})
    for end in (8, 16, 24):
        server.prefill(prompt(end + 1))
    server.release(server.admit(prompt(12, 1000)))
    assert [server.match(prompt(end)).num_tokens for end in (8, 16, 24)] == [0, 0, 24]
    assert server.match(prompt(16)).unusable_tokens == 16


def test_a_node_goes_with_its_last_full_pages():
    """E2, I7: its window and state go with it, whatever tier they are on."""
    server = Server(FULL, window(6), state(), device_pages={"full": 8, "window": 64, "state": 64})
    server.prefill(prompt(16))
    server.prefill(prompt(24))
    server.release(server.admit(prompt(32, 1000)))
    assert server.core.tiers.tree.num_nodes == 0
    assert (server.free("window"), server.free("state")) == (64, 64)


@pytest.mark.parametrize("components", [(window(6),), (state(4),), (window(6), state(4))])
def test_without_full_attention_a_spine_holds_the_nodes(components):
    """E2: what windows and states have left behind is found, and the next prefill is told where to make them again."""
    server = Server(*components)
    for end in (8, 16, 24):
        server.prefill(prompt(end))
    assert server.match(prompt(24)).num_tokens == 24
    spine, *others = server.core.tiers.device
    for device in others:
        server.core.tiers.make_room(device, 32)
    assert server.match(prompt(24)) == Match(0, 0, 0, 24, (24,))
    server.core.tiers.make_room(spine, spine.allocator.num_pages)
    assert server.core.tiers.tree.num_nodes == 0


def test_a_pinned_entry_never_leaves():
    """E3: nor does anything that a pinned request needs leave with a neighbour."""
    server = Server(FULL, window(6), state(), device_pages=16, host_pages=8)
    server.prefill(prompt(16))
    server.prefill([*prompt(16), *prompt(8, 1000)])
    lease = server.admit(prompt(20))
    assert lease.num_cached_tokens == 16
    for first in (2000, 3000, 4000):
        server.prefill(prompt(40, first))
    assert not server.try_admit(prompt(48, 5000))
    server.compute(lease, 20)
    server.release(lease)
    server.check_empty()


def num_lines(server: Server, first: int) -> int:
    """How many lines an admit that evicts one page runs, those of loops as often as they are run."""
    sequence = server.sequence(prompt(3, first))
    lines = 0

    def count(frame, event, argument):
        nonlocal lines
        lines += event == "line"
        return count

    gc.disable()  # a collection calls what others have registered
    before = sys.gettrace()
    sys.settrace(count)
    try:
        server.core.admit(sequence, 3)
    finally:
        sys.settrace(before)
        gc.enable()
    return lines


def costs_of_an_eviction(components: tuple[Component, ...]) -> list[int]:
    """With few and with many nodes."""
    costs = []
    for num_prompts in (20, 800):
        server = Server(*components, device_pages=num_prompts)
        for i in range(num_prompts):
            lease = server.core.admit(server.sequence(prompt(4, 1000 * i)), 4)
            server.core.insert(lease, 4)
            server.core.release(lease)
        assert server.core.tiers.tree.num_nodes >= num_prompts - 1
        costs.append(num_lines(server, 1_900_000))
        assert server.core.tiers.num_evicted_pages[0] >= 1
    return costs


@pytest.mark.parametrize("components", [(FULL,), (FULL, window(6), state(4))])
def test_an_eviction_costs_the_same_in_a_large_cache(components):
    """E6: the number of operations does not depend on how many nodes are resident."""
    few, many = costs_of_an_eviction(components)
    assert few == many


@pytest.mark.mutation
def test_a_search_for_the_victim_is_noticed(monkeypatch):
    def first(order: Lru):
        found = None
        for node in order:
            if found is None:
                found = node
        return found

    monkeypatch.setattr(Lru, "first", first)
    few, many = costs_of_an_eviction((FULL,))
    assert few < many


# ---- windows along a conversation


def conversations(window_pages: int, num: int = 3) -> tuple[Server, list[list[int]]]:
    """Each ends with 8 generated tokens, which the loop published one by one."""
    server = Server(FULL, window(6), device_pages={"full": 200, "window": window_pages})
    texts = []
    for first in range(1000, 1000 * (num + 1), 1000):
        lease = server.admit(prompt(17, first))
        server.compute(lease, 17)
        server.insert(lease, 17)
        server.decode(lease, prompt(8, 70_000))
        server.release(lease)
        texts.append([*prompt(17, first), *prompt(8, 70_000)])
    return server, texts


def test_windows_that_are_passed_leave_before_others_and_the_ends_of_turns_last():
    """Not even generated text's: with the pages of two turns, and five for one that runs."""
    server, texts = conversations(window_pages=2 * 2 + 5)
    assert [server.match(text).num_tokens for text in texts] == [24, 24, 24]
    server.check_empty()


def test_a_window_from_which_another_way_goes_on_is_none_that_is_passed():
    server, (text, *_) = conversations(window_pages=60, num=1)
    swa = server.core.tiers.device[1]
    assert next(node.end for node in swa.order) == 16
    lease = server.admit([*text[:17], *prompt(8, 80_000)])
    assert lease.num_cached_tokens == 16
    server.compute(lease, 25)
    server.insert(lease, 25)
    server.release(lease)
    assert next(node.end for node in swa.order) != 16
    server.check_empty()


@pytest.mark.mutation
@pytest.mark.parametrize("changed", ["demote", "output_leaves_first"])
def test_otherwise_turns_lose_their_windows(monkeypatch, changed):
    if changed == "demote":
        monkeypatch.setattr(Residency, "demote", lambda self, node: None)
    else:
        monkeypatch.setattr(WindowResidency, "output_leaves_first", True)
    with pytest.raises(AssertionError):
        test_windows_that_are_passed_leave_before_others_and_the_ends_of_turns_last()
