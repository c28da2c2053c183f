"""python -m jaxcache bench core|agreement: what every operation takes, beside its floor and its goal.

core: match, split, insert, evict ... and replays. agreement: the exchange of a step, in one process and in several.
A floor is what the operation cannot beat, measured in the same run: one comparison of the same bytes, or the smallest
tree that does the same lookups without any feature. Exit code 1 if a goal is missed, 2 if nothing could be measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from jaxcache.command_options import STDOUT, prepare_json, write_json
from jaxcache.launch import ProcessesFailed

HELP = "measure every operation beside its floor of the same run, and say which goals are met (core: 5 minutes)"
SUITES = ("core", "agreement")
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
    except (ValueError, OSError, ProcessesFailed) as error:
        print(f"bench: {error}", file=sys.stderr)
        return CANNOT
    missed = [figure for figure in figures if figure.met is False]
    report = {"suite": args.suite, "missed": [figure.name for figure in missed]}
    if args.json != STDOUT:
        show(figures, title(args.suite))
    write_json(args.json, report | {"figures": {figure.name: figure.as_json() for figure in figures}})
    for figure in missed:
        print(f"bench: {figure.name}: {figure.goal} is missed: {figure.measured:,.3f}", file=sys.stderr)
    return 1 if missed else 0


def measure(args: argparse.Namespace) -> list[Any]:
    """Group by group; the progress bar is drawn in between, by nobody else: a thread would be measured too."""
    from rich.console import Console
    from rich.progress import Progress

    from benchmarks.figure import figure
    from benchmarks.measure import interpreter_us

    groups = groups_of(args)
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


def groups_of(args: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import replace

    from benchmarks.agreement import suite as agreement_suite
    from benchmarks.core import suite as core_suite

    if args.suite == "agreement":
        if args.trace is not None:
            raise ValueError("--trace is for the suite core")
        return agreement_suite.groups(args.only)
    workload = core_suite.WORKLOAD
    return core_suite.groups(workload if args.trace is None else replace(workload, trace=args.trace), args.only)


def title(suite: str) -> str:
    from benchmarks.agreement import suite as agreement_suite
    from benchmarks.core import suite as core_suite

    return {"core": core_suite, "agreement": agreement_suite}[suite].TITLE


def show(figures: list[Any], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{title}: medians, ± the distance between the quartiles")
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
