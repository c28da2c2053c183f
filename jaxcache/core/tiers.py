"""The tree and all residencies together: what no single one of them can do alone.

Owns the rules that span components and tiers: a split shares every entry, a node leaves the tree with its last
full-attention entry, room is made in the order of eviction. Decides nothing about requests.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from math import lcm
from typing import Any

import numpy as np

from jaxcache.components.base import Component
from jaxcache.config import CacheConfig
from jaxcache.core.change_log import ChangeLog
from jaxcache.core.decisions import checksum
from jaxcache.core.eviction import policy
from jaxcache.core.eviction.order import OrderContext
from jaxcache.core.eviction.reuse_profile import ReuseProfile
from jaxcache.core.holds import Holds
from jaxcache.core.limits.tenants import Accounts, Tenants
from jaxcache.core.missing import Cause, Eviction
from jaxcache.core.node import FULL, Node
from jaxcache.core.pages import UNTOLD, Purpose, Residency
from jaxcache.core.tokens import Sequence
from jaxcache.core.tree import RadixTree
from jaxcache.types import NO_PAGES, PageIds, Tier, WritePolicy

MAX_EVICTIONS_REMEMBERED = 4096
MAX_UNMADE_REMEMBERED = 4096
UNWATCHED = -1  # without pools nothing is known of model steps


class Tiers:
    """device[c] and host[c] are the residencies of component c, of which the first is full attention: the tree itself.

    components: those of the model in this order, with a spine where it has no full attention
    holds: who pins entries, beside leases
    log: every change of the tree and the residencies, if events are on
    profile: what is known about reuse, if the policy of eviction remembers
    tenants: who has limits, if anybody has
    """

    def __init__(
        self,
        components: tuple[Component, ...],
        config: CacheConfig,
        residency_of: Callable[[Component], type[Residency]],
        sized: Component,
    ):
        """residency_of: what a component's entries are; sized: whose pages say how much the cache holds"""
        self.components = components
        self.config = config
        self.page_tokens = config.page_tokens
        num = len(components)
        self.log = ChangeLog(config.max_logged_changes) if config.events else None
        self.tree = RadixTree(config.page_tokens, 2 * num, self.log)
        self.clock = itertools.count()
        self.profile = make_profile(sized, config)
        self.tenants = Tenants(config.tenants) if config.tenants else None
        self.device = [self._residency(residency_of, c, Tier.DEVICE) for c in range(num)]
        self.host = [self._residency(residency_of, c, Tier.HOST) for c in range(num)]
        self.residencies = [*self.device, *self.host]
        self._open_residencies = [residency for residency in self.residencies if not residency.is_closed]
        self.has_host = any(host.allocator.num_pages for host in self.host)
        self.writes_back = self.has_host and config.write_policy is WritePolicy.WRITE_BACK
        self.holds = Holds((self.device[FULL], self.host[FULL]), self.writes_back)
        self.grid_tokens = lcm(config.page_tokens, *[component.grid_tokens for component in components])
        self.step = 0
        self.pools_version = UNWATCHED  # how many model steps the loop is known to have dispatched
        # node id; residency index or first page; and what `Eviction` says: flat, since one is made for every eviction
        self.evictions: deque[tuple[Any, ...]] = deque(maxlen=MAX_EVICTIONS_REMEMBERED)
        # Of states that were to be kept and were not: root id, position, checksum of the tokens up to there; and why.
        self.unmade: deque[tuple[int, int, int, Cause]] = deque(maxlen=MAX_UNMADE_REMEMBERED)
        self.num_evicted_pages = [0] * (2 * num)
        # While something is dropped of which transfers still touch pages: these, by residency; and where they go.
        self.touched: dict[int, PageIds] = {}
        self.held_back: list[tuple[Residency, PageIds]] = []

    def _residency(self, residency_of: Callable[[Component], type[Residency]], c: int, tier: Tier) -> Residency:
        component, order = self.components[c], policy(self.config.eviction_policy)
        num_pages = self.config.pages_of(component.name, tier)
        index = c + tier * len(self.components)
        context = OrderContext(index, num_pages, tier, c != FULL, self.profile)
        by_account = order(context) if self.tenants is None else Accounts(context, order, self.tenants)
        return residency_of(component)(component, tier, index, num_pages, by_account, self.clock, self.log)

    # ---- changes

    def split(self, node: Node, at: int) -> Node:
        """Cuts a node at token `at` and returns the prefix."""
        prefix = self.tree.split(node, at)
        num_pages = (at - prefix.start) // self.page_tokens
        for residency in self.residencies:
            residency.split(node, prefix, num_pages)
        if self.tenants is not None:
            self.tenants.changed[node.account] = None
        return prefix

    def put(self, residency: Residency, node: Node, page_ids) -> None:
        residency.put(node, page_ids)
        self.tree.version += 1

    def drop(self, residency: Residency, node: Node, purpose: Purpose = UNTOLD) -> None:
        """Frees an entry; the node goes too if nothing holds it any more."""
        index, pages = residency.index, node.pages
        page_ids = residency.take(node)
        if self.touched:
            self.free_untouched(residency, page_ids)
        else:
            residency.allocator.free(page_ids)
        self.num_evicted_pages[index] += len(page_ids)
        id, what = node.id, index
        if pages[FULL] is None and pages[len(self.components)] is None:
            for other in self._open_residencies:
                if pages[other.index] is not None:
                    self.free_untouched(other, other.take(node))
            id, what = node.parent.id, node.first_page  # pyright: ignore[reportOptionalMemberAccess]
            self.tree.remove(node)
        else:
            self.tree.version += 1
        self.evictions.append((id, what, residency, self.step, purpose.reason, purpose.lease))

    def free_untouched(self, residency: Residency, page_ids: PageIds) -> None:
        """Gives pages back, but for those that a transfer still touches."""
        if self.touched:
            is_touched = np.isin(page_ids, self.touched.get(residency.index, NO_PAGES))
            self.held_back.append((residency, page_ids[is_touched]))
            page_ids = page_ids[~is_touched]
        residency.allocator.free(page_ids)

    def drop_subtree(self, node: Node, purpose: Purpose) -> None:
        """Frees everything at and below a node, deepest first; nothing of it may be pinned."""
        for child in list(node.children.values()):
            self.drop_subtree(child, purpose)
        for residency in self.residencies:
            if node.parent is not None and node.pages[residency.index] is not None:
                self.drop(residency, node, purpose)

    def raise_priority(self, node: Node, priority: int) -> None:
        """Of a node and everything above it, which never has less; only eviction_policy="priority" looks at it.

        Full attention of a lease's path is pinned on the device and takes its place anew when it is released. What may
        leave all the while (host copies, windows left behind, states) takes its new place now.
        """
        looks = policy(self.config.eviction_policy).by_priority
        while node.parent is not None and node.priority < priority:
            node.priority = priority
            if looks:
                for residency in self.residencies:
                    residency.reorder(node)
            node = node.parent

    def page_counts(self) -> dict[str, dict[str, dict[str, int]]]:
        """By tier and component: pages that there are, free, resident, pinned, and ever evicted."""
        counts: dict[str, dict[str, dict[str, int]]] = {"device": {}, "host": {}}
        for residency in self.residencies:
            counts[residency.tier.name.lower()][residency.component.name] = {
                "capacity": residency.allocator.num_pages,
                "free": residency.allocator.num_free,
                "resident": residency.num_resident,
                "pinned": residency.num_pinned,
                "evicted": self.num_evicted_pages[residency.index],
            }
        return counts

    def eviction(self, key: tuple) -> Eviction | None:
        """What is remembered about an entry (node id, residency index) or a node (parent's id, first page)."""
        for node_id, what, residency, step, reason, lease in reversed(self.evictions):
            if (node_id, what) == key:
                return Eviction(residency.component.name, residency.tier, step, reason, lease)
        return None

    def note_unmade(self, sequence: Sequence, position: int, cause: Cause) -> None:
        """A state was to be kept at a position, and is not. By tokens: the node that would end there may come later."""
        self.unmade.append((sequence.root.id, position, _prefix_checksum(sequence, position), cause))

    def unmade_state(self, sequence: Sequence, position: int) -> Cause | None:
        """The last cause noted for this position of a sequence; None: it was not to be kept, or long ago."""
        key = (sequence.root.id, position, _prefix_checksum(sequence, position))
        return next((note[3] for note in reversed(self.unmade) if note[:3] == key), None)

    # ---- room

    def make_room(self, residency: Residency, num_pages: int, purpose: Purpose = UNTOLD) -> bool:
        """Evicts until `num_pages` are free; False if there is nothing left to evict."""
        allocator, spill = residency.allocator, residency.spill
        while (missing := num_pages - allocator.num_free) > 0:
            victim, num_leaving = residency.victim(num_pages, purpose)
            if victim is None:
                return False
            pages = victim.pages[residency.index]
            assert pages is not None
            missing = min(missing, num_leaving)
            surplus = len(pages) - missing
            if spill is not None:
                spill(self.trim(residency, victim, missing), purpose)
            elif surplus <= 0:
                self.drop(residency, victim, purpose)
            elif self._can_be_shortened(residency, victim):
                self._shorten(residency, victim, surplus, purpose)
            else:
                self.drop(residency, self.trim(residency, victim, missing), purpose)
        return True

    def _can_be_shortened(self, residency: Residency, node: Node) -> bool:
        """Whether a victim of full attention can be trimmed in place: nothing hangs below, and no other tier has it."""
        if not residency.is_closed or node.children:
            return False
        if self.has_host:
            for other in self.device if residency.tier is Tier.HOST else self.host:
                if node.pages[other.index] is not None:
                    return False
        return True

    def _shorten(self, residency: Residency, node: Node, num_pages: int, purpose: Purpose) -> None:
        """Trims a node in place, which makes no node only to remove it; what is at its end leaves with that."""
        self.num_evicted_pages[residency.index] += len(node.pages[residency.index]) - num_pages  # pyright: ignore
        for other in (self.device, self.host)[residency.tier]:
            if node.pages[other.index] is not None:
                other.allocator.free(other.shorten(node, num_pages))
        lost = self.tree.shorten(node, num_pages)
        self.evictions.append((node.id, lost, residency, self.step, purpose.reason, purpose.lease))

    def trim(self, residency: Residency, victim: Node, num_pages: int) -> Node:
        """The part of a victim that has to leave: full attention from the end, only as many pages as needed."""
        pages = victim.pages[residency.index]
        assert pages is not None
        if residency.is_closed and len(pages) > num_pages:
            self.split(victim, victim.end - num_pages * self.page_tokens)
        return victim


def _prefix_checksum(sequence: Sequence, num_tokens: int) -> int:
    return checksum(memoryview(sequence.data)[: num_tokens * 4])


def make_profile(sized: Component, config: CacheConfig) -> ReuseProfile | None:
    if not policy(config.eviction_policy).remembers:
        return None
    device, host = (config.pages_of(sized.name, tier) * config.page_tokens for tier in (Tier.DEVICE, Tier.HOST))
    return ReuseProfile(config.page_tokens, device, host, config.evict_output_first)
