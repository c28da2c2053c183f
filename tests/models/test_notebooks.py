"""The notebooks: the text that people edit and the pair that shows the outputs, and a run of each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from models import fetch

jupytext = pytest.importorskip("jupytext")

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "models" / "notebooks"
CHAT, HYBRID = NOTEBOOKS / "chat_with_a_prefix_cache.py", NOTEBOOKS / "a_hybrid_and_its_states.py"
SOURCES = (CHAT, HYBRID)
RUN_S = 1200


def cells(path: Path) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]


def outputs(path: Path) -> list[Any]:
    return [output for cell in jupytext.read(path).cells for output in cell.get("outputs", [])]


def printed(path: Path) -> str:
    return "".join(output.text for output in outputs(path) if output.output_type == "stream")


def num_pictures(path: Path) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(path))


def check_chat(path: Path) -> None:
    """What the text around the cells promises."""
    said = printed(path)
    assert said.count("the answers are the same") == 2 and "DIFFER" not in said
    for where in (" device, ", " host, ", " storage, "):
        assert where in said
    for reason in ("The first page that is not there: 0.", "left HOST in step", "can be used"):
        assert reason in said
    assert num_pictures(path) == 4


def check_hybrid(path: Path) -> None:
    said = printed(path)
    assert said.count("the answers are the same") == 1 and "DIFFER" not in said
    for found in (" 352 found", " 416 found"):  # the turns of a conversation
        assert found in said
    assert "state: the state at 320 is missing" in said and "insert(..., states=[320])" in said
    assert said.count(" 320 found,  42 computed") == 1  # the fork, once it has a state
    assert said.count(" 480 found") == said.count(" 320 found,  31 computed") == 2  # on both other meshes
    assert num_pictures(path) == 3


CHECKS = {CHAT: check_chat, HYBRID: check_hybrid}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_both_files_have_the_same_cells(source):
    assert cells(source) == cells(source.with_suffix(".ipynb")), "`make notebook` writes the second file again"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_outputs_are_small_and_of_no_machine(source):
    shown = source.with_suffix(".ipynb")
    assert shown.stat().st_size < 300_000
    assert {(o.output_type, o.get("name")) for o in outputs(shown)} <= {("stream", "stdout"), ("display_data", None)}
    assert not [part for part in ("/tmp/", "/home/", "/root/", "/Users/", str(ROOT)) if part in printed(shown)]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_outputs_are_what_the_text_says(source):
    CHECKS[source](source.with_suffix(".ipynb"))


@pytest.mark.slow
@pytest.mark.timeout(RUN_S + 60)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_notebook_runs(tmp_path, source):
    """In a process of its own, with nothing compiled before."""
    fetch.fetch(fetch.SMOLLM2)
    written = tmp_path / "written.ipynb"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "jax"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "models.run_notebook", str(source), "--output", str(written)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=RUN_S,
    )
    assert done.returncode == 0, done.stderr
    assert cells(written) == cells(source)
    CHECKS[source](written)


@pytest.mark.slow
def test_a_cell_that_fails_is_shown(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("# %%\nprint(1 // 0)\n")
    done = subprocess.run(
        [sys.executable, "-m", "models.run_notebook", str(broken)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert not broken.with_suffix(".ipynb").exists()
