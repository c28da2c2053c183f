"""Who pins entries, beside running leases: transfers until they are over, and retentions until their step has come.

    owner                  pins
    LOAD_BACK (its id)     on the device, what it writes, until that has been scattered
    STORE (its id)         in host memory, what it reads, until it is quiet
    FETCH (its id)         in host memory, what it has brought, until it is quiet
    a retention            on the device, what resuming at its end needs
    "sources"              in host memory, what is about to be loaded back, while room is made for it
    "a reservation"        in host memory, what fetched pages will hang below, while room is made for them

Each pin reaches up to the root in full attention of its tier; under write_back one in host memory also pins the device
pages above it, below which it may hang.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable
from typing import NamedTuple

from jaxcache.core.node import Node
from jaxcache.core.pages import Residency
from jaxcache.types import Tier


class Hold(NamedTuple):
    """Pins on the entries of [top, node.end) of one residency; a split of the node changes nothing about it."""

    residency: Residency
    node: Node
    top: int


class Holds(dict[Hashable, list[Hold]]):
    """By owner. full: the residencies of full attention, by tier

    writes_back: host pages may lie below pages that are only on the device
    """

    def __init__(self, full: tuple[Residency, Residency], writes_back: bool):
        super().__init__()
        self.full = full
        self.writes_back = writes_back

    def add(self, owner: Hashable, residency: Residency, node: Node, top: int) -> None:
        """Pins [top, node.end) of a residency, and full attention up to the root."""
        holds = self.setdefault(owner, [])
        if not residency.is_closed:
            holds.append(_pinned(residency, node, top))
        holds.append(_pinned(self.full[residency.tier], node, 0))
        if self.writes_back and residency.tier is Tier.HOST and node.parent is not None:
            holds.append(_pinned(self.full[Tier.DEVICE], node.parent, 0))

    def release(self, owner: Hashable, is_use: bool = True) -> None:
        """Everything that an owner pins. is_use: it counts as used now"""
        for held in self.pop(owner, ()):
            held.residency.unpin_up(held.node, held.top, is_use)

    def release_device(self, owner: Hashable) -> None:
        """For a transfer that is decided, and not quiet yet: what it may still touch is in host memory."""
        self._release_some(owner, lambda held: held.residency.tier is Tier.DEVICE)

    def release_at(self, owner: Hashable, nodes: Container[int]) -> list[Hold]:
        """What it pins at some nodes, by id."""
        return self._release_some(owner, lambda held: held.node.id in nodes)

    def _release_some(self, owner: Hashable, goes: Callable[[Hold], bool]) -> list[Hold]:
        gone = [held for held in self.get(owner, ()) if goes(held)]
        if gone:
            self[owner] = [held for held in self[owner] if not goes(held)]
            for held in gone:
                held.residency.unpin_up(held.node, held.top)
        return gone

    def suspend(self) -> None:
        """Takes every pin away while the tree is cleared; `resume` pins what is left again."""
        for holds in self.values():
            for held in holds:
                held.residency.unpin_up(held.node, held.top)

    def resume(self) -> None:
        """What is left is in host memory from the root down, and needs nothing on the device above it."""
        for holds in self.values():
            holds[:] = [held for held in holds if held.node.parent is not None and held.residency.tier is Tier.HOST]
            for held in holds:
                held.residency.pin_up(held.node, held.top)

    def are_on_device(self) -> bool:
        """Whether a transfer pins anything there."""
        transfers = (holds for owner, holds in self.items() if isinstance(owner, int))
        return any(held.residency.tier is Tier.DEVICE for holds in transfers for held in holds)


def _pinned(residency: Residency, node: Node, top: int) -> Hold:
    residency.pin_up(node, top)
    return Hold(residency, node, top)
