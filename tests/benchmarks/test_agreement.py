"""`python -m benchmarks agreement`: figures of fleets that it starts. No time counts."""

from __future__ import annotations

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.agreement import suite

pytestmark = pytest.mark.multiprocess


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for name, value in {"FLEETS": ((1, 2), (2, 1)), "NUM_STEPS": 3, "WARMUP_STEPS": 2, "MODEL_MS": 0.1}.items():
        monkeypatch.setattr(suite, name, value)


def test_every_fleet_as_json(capsys):
    code = main(["agreement", "--json", "-"])
    report = json.loads(capsys.readouterr().out)
    parts = ("issue", "read", "read_one", "read_all", "round", "here")
    assert set(report["figures"]) == {"interpreter", *(f"agreement_{p}_{n}" for p in parts for n in ("1x2", "2x1"))}
    assert all(entry["value"] > 0 for entry in report["figures"].values())
    goals = [name for name, entry in report["figures"].items() if "goal" in entry]
    assert goals == [f"agreement_{part}_{n}" for n in ("1x2", "2x1") for part in parts if part.startswith("read")]
    assert report["missed"] == [name for name in goals if not report["figures"][name]["met"]]
    assert code == bool(report["missed"])


def test_some_of_it_as_a_table(capsys):
    assert main(["agreement", "--only", "agreement_2x1"]) in (0, 1)
    out = capsys.readouterr().out
    assert "The agreement" in out and "2 x 1 devices: issue" in out and "1 x 2 devices" not in out


def test_a_name_that_no_fleet_begins_with_is_refused(capsys):
    assert main(["agreement", "--only", "nonsense"]) == 2
    assert "'nonsense' is the beginning of none of agreement_1x2, agreement_2x1" in capsys.readouterr().err
