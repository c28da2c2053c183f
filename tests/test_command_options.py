"""`--json` of every command: a place that cannot be written is said before the work begins; the rest is written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks.__main__ import main as benchmark
from benchmarks.core import suite
from benchmarks.core.workload import TRACE
from jaxcache.cli import doctor, main
from jaxcache.command_options import prepare_file, prepare_json, write_json
from jaxcache.replay.study import Study

CANNOT = {("core",): 2, ("doctor",): 1, ("replay", str(TRACE), "--requests", "60"): 1}  # exit codes
each_command = pytest.mark.parametrize(("command", "code"), CANNOT.items(), ids=[command[0] for command in CANNOT])


@pytest.fixture
def no_work(monkeypatch):
    def fail(*args):
        raise AssertionError("the work has begun")

    monkeypatch.setattr(suite, "groups", fail)
    monkeypatch.setattr(doctor, "versions", fail)
    monkeypatch.setattr(Study, "reports", fail)
    monkeypatch.setattr("jaxcache.replay.traces.read_trace", fail)


@pytest.fixture
def places(tmp_path) -> dict[str, tuple[str, str]]:
    """Why -> a place that cannot be written, and what is said about it."""
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("")
    folder.mkdir()
    return {
        "a folder": (str(folder), f"--json: {folder} cannot be written: it is a folder"),
        "in a file": (f"{file}/a.json", f"--json: {file}/a.json cannot be written: File exists: {file}"),
        "below a file": (f"{file}/a/b.json", f"--json: {file}/a/b.json cannot be written: Not a directory: {file}/a"),
        "too long": (f"{folder}/{'a' * 300}", "cannot be written: File name too long"),
        "nothing": ("", "--json: . cannot be written: it is a folder"),
    }


@each_command
@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("why", ["a folder", "in a file", "below a file", "too long", "nothing"])
def test_a_place_that_cannot_be_written_is_said_before_the_work(capsys, places, command, code, why):
    place, message = places[why]
    run = benchmark if command == ("core",) else main
    assert run([*command, "--json", place]) == code
    captured = capsys.readouterr()
    assert captured.err.startswith(f"{command[0]}: --json: ")
    assert message in captured.err
    assert not captured.out


@pytest.mark.usefixtures("no_work")
def test_of_a_report_and_a_picture_both_are_looked_at(capsys, places, tmp_path):
    replay = ["replay", str(TRACE), "--plot"]
    assert main([*replay, str(tmp_path / "replay.png"), "--json", places["a folder"][0]]) == 1
    assert "--json: " in capsys.readouterr().err
    assert main([*replay, places["in a file"][0][: -len("json")] + "png", "--json", str(tmp_path / "a.json")]) == 1
    assert "--plot: " in capsys.readouterr().err


@pytest.mark.usefixtures("no_work")
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_said(capsys, tmp_path):
    tmp_path.chmod(0o500)
    assert main(["doctor", "--json", str(tmp_path / "a.json")]) == 1
    assert "a.json cannot be written: Permission denied" in capsys.readouterr().err


def test_a_file_without_permission_is_said(monkeypatch, tmp_path):
    """Whoever runs this: of a file that is there the file counts, of another the folder."""
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append(path) or False)
    (tmp_path / "old.json").write_text("{}")
    for name in ("old.json", "new.json"):
        with pytest.raises(ValueError, match=f"--json: .*{name} cannot be written: Permission denied"):
            prepare_file("--json", tmp_path / name)
    assert asked == [tmp_path / "old.json", tmp_path]


@pytest.mark.parametrize("name", ["a.json", "new/folder/a.json", "old.json", "/dev/null"])
def test_what_can_be_written_is(tmp_path, name):
    (tmp_path / "old.json").write_text("a much longer text than the new one")
    target = str(tmp_path / name)
    prepare_json(target)
    write_json(target, {"a": [1]})
    if Path(target).is_file():
        assert json.loads(Path(target).read_text()) == {"a": [1]}


def test_preparing_leaves_a_file_as_it_is(tmp_path):
    file = tmp_path / "old.json"
    file.write_text("old")
    prepare_json(str(file))
    prepare_json(str(tmp_path / "new.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert file.read_text() == "old"


def test_standard_output_and_no_report(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for target in ("-", None):
        prepare_json(target)
        write_json(target, {"a": 1})
    assert capsys.readouterr().out == '{\n  "a": 1\n}\n'
    assert not list(tmp_path.iterdir())


def test_a_report_of_the_doctor_in_a_new_folder(capsys, tmp_path):
    file = tmp_path / "new" / "doctor.json"
    assert main(["doctor", "--platform", "cpu", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["ok"] is True
    assert "devices" in capsys.readouterr().out
