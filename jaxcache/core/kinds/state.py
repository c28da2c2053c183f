"""Recurrent states: resuming at n needs the state after exactly n tokens, on the grid.

|------ prompt ------|-- generated --|        a lease writes its state to one slot, and to more of them where a
                stop ^         last  ^        later request may resume: those become the tree's at `insert`
                            grid point
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from jaxcache.core.kinds.base import Extra, FindEviction, Need, Path, last_eviction, num_pages_text, tier_name
from jaxcache.core.lease import Lease, Slots
from jaxcache.core.missing import Cause, Missing
from jaxcache.core.node import Node
from jaxcache.core.pages import Purpose, Residency
from jaxcache.core.tokens import Sequence
from jaxcache.types import PageIds, Span


class StateResidency(Residency):
    """One slot, at the end of its node: a split leaves it and its pins there. It may leave wherever it is."""

    __slots__ = ()

    def evictable(self, node: Node) -> bool:
        return node.pages[self.index] is not None and not node.pins[self.index]

    def put(self, node: Node, page_ids: PageIds) -> None:
        if not self._come(node, page_ids):
            self._candidate(node)

    def take(self, node: Node) -> PageIds:
        return self._leave(node)

    def shorten(self, node: Node, num_pages: int) -> PageIds:
        """It was at the end that is cut off."""
        return self._leave(node)

    def split(self, node: Node, prefix: Node, num_pages: int) -> None:
        pass


class State(Extra, name="state"):
    """One state for each node at whose end a request can resume."""

    residency: ClassVar[type[Residency]] = StateResidency

    def first_needed(self, n: int) -> int:
        return n - 1

    def num_entry_pages(self, num_tokens: int) -> int:
        return 1

    def num_needed_pages(self, start: int, end: int) -> int:
        return 1

    def top_of(self, node: Node) -> int:
        return node.end - 1

    def usable(self, path: Path) -> list[bool]:
        grid = self.grid_tokens
        return [end == node.end and end % grid == 0 and self.resident(node) for node, end in path]

    # ---- leases

    def num_own_pages(self, num_cached: int, end: int) -> int:
        return 1

    def pin(self, lease: Lease, need: Need) -> None:
        lease._slots = slots = Slots()
        lease.parts.append(slots)
        self.device.pin_up(lease._node, need.low)

    def open(self, lease: Lease, need: Need) -> None:
        slots: Slots = lease.parts[self.p]
        states = lease._node.pages[self.c]
        slots.write = self.device.allocator.allocate_one()
        slots.read = None if states is None else states.item(0)
        slots.node = lease._node if lease._node.parent is not None else None

    def stops(self, num_prompt: int, has_branch: bool) -> list[int]:
        """The prompt's last grid point. A prompt that ends there itself, sent again, has to resume one grid point
        earlier: unless there are two stops already, that is one, too."""
        last = num_prompt // self.grid_tokens * self.grid_tokens
        return [last - self.grid_tokens, last] if last == num_prompt and not has_branch else [last]

    def grow(self, lease: Lease, low: int, high: int) -> None:
        """Slots for the states to keep in (low, high]; a missing slot only costs a later hit."""
        slots: Slots = lease.parts[self.p]
        for stop in lease._stops:
            if low < stop <= high and stop not in slots.checkpoints:
                self._checkpoint(lease, slots, stop)
        last = high // self.grid_tokens * self.grid_tokens
        if last > low and last > lease.sequence.prompt_tokens and last not in slots.checkpoints:
            earlier = slots.last_grid_point
            if earlier in slots.checkpoints:  # while decoding only the last grid point is kept
                slots.checkpoints[last] = slots.checkpoints.pop(earlier)
                slots.written.pop(earlier, None)
            else:
                self._checkpoint(lease, slots, last)
            slots.last_grid_point = last

    def _checkpoint(self, lease: Lease, slots: Slots, position: int) -> None:
        device = self.device
        if device.allocator.num_free or (
            device.available(lease._node.account) and self.tiers.make_room(device, 1, lease.purpose)
        ):
            slots.checkpoints[position] = device.allocator.allocate_one()
        elif position <= lease.sequence.num_tokens:
            self.tiers.note_unmade(lease.sequence, position, Cause.NO_SLOT)

    def num_missing_pages(self, num_pages: int) -> int:
        """Its slot is written again and again."""
        return 0

    def extend(self, lease: Lease, num_pages: int) -> None:
        pass

    def release(self, lease: Lease) -> None:
        slots: Slots = lease.parts[self.p]
        for slot in (slots.write, *slots.checkpoints.values()):
            self.device.allocator.free_one(slot)
        self._let_go_of_read(slots)

    def owned(self, lease: Lease) -> list[PageIds]:
        slots: Slots = lease.parts[self.p]
        return [np.array([slots.write, *slots.checkpoints.values()], np.int32)]

    # ---- publishing

    def window_start_to_keep(self, lease: Lease, num_computed: int) -> int | None:
        return None

    def begin_insert(self, lease: Lease, num_computed: int) -> None:
        if num_computed > lease.num_cached_tokens:
            self._let_go_of_read(lease.parts[self.p])

    def _let_go_of_read(self, slots: Slots) -> None:
        if slots.node is not None:
            self.device.unpin(slots.node)
            slots.node = None

    def end_insert(self, lease: Lease, num_computed: int) -> None:
        slots: Slots = lease.parts[self.p]
        stop = min(lease._published, num_computed)
        for position in [position for position in slots.checkpoints if position <= stop]:
            self._publish_state(lease, slots, position, slots.checkpoints.pop(position))

    def _publish_state(self, lease: Lease, slots: Slots, position: int, slot: int) -> None:
        """Hands a checkpoint to the node that ends exactly there."""
        tiers, device = self.tiers, self.device
        if slots.written.pop(position, False) is False:
            device.allocator.free_one(slot)
            self.counters["unwritten_states"] += 1
            tiers.note_unmade(lease.sequence, position, Cause.NOT_REPORTED)
            return
        node = lease._node
        while node.parent is not None and node.start >= position:
            node = node.parent
        if node.end > position:
            node = tiers.split(node, position)
        assert node.end == position, f"{node=} {position=}"
        if node.pages[self.c] is None:
            tiers.put(device, node, np.array([slot], np.int32))
        else:
            device.allocator.free_one(slot)
        self._limit_states_on_path(node, lease)

    def _limit_states_on_path(self, newest: Node, lease: Lease) -> None:
        """Which states above `newest` are kept, and which leave first.

        root --- S -+- p1 --- e1 --- p2 --- newest        passed: p1, e1, p2, which only lead to `newest`
                    `- ...                                shared: S, from where other ways go on

        Of those in the text that this request has generated none is kept. Of the others, with `newest`, at most
        max_states_per_path on the device: the shallow ones go first, and those that are passed before those that are
        shared. What is passed and kept leaves before other states when room is needed.
        """
        passed, shared = self._states_above(newest)
        generated = [node for node in passed if node.end > lease.sequence.prompt_tokens]
        passed = passed[len(generated) :]
        self._drop(self.host, generated, lease, "a later state of the same answer")
        self._drop(self.device, generated, lease, "a later state of the same answer")
        kept = [node for node in [*passed[::-1], *shared[::-1]] if node.pages[self.c] is not None]
        num_surplus = max(0, len(kept) + 1 - self.tiers.config.max_states_per_path)
        self._drop(self.device, kept[:num_surplus], lease, "max_states_per_path")
        for node in passed:  # the shallowest is the first to leave
            self.device.demote(node)
            self.host.demote(node)

    def _states_above(self, newest: Node) -> tuple[list[Node], list[Node]]:
        """The nodes above with a state, deepest first: those whose only way on is `newest`, and all above them."""
        passed: list[Node] = []
        shared: list[Node] = []
        found, node = passed, newest.parent
        while node is not None and node.parent is not None:
            if len(node.children) > 1:
                found = shared
            if self.resident(node):
                found.append(node)
            node = node.parent
        return passed, shared

    def _drop(self, residency: Residency, nodes: list[Node], lease: Lease, reason: str) -> None:
        """What is pinned stays."""
        for node in nodes:
            if node.pages[residency.index] is not None and not node.pins[residency.index]:
                self.tiers.drop(residency, node, Purpose(lease.id, lease._node.account, reason))

    # ---- storage

    def unit_pages(self) -> int:
        """States are not consecutive: each is a value of its own."""
        return 1

    def asked_ends(self, start: int, ends: list[int]) -> list[int]:
        return ends

    def servable(self, end: int, there: set[int]) -> bool:
        return end in there

    def accept(self, node: Node, end: int, fetched: PageIds) -> tuple[PageIds, list[Node]]:
        if self.resident(node) or not self.may_be_in_host(node):
            return fetched, []
        self.tiers.put(self.host, node, fetched)
        return fetched[:0], [node]

    # ---- to look at

    def span_of(self, node: Node, end: int) -> Span | None:
        """It is that after so many tokens."""
        return Span(end, end) if end == node.end else None

    def missing(self, sequence: Sequence, path: Path, end: int, find_eviction: FindEviction) -> Iterator[Missing]:
        at_end = next((node for node, stop in path if stop == end == node.end), None)
        if at_end is not None and self.resident(at_end):
            return
        eviction = None if at_end is None else last_eviction(self, at_end, find_eviction)
        unmade = self.tiers.unmade_state(sequence, end) if eviction is None else None
        cause = Cause.EVICTED if eviction is not None else unmade or Cause.NEVER_MADE
        remedies = [
            f"The next request that ends a chunk at {end} (Lease.next_stop), writes the state to its slot of "
            f"Lease.checkpoints and says insert(..., states=[{end}]) makes it."
        ]
        if cause is Cause.NO_SLOT:
            num = self.device.allocator.num_pages
            remedies.append(
                f"More slots would have kept it: {self.name} has {num} on the device, three for each request that runs."
            )
        elif eviction is not None and eviction.reason == "room":
            remedies.append(f"More slots would have kept it: {self.name} has {num_pages_text(self, eviction)}.")
        elif eviction is not None and eviction.reason == "max_states_per_path":
            most = self.tiers.config.max_states_per_path
            remedies.append(f"A larger max_states_per_path would have kept it: it is {most}.")
        yield Missing(self.name, Span(end, end), cause, eviction, tuple(self._nearest(path, end)), tuple(remedies))

    def _nearest(self, path: Path, end: int) -> Iterator[tuple[str, Span]]:
        """The last state before `end`, and the first after it, which may lie where the sequence goes another way."""
        states = [(tier, Span(node.end, node.end)) for node, _ in path if (tier := tier_name(self, node))]
        yield from [found for found in states if found[1].stop < end][-1:]
        yield from [found for found in states if found[1].stop > end][:1]
