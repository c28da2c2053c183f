"""The suite of the core, python -m benchmarks core: match, split, insert, evict ... and replays.

A floor is what the operation cannot beat, measured in the same run: one comparison of the same bytes, or the smallest
tree that does the same lookups without any feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.core.evictions import evict_one, evict_one_beside_namespaces, evict_share
from benchmarks.core.matches import match, rematch
from benchmarks.core.operations import insert, split
from benchmarks.core.paths import path
from benchmarks.core.pauses import pauses
from benchmarks.core.replays import memory, replay_groups
from benchmarks.core.steps import steps
from benchmarks.core.workload import Workload
from benchmarks.measure import undisturbed
from benchmarks.suite_command import Measure, run, suite_parser
from jaxcache.replay.traces import read_trace

TITLE = "The core"
WORKLOAD = Workload()
NEED_TRACE = ("replay", "bytes", "pause")
HELP = "measure every operation of the core beside its floor of the same run, and say which goals are met (5 minutes)"


def groups(workload: Workload, only: Sequence[str] | None = None) -> dict[str, Measure]:
    """All groups in the order of the table, or those whose names begin with one of `only`.

    ValueError for a name that none begins with, and for a trace that is needed and cannot be read.
    """
    everything = {
        "match": match,
        "rematch": rematch,
        "split": split,
        "insert": insert,
        "path": path,
        "evict_one": evict_one,
        "evict_one_namespaces": evict_one_beside_namespaces,
        "evict_share": evict_share,
        "bytes": memory,
        "step": steps,
        "pause": pauses,
        **replay_groups(workload),
    }
    for name in only or ():
        if not any(group.startswith(name) for group in everything):
            raise ValueError(f"{name!r} is the beginning of none of {', '.join(everything)}")
    chosen = {group: measure for group, measure in everything.items() if not only or group.startswith(tuple(only))}
    if any(group.startswith(NEED_TRACE) for group in chosen):
        try:
            read_trace(workload.trace)
        except OSError as error:
            raise ValueError(f"{workload.trace}: {error.strerror}: name a trace with --trace") from error
    return {group: partial(undisturbed, partial(measure, workload)) for group, measure in chosen.items()}


def main(argv: list[str]) -> int:
    parser = suite_parser("core", HELP)
    parser.add_argument("--trace", type=Path, metavar="FILE", help="JSONL or JSONL.gz to replay, not the bundled one")
    args = parser.parse_args(argv)
    workload = WORKLOAD if args.trace is None else replace(WORKLOAD, trace=args.trace)
    return run("core", TITLE, lambda: groups(workload, args.only), args.json)
