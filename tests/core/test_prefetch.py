"""Storage prefetches: what is asked, what ranks agree on, what becomes the tree's, when reserved pages are freed."""

from __future__ import annotations

import pytest

from jaxcache.core.prefetch import PrefetchState, Ticket
from jaxcache.types import Match, Outcome, PrefetchPolicy, TransferKind, Wait, WritePolicy
from tests.core.helpers import FULL, PAGE, Server, prompt, server_with_storage, state, step_all, window

NO_WRITES = {"write_policy": WritePolicy.NONE}


def until(server: Server, ticket: Ticket, wanted: PrefetchState) -> None:
    """Steps without any page moved until the ticket is there."""
    for _ in range(100):
        if ticket.state is wanted:
            return
        server.step(0)
    raise AssertionError(f"{ticket} never became {wanted.name}")


def forget(server: Server, component: str, tokens: list[int]) -> None:
    """Storage loses the page (or state) that ends with these tokens."""
    server.storage.lose(0, component, server.sequence(tokens).page_keys(len(tokens) // PAGE)[-1])


def unfulfilled(server: Server) -> dict[str, int]:
    counters = server.core.counters
    prefix = "unfulfilled_"
    return {name.removeprefix(prefix): n for name, n in counters.items() if name.startswith(prefix) and n}


def check_accounts(server: Server) -> None:
    """I12: every agreed storage-hit token was used, or is unfulfilled for one reason."""
    counters = server.core.counters
    assert sum(unfulfilled(server).values()) + counters["storage_tokens_used"] == counters["agreed_storage_tokens"]


@pytest.mark.parametrize("components", [(FULL,), (FULL, window(6)), (FULL, window(6), state(8))])
def test_what_another_replica_stored_is_used(components):
    """L3, L4: pages, window and state come together, are computed by nobody, and are counted as used."""
    server = server_with_storage(*components)
    server.store(prompt(40))
    ticket = server.prefetch(prompt(40))
    server.settle()
    assert ticket.state is PrefetchState.DONE
    lease = server.admit(ticket.sequence, ticket=ticket)
    assert (lease.num_cached_tokens, lease.storage_tokens, lease.host_tokens) == (40, 40, 0)
    server.compute(lease, 41)
    server.insert(lease, 41)
    server.release(lease)
    assert server.core.counters["storage_hit_tokens"] == 40
    check_accounts(server)
    server.check_empty()


# ---- asking


def test_short_prompts_are_not_asked_for():
    """L2: storage costs more than computing them."""
    server = server_with_storage(prefetch_min_tokens=16)
    assert server.core.prefetch(server.sequence(prompt(16))) is None
    assert server.core.prefetch(server.sequence(prompt(17))) is not None
    server.prefill(prompt(12, 1000))
    assert server.core.prefetch(server.sequence(prompt(24, 1000))) is None
    assert server.core.counters["prefetch_too_short"] == 2


def test_prefetches_reserve_a_share_of_host_memory():
    """L2: and never what is pinned."""
    server = server_with_storage(host_pages=16, prefetch_host_share=0.5)
    first = server.prefetch(prompt(20))
    second = server.prefetch(prompt(100, 1000))
    assert [len(ticket.prefetch.pages[0]) for ticket in (first, second)] == [5, 3]
    assert server.core.prefetch(server.sequence(prompt(100, 2000))) is None
    assert server.host_free() == 8


def test_nothing_is_asked_for_that_the_match_could_not_use():
    """L2, X14: at least one token is computed, and an end lies on the grid of every component."""
    server = server_with_storage(FULL, window(6), state(8))
    ticket = server.core.prefetch(server.sequence(prompt(48)))
    (query,) = server.planned(TransferKind.QUERY)
    ends = {move.component: list(move.page_ends) for move in query.moves}
    assert ticket.prefetch.end == 40
    assert ends["full"] == list(range(4, 41, 4))
    assert ends["state"] == [8, 16, 24, 32, 40]
    assert ends["window"] == list(range(4, 41, 4))
    assert [len(pages) for pages in ticket.prefetch.pages] == [10, 2, 1]
    keys = server.sequence(prompt(48)).page_keys(12)
    assert list(query.moves[0].page_keys) == keys[:10]


def test_only_what_is_not_there_is_asked_for():
    """L3: full pages beyond the match, and the windows at every possible end."""
    server = server_with_storage(FULL, window(6))
    server.prefill(prompt(16))
    server.rank.apply()
    ticket = server.prefetch(prompt(32))
    (query,) = server.planned(TransferKind.QUERY)
    ends = {move.component: list(move.page_ends) for move in query.moves}
    assert (ticket.prefetch.matched_end, ticket.prefetch.start, ticket.prefetch.end) == (16, 16, 32)
    assert ends == {"full": [20, 24, 28, 32], "window": [16, 20, 24, 28, 32]}


def test_a_missing_window_is_asked_for_although_the_pages_are_there():
    """L3: it unlocks full attention that could not be used."""
    server = server_with_storage(FULL, window(6), **NO_WRITES)
    server.prefill(prompt(24))
    for node in list(server.core.tiers.device[1].order):
        server.core.tiers.drop(server.core.tiers.device[1], node)
    server.store(prompt(24))
    assert server.match(prompt(24)) == Match(0, 0, 0, 24, (24,))
    server.prefetch(prompt(24))
    server.settle()
    assert server.match(prompt(24)).num_tokens == 24


def test_a_fetch_names_all_values_that_may_hold_its_pages():
    """An end that is agreed on may lie inside a unit of storage, and inside a value that goes on after it."""
    server = server_with_storage(FULL, state(4), storage_unit_pages={"full": 8})
    server.store(prompt(60))
    for end in range(24, 61, 4):
        forget(server, "state", prompt(end))
    ticket = server.prefetch(prompt(60))
    server.step()
    server.step()
    fetch = server.rank.engine.storage_io.live[ticket.prefetch.id].transfer
    assert fetch.kind is TransferKind.FETCH
    full, of_state = fetch.moves
    keys = server.sequence(prompt(60)).page_keys(15)
    assert (list(full.page_keys), list(full.later_keys)) == (keys[:5], keys[5:8])
    assert full.page_ends == (4, 8, 12, 16, 20)
    assert (of_state.page_ends, of_state.later_keys) == ((20,), ())


# ---- agreement


@pytest.mark.parametrize(
    ("states", "agreed_end"),
    [(({8, 16}, {8, 16}), 16), (({8, 16}, {8, 12}), 8), (({16}, {12}), 0), (({8, 12}, set()), 0)],
)
def test_the_largest_end_that_all_ranks_can_serve(states, agreed_end):
    """L3: ends of states form sets, so the least of the largest ends is not the answer yet."""
    servers = [server_with_storage(FULL, state(4)) for _ in states]
    tickets = []
    for server, ends in zip(servers, states, strict=True):
        server.store(prompt(16))
        for end in {4, 8, 12, 16} - ends:
            forget(server, "state", prompt(end))
        tickets.append(server.prefetch(prompt(16)))
    agreed = None
    for _ in range(60):
        agreed = step_all(servers, agreed)
    for server, ticket in zip(servers, tickets, strict=True):
        assert (ticket.state, ticket.prefetch.agreed_end) == (PrefetchState.DONE, agreed_end)
        assert server.match(prompt(16)).num_tokens == agreed_end


def test_what_one_rank_failed_to_read_is_a_miss_on_all():
    """L3, L4, X8: the page counts that ranks agreed on decide, not those of one rank."""
    servers = [server_with_storage() for _ in range(3)]
    tickets = []
    for server in servers:
        server.store(prompt(32))
        tickets.append(server.prefetch(prompt(32)))
    agreed = None
    while tickets[0].state is PrefetchState.QUERY:
        agreed = step_all(servers, agreed)
        if tickets[0].state is PrefetchState.FETCH:
            forget(servers[1], "full", prompt(20))
    for _ in range(10):
        agreed = step_all(servers, agreed)
    for server in servers:
        assert server.match(prompt(32)).num_tokens == 16
        assert unfulfilled(server) == {"transfer": 16}


# ---- what came


def test_full_pages_may_end_up_shorter_than_asked():
    """L4, L9."""
    server = server_with_storage()
    server.store(prompt(32))
    ticket = server.prefetch(prompt(32))
    until(server, ticket, PrefetchState.FETCH)
    forget(server, "full", prompt(24))
    server.settle()
    lease = server.admit(ticket.sequence, ticket=ticket)
    assert lease.storage_tokens == lease.num_cached_tokens == 20
    assert unfulfilled(server) == {"transfer": 12}
    check_accounts(server)
    server.compute(lease, 33)


@pytest.mark.parametrize("component", ["window", "state"])
def test_a_window_or_state_that_fails_does_not_throw_away_full_pages(component):
    """L4, R5: it comes whole or not at all."""
    server = server_with_storage(FULL, window(6), state(4))
    server.store(prompt(32))
    ticket = server.prefetch(prompt(32))
    until(server, ticket, PrefetchState.FETCH)
    forget(server, component, prompt(32))
    server.settle()
    assert server.match(prompt(32)) == Match(0, 0, 0, 32, (32,))
    assert server.host_free("full") == 64 - 8
    assert server.host_free(component) == 64
    lease = server.admit(ticket.sequence, ticket=ticket)
    server.compute(lease, 33)
    assert unfulfilled(server) == {"transfer": 32}


def test_missing_host_ancestors_are_backed_up_first():
    """L4, I6."""
    server = server_with_storage(**NO_WRITES)
    server.prefill(prompt(8))
    server.store(prompt(24))
    ticket = server.prefetch(prompt(24))
    assert ticket.prefetch.start == 8
    server.settle()
    assert server.core.counters["backup_pages"] == 2
    assert (server.match(prompt(24)).device_tokens, server.match(prompt(24)).host_tokens) == (8, 16)
    lease = server.admit(ticket.sequence, ticket=ticket)
    assert lease.storage_tokens == 16
    server.compute(lease, 25)


def test_without_room_for_the_ancestors_the_pages_are_unfulfilled():
    """L4, L9."""
    server = server_with_storage(host_pages=4, **NO_WRITES)
    server.prefill(prompt(8))
    server.store(prompt(24))
    server.prefetch(prompt(24))
    server.settle()
    assert server.match(prompt(24)).num_tokens == 8
    assert unfulfilled(server) == {"host_capacity": 16}
    assert server.host_free() == 4


def test_what_the_tree_has_meanwhile_is_a_duplicate():
    """L4, L9."""
    server = server_with_storage()
    server.store(prompt(24))
    ticket = server.prefetch(prompt(24))
    until(server, ticket, PrefetchState.FETCH)
    server.prefill(prompt(16))
    server.settle()
    assert server.host_free() == 64 - 6
    lease = server.admit(ticket.sequence, ticket=ticket)
    assert (lease.device_tokens, lease.storage_tokens) == (16, 8)
    assert unfulfilled(server) == {"already_present": 16}
    check_accounts(server)


# ---- policies


def test_best_effort_takes_what_has_come_so_far():
    """L5."""
    server = server_with_storage()
    server.store(prompt(40))
    ticket = server.prefetch(prompt(40))
    until(server, ticket, PrefetchState.FETCH)
    server.rank.apply()
    server.step(3)
    server.step(0)
    lease = server.admit(ticket.sequence, ticket=ticket)
    assert lease.storage_tokens == 3 * PAGE
    assert unfulfilled(server) == {"deadline": 7 * PAGE}
    server.compute(lease, 41)
    server.settle()
    check_accounts(server)


def test_wait_complete_holds_the_request_until_it_is_decided():
    """A1, L5."""
    server = server_with_storage(prefetch_policy=PrefetchPolicy.WAIT_COMPLETE)
    server.store(prompt(40))
    ticket = server.prefetch(prompt(40))
    digest = server.core.digest
    assert server.try_admit(ticket.sequence, ticket=ticket) == Wait("prefetch")
    assert server.core.digest == digest
    server.settle()
    assert server.admit(ticket.sequence, ticket=ticket).storage_tokens == 40


def test_admitting_while_a_window_is_still_being_read():
    """X4: the window's host pages stay reserved, and nobody gets them, until the reading has stopped everywhere."""
    server = server_with_storage(FULL, window(6), host_pages=12)
    server.store(prompt(32))
    ticket = server.prefetch(prompt(32))
    until(server, ticket, PrefetchState.FETCH)
    server.rank.apply()
    server.step(8)  # full attention comes first
    server.step(0)
    assert not server.rank.engine.storage_io.live[ticket.prefetch.id].status().quiet
    reserved = set(ticket.prefetch.pages[1].tolist())
    lease = server.admit(ticket.sequence, ticket=ticket)
    assert lease.num_cached_tokens == 0
    assert set(ticket.prefetch.pages[1].tolist()) == reserved
    assert server.host_free("window") == 10
    server.compute(lease, 33)
    server.insert(lease, 33)
    for first in (1000, 2000):
        server.prefill(prompt(16, first))
    window_host = server.core.tiers.host[1]
    resident = [node.pages[window_host.index] for node in window_host.order]
    assert not reserved & {id for pages in resident for id in pages.tolist()}
    server.settle()
    assert ticket.state is PrefetchState.DONE
    server.release(lease)
    check_accounts(server)
    server.check_empty()


# ---- giving up


@pytest.mark.parametrize("moved", [0, 2])
@pytest.mark.parametrize("when", [PrefetchState.QUERY, PrefetchState.FETCH])
def test_cancel_frees_what_was_reserved_once_and_only_when_quiet(when, moved):
    """L6."""
    server = server_with_storage(FULL, window(6))
    server.store(prompt(40))
    ticket = server.prefetch(prompt(40))
    until(server, ticket, when)
    server.step(moved)
    free = server.host_free()
    server.core.cancel(ticket)
    server.core.cancel(ticket)
    server.check()
    assert server.host_free() == free
    (live,) = server.core.live_transfers()
    assert server.core.unwanted_transfers() == [live]
    server.core.commit({live: Outcome(done=True, quiet=False)})
    assert server.host_free() == free
    server.core.commit({live: Outcome(done=True, quiet=True)})
    assert ticket.state is PrefetchState.DONE
    assert (server.host_free("full"), server.host_free("window")) == (64, 64)
    assert unfulfilled(server) == ({"aborted": 40} if when is PrefetchState.FETCH else {})
    check_accounts(server)
    server.core.cancel(ticket)


def test_a_prefetch_past_its_deadline_keeps_its_pages_until_quiet():
    """X19, L9: some thread may still write into them."""
    server = server_with_storage()
    server.store(prompt(32))
    ticket = server.prefetch(prompt(32))
    until(server, ticket, PrefetchState.FETCH)
    server.core.take_plan()
    server.core.commit({ticket.prefetch.id: Outcome(done=True, quiet=False, pages={"full": 2})})
    assert server.match(prompt(32)).num_tokens == 8
    assert (len(ticket.prefetch.pages[0]), server.host_free()) == (6, 64 - 8)
    server.core.commit({ticket.prefetch.id: Outcome(done=True, quiet=True, pages={"full": 2})})
    assert server.host_free() == 64 - 2
    server.core.cancel(ticket)
    assert unfulfilled(server) == {"transfer": 24, "aborted": 8}
    check_accounts(server)


def test_storage_without_the_prompt_costs_nothing():
    """L3, L9."""
    server = server_with_storage()
    ticket = server.prefetch(prompt(32))
    server.settle()
    assert ticket.state is PrefetchState.DONE
    assert server.host_free() == 64
    assert server.core.counters["prefetch_misses"] == 1
    assert server.core.counters["agreed_storage_tokens"] == 0
    assert server.admit(ticket.sequence, ticket=ticket).num_cached_tokens == 0


@pytest.mark.parametrize(("config", "options"), [({"load_back_min_tokens": 64}, {}), ({}, {"max_cached_tokens": 0})])
def test_what_came_and_was_not_taken_is_counted(config, options):
    """L9: a load-back below the threshold, or a capped hit."""
    server = server_with_storage(**config)
    server.store(prompt(32))
    ticket = server.prefetch(prompt(32))
    server.settle()
    assert server.admit(ticket.sequence, ticket=ticket, **options).num_cached_tokens == 0
    assert unfulfilled(server) == {"not_taken": 32}
    check_accounts(server)


@pytest.mark.parametrize("components", [(FULL,), (FULL, window(6)), (FULL, window(9), state(8))], ids=len)
def test_the_largest_end_is_what_the_definition_says(components, rng):
    """L3: the largest end at which all that `required` names is there; whatever storage has."""
    server = server_with_storage(*components)
    server.prefill(prompt(8))
    ticket = server.prefetch(prompt(80))
    moves = {move.component: move for move in server.planned(TransferKind.QUERY)[0].moves}
    grid = server.core.tiers.grid_tokens
    seen = {}
    for _ in range(100):
        share = rng.choice([0.5, 0.9, 1.0])
        exists = {name: rng.random(len(move.page_keys)) < share for name, move in moves.items()}
        there = {n: {e for e, found in zip(m.page_ends, exists[n], strict=True) if found} for n, m in moves.items()}
        want = 0
        for end in range(grid, ticket.prefetch.end + 1, grid):
            needed = {c.name: range(c.required(end).start // PAGE * PAGE + PAGE, end + 1, PAGE) for c in components}
            needed["full"] = range(ticket.prefetch.start + PAGE, end + 1, PAGE)
            if "state" in needed:
                needed["state"] = range(end, end + 1)
            if end > ticket.prefetch.matched_end and all(set(ends) <= there[name] for name, ends in needed.items()):
                want = end
        assert server.core.largest_end(ticket.prefetch.id, exists) == want
        seen[want] = None
    assert len(seen) > 2
