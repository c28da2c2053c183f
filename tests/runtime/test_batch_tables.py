"""Tables of a batch: every one is what its leases say, whatever was built before, and none ever changes."""

from __future__ import annotations

import numpy as np
import pytest

from jaxcache.runtime import batch_tables
from jaxcache.runtime.batch_tables import BatchTables, state_slots_of
from tests.core.helpers import FULL, Server, prompt, state, window

ABSENT = {"full": 64, "window": 64, "state": 16}
MAX_PAGES = 12


def expected(leases, max_pages=MAX_PAGES):
    tables = {name: np.full((len(leases), max_pages), absent, np.int32) for name, absent in ABSENT.items()}
    for row, lease in enumerate(leases):
        for name, table in {} if lease is None else lease.page_tables.items():
            tables[name][row, : len(table)] = table
    return tables


@pytest.fixture
def server():
    return Server(FULL, window(6), state(), device_pages=ABSENT)


def test_whatever_was_built_before(rng, monkeypatch):
    """Requests come, grow, publish, move between rows and go; batches of two shapes by turns."""
    monkeypatch.setattr(batch_tables, "MAX_SHAPES", 2)
    absent = {name: ABSENT[name] for name in ("full", "window")}
    server, builder = Server(FULL, window(6), device_pages=absent), BatchTables(absent)
    kept, running = [], []
    for step in range(120):
        if len(running) < 4:
            running.append(server.admit(prompt(5 + int(rng.integers(8)), 1000 * step)))
            server.compute(running[-1], running[-1].num_tokens)
        for lease in list(running):
            if lease.num_tokens >= MAX_PAGES * 4 - 2 or rng.random() < 0.05:
                running.remove(lease)
                server.release(lease)
            elif rng.random() < 0.7:
                lease.sequence.extend([7])
                assert server.core.grow(lease, lease.num_computed, lease.num_tokens - lease.num_computed + 1)
                server.compute(lease, lease.num_tokens)
                server.insert(lease, lease.num_computed)
        num_rows = 4 + int(rng.integers(3))
        leases = [*running, *[None] * (num_rows - len(running))]
        leases = [leases[i] for i in rng.permutation(num_rows)] if rng.random() < 0.3 else leases
        server.rank.apply()
        tables, wanted = builder.build(leases, MAX_PAGES), expected(leases)
        assert tables.keys() == absent.keys()
        for name, table in tables.items():
            np.testing.assert_array_equal(table, wanted[name])
            kept.append((table, table.copy()))
    for table, copy in kept:
        np.testing.assert_array_equal(table, copy)
        assert not table.flags.writeable
    assert len(builder._last) == 2


def test_what_is_unchanged_is_the_same_memory(server):
    builder, leases = BatchTables(ABSENT), [server.admit(prompt(9)), None]
    first, again = builder.build(leases, MAX_PAGES), builder.build(leases, MAX_PAGES)
    assert all(again[name].ctypes.data == table.ctypes.data for name, table in first.items())
    server.compute(leases[0], 9)
    assert server.core.grow(leases[0], 9, 8)
    server.rank.apply()
    grown = builder.build(leases, MAX_PAGES)
    assert grown["full"].ctypes.data != first["full"].ctypes.data
    assert grown["state"].ctypes.data == first["state"].ctypes.data


def test_a_batch_of_nobody_cannot_be_written_either():
    table = BatchTables(ABSENT).build([None], 4)["full"]
    with pytest.raises(ValueError, match="read-only"):
        table[:] = 3


def test_a_lease_that_is_too_long_leaves_nothing_behind(server):
    builder, lease = BatchTables(ABSENT), server.admit(prompt(17))
    with pytest.raises(ValueError, match="has 5 pages of 'full', max_pages=4"):
        builder.build([lease], 4)
    np.testing.assert_array_equal(builder.build([None], 4)["full"], expected([None], 4)["full"])
    np.testing.assert_array_equal(builder.build([lease], 5)["full"], expected([lease], 5)["full"])


# ---- slots of recurrent states

NOWHERE = ABSENT["state"]


def slots_of(server: Server, leases, ends) -> list[list[int]]:
    """Of each row: read, write, keep."""
    server.rank.apply()
    slots = state_slots_of(server.core, leases, ends)
    assert slots is not None
    assert all(array.dtype == np.int32 and not array.flags.writeable for array in slots)
    return np.stack(slots, axis=1).tolist()


def test_a_request_reads_what_the_tree_has_then_what_it_wrote(server):
    """A3: the tree's state is read at first, and never written."""
    first = server.admit(prompt(10))
    assert slots_of(server, [None, first], [0, 8]) == [
        [NOWHERE] * 3,
        [NOWHERE, first.write_slot, first.checkpoints[8]],
    ]
    server.compute(first, 10)
    server.insert(first, 10)
    server.release(first)
    again = server.admit(prompt(14))
    assert again.num_cached_tokens == 8 and again.read_slot not in (None, again.write_slot)
    assert slots_of(server, [again], [11]) == [[again.read_slot, again.write_slot, NOWHERE]]
    server.compute(again, 11)
    assert server.core.grow(again, 11, 3)
    assert slots_of(server, [again], [12]) == [[again.write_slot, again.write_slot, again.checkpoints[12]]]
    server.release(again)


def test_without_recurrent_states_there_are_no_slots():
    server = Server(FULL, window(6))
    lease = server.admit(prompt(10))
    assert state_slots_of(server.core, [lease], [8]) is None


def test_rows_that_cannot_be_computed_are_refused(server):
    lease = server.admit(prompt(10))
    server.rank.apply()
    for leases, ends, error, message in (
        ([lease], [8, 9], RuntimeError, "1 leases and 2 ends"),
        ([lease], [0], RuntimeError, "end=0 of row 0 is not in its room"),
        ([None, lease], [0, 11], RuntimeError, "end=11 of row 1 is not in its room"),
        (iter([lease]), [8], TypeError, "leases must be a list"),
        ([7], [8], TypeError, "a Lease"),
    ):
        with pytest.raises(error, match=message):
            state_slots_of(server.core, leases, ends)
    server.release(lease)
    with pytest.raises(ValueError, match="released"):
        state_slots_of(server.core, [lease], [8])
