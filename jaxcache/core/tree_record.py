"""The tree as plain arrays: what a snapshot keeps of it, and what core/restoring.py makes of it.

    nodes, parents first     0     1     2          parent = [-1, 0, 0]: below the root of namespace 0, below node 0
    pages of a component     |---- on the device ----|---- only in host memory ----|
                             0                    device pages                  all pages

Page ids mean nothing in another cache. So an entry says where its pages stand in the snapshot, which holds each page
once, whichever tiers it was on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from jaxcache.core.kinds import Kind
from jaxcache.core.node import Node
from jaxcache.core.pages import Residency
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.core.tree import RadixTree
from jaxcache.types import NO_PAGES, PageIds

NOWHERE = -1  # instead of the first page of an entry that is not there

Origins = list[np.ndarray]  # by residency: int64[num_pages], where in the snapshot what a page holds stands


@dataclass(frozen=True, eq=False)
class TreeRecord:
    """The nodes that a request can find, and what is known about them.

    namespaces:  the fields of each; retired: digests of those that must not come back
    page_tokens: tokens of a page
    parent:      int32[nodes], an earlier node, or -1 - i for the root of namespace i
    num_pages:   int32[nodes], pages of the node's tokens
    tokens:      int32[sum(num_pages) * page_tokens], node after node
    hits, last_used, priority, is_output: [nodes], see `Node`
    first_page:  int64[nodes, residencies]: where an entry's pages begin in the snapshot; NOWHERE: there is none.
                 Residencies are the components on the device, then in host memory
    orders:      by residency int32[...]: the nodes whose entries may leave, best victim first
    """

    namespaces: tuple[Mapping[str, str], ...]
    retired: tuple[bytes, ...]
    page_tokens: int
    parent: np.ndarray
    num_pages: np.ndarray
    tokens: np.ndarray
    hits: np.ndarray
    last_used: np.ndarray
    priority: np.ndarray
    is_output: np.ndarray
    first_page: np.ndarray
    orders: tuple[np.ndarray, ...]

    @property
    def num_nodes(self) -> int:
        return len(self.parent)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def num_entry_pages(self, kind: Kind) -> np.ndarray:
        """int64[nodes]: how many pages an entry of a component has."""
        return np.array([kind.num_entry_pages(n * self.page_tokens) for n in self.num_pages.tolist()], np.int64)

    def subset(self, kept: np.ndarray, stays: Sequence[bool]) -> TreeRecord:
        """The nodes of bool[nodes] `kept` and the namespaces that stay; none is kept without what it hangs on."""
        number = np.cumsum(kept, dtype=np.int32) - 1
        number_of_root = np.cumsum([0, *stays], dtype=np.int32)  # of those before
        parent = self.parent[kept]
        root = number_of_root[np.minimum(parent, -1) * -1 - 1]
        of_token = np.repeat(kept, self.num_pages * self.page_tokens)
        return replace(
            self,
            namespaces=tuple(fields for fields, stay in zip(self.namespaces, stays, strict=True) if stay),
            parent=np.where(parent < 0, -1 - root, number[np.maximum(parent, 0)]).astype(np.int32),
            num_pages=self.num_pages[kept],
            tokens=self.tokens[of_token],
            hits=self.hits[kept],
            last_used=self.last_used[kept],
            priority=self.priority[kept],
            is_output=self.is_output[kept],
            first_page=self.first_page[kept],
            orders=tuple(number[order[kept[order]]] for order in self.orders),
        )


class Sources(NamedTuple):
    """Where a component's pages are now, in the order of the snapshot: those on the device, then those that are only in
    host memory."""

    device_ids: PageIds
    host_ids: PageIds

    @property
    def num_pages(self) -> int:
        return len(self.device_ids) + len(self.host_ids)


def findable_nodes(tree: RadixTree) -> list[Node]:
    """Every node below the roots that are not retired, parents first."""
    nodes = []
    stack = [child for root in tree.roots.values() for child in root.children.values()][::-1]
    while stack:
        node = stack.pop()
        nodes.append(node)
        stack += list(node.children.values())[::-1]
    return nodes


def sources_of(core: PrefixCache) -> tuple[list[Sources], Origins]:
    """Numbers the pages of every component: where they are now, and the number of each page id, by residency."""
    nodes = findable_nodes(core.tiers.tree)
    sources: list[Sources] = []
    origins = [np.full(residency.allocator.num_pages, NOWHERE, np.int64) for residency in core.tiers.residencies]
    for device, host in zip(core.tiers.device, core.tiers.host, strict=True):
        on_device = [node for node in nodes if node.pages[device.index] is not None]
        on_both = [node for node in on_device if node.pages[host.index] is not None]
        on_host = [node for node in nodes if node.pages[device.index] is None and node.pages[host.index] is not None]
        found = Sources(_page_ids(on_device, device), _page_ids(on_host, host))
        sources.append(found)
        of_device, of_host = origins[device.index], origins[host.index]
        of_device[found.device_ids] = np.arange(len(found.device_ids))
        of_host[found.host_ids] = np.arange(len(found.device_ids), found.num_pages)
        of_host[_page_ids(on_both, host)] = of_device[_page_ids(on_both, device)]
    return sources, origins


def _page_ids(nodes: list[Node], residency: Residency) -> PageIds:
    pages = [page_ids for node in nodes if (page_ids := node.pages[residency.index]) is not None]
    return np.concatenate(pages) if pages else NO_PAGES


def record_of(core: PrefixCache, origins: Origins) -> TreeRecord:
    """What a request can find, with the pages' numbers in a snapshot. Changes nothing."""
    tree, residencies = core.tiers.tree, core.tiers.residencies
    nodes = findable_nodes(tree)
    number = {node.id: i for i, node in enumerate(nodes)}
    number |= {root.id: -1 - i for i, root in enumerate(tree.roots.values())}
    first_page = np.full((len(nodes), len(residencies)), NOWHERE, np.int64)
    for i, node in enumerate(nodes):
        for r, page_ids in enumerate(node.pages):
            if page_ids is not None:
                first_page[i, r] = origins[r][page_ids[0]]
    edges = b"".join(bytes(node.edge) for node in nodes)
    return TreeRecord(
        namespaces=tuple(tree.namespaces[digest].fields for digest in tree.roots),
        retired=tuple(tree.retired),
        page_tokens=tree.page_tokens,
        parent=np.array([number[node.parent.id] for node in nodes if node.parent is not None], np.int32),
        num_pages=np.array([len(node.edge) // tree.page_bytes for node in nodes], np.int32),
        tokens=np.frombuffer(edges, np.int32),
        hits=np.array([node.hits for node in nodes], np.int64),
        last_used=np.array([node.last_used for node in nodes], np.int64),
        priority=np.array([node.priority for node in nodes], np.int64),
        is_output=np.array([node.is_output for node in nodes], np.bool_),
        first_page=first_page,
        orders=tuple(_order(residency, nodes, number) for residency in residencies),
    )


def _order(residency: Residency, nodes: list[Node], number: Mapping[int, int]) -> np.ndarray:
    """The order of eviction; what is pinned now, by a retention, leaves after all others."""
    index = residency.index
    order = [node for node in residency.order if node.id in number]  # the others are retired
    pinned = [node for node in nodes if node.pages[index] is not None and node.pins[index]]
    pinned = [node for node in pinned if not (residency.is_closed and node.resident_children[index])]
    order += sorted(pinned, key=lambda node: node.last_used)
    return np.array([number[node.id] for node in order], np.int32)
