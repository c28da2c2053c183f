"""The file engine's folder: whose it is, who may use it, its secret, and what is left behind in it."""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxcache.storage import folder
from jaxcache.storage.base import StorageError
from jaxcache.storage.file import FileStorage
from tests.storage.values import get_numbered as get
from tests.storage.values import path_of, run_python
from tests.storage.values import put_numbered as put


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else b"" for p in path.rglob("*")}


@pytest.fixture
def storage(tmp_path) -> FileStorage:
    return FileStorage(tmp_path / "storage")


# Whose folder


@pytest.mark.parametrize("is_nested", [False, True])
def test_a_missing_folder_is_made(tmp_path, is_nested):
    path = tmp_path / "a" / "b" if is_nested else tmp_path / "a"
    assert put(FileStorage(path), 1)
    assert path.stat().st_mode & 0o777 == 0o700
    assert get(FileStorage(str(path)), 1)  # opened again


def test_an_empty_volume_is_taken(tmp_path):
    (tmp_path / "lost+found").mkdir()
    FileStorage(tmp_path)
    assert (tmp_path / folder.MARKER).read_bytes() == b""


def test_a_foreign_folder_is_refused_untouched(tmp_path):
    (tmp_path / "values").mkdir()
    (tmp_path / "values" / "thesis.tex").write_text("years of work")
    before = tree(tmp_path)
    with pytest.raises(StorageError, match=f"{tmp_path} .*belongs to something else"):
        FileStorage(tmp_path)
    assert tree(tmp_path) == before


def test_clear_removes_only_ours(storage):
    strangers = [
        Path(storage.path, "note"),
        Path(storage.path, "values", "00", "note"),
        Path(storage.path, "values", "n"),
    ]
    for stranger in strangers:
        stranger.write_text("mine")
    assert put(storage, 1)
    storage.clear()
    assert not get(storage, 1)
    assert [stranger.read_text() for stranger in strangers] == ["mine"] * 3


def broken_paths(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    yield "a file", tmp_path / "file"
    yield "below a file", tmp_path / "file" / "storage"
    yield "a loop", tmp_path / "loop"
    yield "nowhere", Path("/proc/no/such/folder")
    yield "a device", Path("/dev/full")
    yield "too long", tmp_path / ("x" * 300)


def test_a_path_that_cannot_be_a_folder_is_named(tmp_path):
    for what, path in broken_paths(tmp_path):
        with pytest.raises(StorageError, match=str(path)) as raised:
            FileStorage(path)
        assert raised.value.__cause__ is not None, what


@pytest.mark.skipif(os.getuid() != 0, reason="drops root's rights")
@pytest.mark.parametrize("mode", [0o000, 0o300, 0o500], ids=["closed", "unreadable", "read-only"])
@pytest.mark.parametrize("is_opened_before", [False, True], ids=["new", "opened before"])
def test_rights(mode, is_opened_before):
    """In another process that is nobody, outside tmp_path, which is root's alone."""
    code = """if True:
        import os, sys
        from jaxcache.storage.base import StorageError
        from jaxcache.storage.file import FileStorage
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        try:
            FileStorage(sys.argv[1])
        except StorageError as error:
            print(error)
    """
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o755)
        inner = os.path.join(path, "storage")
        os.mkdir(inner)
        if is_opened_before:
            FileStorage(inner)
        for root, folders, names in os.walk(path):
            for name in (*folders, *names):
                os.chown(os.path.join(root, name), 65534, 65534)
        for root, _, _ in list(os.walk(inner)):
            os.chmod(root, mode)
        said = run_python(code, inner).stdout
    assert inner in said
    assert "Permission denied" in said


def test_a_filesystem_without_hard_links_is_named(tmp_path, monkeypatch):
    def refuse(source, path):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), source)

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match=str(tmp_path)):
        FileStorage(tmp_path / "storage")


# Who may write there

INSIDE = ["", "temporary", "values", "values/a7", "secret"]


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("mode", [0o020, 0o002, 0o022], ids=["group", "all", "both"])
def test_what_other_users_may_write_is_refused(storage, inside, mode):
    assert put(storage, 1)
    path = Path(storage.path, inside)
    path.chmod(path.stat().st_mode | mode)
    said = (
        rf"^{storage.path} cannot be used .*{path} may be written by other users \(mode 0\d\d\d\).*chmod.*trust_folder"
    )
    with pytest.raises(StorageError, match=said):
        FileStorage(storage.path)
    assert get(FileStorage(storage.path, trust_folder=True), 1)
    path.chmod(path.stat().st_mode & ~mode)
    assert get(FileStorage(storage.path), 1)


def test_what_other_users_may_only_read_is_taken(storage):
    for inside in INSIDE:
        path = Path(storage.path, inside)
        path.chmod(path.stat().st_mode | 0o055)
    FileStorage(storage.path)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770])
def test_an_empty_folder_that_others_may_write_is_refused_untouched(tmp_path, mode):
    tmp_path.chmod(mode)
    with pytest.raises(StorageError, match="may be written by other users"):
        FileStorage(tmp_path)
    assert not list(tmp_path.iterdir())
    assert put(FileStorage(tmp_path / "inside"), 1)  # only the folder itself counts
    tmp_path.chmod(0o700)


def test_the_folder_of_another_user_is_refused_untouched(tmp_path, storage, monkeypatch):
    uid = os.geteuid()
    (tmp_path / "empty").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: uid + 1)
        for path in (storage.path, str(tmp_path / "empty")):
            said = f"{path} belongs to user {uid}, .* runs as user {uid + 1}: .*trust_folder=True"
            with pytest.raises(StorageError, match=said):
                FileStorage(path)
            assert (path == storage.path) == bool(os.listdir(path))
        FileStorage(storage.path, trust_folder=True)
    FileStorage(storage.path)


@pytest.mark.skipif(os.getuid() != 0, reason="gives files away")
@pytest.mark.parametrize("inside", INSIDE)
def test_root_refuses_what_belongs_to_another_user(storage, inside):
    path = Path(storage.path, inside)
    os.chown(path, 65534, -1)
    with pytest.raises(StorageError, match=f"{path} belongs to user 65534, .* runs as user 0"):
        FileStorage(storage.path)
    assert put(FileStorage(storage.path, trust_folder=True), 1)


@pytest.mark.timeout(30)
def test_a_secret_that_is_no_file_is_told(storage):
    path = Path(storage.path, "secret")
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(StorageError, match="secret"):
        FileStorage(storage.path)


# The secret


def test_the_secret_is_private_and_stays(storage):
    path = Path(storage.path, "secret")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_bytes() == storage.secret == FileStorage(storage.path).secret


@pytest.mark.parametrize("damage", [b"", b"x" * 31, b"x" * 33])
def test_a_damaged_secret_is_told(storage, damage):
    Path(storage.path, "secret").write_bytes(damage)
    with pytest.raises(StorageError, match="secret is damaged"):
        FileStorage(storage.path)


def test_processes_that_start_at_once_agree_on_the_secret(tmp_path):
    code = """if True:
        import sys, time
        from jaxcache.storage.file import FileStorage
        time.sleep(max(0.0, float(sys.argv[1]) - time.time()))
        for path in sys.argv[2:]:
            print(FileStorage(path).secret.hex())
    """
    paths = [str(tmp_path / str(i)) for i in range(20)]
    start = str(time.time() + 0.5)
    with ThreadPoolExecutor(3) as pool:
        said = list(pool.map(lambda _: run_python(code, start, *paths).stdout, range(3)))
    assert said[0] == said[1] == said[2]
    assert len(set(said[0].split())) == len(paths)


# What is left behind


def test_nothing_is_left_in_peace(storage):
    assert put(storage, 1)
    assert put(storage, 1)
    flipped = bytearray(Path(path_of(storage, 1)).read_bytes())
    flipped[-1] ^= 1
    Path(path_of(storage, 1)).write_bytes(flipped)
    assert not get(storage, 1)
    assert os.listdir(f"{storage.path}/temporary") == []


def test_a_good_value_that_replaced_a_bad_one_survives(storage):
    """Two readers meet a bad file; one removes it, a writer publishes, and only then the other gets to remove it."""
    assert put(storage, 1)
    path = path_of(storage, 1)
    fd = os.open(path, os.O_RDONLY)
    try:
        os.unlink(path)
        assert put(storage, 1)
        assert not storage._folder.discard(path, os.fstat(fd))
    finally:
        os.close(fd)
    assert get(storage, 1)
    assert os.listdir(f"{storage.path}/temporary") == []
