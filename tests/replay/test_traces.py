"""Reading traces: block sizes, malformed lines."""

from __future__ import annotations

import json

import pytest

from jaxcache.replay.traces import read_trace


def write(path, rows) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def row(length: int, ids: list[int]) -> dict:
    return {"timestamp": 0, "input_length": length, "output_length": 1, "hash_ids": ids}


@pytest.mark.parametrize("block_tokens", [16, 100, 512])
def test_the_block_size_is_found_from_the_lengths(tmp_path, block_tokens):
    path = tmp_path / "trace.jsonl"
    write(path, [row(n, list(range(-(-n // block_tokens)))) for n in range(1, 20 * block_tokens, 7)])
    assert {request.block_tokens for request in read_trace(path)} == {block_tokens}


BAD = [
    "{",
    "[]",
    row(0, [1]),
    row(5, []),
    row(5, [-1]),
    {"input_length": 5},
    row(600, [1]),
    row(5, ["x"]),
    row(5, [2**64]),
    row(1e999, [1]),
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_malformed_line_is_named_and_skipped_or_refused(tmp_path, bad):
    path = tmp_path / "trace.jsonl"
    good = [row(512 * n, list(range(n))) for n in range(1, 5)]
    write(path, [*good, bad])
    with pytest.raises(ValueError, match=r"trace\.jsonl:5: "):
        read_trace(path)
    skipped: list[str] = []
    assert len(read_trace(path, skipped=skipped)) == 4
    assert len(skipped) == 1
    assert "trace.jsonl:5: " in skipped[0]


def test_an_empty_trace_is_refused(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.touch()
    with pytest.raises(ValueError, match="no request"):
        read_trace(path)


def test_equal_ids_are_equal_tokens(tmp_path):
    path = tmp_path / "trace.jsonl"
    write(path, [row(1024, [3, 4]), row(1000, [3, 5])])
    one, other = (request.prompt(512, 1000) for request in read_trace(path))
    assert (one[:512] == other[:512]).all()
    assert (one[512:1000] != other[512:]).any()
    assert len(other) == 1000
