"""BACKUPs of one step are joined, but only while nobody can tell."""

import numpy as np

from jaxcache.engine.backup_merging import merged
from jaxcache.types import Move, Transfer, TransferKind


def transfer(id, kind, src, dst, component="full"):
    return Transfer(id, kind, 1, (Move(component, np.array(src, np.int32), np.array(dst, np.int32)),))


def backup(id, src, dst, component="full"):
    return transfer(id, TransferKind.BACKUP, src, dst, component)


def moves(transfers):
    return [[(m.component, m.src_page_ids.tolist(), m.dst_page_ids.tolist()) for m in t.moves] for t in transfers]


def test_neighbours_are_joined_by_component():
    result = merged([backup(1, [1], [5]), backup(2, [2], [6]), backup(3, [1], [5], "window")])
    assert moves(result) == [[("full", [1, 2], [5, 6]), ("window", [1], [5])]]


def test_a_host_page_is_written_once_per_transfer():
    assert moves(merged([backup(1, [1], [5]), backup(2, [2], [5])])) == [[("full", [1], [5])], [("full", [2], [5])]]


def test_nothing_is_joined_across_a_load_back():
    load = transfer(2, TransferKind.LOAD_BACK, [5], [7])
    assert [t.id for t in merged([backup(1, [1], [5]), load, backup(3, [2], [6])])] == [1, 2, 3]


def test_load_backs_are_not_joined():
    loads = [transfer(id, TransferKind.LOAD_BACK, [id], [id]) for id in (1, 2)]
    assert merged(loads) == loads
