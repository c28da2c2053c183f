"""python -m jaxcache simulate: ranks of a mesh serve at random, in one thread and in virtual time, under faults.

Everything comes from the seed. If anything is wrong (ranks that differ, a page with other content than its tokens say,
something that is not given back), the exit code is 1, and the smallest input that was found to fail is printed together
with the command that repeats it; 2 for options that make no sense.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jaxcache.cli.doctor import mesh_option
from jaxcache.cli.replay import natural, positive
from jaxcache.command_options import STDOUT, prepare_json, write_json

if TYPE_CHECKING:
    from jaxcache.testing.simulation import Operation, Report, Settings
    from jaxcache.testing.simulation_failure import Failure

HELP = "serve at random on all ranks of a mesh at once, under faults of storage, and check everything (2 minutes)"
CANNOT = 2
SHOWN_OPERATIONS = 40
RARELY = (50_000, 20, 100)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def add(option: str, default: Any, metavar: str, help: str, type: Callable[[str], Any] = str) -> None:
        help += " (default: %(default)s)"
        parser.add_argument(option, default=default, metavar=metavar, help=help, type=type)

    add("--mesh", "2,2,2", "cp,tp,pp", "extents of the mesh; each of its coordinates is a rank", mesh_option)
    add("--steps", 50_000, "N", "of the serving loop", positive)
    add("--seed", 0, "N", "everything comes from it: the same seed gives the same run", natural)
    add("--faults", "all", "all|none|LIST", "of storage: some of lost,corrupt,torn,short,slow,stalled,refused")
    add("--components", "full,window,state", "LIST", "kinds of state: some of full,window,state")
    add("--check-every", 1000, "N", "steps between checks of all invariants; 0: only at the end", natural)
    add("--reduce-seconds", 60, "N", "to make a failing input smaller", natural)
    parser.add_argument(
        "--only",
        metavar="LIST",
        help="run only these operations of the schedule (their numbers, with commas), or none",
    )
    parser.add_argument("--json", metavar="FILE", help="the counts as JSON; - is standard output, instead of the table")


def run(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("rich") is None:
        print("simulate: rich is missing: pip install 'jaxcache[cli]'", file=sys.stderr)
        return CANNOT
    from jaxcache.testing.simulation import Report

    try:
        prepare_json(args.json)
        settings = make_settings(args)
        outcome = measure(settings, chosen(settings, args.only), args.reduce_seconds)
    except (ValueError, OSError) as error:
        print(f"simulate: {error}", file=sys.stderr)
        return CANNOT
    passed = isinstance(outcome, Report)
    write_json(args.json, of_report(settings, outcome) if passed else of_failure(outcome))
    if not passed:
        tell(outcome)
        return 1
    if args.json != STDOUT:
        show(settings, outcome)
    if outcome.missing:
        print(f"simulate: never happened: {', '.join(outcome.missing)}; more --steps help", file=sys.stderr)
    return 0


def make_settings(args: argparse.Namespace) -> Settings:
    """ValueError for what does not exist."""
    import random

    from jaxcache.testing.simulation import Settings, make_components
    from jaxcache.testing.storage_faults import fault_kinds

    try:
        faults = fault_kinds(args.faults)
    except ValueError as error:
        raise ValueError(f"--faults: {error}") from error
    components = tuple(args.components.split(","))
    try:
        make_components(random.Random(), components, page_tokens=4)
    except ValueError as error:
        raise ValueError(f"--components: {error}") from error
    return Settings(args.mesh, args.steps, args.seed, faults, components, args.check_every)


def chosen(settings: Settings, only: str | None) -> list[Operation]:
    """The operations of the schedule with these numbers. ValueError for a number that it does not have."""
    from jaxcache.testing.simulation import schedule

    operations = schedule(settings.seed, settings.num_steps)
    if only is None:
        return operations
    numbers = [] if only == "none" else only.split(",")
    wrong = [n for n in numbers if not n.isdecimal() or int(n) >= len(operations)]
    if wrong:
        raise ValueError(f"--only: {wrong[0]!r} is no number of an operation: there are {len(operations)}, from 0 on")
    return [operations[int(n)] for n in numbers]


def measure(settings: Settings, operations: list[Operation], reduce_seconds: int) -> Report | Failure:
    """The run, with a progress bar where somebody looks."""
    from rich.console import Console
    from rich.progress import Progress

    from jaxcache.testing.simulation_failure import simulate

    gc.set_threshold(*RARELY)  # a twentieth of the time would go into looking for cycles, of which there are few
    console = Console(stderr=True)
    with Progress(console=console, auto_refresh=False, disable=not console.is_terminal) as progress:
        task = progress.add_task("steps", total=settings.num_steps)
        return simulate(
            settings, operations, lambda num: progress.update(task, advance=num, refresh=True), reduce_seconds
        )


def of_settings(settings: Settings) -> dict[str, Any]:
    return {
        "mesh": list(settings.mesh),
        "steps": settings.num_steps,
        "seed": settings.seed,
        "components": list(settings.components),
        "faults": list(settings.faults),
    }


def of_report(settings: Settings, report: Report) -> dict[str, Any]:
    return {
        "passed": True,
        **of_settings(settings),
        "digest": f"{report.digest:#018x}",
        "rank_steps": report.num_rank_steps,
        "rank_steps_per_cpu_second": round(report.rank_steps_per_cpu_second, 1),
        "counts": report.counts,
        "fault_counts": report.faults,
    }


def of_failure(failure: Failure) -> dict[str, Any]:
    return {
        "passed": False,
        **of_settings(failure.settings),
        "step": failure.step,
        "error": f"{type(failure.error).__name__}: {failure.error}",
        "where": failure.where,
        "repeats": failure.repeats,
        "operations": [{"number": o.index, "step": o.step, "kind": o.kind} for o in failure.operations],
        "command": failure.command(),
    }


def tell(failure: Failure) -> None:
    """What failed, with what, and how to see it again."""
    error = f"{type(failure.error).__name__}: {failure.error}"
    print(f"simulate: step {failure.step}: {error} ({failure.where})", file=sys.stderr)
    if not failure.repeats:
        print("run once more, it passed: the run depends on more than its seed", file=sys.stderr)
    print(f"the smallest failing input that was found has {len(failure.operations)} operations:", file=sys.stderr)
    for operation in failure.operations[:SHOWN_OPERATIONS]:
        print(f"  {operation.index:>6}  step {operation.step:>6}  {operation.kind}", file=sys.stderr)
    if len(failure.operations) > SHOWN_OPERATIONS:
        print("  ...", file=sys.stderr)
    print(f"again: {failure.command()}", file=sys.stderr)


def show(settings: Settings, report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    cp, tp, pp = settings.mesh
    print(f"cp{cp} x tp{tp} x pp{pp}, {settings.num_steps:,} steps, seed {settings.seed}: all is well")
    table = Table()
    table.add_column("what happened")
    table.add_column("how often", justify="right")
    table.add_row("rank-steps", f"{report.num_rank_steps:,}")
    table.add_row("rank-steps per CPU second", f"{report.rank_steps_per_cpu_second:,.0f}")
    for name, count in report.counts.items():
        table.add_row(name.replace("_", " "), f"{count:,}")
    table.add_section()
    for name, count in report.faults.items():
        table.add_row(f"fault: {name}", f"{count:,}")
    Console().print(table)
