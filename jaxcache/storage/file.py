"""Storage in a folder of a local or shared disk: the default engine. Owns what is a hit, the counters and the quota.

    put    have it? -> room? -> header + payload -> temporary -> link: the first writer wins
    get    open -> header + payload straight into the caller's buffer -> every bit checked -> True
                                                                  `-> bad: moved away, so that it can be replaced

What has the name of a value and is no regular file (a link, a folder, a fifo, a socket) is bad too, and never followed.

A process killed anywhere leaves at most a temporary, which the next start sweeps; never a wrong value.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import heapq
import logging
import os
import stat
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import final

from jaxcache.storage.base import ObjectKey, Storage, flat_bytes
from jaxcache.storage.folder import FULL, Folder
from jaxcache.storage.record import HEADER_BYTES, check, claimed_bytes, pack_header
from jaxcache.storage.temporaries import remove, transfer_all

EVICTIONS_PER_PUT = 16
SCANS_PER_QUOTA = 16  # the folder is counted anew after writing this part of the quota, as others write too,
MIN_SCAN_BYTES = 64 << 20  # but not more often than this
VICTIMS_PER_SCAN = 16384
REFRESH_NS = 60 * 10**9

_COUNTERS = (
    *("puts", "put_failures", "duplicates", "gets", "get_failures", "hits", "corrupt"),
    *("evicted", "eviction_failures", "used_bytes", "writing_bytes", "unscanned_bytes"),
)

_log = logging.getLogger(__name__)


class _Verdict(enum.Enum):
    GOOD = enum.auto()
    OTHER_SIZE = enum.auto()  # intact, but not what the caller asked for
    BAD = enum.auto()


@final
class FileStorage(Storage):
    """A file per value. StorageError, naming `path`, if the folder is foreign or cannot be read and written.

    What was stored on a disk that is now full or read-only is still read: `put` says False where it cannot write.

    path:        a folder that is missing, empty, or was made by this class; made with mode 0700, files with 0600
    quota_bytes: the sum of file sizes that `put` keeps to by removing the values used longest ago (by mtime, which a
                 hit refreshes once a minute), 16 at most each time; None: no limit. A value above it is refused.
                 A disk that is full before the quota is reached is treated like the quota.
                 Several processes may exceed it by 64 MiB or quota / 16 each, whichever is more: after writing so
                 much, one `put` counts the folder anew, at about 6 us a file.
    trust_folder: True also takes a folder that belongs to another user or that others may write to, who can then forge
                 values; otherwise it is a StorageError.
    """

    def __init__(
        self, path: str | os.PathLike[str], quota_bytes: int | None = None, *, trust_folder: bool = False
    ) -> None:
        if quota_bytes is not None and quota_bytes <= 0:
            raise ValueError(f"{quota_bytes=} must be positive")
        self._folder = Folder(path, trust_folder)
        self.secret = self._folder.secret
        self._quota_bytes = quota_bytes
        self._evicting = threading.Lock()  # guards the victims
        self._lock = threading.Lock()  # guards the counters
        self._counters = Counter(dict.fromkeys(_COUNTERS, 0))
        self._victims: deque[tuple[int, int, str]] = deque()  # (mtime in ns, bytes, path), oldest first
        self._scan()

    @property
    def path(self) -> str:
        """The folder."""
        return self._folder.path

    def exists(self, keys: Sequence[ObjectKey]) -> list[bool]:
        return [_is_file(self._path_of(key)) for key in keys]

    def get(self, key: ObjectKey, buffer: memoryview) -> bool:
        payload = flat_bytes(buffer)
        path = self._path_of(key)
        self._count(gets=1)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return False
        except OSError as error:  # a link or a socket, or the system refuses
            return False if self._clear_way(path) else self._fail("get_failures", error)
        try:
            return self._judge(path, fd, key, payload)
        except OSError as error:
            return self._fail("get_failures", error)
        finally:
            os.close(fd)

    def put(self, key: ObjectKey, buffer: memoryview) -> bool:
        payload = flat_bytes(buffer)
        path = self._path_of(key)
        num_bytes = HEADER_BYTES + len(payload)
        self._count(puts=1)
        if self._quota_bytes is not None and num_bytes > self._quota_bytes:
            return self._fail("put_failures", OSError(f"{num_bytes=} exceeds {self._quota_bytes=}"))
        if _is_file(path):
            self._count(duplicates=1)
            return True
        self._count(used_bytes=num_bytes, writing_bytes=num_bytes, unscanned_bytes=num_bytes)
        is_new = False
        try:
            is_new = self._store((pack_header(key, payload), payload), path, num_bytes)
        except OSError as error:
            return self._fail("put_failures", error)
        finally:
            self._count(used_bytes=0 if is_new else -num_bytes, writing_bytes=-num_bytes)
        self._count(duplicates=int(not is_new))
        return True

    def clear(self) -> None:
        """Removes every value, of every process that shares the folder. What writers publish meanwhile may stay."""
        with self._evicting:
            for _, _, path in self._folder.values():
                remove(path)
            self._scan()

    def stats(self) -> dict[str, int]:
        """corrupt: bad files met; *_failures: the system refused; used_bytes: file sizes, approximate if shared;
        writing_bytes: the part of them not published yet; unscanned_bytes: written since the folder was counted."""
        with self._lock:
            return dict(self._counters)

    def _path_of(self, key: ObjectKey) -> str:
        return self._folder.value_path(self.object_name(key))

    def _store(self, parts: Sequence[bytes | memoryview], path: str, num_bytes: int) -> bool:
        """Publishes within the quota, and on a disk that is full before it is reached, in place of what is oldest."""
        self._make_room()
        try:
            return self._publish(parts, path)
        except OSError as error:
            if error.errno not in FULL or not self._free(num_bytes):
                raise
        return self._publish(parts, path)

    def _publish(self, parts: Sequence[bytes | memoryview], path: str) -> bool:
        """False if there is a value already. OSError if none could be written."""
        if self._folder.publish(parts, path):
            return True
        if self._clear_way(path) and self._folder.publish(parts, path):
            return True
        if not _is_file(path):
            raise FileExistsError(errno.EEXIST, "something that is no file is in the way", path)
        return False

    def _clear_way(self, path: str) -> bool:
        """Moves away what is at `path` if it is no regular file; whether it did."""
        try:
            status = os.lstat(path)
        except OSError:
            return False
        if stat.S_ISREG(status.st_mode):
            return False
        self._count(corrupt=1)
        return self._folder.discard(path, status)

    def _judge(self, path: str, fd: int, key: ObjectKey, payload: memoryview) -> bool:
        status = os.fstat(fd)
        verdict = _read(fd, status, key, payload)
        if verdict is _Verdict.GOOD:
            self._count(hits=1)
            if time.time_ns() - status.st_mtime_ns > REFRESH_NS:
                with contextlib.suppress(OSError):  # another user's file: it ages
                    os.utime(fd)
        elif verdict is _Verdict.BAD:
            is_gone = self._folder.discard(path, status)
            is_counted = stat.S_ISREG(status.st_mode)
            self._count(corrupt=1, used_bytes=-status.st_size if is_gone and is_counted else 0)
        return verdict is _Verdict.GOOD

    def _make_room(self) -> None:
        """Evicts, a batch at most, until all fits that is there or being written. Over quota, one thread at a time."""
        if self._fits() and not self._needs_scan():
            return
        with self._evicting:
            if self._needs_scan():
                self._scan()
            if self._quota_bytes is not None:
                self._evict_to(self._quota_bytes)

    def _free(self, num_bytes: int) -> bool:
        """Evicts so many bytes, a batch at most; whether anything left. Without a quota nothing leaves."""
        if self._quota_bytes is None:
            return False
        with self._evicting:
            before = self.stats()
            self._evict_to(before["used_bytes"] - num_bytes)
            return self.stats()["evicted"] > before["evicted"]

    def _evict_to(self, used_bytes: int) -> None:
        """Evicts, a batch at most, until no more is used. Called with `_evicting` held."""
        for _ in range(EVICTIONS_PER_PUT):
            if self.stats()["used_bytes"] <= used_bytes or not self._evict_oldest():
                break

    def _fits(self) -> bool:
        return self._quota_bytes is None or self.stats()["used_bytes"] <= self._quota_bytes

    def _needs_scan(self) -> bool:
        if self._quota_bytes is None:
            return False
        return self.stats()["unscanned_bytes"] > max(self._quota_bytes // SCANS_PER_QUOTA, MIN_SCAN_BYTES)

    def _evict_oldest(self) -> bool:
        """Removes the value used longest ago, unless that has changed since the scan. False if there is none."""
        if not self._victims:
            self._scan()
        if not self._victims:
            return False
        mtime_ns, num_bytes, path = self._victims.popleft()
        try:
            if os.lstat(path).st_mtime_ns == mtime_ns:
                os.unlink(path)
                self._count(evicted=1, used_bytes=-num_bytes)
        except FileNotFoundError:  # another process was faster
            self._count(used_bytes=-num_bytes)
        except OSError as error:
            self._fail("eviction_failures", error)
        return True

    def _scan(self) -> None:
        """Counts the bytes anew and lists the oldest values: about 6 us a file. Called with `_evicting` held.

        What is published meanwhile may be counted twice, until the next scan; nothing is left out.
        """
        before = self.stats()
        counted_bytes = 0

        def values() -> Iterator[tuple[int, int, str]]:
            nonlocal counted_bytes
            for value in self._folder.values():
                counted_bytes += value[1]
                yield value

        self._victims = deque(heapq.nsmallest(VICTIMS_PER_SCAN, values()))
        change = counted_bytes - (before["used_bytes"] - before["writing_bytes"])
        self._count(used_bytes=change, unscanned_bytes=-before["unscanned_bytes"])

    def _fail(self, counter: str, error: OSError) -> bool:
        """Counts a refusal of the system, and logs the first of each kind."""
        if self._count(**{counter: 1})[counter] == 1:
            _log.warning("%s: first of the %s: %s", self.path, counter, error)
        return False

    def _count(self, **changes: int) -> dict[str, int]:
        """Adds the changes; returns what those counters say now."""
        with self._lock:
            self._counters.update(changes)
            return {name: self._counters[name] for name in changes}


def _is_file(path: str) -> bool:
    """Whether a regular file is there, itself and not by a link."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def _read(fd: int, status: os.stat_result, key: ObjectKey, payload: memoryview) -> _Verdict:
    """Reads the file into `payload`, nothing more than fits, and judges it."""
    if not stat.S_ISREG(status.st_mode) or status.st_size <= HEADER_BYTES:
        return _Verdict.BAD
    header = bytearray(HEADER_BYTES)
    if status.st_size == HEADER_BYTES + len(payload):
        transfer_all(os.preadv, fd, (header, payload))
        return _Verdict.GOOD if check(header, key, payload) else _Verdict.BAD
    transfer_all(os.preadv, fd, (header,))
    is_intact = claimed_bytes(header, key) == status.st_size - HEADER_BYTES
    return _Verdict.OTHER_SIZE if is_intact else _Verdict.BAD
