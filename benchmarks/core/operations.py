"""Splitting and inserting. A floor is the least that Python can do for it, or the stripped tree.

All start warm: `prepare` does the same once, with the same bytes or with a twin, just before.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial
from itertools import count
from typing import Any

import numpy as np

from benchmarks.core.loaded_core import EVERY_KIND, FULL, LoadedCore, random_tokens
from benchmarks.core.reference_tree import ReferenceTree
from benchmarks.core.workload import Workload, short
from benchmarks.figure import Figure, Goal, figure
from benchmarks.measure import take_turns
from jaxcache.core.lease import Lease
from jaxcache.core.node import Node
from jaxcache.core.tokens import Sequence
from jaxcache.types import Wait

SPLIT_GOAL = Goal("value", "<=", 20)
DUPLICATE_GOAL = Goal("ratio", "<=", 3)


def split(workload: Workload) -> list[Figure]:
    return [
        split_anywhere(workload, FULL, "split", "split a node"),
        split_anywhere(workload, EVERY_KIND, "split_3_components", "split a node with 3 components"),
    ]


def split_anywhere(workload: Workload, kinds: tuple[str, ...], name: str, meaning: str) -> Figure:
    """A new node every time, cut at places all over it: where little is left of an edge, that is copied."""
    page, num_tokens = workload.page_tokens[0], workload.prompt_tokens
    twins = random_tokens(2, num_tokens)
    loaded = LoadedCore(page, 2 * (num_tokens // page + 2), kinds)
    cuts = count(1)

    def new_nodes() -> list[Node]:
        loaded.clear()
        for tokens in twins:
            loaded.serve(tokens)
        return [loaded.path(tokens)[0] for tokens in twins]

    def twice(cut: Callable[[Node, int], Any]):
        first, second = new_nodes()
        pages = second.end // page
        at = page * (1 + next(cuts) * (pages - 2) // (2 * workload.num_turns))
        cut(first, at)
        return partial(cut, second, at)

    operation, floor = partial(twice, loaded.core.tiers.split), partial(twice, partial(take_views, page))
    turns = take_turns(operation, floor, workload.num_turns)
    return figure(name, f"{meaning} of {short(num_tokens)} / views of both halves", *turns, goal=SPLIT_GOAL)


def take_views(page_tokens: int, node: Node, at: int) -> tuple:
    view, pages = memoryview(node.edge), node.pages[0]
    assert pages is not None
    rest, k = view[at * 4 :], at // page_tokens
    return view[: at * 4], rest, bytes(rest[: page_tokens * 4]), pages[:k], pages[k:]


def insert(workload: Workload) -> list[Figure]:
    return [insert_duplicate(workload), insert_new(workload)]


def insert_duplicate(workload: Workload) -> Figure:
    """A request that was computed although the tree has all of it; its floor is finding that out."""
    page, num_tokens = workload.page_tokens[0], workload.prompt_tokens
    tokens = random_tokens(num_tokens + 1)
    loaded = LoadedCore(page, 2 * (num_tokens // page + 1))
    core = loaded.core
    loaded.serve(tokens[:-1])

    def admit(sequence: Sequence) -> Lease:
        lease = core.admit(sequence, num_tokens + 1, max_cached_tokens=0)
        assert not isinstance(lease, Wait)
        return lease

    def operation():
        loaded.release_all()
        sequence = loaded.sequence(tokens)
        twin = copy(sequence)
        lease = admit(sequence)
        core.insert(lease, num_tokens + 1)
        core.release(lease)
        return partial(core.insert, admit(twin), num_tokens + 1)

    def floor():
        sequence = loaded.sequence(tokens)
        unmatched = copy(sequence)
        core.match(sequence)
        return partial(core.match, unmatched)

    turns = take_turns(operation, floor, workload.num_turns)
    assert core.counters["duplicate_pages"] == 2 * workload.num_turns * (num_tokens // page)
    meaning = f"insert a duplicate of {short(num_tokens)} / match it"
    return figure(f"insert_duplicate_{short(num_tokens)}", meaning, *turns, goal=DUPLICATE_GOAL)


def insert_new(workload: Workload) -> Figure:
    page, before, new = workload.page_tokens[0], workload.insert_after_tokens, workload.insert_tokens
    shared = random_tokens(before)
    twins = [np.append(shared, random_tokens(new)) for _ in range(2)]
    num_pages = (before + 2 * new) // page
    loaded = LoadedCore(page, num_pages)

    def operation():
        loaded.clear()
        loaded.serve(shared)
        first, second = (loaded.core.admit(loaded.sequence(tokens), new) for tokens in twins)
        assert not isinstance(first, Wait) and not isinstance(second, Wait) and second.num_cached_tokens == before
        loaded.core.insert(first, before + new)
        return partial(loaded.core.insert, second, before + new)

    def floor():
        tree = ReferenceTree(page, num_pages)
        first, second = (tokens.tobytes() for tokens in twins)
        tree.serve(first[: before * 4])
        node, found = tree.match(first)
        assert found == before * 4
        tree.lock(node)
        tree.insert(node, found, first)
        return partial(tree.insert, node, found, second)

    turns = take_turns(operation, floor, workload.num_turns)
    meaning = f"insert {short(new)} new tokens after {short(before)} / stripped tree"
    return figure(f"insert_{short(new)}_after_{short(before)}", meaning, *turns)
