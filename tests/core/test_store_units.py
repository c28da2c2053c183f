"""Pages that share a value of storage are of one prompt, and pinned until nobody reads them."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from jaxcache.core.lease import Lease
from jaxcache.core.pages import UNTOLD
from jaxcache.core.stores import _is_at_or_below
from jaxcache.types import Move, Outcome, TransferKind, WritePolicy
from tests.core.helpers import FULL, PAGE, Server, prompt, server_with_storage, state, window

UNIT = 8
STORE = TransferKind.STORE


def server_of(*components, **fields) -> Server:
    units = {component.name: UNIT for component in components}
    return server_with_storage(*components, **{"storage_unit_pages": units, "device_pages": 64, **fields})


def pages_of(*numbers: int) -> list[int]:
    """Tokens of pages that differ by these numbers."""
    return [token for number in numbers for token in range(number * 1000, number * 1000 + PAGE)]


def leave(server: Server, tier: str, num_pages: int) -> None:
    """So many pages of full attention leave a tier, by the order of eviction."""
    (residency,) = getattr(server.core.tiers, tier)
    assert server.core.tiers.make_room(residency, residency.allocator.num_free + num_pages)


def queued_on_two_paths() -> tuple[Server, dict[bytes, bytes]]:
    """A server with an entry of its queue whose runs have come to lie on two paths, and page key -> the key before."""
    p0, p1, p2, b0, b1, c1, d2, r2 = range(1, 9)
    server = server_of(FULL, max_stores=1, evict_output_first=True)
    server.prefill(pages_of(p0, b0, c1))
    server.settle()  # stored
    leave(server, "device", 3)
    leave(server, "host", 3)
    server.prefill(pages_of(90))
    server.step(0)  # a slow STORE takes the only place
    step, server.step = server.step, lambda num_storage_pages=0: step(0)
    leave(server, "device", 1)
    lease = server.admit(pages_of(p0, p1, p2))  # a prompt and its output, published together: two nodes
    server.compute(lease, 3 * PAGE)
    for token in pages_of(b0, b1):
        end = lease.sequence.num_tokens
        lease.sequence.extend([token])
        assert server.core.grow(lease, end, 1)
        server.compute(lease, end + 1)
    server.insert(lease, 5 * PAGE)
    server.release(lease)
    server.step(0)
    for tier, num_pages in [("device", 2), ("device", 3), ("host", 2), ("host", 2)]:
        leave(server, tier, num_pages)  # the output, and the end of the prompt
    prompts = [pages_of(p0, p1, r2), pages_of(p0, b0, c1, d2)]
    for tokens in prompts:
        server.prefill(tokens)
        server.step(0)
    before = {}
    for tokens in prompts:
        keys = server.sequence(tokens).page_keys(len(tokens) // PAGE)
        before |= {key: parent for parent, key in pairwise([server.namespace.digest, *keys])}
    return server, before


def wrong_neighbours(moves: list[Move], before: dict[bytes, bytes]) -> int:
    """How often pages that may share a value do not follow each other in any prompt."""
    num_wrong = 0
    for move in moves:
        for (key, end), (later, later_end) in pairwise(zip(move.page_keys, move.page_ends, strict=True)):
            num_wrong += later_end == end + PAGE and before.get(later) != key
    return num_wrong


def stored_moves(server: Server) -> list[Move]:
    """What is stored until nothing waits any more."""
    moves = []
    for _ in range(50):
        server.core.commit(dict.fromkeys(server.core.live_transfers(), Outcome(done=True, quiet=True)))
        moves += [move for transfer in server.planned(STORE) for move in transfer.moves]
        server.core.take_plan()
    assert not server.core.stores.is_waiting
    return moves


def test_what_waited_together_and_parted_shares_no_value():
    server, before = queued_on_two_paths()
    moves = stored_moves(server)
    assert sum(len(move.page_keys) for move in moves) > 2
    assert wrong_neighbours(moves, before) == 0


@pytest.mark.mutation
def test_mutation_runs_of_several_paths_as_one(monkeypatch):
    """Then a value holds the page of one prompt under the key of another."""
    server, before = queued_on_two_paths()
    monkeypatch.setattr("jaxcache.core.stores._is_at_or_below", lambda node, above: True)
    assert wrong_neighbours(stored_moves(server), before) > 0


def test_at_or_below():
    server = server_of(FULL)
    server.prefill(prompt(8))
    server.prefill([*prompt(4), *prompt(4, 500)])
    (top,) = server.core.tiers.tree.roots[server.namespace.digest].children.values()
    one, other = top.children.values()
    assert _is_at_or_below(one, top)
    assert _is_at_or_below(top, top)
    assert not _is_at_or_below(top, one)
    assert not _is_at_or_below(one, other)


def test_a_split_inside_what_is_stored_leaves_no_pin():
    """I2: what is before a branch is pinned node by node, since a split may part it."""
    server = server_of(FULL, window(100 * PAGE))
    tokens = prompt(20 * PAGE)
    server.prefill(tokens)
    server.settle()
    server.prefill(tokens[: 10 * PAGE] + prompt(6 * PAGE, 5000))
    server.core.commit({})
    (store,) = server.planned(STORE)
    assert [len(move.page_keys) for move in store.moves] == [8, 8], "6 new pages, and 2 before them in their unit"
    server.prefill(tokens[: 3 * PAGE] + prompt(2 * PAGE, 7000))
    server.settle()
    server.check_empty()


def test_what_a_store_reads_above_its_nodes_stays_until_quiet():
    """I5, under write_back: although the node below, with which it was pinned, is dropped."""
    host_pages = {"full": 6, "window": 32}
    server = server_of(
        FULL, window(100 * PAGE), host_pages=host_pages, write_policy=WritePolicy.WRITE_BACK, max_stores=1
    )
    tokens = prompt(2 * PAGE)
    for more in ([], prompt(2 * PAGE, 5000), prompt(6 * PAGE, 9000)):
        tokens = tokens + more
        server.prefill(tokens)
    (top,) = server.core.tiers.tree.roots[server.namespace.digest].children.values()
    (middle,) = top.children.values()
    (last,) = middle.children.values()
    stores = server.core.stores
    full, windows = (device.spill for device in server.core.tiers.device)
    assert full is not None and windows is not None
    windows(top, UNTOLD)
    windows(middle, UNTOLD)
    stores.queue.clear()
    windows(last, UNTOLD)
    full(last, UNTOLD)
    stores.queue.popleft()
    server.step(0)
    (live,) = server.core.live_transfers()
    server.core.commit({live: Outcome(done=True, quiet=False, pages={"full": 0, "window": 0})})
    full(middle, UNTOLD)
    server.check()
    host = server.core.tiers.host[1]
    if top.pages[host.index] is not None:
        server.core.tiers.make_room(host, min(host.available(), 24))
    assert stores.live, "the STORE still reads"
    read = {hold.node.id for hold in stores.tiers.holds[live] if hold.residency is host}
    assert top.id in read
    assert top.pages[host.index] is not None


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kinds", ["full and window", "all", "window"])
def test_splits_and_branches_while_stores_are_live(seed, kinds):
    """All invariants after every call, and everything can be had back in the end."""
    rng = random.Random(seed)
    components = {
        "full and window": (FULL, window(6 * PAGE)),
        "all": (FULL, window(100 * PAGE), state(PAGE)),
        "window": (window(9 * PAGE),),
    }[kinds]
    server = server_with_storage(
        *components,
        device_pages=48,
        host_pages=48,
        storage_unit_pages=rng.choice([4, 8, 16]),
        write_policy=rng.choice([WritePolicy.WRITE_THROUGH, WritePolicy.WRITE_BACK]),
        max_stores=rng.choice([1, 3]),
    )
    beginnings = [prompt(12 * PAGE, 10_000 * i) for i in range(3)]
    for _ in range(40):
        shared = rng.choice(beginnings)[: rng.randrange(1, 12) * PAGE]
        own = prompt(rng.randrange(1, 6) * PAGE, 100_000 + 1000 * rng.randrange(6))
        lease = server.try_admit(shared + own)
        if isinstance(lease, Lease):
            server.compute(lease, len(shared + own))
            server.insert(lease, len(shared + own))
            server.release(lease)
        server.step(rng.choice([0, 0, 1, 3, 1000]))
    server.check_empty()
