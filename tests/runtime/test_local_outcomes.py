"""Which live transfers the lanes carry when there are more of them: in the same order everywhere, and none for ever."""

from __future__ import annotations

import pytest

from jaxcache.agreement import local_outcomes
from jaxcache.core.prefetch import PrefetchState
from jaxcache.types import Outcome
from tests.core.helpers import Server, prompt, server_with_storage

LANES = {"max_live_transfers": 3, "max_stores": 1, "host_pages": 640, "device_pages": 64}


def exchange(server: Server, outcome: Outcome) -> list[int]:
    """One step in which all that is carried has this outcome; returns what was carried."""
    server.core.take_plan()
    ids = list(local_outcomes.outcomes(server.core, {}, lambda query: True))
    server.core.commit(dict.fromkeys(ids, outcome), 0)
    return ids


def test_those_that_are_too_many_wait_their_turn():
    server = server_with_storage(**LANES)
    tickets = [server.prefetch(prompt(8, 1000 * i)) for i in range(5)]
    ids = [ticket.prefetch.id for ticket in tickets]
    assert exchange(server, Outcome(True, True)) == ids[:3]
    assert exchange(server, Outcome(True, True)) == ids[3:]
    assert not server.core.live_transfers()


@pytest.mark.parametrize("num_undecided", [2, 3, 5])
def test_what_only_awaits_quiet_has_a_lane_however_many_are_undecided(num_undecided):
    """L6, X19: its pages would never be free again."""
    server = server_with_storage(**LANES)
    cancelled = [server.prefetch(prompt(8, 1000 * i)) for i in range(2)]
    for i in range(num_undecided):
        server.prefetch(prompt(8, 50_000 + 1000 * i))
    for ticket in cancelled:
        server.core.cancel(ticket)
    carried_ids = []
    for _ in range(4):
        for_quiet = {ticket.prefetch.id for ticket in cancelled if ticket.state is not PrefetchState.DONE}
        server.core.take_plan()
        ids = list(local_outcomes.outcomes(server.core, {}, lambda query: True))
        carried_ids += ids
        server.core.commit({id: Outcome(id in for_quiet, id in for_quiet) for id in ids}, 0)
    assert all(ticket.state is PrefetchState.DONE for ticket in cancelled)
    assert len(set(carried_ids)) >= 2 + min(2, num_undecided)


def test_the_undecided_keep_all_lanes_but_one():
    """However many only await quiet: a storage that hangs keeps nobody waiting."""
    server = server_with_storage(**LANES)
    hung = [server.prefetch(prompt(8, 1000 * i)) for i in range(5)]
    for ticket in hung:
        server.core.cancel(ticket)
    new = [server.prefetch(prompt(8, 50_000 + 1000 * i)) for i in range(2)]
    assert set(exchange(server, Outcome(False, False))) > {ticket.prefetch.id for ticket in new}


def test_stores_of_a_storage_that_is_gone_share_one_lane():
    """L7: they and those that hang in its successor would take all lanes for ever, as they have the lowest ids."""
    server = server_with_storage(**{**LANES, "max_stores": 2, "max_live_transfers": 4})
    for first in (0, 1000):
        server.prefill(prompt(8, first))
    exchange(server, Outcome(False, False))
    hung = server.core.live_transfers()
    server.core.attachment.detach()
    server.core.attachment.attach("another")
    exchange(server, Outcome(True, False))
    assert len(hung) == 2 and server.core.unwanted_transfers() == hung
    assert len(server.core.live_transfers()) == 4
    ticket = server.prefetch(prompt(8, 50_000))
    assert ticket.prefetch.id in exchange(server, Outcome(True, False))
