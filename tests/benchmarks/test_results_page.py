"""The page about measured cards says what the files beside it say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu, results_page

SETTINGS = {
    "host_copies_64_kib": dict.fromkeys(("backup_gb_per_s", "pinned_down_gb_per_s", "backup_of_pinned"), 1.0),
    "host_copies_256_kib": {"backup_gb_per_s": 2.0, "pinned_down_gb_per_s": 4.0, "backup_of_pinned": 0.5},
    "first_token_8192": {f"{name}_ms": 3.0 for name in results_page.SOURCES} | {"of_matmul": 0.3},
}
REPORT = {"card": "NVIDIA X1", "jax": "1.2", "date": "2026-01-02", "settings": SETTINGS}


def test_the_page_is_what_its_files_say():
    """Run `python -m benchmarks results` after a file has changed."""
    assert results_page.PAGE.read_text() == results_page.page(results_page.reports())


def test_a_missed_goal_shows():
    page = results_page.page({"x1": REPORT})
    assert "0.5 NO, >= 0.85" in page
    assert page.count("NO,") == 1  # nothing is asked of small pages
    assert "| first_token_8192 | 3 | 3 | 3 | 3 | 0.3 |" in page


@pytest.mark.parametrize("names", [list(SETTINGS), ["first_token_8192"], []], ids=["all", "one", "none"])
def test_a_picture_for_what_was_measured(tmp_path: Path, names):
    settings = {name: SETTINGS[name] | {"load_back_gb_per_s": 1.0, "pinned_up_gb_per_s": 1.0} for name in names}
    (tmp_path / "x1.json").write_text(json.dumps({**REPORT, "settings": settings}))
    results_page.write(tmp_path)
    assert (tmp_path / "README.md").exists()
    assert (tmp_path / "x1.png").exists() == bool(names)


@pytest.mark.slow
def test_the_whole_run_in_its_small_form(tmp_path: Path):
    """Every section measures something, and ends in a file."""
    file = tmp_path / "figures.json"
    assert gpu.main(["--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["card"] == "CPU, small form"
    assert {name.rstrip("0123456789") for name in report["settings"]} >= {"first_token_", "device_copy"}
    assert report["settings"]["first_token_256"]["host_ms"] > 0
