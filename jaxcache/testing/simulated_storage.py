"""One storage that all ranks share, in memory; and how one rank meets it, which checks values as real storage does.

SimulatedStorage  rank -> key -> value       one that is torn is a miss, and may be written again
RankStorage       what the rank's engine calls: real answers, or what a fault makes of them
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jaxcache.engine.jobs import Pause
from jaxcache.pools.cells import Cell
from jaxcache.storage import record
from jaxcache.storage.base import ObjectKey, Storage, StorageError
from jaxcache.testing.chance import Delays
from jaxcache.testing.page_content import GARBAGE_BYTE, ROW_BYTES, row_of
from jaxcache.testing.storage_faults import StorageFaults

SLOWLY = 40  # times as long


def row_cells(rank: int, num_cells: int) -> tuple[Cell, ...]:
    """One rank's rows, in so many parts of one size."""
    size = ROW_BYTES // num_cells
    return tuple(Cell(f"rank {rank} @{first}", (), size, first, is_writer=True) for first in range(0, ROW_BYTES, size))


class SimulatedStorage:
    """What is put is compared with what its key says.

    parents:  page key -> the one before it, of all that was published; None: not known
    capacity: values of a rank; the oldest leave, on each rank when its own puts push them out
    """

    def __init__(
        self,
        num_ranks: int,
        components: Sequence[str],
        num_cells: int = 1,
        parents: Mapping[bytes, bytes] | None = None,
        capacity: int = 20_000,
    ):
        self.numbers = {name: c for c, name in enumerate(components)}
        self.components = tuple(components)
        self.cells = [row_cells(rank, num_cells) for rank in range(num_ranks)]
        self.parents = parents
        self.capacity = capacity
        self.values: list[dict[ObjectKey, bytes]] = [{} for _ in range(num_ranks)]

    def put(self, rank: int, key: ObjectKey, payload: bytes, is_torn: bool = False) -> None:
        """First writer wins, unless what is there is torn. is_torn: the writer dies half-way."""
        values = self.values[rank]
        there = values.get(key)
        if there is not None and (is_torn or len(there) == len(payload)):
            return
        values[key] = payload[: len(payload) // 2] if is_torn else payload
        if len(values) > self.capacity:
            del values[next(iter(values))]

    def put_pages(self, rank: int, c: int, keys: Sequence[bytes], is_torn: bool = False) -> None:
        """What somebody else has computed and stored: consecutive pages, in one value of each cell."""
        rows = np.stack([row_of(c, key, rank) for key in keys])
        for cell in self.cells[rank]:
            name = cell.name if len(keys) == 1 else f"{len(keys)} x {cell.name}"
            payload = np.ascontiguousarray(cell.values(rows, np.arange(len(keys)))).tobytes()
            self.put(rank, ObjectKey(keys[-1], self.components[c], name), payload, is_torn)

    def clear(self) -> None:
        """Empties it for all ranks."""
        for values in self.values:
            values.clear()

    def page_keys(self, rank: int = 0, component: str = "full") -> list[bytes]:
        """Of the last pages of all values, in the order in which they came."""
        return list(dict.fromkeys(key.page_key for key in self.values[rank] if key.component == component))

    def lose(self, rank: int, component: str, page_key: bytes) -> None:
        """All values that end with this page."""
        values = self.values[rank]
        lost = [key for key in values if (key.component, key.page_key) == (component, page_key)]
        assert lost, f"{component} of rank {rank} has no such page"
        for key in lost:
            del values[key]


def num_pages_of(key: ObjectKey) -> int:
    """That share the value of this name."""
    return int(key.cell.rpartition(" x ")[0] or 1)


def corrupted(value: bytes) -> bytes:
    """With one bit turned."""
    return value[:-1] + bytes([value[-1] ^ 1])


class RankStorage(Storage):
    """step: of the rank, which says which faults strike. wrong: what its engine should not have put.

    num_refused: how often it raised
    """

    secret = b"simulated"

    def __init__(self, shared: SimulatedStorage, rank: int, faults: StorageFaults, delays: Delays):
        self.shared, self.rank, self.faults, self.delays = shared, rank, faults, delays
        self.step = 0
        self.num_calls = self.num_refused = 0
        self.wrong: list[str] = []
        self._begun: dict[tuple[str, ObjectKey], str] = {}
        self._cells = {cell.name: cell for cell in shared.cells[rank]}

    def begin(self, pause: Pause) -> int:
        """The call that follows the pause begins. Returns how long it takes, in microseconds.

        What it may write is undefined from here on, until it returns.
        """
        call, key = pause.call, pause.key
        assert key is not None
        fault = self.faults.of_call(self.rank, self.step, call, key.page_key)
        self._begun[call, key] = fault
        self.num_calls += 1
        pause.memory[...] = GARBAGE_BYTE
        if call == "exists":
            us = self.delays.query_us(self.rank, self.step, key.page_key)
        else:
            us = num_pages_of(key) * self.delays.page_us(self.rank, self.step, key.page_key)
        if fault == "slow":
            self.faults.struck(fault)
            return SLOWLY * us
        return self.delays.deadline_us + SLOWLY * us if fault == "stalled" else us

    def _fault(self, call: str, key: ObjectKey) -> str:
        """What has struck the call that returns now."""
        fault = self._begun.pop((call, key), "")
        if fault in ("stalled", "refused"):
            self.faults.struck(fault)
        if fault == "refused":
            self.num_refused += 1
            raise StorageError("refused")
        return fault

    def exists(self, keys: Sequence[ObjectKey]) -> list[bool]:
        fault = self._fault("exists", keys[0])
        values = self.shared.values[self.rank]
        found = [key in values for key in keys]
        if fault == "short" and len(keys) > 1:
            self.faults.struck(fault)
            found[len(keys) // 2 :] = [False] * (len(keys) - len(keys) // 2)
        return found

    def get(self, key: ObjectKey, buffer: memoryview) -> bool:
        fault = self._fault("get", key)
        target = np.frombuffer(buffer, np.uint8).reshape(-1)
        target[:] = GARBAGE_BYTE
        value = self.shared.values[self.rank].get(key)
        if fault == "stalled" or value is None:
            return False
        if fault in ("lost", "short"):
            self.faults.struck(fault)
            if fault == "short":
                half = len(target) // 2
                target[:half] = np.frombuffer(value[:half].ljust(half), np.uint8)
            return False
        if len(value) != len(target):
            self.faults.struck("torn")
            return False
        header = record.pack_header(key, memoryview(value))  # as it was written
        read = corrupted(value) if fault == "corrupt" else value
        if not record.check(header, key, memoryview(read)):
            self.faults.struck("corrupt")
            return False
        target[:] = np.frombuffer(read, np.uint8)
        return True

    def put(self, key: ObjectKey, buffer: memoryview) -> bool:
        fault = self._fault("put", key)
        payload = bytes(buffer)
        self._check_content(key, payload)
        if fault == "short":
            self.faults.struck(fault)
            return False
        self.shared.put(self.rank, key, payload, fault == "torn")
        return fault != "torn"

    def clear(self) -> None:
        self.shared.clear()

    def _check_content(self, key: ObjectKey, payload: bytes) -> None:
        """Raising would be a failure of the storage to the engine that calls: so it is noted."""
        parents, keys = self.shared.parents, [key.page_key]
        if parents is not None:
            for _ in range(num_pages_of(key) - 1):
                keys.insert(0, parents.get(keys[0], b""))
        c, cell = self.shared.numbers[key.component], self._cells[key.cell.rpartition(" x ")[2]]
        expected = b"".join(cell.room(row_of(c, key, self.rank)).tobytes() for key in keys)
        if not payload.endswith(expected) or (parents is not None and len(payload) > len(expected)):
            self.wrong.append(f"rank {self.rank}: STORE put {payload} under {key}, {expected} should be there")
