"""The folder of a file storage. Owns what lies where and how a file appears and goes; knows no keys and no headers.

    path/
      jaxcache-storage-1      empty; its name says whose folder this is, and in which format. Always the first to appear
      secret                  32 random bytes, mode 0600, never replaced
      temporary/              HOST.PID.ENGINE.COUNT: files being written, or taken out of the way
      values/00 ... ff/       one file per value, under its 64 hex digits; appears complete, by link(2), or not at all

Any number of processes may share it, also across hosts; the filesystem must have hard links. Nothing but the secret is
fsynced: a file torn by a power loss fails its check and is a miss.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import final

from jaxcache.storage.base import StorageError

MARKER = "jaxcache-storage-1"
SECRET_BYTES = 32
STALE_SECONDS = 3600.0  # a temporary of another host, or of a process number in use again, is nobody's by then

_TEMPORARY_NAME = re.compile(r"([0-9a-f]{16})\.([0-9]{1,9})\.[0-9a-f]{16}\.[0-9]+")
_VALUE_NAME = re.compile(r"[0-9a-f]{64}")


@final
class Folder:
    """An opened folder, made if missing. StorageError names the path if it is foreign or cannot be read and written."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(path)
        self._temporary = os.path.join(self.path, "temporary")
        self._values = os.path.join(self.path, "values")
        self._host = hashlib.blake2b(os.uname().nodename.encode(), digest_size=8).hexdigest()
        self._engine = os.urandom(8).hex()
        self._count = itertools.count()
        try:
            self._claim()
            self.secret = self._agree_on_secret()
            self._sweep()
        except OSError as error:
            raise StorageError(f"{self.path} cannot be used as storage: {error}") from error

    def value_path(self, name: str) -> str:
        """Where the value called `name` (64 hex digits) is or would be."""
        return f"{self._values}/{name[:2]}/{name}"

    def values(self) -> Iterator[tuple[int, int, str]]:
        """(mtime in ns, bytes, path) of every value, in no order. About 6 us a file; skips what it cannot look at."""
        for shard in _shards():
            with contextlib.suppress(OSError), os.scandir(f"{self._values}/{shard}") as entries:
                for entry in entries:
                    if _VALUE_NAME.fullmatch(entry.name) and entry.name.startswith(shard):
                        with contextlib.suppress(OSError):
                            status = entry.stat(follow_symlinks=False)
                            yield status.st_mtime_ns, status.st_size, entry.path

    def publish(self, parts: Sequence[bytes | memoryview], path: str) -> bool:
        """Makes a file of the parts appear at `path`, whole. False if there is one already. OSError if it cannot be."""
        with self._written(parts) as temporary:
            return _link(temporary, path)

    def discard(self, path: str, fd: int) -> bool:
        """Removes the bad file at `path`, open as `fd`; False if somebody else did. A good one that has replaced it
        meanwhile is put back: whoever asks in between misses, and nobody reads anything wrong."""
        aside = self._temporary_path()
        try:
            os.rename(path, aside)
            is_same = os.path.samestat(os.lstat(aside), os.fstat(fd))
            return is_same or not _link(aside, path)
        except OSError:
            return False
        finally:
            remove(aside)

    def _claim(self) -> None:
        """Takes an empty or marked folder. The marker comes first: whoever sees anything of ours also sees it."""
        os.makedirs(self.path, 0o700, exist_ok=True)
        marker = os.path.join(self.path, MARKER)
        if set(os.listdir(self.path)) - {"lost+found"} and not os.path.isfile(marker):
            raise FileExistsError(f"the folder is not empty and has no file {MARKER}: it belongs to something else")
        os.close(os.open(marker, os.O_WRONLY | os.O_CREAT, 0o600))
        for folder in (self._temporary, self._values, *(f"{self._values}/{shard}" for shard in _shards())):
            os.makedirs(folder, 0o700, exist_ok=True)

    def _agree_on_secret(self) -> bytes:
        """The secret that whoever came first has linked. Always offering one proves that writing and linking work."""
        path = os.path.join(self.path, "secret")
        with self._written((os.urandom(SECRET_BYTES),)) as temporary:
            with _opened(temporary, os.O_RDONLY) as fd:
                os.fsync(fd)
            _link(temporary, path)
        with _opened(path, os.O_RDONLY | os.O_NOFOLLOW) as fd:
            secret = os.read(fd, SECRET_BYTES + 1)
        if len(secret) != SECRET_BYTES:
            raise OSError(f"{path} is damaged, and without it no value can be found: remove the folder")
        return secret

    def _sweep(self) -> None:
        """Removes temporaries whose writer is gone: a dead process of this host, or anything old."""
        with os.scandir(self._temporary) as entries:
            for entry in entries:
                if name := _TEMPORARY_NAME.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        age_seconds = time.time() - entry.stat(follow_symlinks=False).st_mtime
                        gone = name[1] == self._host and not _is_alive(int(name[2]))
                        if gone or age_seconds > STALE_SECONDS:
                            remove(entry.path)

    def _temporary_path(self) -> str:
        return f"{self._temporary}/{self._host}.{os.getpid()}.{self._engine}.{next(self._count)}"

    @contextlib.contextmanager
    def _written(self, parts: Sequence[bytes | memoryview]) -> Iterator[str]:
        """A temporary with the parts in it, closed, so that every error that writing can give has been given."""
        path = self._temporary_path()
        try:
            with _opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as fd:
                transfer_all(os.pwritev, fd, parts)
            yield path
        finally:
            remove(path)


def transfer_all(
    call: Callable[[int, list[memoryview], int], int], fd: int, parts: Sequence[bytes | bytearray | memoryview]
) -> None:
    """Repeats `call` (os.preadv or os.pwritev) from offset 0 until all parts are through. OSError at an early end."""
    rest = [memoryview(part) for part in parts]
    offset = 0
    while rest:
        num_bytes = call(fd, rest, offset)
        if not num_bytes:
            raise OSError(f"the file ends at byte {offset}")
        offset += num_bytes
        while rest and num_bytes >= len(rest[0]):
            num_bytes -= len(rest.pop(0))
        if num_bytes:
            rest[0] = rest[0][num_bytes:]


@contextlib.contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    fd = os.open(path, flags, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def _shards() -> Iterator[str]:
    return (f"{shard:02x}" for shard in range(256))


def _link(source: str, path: str) -> bool:
    """False if `path` is taken. OSError otherwise."""
    try:
        os.link(source, path)
    except FileExistsError:
        return False
    return True


def remove(path: str) -> None:
    """Removes a file or an empty folder if it can."""
    with contextlib.suppress(OSError):
        try:
            os.unlink(path)
        except IsADirectoryError:
            os.rmdir(path)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True
