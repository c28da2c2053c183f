"""What a run was answered, as one number: equal before and after a change of the code that changes no decision.

`main` of golden_decisions.py prints the lines of two runs to be compared: the first that differs is where they part.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from enum import Enum
from hashlib import blake2b
from typing import Any

import numpy as np

Plain = tuple | int | str | bytes | None


def plain(value: Any) -> Plain:
    """A value without the names of its type and fields, which may change."""
    if value is None or isinstance(value, (str, bytes)):
        return value
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if is_dataclass(value):
        return tuple(plain(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, Iterable):
        return tuple(map(plain, value))
    raise TypeError(f"no answer of the core is a {type(value).__name__}")


class Record:
    """lines: (call, digest of all decisions, what was answered), the last ones of which are kept."""

    def __init__(self, keeps_lines: bool = False):
        self.lines: list[str] = []
        self._keeps_lines = keeps_lines
        self._sum = blake2b(digest_size=4)

    def note(self, call: str, digest: int, answer: Any) -> None:
        line = f"{call} {digest:016x} {plain(answer)}\n"
        self._sum.update(line.encode())
        if self._keeps_lines:
            self.lines.append(line)

    def checksum(self) -> str:
        """8 hex digits."""
        return self._sum.hexdigest()
