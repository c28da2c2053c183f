"""STORE, QUERY and FETCH: storage's own threads, deadlines and circuit breaker.

    start --> one job per batch of pages, after whoever fills or reads its host pages --> StorageOperation --> poll

Nothing here raises for what storage does: a failure, a deadline or an open breaker makes misses, and is counted.
A failure is anything that a storage raises, BaseException included (a library's panic, a SystemExit), and any answer
that the contract does not allow.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from jaxcache.pools.device_pool import chunks
from jaxcache.pools.host_pool import HostPool
from jaxcache.pools.storage_cells import Cell, storage_cells
from jaxcache.runtime.counters import Counters
from jaxcache.runtime.host_page_order import HostPageOrder
from jaxcache.runtime.job_graph import Job
from jaxcache.runtime.storage_connection import StorageConnection
from jaxcache.runtime.storage_operation import Status, StorageOperation
from jaxcache.storage.base import ObjectKey, Storage
from jaxcache.types import Move, Transfer, TransferKind

BATCH_PAGES = 8  # of one STORE or FETCH job: small, so that several threads share a transfer and a cancel takes effect
QUERY_PAGES = 256


@dataclass(frozen=True, slots=True)
class Share:
    """One local rank's share of a component's pages.

    rows:  uint8[num_pages, row_bytes]
    cells: what of a row are values of their own
    """

    rows: np.ndarray
    cells: tuple[Cell, ...]


def local_shares(pool: HostPool) -> tuple[Share, ...]:
    """One share per device of this process."""
    layout = pool.layout
    return tuple(Share(pool.rows[device], storage_cells(layout, layout.coordinates(device))) for device in pool.devices)


class _Pages:
    """The pages of one STORE or FETCH job, one after the other.

    jobs: one per page, done when that page is no longer touched, so that a native call that hangs on one page holds up
          nobody who needs another
    """

    def __init__(self, page_io, operation: StorageOperation, move: Move, batch: slice, page_ids: np.ndarray):
        self._page_io, self._operation, self._move, self._batch = page_io, operation, move, batch
        self._page_ids = page_ids.tolist()
        self.jobs = [Job() for _ in self._page_ids]

    def run(self) -> None:
        """Worker: until the pages or the operation end."""
        for offset, (page_id, job) in enumerate(zip(self._page_ids, self.jobs, strict=True)):
            if not self._operation.keep_going():
                return
            index = self._batch.start + offset
            good = self._page_io(self._move.component, self._move.page_keys[index], page_id)
            self._operation.deliver(self._move.component, slice(index, index + 1), np.array([good]))
            job.set_result(None)

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
    ):
        self._num_threads = num_threads
        self._connections: list[StorageConnection] = []  # the present one, and old ones that a thread still calls
        self._connection: StorageConnection | None = None
        self.connect(storage)
        self._shares = {name: local_shares(pool) for name, pool in host_pools.items()}
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
        return sum(connection.jobs.num_open for connection in self._connections)

    def calls(self, storage: Storage) -> bool:
        """Whether a call of this one is waiting or under way."""
        return any(c.jobs.num_open > 0 for c in self._connections if c.storage is storage)

    def drain(self, timeout_s: float | None = None) -> bool:
        """Waits until there are none; False if that took longer."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        return all(
            connection.jobs.drain(None if deadline is None else deadline - time.monotonic())
            for connection in self._connections
        )

    def start(self, transfer: Transfer) -> None:
        """Submits a transfer; without a storage, or with the breaker open, it is done at once, with nothing."""
        assert transfer.id not in self._live, f"{transfer.id=} is live already"
        connection = self._connection
        operation = self._live[transfer.id] = StorageOperation(transfer, connection, self._deadline_s)
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
        self.close_idle()
        for operation in self._live.values():
            if operation.expire():
                self._failed(operation.connection, storage_timeouts=1)
        return {transfer_id: operation.status() for transfer_id, operation in self._live.items()}

    def cancel(self, transfer_id: int) -> None:
        """Stops delivering; pages not yet asked for are not read. Nothing to do for one that was not started yet."""
        if transfer_id in self._live:
            self._live[transfer_id].stop()

    def forget(self, transfer_id: int) -> None:
        """The caller has seen that it is quiet."""
        assert self._live[transfer_id].status().quiet, f"{transfer_id=} is forgotten before it is quiet"
        del self._live[transfer_id]

    def close(self) -> None:
        """Stops all operations; waits for the calls that are under way."""
        self._stop()
        for connection in self._connections:
            connection.jobs.close()

    def end(self) -> list[threading.Thread]:
        """Stops all operations; returns the threads, each of which ends with the call that it makes."""
        self._stop()
        return [thread for connection in self._connections for thread in connection.jobs.end()]

    def _stop(self) -> None:
        for operation in self._live.values():
            operation.stop()

    def close_idle(self) -> None:
        """Ends the threads of old storages that none of them calls any more."""
        kept = []
        for connection in self._connections:
            if connection is self._connection or connection.jobs.num_open:
                kept.append(connection)
            else:
                connection.jobs.close()
        self._connections = kept

    def _failed(self, connection: StorageConnection | None, **counts: int) -> None:
        self._counters.add(**counts)
        if connection is not None and connection.breaker.failed():
            self._counters.add(breaker_openings=1)

    def _start_store(self, connection: StorageConnection, operation: StorageOperation, move: Move) -> None:
        order = self._orders[move.component]
        for batch in chunks(len(move.page_keys), BATCH_PAGES):
            page_ids = move.src_page_ids[batch]
            pages = _Pages(partial(self._store_page, connection.storage), operation, move, batch, page_ids)
            after = order.before_read(page_ids)
            for page_id, job in zip(page_ids, pages.jobs, strict=True):
                order.add_reader(page_id[None], job)
            self._submit(connection, operation, pages.run, after).add_done_callback(pages.job_ended)

    def _start_fetch(self, connection: StorageConnection, operation: StorageOperation, move: Move) -> None:
        order = self._orders[move.component]
        for batch in chunks(len(move.page_keys), BATCH_PAGES):
            page_ids = move.dst_page_ids[batch]
            pages = _Pages(partial(self._fetch_page, connection.storage), operation, move, batch, page_ids)
            after = order.before_write(page_ids)
            for page_id, job in zip(page_ids, pages.jobs, strict=True):
                order.add_writer(page_id[None], job)
            self._submit(connection, operation, pages.run, after).add_done_callback(pages.job_ended)

    def _start_query(self, connection: StorageConnection, operation: StorageOperation, move: Move) -> None:
        for batch in chunks(len(move.page_keys), QUERY_PAGES):
            self._submit(connection, operation, partial(self._query, connection.storage, operation, move, batch), ())

    def _submit(
        self, connection: StorageConnection, operation: StorageOperation, work: Callable[[], None], after: Sequence[Job]
    ) -> Job:
        operation.add_job()
        job = connection.jobs.submit(partial(self._guarded, connection, operation, work), after)
        job.add_done_callback(operation.job_ended)
        return job

    def _guarded(self, connection: StorageConnection, operation: StorageOperation, work: Callable[[], None]) -> None:
        """A worker's outermost frame: whatever storage raises becomes a miss, and no user of its host pages sees it."""
        if not operation.keep_going():
            return
        try:
            with self._counters.busy(operation.transfer.kind.name.lower()):
                work()
        except BaseException:
            operation.stop()
            self._failed(connection, storage_failures=1)
        else:
            if operation.keep_going():
                connection.breaker.succeeded()

    def _store_page(self, storage: Storage, component: str, page_key: bytes, page_id: int) -> bool:
        good = True
        for share in self._shares[component]:
            for cell in share.cells:
                if cell.is_writer:
                    value = cell.value(share.rows[page_id])
                    good &= _answer(storage.put(ObjectKey(page_key, component, cell.name), memoryview(value)))
                    self._counters.add(store_bytes=value.nbytes)
        self._counters.add(store_pages=1, store_misses=not good)
        return good

    def _fetch_page(self, storage: Storage, component: str, page_key: bytes, page_id: int) -> bool:
        """Good only if every cell of every local share is; the first bad one decides."""
        for share in self._shares[component]:
            row = share.rows[page_id]
            for cell in share.cells:
                value = cell.room(row)
                if not _answer(storage.get(ObjectKey(page_key, component, cell.name), memoryview(value))):
                    self._counters.add(fetch_misses=1)
                    return False
                cell.put_back(value, row)
                self._counters.add(fetch_bytes=value.nbytes)
        self._counters.add(fetch_pages=1)
        return True

    def _query(self, storage: Storage, operation: StorageOperation, move: Move, batch: slice) -> None:
        names = list(dict.fromkeys(cell.name for share in self._shares[move.component] for cell in share.cells))
        page_keys = move.page_keys[batch]
        keys = [ObjectKey(key, move.component, name) for key in page_keys for name in names]
        answers = [_answer(answer) for answer in storage.exists(keys)]
        found = np.array(answers).reshape(len(page_keys), len(names)).all(axis=1)
        operation.deliver(move.component, batch, found)
        self._counters.add(query_pages=len(found), query_misses=int((~found).sum()))


def _answer(value: object) -> bool:
    """What a storage answers; TypeError for anything but a bool, since None, a count or an error code is no yes."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise TypeError(f"a storage answered {value!r}, which is not a bool")
