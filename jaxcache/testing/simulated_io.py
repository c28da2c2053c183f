"""STORE, QUERY and FETCH of one rank in virtual time, with faults: what runtime/storage_io.py is for real storage.

    start --> pieces of a few pages, NUM_THREADS at a time, after whoever fills or reads their host pages --> poll

A piece that is under way cannot be interrupted: its pages stay taken until it ends, whatever was decided meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxcache.core.prefetch import Prefetch
from jaxcache.core.prefetches import Prefetches
from jaxcache.runtime.circuit_breaker import CircuitBreaker
from jaxcache.runtime.host_page_order import HostPageOrder
from jaxcache.runtime.storage_connection import MAX_FAILURES
from jaxcache.runtime.storage_operation import Status
from jaxcache.testing.chance import Delays
from jaxcache.testing.page_content import GARBAGE, RANK, page_content
from jaxcache.testing.simulated_storage import SimulatedStorage, checked, corrupted
from jaxcache.testing.storage_faults import StorageFaults
from jaxcache.testing.virtual_jobs import VirtualJob, VirtualJobs
from jaxcache.types import Move, Transfer, TransferKind

SLOWLY = 40  # times as long
Pages = list[bytes]  # page id -> row


@dataclass(slots=True, eq=False)
class Operation:
    """One transfer on this rank. good: per component a byte for each page; exists: of a QUERY that was answered."""

    transfer: Transfer
    fault: str
    deadline_us: int
    good: dict[str, bytearray]
    exists: dict[str, np.ndarray] = field(default_factory=dict)
    num_open: int = 0
    is_stopped: bool = False

    def status(self) -> Status:
        done = self.is_stopped or not self.num_open
        if self.transfer.kind is TransferKind.QUERY:
            return Status(done, done, {}, self.exists, not self.is_stopped)
        pages = {name: len(good) if 0 not in good else good.index(0) for name, good in self.good.items()}
        return Status(done, not self.num_open, pages, None, not self.is_stopped)


class Piece(VirtualJob):
    """Consecutive pages of one move: [first, first + len(page_ids)). hangs: its only page stalls."""

    __slots__ = ("c", "first", "hangs", "io", "move", "operation", "page_ids")

    def __init__(self, io: SimulatedIO, operation: Operation, move: Move, first: int, ids: list[int], hangs: bool):
        super().__init__()
        self.io, self.operation, self.move, self.hangs = io, operation, move, hangs
        self.c = io.numbers[move.component]
        self.first, self.page_ids = first, ids
        operation.num_open += 1

    def begin(self) -> bool:
        if self.operation.is_stopped:
            self.operation.num_open -= 1
            return False
        if self.operation.transfer.kind is TransferKind.FETCH:
            self._spoil()
        return True

    def end(self) -> None:
        operation = self.operation
        operation.num_open -= 1
        if operation.fault == "refused":
            self.io.fail(operation, "refused")
        elif self.hangs:
            self.io.faults.struck("stalled")
            if operation.transfer.kind is TransferKind.FETCH:
                self._spoil()
        else:
            move_page = self._fetch if operation.transfer.kind is TransferKind.FETCH else self._store
            good = operation.good[self.move.component]
            for place, page_id in enumerate(self.page_ids, self.first):
                came = move_page(self.move.page_keys[place], page_id)
                if came and not operation.is_stopped:
                    good[place] = 1
            if not operation.is_stopped:
                self.io.breaker.succeeded()

    def _spoil(self) -> None:
        pages = self.io.host[self.c]
        for page_id in self.page_ids:
            pages[page_id] = GARBAGE

    def _fault(self, key: bytes) -> str:
        return self.io.faults.of_page(self.io.rank, self.operation.transfer.step, key)

    def _fetch(self, key: bytes, page_id: int) -> bool:
        """The row, into its host page; what is broken leaves garbage there."""
        io, fault = self.io, self._fault(key)
        value = io.storage.get(io.rank, self.c, key)
        if value is None:
            return False
        if fault == "lost":
            io.faults.struck(fault)
            return False
        if fault == "corrupt":
            value = corrupted(value)
        row = checked(value)
        if row is None:
            io.faults.struck("corrupt" if fault == "corrupt" else "torn")
            io.host[self.c][page_id] = GARBAGE
            return False
        io.host[self.c][page_id] = row
        return True

    def _store(self, key: bytes, page_id: int) -> bool:
        io, row = self.io, self.io.host[self.c][page_id]
        expected = page_content(self.c, key) + RANK[io.rank]
        assert row == expected, f"rank {io.rank}: STORE read {row} from host page {page_id}, {expected} should be there"
        is_torn = self._fault(key) == "torn"
        io.storage.put(io.rank, self.c, key, row, is_torn)
        return not is_torn


def check_no_storage(after: list[VirtualJob]) -> None:
    """I5: nobody ever waits for storage to let go of a host page: it is nobody else's until all ranks are quiet."""
    for job in after:
        assert not isinstance(job, Piece), (
            f"I5: rank {job.io.rank}: host pages {job.page_ids} of {job.move.component} are used again while "
            f"{job.operation.transfer.kind.name} {job.operation.transfer.id} may still touch them"
        )


class Question(VirtualJob):
    """A QUERY: what is there when it ends."""

    __slots__ = ("io", "operation")

    def __init__(self, io: SimulatedIO, operation: Operation):
        super().__init__()
        self.io, self.operation = io, operation
        operation.num_open += 1

    def begin(self) -> bool:
        return True

    def end(self) -> None:
        io, operation = self.io, self.operation
        operation.num_open -= 1
        if operation.fault == "refused":
            io.fail(operation, "refused")
        elif not operation.is_stopped:
            for move in operation.transfer.moves:
                found = io.storage.exists(io.rank, io.numbers[move.component], move.page_keys)
                operation.exists[move.component] = np.array(found)
            io.breaker.succeeded()
            io.answered(operation)


class SimulatedIO:
    """Storage transfers of one rank. host: by component, page id -> row. is_attached: whether storage is there."""

    def __init__(
        self,
        rank: int,
        jobs: VirtualJobs,
        orders: Sequence[HostPageOrder[VirtualJob]],
        host: Sequence[Pages],
        numbers: dict[str, int],
        storage: SimulatedStorage,
        faults: StorageFaults,
        delays: Delays,
        prefetches: Prefetches,
    ):
        self.prefetches = prefetches
        self.rank, self.jobs, self.orders, self.host, self.numbers = rank, jobs, orders, host, numbers
        self.storage, self.faults, self.delays = storage, faults, delays
        self.is_attached = True
        self.breaker = CircuitBreaker(MAX_FAILURES, delays.rest_us / 1e6, lambda: self.jobs.now_us / 1e6)
        self.live: dict[int, Operation] = {}
        self._found: dict[Prefetch, dict[str, set[bytes]]] = {}  # what QUERYs have found, until the FETCH

    def start(self, transfer: Transfer) -> None:
        assert transfer.id not in self.live, f"{transfer.id=} is live already"
        good = {move.component: bytearray(len(move.page_keys)) for move in transfer.moves}
        fault = self.faults.of_transfer(self.rank, transfer)
        operation = self.live[transfer.id] = Operation(
            transfer, fault, self.jobs.now_us + self.delays.deadline_us, good
        )
        if not self.is_attached or self.breaker.is_open():
            self._stop(operation)
            self.faults.struck("unasked")
            return
        if fault == "slow":
            self.faults.struck(fault)
        if transfer.kind is TransferKind.QUERY:
            us = self.delays.query_us(self.rank, transfer.id)
            self.jobs.submit(Question(self, operation), SLOWLY * us if fault == "slow" else us)
        else:
            if transfer.kind is TransferKind.FETCH:
                self._check_found(transfer)
            self._start_pieces(operation)

    def answered(self, operation: Operation) -> None:
        """Notes what a QUERY has found, for the FETCH of the same prefetch."""
        prefetch = self.prefetches.live.get(operation.transfer.id)
        if prefetch is not None:
            self._found = {other: found for other, found in self._found.items() if not other.is_over}
            self._found[prefetch] = {
                name: {key for key, there in zip(move.page_keys, operation.exists[name].tolist(), strict=True) if there}
                for move in operation.transfer.moves
                for name in (move.component,)
            }

    def _check_found(self, transfer: Transfer) -> None:
        """L3: the end that was agreed on needs nothing that this rank has not found."""
        prefetch = self.prefetches.live[transfer.id]
        found = self._found.pop(prefetch, {})
        for move in transfer.moves if not prefetch.is_over else ():
            lacking = [key for key in move.page_keys if key not in found.get(move.component, ())]
            assert not lacking, f"L3: rank {self.rank} is to read {move.component}, of which it lacks {len(lacking)}"

    def poll(self) -> dict[int, Status]:
        """The state of every live transfer; here deadlines are noticed."""
        for operation in self.live.values():
            if operation.num_open and not operation.is_stopped and self.jobs.now_us >= operation.deadline_us:
                self.fail(operation, "timeout")
        return {id: operation.status() for id, operation in self.live.items()}

    def cancel(self, transfer_id: int) -> None:
        """What has not begun will not be done."""
        if transfer_id in self.live:
            self._stop(self.live[transfer_id])

    def forget(self, transfer_id: int) -> None:
        operation = self.live.pop(transfer_id)
        assert operation.status().quiet, f"rank {self.rank}: {transfer_id=} is forgotten before it is quiet"

    def fail(self, operation: Operation, kind: str) -> None:
        """Storage raised, or a deadline has passed: nothing of this transfer counts from now on."""
        self.faults.struck(kind)
        self._stop(operation)
        self.breaker.failed()

    def _stop(self, operation: Operation) -> None:
        if operation.transfer.kind is TransferKind.QUERY and not operation.is_stopped and not operation.exists:
            operation.exists = {m.component: np.zeros(len(m.page_keys), bool) for m in operation.transfer.moves}
        operation.is_stopped = True

    def _start_pieces(self, operation: Operation) -> None:
        """In order; each waits for the one `num_threads` before it, and for whoever uses its pages."""
        is_fetch = operation.transfer.kind is TransferKind.FETCH
        num_threads, pieces = self.delays.num_threads, []
        for move in operation.transfer.moves:
            ids = move.dst_page_ids if is_fetch else move.src_page_ids
            order = self.orders[self.numbers[move.component]]
            for first, stop, hangs in self._cuts(operation, len(ids)):
                mine = ids[first:stop]
                piece = Piece(self, operation, move, first, mine.tolist(), hangs)
                after = order.before_write(mine) if is_fetch else order.before_read(mine)
                check_no_storage(after)
                if is_fetch:
                    order.add_writer(mine, piece)
                else:
                    order.add_reader(mine, piece)
                if len(pieces) >= num_threads:
                    after.append(pieces[-num_threads])
                self.jobs.submit(piece, self._duration(piece), after)
                pieces.append(piece)

    def _cuts(self, operation: Operation, num_pages: int) -> list[tuple[int, int, bool]]:
        """(first, stop, hangs) of every piece. A page that hangs is one of its own; what comes short ends earlier."""
        size = self.delays.piece_pages
        hanging = -1
        if operation.fault == "short" and num_pages > 1:
            self.faults.struck("short")
            num_pages //= 2
        elif operation.fault == "stalled" and num_pages:
            hanging = self.delays.place(operation.transfer.step, num_pages)
        cuts = []
        first = 0
        while first < num_pages:
            stop = first + 1 if first == hanging else min(first + size, num_pages)
            if first < hanging < stop:
                stop = hanging
            cuts.append((first, stop, first == hanging))
            first = stop
        return cuts

    def _duration(self, piece: Piece) -> int:
        operation = piece.operation
        us = len(piece.page_ids) * self.delays.page_us(self.rank, operation.transfer.id, piece.first)
        if piece.hangs:
            return self.delays.deadline_us + SLOWLY * us
        return SLOWLY * us if operation.fault == "slow" else us
