"""The storage contract: what every engine does, on the worker threads of the transfer engine. Never imports jax.

An engine is a plain blocking class. It owns no threads, deadlines or retries: the transfer engine supplies them.
Losing a value is always allowed (a miss); returning a wrong one never is.

    one value missing, refused or damaged            False, and a counter
    the storage cannot be used, found when opening   StorageError
    it can be read but not written (full, read-only) opened; `put` says False, and a counter
    the storage cannot be reached, found later       False, or StorageError from an engine that can tell (ask it later)
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

FORMAT_VERSION = 1
PAGE_KEY_BYTES = 32


class StorageError(OSError):
    """A storage as a whole cannot be used; the message names it."""


@dataclass(frozen=True, slots=True)
class ObjectKey:
    """Names one value: one cell of one page of one component.

    page_key:  32 bytes, the chained key of the page (namespace and all tokens up to its end)
    component: the component's name
    cell:      logical coordinates of the cell on the storage grid and its layout,
               e.g. "kv:float32[4,2,16,2,32]@0:2,:,0:8,0:1,:"
    """

    page_key: bytes
    component: str
    cell: str

    def __post_init__(self) -> None:
        if len(self.page_key) != PAGE_KEY_BYTES:
            raise ValueError(f"{len(self.page_key)=} must be {PAGE_KEY_BYTES=}")


def flat_bytes(buffer: memoryview) -> memoryview:
    """The same memory as unsigned bytes. ValueError if it is empty or has gaps: no value is like that."""
    if not buffer.nbytes or not buffer.c_contiguous:
        raise ValueError(f"{buffer.nbytes=} must be positive and {buffer.c_contiguous=} true")
    return buffer.cast("B")


class Storage(ABC):
    """Shared storage for page cells. Thread-safe: several workers call it at once.

    Buffers are C-contiguous and not empty (ValueError otherwise), of any format: only their bytes count.

    secret: keys the object names, so that nobody can guess a name from a prompt; who shares storage shares it.
    """

    secret: bytes

    def object_name(self, key: ObjectKey) -> str:
        """Hex name of a value: a keyed hash, so no part of a name comes from outside input."""
        digest = hashlib.blake2b(key=self.secret, digest_size=32)
        for part in (key.page_key, key.component.encode(), key.cell.encode(), FORMAT_VERSION.to_bytes(4, "little")):
            digest.update(len(part).to_bytes(4, "little"))
            digest.update(part)
        return digest.hexdigest()

    @abstractmethod
    def exists(self, keys: Sequence[ObjectKey]) -> list[bool]:
        """For each key whether a value is probably there. May be wrong either way; `get` decides."""

    @abstractmethod
    def get(self, key: ObjectKey, buffer: memoryview) -> bool:
        """Fills the whole of `buffer` (writable bytes) with the value and returns True; False, with `buffer` undefined,
        if the value is missing, short, torn, corrupt, foreign, or of another size."""

    @abstractmethod
    def put(self, key: ObjectKey, buffer: memoryview) -> bool:
        """Publishes a value atomically; True if it is there afterwards. The first writer wins: an existing value stays.

        False if it was refused or could not be written. `buffer` is read only during the call and never kept."""

    @abstractmethod
    def clear(self) -> None:
        """Removes every value of ours, and nothing else."""

    def stats(self) -> dict[str, int]:
        """Counters of this engine since it was opened; names that end in `_bytes` are sizes now.

        puts and gets: calls; duplicates: puts of what was there; hits: gets that found it; put_failures: puts that were
        refused or could not be written; used_bytes: of all values. An engine may have more of them, or none.
        """
        return {}

    def close(self) -> None:  # noqa: B027 (most engines hold nothing)
        """Gives back what the engine holds."""
