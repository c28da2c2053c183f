"""Request traces in the Mooncake schema, expanded to tokens: equal block ids give equal tokens.

{"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [one per 512 tokens, ...]}
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

TRACE_BLOCK_TOKENS = 512


@dataclass(frozen=True)
class TraceRequest:
    """One line: lengths in tokens of the trace, block ids of the prompt."""

    input_length: int
    output_length: int
    block_ids: tuple[int, ...]

    def prompt(self, block_tokens: int, vocab_size: int) -> np.ndarray:
        """int32 tokens of the prompt when a block of the trace is `block_tokens` long; at least one token."""
        num_tokens = max(1, self.input_length * block_tokens // TRACE_BLOCK_TOKENS)
        blocks = [block_of_tokens(id, block_tokens, vocab_size) for id in self.block_ids]
        return np.concatenate(blocks)[:num_tokens]


def block_of_tokens(block_id: int, block_tokens: int, vocab_size: int) -> np.ndarray:
    """Deterministic int32 tokens of one block. Mixes id and position (splitmix64), so that blocks differ early."""
    x = np.arange(block_tokens, dtype=np.uint64) + np.uint64(block_id) * np.uint64(block_tokens) + np.uint64(1)
    with np.errstate(over="ignore"):
        x = x * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x % np.uint64(vocab_size)).astype(np.int32)


def read_trace(path: Path, num_requests: int | None = None) -> list[TraceRequest]:
    """The first requests of a JSONL file (also gzipped). ValueError names the line that is malformed."""
    return list(islice(_lines(path), num_requests))


def _lines(path: Path) -> Iterator[TraceRequest]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                request = TraceRequest(int(row["input_length"]), int(row["output_length"]), tuple(row["hash_ids"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: not a trace request: {error!r}") from None
            if request.input_length < 1 or len(request.block_ids) * TRACE_BLOCK_TOKENS < request.input_length:
                raise ValueError(f"{path}:{number}: {len(request.block_ids)} blocks for {request.input_length} tokens")
            yield request
