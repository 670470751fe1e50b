"""Plots of a benchmark's results, for light and for dark pages: shares with their targets, speed-ups over peers.

What tells things apart is place, shape and words; colour only helps. The colours are of Okabe and Ito's palette, which
people see apart whatever their eyes; all text has a contrast of at least 4.5 to what is behind it (WCAG 2, AA).
"""

import io
import re
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Theme:
    """Colours of a page."""

    page: str
    text: str
    faint: str
    grid: str
    good: str
    short: str


THEMES = {
    "light": Theme("#ffffff", "#1f2328", "#59636e", "#d1d9e0", "#0072b2", "#b04a00"),
    "dark": Theme("#0d1117", "#f0f6fc", "#9ea7b3", "#3d444d", "#56b4e9", "#e69f00"),
}

_LINE_IN = 0.215  # height of one line of text
_WIDTH_IN = 9.2
_AIM = re.compile(r"^≥ [\d.]+ ")
_TOP = 1.5  # shares beyond this are cut off at the edge, and say their value


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours as WCAG 2 defines it.

    >>> round(contrast("#ffffff", "#000000"), 1)
    21.0
    """
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    channels = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def write(result: Json, folder: Path) -> None:
    """Write every plot for every theme."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, theme in THEMES.items():
        for kind, draw in PLOTS.items():
            (folder / f"{kind}-{name}.svg").write_bytes(svg(draw, result, theme))


def svg(draw: Callable[[Json, Theme], Figure], result: Json, theme: Theme) -> bytes:
    """Draw a plot: the same results make the same bytes, and letters are outlines, so that all readers see the same."""
    settings: Any = {"svg.hashsalt": "benchmarks", "svg.fonttype": "path", "font.size": 9.5}
    file = io.BytesIO()
    with mpl.rc_context(settings):
        draw(result, theme).savefig(file, format="svg", metadata={"Date": None}, facecolor=theme.page)
    return file.getvalue()


# -- shares -------------------------------------------------------------------------------------------


def shares(result: Json, theme: Theme) -> Figure:
    """Draw each share that is aimed at: the median, the spread, the target."""
    found = [
        (row["name"], goal)
        for row in result["rows"]
        for goal in row["goals"]
        if goal["kind"] == "share" and goal["met"] is not None
    ]
    figure, ax = _canvas(len(found), theme)
    for place, (_, goal) in enumerate(found):
        low, middle, high = (min(goal[part], _TOP) for part in ("lowest", "median", "highest"))
        _mark(ax, place, (low, middle, high), theme, good=goal["met"], beyond=goal["median"] > _TOP)
        ax.plot([goal["least"]] * 2, [place - 0.38, place + 0.38], color=theme.text, linewidth=1.6)
        _beside(ax, f"{goal['median']:.2f}" + ("" if goal["met"] else "  missed"), place, theme)
    ax.set_xlim(0, _TOP)
    ax.set_yticks(range(len(found)), [f"{name}: {_AIM.sub('', goal['aim'])}" for name, goal in found])
    ax.axvline(1, color=theme.faint, linewidth=0.8, zorder=0)
    _label(ax, theme, "share reached; dot: median, line: lowest to highest round, upright: target, hollow: missed")
    return figure


# -- speed-ups ----------------------------------------------------------------------------------------


def speedups(result: Json, theme: Theme) -> Figure:
    """Draw how many times as fast as each peer the stream is, on a logarithmic scale."""
    lines = list(_peers(result))
    figure, ax = _canvas(len(lines), theme)
    for place, (_, values) in enumerate(lines):
        if not values:
            ax.axhline(place - 0.5, color=theme.grid, linewidth=0.8, zorder=0)
            continue
        low, middle, high = min(values), statistics.median(values), max(values)
        _mark(ax, place, (low, middle, high), theme, good=middle >= 1)
        _beside(
            ax, f"{middle:.2f}x" if middle < 2 else f"{middle:.1f}x" if middle < 20 else f"{middle:.0f}x", place, theme
        )
    ax.set_xscale("log")
    ax.set_yticks(range(len(lines)), [name for name, _ in lines])
    for tick, (_, values) in zip(ax.get_yticklabels(), lines, strict=True):
        tick.set_fontweight("normal" if values else "bold")
    ax.axvline(1, color=theme.faint, linewidth=1.2, zorder=0)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    _label(ax, theme, "throughput of the stream over the peer's (logarithmic); hollow, left of 1x: the peer is ahead")
    return figure


def _peers(result: Json) -> Iterator[tuple[str, list[float]]]:
    """Give a headline for each row with peers, without values, then a line for each of them."""
    for row in result["rows"]:
        peers = [contender["name"] for contender in row["contenders"] if contender["kind"] == "peer"]
        if not peers:
            continue
        stream = next(contender["name"] for contender in row["contenders"] if contender["kind"] == "stream")
        yield row["name"], []
        for peer in peers:
            yield peer.partition(" (")[0], [_rate(r[stream]) / _rate(r[peer]) for r in row["rounds"]]


def _rate(run: Json) -> float:
    return float(run["chunks"] / run["seconds"])


# -- what both share ----------------------------------------------------------------------------------


def _canvas(lines: int, theme: Theme) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH_IN, _LINE_IN * lines + 0.75), layout="constrained", facecolor=theme.page)
    ax = figure.subplots()
    ax.set_facecolor(theme.page)
    ax.set_ylim(lines - 0.4, -0.6)
    ax.grid(axis="x", color=theme.grid, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(axis="y", length=0, labelcolor=theme.text)
    ax.tick_params(axis="x", color=theme.grid, labelcolor=theme.faint, which="both")
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(theme.grid)
    return figure, ax


def _mark(
    ax: Axes, place: int, spread: tuple[float, float, float], theme: Theme, *, good: bool, beyond: bool = False
) -> None:
    """Draw a median on the line from the lowest to the highest value; an arrowhead where it lies beyond the edge."""
    low, middle, high = spread
    colour = theme.good if good else theme.short
    ax.plot([low, high], [place, place], color=colour, linewidth=2, solid_capstyle="round")
    filling = colour if good else theme.page
    marker = ">" if beyond else "o"
    ax.plot([middle], [place], marker, color=colour, markersize=6.5, markerfacecolor=filling, clip_on=False)


def _beside(ax: Axes, text: str, place: int, theme: Theme) -> None:
    """Write a value in a column right of the plot."""
    ax.annotate(
        text, (1, place), xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points",
        va="center", color=theme.text, annotation_clip=False,
    )  # fmt: skip


def _label(ax: Axes, theme: Theme, text: str) -> None:
    ax.set_xlabel(text, color=theme.faint, fontsize=8.5)


#: How to draw them, by the names of their files.
PLOTS = {"limit": shares, "peers": speedups}
