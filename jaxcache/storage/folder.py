"""The folder of a file storage. Owns what lies where and how a file appears and goes; knows no keys and no headers.

    path/
      jaxcache-storage-1      empty; its name says whose folder this is, and in which format. Always the first to appear
      secret                  32 random bytes, mode 0600, never replaced
      temporary/              files being written, or taken out of the way; see temporaries.py
      values/00 ... ff/       one file per value, under its 64 hex digits; appears complete, by link(2), or not at all

Any number of processes may share it, also across hosts; the filesystem must have hard links. Nothing but the secret is
fsynced: a file torn by a power loss fails its check and is a miss.

The check of a value finds accidents, not forgeries: a user who may write here can make a value say anything. So the
folders above and the secret must belong to this user and be writable by no other, unless the caller trusts them all.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import final

from jaxcache.storage.base import StorageError
from jaxcache.storage.temporaries import Temporaries, flush, remove

MARKER = "jaxcache-storage-1"
SECRET_BYTES = 32
PROBE_PREFIX = ".doctor-"  # of a folder in which `doctor` tries out the disk; left behind if it is killed
FULL = (errno.ENOSPC, errno.EDQUOT)
MAX_WRITES = 3  # of one value whose file others remove before it is linked
VANISHED = (errno.ENOENT, errno.ESTALE)  # what calls on such a file give
STILL_READABLE = (*FULL, errno.EROFS, *VANISHED)  # errors of a write after which what is there can be read

_log = logging.getLogger(__name__)
_VALUE_NAME = re.compile(r"[0-9a-f]{64}")


@final
class Folder:
    """An opened folder, made if missing. StorageError names the path if it is foreign or cannot be read and written, or
    if another user owns or may write to it, its folders or the secret; `trust_folder` lets that pass. One that was
    opened before may be on a disk that is full or read-only: it is opened, and writing gives the error."""

    def __init__(self, path: str | os.PathLike[str], trust_folder: bool) -> None:
        self.path = os.path.abspath(path)
        self._temporaries = Temporaries(os.path.join(self.path, "temporary"))
        self._values = os.path.join(self.path, "values")
        self._check = _trust if trust_folder else check_owner
        try:
            os.makedirs(self.path, 0o700, exist_ok=True)
            self._check(self.path, os.stat(self.path))
            is_claimed(self.path)
            self._check_folders()
            self._furnish()
            self.secret = self._read_secret()
        except OSError as error:
            raise StorageError(f"{self.path} cannot be used as storage: {error}") from error

    def value_path(self, name: str) -> str:
        """Where the value called `name` (64 hex digits) is or would be."""
        return f"{self._values}/{name[:2]}/{name}"

    def values(self) -> Iterator[tuple[int, int, str]]:
        """(mtime in ns, bytes, path) of every value, in no order. About 6 us a file; skips what is no regular file."""
        for shard in _shards():
            with contextlib.suppress(OSError), os.scandir(f"{self._values}/{shard}") as entries:
                for entry in entries:
                    if _VALUE_NAME.fullmatch(entry.name) and entry.name.startswith(shard):
                        with contextlib.suppress(OSError):
                            status = entry.stat(follow_symlinks=False)
                            if stat.S_ISREG(status.st_mode):
                                yield status.st_mtime_ns, status.st_size, entry.path

    def publish(self, parts: Sequence[bytes | memoryview], path: str) -> bool:
        """Makes a file of the parts appear at `path`, whole. False if there is one already. OSError if it cannot be."""
        return self._publish(parts, path, flush)

    def discard(self, path: str, bad: os.stat_result) -> bool:
        """Removes what is at `path` if `bad` describes it; False if another process did, or the system refuses. A good
        value that has replaced it meanwhile is put back: a reader in between misses, and none reads anything wrong."""
        try:
            aside = self._temporaries.new_path()
            os.rename(path, aside)
        except OSError:
            return False
        try:
            found = os.lstat(aside)
            is_bad = os.path.samestat(found, bad) or not stat.S_ISREG(found.st_mode)
            return is_bad or not _link(aside, path)
        except OSError:
            return False
        finally:
            remove(aside)

    def _furnish(self) -> None:
        """Makes what is missing, the secret last: where there is one, all is there, and can at least be read.

        The marker comes first: where anything of ours is, it is too. Always offering a secret proves that writing and
        linking work; the first one stays.
        """
        secret = os.path.join(self.path, "secret")
        try:
            os.close(os.open(os.path.join(self.path, MARKER), os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600))
            for folder in self._folders():
                os.makedirs(folder, 0o700, exist_ok=True)
            self._temporaries.sweep()  # may free the room that the rest needs
            self._publish((os.urandom(SECRET_BYTES),), secret, os.fsync)
        except OSError as error:
            if error.errno not in STILL_READABLE or not os.path.lexists(secret):
                raise
            _log.warning("%s: opened, but nothing could be written: %s", self.path, error)

    def _folders(self) -> Iterator[str]:
        return iter((self._temporaries.path, self._values, *(f"{self._values}/{shard}" for shard in _shards())))

    def _check_folders(self) -> None:
        """Those that are there; what is missing is made by this user."""
        for folder in self._folders():
            with contextlib.suppress(FileNotFoundError):
                self._check(folder, os.stat(folder))

    def _read_secret(self) -> bytes:
        path = os.path.join(self.path, "secret")
        with _opened(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) as fd:
            self._check(path, os.fstat(fd))
            secret = os.read(fd, SECRET_BYTES + 1)
        if len(secret) != SECRET_BYTES:
            raise OSError(f"{path} is damaged, and without it no value can be found: remove the folder")
        return secret

    def _publish(self, parts: Sequence[bytes | memoryview], path: str, settle: Callable[[int], None]) -> bool:
        for _ in range(MAX_WRITES):
            with self._temporaries.written(parts, settle) as temporary:
                try:
                    return _link(temporary, path)
                except OSError as error:
                    if error.errno not in VANISHED or os.path.lexists(temporary):
                        raise
        raise FileNotFoundError(errno.ENOENT, f"others removed the file {MAX_WRITES} times before it was linked", path)


def is_claimed(path: str) -> bool:
    """Whether the folder is a storage already; False if it may become one. FileExistsError if it is something else."""
    names = os.listdir(path)
    if os.path.isfile(os.path.join(path, MARKER)):
        return True
    if any(name != "lost+found" and not name.startswith(PROBE_PREFIX) for name in names):
        raise FileExistsError(f"the folder is not empty and has no file {MARKER}: it belongs to something else")
    return False


def check_owner(path: str, status: os.stat_result) -> None:
    """StorageError unless `status`, of a file or folder, says that this user owns it and no other may write to it."""
    if status.st_uid != os.geteuid():
        raise StorageError(
            f"{path} belongs to user {status.st_uid}, who could forge values, and this process runs as user "
            f"{os.geteuid()}: use a folder of your own, or pass trust_folder=True if you trust that user"
        )
    mode = stat.S_IMODE(status.st_mode)
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise StorageError(
            f"{path} may be written by other users (mode {mode:04o}), who could forge values: use a new folder, "
            f"or chmod -R go-w this one if nothing in it is theirs, or pass trust_folder=True if you trust them all"
        )


def _trust(path: str, status: os.stat_result) -> None:
    """Takes any owner and any mode."""


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
