"""Every order of eviction: what is characteristic of it, and what all of them promise.

Documents are two pages each, named by a letter; `uses` serves them one after another, one page more for the next token.
"""

from __future__ import annotations

import numpy as np
import pytest

from jaxcache.core.eviction import POLICIES, policy
from jaxcache.core.eviction.adaptive import Adaptive
from jaxcache.core.eviction.queues import Queued, S3Fifo
from jaxcache.core.invariants import all_nodes
from jaxcache.core.node import Node
from jaxcache.replay import workloads
from jaxcache.replay.replay import Replay, Setting
from tests.core.helpers import FULL, PAGE, Server, prompt, state

LETTERS = "ABCDEFGH"
IN_ORDER = sorted(set(POLICIES) - {"s3fifo"})


def serve(name: str, uses: str, device_pages: int = 20) -> Server:
    server = Server(device_pages=device_pages, eviction_policy=name)
    use(server, uses)
    return server


def use(server: Server, uses: str) -> None:
    for letter in uses:
        server.prefill(prompt(9, 1000 * LETTERS.index(letter)))


def order_of(server: Server):
    return server.core.tiers.device[0].order


def letter_of(node: Node) -> str:
    return LETTERS[int(np.frombuffer(node.edge, np.int32)[0]) // 1000]


def departures(server: Server) -> str:
    """Evicts everything, one victim after another."""
    letters, device = "", server.core.tiers.device[0]
    while (victim := device.order.first()) is not None:
        letters += letter_of(victim)
        server.core.tiers.drop(device, victim)
        server.check()
    return letters


@pytest.mark.parametrize(
    ("name", "uses", "expected"),
    [
        ("lru", "ABCA", "BCA"),
        ("lfu", "AAABBC", "CBA"),
        ("lfu", "ABCB", "ACB"),  # lru among equals
        ("fifo", "ABCAB", "ABC"),
        ("slru", "AABC", "BCA"),  # one hit protects from a scan
        ("slru", "ABAC", "BCA"),
        ("s3fifo", "AABCD", "BCAD"),  # A has proved itself, and two pages are the small queue's share
        ("adaptive", "ABCA", "BCA"),  # nothing learned yet
    ],
)
def test_what_leaves_first(name, uses, expected):
    """E4."""
    assert departures(serve(name, uses)) == expected


def test_slru_protects_a_share_only():
    """The oldest that is protected goes back on probation."""
    assert departures(serve("slru", "AABBCCD", device_pages=10)) in ("DABC", "ADBC")
    assert departures(serve("slru", "ABCABC", device_pages=7)) == "ABC"


def test_priority_lower_first_and_lru_among_equals():
    server = serve("priority", "ABCD")
    for node in all_nodes(server.core):
        node.priority = {"A": 1, "B": 0, "C": 1, "D": 0}[letter_of(node)]
    use(server, "DCBA")
    assert departures(server) == "DBCA"


def test_s3fifo_remembers_what_it_evicted():
    server = serve("s3fifo", "A")
    departures(server)
    use(server, "AB")
    order = order_of(server)
    assert isinstance(order, S3Fifo)
    assert [letter_of(node) for node in order.main] == ["A"]
    assert [letter_of(node) for node in order.small] == ["B"]


def test_s3fifo_gives_second_chances():
    """What was hit in the main queue goes round again."""
    server = serve("s3fifo", "AB")
    departures(server)
    use(server, "ABAAB")
    assert departures(server) == "BA"


@pytest.mark.parametrize("name", ["slru", "s3fifo"])
def test_a_parent_whose_last_child_left_leaves_by_its_own_last_use(name):
    """In its queue: before what was used later, behind what was used before."""
    server = Server(device_pages=100, eviction_policy=name)
    parents = [prompt(8, 1000 * i) for i in range(3)]
    use(server, "DEDE")
    for parent in parents:
        server.prefill([*parent, *prompt(5, 50_000)])
    use(server, "FGF")
    for parent in parents:
        server.prefill([*parent, *prompt(5, 60_000)])
    use(server, "GHH")
    device = server.core.tiers.device[0]
    for node in [node for node in all_nodes(server.core) if node.start]:
        server.core.tiers.drop(device, node)
    order = order_of(server)
    assert isinstance(order, Queued)
    (queue,) = [queue for queue in order.queues if {letter_of(node) for node in queue} >= set("ABC")]
    letters = "".join(letter_of(node) for node in queue)
    assert letters.removeprefix("DE") == "FABCGH"  # s3fifo gives these two a second chance


@pytest.mark.parametrize("name", ["slru", "s3fifo"])
def test_queues_know_that_the_oldest_was_trimmed(name):
    """In place, a page at a time, which nobody tells the order."""
    server = Server(device_pages=20, eviction_policy=name)
    server.prefill(prompt(60))
    order = order_of(server)
    assert isinstance(order, Queued)
    (node,) = order
    for num_pages in (14, 9, 3):
        server.core.tiers.make_room(server.core.tiers.device[0], 20 - num_pages)
        assert order.first() is node and node.end == num_pages * PAGE
        assert [queue.num_pages for queue in order.queues if queue] == [num_pages]


def learned_from(name: str) -> Replay:
    """Half of the requests go to 20 documents, the others are never asked again."""
    replay = Replay(Setting(16, 20 * 9 * 16, policy=name))
    for request in workloads.requests(workloads.scan(np.random.default_rng(0), 20), 800, 8, 16):
        replay.request(request)
    return replay


def test_adaptive_keeps_the_kind_that_is_used_again():
    """Documents that came once leave soon, even if they are the latest; lru holds them all the same."""
    replay = learned_from("adaptive")
    order = replay.core.tiers.device[0].order
    assert isinstance(order, Adaptive) and order.duel.learned_leads
    counts = [node.use.count for node in order if node.start == 0]
    assert counts[0] == 0
    assert np.mean(np.array(counts) > 0) > 0.6
    assert replay.hit_rate() > learned_from("lru").hit_rate() + 0.05


def test_adaptive_moves_on_what_has_aged():
    """As often as the profile values everything anew."""
    replay = learned_from("adaptive")
    order = replay.core.tiers.device[0].order
    assert isinstance(order, Adaptive)
    order.profile._recount()
    order.first()
    for (_, _, age), nodes in order._cells.items():
        assert order.profile.age(next(iter(nodes)).use.at) <= age


def test_adaptive_weighs_windows_and_states_by_what_they_spare():
    """Tokens down from the state above, in powers of two, for each page."""
    server = Server(FULL, state(), eviction_policy="adaptive", device_pages=64)
    for end in (9, 13, 45):
        server.prefill(prompt(end))
    device = server.core.tiers.device[1]
    order = device.order
    assert isinstance(order, Adaptive)
    order.duel.learned_leads = True
    assert {node.end: order._weight(node) for node in order} == {8: 4, 12: 3, 44: 6}
    first = order.first()
    assert first is not None and first.end == 12
    server.core.tiers.drop(device, next(node for node in order if node.end == 8))
    assert {node.end: order._weight(node) for node in order} == {12: 4, 44: 6}


# ---- what all of them promise


@pytest.mark.parametrize("name", POLICIES)
def test_holds_what_may_leave_and_nothing_else(name):
    """I3: `in` and `len`; to discard what is not there is harmless."""
    server = serve(name, "ABACD")
    order = order_of(server)
    nodes = all_nodes(server.core)
    assert len(order) == len(nodes) == 4
    assert all(node in order for node in nodes)
    assert sorted(letter_of(node) for node in order) == list("ABCD")
    lease = server.admit(prompt(9))
    pinned = lease._node
    assert pinned not in order and len(order) == 3
    order.discard(pinned)
    assert len(order) == 3 and len(list(order)) == 3
    server.release(lease)
    assert pinned in order


@pytest.mark.parametrize("name", IN_ORDER)
def test_iterates_in_the_order_of_leaving(name):
    server = serve(name, "ABCADBBEFA")
    expected = "".join(letter_of(node) for node in order_of(server))
    assert departures(server) == expected


def test_iterates_in_the_order_of_leaving_after_it_has_learned():
    order = learned_from("adaptive").core.tiers.device[0].order
    first = order.first()
    nodes = list(order)
    assert nodes[0] is first
    for node in nodes:
        assert order.first() is node
        order.discard(node)
    assert order.first() is None and not len(order)


def test_s3fifo_iterates_over_all():
    """Their order is only decided as they leave."""
    server = serve("s3fifo", "ABCADBBEFA")
    assert sorted(letter_of(node) for node in order_of(server)) == sorted(departures(server))


def test_an_unknown_policy_is_said():
    with pytest.raises(ValueError, match=r"'adaptive'.*'lru'.*not 'best'"):
        policy("best")
