"""The benchmarks: python -m benchmarks NAME [options]; NAME --help says which.

    core         every operation of the core beside its floor and its goal
    agreement    the exchange of a step, in one process and in several
    host_copies  backup and load-back on this host beside memcpy of the same bytes, as JSON
    overhead     what keeping pages costs a loop, at 0 to 75 % hits
    turns        what windows and states lose where turns end
    gpu          the data plane on the first device
    results      the page about what was measured on GPUs, made of benchmarks/results/*.json

Without a name: core, agreement and host_copies, each in a process of its own, untouched by the memory and threads of
the one before. Exit code 1 if a figure misses its goal.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MODULES = {  # of benchmarks, each with a `main`
    "core": "core.suite",
    "agreement": "agreement.suite",
    "host_copies": "host_copies",
    "overhead": "overhead",
    "turns": "turns",
    "gpu": "gpu",
    "results": "results_page",
}
GOALS = {
    "host_copies_ratio": (2.0, "backup + load-back / memcpy of the same bytes, 64 KiB a page and rank"),
    "host_copies_list_of_64_parts_of_128kib": (1.3, "pools that are lists of 64 arrays / one array, 8 MiB a page"),
}


def suite(name: str, shown: Any) -> tuple[dict[str, Any], bool]:
    """(report, whether all goals are met); its table goes to `shown`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "suite.json")
        done = subprocess.run([sys.executable, "-m", "benchmarks", name, "--json", str(file)], stdout=shown)
        if done.returncode not in (0, 1):
            raise SystemExit(done.returncode)
        return json.loads(file.read_text()), not done.returncode


def host_copies(console: Console) -> tuple[dict[str, float], bool]:
    done = subprocess.run([sys.executable, "-m", "benchmarks", "host_copies"], stdout=subprocess.PIPE, check=True)
    figures = json.loads(done.stdout)
    table = Table("figure", "measured", "goal", "met", title="Host copies")
    for name, value in figures.items():
        bound, meaning = GOALS.get(name, (None, name))
        met = "" if bound is None else "yes" if value <= bound else "NO"
        table.add_row(meaning, f"{value:,.3f}", "" if bound is None else f"<= {bound}", met)
    console.print(table)
    return figures, all(figures[name] <= bound for name, (bound, _) in GOALS.items())


def main(argv: list[str]) -> int:
    if argv[:1] and argv[0] in MODULES:
        return importlib.import_module(f"benchmarks.{MODULES[argv[0]]}").main(argv[1:])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        usage="python -m benchmarks [-h] [--json FILE] | NAME [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there; - is standard output")
    args = parser.parse_args(argv)
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # for hosts without GPUs
    shown = sys.stderr if args.json == "-" else sys.stdout
    of_core, core_met = suite("core", shown)
    of_agreement, agreement_met = suite("agreement", shown)
    of_copies, copies_met = host_copies(Console(file=shown))
    text = json.dumps({"core": of_core, "agreement": of_agreement, "host_copies": of_copies}, indent=2) + "\n"
    if args.json == "-":
        sys.stdout.write(text)
    elif args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(text)
    return 0 if core_met and agreement_met and copies_met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
