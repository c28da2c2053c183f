"""L4: a second prefetch of the same keys joins the first."""

from __future__ import annotations

import pytest

from jaxcache.core.prefetch import PrefetchState
from jaxcache.types import PrefetchPolicy, TransferKind, Wait, WritePolicy
from tests.core.helpers import FULL, NEXT, Server, prompt, server_with_storage, state, window


def unfulfilled(server: Server) -> dict[str, int]:
    return {name: n for name, n in server.core.counters.items() if name.startswith("unfulfilled_") and n}


def check_accounts(server: Server) -> None:
    """I12."""
    counters = server.core.counters
    assert sum(unfulfilled(server).values()) + counters["storage_tokens_used"] == counters["agreed_storage_tokens"]


@pytest.mark.parametrize("components", [(FULL,), (FULL, window(6), state(4))], ids=len)
def test_the_same_prompt_is_read_once(components):
    server = server_with_storage(*components)
    server.store(prompt(24))
    first, second = (server.prefetch(prompt(24)) for _ in range(2))
    assert first.prefetch is second.prefetch
    assert len(server.planned(TransferKind.QUERY)) == 1
    assert server.host_free() == 64 - 6
    server.settle()
    leases = [server.admit(ticket.sequence, ticket=ticket) for ticket in (first, second)]
    assert [lease.num_cached_tokens for lease in leases] == [24, 24]
    assert [lease.storage_tokens for lease in leases] == [24, 0]  # the second is served by what the first brought
    assert server.core.counters["joined_prefetches"] == 1
    assert server.core.counters["storage_tokens_used"] == 24
    check_accounts(server)


@pytest.mark.parametrize("when", [PrefetchState.QUERY, PrefetchState.FETCH])
def test_one_cancels_and_the_other_still_gets_it(when):
    server = server_with_storage()
    server.store(prompt(24))
    first, second = (server.prefetch(prompt(24)) for _ in range(2))
    while first.state is not when:
        server.step(0)
    server.core.cancel(first)
    server.core.cancel(first)
    assert (first.done, second.done) == (True, False)
    alone = server.admit(first.sequence, ticket=first)
    assert alone.num_cached_tokens == 0
    server.settle()
    assert server.admit(second.sequence, ticket=second).storage_tokens == 24
    check_accounts(server)


def test_when_both_cancel_everything_is_free_again():
    server = server_with_storage(FULL, window(6))
    server.store(prompt(24))
    tickets = [server.prefetch(prompt(24)) for _ in range(2)]
    while tickets[0].state is not PrefetchState.FETCH:
        server.step(0)
    for ticket in tickets:
        server.core.cancel(ticket)
    server.settle()
    assert server.host_free() == server.host_free("window") == 64
    assert unfulfilled(server) == {"unfulfilled_aborted": 24}
    check_accounts(server)


@pytest.mark.parametrize(
    ("other", "joins"),
    [
        (prompt(24), True),
        (prompt(27), True),  # the same whole pages
        (prompt(32), False),  # two more pages are worth asking for
        (prompt(20), True),  # full attention: what goes beyond does no harm
        (prompt(20) + prompt(4, 5000), False),
        (prompt(24, 1000), False),
    ],
)
def test_who_joins_whom(other, joins):
    server = server_with_storage(prefetch_min_tokens=8)
    server.prefetch(prompt(24))
    assert server.prefetch(other).prefetch.id == (1 if joins else 2)


@pytest.mark.parametrize("num_tokens", [16, 24, 28])
def test_a_window_that_would_lie_beyond_the_prompt_is_not_shared(num_tokens):
    """What is read for a longer prompt has its window at that prompt's end."""
    server = server_with_storage(FULL, window(6))
    server.store(prompt(28))
    server.prefetch(prompt(28))
    ticket = server.prefetch(prompt(num_tokens))
    server.settle()
    assert server.admit(ticket.sequence, ticket=ticket).num_cached_tokens == num_tokens
    assert server.core.counters["joined_prefetches"] == (num_tokens == 28)


def test_nobody_joins_what_is_decided_or_of_another_namespace():
    server = server_with_storage()
    server.store(prompt(24))
    first = server.prefetch(prompt(24))
    other = server.core.prefetch(server.sequence([*prompt(24), NEXT], server.core.new_namespace(model="other")))
    assert other is not None and other.prefetch is not first.prefetch
    while first.state is not PrefetchState.FETCH:
        server.step(0)
    server.core.cancel(first)
    assert server.prefetch(prompt(24)).prefetch is not first.prefetch


def test_nobody_joins_what_is_read_for_a_retired_namespace():
    """K5: the same prompt with the next weights is another."""
    server = server_with_storage()
    server.store(prompt(24))
    old = server.prefetch(prompt(24))
    server.core.retire_namespace(server.namespace)
    server.namespace = server.core.new_namespace(model="test", weights_version="2")
    server.store(prompt(24))
    new = server.prefetch(prompt(24))
    assert new.prefetch is not old.prefetch
    server.settle()
    assert server.admit(new.sequence, ticket=new).storage_tokens == 24
    server.core.cancel(old)
    check_accounts(server)


def test_those_who_share_wait_together():
    server = server_with_storage(prefetch_policy=PrefetchPolicy.WAIT_COMPLETE)
    server.store(prompt(24))
    tickets = [server.prefetch(prompt(24)) for _ in range(2)]
    assert [server.try_admit(t.sequence, ticket=t) for t in tickets] == 2 * [Wait("prefetch")]
    server.settle()
    assert [server.admit(t.sequence, ticket=t).num_cached_tokens for t in tickets] == [24, 24]


@pytest.mark.parametrize("when", [PrefetchState.QUERY, PrefetchState.FETCH])
def test_one_that_will_not_wait_goes_without_and_leaves_it_to_the_other(when):
    """L5: best effort."""
    server = server_with_storage()
    server.store(prompt(24))
    hasty, patient = (server.prefetch(prompt(24)) for _ in range(2))
    while hasty.state is not when:
        server.step(0)
    lease = server.admit(hasty.sequence, ticket=hasty)
    assert (lease.num_cached_tokens, hasty.done, patient.done) == (0, True, False)
    server.settle()
    assert server.admit(patient.sequence, ticket=patient).storage_tokens == 24
    check_accounts(server)


def test_each_token_counts_for_the_request_that_uses_it():
    """L9: of two that ask for different lengths, whoever comes first takes its own."""
    server = server_with_storage()
    server.store(prompt(24))
    long, short = server.prefetch(prompt(24)), server.prefetch(prompt(20))
    assert long.prefetch is short.prefetch
    server.settle()
    assert server.admit(short.sequence, ticket=short).storage_tokens == 20
    assert server.admit(long.sequence, ticket=long).storage_tokens == 4
    assert unfulfilled(server) == {}
    check_accounts(server)


def test_a_capped_hit_takes_nothing_from_the_other():
    server = server_with_storage()
    server.store(prompt(24))
    capped, whole = (server.prefetch(prompt(24)) for _ in range(2))
    server.settle()
    assert server.admit(capped.sequence, ticket=capped, max_cached_tokens=0).storage_tokens == 0
    assert server.admit(whole.sequence, ticket=whole).storage_tokens == 24
    assert unfulfilled(server) == {}


def test_a_ticket_counts_once():
    """A6: the request was retracted and comes again with the ticket that it had."""
    server = server_with_storage()
    server.store(prompt(24))
    ticket = server.prefetch(prompt(24))
    server.settle()
    lease = server.admit(ticket.sequence, ticket=ticket)
    server.compute(lease, 25)
    server.release(lease)
    assert server.admit(ticket.sequence, ticket=ticket).storage_tokens == 0
    server.core.cancel(ticket)
    check_accounts(server)


def test_all_live_ones_are_looked_at():
    server = server_with_storage(FULL, window(6))
    first, second, third = (server.prefetch(prompt(n)) for n in (24, 32, 24))
    assert first.prefetch is third.prefetch is not second.prefetch


def test_a_prefetch_of_a_window_alone_is_shared():
    server = server_with_storage(FULL, window(6), write_policy=WritePolicy.NONE)
    server.prefill(prompt(24))
    for node in list(server.core.tiers.device[1].order):
        server.core.tiers.drop(server.core.tiers.device[1], node)
    assert server.prefetch(prompt(24)).prefetch is server.prefetch(prompt(24)).prefetch
