"""One rank's core, and all that these tests know of its calls and its insides. A change of the core is met here.

`stay` says what a lease refers to, `owners` who else may hold a page. Other files of these tests use the public calls,
the counters, and the nodes that `roots` leads to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from random import Random
from typing import Any

import numpy as np

from jaxcache.components import Component
from jaxcache.config import CacheConfig
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.runtime.events import EventStream
from jaxcache.types import Event, Outcome, Tier, TransferKind, WritePolicy
from tests.independent.content import demand
from tests.independent.plane import Plane
from tests.independent.record import Plain, plain


class Rank:
    """A core, its memory, and who listens to its events."""

    def __init__(self, components: tuple[Component, ...], config: CacheConfig, rng: Random):
        self.core = PrefixCache(components, config)
        self.components = components = self.core.components
        self.num_components = len(components)
        self.names = {component.name: c for c, component in enumerate(components)}
        self.has_host = self.core.tiers.has_host
        self.capacities = [r.allocator.num_pages for r in self.core.tiers.residencies]  # device, then host
        split = self.num_components
        self.plane = Plane(components, self.capacities[:split], self.capacities[split:], config.page_tokens, rng)
        self.stream = EventStream(self.core.tiers) if config.events else None

    # ---- calls whose form may change

    def insert(self, lease: Any, num_computed: int, states: tuple[int, ...], wishes: Mapping[str, int]) -> None:
        """states: positions whose checkpoint slot holds the state."""
        self.core.insert(lease, num_computed, states=states, **wishes)

    def forget_device(self) -> None:
        """The device is lost, and running requests with it."""
        self.core.forget_device()
        self.plane.lose_device()

    def tables(self, lease: Any, kept: dict[str, np.ndarray], reads: bool) -> dict[str, np.ndarray]:
        """What a loop uses whose tables only grow, unless it `reads` them anew: those that it has, and what is new.

        With stable tables it never needs to.
        """
        now = lease.page_tables
        if reads:
            self.core.tables_were_read([lease])
            if not self.core.config.stable_tables:
                kept.clear()
        for name, table in now.items():
            have = kept.get(name, NOTHING)
            if self.core.config.stable_tables:  # but for what a window has left behind
                same = (table[: len(have)] == have) | (table[: len(have)] == self.capacities[self.names[name]])
                demand(bool(same.all()), "tables", "a stable table has changed:", have, table)
            kept[name] = np.concatenate([have, table[len(have) :]])
        return dict(now) if reads and not self.core.config.stable_tables else dict(kept)

    def apply(self) -> Plain:
        """What was planned."""
        plan = self.core.take_plan()
        self.plane.apply(plan, self.core.step_number)
        return plain(plan)

    def take_events(self) -> list[Event]:
        if self.stream is None:
            return []
        events = self.stream.take()
        mirrored = sum(bool(node.edge) for node in self.stream._nodes.values())  # but for the roots
        demand(mirrored == self.core.tiers.tree.num_nodes, "events", "the mirror has", mirrored, "nodes")
        return events

    def outcome(self, id: int) -> Outcome | None:
        """What this rank says of a live transfer; None: it was not applied yet."""
        work = self.plane.work.get(id)
        if work is None:
            return None
        if work.kind is not TransferKind.QUERY:
            return Outcome(work.done, work.quiet, dict(work.good))
        end = self.core.largest_end(id, work.exists) if work.done else 0
        return Outcome(work.done, work.quiet, {}, end, end)

    def state(self) -> tuple[int, list[int]]:
        """Equal before and after a call that has changed nothing."""
        return self.core.digest, self.core.sizes()

    @property
    def plans_load_back(self) -> bool:
        """Whether `commit` has to refuse."""
        return any(transfer.kind is TransferKind.LOAD_BACK for transfer in self.core.outbox.transfers)

    @property
    def is_settled(self) -> bool:
        """Nothing runs, is retained, or has to do with storage."""
        core = self.core
        return not (core.live_transfers() or core.stores.is_waiting or core.is_busy())

    @property
    def write_policy(self) -> WritePolicy:
        return self.core.backups.policy

    def num_evicted(self) -> tuple[int, int]:
        """Pages that have left the device, and host memory."""
        evicted = self.core.tiers.num_evicted_pages
        return sum(evicted[: self.num_components]), sum(evicted[self.num_components :])

    # ---- what leases hold

    def stay(self, lease: Any) -> list[np.ndarray]:
        """Every device page that a lease refers to, by component; those that are not the tree's are its own."""
        pages = []
        for c, table in enumerate(lease.page_ids):
            if table is None:
                pages.append(np.array([lease.write_slot, *lease.checkpoints.values()], np.int32))
            else:
                duplicates = [page_ids for owner, page_ids in lease._duplicates or () if owner == c]
                pages.append(np.unique(np.concatenate([table[table < self.capacities[c]], *duplicates])))
        return pages

    def fresh(self, lease: Any, first: int) -> list[np.ndarray]:
        """The pages of its tables from page `first` on."""
        return [NOTHING if table is None else table[first:] for table in lease.page_ids]

    @staticmethod
    def slots(lease: Any, n: int, m: int) -> list[int | None]:
        """Of the state: the one to read at n, and those to write at m."""
        if lease.write_slot is None:
            return []
        read = lease.read_slot if n == lease.num_cached_tokens else lease.write_slot
        checkpoint = lease.checkpoints.get(m)
        return [read, lease.write_slot] if checkpoint is None else [read, lease.write_slot, checkpoint]

    @staticmethod
    def lease_state(lease: Any) -> tuple[Any, ...]:
        """All that a loop can see of a lease."""
        hits = (lease.num_cached_tokens, lease.device_tokens, lease.host_tokens, lease.storage_tokens)
        room = (lease.num_computed, lease.num_tokens, lease.first_step, lease.next_stop)
        states = (lease.read_slot, lease.write_slot, tuple(lease.checkpoints.items()))
        tables = tuple(None if table is None else table.tobytes() for table in lease.page_ids)
        return (lease.id, hits, room, states, tables)

    @staticmethod
    def published(lease: Any) -> int:
        return lease._published

    # ---- the tree, and who else holds pages

    def roots(self) -> Iterator[tuple[Any, bytes, bool]]:
        """(root, namespace digest, whether requests can find it)."""
        tree = self.core.tiers.tree
        for digest, root in tree.roots.items():
            yield root, digest, True
        for root in tree.retired_roots.values():
            yield root, root.keys[0], False

    def owners(self, residency: int) -> list[np.ndarray]:
        """Pages that neither the tree nor a lease holds: free, reserved by prefetches, and waiting for quiet."""
        core = self.core
        pages = [core.tiers.residencies[residency].allocator.free_ids()]
        if residency >= self.num_components:
            pages += [prefetch.pages[residency - self.num_components] for prefetch in core.prefetches.live.values()]
        for later in core.clearing.deferred:
            pages += [page_ids for owner, page_ids in later.pages if owner.index == residency]
        return pages

    def tier_of(self, residency: int) -> tuple[Tier, str]:
        tier = Tier.DEVICE if residency < self.num_components else Tier.HOST
        return tier, self.components[residency % self.num_components].name

    def content(self, residency: int) -> np.ndarray:
        """Of a residency's pages, once all that is on its way has arrived."""
        if residency < self.num_components:
            return self.plane.device_to_be(residency)
        return self.plane.host[residency - self.num_components]


NOTHING = np.empty(0, np.int32)
