"""Every guard is needed: the fuzz that passes with all of them fails when one is taken out.

A mutation replaces one piece of the source of one method. If that piece is not there any more, the mutation has to be
written anew for the code that guards the same rule now.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from jaxcache.config import TenantShare
from jaxcache.core.admission import Admission
from jaxcache.core.backups import Backups
from jaxcache.core.change_log import ChangeLog
from jaxcache.core.clearing import Clearing
from jaxcache.core.eviction.adaptive import Adaptive
from jaxcache.core.eviction.keyed import Keyed
from jaxcache.core.eviction.lru import Lru
from jaxcache.core.eviction.queues import Queued
from jaxcache.core.kinds.prefix import Prefix, PrefixResidency
from jaxcache.core.kinds.state import State, StateResidency
from jaxcache.core.kinds.window import Suffix
from jaxcache.core.leases import Leases
from jaxcache.core.limits.quotas import Quotas
from jaxcache.core.limits.retention import Retentions
from jaxcache.core.limits.tenants import Accounts, Tenants
from jaxcache.core.node import Node
from jaxcache.core.pages import Residency
from jaxcache.core.prefetches import Prefetches
from jaxcache.core.stores import Stores
from jaxcache.core.tiers import Tiers
from jaxcache.core.tree import RadixTree
from jaxcache.runtime.events import EventStream
from jaxcache.types import PrefetchPolicy, WritePolicy
from tests.core.driver import drive

NUM_STEPS = 100
MAX_SEEDS = 80
PLAIN = {"mixture": ("full",), "host_pages": 0}
EVENTS = {"events": True}
OVERFLOW = {**EVENTS, "max_logged_changes": 1, "accident_chance": 0.1}


@dataclass(frozen=True)
class Mutation:
    """In `owner.method`, `old` becomes `new`. setup: what `drive` is given so that it shows soon."""

    name: str
    owner: type
    method: str
    old: str
    new: str
    setup: Mapping[str, Any] = field(default_factory=dict)


def policy(name: str) -> Mapping[str, Any]:
    return {"eviction_policy": name}


FLOORS = {"tenants": {"a": TenantShare(floor=0.3), "b": TenantShare(floor=0.3)}, "device_pages": 40}
QUOTAS = {"tenants": {"a": TenantShare(quota=0.5), "b": TenantShare(quota=0.5)}, "device_pages": 40}
KEPT = {"wish_chance": 0.5, "max_retained_share": 0.25}
THROUGH = {"write_policy": WritePolicy.WRITE_THROUGH}
ROOMY_HOST = {"mixture": ("full",), "host_pages": 200, **THROUGH}
MUTATIONS = (
    Mutation(
        "load-backs do not pin what they write",
        Admission,
        "_load_back",
        "self._hold(load_back, needs.loads, Tier.DEVICE)",
        "pass",
        {
            **ROOMY_HOST,
            "page_tokens": 1,
            "max_pages": 20,
            "device_pages": 24,
            "abort_chance": 0.3,
            "accident_chance": 0,
            "load_back_min_tokens": 1,
        },
    ),
    Mutation(
        "host pages are freed at the outcome instead of at quiet",
        Prefetches,
        "_decide",
        "self._accept(prefetch, reason)",
        "self._accept(prefetch, reason); "
        "[host.allocator.free(ids) for host, ids in zip(self.tiers.host, prefetch.pages)]; "
        "prefetch.pages = [NO_PAGES] * len(prefetch.pages)",
        {"mixture": ("full", "window"), "host_pages": 24, "prefetch_policy": PrefetchPolicy.BEST_EFFORT, **THROUGH},
    ),
    Mutation(
        "first_step ignores the load-backs of other requests",
        Prefix,
        "pin",
        "node.ready_step > first_step",
        "False",
        {**ROOMY_HOST, "abort_chance": 0.2},
    ),
    Mutation(
        "a split copies the pins of a state",
        StateResidency,
        "split",
        "pass",
        "prefix.pins[self.index] = node.pins[self.index]",
        {"mixture": ("full", "state"), "page_tokens": 1},
    ),
    Mutation(
        "a state that was reported is given back",
        State,
        "_publish_state",
        "tiers.put(device, node, np.array([slot], np.int32))",
        "device.allocator.free_one(slot)",
        {"mixture": ("full", "state")},
    ),
    Mutation(
        "a pinned state leaves because a later one was made",
        State,
        "_drop",
        " and not node.pins[residency.index]",
        "",
        {"mixture": ("full", "state"), "page_tokens": 1, "max_states_per_path": 1},
    ),
    Mutation(
        "a window is kept relative to the current position",
        Suffix,
        "window_start_to_keep",
        "newest // self.grid_tokens * self.grid_tokens",
        "newest",
        {"mixture": ("full", "window"), "page_tokens": 4},
    ),
    Mutation(
        "a backup does not ask for its parent's",
        Backups,
        "back_up",
        "kind.may_be_in_host(node)",
        "True",
        {"mixture": ("full",), "host_pages": 6, **THROUGH},
    ),
    Mutation(
        "parents leave before children",
        PrefixResidency,
        "evictable",
        " and not node.resident_children[index]",
        "",
        {"mixture": ("full",)},
    ),
    Mutation(
        "a store does not pin",
        Stores,
        "_hold",
        "tiers.holds.add(store, kind.host, node, kind.top_of(node))",
        "pass",
        {"mixture": ("full",), "host_pages": 12, **THROUGH},
    ),
    Mutation(
        "insert takes pages that are still being loaded",
        Leases,
        "_child",
        "child.ready_step > tiers.step",
        "False",
        {**ROOMY_HOST, "page_tokens": 1, "max_pages": 6, "device_pages": 10, "cap_chance": 0.5},
    ),
    Mutation(
        "the tree's page is freed as the duplicate",
        Prefix,
        "publish",
        "keep_duplicates(lease, c, lease.table[pages])",
        "keep_duplicates(lease, c, theirs)",
        {"mixture": ("full",)},
    ),
    Mutation(
        "duplicates are given back while the loop has a table with them",
        Prefix,
        "publish",
        "keep_duplicates(lease, c, lease.table[pages])",
        "self.device.allocator.free(lease.table[pages])",
        {"mixture": ("full",)},
    ),
    Mutation(
        "what storage still touches is free when its node is dropped",
        Tiers,
        "free_untouched",
        "self.touched.get(residency.index, NO_PAGES)",
        "NO_PAGES",
        {"mixture": ("full",), "host_pages": 4, "page_tokens": 1, "write_policy": WritePolicy.WRITE_BACK},
    ),
    Mutation(
        "reset frees at once what a store may still read",
        Clearing,
        "_keep",
        "else pinned",
        "else ()",
        {"mixture": ("full",), "host_pages": 60, "accident_chance": 0.3, **THROUGH},
    ),
    Mutation("a hit is not pinned", Prefix, "pin", "pins[c] += 1", "pass", PLAIN),
    Mutation("pinned pages are not counted", Prefix, "pin", "device.num_pinned += len(page_ids)", "pass", PLAIN),
    Mutation("a victim's parent never leaves", PrefixResidency, "take", "self.order.readmit(parent)", "pass", PLAIN),
    Mutation("the wrong end is trimmed", Residency, "_cut", "pages[num_pages:]", "pages[:-num_pages]", PLAIN),
    Mutation("own pages are not given back", Prefix, "release", "first < len(lease.table)", "False", PLAIN),
    Mutation(
        "events: nothing is said of what leaves for room",
        Tiers,
        "drop",
        "self.tree.remove(node)",
        "log, self.tree.log = self.tree.log, None; self.tree.remove(node); self.tree.log = log",
        {**PLAIN, **EVENTS},
    ),
    Mutation(
        "events: nothing is said of a victim that is trimmed",
        Tiers,
        "_shorten",
        "lost = self.tree.shorten(node, num_pages)",
        "log, self.tree.log = self.tree.log, None; lost = self.tree.shorten(node, num_pages); self.tree.log = log",
        {**PLAIN, **EVENTS},
    ),
    Mutation("events: pages that are published", Residency, "publish", "self.log is not None", "False", EVENTS),
    Mutation("lru keeps what is pinned", Lru, "discard", "self._nodes.pop(node, MISSING)", "MISSING", policy("lru")),
    Mutation("lfu keeps what is pinned", Keyed, "discard", "self._keys.pop(node, None)", "pass", policy("lfu")),
    Mutation("slru forgets what is protected", Queued, "discard", "self.queues:", "self.queues[:1]:", policy("slru")),
    Mutation(
        "adaptive loses what has aged", Adaptive, "_put", "self._cell_of[node] = cell", "pass", policy("adaptive")
    ),
    Mutation("events: a new namespace", RadixTree, "root", "self.log is not None", "False", EVENTS),
    Mutation("events: a new node", RadixTree, "add", "self.log is not None", "False", EVENTS),
    Mutation("events: a split", RadixTree, "split", "self.log is not None", "False", EVENTS),
    Mutation("events: the pages of a prefix", RadixTree, "split", "cut // self.page_bytes))", "1))", EVENTS),
    Mutation("events: a node that is trimmed", RadixTree, "shorten", "self.log is not None", "False", EVENTS),
    Mutation(
        "events: a node that leaves",
        RadixTree,
        "remove",
        "self.log is not None",
        "False",
        {**PLAIN, **EVENTS, "page_tokens": 1},
    ),
    Mutation("events: a retired namespace", RadixTree, "retire", "self.log is not None", "False", EVENTS),
    Mutation("events: an entry comes", Residency, "_come", "self.log is not None", "False", EVENTS),
    Mutation("events: an entry leaves", Residency, "_leave", "self.log is not None", "False", EVENTS),
    Mutation("events: a split takes the state along", EventStream, "_split", "held and is_paged", "held", EVENTS),
    Mutation("events: a state is all pages of its node", EventStream, "_say_stored", "if is_paged", "if True", EVENTS),
    Mutation("events: a retired namespace goes on", EventStream, "_retired", "space.retired = True", "pass", EVENTS),
    Mutation(
        "events: a restart forgets what is there", ChangeLog, "restart", "if pages is not None", "if False", OVERFLOW
    ),
    Mutation(
        "a floor is promised away",
        Accounts,
        "promised",
        "min(resident - pinned, self._above_floor(tenant, served))",
        "resident - pinned",
        FLOORS,
    ),
    Mutation(
        "a floor protects only what is below it",
        Accounts,
        "_rank",
        "else (ABOVE_FLOOR, cap)",
        "else (ABOVE_FLOOR, self.resident[tenant])",
        FLOORS,
    ),
    Mutation("a quota is ignored at insert", Quotas, "enforce", "if excess > 0", "if False", QUOTAS),
    Mutation("a quota is ignored at admission", Quotas, "over", "num_pages > accounts.quotas[tenant]", "False", QUOTAS),
    Mutation("what leases own is no tenant's", Quotas, "settle", "new - old", "0", QUOTAS),
    Mutation(
        "a split is on nobody's account", Node, "__init__", "0 if parent is None else parent.account", "0", FLOORS
    ),
    Mutation(
        "an account does not lose what leaves",
        Accounts,
        "count",
        "self.resident[tenant] += resident",
        "self.resident[tenant] += max(0, resident)",
        FLOORS,
    ),
    Mutation(
        "a retired namespace keeps its floor",
        Tenants,
        "retire",
        "accounts.move(account, 0)",
        "pass",
        {**FLOORS, "accident_chance": 0.2},
    ),
    Mutation("a retention never ends", Retentions, "expire", "self._release(retention)", "pass", KEPT),
    Mutation("a retention is not limited", Retentions, "_fits", "> self.limits[c]", "> 10**6", KEPT),
    Mutation(
        "a retention gives nothing back",
        Retentions,
        "_release",
        "self.tiers.holds.release(retention, is_use=False)",
        "pass",
        KEPT,
    ),
    Mutation(
        "a split forgets a retention",
        RadixTree,
        "split",
        "prefix.retained = node.retained",
        "pass",
        {**KEPT, "mixture": ("full",)},
    ),
)


def mutate(patch: pytest.MonkeyPatch, mutation: Mutation) -> None:
    function = vars(mutation.owner)[mutation.method]
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(mutation.old) == 1, (
        f"{mutation.method} has no {mutation.old!r} (any more): mutate what it has now"
    )
    scope = dict(vars(sys.modules[mutation.owner.__module__]))
    code = compile(source.replace(mutation.old, mutation.new), mutation.method, "exec", annotations.compiler_flag)
    exec(code, scope)
    patch.setattr(mutation.owner, mutation.method, scope[mutation.method])


def first_failing_seed(setup: Mapping[str, Any]) -> tuple[int, AssertionError] | None:
    for seed in range(MAX_SEEDS):
        try:
            drive(seed, NUM_STEPS, num_ranks=1, **setup)
        except AssertionError as error:
            return seed, error
    return None


@pytest.mark.mutation
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_fuzz_notices_that(mutation, monkeypatch):
    mutate(monkeypatch, mutation)
    found = first_failing_seed(mutation.setup)
    assert found is not None, f"{MAX_SEEDS} seeds pass although {mutation.name}"
    monkeypatch.undo()
    drive(found[0], NUM_STEPS, num_ranks=1, **mutation.setup)
