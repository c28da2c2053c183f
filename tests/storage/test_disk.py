"""A disk that is full or read-only: what is there is read, a new folder is refused, and a quota frees room.

`disk` is a tmpfs of 1 MiB where mounting is possible; the other tests make the system calls fail.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxcache.storage.base import StorageError
from jaxcache.storage.file import FileStorage
from tests.storage.values import FILE_BYTES, age
from tests.storage.values import get_numbered as get
from tests.storage.values import put_numbered as put

DISK_BYTES = 1 << 20


@pytest.fixture
def storage(tmp_path) -> FileStorage:
    return FileStorage(tmp_path / "storage")


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    try:
        mounted = mount("-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0755", "none", str(path))
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("this process may not mount")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


def fill(disk: Path, storage: FileStorage) -> int:
    """Puts until nothing fits, fills the rest with another file, and returns how many values are there."""
    num_values = 0
    while put(storage, num_values):
        age(storage, num_values, seconds=3000 - num_values)
        num_values += 1
    with open(disk / "rest", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(512))
    assert not os.statvfs(disk).f_bavail
    return num_values


def test_a_full_disk_is_read(disk):
    num_values = fill(disk, FileStorage(disk / "storage"))
    assert num_values > 40
    storage = FileStorage(disk / "storage")
    assert all(get(storage, i) for i in range(num_values))
    assert put(storage, 0)  # is there
    assert not put(storage, num_values)
    assert storage.stats()["put_failures"] == 1
    assert storage.stats()["evicted"] == 0  # without a quota nothing leaves
    assert all(get(storage, i) for i in range(num_values))
    os.unlink(disk / "rest")
    storage.clear()
    assert put(storage, num_values)


@pytest.mark.parametrize("quota_bytes", [20 * FILE_BYTES, DISK_BYTES, 100 * DISK_BYTES], ids=["small", "disk", "large"])
def test_a_quota_frees_room_on_a_full_disk(disk, quota_bytes):
    num_values = fill(disk, FileStorage(disk / "storage"))
    storage = FileStorage(disk / "storage", quota_bytes)
    num_new = 2 * num_values
    done = [put(storage, num_values + i) for i in range(num_new)]
    assert all(done[num_values // 16 :])  # a shrunk quota leaves 16 values at a time
    stats = storage.stats()
    assert stats["put_failures"] == done.count(False)
    assert stats["evicted"] >= num_new - 4
    assert stats["eviction_failures"] == 0
    assert not any(get(storage, i) for i in range(num_values))  # the oldest left first
    assert all(get(storage, num_values + num_new - 1 - i) for i in range(10))


def test_what_a_dead_writer_left_on_a_full_disk_makes_room(disk):
    storage = FileStorage(disk / "storage")
    num_values = fill(disk, storage)
    name = Path(storage._folder._temporaries.new_path()).name
    os.unlink(disk / "rest")
    while os.statvfs(disk).f_bavail:
        with open(disk / "storage" / "temporary" / name, "ab", buffering=0) as file:
            file.write(bytes(4096))
    if not os.path.getsize(disk / "storage" / "temporary" / name):
        pytest.fail("nothing was left")
    storage = FileStorage(disk / "storage")
    assert os.statvfs(disk).f_bavail
    assert get(storage, num_values - 1)


def test_a_new_folder_on_a_full_disk_is_refused(disk):
    fill(disk, FileStorage(disk / "storage"))
    with pytest.raises(StorageError, match=f"{disk / 'other'} cannot be used as storage: .*No space left"):
        FileStorage(disk / "other")
    os.unlink(disk / "rest")
    FileStorage(disk / "other")  # goes on with what was made


def test_a_read_only_disk_is_read(disk, caplog):
    storage = FileStorage(disk / "storage")
    for i in range(10):
        assert put(storage, i)
        age(storage, i, seconds=3000)  # so that a hit would refresh it
    assert mount("-o", "remount,ro", str(disk))
    with caplog.at_level(logging.WARNING):
        storage = FileStorage(disk / "storage", quota_bytes=5 * FILE_BYTES)
    assert [record.getMessage() for record in caplog.records if "Read-only" in record.getMessage()]
    assert all(get(storage, i) for i in range(10))
    assert storage.exists([]) == []
    assert put(storage, 0)  # is there
    assert not put(storage, 10)
    assert storage.stats()["put_failures"] == 1
    storage.clear()
    assert get(storage, 0)
    assert not (disk / "storage" / "other").exists()
    with pytest.raises(StorageError, match="Read-only"):
        FileStorage(disk / "other")
    assert mount("-o", "remount,rw", str(disk))
    assert put(storage, 10)  # it need not be opened again


def refuse_writing(monkeypatch, code: int, calls: tuple[str, ...]) -> None:
    """Every system call in `calls` gives the error; os.open only where it would write."""
    real_open = os.open

    def fail(*arguments, **options):
        raise OSError(code, os.strerror(code), *arguments[:1])

    def open_to_read(path, flags, *arguments, **options):
        if flags & os.O_ACCMODE != os.O_RDONLY:
            fail(path)
        return real_open(path, flags, *arguments, **options)

    for call in calls:
        monkeypatch.setattr(os, call, open_to_read if call == "open" else fail)


@pytest.mark.parametrize("calls", [("open",), ("pwritev",), ("link",), ("open", "link", "rename", "unlink", "utime")])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS], ids=errno.errorcode.get)
def test_a_disk_that_takes_nothing_is_read(tmp_path, storage, monkeypatch, code, calls):
    assert put(storage, 1)
    with monkeypatch.context() as patch:
        refuse_writing(patch, code, calls)
        for opened in (storage, FileStorage(storage.path), FileStorage(storage.path, quota_bytes=FILE_BYTES)):
            assert get(opened, 1)
            assert put(opened, 1)
        opened = FileStorage(storage.path)
        assert not put(opened, 2)
        assert opened.stats()["put_failures"] == 1
        with pytest.raises(StorageError, match=os.strerror(code)):
            FileStorage(tmp_path / "new")
    assert put(opened, 2)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EPERM], ids=errno.errorcode.get)
def test_another_error_of_the_disk_is_a_refusal(storage, monkeypatch, code):
    refuse_writing(monkeypatch, code, ("open",))
    with pytest.raises(StorageError, match=os.strerror(code)):
        FileStorage(storage.path)


def test_a_full_disk_evicts_once_per_put(tmp_path, monkeypatch):
    """However large the quota: room for one more value, and one more try."""
    storage = FileStorage(tmp_path / "storage", quota_bytes=1 << 40)
    for i in range(40):
        assert put(storage, i)
        age(storage, i, seconds=3000 - i)
    for code, num_evicted in ((errno.EIO, 0), (errno.EROFS, 0), (errno.ENOSPC, 1)):
        with monkeypatch.context() as patch:
            refuse_writing(patch, code, ("pwritev",))
            assert not put(storage, 40)
        assert storage.stats()["evicted"] == num_evicted
    stats = storage.stats()
    assert (stats["put_failures"], stats["writing_bytes"]) == (3, 0)
    assert not get(storage, 0)
    assert stats["used_bytes"] == 39 * FILE_BYTES
