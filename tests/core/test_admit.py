"""Admission, growth and release: all or nothing, and nobody's pages but the lease's own."""

from __future__ import annotations

import pytest

from jaxcache.types import TransferKind, Wait
from tests.core.helpers import FULL, NEXT, PAGE, Server, prompt, server_with_storage, state, window


def everything(server: Server) -> tuple:
    """What a call that changes nothing leaves as it is."""
    tiers, core = server.core.tiers, server.core
    free = [residency.allocator.num_free for residency in tiers.residencies]
    orders = [list(residency.order) for residency in tiers.residencies]
    counters = {name: count for name, count in core.counters.items() if name != "waits"}
    return core.digest, core.live_transfers(), free, orders, tiers.tree.num_nodes, counters, len(core.outbox.transfers)


# ---- waiting


def test_wait_leaves_everything_as_it_was():
    """A1."""
    server = Server(FULL, window(6), state(), host_pages=32, device_pages=8)
    server.prefill(prompt(8, 1000))
    running = server.admit(prompt(20))
    before = everything(server)
    answer = server.try_admit([*prompt(8, 1000), *prompt(16, 2000)])
    assert isinstance(answer, Wait)
    assert (answer.reason, bool(answer)) == ("no room", False)
    assert everything(server) == before
    assert server.core.counters["waits"] == 1
    server.release(running)
    assert server.prefill([*prompt(8, 1000), *prompt(16, 2000)]) == 8


def test_a_chunk_larger_than_the_device_waits_and_leaves_the_cache_usable():
    """A1."""
    server = Server(device_pages=8, host_pages=8)
    before = everything(server)
    assert not server.try_admit(prompt(36))
    assert everything(server) == before
    server.prefill(prompt(32))
    assert not server.try_admit(prompt(36, 1000))
    assert server.prefill(prompt(9)) == 8


def test_a_shorter_hit_is_taken_only_while_nothing_else_runs():
    """A1: in an empty system nothing waits for ever."""
    server = Server(device_pages=8)
    server.prefill(prompt(8))
    server.prefill(prompt(28))
    longer = prompt(40)
    running = server.admit([5])
    assert not server.try_admit(longer, chunk=12)
    server.release(running)
    assert server.admit(longer, chunk=12).num_cached_tokens == 8


def test_grow_that_fails_changes_nothing():
    """A1: it means that somebody must be retracted."""
    server = Server(FULL, window(6), device_pages=4)
    lease = server.admit(prompt(8))
    other = server.admit(prompt(8, 1000))
    server.compute(lease, 8)
    before, table = everything(server), lease.page_tables["full"]
    assert not server.core.grow(lease, 8, 1)
    assert everything(server) == before
    assert lease.page_tables["full"] is table
    server.release(other)
    assert server.core.grow(lease, 8, 8)
    assert len(lease.page_tables["full"]) == 4
    assert lease.num_tokens == 16


def test_two_caches_with_the_same_calls_give_the_same_pages():
    """X8: admission is decided by counts that every rank has, not by what one happens to have free."""
    servers = [Server(FULL, window(6), state(), host_pages=16, device_pages=12) for _ in range(2)]
    for server, work in zip(servers, (0, 1000), strict=True):
        for first in (0, 1000, 0, 2000, 1000):
            server.prefill(prompt(20, first))
            server.step(work)
    leases = [server.admit(prompt(24)) for server in servers]
    assert servers[0].core.digest == servers[1].core.digest
    for name in ("full", "window"):
        tables = [lease.page_ids[name == "window"].tolist() for lease in leases]
        assert tables[0] == tables[1]


# ---- load-backs


def on_host_only(server: Server, tokens: list[int]) -> None:
    server.prefill(tokens)
    server.flush_device()
    server.settle()
    assert server.match(tokens).host_tokens == len(tokens)


def test_load_back_is_all_or_nothing():
    """A2: what is promised as cached is all there, or the admit did not happen."""
    server = Server(device_pages=8, host_pages=32)
    on_host_only(server, prompt(16))
    running = server.admit(prompt(16, 1000))
    assert not server.try_admit(prompt(17))
    assert not server.planned(TransferKind.LOAD_BACK)
    server.release(running)
    lease = server.admit(prompt(17))
    assert (lease.num_cached_tokens, lease.host_tokens, lease.device_tokens) == (16, 16, 0)
    (load,) = server.planned(TransferKind.LOAD_BACK)
    assert len(load.moves[0].src_page_ids) == 4
    server.compute(lease, 17)


def test_a_hit_served_entirely_from_host_has_every_component():
    """X1, X3: pages, window and state come back together."""
    server = Server(FULL, window(6), state(), host_pages=32)
    server.prefill(prompt(24))
    server.rank.apply()
    server.rank.forget_device()
    lease = server.admit(prompt(30))
    assert (lease.num_cached_tokens, lease.host_tokens) == (24, 24)
    (load,) = server.planned(TransferKind.LOAD_BACK)
    assert [len(move.src_page_ids) for move in load.moves] == [6, 3, 1]  # of the window also what 20 needs
    server.compute(lease, 30)


def test_a_short_load_back_is_computed_instead():
    """A2."""
    server = Server(host_pages=32, load_back_min_tokens=12)
    on_host_only(server, prompt(8))
    on_host_only(server, prompt(12, 1000))
    assert server.prefill(prompt(9)) == 0
    assert server.core.counters["load_back_pages"] == 0
    assert server.prefill(prompt(13, 1000)) == 12


def test_whoever_hits_pages_that_another_is_loading_waits_for_them_too():
    """A2: nodes carry ready_step, and first_step is the latest of them, whoever planned the load-back."""
    server = Server(host_pages=32)
    on_host_only(server, prompt(16))
    first = server.admit(prompt(17))
    second = server.admit([*prompt(16), 55, 56])
    third = server.admit([*prompt(8), 77])
    now = server.core.step_number
    assert [lease.first_step for lease in (first, second, third)] == [now + 1] * 3
    assert len(server.planned(TransferKind.LOAD_BACK)) == 1
    assert server.admit(prompt(8, 1000)).first_step == now
    for lease in (second, third, first):
        server.compute(lease, lease.sequence.num_tokens)


def test_pages_being_loaded_stay_although_their_lease_is_released():
    """Design section 7: else the late scatter overwrites whoever got the pages."""
    server = Server(device_pages=8, host_pages=32)
    on_host_only(server, prompt(16))
    server.release(server.admit(prompt(17)))
    server.rank.apply()
    assert not server.try_admit(prompt(20, 1000))
    other = server.admit(prompt(16, 1000))
    server.compute(other, 12)
    server.step()
    server.compute(other, 16)
    server.release(other)
    assert server.prefill(prompt(20, 1000)) == 0


def test_a_step_cannot_begin_while_a_load_back_is_unapplied():
    """Its scatter would come after the first step of its lease, and after its pins have gone."""
    server = Server(host_pages=32)
    on_host_only(server, prompt(16))
    lease = server.admit(prompt(17))
    with pytest.raises(RuntimeError, match="apply"):
        server.core.commit({})
    server.compute(lease, 17)


def test_tables_are_refused_while_a_plan_is_unapplied():
    """Snapshot semantics: no model step may run before planned moves are dispatched."""
    server = Server(host_pages=32)
    on_host_only(server, prompt(16))
    running, lease = server.admit(prompt(4, 1000)), server.admit(prompt(17))
    with pytest.raises(RuntimeError, match="apply"):
        _ = running.page_tables
    server.rank.apply()
    assert len(running.page_tables["full"]) == 1
    server.core.commit({})  # now the scatter is due
    with pytest.raises(RuntimeError, match="apply"):
        _ = lease.page_tables
    server.rank.apply()
    server.compute(lease, 17)


# ---- states


def test_a_state_is_copied_on_write():
    """A3: a request reads the tree's slot, writes its own, and the tree's stays."""
    server = Server(FULL, state())
    server.prefill(prompt(8))
    leases = [server.admit([*prompt(8), *prompt(8, first)]) for first in (1000, 2000)]
    node, _ = server.core.tiers.tree.walk(leases[0].sequence, 8)[-1]
    for lease in leases:
        assert lease.num_cached_tokens == 8
        assert lease.read_slot == node.pages[1][0] != lease.write_slot
        server.compute(lease, 16)
    assert server.admit(prompt(9)).num_cached_tokens == 8


# ---- windows


def held(lease, server: Server) -> list[int]:
    """Indices of the window pages that a lease still has."""
    table = lease.page_ids[1]
    absent = server.core.tiers.device[1].allocator.num_pages
    return [i for i, page_id in enumerate(table.tolist()) if page_id != absent]


def test_window_pages_behind_the_window_are_given_back():
    """A4, X18: their places in the table hold num_pages, never -1, which would wrap to the last page."""
    server = Server(FULL, window(6))
    lease = server.admit(prompt(40), chunk=4)
    for end in range(4, 41, 4):
        server.compute(lease, end)
        assert server.core.grow(lease, end, 4)
    assert held(lease, server) == [7, 8, 9, 10]  # 36 is where the same prompt would resume
    assert server.free("window") == 32 - 4
    table = lease.page_tables["window"]
    assert table.tolist()[:7] == [32] * 7
    assert table.min() >= 0


@pytest.mark.parametrize("window_tokens", [1, 3, 4, 5, 8, 9, 16])
@pytest.mark.parametrize("num_decoded", range(9))
def test_a_conversation_can_be_resumed_wherever_it_ended(window_tokens, num_decoded):
    """A4: the window is kept of the newest position at which the request could be resumed, not of the current one."""
    server = Server(FULL, window(window_tokens))
    lease = server.admit(prompt(21))
    server.compute(lease, 21)
    for i in range(num_decoded):
        lease.sequence.extend([500 + i])
        assert server.core.grow(lease, 21 + i, 1)
        server.compute(lease, 22 + i)
    server.insert(lease, 21 + num_decoded)
    server.release(lease)
    assert server.match(lease.sequence.tokens.tolist()).num_tokens == (21 + num_decoded) // PAGE * PAGE


def test_pins_behind_the_window_are_given_back():
    """A4: the tree's window pages too may leave once the request has moved on; its full attention may not."""
    server = Server(FULL, window(6))
    server.prefill(prompt(16))
    lease = server.admit(prompt(40))
    full, swa = server.core.tiers.device
    assert (lease.num_cached_tokens, full.num_pinned, swa.num_pinned) == (16, 4, 3)
    server.compute(lease, 40)
    server.core.grow(lease, 40, 1)
    assert (full.num_pinned, swa.num_pinned) == (4, 0)


def test_window_pages_that_were_given_back_are_not_freed_again():
    """X2: the slots that an old table names belong to somebody else by now."""
    server = Server(FULL, window(6), device_pages={"full": 64, "window": 8})
    old = server.admit(prompt(28), chunk=4)
    for end in range(4, 25, 4):
        server.compute(old, end)
        assert server.core.grow(old, end, 4)
    other = server.admit(prompt(20, 1000))
    server.compute(other, 16)
    server.release(old)
    server.compute(other, 20)
    server.insert(other, 20)
    server.release(other)
    server.check_empty()


# ---- release


def test_release_frees_nothing_that_another_lease_holds():
    """A5."""
    server = Server(FULL, window(6), state(), device_pages=12)
    server.prefill(prompt(16))
    leases = [server.admit([*prompt(16), first]) for first in (1, 2)]
    server.release(leases[0])
    server.flush_device()
    server.compute(leases[1], 17)
    server.release(leases[1])
    server.check_empty()


def test_a_retracted_request_finds_what_it_had_inserted():
    """A6."""
    server = Server(FULL, window(6))
    lease = server.admit(prompt(20), chunk=12)
    server.compute(lease, 12)
    server.insert(lease, 12)
    server.release(lease)
    assert server.prefill(prompt(20)) == 12


@pytest.mark.parametrize(("cap", "cached"), [(0, 0), (3, 0), (4, 4), (11, 8), (100, 16)])
def test_the_hit_can_be_capped(cap, cached):
    """A7: for the log-probabilities of a prompt."""
    server = Server(FULL, window(6))
    for end in range(4, 17, 4):
        server.prefill(prompt(end))
    assert server.admit(prompt(17), max_cached_tokens=cap).num_cached_tokens == cached


def test_a_fork_shares_whole_pages_and_recomputes_the_tail():
    """A7."""
    server = Server(FULL, window(6))
    parent = server.admit(prompt(10))
    server.compute(parent, 10)
    server.insert(parent, 10)
    fork = server.admit(prompt(10))
    assert fork.num_cached_tokens == 8
    tables = [lease.page_tables["full"].tolist() for lease in (parent, fork)]
    assert tables[0][:2] == tables[1][:2]
    assert tables[0][2] != tables[1][2]
    server.compute(fork, 10)
    server.decode(parent, prompt(6, 1000))
    server.decode(fork, prompt(6, 2000))
    for lease in (parent, fork):
        server.release(lease)
        assert server.match(lease.sequence.tokens.tolist()).num_tokens == 16


# ---- no caching


def test_without_caching_nothing_is_ever_found():
    """S5: the same interface, for comparison."""
    server = Server(FULL, window(6), state(), host_pages=32, caching=False)
    for _ in range(2):
        assert server.prefill(prompt(16)) == 0
    assert server.match(prompt(16)).num_tokens == 0
    assert server.core.tiers.tree.num_nodes == 0
    server.check_empty()


def test_a_stalled_store_starves_nobody():
    """A1, L8: it frees no device page, so a hit that does not fit is shortened although the store is still running."""
    server = server_with_storage(device_pages=10)
    server.prefill(prompt(36))
    server.step(num_storage_pages=0)
    assert server.core.stores.live
    lease = server.admit([*prompt(36), *prompt(16, 5000)], chunk=16)
    assert lease.num_cached_tokens < 36
    server.release(lease)
    server.check_empty()


def test_tables_are_for_leases_that_may_run_now():
    server = Server(FULL, host_pages=32)
    server.prefill(prompt(16))
    server.step()
    server.flush_device()
    lease = server.admit([*prompt(16), NEXT])
    assert lease.first_step == server.core.step_number + 1
    with pytest.raises(RuntimeError, match=f"may run from step {lease.first_step} on"):
        _ = lease.page_tables
    with pytest.raises(RuntimeError, match=f"may run from step {lease.first_step} on"):
        server.core.insert(lease, 17)  # nothing can be computed on pages that are not there
    server.core.insert(lease, 16)
    server.step()
    assert len(lease.page_tables["full"]) == 5
    server.release(lease)
    with pytest.raises(ValueError, match="was released"):
        _ = lease.page_tables


def test_many_grow_or_none_does():
    """One that may not run yet is refused before any of those before it has a page, or has said what is computed."""
    server = Server(FULL, host_pages=32)
    server.prefill(prompt(16))
    server.step()
    server.flush_device()
    running = server.admit(prompt(8, 1000))
    server.compute(running, 8)
    waiting = server.admit([*prompt(16), NEXT])
    assert waiting.first_step > server.core.step_number
    before = everything(server)
    with pytest.raises(RuntimeError, match=f"may run from step {waiting.first_step} on"):
        server.core.grow_all([running, waiting], [8, 17])
    assert everything(server) == before
    assert server.core.grow_all([running, waiting], [8, 16]) == 2
    server.release(running)
    server.release(waiting)


def test_one_that_is_named_twice_does_not_go_back():
    server = Server(FULL)
    lease = server.admit(prompt(8))
    server.compute(lease, 8)
    lease.sequence.extend([5, 6, 7])
    server.core.grow(lease, 8, 4)
    assert server.core.grow_all([lease, lease], [12, 11], 4) == 2
    assert (lease.num_computed, lease.num_tokens) == (12, 16)
    server.release(lease)
