"""The suite of the agreement, python -m benchmarks agreement: what one exchange costs the serving thread.

    issue   pack what this rank saw, dispatch the program       before the model step
    read    take the answer, with caches that are cold          after it, one step later
    round   both, with nothing in between                       what it would cost to wait

Five storage transfers are live. In a step all processes say the same of them (as in 35 to 38 % of the reads with live
transfers in `simulate --mesh 2,2,2 --faults all`, where ranks are kept apart on purpose), or something else of one, or
of all five. Every mesh runs in processes of its own, started on this host, over cp x tp x pp = 2 x 2 x 2 CPU devices or
fewer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.figure import Figure, Goal, figure
from benchmarks.suite_command import Measure, run, suite_parser
from jaxcache.launch import Processes

TITLE = "The agreement, process 0"
READ_GOAL = Goal("value", "<=", 100)
FLEETS = ((1, 8), (2, 1), (2, 4), (4, 2))  # processes, devices of each
NUM_STEPS, WARMUP_STEPS = 450, 30
MODEL_MS = 5.0  # at least
TIMEOUT_S = 300.0
HELP = "measure the exchange of a step, in one process and in several, and say which goals are met"
ROOT = Path(__file__).parents[2]


def groups(only: Sequence[str] | None = None) -> dict[str, Measure]:
    """One for each fleet, or those whose names begin with one of `only`. ValueError: none begins with one of them."""
    everything = {f"agreement_{num}x{devices}": partial(fleet, num, devices) for num, devices in FLEETS}
    for name in only or ():
        if not any(group.startswith(name) for group in everything):
            raise ValueError(f"{name!r} is the beginning of none of {', '.join(everything)}")
    return {name: measure for name, measure in everything.items() if not only or name.startswith(tuple(only))}


def fleet(num_processes: int, num_devices: int) -> list[Figure]:
    program = ["-m", "benchmarks.agreement.rank", str(NUM_STEPS), str(WARMUP_STEPS), str(MODEL_MS)]
    with Processes(program, num_processes, num_devices, cwd=ROOT) as processes:
        printed = processes.check(TIMEOUT_S)[0].stdout
    measured = json.loads(printed.splitlines()[-1])  # libraries print, too
    name = f"{num_processes}x{num_devices}"
    where = f"{num_processes} x {num_devices} devices"
    reads = f"{where}: read after {min(measured['model_us']) / 1000:.1f} ms or more of model work"
    return [
        figure(f"agreement_issue_{name}", f"{where}: issue", measured["issue_us"]),
        figure(f"agreement_read_{name}", f"{reads}, none of 5 differs", measured["read_us"], goal=READ_GOAL),
        figure(f"agreement_read_one_{name}", f"{reads}, one of 5 differs", measured["read_one_us"], goal=READ_GOAL),
        figure(f"agreement_read_all_{name}", f"{reads}, all 5 differ", measured["read_all_us"], goal=READ_GOAL),
        figure(f"agreement_round_{name}", f"{where}: issue and read at once", measured["round_us"]),
        figure(f"agreement_here_{name}", f"{where}: the same where one process has the mesh", measured["local_us"]),
    ]


def main(argv: list[str]) -> int:
    args = suite_parser("agreement", HELP).parse_args(argv)
    return run("agreement", TITLE, lambda: groups(args.only), args.json)
