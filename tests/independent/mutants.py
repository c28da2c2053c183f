"""Defects, planted one at a time into the core: what the fuzzer must find.

A mutant wraps one function of the core, so that it stays a mutant when other lines of that function change.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
import pytest

from jaxcache.core import backups, tokens, tree
from jaxcache.core.admission import Admission
from jaxcache.core.clearing import Clearing
from jaxcache.core.decisions import Decisions
from jaxcache.core.kinds import base, prefix, window
from jaxcache.core.kinds.prefix import Prefix, PrefixResidency
from jaxcache.core.kinds.state import State
from jaxcache.core.kinds.window import Window
from jaxcache.core.leases import Leases
from jaxcache.core.limits.retention import Retentions
from jaxcache.core.limits.tenants import Accounts
from jaxcache.core.match import Matcher
from jaxcache.core.pages import PageAllocator
from jaxcache.core.prefetches import Prefetches
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.core.stores import Stores
from jaxcache.core.tiers import Tiers
from jaxcache.core.tree import RadixTree


class Mutant(NamedTuple):
    """name: what is wrong. plant: does it. is_rare: it takes more than a second or two until it shows."""

    name: str
    plant: Callable[[pytest.MonkeyPatch], None]
    is_rare: bool = False

    @property
    def num_runs(self) -> int:
        """In how many runs of the fuzzer it must be found, at most."""
        return 200 if self.is_rare else 40


@contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def during(owner: Any, method: str, inner: Any, name: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """While `owner.method` runs, `inner.name` is something else."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        original = getattr(owner, method)

        def mutant(*args: Any, **kwargs: Any) -> Any:
            with swapped(inner, name, value):
                return original(*args, **kwargs)

        patch.setattr(owner, method, mutant)

    return plant


def around(owner: Any, method: str, mutant: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """`mutant(original, *args)` takes the place of `owner.method`."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        original = getattr(owner, method)
        patch.setattr(owner, method, lambda *args, **kwargs: mutant(original, *args, **kwargs))

    return plant


FREE = PageAllocator.free


def nothing(*args: Any) -> None:
    pass


def twice(allocator: PageAllocator, page_ids: np.ndarray) -> None:
    FREE(allocator, page_ids)
    FREE(allocator, page_ids)


def match_without(kind: type) -> Callable[[pytest.MonkeyPatch], None]:
    """Matching does not see some components."""
    return around(kind, "usable", lambda f, self, path: [True] * len(path))


def next_host_page(
    original: Any, self: Admission, lease: Any, kind: Any, num_own: int, loads: Any, moves: list[Any]
) -> None:
    known = len(moves)
    original(self, lease, kind, num_own, loads, moves)
    num_pages = kind.host.allocator.num_pages
    moves[known:] = [move._replace(src_page_ids=(move.src_page_ids + 1) % num_pages) for move in moves[known:]]


def backwards(original: Any, copy: Any) -> np.ndarray:
    return original(copy)[::-1]


def pins_of_prefix_lost(original: Any, self: PrefixResidency, node: Any, prefix: Any, num_pages: int) -> None:
    original(self, node, prefix, num_pages)
    prefix.pins[self.index] = 0


def checkpoints_forgotten(original: Any, self: State, lease: Any) -> None:
    lease.checkpoints.clear()
    original(self, lease)


def one_root(original: Any, self: RadixTree, namespace: Any) -> Any:
    for root in self.roots.values():
        self.roots[namespace.digest] = root
        self.namespaces[namespace.digest] = namespace
        return root
    return original(self, namespace)


def one_page_more(original: Any, self: Prefetches, prefetch: Any, reason: str) -> None:
    name = self.tiers.components[0].name
    most = (prefetch.agreed_end - prefetch.start) // self.tiers.page_tokens
    come = prefetch.progress.get(name, 0)
    prefetch.progress = {**prefetch.progress, name: max(come, min(come + 1, most))}
    original(self, prefetch, reason)


def admits_unnoted(patch: pytest.MonkeyPatch) -> None:
    """Every other cache keeps its admits to itself."""
    numbers, note, init = itertools.count(), Decisions.note, Decisions.__init__
    silent: set[int] = set()

    def made(self: Decisions) -> None:
        init(self)
        silent.discard(id(self))
        if next(numbers) % 2:
            silent.add(id(self))

    def noted(self: Decisions, what: str, *numbers: int) -> None:
        if what != "admit" or id(self) not in silent:
            note(self, what, *numbers)

    patch.setattr(Decisions, "__init__", made)
    patch.setattr(Decisions, "note", noted)


def without_log(original: Any, self: RadixTree, *args: Any) -> Any:
    with swapped(self, "log", None):
        return original(self, *args)


def parent_first(original: Any, self: PrefixResidency, num_pages: int, *purpose: Any) -> Any:
    node, most = original(self, num_pages, *purpose)
    above = None if node is None else node.parent
    return (node if above is None or above.parent is None or above.pins[self.index] else above), most


def state_on_parent(original: Any, self: Tiers, residency: Any, node: Any, page_ids: Any) -> None:
    index, above = residency.index, node.parent
    is_state = self.components[index % len(self.components)].name == "state" and index < len(self.components)
    if is_state and above.parent is not None and above.pages[index] is None:
        node = above
    original(self, residency, node, page_ids)


def done_is_quiet(original: Any, self: Any, transfer: Any, outcome: Any) -> None:
    original(self, transfer, outcome._replace(quiet=outcome.done))


def ready_at_once(original: Any, self: PrefixCache, *args: Any) -> Any:
    lease = original(self, *args)
    lease.first_step = self.step_number
    return lease


def still_findable(original: Any, self: RadixTree, namespace: Any) -> None:
    root = self.roots[namespace.digest]
    original(self, namespace)
    self.roots[namespace.digest] = root
    del self.retired_roots[root.id]


def one_page_less(original: Any, self: Window, n: int) -> int:
    start = original(self, n)
    return min(n, start + self.page_tokens) if start else start


def transit_free(original: Any, self: Clearing, *args: Any) -> None:
    original(self, *args)
    for deferred in self.deferred:
        for residency, page_ids in deferred.pages:
            residency.allocator.free(page_ids)
    self.deferred.clear()


def wait_noted(original: Any, self: PrefixCache, reason: str) -> Any:
    self.decisions.note("wait", 99, 0)
    return original(self, reason)


def two_steps_early(original: Any, self: Retentions) -> None:
    with swapped(self.tiers, "step", self.tiers.step + 2):
        original(self)


def keys_unchained(parent_key: bytes, token_bytes: Any, page_bytes: int) -> list[bytes]:
    data = bytes(token_bytes)
    return [sha256(data[at : at + page_bytes]).digest() for at in range(0, len(data) - page_bytes + 1, page_bytes)]


def unchain(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tokens, "chain", keys_unchained)
    patch.setattr(tree, "chain", keys_unchained)


def cap_ignored(original: Any, self: Matcher, sequence: Any, max_tokens: int | None) -> Any:
    return original(self, sequence, None)


def one_page_early(original: Any, self: Leases, lease: Any, num_computed: int) -> None:
    original(self, lease, min(num_computed + self.tiers.page_tokens, lease.num_tokens, lease.sequence.num_tokens))


def table_changed(original: Any, self: Any, lease: Any, child: Any, at: int) -> int:
    before = lease.table
    num_duplicates = original(self, lease, child, at)
    if lease.table is not before:
        before.setflags(write=True)
        before[:] = lease.table
        before.setflags(write=False)
    return num_duplicates


def freed_at_once(lease: Any, c: int, page_ids: np.ndarray) -> None:
    lease._tiers.device[c].allocator.free(page_ids)


def replaced_though_stable(original: Any, self: Any, lease: Any, child: Any, at: int) -> int:
    theirs = child.pages[self.c]
    num_duplicates = original(self, lease, child, at)
    if theirs is not None:
        lease.table = lease.table.copy()
        lease.table[at // self.page_tokens : child.end // self.page_tokens] = theirs
        lease.table.setflags(write=False)
    return num_duplicates


def table_kept(original: Any, self: Any, lease: Any, child: Any, at: int) -> int:
    """It still names the duplicates."""
    before = lease.table
    num_duplicates = original(self, lease, child, at)
    lease.table = before
    return num_duplicates


def given_back_though_stable(original: Any, self: PrefixCache, leases: list[Any]) -> None:
    for lease in leases:
        self.leases.free_duplicates(lease)


def keep_no_duplicates(patch: pytest.MonkeyPatch) -> None:
    for module in (base, prefix, window):
        patch.setattr(module, "keep_duplicates", freed_at_once)


def all_states(original: Any, self: Any, lease: Any, num_computed: int, **options: Any) -> None:
    """Whether or not a chunk ended there."""
    options["states"] = tuple(p for p in getattr(lease, "checkpoints", ()) if p <= num_computed)
    original(self, lease, num_computed, **options)


def pin_left(original: Any, self: Leases, lease: Any) -> None:
    original(self, lease)
    if lease._node.parent is not None:
        self.tiers.device[0].pin_up(lease._node, lease._node.end - 1)


def no_floors(original: Any, self: Accounts, *args: Any) -> None:
    original(self, *args)
    self.floors = [0] * len(self.floors)


def leaf_unpinned(original: Any, self: Admission, *args: Any) -> Any:
    """The deepest node of a hit may leave while the lease uses it."""
    lease = original(self, *args)
    node = lease._node
    if node.parent is not None and node.pins[0] == 1:
        self.tiers.device[0].order.add(node)
    return lease


MUTANTS = (
    Mutant("duplicates are never given back", during(Leases, "free_duplicates", PageAllocator, "free", nothing)),
    Mutant("duplicates are given back twice", during(Leases, "free_duplicates", PageAllocator, "free", twice)),
    Mutant("duplicates are given back while a table has them", keep_no_duplicates),
    Mutant("stable tables are replaced", around(Prefix, "publish", replaced_though_stable)),
    Mutant("stable tables lose their pages", around(PrefixCache, "tables_were_read", given_back_though_stable)),
    Mutant("states are taken for written", around(PrefixCache, "insert", all_states)),
    Mutant("tables keep the ids of freed duplicates", around(Prefix, "publish", table_kept)),
    Mutant(
        "a window is given back a page too early",
        around(Window, "window_start_to_keep", lambda f, self, lease, n: min(f(self, lease, n) + self.page_tokens, n)),
    ),
    Mutant("windows left behind are not freed", during(Window, "report", PageAllocator, "free", nothing)),
    Mutant("match ignores a missing state", match_without(State)),
    Mutant("match ignores a missing window", match_without(Window)),
    Mutant("a window may lack its first page", around(Window, "first_needed", one_page_less)),
    Mutant("a page that is in use may leave", around(Admission, "admit", leaf_unpinned)),
    Mutant("load-back reads the next host page", around(Admission, "_load", next_host_page)),
    Mutant("load-back is ready at once", around(PrefixCache, "_admit", ready_at_once)),
    Mutant("backup takes pages in the wrong order", around(backups, "device_pages", backwards)),
    Mutant("a split loses pins", around(PrefixResidency, "split", pins_of_prefix_lost)),
    Mutant("release forgets checkpoint slots", around(State, "release", checkpoints_forgotten)),
    Mutant("insert publishes a page that is not computed", around(Leases, "_publish", one_page_early)),
    Mutant("a state is published on the node above", around(Tiers, "put", state_on_parent)),
    Mutant("namespaces share a root", around(RadixTree, "root", one_root)),
    Mutant("a retired namespace is found again", around(RadixTree, "retire", still_findable), is_rare=True),
    Mutant("page keys are not chained", unchain),
    Mutant("a prefetch accepts a page more than agreed", around(Prefetches, "_accept", one_page_more), is_rare=True),
    Mutant("a prefetch frees its pages when done", around(Prefetches, "commit", done_is_quiet), is_rare=True),
    Mutant("a store lets its pages go when done", around(Stores, "commit", done_is_quiet)),
    Mutant("a store does not hold its pages", around(Stores, "_hold", lambda f, self, store, nodes, runs: None)),
    Mutant("a fetch keeps what it does not need", during(Prefetches, "_fetches", PageAllocator, "free", nothing)),
    Mutant("reset frees pages in transit", around(Clearing, "_keep", transit_free), is_rare=True),
    Mutant("one rank does not note its admits", admits_unnoted),
    Mutant("events miss removed nodes", around(RadixTree, "remove", without_log)),
    Mutant("events miss shortened nodes", around(RadixTree, "shorten", without_log)),
    Mutant("a parent leaves before its children", around(PrefixResidency, "victim", parent_first), is_rare=True),
    Mutant("a wait changes the digest", around(PrefixCache, "_wait", wait_noted)),
    Mutant("a retention ends too early", around(Retentions, "expire", two_steps_early)),
    Mutant("a release leaves a pin behind", around(Leases, "release", pin_left)),
    Mutant(
        "every load-back is worth it", around(Admission, "_worth_loading", lambda f, self, prefix: True), is_rare=True
    ),
    Mutant("insert changes a table that was handed out", around(Prefix, "publish", table_changed)),
    Mutant("a floor protects nothing", around(Accounts, "__init__", no_floors), is_rare=True),
    Mutant("a hit may be longer than its cap", around(Matcher, "longest", cap_ignored)),
)
