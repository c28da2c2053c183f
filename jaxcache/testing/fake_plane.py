"""A data plane of one rank without devices: page id -> content, a function of what the page stands for.

Every read checks the content, so a page that was freed too early, reused, or loaded to the wrong place is found at the
first read. Storage I/O advances when `work` is called, in pieces and in any order, and may fail.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from jaxcache.core.lease import Lease
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.core.sequence import Sequence
from jaxcache.types import Move, Outcome, Transfer, TransferKind


class Content(NamedTuple):
    """What a page (or state) of a component holds after the tokens that `key` and `tail` stand for."""

    component: str
    key: bytes
    tail: bytes


def content(component: str, sequence: Sequence, num_tokens: int) -> Content:
    """The content that stands for the first `num_tokens` of a sequence, in its namespace."""
    whole = num_tokens * 4 // sequence.page_bytes
    key = sequence.page_keys(whole)[-1] if whole else sequence.namespace.digest
    return Content(component, key, bytes(sequence.data[whole * sequence.page_bytes : num_tokens * 4]))


class PageJob(NamedTuple):
    """One page still to be stored or fetched: its place in its move, its host page and its key."""

    component: str
    place: int
    page_id: int
    key: bytes


class FakeIo:
    """A storage transfer under way."""

    def __init__(self, transfer: Transfer, order: random.Random):
        self.transfer = transfer
        self.todo: list[PageJob] = []
        self.good: dict[str, dict[int, None]] = {move.component: {} for move in transfer.moves}
        for move in transfer.moves:
            ids = move.src_page_ids if transfer.kind is TransferKind.STORE else move.dst_page_ids
            if transfer.kind is not TransferKind.QUERY:
                pages = enumerate(zip(ids.tolist(), move.page_keys, strict=True))
                self.todo += [PageJob(move.component, place, id, key) for place, (id, key) in pages]
        if order.random() < 0.5:
            order.shuffle(self.todo)
        self.asked = False
        self.result: dict[str, int] | None = None  # what was said to have come, from the moment it is done

    def leading(self, component: str) -> int:
        good = self.good[component]
        count = 0
        while count in good:
            count += 1
        return count


class FakePlane:
    """device, host: component -> page id -> Content. storage: {Content: None}, may be shared by planes.

    faults: share of storage reads and writes that fail, and chance per step that a transfer passes its deadline
    """

    def __init__(self, core: PrefixCache, storage: dict[Content, None], seed: int, faults: float = 0.02):
        self.core = core
        self.storage = storage
        self.random = random.Random(seed)
        self.faults = faults
        names = [component.name for component in core.components]
        self.device: dict[str, dict[int, Content]] = {name: {} for name in names}
        self.host: dict[str, dict[int, Content]] = {name: {} for name in names}
        self.arriving: list[tuple[str, list[int], list[Content | None]]] = []
        self.arriving_step = -1
        self.io: dict[int, FakeIo] = {}

    # ---- plans

    def apply(self) -> None:
        """Scatters the load-backs of earlier steps, then carries out the plan in order."""
        if self.arriving_step < self.core.step_number:
            self.scatter()
        for transfer in self.core.take_plan().transfers:
            if transfer.kind is TransferKind.BACKUP:
                for move in transfer.moves:
                    self._back_up(move)
            elif transfer.kind is TransferKind.LOAD_BACK:
                self.arriving_step = self.core.step_number
                for move in transfer.moves:
                    host = self.host[move.component]
                    loaded = [host.get(id) for id in move.src_page_ids.tolist()]
                    self.arriving.append((move.component, move.dst_page_ids.tolist(), loaded))
            else:
                self.io[transfer.id] = FakeIo(transfer, self.random)

    def _back_up(self, move: Move) -> None:
        device, host = self.device[move.component], self.host[move.component]
        for source, target in zip(move.src_page_ids.tolist(), move.dst_page_ids.tolist(), strict=True):
            host[target] = device[source]

    def scatter(self) -> None:
        for component, ids, loaded in self.arriving:
            for id, page in zip(ids, loaded, strict=True):
                assert page is not None, f"a load-back of {component} read a host page that nobody had written"
                self.device[component][id] = page
        self.arriving.clear()

    def lose_device(self) -> None:
        """The device and all that is on its way to it are lost."""
        self.arriving.clear()
        for pages in self.device.values():
            pages.clear()

    # ---- storage

    def work(self, num_pages: int) -> None:
        """Moves up to so many pages of every storage transfer."""
        unwanted = self.core.unwanted_transfers()
        for id, io in self.io.items():
            if id in unwanted and self.random.random() < 0.5:
                io.todo.clear()  # a worker that was told to stop, some time later
            for _ in range(min(num_pages, len(io.todo))):
                self._move_page(io, io.todo.pop(0))

    def _move_page(self, io: FakeIo, job: PageJob) -> None:
        page = Content(job.component, job.key, b"")
        host = self.host[job.component]
        lucky = self.random.random() >= self.faults
        if io.transfer.kind is TransferKind.STORE:
            assert host.get(job.page_id) == page, f"STORE read {host.get(job.page_id)} where {page} should be"
            if lucky:
                self.storage[page] = None
                io.good[job.component][job.place] = None
        elif lucky and page in self.storage:
            host[job.page_id] = page
            io.good[job.component][job.place] = None
        else:
            host[job.page_id] = Content("torn", job.key, b"")

    def outcomes(self) -> dict[int, Outcome]:
        """What this rank says about every live storage transfer."""
        live = self.core.live_transfers()
        self.io = {id: io for id, io in self.io.items() if id in live}
        return {id: self._outcome(id) for id in live}

    def _outcome(self, id: int) -> Outcome:
        io = self.io.get(id)
        if io is None:  # planned, but not applied yet
            return Outcome(False, False)
        if io.transfer.kind is TransferKind.QUERY:
            if not io.asked and self.random.random() < 0.3:
                return Outcome(False, True)
            io.asked = True
            exists = {
                move.component: [Content(move.component, key, b"") in self.storage for key in move.page_keys]
                for move in io.transfer.moves
            }
            end = self.core.largest_end(id, exists)
            return Outcome(True, True, smallest_end=end, largest_end=end)
        if io.result is None:
            pages = {move.component: io.leading(move.component) for move in io.transfer.moves}
            if io.todo and self.random.random() >= self.faults:
                return Outcome(False, False, pages)
            io.result = pages  # over, or past its deadline while a thread still reads or writes
        return Outcome(True, not io.todo, io.result)

    # ---- the model's side

    def model_step(self, lease: Lease, begin: int, end: int) -> None:
        """Computes tokens [begin, end) of a lease: reads everything that resuming needs, writes the chunk."""
        core, sequence = self.core, lease.sequence
        page = core.config.page_tokens
        for c, component in enumerate(core.components):
            name = component.name
            if c == core.tiers.point:
                self._state_step(name, lease, begin, end)
                continue
            table = lease.page_tables[name].tolist()
            for i in range(core.tiers.required_start(c, begin) // page, -(-begin // page)):
                self.read(name, table[i], content(name, sequence, min(begin, (i + 1) * page)))
            for i in range(begin // page, -(-end // page)):
                self.write(name, table[i], content(name, sequence, min(end, (i + 1) * page)))

    def _state_step(self, name: str, lease: Lease, begin: int, end: int) -> None:
        sequence = lease.sequence
        assert lease.write_slot is not None
        if begin:
            first = begin == lease.num_cached_tokens
            slot = lease.read_slot if first else lease.write_slot
            assert slot is not None
            self.read(name, slot, content(name, sequence, begin))
        self.write(name, lease.write_slot, content(name, sequence, end))
        if end in lease.checkpoints:
            self.write(name, lease.checkpoints[end], content(name, sequence, end))

    def read(self, component: str, page_id: int, expected: Content) -> None:
        found = self.device[component].get(page_id)
        assert found == expected, f"a model step read {found} from page {page_id}, {expected} should be there"

    def write(self, component: str, page_id: int, page: Content) -> None:
        self.device[component][page_id] = page


def reduce(outcomes: list[dict[int, Outcome]]) -> dict[int, Outcome]:
    """What the agreement of several ranks gives: minima, and the two ends of a QUERY."""
    agreed = {}
    for id in outcomes[0]:
        rows = [ranks[id] for ranks in outcomes]
        components = {name: None for row in rows for name in row.pages}
        agreed[id] = Outcome(
            all(row.done for row in rows),
            all(row.quiet for row in rows),
            {name: min(row.pages.get(name, 0) for row in rows) for name in components},
            min(row.smallest_end for row in rows),
            max(row.largest_end for row in rows),
        )
    return agreed
