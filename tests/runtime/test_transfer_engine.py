"""Copies and storage transfers on real pools: bytes, order, faults, and what a bad storage can do."""

import ctypes
import threading
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxcache.components import FieldSpec, FullAttention, RecurrentState
from jaxcache.engine import device_effects
from jaxcache.engine.device_effects import DeviceEffects
from jaxcache.engine.jobs import at_once
from jaxcache.engine.shard_copies import MemoryCopies
from jaxcache.engine.storage_connection import MAX_FAILURES
from jaxcache.engine.storage_io import BATCH_PAGES
from jaxcache.engine.transfer_engine import TransferEngine
from jaxcache.pools.device_pool import bucket_pages, init_pools
from jaxcache.pools.page_layout import page_layouts
from jaxcache.runtime.compiles import compile_count
from jaxcache.storage.base import Storage
from jaxcache.types import Move, Transfer, TransferFault, TransferKind

DEVICE_PAGES, HOST_PAGES = 16, 24
WAIT_S = 10
KV = FieldSpec("kv", (3, 2, 4, 2, 4), "bfloat16", ("layers", None, "slots", "heads", None))
INDEX = FieldSpec("index", (3, 4, 4), "float32", ("layers", "slots", None))
LATENT = FieldSpec("latent", (3, 1, 4), "int32", ("layers", "slots", None))
STATE = FieldSpec("state", (3, 2, 8), "float32", ("layers", "heads", None))
PART = FieldSpec("part", (4, 2, 4), "float32", ("slots", "heads", None))  # one layer of a pool that is a list
LIST = (*(replace(PART, name=f"k{i}") for i in range(3)), INDEX, *(replace(PART, name=f"v{i}") for i in range(3)))
FULL, STATES = FullAttention("full", (KV, INDEX, LATENT)), RecurrentState("state", (STATE,))
COMPONENTS = (FULL, STATES, FullAttention("list", LIST))
MESHES = [(1, 1, 1), (2, 2, 2)]


class DictStorage(Storage):
    """Values in a dictionary. `gate` holds up every call while it is closed; `broken` makes every call raise."""

    secret = b"test"

    def __init__(self):
        self.values = {}
        self.gate = threading.Event()
        self.gate.set()
        self.broken = False
        self.num_calls = 0
        self.entered = threading.Semaphore(0)

    def _enter(self):
        self.num_calls += 1
        self.entered.release()
        assert self.gate.wait(WAIT_S)
        if self.broken:
            raise OSError("disk")

    def exists(self, keys):
        self._enter()
        return [self.object_name(key) in self.values for key in keys]

    def get(self, key, buffer):
        self._enter()
        value = self.values.get(self.object_name(key))
        if value is None:
            return False
        buffer[:] = value
        return True

    def put(self, key, buffer):
        self._enter()
        self.values.setdefault(self.object_name(key), bytes(buffer))
        return True

    def clear(self):
        self.values.clear()


class Rig:
    """An engine, its pools and a step counter."""

    def __init__(self, mesh, storage=None, deadline_s=WAIT_S, num_threads=2, max_bucket=4):
        self.layouts = page_layouts(COMPONENTS, mesh)
        num_pages = dict.fromkeys(self.layouts, DEVICE_PAGES)
        host_pages = dict.fromkeys(self.layouts, HOST_PAGES)
        self.effects = DeviceEffects(self.layouts, mesh, num_pages, host_pages, max_bucket)
        self.engine = TransferEngine(self.effects, self.effects.parts({}), storage, deadline_s, num_threads)
        self.pools = init_pools(self.layouts, num_pages, mesh)
        self.step, self.next_id = 0, 0

    def apply(self, *transfers):
        self.step += 1
        self.pools = self.engine.apply(self.pools, transfers, self.step)

    def shard_copies(self):
        """Of the only device."""
        (copies,) = self.effects._shard_copies.values()
        return copies

    def transfer(self, kind, src=(), dst=(), keys=(), ends=(), component="full"):
        self.next_id += 1
        move = Move(component, np.array(src, np.int32), np.array(dst, np.int32), tuple(keys), tuple(ends))
        return Transfer(self.next_id, kind, self.step, (move,))

    def backup(self, src, dst, component="full"):
        return self.transfer(TransferKind.BACKUP, src, dst, component=component)

    def load_back(self, src, dst, component="full"):
        return self.transfer(TransferKind.LOAD_BACK, src, dst, component=component)

    def store(self, src, keys):
        return self.transfer(TransferKind.STORE, src, keys=keys)

    def fetch(self, dst, keys):
        return self.transfer(TransferKind.FETCH, dst=dst, keys=keys)

    def query(self, keys):
        return self.transfer(TransferKind.QUERY, keys=keys, ends=range(len(keys)))

    def write(self, page_ids, seed, component="full"):
        """What a model step does: writes whole pages of donated pools."""
        values = self.values(page_ids, seed, component)
        staging = {}
        for stack in self.layouts[component].stacks:
            f, parts = stack.field, [values[name] for name in stack.names]
            pages = np.zeros((bucket_pages(len(page_ids)), *f.padded_shape), f.dtype)
            pages[: len(page_ids)] = parts[0] if len(parts) == 1 else np.stack(parts, axis=1)
            staging[f.spec.name] = jax.device_put(pages, self.layouts[component].staging_shardings()[f.spec.name])
        ids = np.array(page_ids, np.int32)
        self.pools[component] = self.effects.mover.scatter(component, self.pools[component], ids, staging)

    def values(self, page_ids, seed, component="full"):
        rng = np.random.default_rng(seed)
        fields = self.layouts[component].fields
        return {f.spec.name: rng.integers(1, 99, (len(page_ids), *f.padded_shape)).astype(f.dtype) for f in fields}

    def check(self, page_ids, seed, component="full"):
        expected = self.values(page_ids, seed, component)
        for f in self.layouts[component].fields:
            layers = f.spec.shape[0]  # the rest is padding, which storage does not keep
            pages = np.array(self.pools[component][f.spec.name], copy=True)[list(page_ids)]
            np.testing.assert_array_equal(pages[:, :layers], expected[f.spec.name][:, :layers])

    def wait(self, transfer, condition=lambda status: status.quiet):
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            status = self.engine.poll()[transfer.id]
            if condition(status):
                return status
            time.sleep(0.001)
        raise AssertionError(f"{status} after {WAIT_S} s")

    def buffers(self):
        arrays = jax.tree.leaves(self.pools)
        return sorted(shard.data.unsafe_buffer_pointer() for array in arrays for shard in array.addressable_shards)


@pytest.fixture
def storage():
    storage = DictStorage()
    yield storage
    storage.gate.set()


@pytest.fixture(params=["inline", "staged"])
def way(request, monkeypatch):
    """How pages are copied: CPU devices take the first way where they can, GPUs always the second."""
    if request.param == "staged":
        staged_only(monkeypatch)
    return request.param


def staged_only(monkeypatch):
    monkeypatch.setattr(device_effects, "back_up_now", lambda *args: False)
    monkeypatch.setattr(device_effects, "load_back_now", lambda *args: None)


@pytest.fixture
def make_rig(make_mesh, storage, way):
    rigs = []

    def make(shape=(1, 1, 1), **options):
        rigs.append(Rig(make_mesh(*shape), storage, **options))
        return rigs[-1]

    with jax.thread_guard(True):
        yield make
        storage.gate.set()
        for rig in rigs:
            rig.engine.close()


def keys(*numbers):
    return tuple(bytes([n]) * 32 for n in numbers)


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("component", ["full", "state", "list"])
def test_backup_overwrite_load_back(make_rig, shape, component):
    rig = make_rig(shape)
    rig.write([3, 1, 2], 1, component)
    rig.apply(rig.backup([3, 1, 2], [20, 0, 7], component))
    rig.write([3, 1, 2], 2, component)
    rig.apply(rig.load_back([20, 0, 7], [15, 4, 5], component))
    rig.check([3, 1, 2], 2, component)
    rig.apply()
    rig.check([15, 4, 5], 1, component)
    rig.check([3, 1, 2], 2, component)


def test_a_backup_is_a_snapshot_even_if_it_is_copied_late(make_rig):
    """Insert, evict and reuse of the same device pages in one step."""
    rig = make_rig((2, 2, 2), num_threads=1)
    gate = threading.Event()
    rig.engine.copies.submit(at_once(gate.wait, WAIT_S))
    rig.write([3, 1], 1)
    rig.apply(rig.backup([3, 1], [0, 1]))
    rig.write([3, 1], 2)
    rig.apply(rig.backup([3, 1], [2, 3]), rig.load_back([0, 1], [8, 9]), rig.load_back([2, 3], [10, 11]))
    gate.set()
    rig.apply()
    rig.check([8, 9], 1)
    rig.check([10, 11], 2)


def test_a_load_waits_for_the_backup_that_fills_its_source(make_rig, monkeypatch):
    staged_only(monkeypatch)
    rig = make_rig(num_threads=2)
    gate, copies = threading.Event(), rig.shard_copies()
    copy = copies.to_rows
    monkeypatch.setattr(copies, "to_rows", lambda *args: gate.wait(WAIT_S) and copy(*args))
    rig.write([3], 1)
    rig.apply(rig.backup([3], [5]), rig.load_back([5], [6]))
    assert rig.engine.stats()["copy_queue_depth"] == 2
    threading.Timer(0.1, gate.set).start()
    rig.apply()
    rig.check([6], 1)


def test_a_host_page_is_reused_only_after_its_readers(make_rig, storage):
    rig = make_rig()
    rig.write([0, 1], 1)
    storage.gate.clear()
    rig.apply(rig.backup([0, 1], [5, 6]), rig.store([5, 6], keys(1, 2)))
    assert storage.entered.acquire(timeout=WAIT_S)
    rig.write([0, 1], 2)
    rig.apply(rig.backup([0, 1], [5, 6]))
    storage.gate.set()
    assert rig.engine.drain(WAIT_S)
    fetch = rig.fetch([7, 8], keys(1, 2))
    rig.apply(fetch)
    assert rig.wait(fetch).pages == {"full": 2}
    rig.apply(rig.load_back([7, 8], [10, 11]), rig.load_back([5, 6], [12, 13]))
    rig.apply()
    rig.check([10, 11], 1)
    rig.check([12, 13], 2)


def test_long_transfers_are_cut(make_rig):
    rig = make_rig(max_bucket=2)
    for page in range(5):
        rig.write([page], page)
    rig.apply(rig.backup(range(5), range(10, 15)), rig.load_back(range(10, 15), range(8, 13)))
    rig.apply()
    for page in range(5):
        rig.check([page + 8], page)


def test_a_load_back_is_scattered_in_a_later_step_only(make_rig, monkeypatch):
    staged_only(monkeypatch)
    rig = make_rig()
    rig.write([0], 1)
    rig.write([1], 2)
    rig.apply(rig.backup([0], [0]), rig.load_back([0], [1]))
    assert rig.engine.drain(WAIT_S)
    rig.pools = rig.engine.apply(rig.pools, (), rig.step)
    rig.check([1], 2)
    rig.apply()
    rig.check([1], 1)


def test_load_backs_to_lost_pools_are_not_scattered(make_rig):
    rig = make_rig()
    rig.write([0], 1)
    rig.apply(rig.backup([0], [0]), rig.load_back([0], [1]))
    rig.write([1], 2)
    rig.engine.forget_device()
    rig.apply()
    rig.check([1], 2)


@pytest.mark.parametrize("shape", MESHES)
def test_pools_stay_where_they_are_and_nothing_compiles(make_rig, shape):
    rig = make_rig(shape)
    rig.pools = rig.effects.warmup(rig.pools)
    before, num_compiles = rig.buffers(), compile_count()
    for step in range(3):
        old = rig.pools["full"]
        rig.write([0, 1, 2], step)
        rig.apply(rig.backup([0, 1, 2], [0, 1, 2]), rig.load_back([2, 0], [8, 9]))
        rig.apply()
        assert all(array.is_deleted() for array in old.values())
    assert rig.engine.drain(WAIT_S)
    assert rig.buffers() == before
    assert compile_count() == num_compiles


class StagedCopies(MemoryCopies):
    """Fills the array that it is given, as copies to a GPU do."""

    needs_staging = True

    def from_rows(self, rows, page_ids, field, bucket, staged):
        assert staged.shape == (bucket, *field.local_shape) and staged.dtype == field.dtype
        address = staged.block_until_ready().unsafe_buffer_pointer()
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * staged.nbytes).from_address(address)).reshape(bucket, -1)
        memory[: len(page_ids)] = rows[:, field.byte_range][page_ids]
        return staged


@pytest.mark.parametrize("shape", MESHES)
def test_copies_that_fill_staging(make_rig, monkeypatch, platform, shape):
    staged_only(monkeypatch)
    if platform == "cpu":
        monkeypatch.setattr(device_effects, "shard_copies", StagedCopies)
    rig = make_rig(shape)
    rig.pools = rig.effects.warmup(rig.pools)
    num_compiles = compile_count()
    pieces = [([3, 1, 7], [0, 1, 2], [8, 9, 10]), ([4, 2], [5, 4], [11, 0]), ([7, 3, 1], [2, 0, 1], [10, 8, 9])]
    for value, (device, host, back) in enumerate(3 * pieces, 1):
        rig.write(device, value)
        rig.apply(rig.backup(device, host), rig.load_back(host, back))
        rig.apply()
        rig.check(back, value)
    assert compile_count() == num_compiles
    assert rig.effects.mover._spares is not None and rig.effects.mover._spares.take("full", 4) is not None
    rig.apply(rig.load_back([0, 1], [12, 13]))
    rig.engine.forget_device()  # its copy goes on
    assert not rig.effects.mover._spares._spares  # an engine that sleeps wants its memory
    rig.apply(rig.load_back([2], [14]))
    rig.apply()
    for pages in (np.array(array, copy=True) for array in rig.pools["full"].values()):
        np.testing.assert_array_equal(pages[14], pages[10])
        assert not pages[[12, 13]].any()


@pytest.mark.parametrize("shape", MESHES)
def test_a_failed_copy_is_a_fault(make_rig, monkeypatch, shape):
    """Of one device, while the others' end well."""
    staged_only(monkeypatch)
    rig = make_rig(shape)

    def fail(*args):
        raise MemoryError("staging")

    monkeypatch.setattr(list(rig.effects._shard_copies.values())[-1], "to_rows", fail)
    store = rig.store([0], keys(1))
    rig.apply(rig.backup([0], [0]), store, rig.load_back([0], [1]))
    assert rig.engine.drain(WAIT_S)
    assert isinstance(rig.engine.fault, MemoryError)
    status = rig.wait(store)
    assert (status.done, status.ok, status.pages) == (True, False, {"full": 0})
    with pytest.raises(TransferFault, match="staging"):
        rig.apply()


@pytest.mark.parametrize("shape", MESHES)
def test_store_query_fetch(make_rig, shape):
    rig = make_rig(shape)
    rig.write([0, 1, 2], 1)
    store = rig.store([3, 4, 5], keys(1, 2, 3))
    rig.apply(rig.backup([0, 1, 2], [3, 4, 5]), store)
    assert rig.wait(store).pages == {"full": 3}
    rig.engine.forget(store.id)
    query, fetch = rig.query(keys(2, 9, 3)), rig.fetch([8, 9, 10], keys(1, 2, 3))
    rig.apply(query, fetch)
    assert rig.wait(query).exists["full"].tolist() == [True, False, True]
    assert rig.wait(fetch).pages == {"full": 3}
    rig.apply(rig.load_back([8, 9, 10], [13, 14, 15]))
    rig.apply()
    rig.check([13, 14, 15], 1)
    assert sorted(rig.engine.poll()) == [query.id, fetch.id]


def test_repeated_shares_are_written_once(make_rig, storage):
    rig = make_rig((2, 1, 1))
    store = Transfer(99, TransferKind.STORE, 0, (Move("state", np.array([0], np.int32), page_keys=keys(1)),))
    rig.apply(rig.backup([0], [0], "state"), store)
    rig.wait(store)
    assert len(storage.values) == storage.num_calls == 1


def test_a_page_counts_only_up_to_the_first_gap_and_on_all_ranks(make_rig, storage):
    rig = make_rig((2, 2, 1))
    store = rig.store([0, 1, 2], keys(1, 2, 3))
    rig.apply(store)
    rig.wait(store)
    cell = rig.engine.storage_io._parts["full"].shares[1].cells[0].name
    key = storage.object_name(transfer_key(2, cell))
    del storage.values[key]
    query, fetch = rig.query(keys(1, 2, 3)), rig.fetch([4, 5, 6], keys(1, 2, 3))
    rig.apply(query, fetch)
    assert rig.wait(query).exists["full"].tolist() == [True, False, True]
    status = rig.wait(fetch)
    assert (status.pages, status.ok) == ({"full": 1}, True)


def transfer_key(number, cell):
    from jaxcache.storage.base import ObjectKey

    return ObjectKey(keys(number)[0], "full", cell)


def test_a_stalled_fetch_is_done_at_its_deadline_and_quiet_when_it_returns(make_rig, storage):
    rig = make_rig(deadline_s=0.05)
    storage.gate.clear()
    fetch = rig.fetch([0, 1], keys(1, 2))
    rig.apply(fetch)
    assert storage.entered.acquire(timeout=WAIT_S)
    status = rig.wait(fetch, lambda status: status.done)
    assert (status.quiet, status.ok, status.pages) == (False, False, {"full": 0})
    with pytest.raises(AssertionError, match="before it is quiet"):
        rig.engine.forget(fetch.id)
    storage.gate.set()
    status = rig.wait(fetch)
    assert (status.done, status.pages) == (True, {"full": 0})
    assert storage.num_calls == 1, "the second page is not read any more"
    assert rig.engine.stats()["storage_timeouts"] == 1
    rig.engine.forget(fetch.id)


def test_a_stalled_storage_holds_up_no_copy(make_rig, storage):
    """Not even of a page that the stalled job delivered before."""
    rig = make_rig(deadline_s=0.2, num_threads=1)
    store = rig.store([0], keys(1))
    rig.write([0], 1)
    rig.apply(rig.backup([0], [0]), store)
    rig.wait(store)
    slow = threading.Event()
    get, fetch = storage.get, rig.fetch([4, 5], keys(1, 2))
    storage.get = lambda key, buffer: get(key, buffer) if key.page_key == keys(1)[0] else slow.wait(WAIT_S)
    rig.apply(fetch)
    status = rig.wait(fetch, lambda status: status.done)
    assert (status.pages, status.quiet) == ({"full": 1}, False)
    rig.apply(rig.load_back([4], [9]), rig.backup([0], [4]), rig.load_back([4], [10]))
    rig.apply()
    rig.check([9], 1)
    slow.set()
    rig.wait(fetch)


def test_cancel(make_rig, storage):
    rig = make_rig(num_threads=1)
    store = rig.store(range(3), keys(1, 2, 3))
    rig.apply(store)
    rig.wait(store)
    storage.gate.clear()
    num_calls = storage.num_calls
    while storage.entered.acquire(blocking=False):
        pass
    fetch = rig.fetch(range(2 * BATCH_PAGES), keys(*range(1, 2 * BATCH_PAGES + 1)))
    rig.apply(fetch)
    assert storage.entered.acquire(timeout=WAIT_S)
    rig.engine.cancel(fetch.id)
    status = rig.engine.poll()[fetch.id]
    assert (status.done, status.quiet, status.ok) == (True, False, False)
    storage.gate.set()
    assert rig.wait(fetch).pages == {"full": 0}
    assert storage.num_calls == num_calls + 1
    rig.engine.cancel(12345)


def test_a_cancelled_store_writes_no_further_page(make_rig, storage):
    rig = make_rig(num_threads=1)
    storage.gate.clear()
    store = rig.store(range(2 * BATCH_PAGES), keys(*range(2 * BATCH_PAGES)))
    rig.apply(store)
    assert storage.entered.acquire(timeout=WAIT_S)
    rig.engine.cancel(store.id)
    status = rig.engine.poll()[store.id]
    assert (status.done, status.quiet, status.pages) == (True, False, {"full": 0})
    storage.gate.set()
    assert rig.wait(store).pages == {"full": 0}
    assert len(storage.values) == 1


def test_failures_are_misses_and_open_the_breaker(make_rig, storage):
    rig = make_rig(num_threads=1)
    storage.broken = True
    for _ in range(MAX_FAILURES):
        query = rig.query(keys(1))
        rig.apply(query)
        status = rig.wait(query)
        assert (status.done, status.ok, status.exists["full"].tolist()) == (True, False, [False])
    num_calls = storage.num_calls
    fetch = rig.fetch([0], keys(1))
    rig.apply(fetch)
    status = rig.engine.poll()[fetch.id]
    assert (status.done, status.quiet, status.pages) == (True, True, {"full": 0})
    stats = rig.engine.stats()
    assert storage.num_calls == num_calls
    assert (stats["breaker_openings"], stats["storage_not_asked"], stats["storage_failures"]) == (1, 1, MAX_FAILURES)
    storage.broken = False
    rig.engine.storage_io._connection.breaker._open_until = 0.0
    again = rig.query(keys(1))
    rig.apply(again)
    assert rig.wait(again).ok


def test_without_storage_everything_misses(make_rig):
    rig = make_rig()
    rig.engine.set_storage(None)
    transfers = rig.store([0], keys(1)), rig.query(keys(1)), rig.fetch([0], keys(1))
    rig.apply(*transfers)
    assert all(status.done and status.quiet for status in rig.engine.poll().values())


def test_counters(make_rig):
    rig = make_rig((2, 1, 1))
    rig.apply(rig.backup([0, 1], [0, 1]), rig.load_back([0], [2]))
    assert rig.engine.drain(WAIT_S)
    stats = rig.engine.stats()
    row_bytes = rig.layouts["full"].row_bytes
    assert (stats["backup_pages"], stats["backup_bytes"]) == (2, 2 * 2 * row_bytes)
    assert (stats["load_back_pages"], stats["load_back_bytes"]) == (1, 2 * row_bytes)
    assert stats["backup_seconds"] > 0
    assert (stats["copy_queue_depth"], stats["storage_queue_depth"]) == (0, 0)
