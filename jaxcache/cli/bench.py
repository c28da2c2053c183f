"""python -m jaxcache bench core: what every operation of the core takes, beside its floor and its goal.

A floor is what the operation cannot beat, measured in the same run: one comparison of the same bytes, or the smallest
tree that does the same lookups without any feature. Exit code 1 if a goal is missed, 2 if nothing could be measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from jaxcache.cli._output import STDOUT, prepare_json, write_json

HELP = "measure every operation of the core beside its floor of the same run, and say which goals are met (5 minutes)"
SUITES = ("core",)
CANNOT = 2
FILE_COLUMNS = 160


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument(
        "--json", metavar="FILE", help="the figures as JSON; - is standard output, instead of the table"
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help="JSONL or JSONL.gz to replay, not the bundled one")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only groups of figures whose names begin like this")


def run(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("rich") is None:
        print("bench: rich is missing: pip install 'jaxcache[cli]'", file=sys.stderr)
        return CANNOT
    try:
        prepare_json(args.json)
        figures = measure(args)
    except (ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return CANNOT
    missed = [figure for figure in figures if figure.met is False]
    report = {"suite": args.suite, "missed": [figure.name for figure in missed]}
    if args.json != STDOUT:
        show(figures)
    write_json(args.json, report | {"figures": {figure.name: figure.as_json() for figure in figures}})
    for figure in missed:
        print(f"bench: {figure.name}: {figure.goal} is missed: {figure.measured:,.3f}", file=sys.stderr)
    return 1 if missed else 0


def measure(args: argparse.Namespace) -> list[Any]:
    """Group by group; the progress bar is drawn in between, by nobody else: a thread would be measured too."""
    from dataclasses import replace

    from rich.console import Console
    from rich.progress import Progress

    from jaxcache.bench import core_suite
    from jaxcache.bench.figure import figure
    from jaxcache.bench.measure import interpreter_us

    workload = core_suite.WORKLOAD
    if args.trace is not None:
        workload = replace(workload, trace=args.trace)
    groups = core_suite.groups(workload, args.only)
    console = Console(stderr=True)
    figures, moods = [], []
    with Progress(console=console, auto_refresh=False, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(groups))
        for name, group in groups.items():
            progress.update(task, description=name, refresh=True)
            moods.append(interpreter_us())
            figures += group()
            progress.update(task, advance=1)
    return [figure("interpreter", "1,000 look-ups, between the groups: how steady the machine was", moods), *figures]


def show(figures: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="The core: medians, ± the distance between the quartiles")
    table.add_column("operation / its floor")
    for heading in ("measured", "floor", "ratio", "goal"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("met")
    for figure in figures:
        measured = f"{number(figure.value)} ± {number(figure.noise)} {figure.unit}"
        floor, ratio = "", ""
        if figure.floor is not None:
            floor, ratio = number(figure.floor), f"{figure.ratio:.2f} ± {figure.ratio_noise:.2f}"
        met = {None: "", True: "yes", False: "[bold red]NO"}[figure.met]
        table.add_row(figure.meaning, measured, floor, ratio, str(figure.goal or ""), met)
    console = Console()
    if not console.is_terminal:
        console.width = FILE_COLUMNS
    console.print(table)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.3g}"
