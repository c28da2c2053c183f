"""`grow_all` is `grow` for many: the same rooms, decisions and digests, and it says how many have theirs."""

from __future__ import annotations

import random
from typing import Any

import pytest

from jaxcache.core.lease import Lease
from tests.core.helpers import FULL, Server, prompt, state, window

MIXTURES = {"full": (FULL,), "all": (FULL, window(6), state(4))}


def running(server: Server, num_leases: int, rng: random.Random) -> list[Lease]:
    """Requests whose prompts are computed, of different lengths; what they leave behind fills the rest."""
    for first in range(50, 60):
        server.prefill(prompt(30, 1000 * first))
    leases = []
    for first in range(num_leases):
        lease = server.admit(prompt(rng.randrange(5, 14), 1000 * first))
        server.compute(lease, lease.sequence.num_tokens)
        server.insert(lease, lease.sequence.num_tokens)
        leases.append(lease)
    return leases


def decode(server: Server, leases: list[Lease], at_once: bool) -> None:
    """One more token of each."""
    computed = [lease.sequence.num_tokens for lease in leases]
    for lease in leases:
        lease.sequence.extend([7])
    if at_once:
        assert server.core.grow_all(leases, computed) == len(leases)
    else:
        assert all(server.core.grow(*pair, 1) for pair in zip(leases, computed, strict=True))
    server.check()
    for lease, end in zip(leases, computed, strict=True):
        server.compute(lease, end + 1)


@pytest.mark.parametrize("host_pages", [0, 24])
@pytest.mark.parametrize("components", MIXTURES.values(), ids=MIXTURES)
def test_many_at_once_decide_what_they_would_one_by_one(components, host_pages, seed):
    servers = [Server(*components, device_pages=56, host_pages=host_pages) for _ in range(2)]
    for server, at_once in zip(servers, (True, False), strict=True):
        rng = random.Random(seed)
        leases = running(server, 6, rng)
        for _ in range(20):
            decode(server, leases, at_once)
            server.step()
    together, one_by_one = (server.core for server in servers)
    assert together.digest == one_by_one.digest
    assert together.tiers.num_evicted_pages == one_by_one.tiers.num_evicted_pages != [0] * len(components)
    for lease in together.leases.values():
        other = one_by_one.leases[lease.id]
        assert (lease.num_tokens, lease.num_computed) == (other.num_tokens, other.num_computed)
        assert [table is None or len(table) for table in lease.page_ids] == [
            table is None or len(table) for table in other.page_ids
        ]


@pytest.mark.parametrize("components", MIXTURES.values(), ids=MIXTURES)
def test_it_says_how_many_have_room(components):
    """Whoever is retracted makes room for the others, who ask again."""
    server = Server(*components, device_pages={c.name: 6 if c.name == "full" else 30 for c in components})
    leases = [server.admit(prompt(8, 1000 * i)) for i in range(3)]
    for lease in leases:
        server.compute(lease, 8)
        server.insert(lease, 8)
        lease.sequence.extend([7])
    assert server.core.grow_all(leases, [8, 8, 8]) == 0
    server.release(leases.pop())
    assert server.core.grow_all(leases, [8, 8]) == 2
    server.check()
    assert [lease.num_tokens for lease in leases] == [9, 9]


def test_the_room_of_a_page_is_used_up_first():
    """Nothing is evicted, and no table changes, for a token that has its page already."""
    server = Server(device_pages=8)
    leases = [server.admit(prompt(5, 1000 * i)) for i in range(4)]
    tables = [lease.page_tables["full"] for lease in leases]
    digest = server.core.digest
    for computed in (5, 6, 7):
        assert server.core.grow_all(leases, [computed] * 4) == 4
    assert server.core.digest == digest
    assert all(lease.page_tables["full"] is table for lease, table in zip(leases, tables, strict=True))
    assert [lease.num_tokens for lease in leases] == [8] * 4


@pytest.mark.parametrize("num_new_tokens", [0, -1])
def test_mistakes_are_named(num_new_tokens):
    server = Server()
    lease, released = server.admit(prompt(8)), server.admit(prompt(8, 1000))
    server.release(released)
    with pytest.raises(ValueError, match="num_new_tokens"):
        server.core.grow_all([lease], [8], num_new_tokens)
    with pytest.raises(ValueError, match="was released already"):
        server.core.grow_all([lease, released], [8, 8])
    with pytest.raises(ValueError, match="must be in"):
        server.core.grow_all([lease], [3000])
    with pytest.raises(ValueError, match="1 leases, but 0 numbers"):
        server.core.grow_all([lease], [])
    assert server.core.grow_all([], []) == 0


@pytest.mark.parametrize("bad", ["released", "float"])
def test_a_mistake_changes_nothing(bad):
    """Not even what would have been evicted for the leases before it."""
    server = Server(device_pages=8)
    server.prefill(prompt(16, 9000))
    leases = [server.admit(prompt(4, 1000 * i)) for i in range(3)]
    for lease in leases:
        server.compute(lease, 4)
    computed: list[Any] = [4, 4, 4]
    if bad == "released":
        server.release(leases[2])
    else:
        computed[2] = 4.0
    num_evicted, tables = server.core.tiers.num_evicted_pages.copy(), [lease.page_ids[0] for lease in leases]
    with pytest.raises((ValueError, TypeError)):
        server.core.grow_all(leases, computed)
    assert server.core.tiers.num_evicted_pages == num_evicted
    assert all(lease.page_ids[0] is table for lease, table in zip(leases, tables, strict=True))
