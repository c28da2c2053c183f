"""Who may remove a file in `temporary/`: the lock of its writer decides, whatever hosts, processes and clocks say."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from jaxcache.storage import temporaries
from jaxcache.storage.base import StorageError
from jaxcache.storage.file import FileStorage
from jaxcache.storage.temporaries import STALE_SECONDS, Temporaries, flush
from tests.storage.values import ROOT, path_of, run_python
from tests.storage.values import get_numbered as get
from tests.storage.values import put_numbered as put

OTHER_DOMAIN = "f" * 16
HOURS = 3600.0


@pytest.fixture
def storage(tmp_path) -> FileStorage:
    return FileStorage(tmp_path / "storage")


def folder_of(storage: FileStorage) -> Path:
    return Path(storage.path, "temporary")


def own_domain(storage: FileStorage) -> str:
    return Path(Temporaries(str(folder_of(storage))).new_path()).name.partition(".")[0]


def set_age(path: Path | str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


@contextmanager
def before_each_link(monkeypatch, action: Callable[[str], object]) -> Iterator[None]:
    """Calls `action` with the path of the temporary, complete and about to be linked."""
    link = os.link

    def act_and_link(source, path):
        with monkeypatch.context() as patch:
            patch.setattr(os, "link", link)
            action(source)
        link(source, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", act_and_link)
        yield


# Live writers

WRITER = """if True:
    import os, sys, time
    from jaxcache.storage.base import ObjectKey
    from jaxcache.storage.file import FileStorage
    name, path, start, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
    num_opened = num_put = num_failed = 0
    time.sleep(max(0.0, start - time.time()))
    while time.time() < start + seconds:
        storage = FileStorage(path)
        num_opened += 1
        for _ in range(20):
            num_put += 1
            key = ObjectKey(f"{name}{num_put}".encode().ljust(32), "full", "cell")
            num_failed += not storage.put(key, memoryview(bytes(20_000)))
    print(os.getpid(), os.uname().nodename, num_opened, num_put, num_failed)
"""


def in_own_pid_namespace(num_processes_before: int, *command: str) -> list[str]:
    """Runs the command as process `num_processes_before + 2` of a new PID namespace."""
    script = "/bin/true;" * num_processes_before + ' "$@"; exit $?'
    unshare = ["unshare", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return [*unshare, "sh", "-c", script, "sh", *command]


def has_pid_namespaces() -> bool:
    try:
        return subprocess.run(in_own_pid_namespace(0, sys.executable, "-c", ""), capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def test_two_containers_with_one_host_name_leave_each_other_alone(storage):
    """Two PID namespaces, in each of which the process number of the other writer is free."""
    if not has_pid_namespaces():
        pytest.skip("this process may not make PID namespaces")
    start = str(time.time() + 1.0)
    python = (sys.executable, "-c", WRITER)
    commands = [in_own_pid_namespace(3 * i, *python, f"writer{i}", storage.path, start, "2.5") for i in range(2)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with ExitStack() as stack:
        writers = []
        for command in commands:
            writer = subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True)
            stack.callback(writer.wait)
            stack.callback(writer.kill)
            writers.append(writer)
        said = [writer.communicate(timeout=60) for writer in writers]
    assert [errors for _, errors in said] == ["", ""]  # no refused start, and no failed put in a log
    (first_pid, first_host, *first), (second_pid, second_host, *second) = (out.split() for out, _ in said)
    assert first_pid != second_pid
    assert first_host == second_host
    for num_opened, num_put, num_failed in (map(int, first), map(int, second)):
        assert num_opened >= 5
        assert num_put == 20 * num_opened
        assert num_failed == 0
    assert not list(folder_of(storage).iterdir())


@pytest.mark.parametrize("hours", [-2, -1, 1, 2])
def test_a_start_on_a_host_whose_clock_is_off_leaves_a_live_writer_alone(storage, monkeypatch, hours):
    def start(temporary):
        set_age(temporary, hours * HOURS)
        with monkeypatch.context() as patch:
            now = time.time()
            patch.setattr(time, "time", lambda: now + hours * HOURS)
            FileStorage(storage.path)
        assert os.path.exists(temporary)

    with before_each_link(monkeypatch, start):
        assert put(storage, 1)
    assert get(storage, 1)
    assert storage.stats()["put_failures"] == 0


@pytest.mark.parametrize("domain", ["own", "other"])
def test_a_live_writer_is_left_alone_however_long_it_takes(storage, monkeypatch, domain):
    if domain == "other":
        monkeypatch.setattr(Temporaries, "_own_domain", lambda self: OTHER_DOMAIN)

    def start(temporary):
        set_age(temporary, 10 * STALE_SECONDS)
        with monkeypatch.context() as patch:
            patch.setattr(Temporaries, "_own_domain", lambda self: "0" * 16)
            FileStorage(storage.path)
        FileStorage(storage.path)
        assert os.path.exists(temporary)

    with before_each_link(monkeypatch, start):
        assert put(storage, 1)
    assert get(storage, 1)


def test_a_writer_whose_lock_is_not_seen_has_a_day(storage, monkeypatch):
    """A filesystem without locks, and one that keeps them to each host: only the age is left to tell."""
    live = folder_of(storage) / f"{OTHER_DOMAIN}.{'0' * 16}"
    for refuse in (None, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
        with monkeypatch.context() as patch:
            if refuse is not None:
                live = folder_of(storage) / f"{own_domain(storage)}.{'0' * 16}"
                patch.setattr(fcntl, "flock", lambda fd, operation, code=refuse: _raise(code))
            for seconds, stays in ((2 * HOURS, True), (STALE_SECONDS - 60, True), (STALE_SECONDS + 60, False)):
                live.write_bytes(b"half a value")
                set_age(live, seconds)
                assert put(FileStorage(storage.path), int(seconds) + (refuse or 0))
                assert live.exists() == stays
            live.unlink(missing_ok=True)


def _raise(code: int) -> None:
    raise OSError(code, os.strerror(code))


def test_old_is_what_the_filesystem_calls_old(storage, monkeypatch):
    """The clock of the host may be days off: it is not asked."""
    other = folder_of(storage) / f"{OTHER_DOMAIN}.{'0' * 16}"
    other.write_bytes(b"half a value")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 10 * STALE_SECONDS)
    monkeypatch.setattr(time, "time_ns", lambda: int((now + 10 * STALE_SECONDS) * 1e9))
    FileStorage(storage.path)
    assert other.exists()


def test_without_a_time_of_the_filesystem_nothing_is_old(storage, monkeypatch):
    other = folder_of(storage) / f"{OTHER_DOMAIN}.{'0' * 16}"
    other.write_bytes(b"half a value")
    set_age(other, 10 * STALE_SECONDS)
    swept = Temporaries(str(folder_of(storage)))
    with monkeypatch.context() as patch:
        patch.setattr(Temporaries, "_create", lambda self: _raise(errno.ENOSPC))
        swept.sweep()
        assert other.exists()
    swept.sweep()
    assert not other.exists()


# Dead writers


def test_a_start_sweeps_what_dead_writers_left(storage):
    code = """if True:
        import os, sys
        from jaxcache.storage.temporaries import Temporaries, flush
        with Temporaries(sys.argv[1]).written((b"half a value",), flush) as path:
            os._exit(0)
    """
    (folder_of(storage) / "note").write_text("not ours")
    run_python(code, str(folder_of(storage)))
    assert len(list(folder_of(storage).iterdir())) == 2
    FileStorage(storage.path)
    assert [path.name for path in folder_of(storage).iterdir()] == ["note"]


def test_what_is_no_file_goes_once_it_is_old(storage):
    made = folder_of(storage) / f"{own_domain(storage)}.{'0' * 16}"
    os.mkfifo(made)
    FileStorage(storage.path)
    assert made.exists()
    set_age(made, STALE_SECONDS + 60)
    FileStorage(storage.path)
    assert not made.exists()


# Sweepers that ask no lock


def test_a_file_that_others_removed_is_written_again(storage, monkeypatch):
    removed = []

    def remove_first(temporary):
        if len(removed) < 2:
            os.unlink(temporary)
            removed.append(temporary)

    with before_each_link(monkeypatch, remove_first):
        assert put(storage, 1)
    assert len(removed) == 2
    assert get(storage, 1)
    assert storage.stats()["put_failures"] == 0


def test_files_that_others_always_remove_are_failed_puts_and_refuse_no_start(storage, tmp_path, monkeypatch):
    assert put(storage, 1)
    with before_each_link(monkeypatch, os.unlink):
        assert not put(storage, 2)
        opened = FileStorage(storage.path)
        assert get(opened, 1)
        assert not put(opened, 2)
        assert put(opened, 1)  # it is there
        with pytest.raises(StorageError, match="others removed the file 3 times"):
            FileStorage(tmp_path / "new")  # there is no secret to go on with
    assert storage.stats()["put_failures"] == opened.stats()["put_failures"] == 1
    assert put(opened, 2)


def test_a_sweep_between_making_and_locking_costs_a_new_file(storage, monkeypatch):
    """The two moments in which a sweeper can get the lock of a live writer first: it holds it, or has removed."""
    flock, others = fcntl.flock, []

    def flock_second(fd, operation):
        (path,) = (path for path in folder_of(storage).iterdir() if path.stat().st_ino == os.fstat(fd).st_ino)
        if len(others) < 10:
            other = os.open(path, os.O_RDWR)
            others.append(other)
            flock(other, operation)
            if len(others) % 2:
                path.unlink()
                os.close(other)
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock_second)
    assert put(storage, 1)
    for fd in others[1::2]:
        os.close(fd)
    monkeypatch.undo()
    assert len(others) == 10
    assert get(storage, 1)
    FileStorage(storage.path)
    assert not list(folder_of(storage).iterdir())


def test_sweepers_that_always_win_are_failed_puts(storage, monkeypatch):
    def refuse(fd, operation):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert not put(storage, 1)
    assert get(storage, 1) is False
    FileStorage(storage.path)


def test_a_value_is_locked_until_it_has_its_name(storage, monkeypatch):
    held = []

    def look(temporary):
        fd = os.open(temporary, os.O_RDWR)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.append(temporary)
        finally:
            os.close(fd)

    with before_each_link(monkeypatch, look):
        assert put(storage, 1)
    assert len(held) == 1
    with open(path_of(storage, 1), "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # and no longer


def test_names_differ_after_a_fork(storage):
    code = """if True:
        import os, sys
        from jaxcache.storage.temporaries import Temporaries
        own = Temporaries(sys.argv[1])
        own.new_path()
        if child := os.fork():
            os.waitpid(child, 0)
        print(own.new_path(), flush=True)
    """
    names = run_python(code, str(folder_of(storage))).stdout.split()
    assert len(names) == len(set(names)) == 2


def test_a_kernel_that_names_no_boot_makes_a_domain_of_its_own(storage, monkeypatch):
    path = str(folder_of(storage))
    assert Temporaries(path)._own_domain() == Temporaries(path)._own_domain()
    monkeypatch.setattr(temporaries, "_BOOT_ID", "/no/such/file")
    assert Temporaries(path)._own_domain() != Temporaries(path)._own_domain()
    with Temporaries(path).written((b"ab", b"c"), flush) as written:
        assert Path(written).read_bytes() == b"abc"
