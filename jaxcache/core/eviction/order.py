"""What an order of eviction is, and what it may know.

An order holds exactly the entries that may leave now (unpinned, and for full attention without resident children), so
that the victim is found without a search. It never decides whether something may leave.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

from jaxcache.core.eviction.reuse_profile import ReuseProfile
from jaxcache.core.node import Node
from jaxcache.core.registry import register
from jaxcache.types import Tier


class OrderContext(NamedTuple):
    """What an order of eviction knows: it is of `node.pages[index]`, a tier with `num_pages` pages.

    profile: what is known about the reuse of pages, also of those that left (None unless the policy remembers)
    is_partial: entries are windows or states, which spare the tokens up to the entry above
    """

    index: int
    num_pages: int
    tier: Tier
    is_partial: bool
    profile: ReuseProfile | None


POLICIES: dict[str, type[EvictionOrder]] = {}  # those that have a name


class EvictionOrder(ABC):
    """The candidates of one (component, tier), best victim first.

    remembers: needs a profile, and `node.use`. by_priority: looks at `node.priority`

        class Newest(EvictionOrder, name="newest"): ...        CacheConfig(eviction_policy="newest")
    """

    remembers: ClassVar[bool] = False
    by_priority: ClassVar[bool] = False

    def __init_subclass__(cls, name: str | None = None):
        """name: by which it can be chosen; None: it is not a policy itself."""
        if name is not None:
            register(POLICIES, name, cls, "an eviction policy")

    def __init__(self, context: OrderContext):
        self.context = context

    @staticmethod
    def moment(context: OrderContext) -> int:
        """Changes whenever `first` of an order here may answer otherwise although nothing happened to its entries."""
        return 0

    @abstractmethod
    def add(self, node: Node) -> None:
        """A candidate that has just been used."""

    @abstractmethod
    def add_as_next_victim(self, node: Node) -> None:
        """A candidate that should leave before all others (generated text)."""

    @abstractmethod
    def readmit(self, node: Node) -> None:
        """A parent whose last child has left. Used at 7, it comes before a node that was used at 9, though it is added
        later."""

    @abstractmethod
    def discard(self, node: Node) -> None:
        """No candidate any more, or never one."""

    @abstractmethod
    def first(self) -> Node | None:
        """The best victim; asked again, it is the same. Chances may be spent to find it (see S3Fifo)."""

    @abstractmethod
    def __iter__(self) -> Iterator[Node]:
        """All, best victim first as far as that is decided (see S3Fifo, Adaptive). Changes nothing."""

    @abstractmethod
    def __contains__(self, node: Node) -> bool: ...

    @abstractmethod
    def __len__(self) -> int: ...
