"""What a page or a state must contain, as one integer: a function of the namespace and of all tokens up to its end.

    h(0) = hash(namespace)         h(n) = hash(h(n - 1), token n - 1)

    page that ends at e, computed up to n:  h(min(e, n)) ^ salt of the component
    state after n tokens:                   h(n) ^ salt of the component

So equal content means equal tokens from the start, the same namespace and the same component. Page keys, which storage
and events use, are recomputed here with hashlib alone.
"""

from __future__ import annotations

from hashlib import sha256
from typing import NamedTuple

import numpy as np

GARBAGE = -1  # what a page holds that nobody has written since it was given away; no hash is -1
ABSENT = -2  # what lies beyond the last page: reading it is always wrong
MAX_PAGES = 4096


class Violation(AssertionError):
    """The cache broke a promise. check: which one, in a word."""

    def __init__(self, check: str, detail: str):
        super().__init__(f"{check}: {detail}")
        self.check = check


def demand(condition: bool, check: str, *details: object) -> None:
    """details become text only if they are needed: most of the time that these tests take would go there."""
    if not condition:
        raise Violation(check, " ".join(map(str, details)))


def salt(component: str) -> int:
    return int.from_bytes(sha256(component.encode()).digest()[:7], "little")


def hash_of_namespace(digest: bytes) -> int:
    return hash((int.from_bytes(digest[:7], "little"), 1))


class Text:
    """Tokens in one namespace, and h after each of them: int64[len + 1]."""

    __slots__ = ("_h", "namespace", "tokens")

    def __init__(self, namespace: bytes, tokens: list[int]):
        self.namespace = namespace
        self.tokens: list[int] = []
        self._h = np.empty(len(tokens) + 64, np.int64)
        self._h[0] = hash_of_namespace(namespace)
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def extend(self, tokens: list[int]) -> None:
        at = len(self.tokens)
        if at + len(tokens) >= len(self._h):
            self._h = np.concatenate([self._h, np.empty(len(self._h) + len(tokens), np.int64)])
        value = int(self._h[at])
        values = []
        for token in tokens:
            value = hash((value, token))
            values.append(value)
        self._h[at + 1 : at + 1 + len(tokens)] = values
        self.tokens += tokens

    def at(self, n: int) -> int:
        return self._h.item(n)

    def pages(self, first: int, last: int, n: int, page_ends: np.ndarray) -> np.ndarray:
        """h of the pages first .. last - 1 when tokens up to n are computed; page_ends[i] is i pages in tokens."""
        return self._h[np.minimum(page_ends[first + 1 : last + 1], n)]


class Run(NamedTuple):
    """h and keys at the ends of consecutive whole pages."""

    h: np.ndarray
    keys: tuple[bytes, ...]


class Runs:
    """Hashes and keys of token runs, remembered: a pure function of what stands before them and their bytes."""

    def __init__(self, page_tokens: int):
        self.page_tokens = page_tokens
        self._known: dict[tuple[bytes, bytes], Run] = {}
        self.h_of_key: dict[bytes, int] = {}

    def follow(self, h: int, key: bytes, edge: bytes) -> Run:
        known = self._known.get((key, edge))
        if known is not None:
            return known
        page_bytes = 4 * self.page_tokens
        values, keys = [], []
        for start in range(0, len(edge), page_bytes):
            page = edge[start : start + page_bytes]
            for token in np.frombuffer(page, np.int32).tolist():
                h = hash((h, token))
            key_of_page = sha256((keys[-1] if keys else key) + page).digest()
            values.append(h)
            keys.append(key_of_page)
            self.h_of_key[key_of_page] = h
        run = self._known[(key, edge)] = Run(np.array(values, np.int64), tuple(keys))
        return run
