"""What a page holds: bytes that are a function of what it stands for, so that a wrong page is seen at the first read.

content = | 12 bytes of the page key | component |      of a page that is not full: of its key and its tail
row     = | content | rank | zeros |                    every rank has its own share of a page

A model step reads and writes such contents, the same ones on every rank.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.core.tokens import Sequence

KEY_BYTES = 12
ROW_BYTES = 16
GARBAGE_BYTE = 0xEE  # all that a page holds while somebody writes it, or after it was written by mistake


def content(c: int, sequence: Sequence, num_tokens: int) -> bytes:
    """Of the page, or state, of component number `c` that ends after the first `num_tokens` of a sequence."""
    whole = num_tokens * 4 // sequence.page_bytes
    key = sequence.page_keys(whole)[-1] if whole else sequence.namespace.digest
    tail = bytes(sequence.data[whole * sequence.page_bytes : num_tokens * 4])
    return page_content(c, key) if not tail else blake2b(tail + key, digest_size=KEY_BYTES).digest() + COMPONENT[c]


def page_content(c: int, key: bytes) -> bytes:
    """Of the whole page, or state at its end, that this key stands for."""
    return key[:KEY_BYTES] + COMPONENT[c]


def contents(c: int, sequence: Sequence, start: int, stop: int, end: int) -> list[bytes]:
    """Of the pages [start, stop) (numbers) when the sequence is computed up to token `end`."""
    whole = min(stop, end * 4 // sequence.page_bytes)
    pages = [key[:KEY_BYTES] + COMPONENT[c] for key in sequence.page_keys(whole)[start:]] if whole > start else []
    return pages if whole == stop else [*pages, content(c, sequence, end)]


def row_of(c: int, key: bytes, rank: int) -> np.ndarray:
    """uint8[ROW_BYTES]: a rank's share of the whole page."""
    return np.frombuffer(page_content(c, key) + RANK[rank], np.uint8)


COMPONENT = [bytes([c]) for c in range(256)]
RANK = [bytes([rank]).ljust(ROW_BYTES - KEY_BYTES - 1, b"\0") for rank in range(256)]  # the rest of a row


class ModelStep(NamedTuple):
    """What one model step of one request reads and writes, of the tokens [begin, end).

    reads, writes:             (component, number of the first page, contents); pages before `first` are not touched
    state_before, state_after: contents of the recurrent state; None: there is none
    """

    begin: int
    end: int
    reads: list[tuple[int, int, list[bytes]]]
    writes: list[tuple[int, int, list[bytes]]]
    state_before: bytes | None
    state_after: bytes | None


def model_step(core: PrefixCache, sequence: Sequence, begin: int, end: int) -> ModelStep:
    """Reads all that resuming at `begin` requires."""
    page = core.config.page_tokens
    reads, writes = [], []
    state_before = state_after = None
    for c, kind in enumerate(core.kinds):
        if kind is core.kinds.state:
            state_before = content(c, sequence, begin) if begin else None
            state_after = content(c, sequence, end)
            continue
        first = kind.component.required(begin).start // page
        reads.append((c, first, contents(c, sequence, first, -(-begin // page), begin)))
        writes.append((c, begin // page, contents(c, sequence, begin // page, -(-end // page), end)))
    return ModelStep(begin, end, reads, writes, state_before, state_after)
