"""python -m jaxcache replay TRACE...: what the cache would find in a trace, how fast, and how far from the optimum.

Traces are JSONL in the Mooncake schema (see jaxcache/testing/traces.py), plain or gzipped. No model runs and no page is
moved: the real core decides everything, and the table says what it found on each tier.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

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
    if importlib.util.find_spec("rich") is None:
        print("replay: rich is missing: pip install 'jaxcache[cli]'", file=sys.stderr)
        return 1
    try:
        settings = make_settings(args)
        requests = read_all(args)
    except (ValueError, OSError) as error:
        print(f"replay: {error}", file=sys.stderr)
        return 1
    reports = [replay(setting, requests) for setting in settings]
    text = json.dumps(reports[0] if len(reports) == 1 else reports, indent=2) + "\n"
    if args.json == "-":
        sys.stdout.write(text)
    else:
        show(reports)
        if args.json:
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)
            Path(args.json).write_text(text)
    return 0


def make_settings(args: argparse.Namespace) -> list[Any]:
    """One for every policy. ValueError for what does not exist or does not fit together."""
    from jaxcache.core.eviction import POLICIES
    from jaxcache.testing.replay import KINDS, Setting

    policies = list(POLICIES) if args.all_policies else args.policy or ["lru"]
    components = tuple(args.components.split(","))
    for what, names, known in (("--policy", policies, POLICIES), ("--components", components, KINDS)):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"{what}: {unknown[0]!r} is none of {', '.join(sorted(known))}")
    if args.storage_tokens and not args.host_tokens:
        raise ValueError("--storage-tokens needs --host-tokens: pages reach storage through host memory")
    if args.device_tokens < args.page_tokens:
        raise ValueError(f"--device-tokens {args.device_tokens} is less than one page of {args.page_tokens} tokens")
    sizes = (args.page_tokens, args.device_tokens, args.host_tokens, args.storage_tokens)
    rest = (components, args.namespaces, args.include_outputs, args.events)
    return [Setting(*sizes, policy, *rest) for policy in policies]


def read_all(args: argparse.Namespace) -> list[Any]:
    from jaxcache.testing.traces import read_trace

    skipped: list[str] = []
    requests = [
        request
        for path in args.trace
        for request in read_trace(path, args.requests, skipped=None if args.strict else skipped)
    ]
    for message in skipped[:SHOWN_SKIPPED]:
        print(f"replay: skipped {message}", file=sys.stderr)
    if len(skipped) > SHOWN_SKIPPED:
        print(f"replay: skipped {len(skipped)} lines in all", file=sys.stderr)
    return requests


def replay(setting: Any, requests: list[Any]) -> dict[str, Any]:
    """One run, with a progress bar where somebody looks."""
    from rich.console import Console
    from rich.progress import track

    from jaxcache.testing.replay import Replay, add_optimum

    run = Replay(setting)
    console = Console(stderr=True)
    label = f"{setting.policy}, {setting.device_tokens:,} tokens"
    for request in track(requests, label, console=console, update_period=1.0, disable=not console.is_terminal):
        run.request(request)
    report = {"policy": setting.policy, **run.report()}
    add_optimum(report, setting, requests)
    return report


def show(reports: list[dict[str, Any]]) -> None:
    """A column for every policy."""
    from rich.console import Console
    from rich.table import Table

    first = reports[0]
    table = Table(title=f"{first['requests']:,} requests, {first['prompt_tokens']:,} prompt tokens")
    table.add_column("")
    for report in reports:
        table.add_column(report["policy"], justify="right")
    for name, label in ROWS.items():
        if name in first:
            table.add_row(label, *(cell(name, report[name]) for report in reports))
    for tier in ("device", "host", "storage"):
        table.add_row(f"prompt tokens from {tier}", *(f"{report['hit_tokens'][tier]:,}" for report in reports))
    for percentile in ("p50", "p99", "max"):
        values = [report["us_per_request"][percentile] for report in reports]
        table.add_row(f"CPU us per request, {percentile}", *(f"{value:,.0f}" for value in values))
    Console().print(table)


def cell(name: str, value: float) -> str:
    if name.endswith("hit_rate"):
        return f"{value:.2%}"
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"
