"""Matching a cached prompt, against one comparison of the same bytes; and asking again.

Both start warm: the same was done with the same bytes just before.
"""

from __future__ import annotations

from copy import copy
from functools import partial

from benchmarks.core.loaded_core import LoadedCore, growing, random_tokens
from benchmarks.core.workload import Workload, short
from benchmarks.figure import Figure, Goal, figure
from benchmarks.measure import Turns, call_us, samples, take_turns

ONE_NODE_GOAL = Goal("ratio", "<=", 1.3)
MANY_NODES_GOAL = Goal("ratio", "<=", 3)
AGAIN_GOAL = Goal("value", "<=", 2)
CALLS_IN_A_ROW = 1000
CACHES = 12


def match(workload: Workload) -> list[Figure]:
    page, num_tokens = workload.page_tokens[0], workload.prompt_tokens
    figures = [matched(workload, num_tokens, page, 1, None) for num_tokens in workload.short_prompt_tokens]
    for page in workload.page_tokens:
        figures.append(matched(workload, num_tokens, page, 1, ONE_NODE_GOAL))
        figures.append(matched(workload, num_tokens, page, workload.path_nodes, MANY_NODES_GOAL))
    return figures


def matched(workload: Workload, num_tokens: int, page_tokens: int, num_nodes: int, goal: Goal | None) -> Figure:
    """In several new caches: where the bytes lie in memory matters."""
    turns = Turns([], [])
    for _ in range(CACHES):
        some = in_a_new_cache(num_tokens, page_tokens, num_nodes, -(-workload.num_turns // CACHES))
        turns.us.extend(some.us)
        turns.floors.extend(some.floors)
    nodes = "" if num_nodes == 1 else f"_{num_nodes}_nodes"
    where = "one node" if num_nodes == 1 else f"{num_nodes} nodes"
    name = f"match_{short(num_tokens)}{nodes}_page{page_tokens}"
    meaning = f"match {short(num_tokens)} tokens in {where}, page {page_tokens} / one startswith"
    return figure(name, meaning, *turns, goal=goal)


def in_a_new_cache(num_tokens: int, page_tokens: int, num_nodes: int, num_turns: int) -> Turns:
    tokens = random_tokens(num_tokens + 1)
    cached = tokens[:num_tokens]
    loaded = LoadedCore(page_tokens, num_tokens // page_tokens)
    for prefix in growing(cached, num_nodes):
        loaded.serve(prefix)
    nodes = loaded.path(cached)
    assert len(nodes) == num_nodes, f"{nodes=}"
    assert loaded.core.match(loaded.sequence(tokens)).num_tokens == num_tokens
    whole = nodes[0].edge if num_nodes == 1 else cached.tobytes()  # the very same bytes, where they are in one place

    def operation():
        sequence = loaded.sequence(tokens)
        unmatched = copy(sequence)  # of the same bytes
        loaded.core.match(sequence)
        return partial(loaded.core.match, unmatched)

    def floor():
        data = loaded.sequence(tokens).data
        assert data.startswith(whole)
        return partial(data.startswith, whole)

    return take_turns(operation, floor, num_turns)


def rematch(workload: Workload) -> list[Figure]:
    """A request that waits is asked for in every step."""
    page = workload.page_tokens[0]
    tokens = random_tokens(workload.prompt_tokens + 1)
    loaded = LoadedCore(page, len(tokens) // page + 2 * workload.num_turns)
    for prefix in growing(tokens[:-1], workload.path_nodes):
        loaded.serve(prefix)
    sequence = loaded.sequence(tokens)
    again = partial(loaded.core.match, sequence)
    assert again().num_tokens == workload.prompt_tokens

    def after_a_change():
        loaded.serve(random_tokens(page))
        return again

    unchanged = [call_us(again, CALLS_IN_A_ROW) for _ in range(workload.num_turns)]
    changed = samples(after_a_change, workload.num_turns)
    assert again().num_tokens == workload.prompt_tokens
    return [
        figure("rematch", "match again while the tree is the same", unchanged, goal=AGAIN_GOAL),
        figure("rematch_changed", f"match again, {workload.path_nodes} nodes, after another request", changed),
    ]
