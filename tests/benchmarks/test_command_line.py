"""`python -m benchmarks`: every benchmark has a name, which the help lists."""

from __future__ import annotations

import importlib

import pytest

from benchmarks.__main__ import MODULES, main


def test_the_help_lists_every_benchmark(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("    ")] == list(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_every_benchmark_has_a_main(name):
    assert callable(importlib.import_module(f"benchmarks.{MODULES[name]}").main)


def test_a_name_that_there_is_not_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["moon"])
    assert "moon" in capsys.readouterr().err
