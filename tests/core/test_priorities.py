"""Priorities of inserted prompts: who leaves first, what an insert raises, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from jaxcache.core import invariants
from jaxcache.core.invariants import all_nodes
from jaxcache.core.prefix_cache import PrefixCache
from tests.core.helpers import FULL, NEXT, Server, make_core, prompt, state, window
from tests.core.serving import compute, found, serve, start

A, B, C, OTHER = (prompt(8, first) for first in (1000, 2000, 3000, 4000))  # two pages each


def core_with(*priorities: int, policy: str = "priority", **fields: Any) -> tuple[PrefixCache, Any]:
    """A, B, C, ... were served with these priorities, and fill the device."""
    core = make_core(FULL, device_pages=2 * len(priorities), eviction_policy=policy, **fields)
    namespace = core.new_namespace(model="test")
    for tokens, priority in zip((A, B, C), priorities, strict=False):
        serve(core, tokens, namespace, priority=priority)
    return core, namespace


def remaining(core: PrefixCache, namespace: Any) -> list[bool]:
    return [found(core, tokens, namespace).num_tokens == 8 for tokens in (A, B, C)]


def test_the_lowest_priority_leaves_first():
    """E7: whatever was used last."""
    core, namespace = core_with(5, 3, 4)
    serve(core, OTHER, namespace, priority=9)
    assert remaining(core, namespace) == [True, False, True]
    serve(core, prompt(8, 5000), namespace, priority=9)
    assert remaining(core, namespace) == [True, False, False]


def test_equal_priorities_leave_in_the_order_of_their_last_use():
    """E7."""
    core, namespace = core_with(2, 2, 2)
    serve(core, [*A, NEXT], namespace)
    assert remaining(core, namespace) == [True, False, True]


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "slru", "s3fifo", "adaptive"])
def test_other_policies_do_not_look_at_it(policy):
    """E7: the same victims in the same order with priorities and without."""
    left = []
    for priorities in ((5, 3, 4), (0, 0, 0)):
        core, namespace = core_with(*priorities, policy=policy)
        serve(core, OTHER, namespace)
        left.append(([node for node, *_ in core.tiers.evictions], remaining(core, namespace)))
    assert left[0] == left[1]


def test_a_page_keeps_the_highest_priority_it_was_inserted_with():
    """E7: a later insert with a lower one takes nothing away."""
    core, namespace = core_with(5, 3, 4)
    serve(core, [*A, NEXT], namespace, priority=1)
    assert remaining(core, namespace) == [True, False, True]


def test_an_insert_raises_everything_above_it_and_a_split_copies_it():
    """E7: a prefix is never worth less than what follows it; and the part cut off is worth what it was."""
    core = make_core(FULL, device_pages=32, eviction_policy="priority")
    namespace = core.new_namespace(model="test")
    serve(core, A, namespace, priority=1)
    serve(core, [*A, *B], namespace, priority=4)
    serve(core, [*A, *B, *C], namespace, priority=2)
    serve(core, [*A, *B[:4], *C], namespace)
    priorities = {(node.start, node.end): node.priority for node in all_nodes(core)}
    assert priorities == {(0, 8): 4, (8, 12): 4, (12, 16): 4, (16, 24): 2, (12, 20): 0}


def test_what_may_leave_meanwhile_takes_its_new_place():
    """E7: the host copy of a running prompt is a candidate all the while; its priority counts from the insert on."""
    core = make_core(FULL, device_pages=32, host_pages=4, eviction_policy="priority")
    namespace = core.new_namespace(model="test")
    serve(core, A, namespace)
    serve(core, B, namespace)
    lease = start(core, [*A, NEXT], namespace)
    core.insert(lease, 8, priority=7)
    serve(core, C, namespace)  # its backup needs two of the four host pages
    host = core.tiers.host[0]
    in_host = {bytes(node.first_page) for node in all_nodes(core) if node.pages[host.index] is not None}
    assert core.sequence(A, namespace).data[:16] in in_host
    assert core.sequence(B, namespace).data[:16] not in in_host
    core.release(lease)
    invariants.check(core)


@pytest.mark.parametrize("component", [state(), window(4)], ids=["state", "window"])
def test_states_and_windows_take_their_new_place(component):
    """E7: what the request does not need any more itself may leave while it runs."""
    core = make_core(FULL, component, device_pages=32, eviction_policy="priority")
    namespace = core.new_namespace(model="test")
    serve(core, A, namespace)
    lease = start(core, [*A, *B, NEXT], namespace)
    compute(core, lease, priority=7)
    serve(core, C, namespace, priority=3)
    priorities = [node.priority for node in core.tiers.device[1].order]
    assert {3, 7} <= set(priorities)
    assert priorities == sorted(priorities)
    core.release(lease)
    invariants.check(core)


def test_a_priority_is_part_of_the_digest():
    """E7, I8: ranks that were told different priorities have diverged."""
    digests = [core_with(priority)[0].digest for priority in (0, 0, 1, 2)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize("priority", [True, 1.5, "1", None, -1])
def test_a_priority_is_an_int_from_zero_up(priority):
    server = Server()
    lease = server.admit(prompt(8))
    server.compute(lease, 8)
    digest = server.core.digest
    with pytest.raises(ValueError, match="priority must be an int of at least 0"):
        server.core.insert(lease, 8, priority=priority)
    assert (server.core.digest, lease._published) == (digest, 0)
    server.insert(lease, 8)
