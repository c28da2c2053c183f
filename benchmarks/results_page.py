"""The page about measured cards, and its pictures, made of benchmarks/results/*.json: python -m benchmarks results."""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import first_token, gpu_copies, page_copies
from benchmarks.gpu import AT_LEAST, AT_MOST, RESULTS, is_met

PAGE = RESULTS / "README.md"
SOURCES = {"recompute": "#444444", "device": "#0072b2", "host": "#d55e00", "storage": "#009e73"}
HOST_COPIES, FIRST_TOKEN = "host_copies_", "first_token_"
MEANINGS = (gpu_copies, page_copies, first_token)
Report = dict[str, Any]

HEAD = """# Measured on GPUs

Made by `python -m benchmarks results` from the files beside it, which `make gpu` writes. One card each, one run; ratios
compare what was timed by turns in that run. "NO" marks a goal that is missed, and says the goal.
"""


def reports(folder: Path = RESULTS) -> dict[str, Report]:
    """By the name of the file, without its suffix."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}


def page(cards: dict[str, Report]) -> str:
    """Markdown."""
    parts = [HEAD]
    for name, report in cards.items():
        parts.append(f"## {report['card']}\n\njax {report['jax']}, {report['date']}\n")
        if has_picture(report):
            parts.append(f"![copies and times to first token]({name}.png)\n")
        for names in _alike(report["settings"]):
            columns = list(report["settings"][names[0]])
            rows = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
            for name_of_setting in names:
                figures = report["settings"][name_of_setting]
                cells = [_cell(name_of_setting, column, figures[column]) for column in columns]
                rows.append(f"| {name_of_setting} | {' | '.join(cells)} |")
            parts.append("\n".join(rows) + "\n")
    parts.append("## What was measured\n")
    parts += [f"```\n{(module.__doc__ or '').strip()}\n```\n" for module in MEANINGS]
    return "\n".join(parts)


def _alike(settings: dict[str, dict[str, float]]) -> list[list[str]]:
    """Names of settings that follow each other and have the same figures."""
    return [list(names) for _, names in itertools.groupby(settings, key=lambda name: tuple(settings[name]))]


def _cell(setting: str, figure: str, value: float) -> str:
    if is_met(setting, figure, value) is not False:
        return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
    goal = f">= {AT_LEAST[figure]}" if figure in AT_LEAST else f"<= {AT_MOST[figure]}"
    return f"{value:,.4g} NO, {goal}"


def has_picture(report: Report) -> bool:
    return any(name.startswith((HOST_COPIES, FIRST_TOKEN)) for name in report["settings"])


def draw(report: Report, file: Path) -> None:
    """Host copies by the size of pages on the left, times to first token on the right."""
    figure = Figure((12, 4.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    figure.suptitle(report["card"])
    _draw_copies(left, _by_number(report, HOST_COPIES))
    _draw_first_token(right, _by_number(report, FIRST_TOKEN))
    figure.savefig(file)


def _by_number(report: Report, prefix: str) -> dict[int, dict[str, float]]:
    """Settings named `prefix` and a number, by that number."""
    found = {name: figures for name, figures in report["settings"].items() if name.startswith(prefix)}
    return dict(sorted((int(name.removeprefix(prefix).split("_")[0]), figures) for name, figures in found.items()))


def _draw_copies(axes: Axes, settings: dict[int, dict[str, float]]) -> None:
    axes.set(xlabel="page on a rank, KiB", ylabel="GB/s", title="Backup and load-back beside pinned copies")
    if not settings:
        _not_measured(axes)
        return
    for name, style in (("backup", "o-"), ("pinned_down", "o--"), ("load_back", "s-"), ("pinned_up", "s--")):
        values = [figures[f"{name}_gb_per_s"] for figures in settings.values()]
        axes.plot(list(settings), values, style, label=name.replace("_", " "))
    axes.set_ylim(0, None)
    axes.set_xscale("log", base=4)
    axes.set_xticks(list(settings), [f"{n:,}" for n in settings])
    axes.legend()


def _draw_first_token(axes: Axes, settings: dict[int, dict[str, float]]) -> None:
    axes.set(ylabel="ms", xlabel="prompt tokens", title="Time to first token, by where the prompt is")
    if not settings:
        _not_measured(axes)
        return
    width = 0.8 / len(SOURCES)
    for i, (name, color) in enumerate(SOURCES.items()):
        places = [place + i * width for place in range(len(settings))]
        axes.bar(places, [figures[f"{name}_ms"] for figures in settings.values()], width, color=color, label=name)
    axes.set_yscale("log")
    axes.set_xticks([place + 1.5 * width for place in range(len(settings))], [f"{n:,}" for n in settings])
    axes.legend()


def _not_measured(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, "not measured on this card", ha="center", transform=axes.transAxes)


def write(folder: Path = RESULTS) -> None:
    """The page, and a picture of each card that has something to draw."""
    cards = reports(folder)
    (folder / PAGE.name).write_text(page(cards))
    for name, report in cards.items():
        if has_picture(report):
            draw(report, folder / f"{name}.png")


def main(argv: list[str]) -> int:
    description = "make the page about measured cards, and its pictures, of benchmarks/results/*.json"
    argparse.ArgumentParser(prog="python -m benchmarks results", description=description).parse_args(argv)
    write()
    print(f"wrote {PAGE}")
    return 0
