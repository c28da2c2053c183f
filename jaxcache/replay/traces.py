"""Request traces in the Mooncake schema, expanded to tokens: equal block ids give equal tokens.

{"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [one per block, ...]}

A block is 512 tokens in the traces that Mooncake published; other sizes are found from the lengths.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

TRACE_BLOCK_TOKENS = 512
MAX_BLOCK_ID = 2**64 - 1


@dataclass(frozen=True)
class TraceRequest:
    """One line: lengths in tokens, block ids of the prompt, tokens of a block of the trace, and when it came, if
    the line says so."""

    input_length: int
    output_length: int
    block_ids: tuple[int, ...]
    block_tokens: int = TRACE_BLOCK_TOKENS
    timestamp_ms: float | None = None

    def prompt(self, block_tokens: int, vocab_size: int) -> np.ndarray:
        """int32 tokens of the prompt when a block of the trace is made `block_tokens` long; at least one token."""
        num_tokens = max(1, self.input_length * block_tokens // self.block_tokens)
        ids = np.array(self.block_ids, np.uint64)[:, None]
        return tokens_of_blocks(ids, block_tokens, vocab_size).ravel()[:num_tokens]


def tokens_of_blocks(block_ids: np.ndarray, block_tokens: int, vocab_size: int) -> np.ndarray:
    """Deterministic int32[blocks, block_tokens]. Mixes id and position (splitmix64), so that blocks differ early."""
    x = np.arange(block_tokens, dtype=np.uint64) + block_ids * np.uint64(block_tokens) + np.uint64(1)
    with np.errstate(over="ignore"):
        x = x * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x % np.uint64(vocab_size)).astype(np.int32)


def read_trace(path: Path, num_requests: int | None = None, skipped: list[str] | None = None) -> list[TraceRequest]:
    """The first requests of a JSONL file (also gzipped).

    A malformed line is named by its number: in a ValueError, or, if `skipped` is given, there, and left out.
    """
    lines = list(islice(_lines(path, skipped), num_requests))
    if not lines:
        raise ValueError(f"{path}: no request in it" + (f"; {skipped[0]}" if skipped else ""))
    size = _block_tokens([request for _, request in lines])
    requests = []
    for number, request in lines:
        if len(request.block_ids) * size < request.input_length:
            message = f"{path}:{number}: {len(request.block_ids)} blocks of {size} for {request.input_length} tokens"
            _malformed(message, skipped)
        else:
            requests.append(replace(request, block_tokens=size))
    return requests


def _block_tokens(requests: list[TraceRequest]) -> int:
    """The power of two that explains most lengths (512 if none explains more), or else the smallest size that does."""

    def num_fitting(size: int) -> int:
        return sum((len(r.block_ids) - 1) * size < r.input_length <= len(r.block_ids) * size for r in requests)

    best = max((TRACE_BLOCK_TOKENS, *(1 << power for power in range(17))), key=num_fitting)
    if 2 * num_fitting(best) >= len(requests):
        return best
    sizes = sorted(-(-request.input_length // len(request.block_ids)) for request in requests)
    return sizes[len(sizes) * 99 // 100]


def _lines(path: Path, skipped: list[str] | None) -> Iterator[tuple[int, TraceRequest]]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, _request(json.loads(line))
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                _malformed(f"{path}:{number}: not a trace request: {error!r}", skipped)


def _request(row) -> TraceRequest:
    blocks, timestamp = tuple(map(int, row["hash_ids"])), row.get("timestamp")
    timestamp_ms = float(timestamp) if type(timestamp) in (int, float) and math.isfinite(timestamp) else None
    request = TraceRequest(int(row["input_length"]), int(row["output_length"]), blocks, timestamp_ms=timestamp_ms)
    if request.input_length < 1 or request.output_length < 0 or not request.block_ids or min(request.block_ids) < 0:
        raise ValueError("it needs at least one token and one block, and nothing negative")
    if max(request.block_ids) > MAX_BLOCK_ID:
        raise ValueError(f"block ids must be at most {MAX_BLOCK_ID}")
    return request


def _malformed(message: str, skipped: list[str] | None) -> None:
    if skipped is None:
        raise ValueError(message)
    skipped.append(message)
