"""The tree, walked from its roots by these tests alone: what is where, whether it is right, what could be found.

check       owners   every page has exactly one owner, and none is lost
            content  every page of every node contains what the tokens on its path demand
            closure  full attention hangs together from the root, per tier
longest     by brute force over all positions, from sets of hashes: no node, no path
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jaxcache.components import RecurrentState, SlidingWindow
from jaxcache.core.kinds import SPINE
from jaxcache.types import WritePolicy
from tests.independent.adapter import NOTHING, Rank
from tests.independent.content import Runs, Text, demand, hash_of_namespace


class Found(NamedTuple):
    """num_tokens, device_tokens, found_tokens as `match` defines them."""

    num_tokens: int
    device_tokens: int
    found_tokens: int


class Survey:
    """One walk over one rank's tree. h[r][digest]: hashes of the pages of residency r that a request can find."""

    def __init__(self, rank: Rank, runs: Runs):
        self.rank = rank
        self.num = 2 * rank.num_components
        self.pages: list[list[np.ndarray]] = [[] for _ in range(self.num)]
        self.wanted: list[list[np.ndarray]] = [[] for _ in range(self.num)]
        self.keys: set[tuple[int, bytes]] = set()
        self.h: list[dict[bytes, list[np.ndarray]]] = [{} for _ in range(self.num)]
        self.num_nodes = self.num_empty_leaves = 0
        self._is_state = [isinstance(c, RecurrentState) for c in rank.components] * 2
        self._full = next(i for i, c in enumerate(rank.components) if c.kind in ("prefix", "spine"))
        self._writes_back = rank.core.config.write_policy is WritePolicy.WRITE_BACK
        for root, digest, is_live in rank.roots():
            for child in root.children.values():
                self._visit(child, root, hash_of_namespace(digest), digest, digest if is_live else None, runs)

    def _visit(self, node: Any, parent: Any, h: int, key: bytes, live: bytes | None, runs: Runs) -> None:
        self.num_nodes += 1
        demand(node.parent is parent, "tree", node, "below", parent)
        run = runs.follow(h, key, bytes(node.edge))
        demand(node.end == parent.end + len(run.keys) * runs.page_tokens, "tree", node)
        for r, page_ids in enumerate(node.pages):
            if page_ids is None:
                continue
            first = -1 if self._is_state[r] else 0
            self.pages[r].append(page_ids)
            self.wanted[r].append(run.h[first:])
            demand(len(page_ids) == len(run.keys[first:]), "tree", node, "has", page_ids)
            if live is not None:
                self.keys.update((r, key) for key in run.keys[first:])
                self.h[r].setdefault(live, []).append(run.h[first:])
        self.num_empty_leaves += not node.children and all(page_ids is None for page_ids in node.pages)
        self._check_closure(node, parent)
        h, key = run.h.item(-1), run.keys[-1]
        for first_page, child in node.children.items():
            demand(bytes(child.edge).startswith(first_page), "tree", child)
            self._visit(child, node, h, key, live, runs)

    def _check_closure(self, node: Any, parent: Any) -> None:
        device, host = node.pages[self._full], node.pages[self._full + self.num // 2]
        demand(device is not None or host is not None, "closure", node, "has full pages nowhere")
        if parent.parent is None:
            return
        above_device, above_host = parent.pages[self._full], parent.pages[self._full + self.num // 2]
        demand(device is None or above_device is not None, "closure", node, "without", parent, "on the device")
        demand(
            host is None or above_host is not None or self._writes_back, "closure", node, "without", parent, "on host"
        )

    # ---- checks

    def check_content(self) -> None:
        """Only between an apply and the next insert: what is planned has happened."""
        for r in range(self.num):
            if not self.pages[r]:
                continue
            content, secret = self.rank.content(r), self.rank.plane.salts[r % self.rank.num_components]
            page_ids = joined(self.pages[r])
            wrong = content[page_ids] != joined(self.wanted[r]) ^ secret
            if wrong.any():
                demand(False, "content", f"{self.rank.tier_of(r)}: pages {page_ids[wrong]} are not what they should be")

    def check_sizes(self) -> None:
        """The core's own running sums: nodes, and resident pages."""
        sizes = self.rank.core.sizes()
        resident = [sum(map(len, pages)) for pages in self.pages]
        demand(sizes[0] == self.num_nodes and sizes[3::3] == resident, "sizes", self.num_nodes, resident, sizes)

    def check_events(self, consumer: set[tuple[Any, str, bytes]]) -> None:
        """What a replay of the events holds is what requests can find."""
        places = [self.rank.tier_of(r) for r in range(self.num)]
        here = {(*places[r], key) for r, key in self.keys}
        if here != consumer:
            demand(False, "events", f"{len(here - consumer)} never told, {len(consumer - here)} never taken back")

    # ---- brute force

    def longest(self, text: Text, limit: int, device_only: bool = False) -> Found:
        """The largest n <= limit, in whole pages, at which every component has what it needs."""
        components, page = self.rank.components, self.rank.plane.page
        num, digest = len(components), text.namespace
        device = [self._set(c, digest) for c in range(num)]
        there = device if device_only else [device[c] | self._set(c + num, digest) for c in range(num)]
        ends = [text.at(n) for n in range(page, limit + 1, page)]  # ends[i]: of page i
        found = leading(ends, there[self._full])
        n = found
        while n and not all(self._has(component, there[c], ends, n) for c, component in enumerate(components)):
            n -= 1
        on_device = min(n, leading(ends, device[self._full]))
        if components[self._full] is SPINE and not all(
            self._has(c, device[i], ends, n) for i, c in enumerate(components)
        ):
            on_device = 0
        return Found(n * page, on_device * page, found * page)

    def _set(self, residency: int, digest: bytes) -> set[int]:
        return joined_set(self.h[residency].get(digest, []))

    def _has(self, component: Any, there: set[int], ends: list[int], num_pages: int) -> bool:
        """Whether a request could resume after so many pages, as far as one component is concerned."""
        page = self.rank.plane.page
        n = num_pages * page
        if not n:
            return True
        if isinstance(component, RecurrentState):
            return n % component.chunk_tokens == 0 and ends[num_pages - 1] in there
        first = max(0, n - component.window_tokens + 1) // page if isinstance(component, SlidingWindow) else 0
        return all(ends[i] in there for i in range(first, num_pages))


def check_owners(rank: Rank) -> None:
    """Tree, leases, prefetches, pages in transit and free ones: disjoint, and together all there are."""
    in_tree: list[list[np.ndarray]] = [[] for _ in rank.capacities]
    nodes = [child for root, _, _ in rank.roots() for child in root.children.values()]
    while nodes:
        node = nodes.pop()
        nodes += node.children.values()
        for pages, page_ids in zip(in_tree, node.pages, strict=True):
            if page_ids is not None:
                pages.append(page_ids)
    held = [rank.stay(lease) for lease in rank.core.leases.values()]
    for r, capacity in enumerate(rank.capacities):
        of_tree = np.bincount(joined(in_tree[r]), minlength=capacity)
        parts = rank.owners(r)
        if r == rank.plane.state:
            parts += [pages[r] for pages in held]
        elif r < rank.num_components:
            parts += [pages[r][of_tree[pages[r]] == 0] for pages in held]
        owners = of_tree + np.bincount(joined(parts), minlength=capacity)
        if (owners != 1).any():
            lost, shared = np.flatnonzero(owners == 0), np.flatnonzero(owners > 1)
            demand(False, "owners", rank.tier_of(r), "nobody's", lost, "shared", shared, "of", capacity)
    _check_transit(rank)


def _check_transit(rank: Rank) -> None:
    """No host page is free that somebody of this rank still reads or writes."""
    for id, work in rank.plane.work.items():
        for move in () if work.quiet else work.moves:
            page_ids = np.concatenate([move.src_page_ids, move.dst_page_ids])
            free = rank.owners(rank.num_components + rank.plane.index[move.component])[0]
            demand(not np.isin(page_ids, free).any(), "quiet", "pages of transfer", id, "are free:", page_ids)


def joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else NOTHING


def joined_set(arrays: list[np.ndarray]) -> set[int]:
    return set(joined(arrays).tolist())


def leading(ends: list[int], there: set[int]) -> int:
    for i, end in enumerate(ends):
        if end not in there:
            return i
    return len(ends)
