"""STORE, QUERY and FETCH: storage's own threads, deadlines and circuit breaker.

    start --> one job per batch of pages, after whoever fills or reads its host pages --> StorageOperation --> poll

Nothing here raises for what storage does: a failure, a deadline or an open breaker makes misses, and is counted.
A failure is anything that a storage raises, BaseException included (a library's panic, a SystemExit), and any answer
that the contract does not allow.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np

from jaxcache.core.stores import consecutive
from jaxcache.pools.device_pool import chunks
from jaxcache.pools.host_pool import HostPool
from jaxcache.pools.storage_cells import Cell, storage_cells
from jaxcache.pools.storage_units import cut
from jaxcache.runtime.counters import Counters
from jaxcache.runtime.host_page_order import HostPageOrder
from jaxcache.runtime.job_graph import Job
from jaxcache.runtime.storage_connection import StorageConnection
from jaxcache.runtime.storage_operation import Status, StorageOperation
from jaxcache.runtime.store_budget import StoreBudget
from jaxcache.storage.base import ObjectKey, Storage
from jaxcache.types import Move, Transfer, TransferKind

BATCH_PAGES = 8  # of one STORE or FETCH job: small, so that several threads share a transfer and a cancel takes effect
QUERY_PAGES = 256

# move -> which of its pages are done, and whether they are good, as they come
Copy = Callable[[Move], Iterator[tuple[slice, bool]]]


@dataclass(frozen=True, slots=True)
class Share:
    """One local rank's share of a component's pages.

    rows:  uint8[num_pages, row_bytes]
    cells: what of a row is stored apart
    """

    rows: np.ndarray
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One component's share of this process, and its unit of storage."""

    component: str
    shares: tuple[Share, ...]
    cell_names: tuple[str, ...]
    unit: int


def local_part(pool: HostPool, unit: int) -> Part:
    """The share of this process's devices."""
    layout = pool.layout
    shares = tuple(
        Share(pool.rows[device], storage_cells(layout, layout.coordinates(device))) for device in pool.devices
    )
    names = dict.fromkeys(cell.name for share in shares for cell in share.cells)
    return Part(layout.component, shares, tuple(names), unit)


class _Pages:
    """The pages of one STORE or FETCH job, value after value.

    jobs: one per group of pages, done when they are no longer touched, so that a native call that hangs on one value
          holds up nobody who needs another
    """

    def __init__(self, copy: Copy, operation: StorageOperation, move: Move, groups: Sequence[slice]):
        self._copy, self._operation, self._move, self.groups = copy, operation, move, groups
        self.jobs = [Job() for _ in groups]

    def run(self) -> None:
        """Worker: until the pages or the operation end."""
        for done, is_good in self._copy(self._move):
            self._operation.deliver(self._move.component, done, np.full(done.stop - done.start, is_good))
            for group, job in zip(self.groups, self.jobs, strict=True):
                if done.start <= group.start and group.stop <= done.stop:
                    job.set_result(None)
            if not self._operation.keep_going():
                return

    def job_ended(self, ended: Job) -> None:
        """Lets go of the pages that `run` did not come to. A job fails only with the copy that it waited for."""
        for job in self.jobs:
            if not job.done() and ended.exception() is not None:
                job.set_exception(ended.exception())
            elif not job.done():
                job.set_result(None)


class StorageIO:
    """Runs storage transfers; start, poll, cancel and forget are called on the serving thread."""

    def __init__(
        self,
        host_pools: Mapping[str, HostPool],
        orders: Mapping[str, HostPageOrder[Job]],
        storage: Storage | None,
        deadline_s: float,
        num_threads: int,
        counters: Counters,
        page_tokens: int = 1,
        units: Mapping[str, int] | None = None,
        store_share: float = 1.0,
    ):
        """
        units:       pages that may share a value, by component; 1 where nothing is said
        store_share: of one thread's time, that STOREs may take while requests run
        """
        self.budget = StoreBudget(store_share)
        self._num_threads = num_threads
        self._connections: list[StorageConnection] = []  # the present one, and old ones that a thread still calls
        self._connection: StorageConnection | None = None
        self.connect(storage)
        self._parts = {name: local_part(pool, (units or {}).get(name, 1)) for name, pool in host_pools.items()}
        self._page_tokens = page_tokens
        self._orders, self._deadline_s, self._counters = orders, deadline_s, counters
        self._live: dict[int, StorageOperation] = {}

    def connect(self, storage: Storage | None) -> None:
        """From now on asks this storage; transfers under way stay with the one that they began with."""
        self._connection = None if storage is None else StorageConnection(storage, self._num_threads)
        if self._connection is not None:
            self._connections = [*self._connections, self._connection]
        self.close_idle()

    @property
    def num_open(self) -> int:
        """Calls of storages that are waiting or under way."""
        return sum(connection.num_open for connection in self._connections)

    def calls(self, storage: Storage) -> bool:
        """Whether a call of this one is waiting or under way."""
        return any(c.num_open > 0 for c in self._connections if c.storage is storage)

    def drain(self, timeout_s: float | None = None) -> bool:
        """Waits until there are none; False if that took longer."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        return all(
            connection.drain(None if deadline is None else deadline - time.monotonic())
            for connection in self._connections
        )

    def start(self, transfer: Transfer) -> None:
        """Submits a transfer; without a storage, or with the breaker open, it is done at once, with nothing."""
        assert transfer.id not in self._live, f"{transfer.id=} is live already"
        connection = self._connection
        clock = self.budget.clock if transfer.kind is TransferKind.STORE else time.monotonic
        operation = self._live[transfer.id] = StorageOperation(transfer, connection, self._deadline_s, clock)
        if connection is None or connection.breaker.is_open():
            operation.stop()
            self._counters.add(storage_not_asked=1)
            return
        start_move = {
            TransferKind.STORE: self._start_store,
            TransferKind.QUERY: self._start_query,
            TransferKind.FETCH: self._start_fetch,
        }[transfer.kind]
        for move in transfer.moves:
            start_move(connection, operation, move)

    def poll(self) -> dict[int, Status]:
        """What every live transfer has delivered; here deadlines are noticed, and the end of calls of old storages."""
        self._expire()
        return {transfer_id: operation.status() for transfer_id, operation in self._live.items()}

    def has_ended(self) -> bool:
        """Whether a live transfer will deliver nothing more."""
        self._expire()
        return any(operation.is_done for operation in self._live.values())

    def _expire(self) -> None:
        self.close_idle()
        for operation in self._live.values():
            if operation.expire():
                self._failed(operation.connection, storage_timeouts=1)

    def cancel(self, transfer_id: int) -> None:
        """Stops delivering; pages not yet asked for are not read. Nothing to do for one that was not started yet."""
        if transfer_id in self._live:
            self._live[transfer_id].stop()

    def forget(self, transfer_id: int) -> tuple[int, float] | None:
        """The caller has seen that it is quiet. Of a FETCH: how many tokens it has brought, and how many seconds that
        takes if all threads share in it, as they do where many requests wait."""
        operation = self._live[transfer_id]
        status = operation.status()
        assert status.quiet, f"{transfer_id=} is forgotten before it is quiet"
        del self._live[transfer_id]
        if operation.transfer.kind is not TransferKind.FETCH:
            return None
        return max(status.pages.values(), default=0) * self._page_tokens, operation.busy_s / self._num_threads

    def close(self) -> None:
        """Stops all operations; waits for the calls that are under way."""
        self._stop()
        for connection in self._connections:
            connection.close()

    def end(self) -> list[threading.Thread]:
        """Stops all operations; returns the threads, each of which ends with the call that it makes."""
        self._stop()
        return [thread for connection in self._connections for thread in connection.end()]

    def _stop(self) -> None:
        for operation in self._live.values():
            operation.stop()

    def close_idle(self) -> None:
        """Ends the threads of old storages that none of them calls any more."""
        kept = []
        for connection in self._connections:
            if connection is self._connection or connection.num_open:
                kept.append(connection)
            else:
                connection.close()
        self._connections = kept

    def _failed(self, connection: StorageConnection | None, **counts: int) -> None:
        self._counters.add(**counts)
        if connection is not None and connection.breaker.failed():
            self._counters.add(breaker_openings=1)

    def _start_store(self, connection: StorageConnection, operation: StorageOperation, move: Move) -> None:
        order = self._orders[move.component]
        for batch in self._batches(move, BATCH_PAGES):
            values = self._values(move, batch)
            copy = partial(self._store, connection.storage, operation, values)
            pages = _Pages(copy, operation, move, values)
            after = order.before_read(move.src_page_ids[batch])
            for value, job in zip(values, pages.jobs, strict=True):
                order.add_reader(move.src_page_ids[value], job)
            self._submit(connection, operation, pages.run, after).add_done_callback(pages.job_ended)

    def _start_fetch(self, connection: StorageConnection, operation: StorageOperation, move: Move) -> None:
        order = self._orders[move.component]
        for batch in self._batches(move, BATCH_PAGES):
            each = [slice(i, i + 1) for i in range(batch.start, batch.stop)]
            pages = _Pages(partial(self._fetch, connection.storage, batch), operation, move, each)
            after = order.before_write(move.dst_page_ids[batch])
            for page, job in zip(each, pages.jobs, strict=True):
                order.add_writer(move.dst_page_ids[page], job)
            self._submit(connection, operation, pages.run, after).add_done_callback(pages.job_ended)

    def _start_query(self, connection: StorageConnection, operation: StorageOperation, move: Move) -> None:
        for batch in self._batches(move, QUERY_PAGES):
            self._submit(connection, operation, partial(self._query, connection.storage, operation, move, batch), ())

    def _numbers(self, move: Move, batch: slice) -> list[int]:
        """Where these pages stand in their prompt, counted from 0; of no interest where none share a value."""
        if self._parts[move.component].unit == 1:
            return list(range(len(move.page_keys)))[batch]
        return [end // self._page_tokens - 1 for end in move.page_ends[batch]]

    def _batches(self, move: Move, num_pages: int) -> list[slice]:
        """In pieces of at most so many pages, or a unit of storage, cut where no value may go across."""
        unit = self._parts[move.component].unit
        size = max(num_pages, unit)
        if unit == 1 or not move.page_keys:
            return list(chunks(len(move.page_keys), size))
        numbers = self._numbers(move, slice(None))
        cuts = [i for i in range(1, len(numbers)) if numbers[i] // size != numbers[i - 1] // size]
        return [slice(start, stop) for start, stop in pairwise([0, *cuts, len(numbers)])]

    def _submit(
        self, connection: StorageConnection, operation: StorageOperation, work: Callable[[], None], after: Sequence[Job]
    ) -> Job:
        operation.add_job()
        is_store = operation.transfer.kind is TransferKind.STORE
        graph = connection.stores if is_store else connection.jobs
        job = graph.submit(partial(self._guarded, connection, operation, work), after)
        job.add_done_callback(operation.job_ended)
        return job

    def _guarded(self, connection: StorageConnection, operation: StorageOperation, work: Callable[[], None]) -> None:
        """A worker's outermost frame: whatever storage raises becomes a miss, and no user of its host pages sees it."""
        if not operation.keep_going():
            return
        start = time.perf_counter()
        try:
            with self._counters.busy(operation.transfer.kind.name.lower()):
                work()
        except BaseException:
            operation.stop()
            self._failed(connection, storage_failures=1)
        else:
            if operation.keep_going():
                connection.breaker.succeeded()
        finally:
            operation.worked(time.perf_counter() - start)

    def _values(self, move: Move, batch: slice) -> list[slice]:
        """The values that these pages are cut into, by their places in the move."""
        ends = [0]
        for run in consecutive(self._numbers(move, batch)):
            ends += [len(pages) for pages in cut(run, self._parts[move.component].unit)]
        return [slice(start, stop) for start, stop in pairwise(np.cumsum(ends) + batch.start)]

    def _store(
        self, storage: Storage, operation: StorageOperation, values: Sequence[slice], move: Move
    ) -> Iterator[tuple[slice, bool]]:
        """Yields which pages are done and whether they are stored, value after value."""
        part = self._parts[move.component]
        for value in values:
            with self.budget.turn(operation.keep_going) as may_store:
                if not may_store:
                    return
                good = self._store_value(storage, part, move.page_keys[value.stop - 1], move.src_page_ids[value])
            yield value, good

    def _store_value(self, storage: Storage, part: Part, key: bytes, page_ids: np.ndarray) -> bool:
        """One value of each cell that this process writes; `key` is that of the last page."""
        good = True
        for share in part.shares:
            for cell in share.cells:
                if cell.is_writer:
                    is_one = len(page_ids) == 1
                    value = cell.value(share.rows[page_ids[0]]) if is_one else cell.values(share.rows, page_ids)
                    name = _object_key(key, part.component, cell.name, len(page_ids))
                    good &= _answer(storage.put(name, memoryview(value.reshape(-1))))
                    self._counters.add(store_bytes=value.nbytes)
        self._counters.add(store_pages=len(page_ids), store_misses=0 if good else len(page_ids))
        return good

    def _fetch(self, storage: Storage, batch: slice, move: Move) -> Iterator[tuple[slice, bool]]:
        """Yields which pages are done and whether they have come, value after value."""
        part = self._parts[move.component]
        page_ids = move.dst_page_ids
        if part.unit == 1:
            for i in range(batch.start, batch.stop):
                yield slice(i, i + 1), self._fetch_page(storage, part, move.page_keys[i], page_ids[i])
            return
        numbers = self._numbers(move, batch)
        first = self._numbers(move, slice(0, 1))[0]
        keys = dict(enumerate([*move.page_keys, *move.later_keys], first))
        for pages in sorted(_found(storage, part, keys, numbers), key=lambda pages: pages.start):
            wanted = range(max(pages.start, numbers[0]), min(pages.stop, numbers[-1] + 1))
            done = slice(wanted.start - first, wanted.stop - first)
            if len(pages) == 1:
                yield done, self._fetch_page(storage, part, keys[pages[0]], page_ids[done.start])
            else:
                yield done, self._fetch_value(storage, part, keys[pages[-1]], pages, wanted, page_ids[done])

    def _fetch_page(self, storage: Storage, part: Part, key: bytes, page_id: int) -> bool:
        """Good only if every cell of every local share is; the first bad one decides."""
        for share in part.shares:
            row = share.rows[page_id]
            for cell in share.cells:
                value = cell.room(row)
                if not _answer(storage.get(_object_key(key, part.component, cell.name, 1), memoryview(value))):
                    self._counters.add(fetch_misses=1)
                    return False
                cell.put_back(value, row)
                self._counters.add(fetch_bytes=value.nbytes)
        self._counters.add(fetch_pages=1)
        return True

    def _fetch_value(
        self, storage: Storage, part: Part, key: bytes, pages: range, wanted: range, page_ids: np.ndarray
    ) -> bool:
        """The same for a value that holds `pages`, of which `wanted` are for `page_ids`."""
        mine = slice(wanted.start - pages.start, wanted.stop - pages.start)
        for share in part.shares:
            for cell in share.cells:
                values = np.empty((len(pages), cell.num_bytes), np.uint8)
                if not _answer(
                    storage.get(_object_key(key, part.component, cell.name, len(pages)), memoryview(values))
                ):
                    self._counters.add(fetch_misses=len(page_ids))
                    return False
                cell.put_values(values[mine], share.rows, page_ids)
                self._counters.add(fetch_bytes=values.nbytes)
        self._counters.add(fetch_pages=len(page_ids))
        return True

    def _query(self, storage: Storage, operation: StorageOperation, move: Move, batch: slice) -> None:
        part = self._parts[move.component]
        numbers = self._numbers(move, batch)
        keys = dict(zip(numbers, move.page_keys[batch], strict=True))
        if batch.stop == len(move.page_keys):
            keys |= dict(enumerate(move.later_keys, numbers[-1] + 1))
        is_of_use = not move.in_order or _may_hold(storage, part, keys, numbers[0])
        found = _found(storage, part, keys, numbers) if is_of_use else []
        there = {page for pages in found for page in pages}
        good = np.array([number in there for number in numbers])
        operation.deliver(move.component, batch, good)
        self._counters.add(query_pages=len(good), query_misses=int((~good).sum()))


def _object_key(key: bytes, component: str, cell_name: str, num_pages: int) -> ObjectKey:
    return ObjectKey(key, component, cell_name if num_pages == 1 else f"{num_pages} x {cell_name}")


def _found(storage: Storage, part: Part, keys: Mapping[int, bytes], wanted: Sequence[int]) -> list[range]:
    """The values, by their pages, that are probably there and hold pages that are wanted, largest first.

    keys: page -> key, of all pages with which such a value may end
    """
    left, found = set(wanted), []
    size = part.unit
    while size and left:
        starts = sorted({page // size * size for page in left})
        spans = [range(start, start + size) for start in starts if start + size - 1 in keys]
        for cell_name in part.cell_names:  # mostly the first says no to all
            names = [_object_key(keys[pages[-1]], part.component, cell_name, size) for pages in spans]
            answers = storage.exists(names) if names else []
            spans = [pages for pages, answer in zip(spans, answers, strict=True) if _answer(answer)]
        found += spans
        left.difference_update(page for pages in spans for page in pages)
        size //= 2
    return found


def _may_hold(storage: Storage, part: Part, keys: Mapping[int, bytes], page: int) -> bool:
    """Whether some value may hold this page: one call of a few names, since most prompts are new to storage."""
    if not part.cell_names:
        return True  # pages without arrays, of which nothing has to be stored
    names = []
    size = part.unit
    while size:
        last = page // size * size + size - 1
        if last in keys:
            names.append(_object_key(keys[last], part.component, part.cell_names[0], size))
        size //= 2
    answers = [_answer(answer) for _, answer in zip(names, storage.exists(names), strict=True)]
    return any(answers)


def _answer(value: object) -> bool:
    """What a storage answers; TypeError for anything but a bool, since None, a count or an error code is no yes."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise TypeError(f"a storage answered {value!r}, which is not a bool")
