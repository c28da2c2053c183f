"""What was damaged, swapped or planted is a miss, is never executed, and can be replaced."""

from __future__ import annotations

import ast
import errno
import os
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxcache.storage.file import FileStorage
from jaxcache.storage.record import HEADER_BYTES, check, claimed_bytes, pack_header
from tests.storage.values import KEY, OTHERS, content, get, put

PACKAGE = Path(__file__).parents[2] / "jaxcache"


@pytest.fixture
def files(tmp_path) -> FileStorage:
    return FileStorage(tmp_path / "storage")


def value_files(files: FileStorage) -> list[Path]:
    return [path for path in Path(files.path, "values").rglob("*") if len(path.name) == 64]


# The record


def test_every_bit_of_a_record_counts():
    payload = bytearray(content(64))
    header = bytearray(pack_header(KEY, memoryview(payload)))
    assert check(header, KEY, memoryview(payload))
    for part in (header, payload):
        for bit in range(8 * len(part)):
            part[bit // 8] ^= 1 << bit % 8
            assert not check(header, KEY, memoryview(payload))
            assert part is payload or claimed_bytes(header, KEY) is None
            part[bit // 8] ^= 1 << bit % 8
    assert claimed_bytes(header, KEY) == 64
    for key in OTHERS:
        assert not check(header, key, memoryview(payload))
        assert claimed_bytes(header, key) is None
    assert claimed_bytes(header[:-1], KEY) is None


# Faults of the file engine


class Bomb:
    """Unpickling one makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def swap_for_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def swap_for_full_folder(path: Path) -> None:
    swap_for_folder(path)
    (path / "junk").write_text("junk")


def swap_for_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def swap_for_socket(path: Path) -> None:
    path.unlink()
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def swap_for_link(path: Path) -> None:
    """To the very value, which would be a hit if it were followed."""
    path.rename(path.parents[2] / "elsewhere")
    path.symlink_to(path.parents[2] / "elsewhere")


def swap_for_link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parents[2] / "nothing")


def swap_for_link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def swap_for_link_to_a_folder(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent)


NO_FILES: dict[str, Callable[[Path], object]] = {
    "folder": swap_for_folder,
    "full folder": swap_for_full_folder,
    "fifo": swap_for_fifo,
    "socket": swap_for_socket,
    "link": swap_for_link,
    "link to nothing": swap_for_link_to_nothing,
    "link to itself": swap_for_link_to_itself,
    "link to a folder": swap_for_link_to_a_folder,
}

FAULTS: dict[str, Callable[[Path], object]] = {
    "truncated payload": lambda path: os.truncate(path, HEADER_BYTES + 4999),
    "truncated header": lambda path: os.truncate(path, 100),
    "header only": lambda path: os.truncate(path, HEADER_BYTES),
    "empty": lambda path: os.truncate(path, 0),
    "holes": lambda path: (os.truncate(path, HEADER_BYTES), os.truncate(path, HEADER_BYTES + 5000)),
    "all zeros": lambda path: path.write_bytes(bytes(HEADER_BYTES + 5000)),
    "trailing junk": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "bit in magic": lambda path: flip(path, 0),
    "bit in size": lambda path: flip(path, 16),
    "bit in padding": lambda path: flip(path, 3000),
    "bit in payload": lambda path: flip(path, HEADER_BYTES + 2500),
    "last bit": lambda path: flip(path, -1),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Bomb(str(path.parents[2] / "boom")))),
    "pickle of that size": lambda path: path.write_bytes(
        pickle.dumps(Bomb(str(path.parents[2] / "boom"))).ljust(HEADER_BYTES + 5000)
    ),
    **NO_FILES,
}


def test_the_bomb_goes_off_where_it_is_unpickled(tmp_path):
    pickle.loads(pickle.dumps(Bomb(str(tmp_path / "boom"))))
    assert (tmp_path / "boom").exists()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_a_miss_and_can_be_replaced(files, fault):
    assert put(files, KEY, content(5000))
    (path,) = value_files(files)
    FAULTS[fault](path)
    assert get(files, KEY, 5000) is None
    assert files.stats()["corrupt"] == 1
    assert files.exists([KEY]) == [False]
    assert put(files, KEY, content(5000))
    assert get(files, KEY, 5000) == content(5000)
    assert not Path(files.path, "boom").exists()  # X13


@pytest.mark.timeout(30)  # nothing blocks, also not on a fifo
@pytest.mark.parametrize("fault", NO_FILES)
def test_what_is_no_file_gives_way_to_a_put(files, fault):
    assert put(files, KEY, content(5000))
    (path,) = value_files(files)
    NO_FILES[fault](path)
    elsewhere, nothing = Path(files.path, "elsewhere"), Path(files.path, "nothing")
    before = elsewhere.read_bytes() if elsewhere.exists() else None
    assert files.exists([KEY]) == [False]
    assert put(files, KEY, content(5000))
    assert path.is_file()
    assert not path.is_symlink()
    assert get(files, KEY, 5000) == content(5000)
    assert files.stats()["corrupt"] == 1
    assert FileStorage(files.path).stats()["used_bytes"] == HEADER_BYTES + 5000
    assert not nothing.exists()
    assert before is None or elsewhere.read_bytes() == before  # never written through


@pytest.mark.parametrize("fault", NO_FILES)
def test_what_is_no_file_and_stays_is_a_failed_put(files, fault, monkeypatch):
    assert put(files, KEY, content(5000))
    (path,) = value_files(files)
    NO_FILES[fault](path)

    def refuse(*paths):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), *paths)

    monkeypatch.setattr(os, "rename", refuse)
    assert files.exists([KEY]) == [False]
    assert get(files, KEY, 5000) is None
    assert not put(files, KEY, content(5000))
    assert files.stats()["put_failures"] == 1
    assert os.path.lexists(path)


def test_what_is_no_file_is_not_counted_and_not_evicted(files, caplog):
    """It has no mtime that a hit refreshes, and a folder cannot be unlinked."""
    assert put(files, KEY, content(5000))
    (path,) = value_files(files)
    swap_for_full_folder(path)
    opened = FileStorage(files.path, quota_bytes=HEADER_BYTES + 5000)
    assert opened.stats()["used_bytes"] == 0
    for key in OTHERS:
        assert put(opened, key, content(5000))
    assert opened.stats()["eviction_failures"] == 0
    assert opened.stats()["evicted"] == len(OTHERS) - 1
    opened.clear()
    assert (path / "junk").exists()  # not ours to remove


@pytest.mark.parametrize("other", OTHERS, ids=["page key", "component", "cell"])
def test_a_value_under_the_name_of_another_is_a_miss(files, other):
    assert put(files, KEY, content(5000, seed=1))
    (path,) = value_files(files)
    assert put(files, other, content(5000, seed=2))
    (other_path,) = set(value_files(files)) - {path}
    shutil.copy(other_path, path)
    assert get(files, KEY, 5000) is None
    assert get(files, other, 5000) == content(5000, seed=2)
    assert files.stats()["corrupt"] == 1


def test_x12_no_file_name_tells_a_key(files):
    for key in (KEY, *OTHERS):
        assert put(files, key, content(10))
    assert {path.name for path in value_files(files)} == {files.object_name(key) for key in (KEY, *OTHERS)}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_x13_nothing_is_unpickled(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert not imported & {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
