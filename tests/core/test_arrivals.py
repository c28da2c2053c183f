"""What a FETCH brought and what it did not: what is believed of storage then, what is backed up, who is to blame."""

from __future__ import annotations

import pytest

from jaxcache.core.prefetch import PrefetchState, Ticket
from jaxcache.types import Outcome, Tier, TransferKind, WritePolicy
from tests.core.helpers import FULL, Server, prompt, server_with_storage, window


def reading(server: Server, tokens: list[int]) -> Ticket:
    """A prefetch of this whole prompt, of which nothing has come yet."""
    ticket = server.prefetch(tokens)
    while ticket.state is not PrefetchState.FETCH:
        server.step(0)
    return ticket


# ---- what is believed of storage


def test_what_was_only_interrupted_is_not_written_again():
    """L1, L5: storage has it, as its answer to the QUERY said."""
    server = server_with_storage()
    server.prefill(prompt(16))
    server.settle()
    server.core.reset()
    ticket = reading(server, prompt(16))
    assert server.prefill(ticket.sequence, ticket=ticket) == 0
    server.settle()
    assert server.core.counters["unfulfilled_deadline"] == 16
    assert server.core.counters["backup_pages"] == 4 + 4
    assert server.core.counters["stored_pages"] == 4


def test_only_what_a_fetch_asked_for_and_did_not_get_is_doubted():
    """L1: by component; what came of the others is where it was."""
    server = server_with_storage(FULL, window(6))
    server.prefill(prompt(32))
    server.settle()
    server.core.reset()
    ticket = reading(server, prompt(32))
    server.core.take_plan()
    before = list(server.core.stores.known_stored)
    server.core.commit({ticket.prefetch.id: Outcome(True, True, {"full": 8, "window": 1})})
    lost = ("window", server.sequence(prompt(32)).page_keys(8)[7])
    assert lost in before
    assert list(server.core.stores.known_stored) == [belief for belief in before if belief != lost]


# ---- what is backed up for it


def test_a_fetch_that_brought_nothing_backs_nothing_up():
    """L4: nothing will hang below the ancestors."""
    for components in ((FULL,), (FULL, window(6))):
        server = server_with_storage(*components, write_policy=WritePolicy.NONE)
        server.prefill(prompt(16))
        server.store(prompt(24))
        ticket = reading(server, prompt(24))
        server.core.take_plan()
        server.core.commit({ticket.prefetch.id: Outcome(True, True, {"full": 0, "window": 2})})
        server.check()
        assert not server.planned(TransferKind.BACKUP)
        assert (server.host_free(), server.core.counters["unfulfilled_transfer"]) == (64, 8)


def test_a_window_alone_is_worth_backing_up_for():
    """L4: it makes pages that are there usable."""
    server = server_with_storage(FULL, window(6), write_policy=WritePolicy.NONE)
    server.prefill(prompt(24))
    for node in list(server.core.tiers.device[1].order):
        server.core.tiers.drop(server.core.tiers.device[1], node)
    server.store(prompt(24))
    ticket = reading(server, prompt(24))
    server.core.take_plan()
    server.core.commit({ticket.prefetch.id: Outcome(True, True, {"full": 0, "window": 2})})
    server.check()
    assert server.planned(TransferKind.BACKUP)
    assert server.match(prompt(24)).num_tokens == 24


# ---- who is to blame


@pytest.mark.parametrize("when", ["it is asked for", "it arrives"])
def test_nobody_is_blamed_for_what_leaves_host_memory_for_storage(when):
    """The lease that was admitted last has nothing to do with it; `explain` says so."""
    asked = when == "it is asked for"
    server = server_with_storage(host_pages=4 if asked else 8)
    server.prefill(prompt(16))
    server.settle()
    server.core.attachment.change(None, WritePolicy.NONE)
    server.prefill(prompt(8, 1000))
    server.store([*prompt(24, 1000)])
    reading(server, prompt(24, 1000))
    assert (server.host_free() == 0) and (server.core.tiers.host[0].num_resident > 0) is not asked
    server.settle()
    lost = server.core.explain(server.sequence(prompt(16))).lost
    assert [(eviction.tier, eviction.reason, eviction.lease) for _, eviction in lost] == [(Tier.HOST, "room", 0)]
