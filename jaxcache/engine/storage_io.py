"""STORE, QUERY and FETCH: storage's own threads, deadlines and circuit breaker.

    start --> one job per batch of pages, after the jobs that fill or read its host pages --> StorageOperation --> poll

Nothing here raises for what storage does: a failure, a deadline or an open breaker makes misses, and is counted.
A failure is anything that a storage raises, BaseException included (a library's panic, a SystemExit), and any answer
that the contract does not allow.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Mapping, Sequence
from itertools import pairwise

import numpy as np

from jaxcache.core.stores import consecutive
from jaxcache.engine.counters import Counters
from jaxcache.engine.effects import Effects
from jaxcache.engine.host_page_order import HostPageOrder
from jaxcache.engine.jobs import Job, Pause, Steps
from jaxcache.engine.storage_connection import REST_S, StorageConnection
from jaxcache.engine.storage_operation import Status, StorageOperation
from jaxcache.engine.store_budget import StoreBudget
from jaxcache.pools.cells import Part
from jaxcache.pools.storage_units import chunks, cut
from jaxcache.storage.base import ObjectKey, Storage
from jaxcache.types import Move, Transfer, TransferKind

BATCH_PAGES = 8  # of one STORE or FETCH job: small, so that several threads share a transfer and a cancel takes effect
QUERY_PAGES = 256

Answer = Generator[Pause, None, bool]  # steps that find out whether something is good


class _Pages:
    """The pages of one STORE or FETCH job, value after value.

    jobs: one per group of pages, done when they are no longer touched, so that a native call that hangs on one value
          holds up nobody who needs another
    """

    def __init__(self, operation: StorageOperation, move: Move, groups: Sequence[slice]):
        self.operation, self.move, self.groups = operation, move, groups
        self.jobs = [Job() for _ in groups]

    def deliver(self, done: slice, is_good: bool) -> bool:
        """Worker: these are done. False: no more are wanted."""
        self.operation.deliver(self.move.component, done, np.full(done.stop - done.start, is_good))
        for group, job in zip(self.groups, self.jobs, strict=True):
            if done.start <= group.start and group.stop <= done.stop:
                job.set_result(None)
        return self.operation.keep_going()

    def job_ended(self, ended: Job) -> None:
        """Lets go of the pages that were not delivered. A job fails only with the copy that it waited for."""
        for job in self.jobs:
            if not job.done() and ended.exception() is not None:
                job.set_exception(ended.exception())
            elif not job.done():
                job.set_result(None)


class StorageIO:
    """Runs storage transfers; start, poll, cancel and forget are called on the serving thread."""

    def __init__(
        self,
        effects: Effects,
        parts: Mapping[str, Part],
        orders: Mapping[str, HostPageOrder[Job]],
        storage: Storage | None,
        deadline_s: float,
        num_threads: int,
        counters: Counters,
        page_tokens: int = 1,
        store_share: float = 1.0,
        rest_s: float = REST_S,
        batch_pages: int = BATCH_PAGES,
    ):
        """
        parts:       this process's share of the host pages, by component
        store_share: of one thread's time, that STOREs may take while requests run
        rest_s:      for which a storage that keeps failing is not asked
        batch_pages: of one STORE or FETCH job
        """
        self.budget = StoreBudget(store_share, effects.now, effects.thread_s)
        self._effects, self._num_threads, self._rest_s, self._batch_pages = effects, num_threads, rest_s, batch_pages
        self._connections: list[StorageConnection] = []  # the present one, and old ones that a thread still calls
        self._connection: StorageConnection | None = None
        self.connect(storage)
        self._parts = dict(parts)
        self._page_tokens = page_tokens
        self._orders, self._deadline_s, self._counters = orders, deadline_s, counters
        self._live: dict[int, StorageOperation] = {}

    def connect(self, storage: Storage | None) -> None:
        """From now on asks this storage; transfers under way stay with the one that they began with."""
        self._connection = None
        if storage is not None:
            self._connection = StorageConnection(storage, self._num_threads, self._rest_s, self._effects)
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
        clock = self.budget.clock if transfer.kind is TransferKind.STORE else self._effects.now
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

    @property
    def live(self) -> Mapping[int, StorageOperation]:
        """What was started and not forgotten, by transfer id."""
        return self._live

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
        for batch in self._batches(move, self._batch_pages):
            values = self._values(move, batch)
            pages = _Pages(operation, move, values)
            after = order.before_read(move.src_page_ids[batch])
            for value, job in zip(values, pages.jobs, strict=True):
                order.add_reader(move.src_page_ids[value], job)
            steps = self._store(connection.storage, pages)
            self._submit(connection, operation, steps, after).add_done_callback(pages.job_ended)

    def _start_fetch(self, connection: StorageConnection, operation: StorageOperation, move: Move) -> None:
        order = self._orders[move.component]
        for batch in self._batches(move, self._batch_pages):
            each = [slice(i, i + 1) for i in range(batch.start, batch.stop)]
            pages = _Pages(operation, move, each)
            after = order.before_write(move.dst_page_ids[batch])
            for page, job in zip(each, pages.jobs, strict=True):
                order.add_writer(move.dst_page_ids[page], job)
            steps = self._fetch(connection.storage, batch, pages)
            self._submit(connection, operation, steps, after).add_done_callback(pages.job_ended)

    def _start_query(self, connection: StorageConnection, operation: StorageOperation, move: Move) -> None:
        for batch in self._batches(move, QUERY_PAGES):
            self._submit(connection, operation, self._query(connection.storage, operation, move, batch), ())

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
        self, connection: StorageConnection, operation: StorageOperation, steps: Steps, after: Sequence[Job]
    ) -> Job:
        operation.add_job()
        is_store = operation.transfer.kind is TransferKind.STORE
        graph = connection.stores if is_store else connection.jobs
        job = graph.submit(self._guarded(connection, operation, steps), after)
        job.add_done_callback(operation.job_ended)
        return job

    def _guarded(self, connection: StorageConnection, operation: StorageOperation, steps: Steps) -> Steps:
        """A worker's outermost frame: whatever storage raises becomes a miss, and no user of its host pages sees it."""
        if not operation.keep_going():
            return
        start = self._effects.now()
        try:
            with self._counters.busy(operation.transfer.kind.name.lower()):
                yield from steps
        except BaseException:
            operation.stop()
            self._failed(connection, storage_failures=1)
        else:
            if operation.keep_going():
                connection.breaker.succeeded()
        finally:
            operation.worked(self._effects.now() - start)

    def _values(self, move: Move, batch: slice) -> list[slice]:
        """The values that these pages are cut into, by their places in the move."""
        if self._parts[move.component].unit == 1:
            return [slice(i, i + 1) for i in range(batch.start, batch.stop)]
        ends = [0]
        for run in consecutive(self._numbers(move, batch)):
            ends += [len(pages) for pages in cut(run, self._parts[move.component].unit)]
        return [slice(start, stop) for start, stop in pairwise(np.cumsum(ends) + batch.start)]

    def _store(self, storage: Storage, pages: _Pages) -> Steps:
        """Value after value, which are the groups of `pages`."""
        move, part = pages.move, self._parts[pages.move.component]
        for value in pages.groups:
            turn = yield from self.budget.begin(pages.operation.keep_going)
            if turn is None:
                return
            try:
                key = move.page_keys[value.stop - 1]
                good = yield from self._store_value(storage, part, key, move.src_page_ids[value])
            finally:
                self.budget.end(turn)
            if not pages.deliver(value, good):
                return

    def _store_value(self, storage: Storage, part: Part, key: bytes, page_ids: np.ndarray) -> Answer:
        """One value of each cell that this process writes; `key` is that of the last page."""
        good = True
        for share in part.shares:
            for cell in share.cells:
                if cell.is_writer:
                    is_one = len(page_ids) == 1
                    value = cell.value(share.rows[page_ids[0]]) if is_one else cell.values(share.rows, page_ids)
                    name = _object_key(key, part.component, cell.name, len(page_ids))
                    yield Pause(call="put", key=name)
                    good &= _answer(storage.put(name, memoryview(value.reshape(-1))))
                    self._counters.add(store_bytes=value.nbytes)
        self._counters.add(store_pages=len(page_ids), store_misses=0 if good else len(page_ids))
        return good

    def _fetch(self, storage: Storage, batch: slice, pages: _Pages) -> Steps:
        """Value after value, as storage has them."""
        move, part = pages.move, self._parts[pages.move.component]
        page_ids = move.dst_page_ids
        if part.unit == 1:
            for i in range(batch.start, batch.stop):
                good = yield from self._fetch_page(storage, part, move.page_keys[i], page_ids[i])
                if not pages.deliver(slice(i, i + 1), good):
                    return
            return
        numbers = self._numbers(move, batch)
        first = self._numbers(move, slice(0, 1))[0]
        keys = dict(enumerate([*move.page_keys, *move.later_keys], first))
        found = yield from _found(storage, part, keys, numbers)
        for held in sorted(found, key=lambda held: held.start):
            wanted = range(max(held.start, numbers[0]), min(held.stop, numbers[-1] + 1))
            done = slice(wanted.start - first, wanted.stop - first)
            if len(held) == 1:
                good = yield from self._fetch_page(storage, part, keys[held[0]], page_ids[done.start])
            else:
                good = yield from self._fetch_value(storage, part, keys[held[-1]], held, wanted, page_ids[done])
            if not pages.deliver(done, good):
                return

    def _fetch_page(self, storage: Storage, part: Part, key: bytes, page_id: int) -> Answer:
        """Good only if every cell of every local share is; the first bad one decides."""
        for share in part.shares:
            row = share.rows[page_id]
            for cell in share.cells:
                value, name = cell.room(row), _object_key(key, part.component, cell.name, 1)
                yield Pause(call="get", key=name, memory=value)
                if not _answer(storage.get(name, memoryview(value))):
                    self._counters.add(fetch_misses=1)
                    return False
                cell.put_back(value, row)
                self._counters.add(fetch_bytes=value.nbytes)
        self._counters.add(fetch_pages=1)
        return True

    def _fetch_value(
        self, storage: Storage, part: Part, key: bytes, held: range, wanted: range, page_ids: np.ndarray
    ) -> Answer:
        """The same for a value that holds the pages `held`, of which `wanted` are for `page_ids`."""
        mine = slice(wanted.start - held.start, wanted.stop - held.start)
        for share in part.shares:
            for cell in share.cells:
                values = np.empty((len(held), cell.num_bytes), np.uint8)
                name = _object_key(key, part.component, cell.name, len(held))
                yield Pause(call="get", key=name, memory=values)
                if not _answer(storage.get(name, memoryview(values))):
                    self._counters.add(fetch_misses=len(page_ids))
                    return False
                cell.put_values(values[mine], share.rows, page_ids)
                self._counters.add(fetch_bytes=values.nbytes)
        self._counters.add(fetch_pages=len(page_ids))
        return True

    def _query(self, storage: Storage, operation: StorageOperation, move: Move, batch: slice) -> Steps:
        part = self._parts[move.component]
        numbers = self._numbers(move, batch)
        keys = dict(zip(numbers, move.page_keys[batch], strict=True))
        if batch.stop == len(move.page_keys):
            keys |= dict(enumerate(move.later_keys, numbers[-1] + 1))
        is_of_use = not move.in_order or (yield from _may_hold(storage, part, keys, numbers[0]))
        found = (yield from _found(storage, part, keys, numbers)) if is_of_use else []
        there = {page for held in found for page in held}
        good = np.array([number in there for number in numbers])
        operation.deliver(move.component, batch, good)
        self._counters.add(query_pages=len(good), query_misses=int((~good).sum()))


def _object_key(key: bytes, component: str, cell_name: str, num_pages: int) -> ObjectKey:
    return ObjectKey(key, component, cell_name if num_pages == 1 else f"{num_pages} x {cell_name}")


def _found(
    storage: Storage, part: Part, keys: Mapping[int, bytes], wanted: Sequence[int]
) -> Generator[Pause, None, list[range]]:
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
            if not names:
                break
            yield Pause(call="exists", key=names[0])
            answers = storage.exists(names)
            spans = [pages for pages, answer in zip(spans, answers, strict=True) if _answer(answer)]
        found += spans
        left.difference_update(page for pages in spans for page in pages)
        size //= 2
    return found


def _may_hold(storage: Storage, part: Part, keys: Mapping[int, bytes], page: int) -> Answer:
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
    yield Pause(call="exists", key=names[0])
    answers = [_answer(answer) for _, answer in zip(names, storage.exists(names), strict=True)]
    return any(answers)


def _answer(value: object) -> bool:
    """What a storage answers; TypeError for anything but a bool, since None, a count or an error code is no yes."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise TypeError(f"a storage answered {value!r}, which is not a bool")
