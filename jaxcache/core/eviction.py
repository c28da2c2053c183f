"""Orders of eviction: which unpinned entry leaves next. One class each, found by name.

An order holds exactly the entries that may leave now (unpinned, and for full attention without resident children), so
that the victim is found in O(1). It knows nothing of tiers and pages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator

from jaxcache.core.radix_tree import Node


class EvictionOrder(ABC):
    """The candidates of one (component, tier), best victim first."""

    @abstractmethod
    def add(self, node: Node) -> None:
        """A candidate that has just been used."""

    @abstractmethod
    def add_oldest(self, node: Node) -> None:
        """A candidate that should leave before all others (a parent whose last child has left; generated text)."""

    @abstractmethod
    def discard(self, node: Node) -> None:
        """No candidate any more, or never one."""

    @abstractmethod
    def first(self) -> Node | None:
        """The best victim."""

    @abstractmethod
    def __iter__(self) -> Iterator[Node]:
        """Best victim first."""

    @abstractmethod
    def __contains__(self, node: Node) -> bool: ...

    @abstractmethod
    def __len__(self) -> int: ...


class Lru(EvictionOrder):
    """Least recently used first. Over an OrderedDict, where every operation is O(1) also after many evictions."""

    __slots__ = ("_nodes",)

    def __init__(self):
        self._nodes: OrderedDict[Node, None] = OrderedDict()

    def add(self, node: Node) -> None:
        self._nodes[node] = None

    def add_oldest(self, node: Node) -> None:
        self._nodes[node] = None
        self._nodes.move_to_end(node, last=False)

    def discard(self, node: Node) -> None:
        self._nodes.pop(node, None)

    def first(self) -> Node | None:
        return next(iter(self._nodes), None)

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes)

    def __contains__(self, node: Node) -> bool:
        return node in self._nodes

    def __len__(self) -> int:
        return len(self._nodes)


POLICIES: dict[str, type[EvictionOrder]] = {"lru": Lru}


def make_order(policy: str) -> EvictionOrder:
    if policy not in POLICIES:
        raise ValueError(f"eviction_policy must be one of {sorted(POLICIES)}, not {policy!r}")
    return POLICIES[policy]()
