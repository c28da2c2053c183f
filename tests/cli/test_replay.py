"""`python -m jaxcache replay`: figures, JSON, and errors that say what to do."""

from __future__ import annotations

import json

import pytest

from jaxcache.bench.workload import TRACE
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
        (("--components", "full,moon"), "'moon' is none of full, state, window"),
        (("--storage-tokens", "1M"), "needs --host-tokens"),
        (("--device-tokens", "10"), "less than one page"),
    ],
)
def test_what_does_not_exist_is_said(capsys, options, message):
    assert main([*SHORT, *options]) == 1
    assert message in capsys.readouterr().err


def test_a_missing_file_and_malformed_lines(capsys, tmp_path):
    assert main(["replay", str(tmp_path / "none.jsonl")]) == 1
    assert "none.jsonl" in capsys.readouterr().err
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"input_length": 512, "output_length": 1, "hash_ids": [1]}\nnonsense\n')
    assert main(["replay", str(trace)]) == 0
    assert "trace.jsonl:2" in capsys.readouterr().err
    assert main(["replay", str(trace), "--strict"]) == 1
    assert "trace.jsonl:2" in capsys.readouterr().err
