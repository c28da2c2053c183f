"""The memory of one rank, as content: what a plan copies, what a model step reads and writes, what storage does.

    apply   scatter load-backs of earlier steps -> the plan, in order -> garbage into pages that were just given away
    step    reads what each component needs before n, writes [n, m)
    tick    some storage transfers get a little further, or fail

Nothing of the cache is believed: a page that is read without having been written for these very tokens is a violation.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

import numpy as np

from jaxcache.components import Component, RecurrentState, SlidingWindow
from jaxcache.types import Move, Plan, Transfer, TransferKind
from tests.independent.content import ABSENT, GARBAGE, MAX_PAGES, Text, demand, salt

Storage = dict[tuple[str, bytes], int]
DEVICE_TO_HOST, HOST_TO_DEVICE = TransferKind.BACKUP, TransferKind.LOAD_BACK


class StorageWork:
    """One STORE, QUERY or FETCH on one rank. Results are frozen when it is done; it may touch its pages until quiet."""

    def __init__(self, transfer: Transfer, storage: Storage | None):
        self.kind = transfer.kind
        self.moves = transfer.moves
        self.storage = storage
        self.todo = [(move, i) for move in transfer.moves for i in range(len(move.page_keys))]
        self.good = {move.component: 0 for move in transfer.moves}
        self.exists = {move.component: [False] * len(move.page_keys) for move in transfer.moves}
        self.done = self.quiet = storage is None
        self.is_stopped = False


class Plane:
    """device[c], host[c]: content by page id, one entry more for the id that means absent."""

    def __init__(self, components: tuple[Component, ...], device: list[int], host: list[int], page: int, rng: Random):
        self.names = [component.name for component in components]
        self.index = {name: c for c, name in enumerate(self.names)}
        self.salts = [salt(name) for name in self.names]
        self.windows = [c.window_tokens if isinstance(c, SlidingWindow) else 0 for c in components]
        self.state = next((i for i, c in enumerate(components) if isinstance(c, RecurrentState)), None)
        self.page = page
        self.page_ends = np.arange(MAX_PAGES) * page
        self.device = [np.append(np.full(n, GARBAGE, np.int64), ABSENT) for n in device]
        self.host = [np.append(np.full(n, GARBAGE, np.int64), ABSENT) for n in host]
        self.arriving: list[tuple[int, int, np.ndarray, np.ndarray]] = []  # step, component, device ids, content
        self.given: list[tuple[int, np.ndarray]] = []
        self.work: dict[int, StorageWork] = {}
        self.storage: Storage | None = None
        self.fault_rate = 0.0
        self.rng = rng

    # ---- plans

    def apply(self, plan: Plan, step: int) -> None:
        still = []
        for arrival in self.arriving:
            if arrival[0] < step:
                self.device[arrival[1]][arrival[2]] = arrival[3]
            else:
                still.append(arrival)
        self.arriving = still
        for transfer in plan.transfers:
            demand(len({move.component for move in transfer.moves}) == len(transfer.moves), "plan", transfer)
            for move in transfer.moves:
                if transfer.kind is DEVICE_TO_HOST:
                    self._back_up(move)
                elif transfer.kind is HOST_TO_DEVICE:
                    self._load_back(move, step)
            if transfer.kind not in (DEVICE_TO_HOST, HOST_TO_DEVICE):
                self._begin(transfer)
        for c, page_ids in self.given:
            self.device[c][page_ids] = GARBAGE
        self.given.clear()

    def _back_up(self, move: Move) -> None:
        c = self.index[move.component]
        for _, other, page_ids, _ in self.arriving:
            early = other == c and np.isin(move.src_page_ids, page_ids).any()
            demand(not early, "plan", "a backup gathers what is not scattered yet")
        demand(len(set(move.dst_page_ids.tolist())) == len(move.src_page_ids), "plan", move)
        self.host[c][move.dst_page_ids] = self.device[c][move.src_page_ids]

    def _load_back(self, move: Move, step: int) -> None:
        c = self.index[move.component]
        demand(len(set(move.dst_page_ids.tolist())) == len(move.src_page_ids), "plan", move)
        self.arriving.append((step, c, move.dst_page_ids, self.host[c][move.src_page_ids]))
        self.device[c][move.dst_page_ids] = GARBAGE

    def _begin(self, transfer: Transfer) -> None:
        work = self.work[transfer.id] = StorageWork(transfer, self.storage)
        if transfer.kind is TransferKind.FETCH:
            for move in work.moves:
                self.host[self.index[move.component]][move.dst_page_ids] = GARBAGE

    def give(self, c: int, page_ids: np.ndarray) -> None:
        """These have just become somebody's own: whatever they hold is gone once the plan was applied."""
        self.given.append((c, page_ids))

    def lose_device(self) -> None:
        """A donated step failed: no page survives, and nothing that was on its way arrives."""
        for content in self.device:
            content[:-1] = GARBAGE
        self.arriving.clear()
        self.given.clear()

    def device_to_be(self, c: int) -> np.ndarray:
        """What the device holds once everything that is on its way has arrived."""
        if not any(arrival[1] == c for arrival in self.arriving):
            return self.device[c]
        content = self.device[c].copy()
        for _, other, page_ids, values in self.arriving:
            if other == c:
                content[page_ids] = values
        return content

    # ---- the model

    def step(self, tables: Mapping[str, np.ndarray], slots: list[int | None], text: Text, n: int, m: int) -> None:
        """Computes tokens [n, m). slots: of the state: to read, to write, and more to write to."""
        page, first, last, end = self.page, n // self.page, -(-n // self.page), -(-m // self.page)
        for c, name in enumerate(self.names):
            content, secret = self.device[c], self.salts[c]
            if c == self.state:
                self._step_state(content, slots, text.at(n) ^ secret, text.at(m) ^ secret, n)
                continue
            table = tables[name]
            low = max(0, n - self.windows[c] + 1) // page if self.windows[c] else 0
            if low < last:
                wrong = content[table[low:last]] != text.pages(low, last, n, self.page_ends) ^ secret
                if wrong.any():
                    at = low + int(wrong.argmax())
                    demand(False, "read", f"{name}: page {at} of {last} before token {n} is another's: {table}")
            page_ids = table[first:end]
            demand(len(page_ids) == end - first, "room", name, m, "is beyond", table)
            demand(int(page_ids.max()) < len(content) - 1, "room", name, n, m, "is absent in", table)
            content[page_ids] = text.pages(first, end, m, self.page_ends) ^ secret

    @staticmethod
    def _step_state(content: np.ndarray, slots: list[int | None], before: int, after: int, n: int) -> None:
        read, *write = slots
        if n:
            demand(read is not None and content[read] == before, "read", "the state at", n, "in slot", read)
        content[write] = after

    # ---- storage

    def tick(self) -> None:
        """Everybody who works on storage gets a random little further."""
        rng = self.rng
        for work in self.work.values():
            if work.quiet or rng.random() < 0.3:
                continue
            for _ in range(rng.choice((1, 4, 64))):
                if not work.todo or (work.done and work.is_stopped):
                    break
                self._page(work, *work.todo.pop(0))
            if not work.todo:
                work.done = True
            if work.done and work.kind is TransferKind.FETCH:
                self._write_late(work)
            work.quiet = work.done and (work.kind is TransferKind.QUERY or rng.random() < 0.6)

    def _page(self, work: StorageWork, move: Move, i: int) -> None:
        storage, rng = work.storage, self.rng
        assert storage is not None
        c, key = self.index[move.component], (move.component, move.page_keys[i])
        fails = rng.random() < self.fault_rate
        if work.kind is TransferKind.QUERY:
            work.exists[move.component][i] = (key in storage) != (fails and rng.random() < 0.5)
            return
        if work.kind is TransferKind.STORE:
            value = self.host[c].item(move.src_page_ids[i])
            is_good = not fails
            if is_good and rng.random() >= self.fault_rate:  # else it says so, but has lost it
                storage.setdefault(key, value)
        else:
            is_good = not fails and key in storage
            self.host[c][move.dst_page_ids[i]] = storage[key] if is_good else GARBAGE
        if is_good and not work.done and work.good[move.component] == i:
            work.good[move.component] = i + 1

    def _write_late(self, work: StorageWork) -> None:
        """A call that cannot be interrupted still writes to pages that do not count."""
        for move in work.moves:
            self.host[self.index[move.component]][move.dst_page_ids[work.good[move.component] :]] = GARBAGE

    @property
    def is_fetching(self) -> bool:
        return any(work.kind is TransferKind.FETCH and not work.quiet for work in self.work.values())

    def stop(self, id: int) -> None:
        """Nothing more of it is wanted; it ends when it likes."""
        work = self.work.get(id)
        if work is not None and self.rng.random() < 0.7:
            work.is_stopped = work.done = True

    def hurry(self) -> None:
        """Everything that is under way ends."""
        for work in self.work.values():
            while work.todo and not work.done:
                self._page(work, *work.todo.pop(0))
            work.done = work.quiet = True
