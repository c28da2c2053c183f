"""Making room: one node of many, and a share of everything. Every victim is the oldest, so nothing of it is warm.

With tenants the floor is the same eviction where the other tenant has few namespaces: their number is to cost nothing.

Caches are filled by requests. The cache of which a share leaves holds conversations: every turn is a node below the
turn before; the first turns of all come before the second ones. With several components every conversation has the
windows and states of two of its turns: the pools are sized so that it can be resumed, and evicts where it must.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from benchmarks.core.loaded_core import EVERY_KIND, FULL, LoadedCore, random_tokens
from benchmarks.core.reference_tree import ReferenceTree
from benchmarks.core.workload import Workload, short
from benchmarks.figure import Figure, Goal, figure
from benchmarks.measure import CPU, take_turns
from jaxcache.config import TenantShare
from jaxcache.replay.replay import WINDOW_TOKENS

ONE_GOAL = Goal("value", "<=", 10)
SHARE_GOAL = Goal("value", "<=", 15)
SHARE_OF_ALL_KINDS_GOAL = Goal("value", "<=", 25)
NAMESPACES_GOAL = Goal("ratio", "<=", 1.5)
FEW_NAMESPACES = 10
RESUMABLE_TURNS = 2


def evict_one(workload: Workload) -> list[Figure]:
    page, num_nodes, node_pages = workload.page_tokens[0], workload.victims, workload.victim_pages
    num_pages = num_nodes * node_pages
    loaded = LoadedCore(page, num_pages)
    tree = ReferenceTree(page, num_pages)
    for tokens in random_tokens(num_nodes, node_pages * page):
        loaded.serve(tokens)
        tree.serve(tokens.tobytes())
    core, free = loaded.core, loaded.core.tiers.device[0].allocator
    assert core.tiers.tree.num_nodes == num_nodes and not free.num_free and not tree.num_free

    def operation():
        return partial(core.tiers.make_room, core.tiers.device[0], free.num_free + node_pages)

    def floor():
        return partial(tree.make_room, tree.num_free + node_pages)

    turns = take_turns(operation, floor, workload.num_evictions)
    assert core.tiers.tree.num_nodes == num_nodes - workload.num_evictions
    meaning = f"evict one of {num_nodes:,} nodes, {num_pages:,} pages resident / stripped tree"
    return [figure("evict_one", meaning, *turns, goal=ONE_GOAL)]


def evict_one_beside_namespaces(workload: Workload) -> list[Figure]:
    many, num_turns = workload.namespaces, min(workload.num_evictions, workload.namespaces // 2)
    both = [served_in(workload, num_namespaces) for num_namespaces in (many, FEW_NAMESPACES)]

    def evicting_one(loaded: LoadedCore):
        free = loaded.core.tiers.device[0].allocator
        return lambda: partial(
            loaded.core.tiers.make_room, loaded.core.tiers.device[0], free.num_free + workload.victim_pages
        )

    turns = take_turns(evicting_one(both[0]), evicting_one(both[1]), num_turns)
    assert [loaded.core.tiers.tree.num_nodes for loaded in both] == [many - num_turns] * 2
    name = f"evict_one_{short(many)}_namespaces"
    meaning = f"evict one of {many:,} nodes of another tenant, in as many namespaces / in {FEW_NAMESPACES}"
    return [figure(name, meaning, *turns, goal=NAMESPACES_GOAL)]


def served_in(workload: Workload, num_namespaces: int) -> LoadedCore:
    """A full device: `workload.namespaces` nodes of one tenant in so many namespaces; another tenant is served."""
    page, num_nodes, node_pages = workload.page_tokens[0], workload.namespaces, workload.victim_pages
    loaded = LoadedCore(page, num_nodes * node_pages, FULL, {"other": TenantShare()})
    core = loaded.core
    spaces = [core.new_namespace(model="bench", tenant="other", salt=str(i)) for i in range(num_namespaces)]
    for i, tokens in enumerate(random_tokens(num_nodes, node_pages * page)):
        loaded.serve(tokens, spaces[i % num_namespaces])
    return loaded


def evict_share(workload: Workload) -> list[Figure]:
    share = f"{workload.evicted_share:.0%}"
    num_pages = workload.conversations * workload.conversation_turns * workload.turn_pages
    return [
        evicting(workload, FULL, "evict_share", f"evict {share} of {num_pages:,} pages", SHARE_GOAL),
        evicting(
            workload,
            EVERY_KIND,
            "evict_share_3_components",
            f"evict {share} of {num_pages:,} pages, of windows and of states",
            SHARE_OF_ALL_KINDS_GOAL,
        ),
    ]


def evicting(workload: Workload, kinds: tuple[str, ...], name: str, meaning: str, goal: Goal) -> Figure:
    """Evicts, fills up with new conversations, and so on. States leave first, so that each leaves in its own order."""
    page, conversations = workload.page_tokens[0], workload.conversations
    ends = RESUMABLE_TURNS * conversations
    device_pages = {
        "full": conversations * workload.conversation_turns * workload.turn_pages,
        "window": ends * min(workload.turn_pages, -(-WINDOW_TOKENS // page)) + workload.turn_pages,
        "state": ends + 2,
    }
    loaded = LoadedCore(page, {kind: device_pages[kind] for kind in kinds}, kinds)
    tree = ReferenceTree(page, device_pages["full"])
    newcomers = int(conversations * workload.evicted_share)
    core, device = loaded.core, loaded.core.tiers.device
    wanted = [int(device_pages[kind] * workload.evicted_share) for kind in kinds]

    def make_room():
        for c in reversed(range(len(kinds))):
            assert core.tiers.make_room(core.tiers.device[c], targets[c])

    for tokens in turns_of(workload, conversations):
        loaded.serve(tokens)
        tree.serve(tokens.tobytes())
    details = {f"{kind}_entries": float(num_entries(loaded, c)) for c, kind in enumerate(kinds)}
    targets = [0] * len(kinds)

    def operation():
        for tokens in turns_of(workload, newcomers):
            loaded.serve(tokens)
        targets[:] = [r.allocator.num_free + pages for r, pages in zip(device, wanted, strict=True)]
        return make_room

    def floor():
        for tokens in turns_of(workload, newcomers):
            tree.serve(tokens.tobytes())
        return partial(tree.make_room, tree.num_free + wanted[0])

    turns = take_turns(operation, floor, workload.share_evictions, CPU)
    us_in_ms = ([us / 1000 for us in times] for times in turns)
    return figure(name, f"{meaning} / stripped tree", *us_in_ms, unit="ms", goal=goal, details=details)


def turns_of(workload: Workload, conversations: int) -> Iterator[np.ndarray]:
    """Prompts: the first turns of all conversations, then the second ones, which begin with the first ones, ..."""
    turn_tokens = workload.turn_pages * workload.page_tokens[0]
    whole = random_tokens(conversations, workload.conversation_turns * turn_tokens)
    for turn in range(workload.conversation_turns):
        for tokens in whole:
            yield tokens[: (turn + 1) * turn_tokens]


def num_entries(loaded: LoadedCore, c: int) -> int:
    """Nodes that hold pages of component c."""
    stack, found = loaded.core.tiers.tree.all_roots(), 0
    while stack:
        node = stack.pop()
        stack += node.children.values()
        found += node.pages[c] is not None
    return found
