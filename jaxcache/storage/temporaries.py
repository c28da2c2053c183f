"""The folder `temporary/` of a file storage: files being written, or taken out of the way. Owns who may remove one.

A writer holds a lock (flock) on its file from before the first byte until the file has its final name, and a lock goes
with the process that holds it. So a sweeper asks the lock, never a process number or a host's clock:

    DOMAIN.RANDOM             name of a file; the domain stands for one kernel and one mounted filesystem

                              another holds the lock     the sweeper gets it      the filesystem has no locks
    the sweeper's domain      stays                      removed                  removed once old
    another domain            stays                      removed once old         removed once old

In another domain a lock may be held and not seen (a network filesystem mounted with local locks). Old: last written
STALE_SECONDS before a file that was made beside it just now, so both times are those of the filesystem.
A file that is removed all the same costs its writer a new one: nothing is published but what was written whole.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import final

STALE_SECONDS = 24 * 3600.0
MAX_CREATIONS = 16  # each can fail only where a sweeper has come between two system calls

_NAME = re.compile(r"([0-9a-f]{16})\.[0-9a-f]{16}")
_BOOT_ID = "/proc/sys/kernel/random/boot_id"


class _Lock(enum.Enum):
    TAKEN = enum.auto()
    HELD = enum.auto()  # by another
    UNKNOWN = enum.auto()  # the filesystem does not say


@final
class Temporaries:
    """The files of one opened engine, and what dead engines left. The folder must exist before any call."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._domain: str | None = None

    def new_path(self) -> str:
        """A name that no other file has, in whatever process and on whatever host."""
        return f"{self.path}/{self._own_domain()}.{os.urandom(8).hex()}"

    @contextlib.contextmanager
    def written(self, parts: Sequence[bytes | memoryview], settle: Callable[[int], None]) -> Iterator[str]:
        """A locked file with the parts in it, settled (`flush` or os.fsync); removed at the end. OSError if refused."""
        fd, path = self._create()
        try:
            try:
                transfer_all(os.pwritev, fd, parts)
                settle(fd)
                yield path
            finally:
                os.close(fd)
        finally:
            remove(path)

    def sweep(self) -> None:
        """Removes what dead writers left, as far as it can be known and the system allows it."""
        try:
            with os.scandir(self.path) as entries:
                found = [(match[1], entry) for entry in entries if (match := _NAME.fullmatch(entry.name))]
        except OSError:
            return
        oldest_ns = self._now_ns() - int(STALE_SECONDS * 1e9) if found else 0
        for domain, entry in found:
            with contextlib.suppress(OSError):  # another sweeper was faster, or the disk is read-only
                status = entry.stat(follow_symlinks=False)
                is_old = status.st_mtime_ns < oldest_ns
                if is_old or domain == self._own_domain():
                    _remove_if_dead(entry.path, status, is_old)

    def _create(self) -> tuple[int, str]:
        """A new file, open for writing, and locked where the filesystem has locks."""
        for _ in range(MAX_CREATIONS):
            path = self.new_path()
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                if _try_lock(fd) is not _Lock.HELD and os.fstat(fd).st_nlink:
                    return fd, path
            except OSError:
                os.close(fd)
                remove(path)
                raise
            os.close(fd)  # a sweeper had the lock first, and removes the file
        raise FileNotFoundError(errno.ENOENT, f"others removed {MAX_CREATIONS} new files at once", self.path)

    def _now_ns(self) -> int:
        """The time that the filesystem gives a new file; 0, before which nothing is old, if it takes none."""
        try:
            with self.written((), flush) as path:
                return os.stat(path).st_mtime_ns
        except OSError:
            return 0

    def _own_domain(self) -> str:
        """16 hex digits. Without a kernel that says which boot it is: a domain of our own."""
        if self._domain is None:
            try:
                with open(_BOOT_ID, "rb") as file:
                    boot_id = file.read()
            except OSError:
                boot_id = b""
            domain = (boot_id or os.urandom(16)) + os.stat(self.path).st_dev.to_bytes(8, "little")
            self._domain = hashlib.blake2b(domain, digest_size=8).hexdigest()
        return self._domain


def flush(fd: int) -> None:
    """Gets every error that closing a written file can give, and keeps it open: its lock must outlive the link."""
    os.close(os.dup(fd))


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


def remove(path: str) -> None:
    """Removes a file or an empty folder if it can."""
    with contextlib.suppress(OSError):
        try:
            os.unlink(path)
        except IsADirectoryError:
            os.rmdir(path)


def _remove_if_dead(path: str, status: os.stat_result, is_old: bool) -> None:
    """Removes the file unless another holds its lock; one whose lock tells nothing only if it is old."""
    if not stat.S_ISREG(status.st_mode):
        if is_old:
            remove(path)
        return
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)  # network filesystems lock what is open for writing
    try:
        lock = _try_lock(fd)
        if lock is _Lock.TAKEN or (lock is _Lock.UNKNOWN and is_old):
            remove(path)
    finally:
        os.close(fd)


def _try_lock(fd: int) -> _Lock:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _Lock.HELD
    except OSError:
        return _Lock.UNKNOWN
    return _Lock.TAKEN
