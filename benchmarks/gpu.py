"""Measures the data plane on the first device: python -m benchmarks gpu [--json FILE] [--only NAME ...].

On a GPU a whole run writes benchmarks/results/<card>.json unless told otherwise; without one it runs in a small form,
and says so in the file. What has been measured is written to build/bench-gpu.json after every setting, so that a run
that is cut off leaves that.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from benchmarks import first_token, gpu_copies, page_copies

RESULTS = Path(__file__).parent / "results"
PARTIAL = Path("build", "bench-gpu.json")
SECTIONS = {"gpu_copies": gpu_copies.run, "first_token": first_token.run, "page_copies": page_copies.run}
AT_LEAST = {
    "gather_xla_of_copy": 0.85,
    "scatter_xla_of_copy": 0.85,
    "gather_pallas_of_copy": 0.85,
    "scatter_pallas_of_copy": 0.85,
    "backup_of_pinned": 0.85,
    "load_back_of_pinned": 0.85,
    "host_speedup": 5.0,
    "of_matmul": 0.25,
}
AT_MOST = {f"{name}_ratio": 1.1 for name in ("products", "passes", "products_ahead", "passes_ahead")}
NO_GOALS = ("pages_16_kib", "host_copies_64_kib", "first_token_2048")  # of which nothing is asked


def measured(names: list[str], is_gpu: bool) -> Iterator[tuple[str, dict[str, float]]]:
    for name in names:
        yield from SECTIONS[name](is_gpu)


def is_met(setting: str, figure: str, value: float) -> bool | None:
    """None: no goal."""
    if setting in NO_GOALS or (figure not in AT_LEAST and figure not in AT_MOST):
        return None
    return value >= AT_LEAST[figure] if figure in AT_LEAST else value <= AT_MOST[figure]


def table(settings: dict[str, dict[str, float]], is_gpu: bool) -> Table:
    shown = Table("setting", "figure", "measured", "goal", "met", title="Data plane")
    for setting, figures in settings.items():
        for figure, value in figures.items():
            met = is_met(setting, figure, value) if is_gpu else None
            goal = (
                f">= {AT_LEAST[figure]}" if figure in AT_LEAST else f"<= {AT_MOST[figure]}" if figure in AT_MOST else ""
            )
            said = "" if met is None else "yes" if met else "NO"
            shown.add_row(setting, figure, f"{value:,.3f}", goal if met is not None else "", said)
            setting = ""
    return shown


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the figures there; - is standard output")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="NAME", help=f"of {', '.join(SECTIONS)}")
    args = parser.parse_args(argv)
    device = jax.devices()[0]
    is_gpu = device.platform == "gpu"
    card = device.device_kind if is_gpu else "CPU, small form"
    is_result = is_gpu and not args.only
    file = args.json or str(RESULTS / f"{card_name(card)}.json" if is_result else PARTIAL)
    report: dict[str, Any] = {"card": card, "jax": jax.__version__, "date": time.strftime("%Y-%m-%d"), "settings": {}}
    console = Console(stderr=True)
    for setting, figures in measured(args.only or list(SECTIONS), is_gpu):
        report["settings"][setting] = figures
        console.print(f"{setting}: " + ", ".join(f"{name} {value:,.2f}" for name, value in figures.items()))
        write(PARTIAL, report)
    if file == "-":
        print(json.dumps(report, indent=2))
    else:
        write(Path(file), report)
        Console().print(table(report["settings"], is_gpu))
    if is_result and not args.json:
        make_page(console)
    missed = [
        f"{setting}.{figure}"
        for setting, figures in report["settings"].items()
        for figure, value in figures.items()
        if is_gpu and is_met(setting, figure, value) is False
    ]
    for name in missed:
        console.print(f"missed: {name}")
    return 1 if missed else 0


def make_page(console: Console) -> None:
    """The page about all cards, if this interpreter can draw."""
    try:
        results_page = importlib.import_module("benchmarks.results_page")
    except ImportError as error:
        console.print(f"no page was made ({error}); python -m benchmarks results makes it where matplotlib is")
    else:
        results_page.write()


def write(file: Path, report: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=2) + "\n")


def card_name(kind: str) -> str:
    """NVIDIA H100 80GB HBM3 -> h100."""
    words = [word for word in kind.lower().split() if word != "nvidia"]
    return words[0] if words else "gpu"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
