"""Priorities: a node has that of whoever inserted it with the highest; only eviction_policy="priority" looks at it."""

from __future__ import annotations

from jaxcache.core.eviction import policy
from jaxcache.core.radix_tree import Node
from jaxcache.core.tiers import Tiers


def raise_priority(tiers: Tiers, node: Node, priority: int) -> None:
    """Of a node and everything above it, which never has less.

    Full attention of a lease's path is pinned on the device and takes its place anew when it is released. What may
    leave all the while (host copies, windows left behind, states) takes its new place now.
    """
    looks = policy(tiers.config.eviction_policy).by_priority
    while node.parent is not None and node.priority < priority:
        node.priority = priority
        if looks:
            for residency in tiers.residencies:
                residency.reorder(node)
        node = node.parent
