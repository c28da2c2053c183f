"""The quota of the file engine, and what a hit does to the order of leaving."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxcache.storage import file
from jaxcache.storage.file import REFRESH_NS, SCANS_PER_QUOTA, FileStorage
from tests.storage.values import FILE_BYTES, age, key_of, path_of
from tests.storage.values import get_numbered as get
from tests.storage.values import put_numbered as put


@pytest.fixture
def storage(tmp_path) -> FileStorage:
    return FileStorage(tmp_path / "storage")


def on_disk(storage: FileStorage) -> int:
    return sum(path.stat().st_size for path in Path(storage.path, "values").rglob("*") if path.is_file())


def test_the_quota_holds_and_the_oldest_leaves(tmp_path):
    storage = FileStorage(tmp_path / "storage", quota_bytes=10 * FILE_BYTES)
    for i in range(30):
        assert put(storage, i)
        age(storage, i, seconds=3000 - i)
        assert on_disk(storage) == storage.stats()["used_bytes"] <= 10 * FILE_BYTES
    assert [i for i in range(30) if get(storage, i)] == list(range(20, 30))
    assert storage.stats()["evicted"] == 20


def test_a_hit_keeps_a_value(tmp_path):
    storage = FileStorage(tmp_path / "storage", quota_bytes=10 * FILE_BYTES)
    for i in range(10):
        assert put(storage, i)
        age(storage, i, seconds=3000 - i)
    assert get(storage, 0)
    assert put(storage, 10)
    assert [i for i in range(11) if get(storage, i)] == [0, *range(2, 11)]


def test_a_hit_after_the_scan_keeps_a_value(tmp_path):
    path = tmp_path / "storage"
    for i in range(10):
        storage = FileStorage(path)
        assert put(storage, i)
        age(storage, i, seconds=3000 - i)
    storage = FileStorage(path, quota_bytes=10 * FILE_BYTES)  # lists what is oldest
    assert get(storage, 0)
    assert put(storage, 10)
    assert [i for i in range(11) if get(storage, i)] == [0, *range(2, 11)]


def test_a_hit_writes_at_most_once_a_minute(storage):
    assert put(storage, 1)
    for seconds, is_refreshed in ((REFRESH_NS / 1e9 - 5, False), (REFRESH_NS / 1e9 + 5, True)):
        age(storage, 1, seconds)
        before = os.stat(path_of(storage, 1)).st_mtime_ns
        assert get(storage, 1)
        assert (os.stat(path_of(storage, 1)).st_mtime_ns != before) == is_refreshed


def test_a_value_above_the_quota_is_refused_and_evicts_nothing(tmp_path):
    storage = FileStorage(tmp_path / "storage", quota_bytes=2 * FILE_BYTES)
    assert put(storage, 1)
    assert not storage.put(key_of(2), memoryview(bytes(2 * FILE_BYTES)))
    assert get(storage, 1)
    assert storage.stats()["put_failures"] == 1


def test_a_quota_that_shrank_is_reached(tmp_path):
    storage = FileStorage(tmp_path / "storage")
    for i in range(100):
        assert put(storage, i)
    assert storage.stats()["used_bytes"] == on_disk(storage) == 100 * FILE_BYTES
    storage = FileStorage(storage.path, quota_bytes=5 * FILE_BYTES)
    assert storage.stats()["used_bytes"] == 100 * FILE_BYTES  # nothing leaves at start
    for i in range(100, 110):
        assert put(storage, i)
    assert on_disk(storage) <= 5 * FILE_BYTES


def test_two_writers_share_a_quota(tmp_path, monkeypatch):
    monkeypatch.setattr(file, "MIN_SCAN_BYTES", 0)
    num_values = 64
    quota_bytes = num_values * FILE_BYTES
    first, second = (FileStorage(tmp_path / "storage", quota_bytes) for _ in range(2))
    for i in range(3 * num_values):
        assert put(first if i % 2 else second, i)
        assert on_disk(first) <= quota_bytes + 2 * (quota_bytes // SCANS_PER_QUOTA + 2 * FILE_BYTES)
    assert first.stats()["evicted"]
    assert second.stats()["evicted"]


def test_threads_keep_the_quota(tmp_path):
    storage = FileStorage(tmp_path / "storage", quota_bytes=20 * FILE_BYTES)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda i: put(storage, i), range(200)))
    assert on_disk(storage) <= 20 * FILE_BYTES
    assert storage.stats()["writing_bytes"] == 0
    assert storage.stats()["used_bytes"] >= on_disk(storage)  # more where a value was published during a scan


@pytest.mark.parametrize("quota_bytes", [0, -1])
def test_a_quota_is_positive(tmp_path, quota_bytes):
    with pytest.raises(ValueError, match="quota_bytes"):
        FileStorage(tmp_path / "storage", quota_bytes)
    assert not (tmp_path / "storage").exists()
