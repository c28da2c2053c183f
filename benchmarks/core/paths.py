"""Pinning a path of many nodes and letting it go: alone, and as admit and release do. The floor is the stripped tree.

All start warm: `prepare` does the same once just before. The match is no part of it.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from benchmarks.core.loaded_core import LoadedCore, growing, random_tokens
from benchmarks.core.reference_tree import ReferenceTree
from benchmarks.core.workload import Workload
from benchmarks.figure import Figure, Goal, figure
from benchmarks.measure import Action, take_turns
from jaxcache.core.lease import Lease
from jaxcache.types import Wait

LOCK_GOAL = Goal("value", "<=", 30)


def path(workload: Workload) -> list[Figure]:
    num_nodes, num = workload.path_nodes, workload.num_turns
    tokens = random_tokens(workload.prompt_tokens)
    ours = PinnedPath(tokens, workload.page_tokens[0], num_nodes)
    floor = LockedPath(tokens, workload.page_tokens[0], num_nodes)
    both = take_turns(lambda: ours.pin_and_unpin, lambda: floor.lock_and_unlock, num)
    admits = take_turns(ours.admitting, floor.locking, num)
    releases = take_turns(ours.releasing, floor.unlocking, num)
    nodes = f"{num_nodes} nodes"
    return [
        figure(f"lock_unlock_{num_nodes}_nodes", f"lock + unlock {nodes} / stripped tree", *both, goal=LOCK_GOAL),
        figure(f"admit_{num_nodes}_nodes", f"admit {nodes}, matched before / lock in the stripped tree", *admits),
        figure(f"release_{num_nodes}_nodes", f"release {nodes} / unlock in the stripped tree", *releases),
    ]


class PinnedPath:
    """A prompt in so many nodes of a core, and a request that finds all of it."""

    def __init__(self, tokens: np.ndarray, page_tokens: int, num_nodes: int):
        self.loaded = LoadedCore(page_tokens, len(tokens) // page_tokens + 1)
        for prefix in growing(tokens, num_nodes):
            self.loaded.serve(prefix)
        *_, self.last = nodes = self.loaded.path(tokens)
        assert len(nodes) == num_nodes, f"{nodes=}"
        self.core = self.loaded.core
        self.device = self.core.tiers.device[0]
        self.sequence = self.loaded.sequence(np.append(tokens, random_tokens(1)))
        assert self.core.match(self.sequence).num_tokens == len(tokens)

    def pin_and_unpin(self) -> None:
        self.device.pin_up(self.last)
        self.device.unpin_up(self.last)

    def admit(self) -> Lease:
        lease = self.core.admit(self.sequence, 1)
        assert not isinstance(lease, Wait)
        return lease

    def admitting(self) -> Action:
        self.loaded.release_all()
        self.core.release(self.admit())
        return partial(self.core.admit, self.sequence, 1)

    def releasing(self) -> Action:
        self.admitting()
        return partial(self.core.release, self.admit())


class LockedPath:
    """The same nodes in the stripped tree."""

    def __init__(self, tokens: np.ndarray, page_tokens: int, num_nodes: int):
        self.tree = ReferenceTree(page_tokens, len(tokens) // page_tokens)
        for prefix in growing(tokens, num_nodes):
            self.tree.serve(prefix.tobytes())
        self.leaf, found = self.tree.match(tokens.tobytes())
        assert found == len(tokens) * 4

    def lock_and_unlock(self) -> None:
        self.tree.lock(self.leaf)
        self.tree.unlock(self.leaf)

    def locking(self) -> Action:
        while self.leaf.pins:
            self.tree.unlock(self.leaf)
        self.lock_and_unlock()
        return partial(self.tree.lock, self.leaf)

    def unlocking(self) -> Action:
        self.locking()()
        return partial(self.tree.unlock, self.leaf)
