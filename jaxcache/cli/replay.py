"""python -m jaxcache replay TRACE...: what the cache would find in a trace, how fast, and how far from the optimum.

Traces are JSONL in the Mooncake schema (see jaxcache/replay/traces.py), plain or gzipped. No model runs and no page is
moved: the real core decides everything, and the table says what it found on each tier.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxcache.command_options import STDOUT, prepare_file, prepare_json, write_json

if TYPE_CHECKING:
    from rich.table import Table

    from jaxcache.replay.study import Curves, Occupancy

HELP = "replay traces of requests through the core: hits by tier, speed, and regret against the offline optimum"
ROWS = {
    "hit_rate": "hit rate",
    "optimum_hit_rate": "hit rate of the offline optimum",
    "infinite_hit_rate": "hit rate of an infinite cache",
    "requests_per_cpu_second": "requests per CPU second",
    "evictions": "pages evicted",
    "bytes_per_cached_token": "bytes per cached token",
    "too_long": "requests longer than the device",
    "block_stored_events": "events of pages stored",
    "block_removed_events": "events of pages removed",
}
TIERS = ("device", "host", "storage")
SHOWN_SKIPPED = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", nargs="+", type=Path, help="JSONL or JSONL.gz, replayed one after another")
    parser.add_argument("--page-tokens", type=positive, default=64)
    parser.add_argument("--device-tokens", type=positive, default=2_000_000, help="capacity of the device tier")
    parser.add_argument("--host-tokens", type=natural, default=0, help="0: no host tier")
    parser.add_argument("--storage-tokens", type=natural, default=0, help="0: no storage; needs a host tier")
    parser.add_argument("--policy", action="append", metavar="NAME", help="order of eviction; may be repeated")
    parser.add_argument("--all-policies", action="store_true")
    parser.add_argument("--components", default="full", metavar="full,window,state")
    parser.add_argument("--namespaces", type=positive, default=1, metavar="N", help="tenants that take turns")
    parser.add_argument("--include-outputs", action="store_true", help="also insert generated text")
    parser.add_argument("--events", action="store_true", help="note what comes and goes, as for a router")
    parser.add_argument("--requests", type=positive, metavar="N", help="only the first N of every trace")
    parser.add_argument("--strict", action="store_true", help="refuse malformed lines instead of skipping them")
    parser.add_argument("--json", metavar="FILE", help="the figures as JSON; - is standard output")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="hit rates from 1/8 to 4 times the device's capacity, and the tiers as they fill; also .svg, .pdf;"
        " some six times the work",
    )


def positive(text: str) -> int:
    number = natural(text)
    if not number:
        raise argparse.ArgumentTypeError("it must be at least 1")
    return number


def natural(text: str) -> int:
    """A whole number, also with a suffix: 2M, 512k."""
    factor = {"k": 1_000, "M": 1_000_000}.get(text[-1:], 1)
    digits = text[:-1] if factor > 1 else text
    if not digits.replace("_", "").isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number such as 500000, 512k or 2M")
    return int(digits) * factor


def run(args: argparse.Namespace) -> int:
    needed = ("rich", "matplotlib") if args.plot else ("rich",)
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        print(f"replay: {missing[0]} is missing: pip install 'jaxcache[cli]'", file=sys.stderr)
        return 1
    try:
        settings = make_settings(args)
        prepare_json(args.json)
        if args.plot:
            prepare_plot(args.plot)
        requests = read_all(args)
    except (ValueError, OSError) as error:
        print(f"replay: {error}", file=sys.stderr)
        return 1
    reports, curves, occupancy = measure(args, settings, requests)
    if args.json != STDOUT:
        show(reports, num_tiers=1 + bool(args.host_tokens) + bool(args.storage_tokens))
    write_json(args.json, reports[0] if len(reports) == 1 else reports)
    if curves is not None:  # last: whatever happens here, the figures are out
        from jaxcache.cli._replay_plot import draw

        draw(args.plot, [path.name for path in args.trace], settings[0], len(requests), curves, occupancy)
    return 0


def prepare_plot(path: Path) -> None:
    """Makes the folder. ValueError if the picture could not be written, before the long work begins."""
    from jaxcache.cli._replay_plot import check_format

    check_format(path)
    prepare_file("--plot", path)


def make_settings(args: argparse.Namespace) -> list[Any]:
    """One for every policy. ValueError for what does not exist or does not fit together."""
    from jaxcache.core.eviction import POLICIES
    from jaxcache.replay.replay import KINDS, Setting

    policies = sorted(POLICIES, key=lambda name: (name != "lru", name)) if args.all_policies else args.policy or ["lru"]
    components = tuple(args.components.split(","))
    for what, names, known in (("--policy", policies, POLICIES), ("--components", components, KINDS)):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"{what}: {unknown[0]!r} is none of {', '.join(sorted(known))}")
    twice = [name for name in components if components.count(name) > 1]
    if twice:
        raise ValueError(f"--components: {twice[0]!r} is named twice")
    if args.storage_tokens and not args.host_tokens:
        raise ValueError("--storage-tokens needs --host-tokens: pages reach storage through host memory")
    if args.device_tokens < args.page_tokens:
        raise ValueError(f"--device-tokens {args.device_tokens} is less than one page of {args.page_tokens} tokens")
    sizes = (args.page_tokens, args.device_tokens, args.host_tokens, args.storage_tokens)
    rest = (components, args.namespaces, args.include_outputs, args.events)
    return [Setting(*sizes, policy, *rest) for policy in dict.fromkeys(policies)]


def read_all(args: argparse.Namespace) -> list[Any]:
    skipped: list[str] = []
    requests = [request for path in args.trace for request in read(path, args, None if args.strict else skipped)]
    for message in skipped[:SHOWN_SKIPPED]:
        print(f"replay: skipped {message}", file=sys.stderr)
    if len(skipped) > SHOWN_SKIPPED:
        print(f"replay: skipped {len(skipped)} lines in all", file=sys.stderr)
    if not requests:
        raise ValueError(f"no request in {', '.join(map(str, args.trace))}")
    return requests


def read(path: Path, args: argparse.Namespace, skipped: list[str] | None) -> list[Any]:
    """One trace. What is no text, or no gzip to its end, is a ValueError that names the file."""
    from jaxcache.replay.traces import read_trace

    try:
        return read_trace(path, args.requests, skipped=skipped)
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def measure(
    args: argparse.Namespace, settings: list[Any], requests: list[Any]
) -> tuple[list[dict[str, Any]], Curves | None, Occupancy]:
    """All replays, one progress bar where somebody looks. Curves only for a plot; occupancy of the first setting."""
    from rich.console import Console
    from rich.progress import Progress

    from jaxcache.replay.study import Study, around

    varied = around(settings) if args.plot else []
    console = Console(stderr=True)
    with Progress(console=console, refresh_per_second=1, disable=not console.is_terminal) as progress:
        task = progress.add_task("")
        study = Study(requests, lambda label, num: progress.update(task, description=label, advance=num))
        progress.update(task, total=study.num_steps([*settings, *varied]))
        reports = study.reports(settings)
        curves = study.curves(varied) if varied else None
    return reports, curves, study.occupancies[settings[0]]


def show(reports: list[dict[str, Any]], num_tiers: int) -> None:
    """One run as a list, several as a table with a row for every policy."""
    from rich.console import Console

    first = reports[0]
    title = f"{first['requests']:,} requests, {first['prompt_tokens']:,} prompt tokens"
    tables = [list_of(reports[0], title)] if len(reports) == 1 else tables_of(reports, title, num_tiers)
    for table in tables:
        Console().print(table)


def list_of(report: dict[str, Any], title: str) -> Table:
    """Everything about one run."""
    from rich.table import Table

    table = Table(title=title)
    table.add_column("")
    table.add_column(report["policy"], justify="right")
    for name, label in ROWS.items():
        if name in report:
            table.add_row(label, cell(name, report[name]))
    for tier in TIERS:
        table.add_row(f"prompt tokens from {tier}", f"{report['hit_tokens'][tier]:,}")
    for percentile in ("p50", "p99", "max"):
        table.add_row(f"CPU us per request, {percentile}", f"{report['us_per_request'][percentile]:,.0f}")
    return table


def tables_of(reports: list[dict[str, Any]], title: str, num_tiers: int) -> list[Table]:
    """What policies differ in, in 80 columns; the bounds, which are the same for all, below. Events have their own."""
    first = reports[0]
    tiers = TIERS[:num_tiers] if num_tiers > 1 else ()
    table = slim_table(title, "policy", "hit\nrate", *tiers, "requests\n/ CPU s", "p99 us", "pages\nevicted")
    for report in reports:
        shares = [f"{report['hit_tokens'][tier] / report['prompt_tokens']:.2%}" for tier in tiers]
        speed = (f"{report['requests_per_cpu_second']:,.0f}", f"{report['us_per_request']['p99']:,.0f}")
        table.add_row(report["policy"], f"{report['hit_rate']:.2%}", *shares, *speed, f"{report['evictions']:,}")
    table.add_section()
    table.add_row("offline optimum", f"{first['optimum_hit_rate']:.2%}")
    table.add_row("infinite cache", f"{first['infinite_hit_rate']:.2%}")
    if first["too_long"]:
        table.caption = f"{ROWS['too_long']}: {first['too_long']:,}"
    if "block_stored_events" not in first:
        return [table]
    names = ("block_stored_events", "block_removed_events")
    events = slim_table(None, "policy", *(ROWS[name] for name in names))
    for report in reports:
        events.add_row(report["policy"], *(cell(name, report[name]) for name in names))
    return [table, events]


def slim_table(title: str | None, first: str, *others: str) -> Table:
    """Without edges: nothing is lost of the width."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def cell(name: str, value: float) -> str:
    if name.endswith("hit_rate"):
        return f"{value:.2%}"
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"
