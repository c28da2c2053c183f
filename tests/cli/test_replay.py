"""`python -m jaxcache replay`: figures, JSON, and errors that say what to do."""

from __future__ import annotations

import gzip
import json

import pytest

from benchmarks.core.workload import TRACE
from jaxcache.cli import main

KEYS = {
    "requests",
    "prompt_tokens",
    "hit_rate",
    "hit_tokens",
    "requests_per_cpu_second",
    "us_per_request",
    "evictions",
    "bytes_per_cached_token",
    "optimum_hit_rate",
    "infinite_hit_rate",
}
SHORT = ("replay", str(TRACE), "--requests", "300", "--page-tokens", "64")


def replay(capsys, *options: str) -> dict:
    assert main([*SHORT, *options, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def test_figures_as_json(capsys):
    report = replay(capsys, "--device-tokens", "200k")
    assert set(report) >= KEYS
    assert report["requests"] == 300
    assert report["hit_rate"] == report["hit_tokens"]["device"] / report["prompt_tokens"]
    assert 0 < report["hit_rate"] < report["optimum_hit_rate"] < report["infinite_hit_rate"] < 1
    assert report["evictions"] > 0
    assert 0 < report["us_per_request"]["p50"] <= report["us_per_request"]["p99"] <= report["us_per_request"]["max"]


def test_an_endless_device_finds_what_an_infinite_cache_finds(capsys):
    report = replay(capsys, "--device-tokens", "20M")
    assert report["hit_rate"] == report["infinite_hit_rate"] == report["optimum_hit_rate"]


def test_all_tiers_find_more(capsys):
    sizes = ("--device-tokens", "200k", "--host-tokens", "3M")
    device, host = replay(capsys, *sizes[:2]), replay(capsys, *sizes)
    storage = replay(capsys, *sizes, "--storage-tokens", "20M")
    assert host["hit_tokens"]["host"] > 0
    assert storage["hit_tokens"]["storage"] > 0
    assert device["hit_rate"] < host["hit_rate"] < storage["hit_rate"] <= storage["infinite_hit_rate"]


def test_namespaces_share_nothing(capsys):
    one, three = (replay(capsys, "--device-tokens", "20M", "--namespaces", n) for n in "13")
    assert three["hit_rate"] == three["infinite_hit_rate"] < one["hit_rate"]


def test_components_and_outputs(capsys):
    report = replay(capsys, "--components", "full,window,state", "--include-outputs")
    assert 0 < report["hit_rate"] < report["infinite_hit_rate"]


def test_events_change_nothing_else(capsys):
    sizes = ("--device-tokens", "200k", "--host-tokens", "1M")
    without, report = replay(capsys, *sizes), replay(capsys, *sizes, "--events")
    assert "block_stored_events" not in without
    assert report["block_stored_events"] > 300
    assert report["block_removed_events"] > 0
    assert (report["hit_tokens"], report["evictions"]) == (without["hit_tokens"], without["evictions"])


def test_a_table_and_a_file(capsys, tmp_path):
    file = tmp_path / "new" / "replay.json"
    assert main([*SHORT, "--all-policies", "--events", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "lru" in out
    assert "offline optimum" in out
    assert "events of pages stored" in out
    assert json.loads(file.read_text())[0]["policy"] == "lru"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--policy", "best"), "'best' is none of "),
        (("--policy", ""), "'' is none of "),
        (("--components", "full,moon"), "'moon' is none of full, state, window"),
        (("--components", ""), "'' is none of full, state, window"),
        (("--components", "full,full"), "replay: --components: 'full' is named twice"),
        (("--components", "full,window,window"), "replay: --components: 'window' is named twice"),
        (("--storage-tokens", "1M"), "needs --host-tokens"),
        (("--device-tokens", "10"), "less than one page"),
    ],
)
def test_what_does_not_exist_is_said(capsys, options, message):
    assert main([*SHORT, *options]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "num_rows"),
    [
        (("--components", "window"), 1),
        (("--components", "state"), 1),
        (("--components", "full,window", "--page-tokens", "2048"), 1),
        (("--policy", "lru", "--policy", "lru"), 1),
        (("--policy", "lru", "--policy", "fifo", "--policy", "lru"), 2),
    ],
)
def test_what_is_unusual_works(capsys, options, num_rows):
    assert main([*SHORT, "--requests", "30", *options, "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = report if num_rows > 1 else [report]
    assert len(rows) == num_rows
    assert all(row["requests"] == 30 for row in rows)


def test_a_device_of_one_page_finds_nothing(capsys, tmp_path):
    plot = tmp_path / "replay.png"
    options = ("--requests", "30", "--page-tokens", "16", "--device-tokens", "16")
    assert main([*SHORT, *options, "--json", "-", "--plot", str(plot)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["hit_rate"], report["too_long"]) == (0, 30)
    assert plot.exists()


@pytest.mark.parametrize(("option", "value"), [("--namespaces", "0"), ("--requests", ""), ("--device-tokens", "-1")])
def test_numbers_that_are_none(capsys, option, value):
    with pytest.raises(SystemExit, match="2"):
        main([*SHORT, option, value])
    assert f"replay: error: argument {option}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl: no request in it"),
        ("a.jsonl", b'nonsense\n{"a": 1}\n[]\n1\n', "a.jsonl: no request in it; "),
        ("a.jsonl", b'{"input_length": 1e999, "output_length": 1, "hash_ids": [1]}', "a.jsonl: no request in it; "),
        ("a.jsonl", b"\xff\xfe\x00\n", "a.jsonl: cannot be read: "),
        ("a.jsonl.gz", b"nonsense", "a.jsonl.gz: cannot be read: "),
        ("a.jsonl.gz", gzip.compress(b"{}\n" * 9, mtime=0)[:-12], "a.jsonl.gz: cannot be read: "),
        ("a.jsonl.gz", gzip.compress(b"{}\n" * 9, mtime=0)[:10] + b"nonsense", "a.jsonl.gz: cannot be read: "),
    ],
)
def test_a_trace_without_requests_is_said(capsys, tmp_path, name, content, message):
    trace = tmp_path / name
    trace.write_bytes(content)
    assert main(["replay", str(trace)]) == 1
    assert f"replay: {tmp_path}/{message}" in capsys.readouterr().err
    assert main(["replay", str(tmp_path)]) == 1
    assert f"Is a directory: '{tmp_path}'" in capsys.readouterr().err


def test_a_missing_file_and_malformed_lines(capsys, tmp_path):
    assert main(["replay", str(tmp_path / "none.jsonl")]) == 1
    assert "none.jsonl" in capsys.readouterr().err
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"input_length": 512, "output_length": 1, "hash_ids": [1]}\nnonsense\n')
    assert main(["replay", str(trace)]) == 0
    assert "trace.jsonl:2" in capsys.readouterr().err
    assert main(["replay", str(trace), "--strict"]) == 1
    assert "trace.jsonl:2" in capsys.readouterr().err
