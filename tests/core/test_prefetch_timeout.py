"""L5: PrefetchPolicy.TIMEOUT waits for so long, by stage 0's clock, then takes what has come."""

from __future__ import annotations

import pytest

from jaxcache.core.lease import Lease
from jaxcache.core.prefetch import PrefetchState, Ticket
from jaxcache.core.prefetches import MAX_WAIT_MS
from jaxcache.types import CLOCK_MODULUS, Outcome, PrefetchPolicy, Wait
from tests.core.helpers import Server, prompt, server_with_storage

TIMEOUT = {
    "prefetch_policy": PrefetchPolicy.TIMEOUT,
    "prefetch_timeout_s": 0.1,
    "prefetch_timeout_s_per_1k_tokens": 1.0,
}
ALLOWANCE_MS = 100 + 40  # for 40 tokens


def asked(**fields) -> tuple[Server, Ticket]:
    """A server that reads 40 tokens from storage, of which 12 have come."""
    server = server_with_storage(**{**TIMEOUT, **fields})
    server.store(prompt(40))
    ticket = server.prefetch(prompt(40))
    while ticket.state is not PrefetchState.FETCH:
        server.step(0)
    server.core.take_plan()
    tick(server, ticket, 0)
    return server, ticket


def tick(server: Server, ticket: Ticket, clock_ms: int, quiet: bool = False) -> None:
    progress = Outcome(done=False, quiet=quiet, pages={"full": 3})
    server.core.commit({ticket.prefetch.id: progress}, clock_ms % CLOCK_MODULUS)
    server.check()


@pytest.mark.parametrize("start_ms", [0, 5_000_000, CLOCK_MODULUS - 60])
def test_it_waits_for_so_long_and_takes_what_has_come(start_ms):
    server, ticket = asked()
    tick(server, ticket, start_ms)
    digest = server.core.digest
    assert server.try_admit(ticket.sequence, ticket=ticket) == Wait("prefetch")
    assert server.core.digest == digest
    tick(server, ticket, start_ms + 1)  # held up since then
    tick(server, ticket, start_ms + ALLOWANCE_MS)
    assert server.try_admit(ticket.sequence, ticket=ticket) == Wait("prefetch")
    tick(server, ticket, start_ms + ALLOWANCE_MS + 1)
    assert ticket.done and server.core.counters["prefetch_timeouts"] == 1
    lease = server.admit(ticket.sequence, ticket=ticket)
    assert lease.storage_tokens == 12
    assert server.core.counters["unfulfilled_deadline"] == 28
    assert server.host_free() == 64 - 10  # until it is quiet
    server.core.take_plan()
    server.core.commit({ticket.prefetch.id: Outcome(True, True, {"full": 3})}, start_ms)
    assert server.host_free() == 64 - 3


def test_queueing_does_not_count():
    """The clock starts when the request could have been admitted, not when it began to wait for others."""
    server, ticket = asked()
    tick(server, ticket, 10_000)
    assert not ticket.done
    server.try_admit(ticket.sequence, ticket=ticket)
    tick(server, ticket, 20_000)
    assert not ticket.done


def test_a_step_without_an_exchange_has_no_clock():
    server, ticket = asked()
    server.try_admit(ticket.sequence, ticket=ticket)
    tick(server, ticket, 1000)
    server.core.commit({})
    assert not ticket.done
    tick(server, ticket, 1000 + ALLOWANCE_MS)
    assert ticket.done


def test_what_is_complete_in_time_is_taken_whole():
    server, ticket = asked()
    server.try_admit(ticket.sequence, ticket=ticket)
    server.core.commit({ticket.prefetch.id: Outcome(True, True, {"full": 10})}, 0)
    lease = server.admit(ticket.sequence, ticket=ticket)
    assert isinstance(lease, Lease) and lease.storage_tokens == 40


def test_a_question_that_takes_too_long_is_given_up():
    server = server_with_storage(**TIMEOUT)
    server.store(prompt(40))
    ticket = server.prefetch(prompt(40))
    server.try_admit(ticket.sequence, ticket=ticket)
    for clock_ms in (0, ALLOWANCE_MS):
        server.core.commit({ticket.prefetch.id: Outcome(False, True)}, clock_ms)
    assert ticket.state is PrefetchState.QUERY and ticket.done
    assert server.admit(ticket.sequence, ticket=ticket).num_cached_tokens == 0
    server.settle()
    assert ticket.state is PrefetchState.DONE
    assert server.core.counters["agreed_storage_tokens"] == 0


@pytest.mark.parametrize("policy", [PrefetchPolicy.WAIT_COMPLETE, PrefetchPolicy.BEST_EFFORT])
def test_other_policies_look_at_no_clock(policy):
    server, ticket = asked(prefetch_policy=policy)
    server.core.prefetches.wait_for(ticket)
    tick(server, ticket, 0)
    tick(server, ticket, 1_000_000)
    assert not ticket.done


def test_no_room_is_no_prefetch():
    """Nobody is held up by a prefetch while there is no room anyway."""
    server = server_with_storage(**TIMEOUT)
    server.store(prompt(40))
    server.admit(prompt(120, 5000))  # 31 of 32 device pages
    ticket = server.prefetch(prompt(40))
    assert server.try_admit(ticket.sequence, ticket=ticket) == Wait("no room")
    for clock_ms in (0, 1000, 2000):
        server.core.take_plan()
        server.core.commit({ticket.prefetch.id: Outcome(False, True)}, clock_ms)
    assert not ticket.done


def test_the_one_that_was_held_up_has_left():
    """Of two that share, the other only queues."""
    server = server_with_storage(**TIMEOUT)
    server.store(prompt(40))
    held, queued = (server.prefetch(prompt(40)) for _ in range(2))
    server.try_admit(held.sequence, ticket=held)
    server.core.cancel(held)
    for clock_ms in (0, 1000, 2000):
        server.core.take_plan()
        server.core.commit({queued.prefetch.id: Outcome(False, True)}, clock_ms)
    assert not queued.done
    server.try_admit(queued.sequence, ticket=queued)
    for clock_ms in (3000, 3000 + ALLOWANCE_MS):
        server.core.commit({queued.prefetch.id: Outcome(False, True)}, clock_ms)
    assert queued.done


def test_another_host_of_stage_0_has_the_smallest_clock_now():
    """A clock that goes back starts the time anew."""
    server, ticket = asked()
    server.try_admit(ticket.sequence, ticket=ticket)
    for clock_ms in (5_000_000, 5_000_010, 3, 13):
        tick(server, ticket, clock_ms)
    assert not ticket.done
    tick(server, ticket, 3 + ALLOWANCE_MS)
    assert ticket.done


def test_the_deadline_decides_once():
    """What has been accepted stays accepted, however long the rest takes to be quiet."""
    server, ticket = asked()
    server.try_admit(ticket.sequence, ticket=ticket)
    for clock_ms in (0, ALLOWANCE_MS, 10 * ALLOWANCE_MS):
        tick(server, ticket, clock_ms)
    assert server.core.counters["prefetch_timeouts"] == 1
    assert server.admit(ticket.sequence, ticket=ticket).storage_tokens == 12
    assert server.core.counters["unfulfilled_aborted"] == 0


@pytest.mark.parametrize(("per_1k_tokens_s", "allowance_ms"), [(1.0, 100 + 24), (999_999, MAX_WAIT_MS - 1)])
def test_the_allowance_is_of_what_is_asked_for(per_1k_tokens_s, allowance_ms):
    """And never so long that the clock comes round."""
    server = server_with_storage(**{**TIMEOUT, "prefetch_timeout_s_per_1k_tokens": per_1k_tokens_s}, host_pages=5000)
    server.prefill(prompt(40))
    num_tokens = 64 if per_1k_tokens_s == 1.0 else 4000
    ticket = server.prefetch(prompt(num_tokens))
    assert server.core.prefetches._allowance_ms(ticket.prefetch) == allowance_ms
