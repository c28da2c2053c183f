"""`python -m models.serve --processes N`: one table, one JSON document, and whose fault it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.multiprocess.fleets import TIMEOUT_S

pytestmark = pytest.mark.multiprocess

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "models.serve", "--processes", "2", "--mesh", "1,1,2"]


def serve(*options: str) -> subprocess.CompletedProcess[str]:
    """On CPU devices, wherever the tests run."""
    command, env = [*COMMAND, *options], {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)


@pytest.mark.slow
def test_the_first_process_shows_the_results_of_all(tmp_path):
    done = serve("--requests", "4", "--json", "-", "--storage", str(tmp_path / "storage"))
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["tokens_identical"]
    assert figures["restart"]["tokens_identical"]
    assert figures["restart"]["hit_tokens"]["storage"] > 0
    assert figures["compiles_after_warmup"] == 0
    assert done.stderr.count("every token as without a cache") == 1
    assert any((tmp_path / "storage" / "values").glob("*/*"))


def test_an_error_is_shown_with_the_number_of_its_process():
    done = serve("--trace", "nowhere.jsonl")
    assert done.returncode == 1
    assert "exit codes by process: 0: 1, 1: 1" in done.stderr
    assert "--- stderr of process 1\nerror: [Errno 2] No such file or directory: 'nowhere.jsonl'" in done.stderr
