"""The command of a suite of figures: options, measuring group by group, a table or JSON, and which goals are missed.

A suite has a name, a title, and groups of figures that are measured together, by name. Exit code 1 if a goal is missed,
2 if nothing could be measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.figure import Figure, figure
from benchmarks.measure import interpreter_us
from jaxcache.command_options import STDOUT, prepare_json, write_json
from jaxcache.launch import ProcessesFailed

CANNOT = 2
FILE_COLUMNS = 160
Measure = Callable[[], list[Figure]]


def suite_parser(name: str, help: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=help)
    parser.add_argument(
        "--json", metavar="FILE", help="the figures as JSON; - is standard output, instead of the table"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only groups of figures whose names begin like this")
    return parser


def run(name: str, title: str, groups: Callable[[], dict[str, Measure]], target: str | None) -> int:
    """Returns the exit code. groups: by name; target: of the option --json."""
    try:
        prepare_json(target)
        figures = measure(groups())
    except (ValueError, OSError, ProcessesFailed) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return CANNOT
    missed = [one for one in figures if one.met is False]
    report = {"suite": name, "missed": [one.name for one in missed]}
    if target != STDOUT:
        show(figures, title)
    write_json(target, report | {"figures": {one.name: one.as_json() for one in figures}})
    for one in missed:
        print(f"{name}: {one.name}: {one.goal} is missed: {one.measured:,.3f}", file=sys.stderr)
    return 1 if missed else 0


def measure(groups: dict[str, Measure]) -> list[Figure]:
    """Group by group; the progress bar is drawn in between, by nobody else: a thread would be measured too."""
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


def show(figures: list[Figure], title: str) -> None:
    table = Table(title=f"{title}: medians, ± the distance between the quartiles")
    table.add_column("operation / its floor")
    for heading in ("measured", "floor", "ratio", "goal"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("met")
    for one in figures:
        measured = f"{number(one.value)} ± {number(one.noise)} {one.unit}"
        floor, ratio = "", ""
        if one.floor is not None:
            floor, ratio = number(one.floor), f"{one.ratio:.2f} ± {one.ratio_noise:.2f}"
        met = {None: "", True: "yes", False: "[bold red]NO"}[one.met]
        table.add_row(one.meaning, measured, floor, ratio, str(one.goal or ""), met)
    console = Console()
    if not console.is_terminal:
        console.width = FILE_COLUMNS
    console.print(table)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.3g}"
