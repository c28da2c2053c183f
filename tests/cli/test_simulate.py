"""`python -m jaxcache simulate`: counts, JSON, a failing input made small, and errors that say what to do."""

from __future__ import annotations

import json
import shlex

import pytest

from jaxcache.cli import main
from jaxcache.testing.scenario import Scenario
from jaxcache.testing.simulation import schedule
from jaxcache.testing.storage_faults import FAULTS

SHORT = ("simulate", "--mesh", "2,1,2", "--steps", "150", "--seed", "3")


def test_counts_as_json(capsys):
    assert main([*SHORT, "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    assert (report["mesh"], report["steps"], report["seed"], report["rank_steps"]) == ([2, 1, 2], 150, 3, 600)
    assert report["components"] == ["full", "window", "state"]
    assert report["faults"] == list(FAULTS)
    assert set(FAULTS) < set(report["fault_counts"])
    assert report["counts"]["admits"] > 20
    assert report["rank_steps_per_cpu_second"] > 0


def test_a_table_and_a_file(capsys, tmp_path):
    file = tmp_path / "new" / "report.json"
    assert main([*SHORT, "--json", str(file)]) == 0
    captured = capsys.readouterr()
    assert "seed 3: all is well" in captured.out
    assert "storage tokens used" in captured.out
    assert "never happened: " in captured.err
    assert json.loads(file.read_text())["digest"].startswith("0x")


def test_without_faults_none_strikes(capsys):
    assert main([*SHORT, "--faults", "none", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["fault_counts"] == {}


def test_only_some_operations(capsys):
    arrivals = [str(operation.index) for operation in schedule(3, 150) if operation.kind == "arrive"]
    assert main([*SHORT, "--only", ",".join(arrivals[:3]), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["arrivals"] == 3
    assert main([*SHORT, "--only", "none", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["arrivals"] == 0


@pytest.fixture
def retirements_break(monkeypatch):
    """From the second one on, on one rank; the rest of the schedule has nothing to do with it."""

    def retire(self: Scenario, index: int) -> None:
        self.counts["retired_namespaces"] += 1
        if self.counts["retired_namespaces"] == 2:
            self.cores[1].decisions.note("reset")

    monkeypatch.setattr(Scenario, "retire", retire)


@pytest.mark.usefixtures("retirements_break")
def test_a_failing_input_is_made_small_and_can_be_repeated(capsys):
    operations = schedule(3, 300)
    retirements = [operation for operation in operations if operation.kind == "retire"]
    some = sorted({operation.index for operation in [*operations[::7], *retirements]})
    options = ("--mesh", "2,1,1", "--steps", "300", "--seed", "3", "--reduce-seconds", "1000000")
    options += ("--only", ",".join(map(str, some)))
    assert main(["simulate", *options, "--json", "-"]) == 1
    captured = capsys.readouterr()
    failure = json.loads(captured.out)
    assert not failure["passed"]
    assert "I8" in failure["error"]
    assert [operation["kind"] for operation in failure["operations"]] == ["retire", "retire"]
    assert failure["steps"] <= retirements[1].step + 2
    assert "the smallest failing input that was found has 2 operations:" in captured.err
    assert f"again: {failure['command']}" in captured.err
    assert failure["repeats"]
    assert "scenario.py:" in failure["where"]
    assert f"{failure['error']} ({failure['where']})\n" in captured.err

    assert main([*shlex.split(failure["command"])[3:], "--json", "-"]) == 1
    assert json.loads(capsys.readouterr().out)["error"] == failure["error"]


@pytest.mark.usefixtures("retirements_break")
def test_without_time_the_whole_input_is_told(capsys):
    assert main(["simulate", "--mesh", "2,1,1", "--steps", "300", "--seed", "3", "--reduce-seconds", "0"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "  ...\nagain: " in captured.err


def test_what_passes_when_it_is_run_once_more_is_told(capsys, monkeypatch):
    errors = [KeyError("once")]

    def step(self: Scenario) -> None:
        if errors:
            raise errors.pop()

    monkeypatch.setattr(Scenario, "step", step)
    assert main([*SHORT, "--json", "-"]) == 1
    captured = capsys.readouterr()
    assert not json.loads(captured.out)["repeats"]
    assert "run once more, it passed: the run depends on more than its seed" in captured.err


def test_help_says_what_holds_without_options(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["simulate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for default in ("2,2,2", "50000", "0", "all", "full,window,state", "1000", "60"):
        assert f"(default: {default})" in text
    assert "None" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--faults", "moon"), "--faults: 'moon' is no fault: use all, none, or some of lost, "),
        (("--components", "full,moon"), "--components: components are some of full, window, state, each once, not"),
        (("--components", "full,full"), "--components: components are some of full, window, state, each once, not"),
        (("--only", "1,x"), "--only: 'x' is no number of an operation: there are "),
        (("--only", "99999"), "--only: '99999' is no number of an operation: there are "),
        (("--json", "/dev/null/x"), "--json: /dev/null/x cannot be written: "),
    ],
)
def test_what_makes_no_sense_is_said(capsys, options, message):
    assert main([*SHORT, *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--mesh", "2,2"), ("--steps", "0"), ("--seed", "-1")])
def test_numbers_that_are_none(capsys, option, value):
    with pytest.raises(SystemExit, match="2"):
        main([*SHORT, option, value])
    assert f"simulate: error: argument {option}: " in capsys.readouterr().err
