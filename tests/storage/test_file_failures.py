"""The system refuses a call: the file engine answers False and counts."""

from __future__ import annotations

import errno
import logging
import os

import pytest

from jaxcache.storage.file import FileStorage
from tests.storage.values import get_numbered as get
from tests.storage.values import key_of, run_python
from tests.storage.values import put_numbered as put


@pytest.fixture
def storage(tmp_path) -> FileStorage:
    return FileStorage(tmp_path / "storage")


def test_a_full_disk_is_a_refusal(tmp_path):
    """A limit of the file size stands for the full disk: the same short write, then an error."""
    code = """if True:
        import os, resource, sys
        from jaxcache.storage.base import ObjectKey
        from jaxcache.storage.file import FileStorage
        storage = FileStorage(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        big, small = ObjectKey(bytes(32), "big", ""), ObjectKey(bytes(32), "small", "")
        print(storage.put(big, memoryview(bytes(100_000))), storage.put(small, memoryview(bytes(1000))))
        print(storage.exists([big, small]), storage.stats()["put_failures"], os.listdir(sys.argv[1] + "/temporary"))
    """
    said = run_python(code, str(tmp_path / "storage")).stdout.split("\n")
    assert said[:2] == ["False True", "[False, True] 1 []"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", ["open", "pwritev", "link"])
def test_no_failure_of_one_put_is_raised(storage, monkeypatch, caplog, code, call):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(os, call, fail)
        assert [put(storage, i) for i in range(3)] == [False] * 3
    assert storage.stats()["put_failures"] == 3
    assert len(caplog.records) == 1  # not one per value
    assert os.listdir(f"{storage.path}/temporary") == []
    assert put(storage, 1)
    assert get(storage, 1)


@pytest.mark.parametrize("call", ["open", "fstat", "preadv"])
def test_no_failure_of_one_get_is_raised(storage, monkeypatch, call):
    def fail(*args, **kwargs):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    assert put(storage, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        assert not get(storage, 1)
    assert storage.stats()["get_failures"] == 1
    assert get(storage, 1)  # a disk that stutters loses nothing


def test_short_reads_and_writes_are_continued(storage, monkeypatch):
    write, read = os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, at: write(fd, [parts[0][:999]], at))
    monkeypatch.setattr(os, "preadv", lambda fd, parts, at: read(fd, [parts[0][:777]], at))
    assert put(storage, 1)
    assert get(storage, 1)


def test_a_folder_that_vanishes_is_a_miss(storage):
    assert put(storage, 1)
    os.rename(storage.path, storage.path + "-moved")
    assert not get(storage, 1)
    assert not put(storage, 2)
    assert storage.exists([key_of(1)]) == [False]
    storage.clear()
