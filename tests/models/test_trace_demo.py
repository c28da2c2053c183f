"""The demo on a trace: its figures, its exit status, and what it says when something is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from models import trace_demo
from models.serve import BatchShape, Server
from tests.models.serving import MODEL

SMALL_DEMO = ["--requests", "4", "--mesh", "1,1,1", "--device-pages", "96", "--host-pages", "128"]
KEYS = {
    "requests",
    "prompt_tokens",
    "hit_tokens",
    "computed_tokens",
    "ttft_ms",
    "ttft_ms_uncached",
    "ttft_ms_hit75",
    "ttft_ms_hit75_uncached",
    "tokens_per_s",
    "tokens_identical",
    "distinct_tokens",
    "restart",
    "compiles_after_warmup",
}


@pytest.fixture
def small_demo(monkeypatch) -> None:
    """The demo with this file's model, short prompts and short transfers."""
    monkeypatch.setitem(trace_demo.TINY, "tiny-moe", MODEL)
    monkeypatch.setattr(trace_demo, "BLOCK_TOKENS", 8)
    monkeypatch.setattr(trace_demo, "BatchShape", lambda table_pages: BatchShape(2, 16, 4, table_pages))


def test_demo_writes_its_figures(small_demo, tmp_path):
    file = tmp_path / "new" / "figures.json"
    assert trace_demo.main([*SMALL_DEMO, "--storage", str(tmp_path / "storage"), "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert figures.keys() >= KEYS
    assert figures["hit_tokens"].keys() == {"device", "host", "storage"}
    for name in ("ttft_ms", "ttft_ms_uncached"):
        assert 0 < figures[name]["p50"] <= figures[name]["p99"]
    assert figures["ttft_ms_hit75"].keys() == figures["ttft_ms_hit75_uncached"].keys() == {"requests", "p50"}
    assert figures["requests"] == 4
    assert figures["tokens_identical"] is True
    assert figures["restart"]["tokens_identical"] is True
    assert figures["restart"]["hit_tokens"]["storage"] > 0
    assert figures["computed_tokens"] + sum(figures["hit_tokens"].values()) == figures["prompt_tokens"]
    assert figures["compiles_after_warmup"] == 0
    assert figures["distinct_tokens"] > 1


def test_demo_without_a_cache_writes_to_standard_output(small_demo, capsys):
    assert trace_demo.main([*SMALL_DEMO, "--no-cache", "--json", "-"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures.keys() == {"requests", "ttft_ms", "tokens_per_s"}


def write_trace(path: Path, timestamps_ms: Sequence[float | None]) -> Path:
    lines = [
        {"input_length": 2000, "output_length": 1, "hash_ids": [0, 1, 2, 3 + i]} for i in range(len(timestamps_ms))
    ]
    for line, timestamp_ms in zip(lines, timestamps_ms, strict=True):
        line |= {} if timestamp_ms is None else {"timestamp": timestamp_ms}
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_demo_lets_requests_come_when_the_trace_says(small_demo, monkeypatch, tmp_path):
    """Half a second after each other by a clock of another time, at ten times that speed."""
    trace = write_trace(tmp_path / "trace.jsonl", [1.7e12 + 500 * i for i in range(4)])
    served: list[trace_demo.Run] = []
    compare_runs = trace_demo.compare_runs
    monkeypatch.setattr(trace_demo, "compare_runs", lambda *runs: served.extend(runs) or compare_runs(*runs))
    assert trace_demo.main([*SMALL_DEMO, "--trace", str(trace), "--arrivals", "10"]) == 0
    assert len(served) == 3
    for run in served:
        arrivals = [request.arrival_s for request in run.requests]
        assert np.diff(arrivals) == pytest.approx(0.05, abs=1e-3)
        assert all(r.arrival_s < r.service_start_s < r.first_token_s for r in run.requests)
        assert all(r.ttft_ms == pytest.approx((r.first_token_s - r.arrival_s) * 1000) for r in run.requests)


@pytest.mark.parametrize(
    ("stamps", "options", "reason"),
    [
        ([0, None], [], "not every request of"),
        ([0, 1], ["--processes", "2", "--mesh", "1,1,2"], "--arrivals goes by the clock of one process"),
    ],
)
def test_demo_says_why_requests_cannot_come_when_the_trace_says(small_demo, capsys, tmp_path, stamps, options, reason):
    trace = write_trace(tmp_path / "trace.jsonl", stamps)
    assert trace_demo.main([*SMALL_DEMO, "--trace", str(trace), "--arrivals", "10", *options]) == 1
    assert reason in " ".join(capsys.readouterr().err.split())


def test_demo_fails_when_tokens_differ(small_demo, monkeypatch):
    """Its exit status is the comparison's."""
    compare_runs = trace_demo.compare_runs
    monkeypatch.setattr(trace_demo, "compare_runs", lambda *runs: {**compare_runs(*runs), "tokens_identical": False})
    monkeypatch.setattr(trace_demo.Demo, "serve", _pretend_to_serve)
    assert trace_demo.main(SMALL_DEMO) == 1


def _pretend_to_serve(self, title, caching, storage, requests) -> trace_demo.Run:
    for request in requests:
        request.output, request.hit_tokens = [1], dict.fromkeys(trace_demo.TIERS, 0)
    return trace_demo.Run(requests, 1.0, {"counters": {}}, 0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--mesh", "2,2"], "--mesh must be three positive numbers cp,tp,pp, not '2,2'"),
        (["--mesh", "a,b,c"], "--mesh must be three positive numbers"),
        (["--mesh", "0,1,1"], "--mesh must be three positive numbers"),
        (["--mesh", "4,4,4"], "needs 64 devices"),
        (["--mesh", "1,3,1"], "tp=3 does not divide 4 heads"),
        (["--page-tokens", "7", "--mesh", "2,1,1"], "page_tokens=7 must be a multiple of cp=2"),
        (["--trace", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--mesh", "1,1,2", "--processes", "3"], "--processes 3 must divide the 2 devices of --mesh"),
        (["--mesh", "1,1,2", "--processes", "0"], "--processes 0 must divide the 2 devices of --mesh"),
        (["--storage-grid", "2,2"], "--storage-grid must be three positive numbers cp,tp,pp, not '2,2'"),
        (["--storage-grid", "1,1,1", "--mesh", "1,1,2"], "storage grid's pp=1 must be a multiple of the mesh's pp=2"),
        (["--arrivals", "0"], "--arrivals must be a positive number, not 0.0"),
        (["--requests", "0"], "--requests must be at least 1, not 0"),
        (["--model", "nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_demo_says_what_is_wrong(small_demo, capsys, make_mesh, options, reason):
    for shape in (text.split(",") for text in options if re.fullmatch("[1-3],[1-3],[1-3]", text)):
        make_mesh(*map(int, shape))  # skips the test where a host has too few GPUs, which would be what is wrong
    assert trace_demo.main([*SMALL_DEMO, *options]) == 1
    assert reason in " ".join(capsys.readouterr().err.split())


def test_demo_refuses_a_folder_of_somebody_else(small_demo, capsys, monkeypatch, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    monkeypatch.setattr(trace_demo.Demo, "serve", _pretend_to_serve)
    assert trace_demo.main([*SMALL_DEMO, "--storage", str(tmp_path)]) == 1
    assert "belongs to something else" in " ".join(capsys.readouterr().err.split())


def test_demo_says_that_a_request_does_not_fit(small_demo, capsys, monkeypatch):
    monkeypatch.setattr(Server, "warmup", lambda self: None)  # it does not come to running the model
    assert trace_demo.main([*SMALL_DEMO, "--device-pages", "2"]) == 1
    assert "tokens does not fit the device" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "line", ["{", '{"input_length": 5}', '{"input_length": 600, "output_length": 1, "hash_ids": [1]}']
)
def test_demo_names_the_unreadable_line_of_a_trace(small_demo, capsys, tmp_path, line):
    trace = tmp_path / "trace.jsonl"
    good = '{"timestamp": 0, "input_length": 1000, "output_length": 1, "hash_ids": [1, 2]}'
    trace.write_text(f"{good}\n{line}\n")
    assert trace_demo.main([*SMALL_DEMO, "--trace", str(trace)]) == 1
    assert "trace.jsonl:2" in "".join(capsys.readouterr().err.split())


def test_demo_help_names_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        trace_demo.main(["--help"])
    text = capsys.readouterr().out
    for option in (
        "model",
        "trace",
        "requests",
        "arrivals",
        "mesh",
        "processes",
        "coordinator",
        "storage-grid",
        "device-pages",
        "host-pages",
        "storage",
        "no-cache",
        "json",
    ):
        assert f"--{option}" in text
    assert "(default: 500)" in text
    assert "default: None" not in text
    assert "default: False" not in text
