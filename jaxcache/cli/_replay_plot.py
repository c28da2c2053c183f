"""The picture of `replay --plot`: hit rates by capacity on the left, the tiers as they fill on the right.

Needs matplotlib, and leaves its global state alone: no pyplot, a canvas of its own. Draws what it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from jaxcache.replay.replay import Setting
from jaxcache.replay.study import BASELINE, Curves, Occupancy

INCHES = (13, 6.2)
DPI = 120
MAX_NAMES = 3  # of traces in the title
MARKERS = "osD^vP*Xph<>"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f3fbf", "#5f7f00", "#444444")
TIER_COLORS = {"device": "#0072b2", "host": "#d55e00", "storage": "#009e73"}
LOG_FROM = 8  # times the smallest tier: from there on tiers would not be told apart on a linear axis
KNOWN = ".png, .svg or .pdf"


def check_format(path: Path) -> None:
    """ValueError for a suffix that matplotlib cannot write here."""
    try:
        Figure((1, 1)).savefig(BytesIO(), format=path.suffix.removeprefix(".") or "none")
    except (ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"--plot: cannot write {path.name!r}; use a suffix such as {KNOWN} ({error})") from error


def draw(
    path: Path, traces: Sequence[str], setting: Setting, num_requests: int, curves: Curves, occupancy: Occupancy
) -> None:
    """Writes the picture, in the format of the suffix. occupancy: of `setting`."""
    figure = Figure(INCHES, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(6, 5))
    figure.suptitle(title(traces, setting, num_requests), fontsize=12)
    draw_curves(left, curves, setting)
    draw_occupancy(right, occupancy, setting)
    figure.savefig(path)


def title(traces: Sequence[str], setting: Setting, num_requests: int) -> str:
    names = ", ".join(traces[:MAX_NAMES]) + (f" and {len(traces) - MAX_NAMES} more" if traces[MAX_NAMES:] else "")
    what = "component" if len(setting.components) == 1 else "components"
    parts = [
        f"{num_requests:,} requests",
        f"pages of {setting.page_tokens} tokens",
        f"{what} {', '.join(setting.components)}",
    ]
    if setting.num_namespaces > 1:
        parts.append(f"{setting.num_namespaces} namespaces")
    if setting.include_outputs:
        parts.append("outputs")
    return f"{names}\n{'; '.join(parts)}"


def draw_curves(axes: Axes, curves: Curves, setting: Setting) -> None:
    """Policies from the best to the worst at the capacity that was asked for; those that are equal are one line."""
    capacities = curves.capacities
    axes.axhline(curves.infinite, color="black", linestyle="--", linewidth=1.2, label="infinite cache")
    axes.plot(capacities, curves.optimum, color="black", linewidth=2, marker=".", label="offline optimum")
    here = capacities.index(setting.device_tokens)
    styles = dict(zip(curves.policies, zip(COLORS * 2, MARKERS * 2, strict=False), strict=False))
    lines = same_lines(curves.policies)
    for names in sorted(lines, key=lambda names: -curves.policies[names[0]][here]):
        color, marker = styles[names[0]]
        width, front = (2.4, 4) if BASELINE in names else (1.3, 3)
        rates = curves.policies[names[0]]
        axes.plot(
            capacities, rates, color=color, marker=marker, markersize=5, linewidth=width, zorder=front,
            label=", ".join(names),
        )  # fmt: skip
    axes.axvline(
        setting.device_tokens, color="gray", linestyle=":", label=f"asked for, {tokens(setting.device_tokens)}"
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(capacities))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens(value)))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylim(0, max(curves.infinite * 1.08, 0.01))
    axes.set_xlabel("capacity of the device [tokens]")
    where = "any tier" if setting.host_tokens else "the device"
    axes.set_ylabel(f"prompt tokens found on {where} [%]")
    axes.set_title(f"Hit rate by capacity of the device{other_tiers(setting)}", fontsize=11)
    axes.grid(alpha=0.3)
    legend_below(axes, num_columns=4)


def legend_below(axes: Axes, num_columns: int) -> None:
    """Where it hides nothing."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=num_columns, fontsize=9, frameon=False)


def same_lines(policies: dict[str, list[float]]) -> list[list[str]]:
    """Names of policies with equal hit rates together, in order."""
    lines: dict[tuple[float, ...], list[str]] = {}
    for name, rates in policies.items():
        lines.setdefault(tuple(rates), []).append(name)
    return list(lines.values())


def other_tiers(setting: Setting) -> str:
    sizes = {"host": setting.host_tokens, "storage": setting.storage_tokens}
    return "".join(f", {tier} {tokens(size)}" for tier, size in sizes.items() if size)


def draw_occupancy(axes: Axes, occupancy: Occupancy, setting: Setting) -> None:
    capacities = occupancy.capacity
    for tier, capacity in capacities.items():
        color = TIER_COLORS[tier]  # of both lines: the dashed one stays visible on a tier that is full
        axes.plot(
            occupancy.served,
            occupancy.tokens[tier],
            color=color,
            alpha=0.6,
            linewidth=3,
            label=tier_label(tier, setting),
        )
        label = f"capacity of {tier}, {tokens(capacity)}"
        axes.axhline(capacity, color=color, linestyle="--", linewidth=1.2, zorder=3, label=label)
    if max(capacities.values()) >= LOG_FROM * min(capacities.values()):
        axes.set_yscale("log", nonpositive="mask")
    else:
        axes.set_ylim(0, max(capacities.values()) * 1.08)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens(value)))
    axes.set_xlim(0, occupancy.served[-1])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("requests served")
    axes.set_ylabel("resident [tokens]")
    axes.set_title(f"Tiers as they fill, policy {setting.policy}", fontsize=11)
    axes.grid(alpha=0.3)
    legend_below(axes, num_columns=2)


def tier_label(tier: str, setting: Setting) -> str:
    """Which pages are counted (see Replay.resident_tokens)."""
    if len(setting.components) == 1:
        return tier
    counted = "full" if "full" in setting.components else setting.components[0]
    return f"{tier}, pages of all components" if tier == "storage" else f"{tier}, pages of {counted}"


def tokens(count: float) -> str:
    """2000000 -> 2M, 31250 -> 31.2k; whole pages of almost a million tokens -> 1M."""
    for unit, factor in (("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * factor:
            return f"{count / factor:.3g}{unit}"
    return f"{count:g}"
