"""The page of a Dask dashboard that shows streams, drawn with Bokeh: a table of all of them, and one in full.

What it draws has come over the network. Texts are escaped, numbers are taken as numbers, and what makes no sense is
left out, with a line that says so.
"""

from __future__ import annotations

import base64
import html
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from bokeh.document import Document
from bokeh.layouts import column, row
from bokeh.models import (
    ColumnDataSource,
    DataTable,
    Div,
    HoverTool,
    HTMLTemplateFormatter,
    InlineStyleSheet,
    NumeralTickFormatter,
    TableColumn,
)
from bokeh.plotting import figure

from zarr_dask_stream.watch.account import human_bytes, human_seconds
from zarr_dask_stream.watch.board import Board, Posted
from zarr_dask_stream.watch.chunkmap import COLOURS, OUTSIDE, STATES, Layout

__all__ = ["streams_page"]

_EVERY_MS = 500
_SILENT_S = 10.0
_MOST_CELLS = 16_384
_MOST_POINTS = 500
_MOST_CAUSES = 8
_ROWS_SHOWN = 6
_PALETTE = COLOURS["light"]  # the dashboard has a light ground, whatever the reader's system prefers
_PHASES = {
    "schedule": "#8f959e",
    "fetch": "#0b62b8",
    "decode": "#2f8f83",
    "compute": "#b26f00",
    "transfer": "#a8328a",
    "consumer": "#4a4f57",
}
_OUTCOMES = {
    "running": ("#0b62b8", "running"),
    "done": ("#1c6e4a", "done"),
    "stopped early": ("#4a4f57", "stopped early"),
    "failed": ("#a4001d", "failed"),
    "gone": ("#a4001d", "client gone"),
}
_CSS = """
:host { font: 14px/1.45 Helvetica, Arial, sans-serif; color: #24292f; }
h1 { font-size: 20px; margin: 4px 0 2px; font-weight: 600; }
h2 { font-size: 15px; margin: 0; font-weight: 600; }
p { margin: 2px 0 6px; color: #4a4f57; }
code { background: #eef0f3; padding: 1px 4px; border-radius: 3px; }
.track { height: 10px; border-radius: 5px; background: #dfe3e8; overflow: hidden; margin: 4px 0 10px; }
.track > i { display: block; height: 100%; background: #0b62b8; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(120px, 1fr)); gap: 8px 16px; margin: 0; }
dt { font-size: 12px; color: #4a4f57; }
dd { margin: 0; font-size: 17px; font-variant-numeric: tabular-nums; white-space: nowrap; }
ul { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 4px 0 0; padding: 0; }
li { font-variant-numeric: tabular-nums; white-space: nowrap; }
li > i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 5px; }
.bar { display: flex; height: 16px; border-radius: 3px; overflow: hidden; margin-top: 4px; background: #dfe3e8; }
table { border-collapse: collapse; width: 100%; margin-top: 4px; }
th { text-align: left; font-size: 12px; font-weight: 600; color: #4a4f57; padding: 3px 12px 3px 0; }
td { padding: 3px 12px 3px 0; border-top: 1px solid #dfe3e8; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bad { color: #a4001d; }
"""
_COLUMNS = (
    ("name", "Stream", 210), ("whose", "Client", 150), ("outcome", "State", 100), ("done", "Chunks", 170),
    ("share", "", 60), ("rate", "Chunks/s", 80), ("decoded", "Decoded", 90), ("in_flight", "In flight", 75),
    ("retries", "Retries", 70), ("dead", "Dead letters", 90), ("left", "Time left", 90), ("heard", "Last news", 90),
)  # fmt: skip
_STATE_CELL = HTMLTemplateFormatter(
    template="".join(
        f'<% if (value === "{shown}") {{ %><span style="color:{colour};font-weight:600">{shown}</span><% }} %>'
        for colour, shown in dict.fromkeys(_OUTCOMES.values())
    )
)


def streams_page(
    board: Board, *, template: Any = None, theme: Any = None, clock: Callable[[], float] = time.time
) -> Callable[[Any, Mapping[str, Any], Document], None]:
    """Return what makes the page for each visitor, as Dask's dashboard calls it.

    Parameters
    ----------
    board : Board
        What is shown.
    template, theme : optional
        Those of the other pages of the dashboard.
    clock : callable
        The clock by which the board hears.

    Returns
    -------
    callable
        Called with the scheduler, the variables of the template and the document to fill.
    """

    def page(_scheduler: Any, extra: Mapping[str, Any], doc: Document) -> None:
        shown = _Page(board, clock)
        shown.update()
        doc.title = "Dask: Zarr streams"
        if template is not None:
            doc.template = template
            doc.template_variables.update(extra)
        if theme is not None:
            doc.theme = theme
        doc.add_root(shown.root)
        doc.add_periodic_callback(shown.update, _EVERY_MS)

    return page


class _Page:
    """The page as one visitor sees it."""

    def __init__(self, board: Board, clock: Callable[[], float]) -> None:
        self._board = board
        self._clock = clock
        self._chosen: str | None = None  # by the visitor; else the first is shown
        self._placing = False
        self._head = _div("head")
        self._list = ColumnDataSource({name: [] for name, _, _ in _COLUMNS}, name="streams")
        self._table = DataTable(
            source=self._list,
            columns=[
                TableColumn(
                    field=name, title=title, width=width, sortable=False,
                    **({"formatter": _STATE_CELL} if name == "outcome" else {}),
                )
                for name, title, width in _COLUMNS
            ],
            index_position=None,
            reorderable=False,
            sizing_mode="stretch_width",
            height=60,
            visible=False,
        )  # fmt: skip
        self._list.selected.on_change("indices", self._choose)
        self._title, self._figures, self._legend = _div("title"), _div("figures"), _div("legend")
        self._split, self._causes = _div("split"), _div("causes")
        self._map = _MapView()
        self._rate = _Line("Chunks per second", "chunks", "0.[0]a", "#0b62b8")
        self._bytes = _Line("Decoded bytes in flight", "in_flight_bytes", "0.[0] ib", "#b26f00")
        picture = column(self._map.plot, self._legend, sizing_mode="stretch_width", min_width=420)
        numbers = column(
            self._figures, self._rate.plot, self._bytes.plot, self._split, sizing_mode="stretch_width", min_width=420
        )
        self._detail = column(
            self._title,
            row(picture, numbers, sizing_mode="stretch_width", spacing=24),
            self._causes,
            sizing_mode="stretch_width",
            spacing=8,
            visible=False,
        )
        self.root = column(
            self._head, self._table, self._detail, sizing_mode="stretch_width", spacing=10, margin=(4, 12, 24, 12)
        )

    # -- which stream -------------------------------------------------------------------------------

    def _choose(self, _name: str, _old: Any, indices: list[int]) -> None:
        posted = self._board.posted
        if not self._placing and indices and indices[0] < len(posted):
            self._chosen = posted[indices[0]].news.run
            self.update()

    def update(self) -> None:
        """Show what is on the board now."""
        posted, now = self._board.posted, self._clock()
        _set(self._head, "text", _head(posted, full=self._board.full))
        _set(self._table, "visible", bool(posted))
        _set(self._detail, "visible", bool(posted))
        if not posted:
            return
        rows = [_row(one, now) for one in posted]
        data = {name: [one[name] for one in rows] for name, _, _ in _COLUMNS}
        shown = self._board.get(self._chosen) if self._chosen is not None else None
        shown = shown or posted[0]
        self._placing = True
        if data != self._list.data:
            self._list.data = data
        _set(self._list.selected, "indices", [posted.index(shown)])
        self._placing = False
        _set(self._table, "height", 32 + 26 * min(len(posted), _ROWS_SHOWN))
        self._show(shown, now)

    def _show(self, posted: Posted, now: float) -> None:
        try:
            seen = _Seen.of(posted.snapshot)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            seen = None
        _set(self._title, "text", _title(posted, now, readable=seen is not None))
        for part in (self._figures, self._legend, self._split, self._causes):
            _set(part, "visible", seen is not None)
        if seen is None:
            self._map.show(None, posted)
            return
        _set(self._figures, "text", seen.figures)
        _set(self._legend, "text", seen.legend)
        _set(self._split, "text", seen.split)
        _set(self._causes, "text", seen.causes)
        self._map.show(seen, posted)
        self._rate.show(*seen.series["chunks"])
        self._bytes.show(*seen.series["in_flight_bytes"])


# -- one snapshot, checked -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """What a snapshot says, with all of it checked."""

    layout: Layout
    states: npt.NDArray[np.uint8]
    done: npt.NDArray[np.float64]
    figures: str
    legend: str
    split: str
    causes: str
    series: dict[str, tuple[list[float], list[float]]]

    @classmethod
    def of(cls, snapshot: Mapping[str, Any]) -> _Seen:
        grid = snapshot["map"]
        layout = _layout(grid["layout"])
        cells = math.prod(layout.shape)
        states = np.frombuffer(base64.b64decode(grid["states"], validate=True), np.uint8)
        done = np.frombuffer(base64.b64decode(grid["done"], validate=True), np.uint8) / 255
        if len(states) != cells or len(done) != cells or (cells and states.max() > OUTSIDE):
            raise ValueError(f"expected {cells} cells, got {len(states)} and {len(done)}")
        return cls(
            layout,
            states,
            done,
            _figures(snapshot),
            _legend({name: _number(grid["totals"][name]) for name in STATES}),
            _split({name: _number(snapshot["time"].get(name, 0)) for name in _PHASES}),
            _causes(snapshot["causes"]),
            {name: _points(snapshot["series"][name]) for name in ("chunks", "in_flight_bytes")},
        )


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"expected a number, got {value!r}")
    return value


def _layout(given: Mapping[str, Any]) -> Layout:
    parts = {name: tuple(int(n) for n in given[name]) for name in ("grid_shape", "axes", "merge", "shape")}
    shape, axes = parts["shape"], parts["axes"]
    kind = given["kind"]
    right = (
        kind in ("plane", "line", "point", "empty")
        and len(shape) == 2
        and 0 <= math.prod(shape) <= _MOST_CELLS
        and len(parts["grid_shape"]) <= 64
        and len(axes) == len(parts["merge"]) == {"plane": 2, "line": 1}.get(kind, 0)
        and all(0 <= axis < len(parts["grid_shape"]) for axis in axes)
        and min((0, *shape, *parts["grid_shape"])) == 0
        and min((1, *parts["merge"])) == 1
    )
    if not right:
        raise ValueError(f"expected the layout of a chunk map, got {given!r}")
    return Layout(parts["grid_shape"], kind, axes, parts["merge"], (shape[0], shape[1]))


def _points(given: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    times, values = [_number(t) for t in given["t"]], [_number(y) for y in given["y"]]
    if len(times) != len(values) or len(times) > _MOST_POINTS:
        raise ValueError("expected a series of few points, with as many times as values")
    return times, values


# -- texts ---------------------------------------------------------------------------------------------


def _div(name: str) -> Div:
    return Div(text="", name=name, sizing_mode="stretch_width", stylesheets=[InlineStyleSheet(css=_CSS)])


def _set(model: Any, name: str, value: Any) -> None:
    """Change a property of a model, and nothing where it has that value: each change goes to the browser."""
    if getattr(model, name) != value:
        setattr(model, name, value)


def _outcome(posted: Posted) -> tuple[str, str]:
    return _OUTCOMES.get(posted.outcome, ("#4a4f57", "stopped early"))


def _head(posted: list[Posted], *, full: bool) -> str:
    if not posted:
        return (
            "<h1>Zarr streams</h1><p>No stream has been seen so far. Streams that any client of this scheduler runs "
            "with <code>zarr_dask_stream</code> appear here by themselves; one that is under way within five "
            "seconds.</p>"
        )
    running = sum(one.running for one in posted)
    ended = len(posted) - running
    more = " More may be under way than are shown." if full else ""
    return f"<h1>Zarr streams</h1><p>{running} running, {ended} ended. A row chooses what is shown below.{more}</p>"


def _row(posted: Posted, now: float) -> dict[str, str]:
    """Return a row of the table; from the counts, which are checked, and what the snapshot adds where it can."""
    news = posted.news
    ends = news.counts.get("chunks", {})
    settled, planned = sum(ends.values()), news.planned
    rates = posted.snapshot.get("rates")
    rates = rates if isinstance(rates, dict) else {}
    return {
        "name": news.name,
        "whose": news.whose,
        "outcome": _outcome(posted)[1],
        "done": f"{settled:,.0f} of {planned:,.0f}" if planned else f"{settled:,.0f}",
        "share": f"{min(settled / planned, 1):.0%}" if planned else "",
        "rate": _maybe(rates.get("chunks_per_s"), lambda rate: f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"),
        "decoded": human_bytes(news.counts.get("bytes", {}).get("decoded", 0)),
        "in_flight": f"{news.in_flight:,.0f}" if posted.running else "0",
        "retries": f"{news.counts.get('again', {}).get('retries', 0):,.0f}",
        "dead": f"{ends.get('dead_lettered', 0):,.0f}",
        "left": _maybe(rates.get("left_s"), human_seconds) if posted.running else "",
        "heard": "now" if now - posted.heard < 2 else f"{_ago(now - posted.heard)} ago",
    }


def _maybe(value: Any, show: Callable[[float], str]) -> str:
    try:
        return show(_number(value))
    except ValueError:
        return ""


def _ago(seconds: float) -> str:
    """Return a duration in steps that don't change twice a second."""
    if seconds < 60:
        return f"{seconds // 5 * 5:.0f} s"
    return f"{seconds // 60:,.0f} min" if seconds < 7200 else f"{seconds // 3600:,.0f} h"


def _title(posted: Posted, now: float, *, readable: bool) -> str:
    colour, outcome = _outcome(posted)
    url = posted.snapshot.get("url")
    lines = [
        f'<h2>{html.escape(posted.news.name)} <span style="color:{colour}">{outcome}</span></h2>',
        f"<p>{html.escape(url if isinstance(url, str) else '')}</p>",
    ]
    error = posted.snapshot.get("error")
    if isinstance(error, str) and error:
        lines.append(f'<p class="bad">{html.escape(error)}</p>')
    if posted.gone:
        lines.append('<p class="bad">Its client left before it ended. This is the last that was heard of it.</p>')
    elif posted.running and now - posted.heard > _SILENT_S:
        lines.append(f"<p>No chunk has moved for {_ago(now - posted.heard)}.</p>")
    if not readable:
        lines.append("<p>Its client sends what this page can't read: install the same version on both.</p>")
    return "".join(lines)


def _figures(snapshot: Mapping[str, Any]) -> str:
    counts, nbytes, rates = snapshot["counts"], snapshot["bytes"], snapshot["rates"]
    settled, total = _number(counts["settled"]), counts["total"]
    pairs = [
        ("Chunks", f"{settled:,.0f}" + ("" if total is None else f" of {_number(total):,.0f}")),
        ("Chunks per second", f"{_number(rates['chunks_per_s']):,.4g}"),
        ("Decoded per second", f"{human_bytes(_number(rates['decoded_per_s']))}/s"),
        ("Elapsed", human_seconds(_number(snapshot["at"]))),
        ("Time left", "" if rates["left_s"] is None else human_seconds(_number(rates["left_s"]))),
        ("Stored bytes read", human_bytes(_number(nbytes["stored"]))),
        ("In flight", f"{_number(counts['in_flight']):,.0f} chunks"),
        ("Retries", f"{_number(counts['retries']):,.0f}"),
        ("Dead letters", f"{_number(counts['dead_lettered']):,.0f}"),
    ]
    bar = ""
    if total:
        share = min(settled / _number(total), 1)
        bar = (
            f'<div class="track" role="progressbar" aria-label="Chunks that reached their end" aria-valuemin="0" '
            f'aria-valuemax="100" aria-valuenow="{share:.0%}"><i style="width:{share:.2%}"></i></div>'
        ).replace(f'"{share:.0%}"', f'"{100 * share:.0f}"')
    return bar + "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{text or '-'}</dd></div>" for name, text in pairs) + "</dl>"


def _legend(totals: Mapping[str, float]) -> str:
    return "<ul>" + "".join(
        f'<li><i style="background:{_PALETTE[name]}"></i>{name} {count:,.0f}</li>'
        for name, count in totals.items()
        if count or name in ("planned", "in flight", "done")
    ) + "</ul>"  # fmt: skip


def _split(seconds: Mapping[str, float]) -> str:
    total = sum(seconds.values())
    if total <= 0:
        return "<h2>Where the time goes</h2><p>No task has come back so far.</p>"
    shares = {name: spent / total for name, spent in seconds.items() if spent > 0}
    told = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    parts = "".join(f'<i style="flex:{share:.4f};background:{_PHASES[name]}"></i>' for name, share in shares.items())
    keys = "".join(
        f'<li><i style="background:{_PHASES[name]}"></i>{name} {share:.0%}</li>' for name, share in shares.items()
    )
    return f'<h2>Where the time goes</h2><div class="bar" role="img" aria-label="{told}">{parts}</div><ul>{keys}</ul>'


def _causes(causes: Any) -> str:
    if not causes:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(str(cause['error_type']))}</td><td>{html.escape(str(cause['message']))}</td>"
        f'<td class="n">{_number(cause["tries"]):,.0f}</td><td class="n">{_number(cause["dead"]):,.0f}</td></tr>'
        for cause in causes[:_MOST_CAUSES]
    )
    return (
        '<h2>What failed</h2><table><tr><th scope="col">Error</th><th scope="col">Message</th>'
        f'<th scope="col" class="n">Tried again</th><th scope="col" class="n">Given up</th></tr>{rows}</table>'
    )


# -- drawings ------------------------------------------------------------------------------------------


class _MapView:
    """The chunk map: a rectangle for each cell, over one for what of it is still to come."""

    def __init__(self) -> None:
        self._source = ColumnDataSource(
            {"x": [], "y": [], "fill": [], "alpha": [], "where": [], "what": []}, name="cells"
        )
        self.plot = figure(
            height=400,
            sizing_mode="stretch_width",
            title="Chunks",
            tools="",
            toolbar_location=None,
            x_range=(0, 1),
            y_range=(1, 0),
            background_fill_color="#ffffff",
            border_fill_color=None,
            outline_line_color="#c3c9d0",
        )
        self.plot.axis.visible = False
        self.plot.grid.visible = False
        size = {"width": 0.9, "height": 0.9}
        self._grounds = self.plot.rect("x", "y", source=self._source, fill_color=_PALETTE["planned"],
                                       fill_alpha=0.45, line_color=None, **size)  # fmt: skip
        self._cells = self.plot.rect("x", "y", source=self._source, fill_color="fill", fill_alpha="alpha",
                                     line_color=None, **size)  # fmt: skip
        self.plot.add_tools(
            HoverTool(renderers=[self._cells], tooltips="<b>@where</b><br>@what", point_policy="follow_mouse")
        )
        self._layout: Layout | None = None
        self._run = ""
        self._drawn: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._states: npt.NDArray[np.uint8] = np.zeros(0, np.uint8)
        self._done: npt.NDArray[np.float64] = np.zeros(0)

    def show(self, seen: _Seen | None, posted: Posted) -> None:
        """Draw a run; of one that is drawn already, what has changed."""
        if seen is None or not math.prod(seen.layout.shape):
            self._layout = None
            self._source.data = {name: [] for name in self._source.data}
            return
        drawn = np.flatnonzero(seen.states != OUTSIDE)
        if (posted.news.run, seen.layout) != (self._run, self._layout) or not np.array_equal(drawn, self._drawn):
            self._run, self._layout, self._drawn = posted.news.run, seen.layout, drawn
            self._draw(seen, drawn)
        else:
            self._patch(seen, drawn)
        self._states, self._done = seen.states, seen.done

    def _draw(self, seen: _Seen, drawn: npt.NDArray[np.int64]) -> None:
        rows, columns = seen.layout.shape
        self._source.data = {
            "x": (drawn % columns + 0.5).tolist(),
            "y": (drawn // columns + 0.5).tolist(),
            "where": [_where(seen.layout, *divmod(cell, columns)) for cell in drawn.tolist()],
            **_paint(seen, drawn),
        }
        gap = 0.9 if max(rows / 40, columns / 60) < 1.5 else 1.0  # gaps of a fraction of a pixel would flicker
        for glyph in (self._grounds.glyph, self._cells.glyph):
            glyph.update(width=gap, height=gap)
        self.plot.x_range.update(start=-0.2, end=columns + 0.2)
        self.plot.y_range.update(start=rows + 0.2, end=-0.2)
        _set(self.plot, "height", max(90, min(420, 28 + 22 * rows)) if rows < 18 else 420)
        merged = math.prod(seen.layout.grid_shape) > rows * columns
        _set(self.plot.title, "text", f"Chunks: grid {_times(seen.layout.grid_shape)}"
             + (", several to a cell" if merged else ""))  # fmt: skip

    def _patch(self, seen: _Seen, drawn: npt.NDArray[np.int64]) -> None:
        changed = np.flatnonzero((seen.states[drawn] != self._states[drawn]) | (seen.done[drawn] != self._done[drawn]))
        if changed.size:
            painted = _paint(seen, drawn[changed])
            places = changed.tolist()
            self._source.patch({name: list(zip(places, values, strict=True)) for name, values in painted.items()})


def _paint(seen: _Seen, cells: npt.NDArray[np.int64]) -> dict[str, list[Any]]:
    states, done = seen.states[cells].tolist(), seen.done[cells].tolist()
    fills, alphas, whats = [], [], []
    for code, share in zip(states, done, strict=True):
        state = STATES[code]
        partly = state in ("done", "filtered", "missing") and share < 1
        fills.append(_PALETTE[state])
        alphas.append(0.0 if state == "planned" else round(0.35 + 0.65 * share, 3) if partly else 1.0)
        whats.append(f"{state}, {share:.0%} of the cell ended" if 0 < share < 1 else state)
    return {"fill": fills, "alpha": alphas, "what": whats}


def _where(layout: Layout, row: int, column: int) -> str:
    places = [str(a) if b - a == 1 else f"{a}..{b - 1}" for a, b in layout.bounds(row, column)]
    return f"({', '.join(places)}{',' if len(places) == 1 else ''})"


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{n:,}" for n in shape) or "of one chunk"


class _Line:
    """A series over the seconds of a run."""

    def __init__(self, title: str, name: str, numbers: str, colour: str) -> None:
        self._source = ColumnDataSource({"t": [], "y": []}, name=name)
        self.plot = figure(
            height=130,
            sizing_mode="stretch_width",
            title=title,
            tools="",
            toolbar_location=None,
            background_fill_color="#ffffff",
            border_fill_color=None,
            outline_line_color="#c3c9d0",
        )
        self.plot.line("t", "y", source=self._source, line_color=colour, line_width=2)
        self.plot.varea("t", 0, "y", source=self._source, fill_color=colour, fill_alpha=0.15)
        self.plot.y_range.start = 0
        self.plot.yaxis.formatter = NumeralTickFormatter(format=numbers)
        self.plot.xaxis.formatter = NumeralTickFormatter(format="0.[0]a")
        self.plot.yaxis.ticker.desired_num_ticks = 3
        self.plot.xgrid.visible = False
        self.plot.add_tools(HoverTool(tooltips=f"@y{{{numbers}}} at @t{{0.0}} s", mode="vline"))

    def show(self, times: list[float], values: list[float]) -> None:
        """Draw a series."""
        data = {"t": times, "y": values}
        if data != self._source.data:
            self._source.data = data
