"""Small pictures as inline SVG: text without scripts, fonts or anything from elsewhere.

Colours are written into the shapes for a light ground, so that they survive where style sheets are dropped; classes let
the style sheet of a page choose others on a dark one. Each picture names itself for those who don't see it.
"""

from __future__ import annotations

import html
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from zarr_dask_stream.watch.chunkmap import COLOURS, OUTSIDE, STATES, Picture

__all__ = [
    "INK",
    "PHASE_COLOURS",
    "Band",
    "histograms",
    "legend",
    "line_chart",
    "map_chart",
    "nice_axis",
    "phase_legend",
    "sparkline",
    "split_bar",
    "state_name",
    "style",
]

INK = {
    "light": {
        "ground": "#ffffff", "card": "#f6f7f9", "ink": "#14171c", "quiet": "#565d68", "line": "#868d98",
        "grid": "#dfe3e8", "accent": "#0b62b8", "bad": "#7a0012", "warn": "#8a5300",
    },
    "dark": {
        "ground": "#14171c", "card": "#1d2128", "ink": "#eef1f5", "quiet": "#a9b1bd", "line": "#757d8a",
        "grid": "#343a44", "accent": "#4ea1ff", "bad": "#ff7a7a", "warn": "#ffb83d",
    },
}  # fmt: skip
"""Colours of everything but states and phases: text at 4.5:1 or more on ground and card, lines at 3:1."""

# Light and dark, at least 3:1 against ground and card.
PHASE_COLOURS: dict[str, tuple[str, str]] = {
    "schedule": ("#6b7280", "#9aa3b0"),
    "fetch": ("#0b62b8", "#4ea1ff"),
    "decode": ("#7a3fa0", "#c792ea"),
    "compute": ("#1f7a5c", "#3fbf8f"),
    "transfer": ("#b2560a", "#ff9e57"),
    "consumer": ("#a1276b", "#ff7eb6"),
}

_MAP_WIDTH, _MAP_HEIGHT = 940.0, 480.0
_LARGEST_CELL, _GAP = 28.0, 0.12
_LARGE_TITLES = 2000  # as many parts of a map have a text of their own
_LEVELS = 4  # steps in which a cell fills up
_FONT = 'font-family="system-ui, sans-serif"'

_Floats = npt.NDArray[np.float64]


def state_name(code: int) -> str:
    """Return the name of a state by its code, "outside" for the one beyond them."""
    return (*STATES, "outside")[code]


def style(scope: str) -> str:
    """Return the rules that give pictures within `scope` (a selector) their colours, light and dark.

    They follow the system, except within JupyterLab, which says itself whether it is dark.
    """
    light = _variables("light", 0)
    dark = _variables("dark", 1)
    rules = [
        f"{scope}{{{light}color-scheme:light}}",
        f"@media (prefers-color-scheme:dark){{{scope}{{{dark}color-scheme:dark}}}}",
        f'[data-jp-theme-light="true"] {scope}{{{light}color-scheme:light}}',
        f'[data-jp-theme-light="false"] {scope}{{{dark}color-scheme:dark}}',
        f"@media print{{{scope}{{{light}color-scheme:light;print-color-adjust:exact}}}}",
    ]
    for name in (*INK["light"], *(f"s-{_slug(state)}" for state in STATES), *(f"p-{phase}" for phase in PHASE_COLOURS)):
        rules.append(f"{scope} .f-{name}{{fill:var(--{name});background-color:var(--{name})}}")
        rules.append(f"{scope} .l-{name}{{stroke:var(--{name})}}")
    return "".join(rules)


def _variables(scheme: str, place: int) -> str:
    named = {
        **INK[scheme],
        **{f"s-{_slug(state)}": colour for state, colour in COLOURS[scheme].items()},
        **{f"p-{phase}": colours[place] for phase, colours in PHASE_COLOURS.items()},
    }
    return "".join(f"--{name}:{colour};" for name, colour in named.items())


def _slug(name: str) -> str:
    return name.replace(" ", "-")


def _fill(name: str, colour: str) -> str:
    return f'class="f-{name}" fill="{colour}"'


def _stroke(name: str, colour: str, width: float) -> str:
    return f'class="l-{name}" stroke="{colour}" stroke-width="{width:g}" fill="none"'


def _state_fill(code: int) -> str:
    return _fill(f"s-{_slug(STATES[code])}", COLOURS["light"][STATES[code]])


def _picture(
    width: float, height: float, title: str, body: Iterable[str], *, describe: str = "", kind: str = "own"
) -> str:
    mark = f"c{zlib.crc32(f'{title}{describe}{width}'.encode()):08x}"
    about = f'<desc id="{mark}d">{html.escape(describe)}</desc>' if describe else ""
    labels = f"{mark}t {mark}d" if describe else f"{mark}t"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'class="{kind}" aria-labelledby="{labels}" style="display:block;width:100%;max-width:{width:g}px;height:auto">'
        f'<title id="{mark}t">{html.escape(title)}</title>{about}{"".join(body)}</svg>'
    )


# -- the map ----------------------------------------------------------------------------------------


def map_chart(picture: Picture) -> str:
    """Draw a chunk map.

    Cells carry a sign besides their colour: a cross for dead, a ring for retried, a dot for in flight, an outline for
    missing and for planned. A cell of several chunks fills up from below as they end.

    Parameters
    ----------
    picture : Picture
        A chunk map at one moment.

    Returns
    -------
    str
        An ``svg`` element; a paragraph where the grid has no chunks.
    """
    rows, columns = picture.layout.shape
    if not rows * columns:
        return '<p class="quiet">The grid has no chunks.</p>'
    width, height = _cell_size(rows, columns, 1.4 if picture.layout.kind == "line" else 2.0)
    filling = np.where(picture.states == STATES.index("done"), (picture.done_share * _LEVELS).astype(np.int64), _LEVELS)
    looks = np.where(picture.states < OUTSIDE, picture.states.astype(np.int64) * (_LEVELS + 1) + filling, -1)
    runs = list(_runs(looks))
    gap = _gap(width, height)
    counts = ", ".join(f"{count:,} {state}" for state, count in picture.totals.items() if count)
    title = f"Chunk map, {rows} by {columns} cells"
    mark = f"m{zlib.crc32(np.ascontiguousarray(picture.states).tobytes() + repr(picture.layout).encode()):08x}"
    body = ["<defs>"]
    body += [_pattern(f"{mark}-{look}", look, width, height) for look in sorted({look for *_, look in runs})]
    body.append("</defs>")
    if len(runs) <= _LARGE_TITLES:
        for row, start, stop, look in runs:
            text = html.escape(_run_label(picture, row, start, stop))
            body.append(
                f'<rect x="{start * width:g}" y="{row * height:g}" width="{(stop - start) * width - gap:g}" '
                f'height="{height - gap:g}" fill="url(#{mark}-{look})"><title>{text}</title></rect>'
            )
    else:
        paths: dict[int, list[str]] = {}
        for row, start, stop, look in runs:
            w = (stop - start) * width - gap
            paths.setdefault(look, []).append(f"M{start * width:g} {row * height:g}h{w:g}v{height - gap:g}h{-w:g}z")
        body += [f'<path d="{"".join(d)}" fill="url(#{mark}-{look})"/>' for look, d in paths.items()]
    return _picture(columns * width, rows * height, title, body, describe=f"Chunks: {counts or 'none'}.")


def _cell_size(rows: int, columns: int, slender: float) -> tuple[float, float]:
    width = min(_MAP_WIDTH / columns, _LARGEST_CELL)
    height = min(_MAP_HEIGHT / rows, _LARGEST_CELL)
    width, height = min(width, 3 * height), min(height, slender * width)
    return round(width, 2), round(height, 2)


def _gap(width: float, height: float) -> float:
    return round(min(max(min(width, height) * _GAP, 0.4), 2.0), 2)


def _runs(looks: npt.NDArray[np.int64]) -> Iterable[tuple[int, int, int, int]]:
    """Walk neighbours in a row that look the same: row, first column, one past the last, look."""
    for row, line in enumerate(looks):
        edges = [0, *(np.flatnonzero(np.diff(line)) + 1).tolist(), len(line)]
        for start, stop in pairwise(edges):
            if line[start] >= 0:
                yield row, start, stop, int(line[start])


def _run_label(picture: Picture, row: int, start: int, stop: int) -> str:
    if stop - start == 1:
        return picture.label(row, start)
    first, last = picture.place(row, start), picture.place(row, stop - 1)
    held = picture.counts[row, start:stop].sum(axis=0)
    found = ", ".join(f"{held[state]:,} {STATES[state]}" for state in np.flatnonzero(held).tolist())
    return f"chunks {first} to {last}: {found}"


def _pattern(name: str, look: int, width: float, height: float) -> str:
    """One cell, repeated: what it is made of says its state without colour."""
    state, level = divmod(look, _LEVELS + 1)
    gap = _gap(width, height)
    w, h = width - gap, height - gap
    box = f'x="0" y="0" width="{w:g}" height="{h:g}" rx="{min(w, h) * 0.12:.2g}"'
    small = min(w, h) < 5
    parts = []
    named = STATES[state]
    line = min(max(min(w, h) * 0.14, 0.6), 2.0)
    inset = f'x="{line / 2:g}" y="{line / 2:g}" width="{w - line:g}" height="{h - line:g}" rx="{min(w, h) * 0.1:.2g}"'
    hollow = f"<rect {inset} {_stroke(f's-{_slug(named)}', COLOURS['light'][named], line)}/>"
    if named in ("planned", "missing"):
        parts.append(hollow if not (small and named == "missing") else f"<rect {box} {_state_fill(state)}/>")
        if named == "missing" and not small:
            parts.append(_strokes(f"M{w * 0.2:g} {h * 0.8:g}L{w * 0.8:g} {h * 0.2:g}", named, line))
    elif level < _LEVELS:
        part = max(level, 0.35) / _LEVELS * h
        parts.append(hollow)
        parts.append(f'<rect x="0" y="{h - part:g}" width="{w:g}" height="{part:g}" {_state_fill(state)}/>')
    else:
        parts.append(f"<rect {box} {_state_fill(state)}/>")
    if not small and level == _LEVELS:
        parts += _sign(named, w, h, line)
    return (
        f'<pattern id="{name}" patternUnits="userSpaceOnUse" width="{width:g}" height="{height:g}">'
        f"{''.join(parts)}</pattern>"
    )


def _strokes(path: str, state: str, width: float) -> str:
    return f'<path d="{path}" {_stroke(f"s-{_slug(state)}", COLOURS["light"][state], width)}/>'


def _sign(state: str, w: float, h: float, line: float) -> list[str]:
    ground = _stroke("ground", INK["light"]["ground"], line * 1.2)
    if state == "dead":
        a, b, c, d = w * 0.25, w * 0.75, h * 0.25, h * 0.75
        return [f'<path d="M{a:g} {c:g}L{b:g} {d:g}M{b:g} {c:g}L{a:g} {d:g}" {ground}/>']
    if state == "retried":
        return [f'<circle cx="{w / 2:g}" cy="{h / 2:g}" r="{min(w, h) * 0.24:g}" {ground}/>']
    if state == "in flight":
        dot = _fill("ground", INK["light"]["ground"])
        return [f'<circle cx="{w / 2:g}" cy="{h / 2:g}" r="{min(w, h) * 0.16:g}" {dot}/>']
    if state == "filtered":
        return [f'<path d="M{w * 0.25:g} {h / 2:g}H{w * 0.75:g}" {ground}/>']
    if state == "cancelled":
        return [f'<path d="M{w * 0.25:g} {h * 0.75:g}L{w * 0.75:g} {h * 0.25:g}" {ground}/>']
    return []


def legend(picture: Picture) -> str:
    """Return the states that a map holds, with their signs and counts, as a list."""
    items = []
    for state, count in picture.totals.items():
        if not count:
            continue
        look = STATES.index(state) * (_LEVELS + 1) + _LEVELS
        name = f"k{look}"
        items.append(
            f'<li><svg viewBox="0 0 16 16" width="16" height="16" aria-hidden="true"><defs>'
            f'{_pattern(name, look, 16, 16)}</defs><rect width="16" height="16" fill="url(#{name})"/></svg> '
            f"{state} <b>{count:,}</b></li>"
        )
    return f'<ul class="legend">{"".join(items)}</ul>' if items else ""


# -- over time --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Band:
    """One line of a chart: its name, its values, and whether the area below it is filled."""

    name: str
    values: Sequence[float]
    colour: str = "accent"
    area: bool = True


def line_chart(
    times: Sequence[float],
    bands: Sequence[Band],
    *,
    title: str,
    unit: Callable[[float], str],
    until: float,
    base: int = 1000,
    least: float = 0.0,
    bound: float = 0.0,
    bound_name: str = "",
) -> str:
    """Draw values over time.

    Parameters
    ----------
    times : sequence of float
        Seconds.
    bands : sequence of Band
        One value for each time.
    title : str
        What it shows, for those who don't see it too.
    unit : callable
        Turns a value into text.
    until : float
        End of the axis of time, seconds.
    base : int
        1024 where values are bytes: marks are round in KiB then.
    least : float
        Least step between two marks: 1 where values are counts.
    bound : float
        A limit to draw as a dashed line; 0 for none. One far above all values is not drawn.
    bound_name : str
        What the limit is called.

    Returns
    -------
    str
        An ``svg`` element.
    """
    width, height, left, bottom, top = 400.0, 172.0, 62.0, 24.0, 18.0
    most = max((max(band.values, default=0.0) for band in bands), default=0.0)
    drawn_bound = bound if 0 < bound <= 1.6 * most else 0.0
    ceiling, step = nice_axis(max(most, drawn_bound), base, least)
    end = max(until, times[-1] if len(times) else 0.0, 1e-9)

    def x(at: float) -> float:
        return left + (width - left - 8) * min(at / end, 1.0)

    def y(value: float) -> float:
        return height - bottom - (height - bottom - top) * (value / ceiling)

    body = []
    count = round(ceiling / step)
    for tick in range(count + 1):
        value = tick * step
        kind = _stroke("line" if tick == 0 else "grid", INK["light"]["line" if tick == 0 else "grid"], 1)
        body.append(f'<path d="M{left:g} {y(value):.1f}H{width - 8:g}" {kind}/>')
        body.append(_text(left - 6, y(value) + 4, unit(value), anchor="end"))
    body += [_text(x(at), height - 6, _clock(at), anchor="middle" if at else "start") for at in _time_ticks(end)]
    for band in bands:
        points = [(x(at), y(value)) for at, value in zip(times, band.values, strict=True)]
        if len(points) == 1:
            points = [(x(0.0), points[0][1]), (x(end), points[0][1])]
        elif points:
            points = [(x(0.0), points[0][1]), *points, (x(end), points[-1][1])]
        line = "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
        if band.area:
            area = f'<path d="M{x(0.0):.1f} {y(0):.1f}L{line}L{x(end):.1f} {y(0):.1f}z" fill-opacity="0.18" '
            body.append(area + _fill(band.colour, _ink(band.colour)) + "/>")
        body.append(f'<path d="M{line}" stroke-linejoin="round" {_stroke(band.colour, _ink(band.colour), 1.8)}/>')
    if drawn_bound:
        body.append(
            f'<path d="M{left:g} {y(drawn_bound):.1f}H{width - 8:g}" stroke-dasharray="5 4" '
            f"{_stroke('warn', INK['light']['warn'], 1.4)}/>"
        )
        body.append(_text(width - 10, y(drawn_bound) - 4, bound_name, anchor="end", ink="warn"))
    return _picture(width, height, title, body, describe=_told(times, bands, unit), kind="wide")


def _ink(name: str) -> str:
    return INK["light"].get(name) or PHASE_COLOURS[name.removeprefix("p-")][0]


def _told(times: Sequence[float], bands: Sequence[Band], unit: Callable[[float], str]) -> str:
    """Say in words what a chart shows."""
    said = []
    for band in bands:
        if not len(band.values):
            continue
        values = np.asarray(band.values, np.float64)
        peak = int(values.argmax())
        said.append(
            f"{band.name}: {unit(float(values.mean()))} on average, at most {unit(float(values[peak]))} "
            f"after {_clock(float(times[peak]))}"
        )
    return "; ".join(said)


def _text(x: float, y: float, text: str, *, anchor: str = "start", ink: str = "quiet", size: float = 11) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size:g}" {_FONT} '
        f"{_fill(ink, INK['light'][ink])}>{html.escape(text)}</text>"
    )


def nice_axis(most: float, base: int = 1000, least: float = 0.0) -> tuple[float, float]:
    """Return a round end of an axis that holds `most`, and the step between its marks.

    Examples
    --------
    >>> nice_axis(87.0), nice_axis(0.0), nice_axis(1300), nice_axis(1, least=1), nice_axis(1300, 1024)
    ((100.0, 25.0), (1.0, 0.5), (1500.0, 500.0), (1.0, 1.0), (1536.0, 512.0))
    """
    if not most > 1e-12 or not math.isfinite(most):
        return max(1.0, least), max(0.5, least)
    unit = 1.0 if base == 1000 else float(base) ** math.floor(math.log(most, base) + 1e-12)
    scale = unit * 10.0 ** math.floor(math.log10(most / unit) + 1e-12)
    for top, part in ((1, 0.5), (1.5, 0.5), (2, 0.5), (3, 1), (4, 1), (5, 2.5), (6, 2), (8, 2), (10, 2.5)):
        if most <= top * scale * (1 + 1e-9):
            step = max(part * scale, float(least))
            return math.ceil(top * scale / step - 1e-9) * step, step
    return 20 * scale, 5 * scale


def _time_ticks(end: float) -> list[float]:
    """Return at most five round moments from 0 to `end`."""
    steps = [s * 10.0**p for p in range(-3, 1) for s in (1, 2, 5)]
    steps += [15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200]
    days = 86400.0
    step = next((one for one in sorted(steps) if end / one <= 4.5), days * math.ceil(end / days / 4))
    return [step * n for n in range(int(end / step + 1e-9) + 1)]


def _clock(seconds: float) -> str:
    """Return a moment on an axis of time.

    Examples
    --------
    >>> _clock(0), _clock(0.25), _clock(90), _clock(7200), _clock(200000)
    ('0', '0.25 s', '1:30 min', '2:00 h', '55:33 h')
    """
    if not seconds:
        return "0"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02} h"


def sparkline(values: Sequence[float], *, title: str, width: float = 96, height: float = 22) -> str:
    """Draw a line without axes, for a cell of a table."""
    most = max(values, default=0.0) or 1.0
    step = width / max(len(values) - 1, 1)
    points = [f"{n * step:.1f} {height - 2 - (height - 4) * value / most:.1f}" for n, value in enumerate(values)]
    if len(points) == 1:
        points.append(f"{width:g} {points[0].split()[1]}")
    line = f'<path d="M{"L".join(points)}" {_stroke("accent", INK["light"]["accent"], 1.5)}/>' if points else ""
    return _picture(width, height, title, [line])


# -- shares and distributions -------------------------------------------------------------------------


def split_bar(parts: Sequence[tuple[str, float]], *, title: str) -> str:
    """Draw where the time went, as one bar.

    Parameters
    ----------
    parts : sequence of (str, float)
        Phases of `PHASE_COLOURS`, and seconds.
    title : str
        What it shows.
    """
    width, height = 720.0, 34.0
    whole = sum(seconds for _, seconds in parts)
    if whole <= 0:
        return '<p class="quiet">No time was measured.</p>'
    body, at = [], 0.0
    for name, seconds in parts:
        w = width * seconds / whole
        if w < 0.5:
            continue
        text = f"{name}: {seconds / whole:.0%}"
        body.append(
            f'<rect x="{at:.1f}" y="0" width="{max(w - 2, 1):.1f}" height="{height:g}" rx="3" '
            f"{_fill(f'p-{name}', PHASE_COLOURS[name][0])}><title>{text}</title></rect>"
        )
        if w > 12 + 7 * len(text):
            body.append(_text(at + 8, 22, text, ink="ground", size=13))
        at += w
    told = ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in parts if seconds > 0)
    return _picture(width, height, title, body, describe=told, kind="wide")


def phase_legend(parts: Sequence[tuple[str, float]]) -> str:
    """Return phases, their colours and shares as a list."""
    whole = sum(seconds for _, seconds in parts)
    items = [
        f'<li><span class="swatch f-p-{name}" style="background-color:{PHASE_COLOURS[name][0]}"></span>'
        f"{name} <b>{seconds / whole:.1%}</b></li>"
        for name, seconds in parts
        if whole
    ]
    return f'<ul class="legend">{"".join(items)}</ul>' if items else ""


def histograms(
    rows: Sequence[tuple[str, _Floats, npt.NDArray[np.int64], str]], *, title: str, unit: Callable[[float], str]
) -> str:
    """Draw distributions of durations below each other, on one logarithmic axis.

    Parameters
    ----------
    rows : sequence of (str, array, array, str)
        Name, edges in seconds, counts, and what to say on the right.
    title : str
        What it shows.
    unit : callable
        Turns seconds into text.
    """
    rows = [row for row in rows if row[2].size]
    if not rows:
        return '<p class="quiet">Nothing was measured.</p>'
    width, each, left, right, bottom = 720.0, 44.0, 84.0, 216.0, 24.0
    height = each * len(rows) + bottom
    low = math.floor(math.log10(min(row[1][0] for row in rows)) + 1e-9)
    high = max(math.ceil(math.log10(max(row[1][-1] for row in rows)) - 1e-9), low + 1)

    def x(seconds: float) -> float:
        return left + (width - left - right) * (math.log10(seconds) - low) / (high - low)

    body = []
    every = max(1, math.ceil((high - low) / 6))
    for power in range(low, high + 1, every):
        at = x(10.0**power)
        body.append(f'<path d="M{at:.1f} 4V{height - bottom:g}" {_stroke("grid", INK["light"]["grid"], 1)}/>')
        body.append(_text(at, height - 8, unit(10.0**power), anchor="middle"))
    said = []
    for place, (name, edges, counts, note) in enumerate(rows):
        base = each * (place + 1) - 4
        colour = f"p-{name}" if name in PHASE_COLOURS else "accent"
        top = float(counts.max())
        bars = "".join(
            f"M{x(edges[n]):.1f} {base:g}V{base - (each - 12) * count / top:.1f}H{x(edges[n + 1]):.1f}V{base:g}z"
            for n, count in enumerate(counts.tolist())
            if count
        )
        body.append(f'<path d="{bars}" {_fill(colour, _ink(colour))}/>')
        body.append(f'<path d="M{left:g} {base:g}H{width - right:g}" {_stroke("line", INK["light"]["line"], 1)}/>')
        body.append(_text(left - 10, base - 4, name, anchor="end", ink="ink", size=13))
        body.append(_text(width - right + 10, base - 4, note, ink="quiet", size=12))
        said.append(f"{name}: {note}")
    return _picture(width, height, title, body, describe="; ".join(said), kind="wide tall")
