"""A table and a plot of the results of a benchmark, made from its JSON file alone.

python tests/benchmarks/figures.py bench-results/results.json
"""

import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, which people see apart whatever their eyes.
_LIMIT, _STREAM, _PEER = "#000000", "#0072B2", "#D55E00"

Json = Mapping[str, Any]


def rate(run: Json) -> float:
    """Chunks per second of one run."""
    return float(run["chunks"] / run["seconds"])


def rates(row: Json, contender: str) -> list[float]:
    """Chunks per second of one contender, round by round."""
    return [rate(round_[contender]) for round_ in row["rounds"]]


def relative(row: Json, contender: str) -> list[float]:
    """Throughput over that of the row's first contender, round by round."""
    first = rates(row, row["contenders"][0])
    return [mine / theirs for mine, theirs in zip(rates(row, contender), first, strict=True)]


def brief(row: Json) -> list[str]:
    """A row for the terminal."""
    lines = [f"\n{row['name']}: {row['work']}"]
    for name in row["contenders"]:
        values = rates(row, name)
        spread = f"{min(values):,.0f} - {max(values):,.0f}"
        lines.append(f"  {statistics.median(values):>12,.0f} chunks/s  {name}  [{spread}]")
    return lines + [f"  {_verdict(goal)}" for goal in row["goals"]]


def _verdict(goal: Json) -> str:
    return f"{'met   ' if goal['met'] else 'MISSED'} {goal['what']}: {_number(goal['median'])} [{_spread(goal)}]"


def _spread(goal: Json) -> str:
    return f"{_number(min(goal['values']))} - {_number(max(goal['values']))}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(result: Json) -> str:
    """All rows as a Markdown document."""
    machine, versions = result["machine"], result["versions"]
    lines = ["# Benchmarks", ""]
    lines.append(
        f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gib']} GiB, {machine['system']}; load "
        f"{machine['load_at_start']:.1f} before the start. Seed {result['seed']}, scale {result['scale']:g}, "
        f"{result['rounds']} rounds in which all contenders take turns, warm caches. Medians, in brackets the lowest "
        "and the highest round; ratios are taken within a round. A number of chunks behind a contender's name: it "
        "did an array of the same kind with so many chunks only, and its throughput is what it did in a second."
    )
    lines += ["", ", ".join(f"{name} {version}" for name, version in versions.items())]
    for row in result["rows"]:
        first = row["contenders"][0]
        lines += ["", f"## {row['name']}", "", row["work"], ""]
        lines += [f"| | chunks/s | µs a chunk | of {first} |", "|---|---:|---:|---:|"]
        for name in row["contenders"]:
            values, share = rates(row, name), relative(row, name)
            lines.append(
                f"| {name} | {statistics.median(values):,.0f} [{min(values):,.0f} - {max(values):,.0f}] "
                f"| {1e6 / statistics.median(values):,.1f} | {statistics.median(share):.3g} |"
            )
        lines += ["", "| goal | reached | |", "|---|---:|---|"]
        lines += [
            f"| {goal['what']} | {_number(goal['median'])} [{_spread(goal)}] | {'met' if goal['met'] else 'missed'} |"
            for goal in row["goals"]
        ]
    return "\n".join(lines) + "\n"


def plot(result: Json) -> Figure:
    """Draw one strip for each row: every contender's throughput over the first one's, on one logarithmic scale."""
    rows = result["rows"]
    heights = [len(row["contenders"]) + 1.0 for row in rows]
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 0.27 * sum(heights) + 0.8), layout="constrained")
        axes = figure.subplots(len(rows), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
        for ax, row in zip(axes, rows, strict=True):
            _strip(ax, row)
        axes[-1].set_xlabel(
            "throughput over the first of each row (logarithmic; lines from the lowest to the highest round)"
        )
    return figure


def _strip(ax: Axes, row: Json) -> None:
    names = row["contenders"]
    for place, name in enumerate(names):
        share = relative(row, name)
        middle = statistics.median(share)
        colour = _LIMIT if name == "limit" else _STREAM if _is_stream(name) else _PEER
        ax.plot([min(share), max(share)], [place, place], color=colour, linewidth=1.5, solid_capstyle="round")
        ax.plot([middle], [place], "o", color=colour, markersize=5)
        ax.annotate(
            f"{middle:.2g}",
            (max(share), place),
            (5, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    ax.axvline(1, color="#999999", linewidth=0.8, zorder=0)
    ax.set_xscale("log")
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", length=0)
    ax.set_title(row["name"], loc="left", fontsize=10, fontweight="bold")


def _is_stream(name: str) -> bool:
    return name.startswith(("stream", "ordered", "as completed")) or name.endswith("planned")


def write_all(source: Path) -> None:
    """Write the table and the plot beside the JSON file."""
    result = json.loads(source.read_text())
    source.with_suffix(".md").write_text(table(result))
    plot(result).savefig(source.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
