"""What one component keeps, and all in which its kind differs from the others.

    kind      resuming at n needs                a lease has         leaves a tier
    prefix    every page of [0, n)               a table             from the outside in: a node's before its parent's
    window    the pages over the last tokens     a table             anywhere, passed ones first
    state     the state at exactly n             slots               anywhere, passed ones first

The first component is full attention, the tree itself: a node is there as long as its full pages are. The others are
extras: a model without any pays for none, since what is done for extras is a loop over nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar, NamedTuple

from jaxcache.core.decisions import Counters
from jaxcache.core.lease import Lease
from jaxcache.core.missing import Missing
from jaxcache.core.node import Node
from jaxcache.core.pages import Residency
from jaxcache.core.registry import register
from jaxcache.core.tiers import Eviction, Tiers
from jaxcache.core.tokens import Sequence
from jaxcache.types import PageIds, Span, Tier

Path = list[tuple[Node, int]]  # (node, end of what is used of it), from the top; only the last may be used in part
FindEviction = Callable[[int, int], Eviction | None]  # of an entry: node id, residency index


KINDS: dict[str, type[Kind]] = {}  # by name


class Need(NamedTuple):
    """What admitting at a position takes of one component.

    loads:     nodes whose entries are only in host memory, top first
    low:       nodes that end above this position are needed
    num_own:   pages that will be the lease's own
    num_pages: device pages that it pins anew, loads back or owns
    """

    loads: list[Node]
    low: int
    num_own: int
    num_pages: int


class Kind(ABC):
    """One component on both tiers. c: its place among the components

    residency: what its entries are on each tier

        class Chunk(Suffix, name="chunk"): ...        what a component with the ClassVar kind="chunk" is
    """

    residency: ClassVar[type[Residency]]

    def __init_subclass__(cls, name: str | None = None):
        """name: of this kind, for components; None: no component is of it."""
        if name is not None:
            register(KINDS, name, cls, "a kind")

    def __init__(self, tiers: Tiers, c: int, counters: Counters):
        self.tiers, self.c, self.counters = tiers, c, counters
        self.component = tiers.components[c]
        self.name = self.component.name
        self.device, self.host = tiers.device[c], tiers.host[c]
        self.page_tokens, self.grid_tokens = tiers.page_tokens, tiers.grid_tokens

    # ---- what there is

    @abstractmethod
    def first_needed(self, n: int) -> int:
        """Resuming at n > 0 needs the entries of the nodes that end above this position and at n at the latest."""

    @abstractmethod
    def num_entry_pages(self, num_tokens: int) -> int:
        """Pages of an entry that stands for so many tokens."""

    @abstractmethod
    def top_of(self, node: Node) -> int:
        """How far up pins reach that hold the entry of this node alone."""

    def resident(self, node: Node) -> bool:
        """On the device or in host memory."""
        pages = node.pages
        return pages[self.device.index] is not None or pages[self.host.index] is not None

    def is_on_device(self, num_tokens: int, node: Node) -> bool:
        """Whether all that resuming at `num_tokens`, in `node` or at its end, needs is."""
        low = self.first_needed(num_tokens)
        while node.parent is not None and min(node.end, num_tokens) > low:
            if node.pages[self.c] is None:
                return False
            node = node.parent
        return True

    def num_needed_pages(self, start: int, end: int) -> int:
        """How many pages it takes to resume at `end`, of which full attention has those up to `start`."""
        return self.num_entry_pages(max(0, end - self.first_needed(end)))

    def num_reserved_pages(self, start: int, end: int) -> int:
        """The same for any end up to this one, when it is not known yet which. Here a later end needs no fewer."""
        return self.num_needed_pages(start, end)

    def is_there(self, node: Node) -> bool:
        """Whether what resuming at the end of a node needs is on the device."""
        return self.is_on_device(node.end, node)

    def top_needed(self, node: Node) -> int:
        """Start of the topmost entry that resuming at the end of a node needs: pins end where nodes do."""
        low = top = self.first_needed(node.end)
        while node.parent is not None and node.end > low:
            top = self.top_of(node)
            node = node.parent
        return top

    # ---- leases

    @abstractmethod
    def num_own_pages(self, num_cached: int, end: int) -> int:
        """Pages of its own that a lease needs to compute [num_cached, end)."""

    def need(self, num_tokens: int, node: Node, end: int) -> Need:
        """What a lease takes that resumes at `num_tokens`, in `node` or at its end, and computes up to `end`."""
        c, low, stop = self.c, self.first_needed(num_tokens), num_tokens
        num_pages = num_own = self.num_own_pages(num_tokens, end)
        loads = []
        while node.parent is not None and stop > low:
            start = node.parent.end
            if node.pages[c] is None or not node.pins[c]:
                num_pages += self.num_entry_pages(stop - start)
                if node.pages[c] is None:
                    loads.append(node)
            node, stop = node.parent, start
        return Need(loads[::-1], low, num_own, num_pages)

    @abstractmethod
    def owned(self, lease: Lease) -> list[PageIds]:
        """The pages of a lease that are not the tree's, but for duplicates."""

    # ---- host memory and storage

    def unit_pages(self) -> int:
        """Pages of a unit of storage: so many may share a value."""
        return self.tiers.config.unit_pages(self.name)

    def may_be_in_host(self, node: Node) -> bool:
        """Closure: windows and states are in host memory only where the node's full pages are."""
        return node.pages[len(self.tiers.components)] is not None

    @abstractmethod
    def asked_ends(self, start: int, ends: list[int]) -> list[int]:
        """Where the pages end that storage is asked for, to resume at one of `ends` when `start` is there."""

    # ---- to look at

    @abstractmethod
    def span_of(self, node: Node, end: int) -> Span | None:
        """The tokens that an entry stands for where a prompt agrees up to `end`; None: it is of no use there."""


class Extra(Kind):
    """A window or a state: what a node may have beside its full pages. p: its place among the parts of a lease"""

    def __init__(self, tiers: Tiers, c: int, counters: Counters):
        super().__init__(tiers, c, counters)
        self.p = c - 1

    @abstractmethod
    def usable(self, path: Path) -> list[bool]:
        """For each end on a path whether a request could resume there, as far as this kind is concerned."""

    # ---- leases

    def stops(self, num_prompt: int, has_branch: bool) -> Iterable[int]:
        """Where chunks of a prompt should end. has_branch: one does already, where something is missing."""
        return ()

    @abstractmethod
    def pin(self, lease: Lease, need: Need) -> None:
        """Gives a lease its part, and pins what it needs on the device."""

    @abstractmethod
    def open(self, lease: Lease, need: Need) -> None:
        """Fills a lease's part: its room is free, and what it needs is on the device."""

    @abstractmethod
    def num_missing_pages(self, num_pages: int) -> int:
        """How many pages a lease is to get whose table lacks so many."""

    @abstractmethod
    def extend(self, lease: Lease, num_pages: int) -> None:
        """Gives a lease's table that many pages, which are free."""

    def grow(self, lease: Lease, low: int, high: int) -> None:
        """A lease is about to compute (low, high], for which its tables have room."""

    def report(self, lease: Lease, num_computed: int) -> None:
        """A lease has computed up to here: what it does not need any more is given back."""

    @abstractmethod
    def release(self, lease: Lease) -> None:
        """Gives back own pages and pins; nothing that another lease or the tree holds."""

    # ---- publishing

    @abstractmethod
    def window_start_to_keep(self, lease: Lease, num_computed: int) -> int | None:
        """Pages of its table below this are not published; None: it has no table."""

    def begin_insert(self, lease: Lease, num_computed: int) -> None:
        """Pages are about to be published."""

    def publish(self, lease: Lease, child: Node, at: int, live: int) -> None:
        """The pages of [at, child.end) become the tree's, or give way to those that it has; pinned in either case."""

    def end_insert(self, lease: Lease, num_computed: int) -> None:
        """All whole pages are published."""

    # ---- storage, and to look at

    @abstractmethod
    def servable(self, end: int, there: set[int]) -> bool:
        """Whether what resuming at `end` needs is there. there: ends of the pages that storage has"""

    @abstractmethod
    def accept(self, node: Node, end: int, fetched: PageIds) -> tuple[PageIds, list[Node]]:
        """What was fetched, whole, to resume at `end`, where `node` ends, becomes the tree's.

        Returns the pages that were not taken, and the nodes that have got an entry.
        """

    @abstractmethod
    def missing(self, sequence: Sequence, path: Path, end: int, find_eviction: FindEviction) -> Iterator[Missing]:
        """What keeps a request from resuming at `end`. path: of the sequence, beyond `end` too."""


def keep_duplicates(lease: Lease, c: int, page_ids: PageIds) -> None:
    """The loop still has a table with these: they are the lease's own until it has another one, or is released."""
    if lease._duplicates is None:
        lease._duplicates = []
    lease._duplicates.append((c, page_ids))


def tier_name(kind: Kind, node: Node) -> str | None:
    """Where an entry is, the device first; None: nowhere."""
    for residency in (kind.device, kind.host):
        if node.pages[residency.index] is not None:
            return residency.tier.name
    return None


def last_eviction(kind: Kind, node: Node, find_eviction: FindEviction) -> Eviction | None:
    """Of an entry, which may have been on both tiers."""
    both = [find_eviction(node.id, residency.index) for residency in (kind.device, kind.host)]
    known = [eviction for eviction in both if eviction is not None]
    return max(known, key=lambda eviction: (eviction.step, eviction.tier), default=None)


def num_pages_text(kind: Kind, eviction: Eviction) -> str:
    """How many there were where it was evicted."""
    residency = (kind.device, kind.host)[eviction.tier]
    return f"{residency.allocator.num_pages} on {'the device' if eviction.tier is Tier.DEVICE else 'the host'}"
