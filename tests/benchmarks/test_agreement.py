"""`python -m jaxcache bench agreement`: figures of fleets that it starts. No time counts."""

from __future__ import annotations

import json

import pytest

from benchmarks.agreement import suite as agreement_suite
from jaxcache.cli import main

pytestmark = pytest.mark.multiprocess


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for name, value in {"FLEETS": ((1, 2), (2, 1)), "NUM_STEPS": 3, "WARMUP_STEPS": 2, "MODEL_MS": 0.1}.items():
        monkeypatch.setattr(agreement_suite, name, value)


def test_every_fleet_as_json(capsys):
    code = main(["bench", "agreement", "--json", "-"])
    report = json.loads(capsys.readouterr().out)
    parts = ("issue", "read", "read_one", "read_all", "round", "here")
    assert set(report["figures"]) == {"interpreter", *(f"agreement_{p}_{n}" for p in parts for n in ("1x2", "2x1"))}
    assert all(entry["value"] > 0 for entry in report["figures"].values())
    goals = [name for name, entry in report["figures"].items() if "goal" in entry]
    assert goals == [f"agreement_{part}_{n}" for n in ("1x2", "2x1") for part in parts if part.startswith("read")]
    assert report["missed"] == [name for name in goals if not report["figures"][name]["met"]]
    assert code == bool(report["missed"])


def test_some_of_it_as_a_table(capsys):
    assert main(["bench", "agreement", "--only", "agreement_2x1"]) in (0, 1)
    out = capsys.readouterr().out
    assert "The agreement" in out and "2 x 1 devices: issue" in out and "1 x 2 devices" not in out


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--only", "nonsense"], "'nonsense' is the beginning of none of agreement_1x2, agreement_2x1"),
        (["--trace", "x.jsonl"], "--trace is for the suite core"),
    ],
)
def test_what_it_refuses(capsys, options, reason):
    assert main(["bench", "agreement", *options]) == 2
    assert reason in capsys.readouterr().err
