"""Runs the benchmarks and prints what they measured beside what is asked: python -m benchmarks [--json FILE].

Exit code 1 if a figure misses its goal. Ratios compare with something measured in the same run; see each module.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

MODULES = ("benchmarks.core", "benchmarks.host_copies")
GOALS = {
    "match_128k_ratio": ("<=", 2.0, "match of a cached 128k prompt / one startswith"),
    "evict_one_us": ("<=", 20.0, "microseconds to evict one of 100,000 nodes"),
    "replay_page16_ratio": (">=", 0.35, "requests per CPU second of the trace / stripped tree, page 16"),
    "replay_page64_ratio": (">=", 0.35, "the same, page 64"),
    "host_copies_ratio": ("<=", 2.0, "backup + load-back / memcpy of the same bytes, 64 KiB a page and rank"),
}


def met(name: str, value: float) -> bool:
    relation, goal, _ = GOALS[name]
    return value <= goal if relation == "<=" else value >= goal


def in_a_new_process(name: str) -> dict[str, float]:
    """A module's figures, untouched by the memory and threads of the module before."""
    done = subprocess.run([sys.executable, "-m", name], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def report(figures: dict[str, float]) -> Table:
    table = Table("figure", "measured", "goal", "", title="benchmarks")
    for name, value in figures.items():
        if name in GOALS:
            relation, goal, meaning = GOALS[name]
            table.add_row(meaning, f"{value:,.3f}", f"{relation} {goal}", "yes" if met(name, value) else "NO")
        else:
            table.add_row(name, f"{value:,.3f}", "", "")
    return table


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the figures there; - is standard output")
    args = parser.parse_args(argv)
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # for hosts without GPUs
    console = Console(stderr=args.json == "-")
    figures: dict[str, float] = {}
    for name in MODULES:
        console.print(f"{name} ...")  # no spinner: its thread would be measured too
        figures |= in_a_new_process(name)
    console.print(report(figures))
    text = json.dumps(figures, indent=2) + "\n"
    if args.json == "-":
        sys.stdout.write(text)
    elif args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(text)
    return 0 if all(met(name, figures[name]) for name in GOALS) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
