"""The tables of `python -m jaxcache replay`: everything of one run, and what tells policies apart in 80 columns."""

from __future__ import annotations

import json

import pytest

from benchmarks.core.workload import TRACE
from jaxcache.cli import main
from jaxcache.cli.replay import show
from jaxcache.core.eviction import POLICIES

SHORT = ("replay", str(TRACE), "--requests", "60", "--page-tokens", "512")
LARGE = {
    "requests": 1_000_000,
    "prompt_tokens": 10_000_000_000,
    "hit_rate": 0.2345,
    "hit_tokens": {"device": 1_234_567_890, "host": 1_000_000_000, "storage": 10_000_000},
    "requests_per_cpu_second": 12_345.6,
    "us_per_request": {"p50": 12.0, "p99": 12_345.0, "max": 99_999.0},
    "evictions": 123_456_789,
    "bytes_per_cached_token": 4.5,
    "too_long": 3,
    "block_stored_events": 123_456_789,
    "block_removed_events": 123_456_700,
    "optimum_hit_rate": 0.3456,
    "infinite_hit_rate": 0.4567,
}


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def test_all_policies_fit_80_columns(capsys):
    show([{"policy": policy, **LARGE} for policy in POLICIES], num_tiers=3)
    out = capsys.readouterr().out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80
    for policy in POLICIES:
        hits, events = (line.split() for line in out.splitlines() if line.startswith(f"{policy} "))
        assert hits == [policy, "23.45%", "12.35%", "10.00%", "0.10%", "12,346", "12,345", "123,456,789"]
        assert events == [policy, "123,456,789", "123,456,700"]
    assert out.count("34.56%") == out.count("offline optimum") == 1
    assert out.count("45.67%") == out.count("infinite cache") == 1
    assert "requests longer than the device: 3" in out


def test_tiers_have_columns_only_where_there_are_some(capsys):
    reports = [{"policy": policy, **LARGE} for policy in ("lru", "lfu")]
    show(reports, num_tiers=1)
    assert "device " not in capsys.readouterr().out
    show(reports, num_tiers=2)
    out = capsys.readouterr().out
    assert "host" in out and "storage" not in out


def test_one_run_is_a_list_of_everything(capsys):
    show([{"policy": "lru", **LARGE}], num_tiers=1)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for text in ("23.45%", "34.56%", "45.67%", "12,345.6", "123,456,789", "4.5", "1,234,567,890", "99,999"):
        assert text in out


def test_a_policy_given_twice_is_one_run(capsys):
    assert main([*SHORT, "--policy", "lru", "--policy", "lru", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["policy"] == "lru"
    assert main([*SHORT, "--policy", "lru", "--policy", "lfu", "--json", "-"]) == 0
    assert [report["policy"] for report in json.loads(capsys.readouterr().out)] == ["lru", "lfu"]
