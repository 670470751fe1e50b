"""The page of a Dask dashboard that shows streams, drawn with Bokeh: a table of all of them, and one in full.

Each visitor has a page of their own, and gets what has changed, twice a second.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from bokeh.document import Document
from bokeh.layouts import column, row
from bokeh.models import (
    AdaptiveTicker,
    ColumnDataSource,
    CustomJSTickFormatter,
    HoverTool,
    InlineStyleSheet,
    NumeralTickFormatter,
    Range1d,
)
from bokeh.models.widgets.inputs import Select
from bokeh.models.widgets.markups import Div
from bokeh.plotting import figure

from zarr_dask_stream.watch.board import Board, Posted
from zarr_dask_stream.watch.chunkmap import OUTSIDE, STATES, Layout
from zarr_dask_stream.watch.seen import PALETTE, Seen, head, label_of, table_of, title_of

__all__ = ["streams_page"]

_EVERY_MS = 500
_LEAST_COLUMNS = 16  # of the picture: a few cells need not fill it
_LATEST: tuple[Any, str] = ("", "the latest that is under way")
_WRAPS = {"flex-wrap": "wrap"}
_TENS = {"base": 10, "mantissas": [1, 2, 5]}
_BINARY = {"base": 1024, "mantissas": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]}
# Ticks are round in seconds, minutes or hours, and so are their labels.
_ELAPSED = """
if (tick < 60) return tick.toLocaleString() + " s"
if (tick < 3600) return (tick / 60).toLocaleString() + " min"
return (tick / 3600).toLocaleString() + " h"
"""
_CSS = """
:host, .bk-clearfix { display: block; width: 100%; }
:host { font: 14px/1.45 Helvetica, Arial, sans-serif; color: #24292f; }
h1 { font-size: 20px; margin: 4px 0 2px; font-weight: 600; }
h2 { font-size: 15px; margin: 0; font-weight: 600; }
p { margin: 2px 0 6px; color: #4a4f57; }
code { background: #eef0f3; padding: 1px 4px; border-radius: 3px; }
.track { height: 10px; border-radius: 5px; background: #dfe3e8; overflow: hidden; margin: 4px 0 10px; }
.track > i { display: block; height: 100%; background: #0b62b8; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(120px, 1fr)); gap: 8px 16px; margin: 0; }
dl > :first-child { grid-column: span 2; }
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
.scroll { overflow-x: auto; }
tr[aria-current] td { background: #e3eefb; }
.runs th, .runs td { white-space: nowrap; padding: 4px 12px 4px 6px; }
.runs td:first-child { max-width: 240px; overflow: hidden; text-overflow: ellipsis; }
.bad { color: #a4001d; }
"""


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
        self._head = _div("head")
        self._table = _div("streams")
        choices: list[str | tuple[Any, str]] = [_LATEST]
        self._select = Select(title="Show", options=choices, value="", width=420, visible=False)
        self._select.on_change("value", self._choose)
        self._title, self._figures, self._legend = _div("title"), _div("figures"), _div("legend")
        self._split, self._causes = _div("split"), _div("causes")
        self._map = _MapView()
        self._rate = _Line("Chunks per second", "chunks", "0.[0]a", _TENS, "#0b62b8")
        self._bytes = _Line("Decoded bytes in flight", "in_flight_bytes", "0 ib", _BINARY, "#b26f00")
        picture = column(self._map.plot, self._legend, sizing_mode="stretch_width", min_width=420)
        numbers = column(
            self._figures, self._rate.plot, self._bytes.plot, self._split, sizing_mode="stretch_width", min_width=420
        )
        self._detail = column(
            row(self._title, self._select, sizing_mode="stretch_width", styles=_WRAPS),
            row(picture, numbers, sizing_mode="stretch_width", spacing=24, styles=_WRAPS),
            self._causes,
            sizing_mode="stretch_width",
            spacing=8,
            visible=False,
        )
        self.root = column(
            self._head, self._table, self._detail, sizing_mode="stretch_width", spacing=10, margin=(4, 12, 24, 12)
        )

    # -- which stream -------------------------------------------------------------------------------

    def _choose(self, _name: str, _old: str, _run: str) -> None:
        self.update()

    def update(self) -> None:
        """Show what is on the board now."""
        posted, now = self._board.posted, self._clock()
        _set(self._head, "text", head(posted, full=self._board.full))
        for part in (self._table, self._detail):
            _set(part, "visible", bool(posted))
        _set(self._select, "visible", len(posted) > 1)
        if not posted:
            return
        shown = self._board.get(self._select.value) or posted[0]
        options = [_LATEST, *((one.news.run, label_of(one)) for one in posted)]
        if self._select.value not in dict(options):
            self._select.value = ""  # it is forgotten by now
        _set(self._select, "options", options)
        _set(self._table, "text", table_of(posted, shown, now))
        self._show(shown, now)

    def _show(self, posted: Posted, now: float) -> None:
        try:
            seen = Seen.of(posted.snapshot)
        except ValueError:
            seen = None
        _set(self._title, "text", title_of(posted, now, readable=seen is not None))
        for part in (self._figures, self._legend, self._split, self._causes, self._map.plot):
            _set(part, "visible", seen is not None)
        if seen is None:
            self._map.show(None, posted)
            self._rate.show([], [])
            self._bytes.show([], [])
            return
        _set(self._figures, "text", seen.figures)
        _set(self._legend, "text", seen.legend)
        _set(self._split, "text", seen.split)
        _set(self._causes, "text", seen.causes)
        self._map.show(seen, posted)
        self._rate.show(*seen.series["chunks"])
        self._bytes.show(*seen.series["in_flight_bytes"])


def _div(name: str) -> Div:
    return Div(text="", name=name, sizing_mode="stretch_width", stylesheets=[InlineStyleSheet(css=_CSS)])


def _set(model: Any, name: str, value: Any) -> None:
    """Change a property of a model, and nothing where it has that value: each change goes to the browser."""
    if getattr(model, name) != value:
        setattr(model, name, value)


# -- drawings ------------------------------------------------------------------------------------------


def _plot(title: str, height: int, **ranges: Any) -> Any:
    return figure(
        title=title,
        height=height,
        sizing_mode="stretch_width",
        tools="",
        toolbar_location=None,
        background_fill_color="#ffffff",
        border_fill_color=None,
        outline_line_color="#c3c9d0",
        **ranges,
    )


class _MapView:
    """The chunk map: a rectangle for each cell, over one for what of it is still to come."""

    def __init__(self) -> None:
        self._source = ColumnDataSource(
            {"x": [], "y": [], "fill": [], "alpha": [], "where": [], "what": []}, name="cells"
        )
        self.plot = _plot("Chunks", 400, x_range=Range1d(start=0, end=1), y_range=Range1d(start=1, end=0))
        self.plot.axis.visible = False
        self.plot.grid.visible = False
        size: dict[str, Any] = {"width": 0.9, "height": 0.9}
        self._grounds = self.plot.rect("x", "y", source=self._source, fill_color=PALETTE["planned"],
                                       line_color=None, **size)  # fmt: skip
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

    def show(self, seen: Seen | None, posted: Posted) -> None:
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

    def _draw(self, seen: Seen, drawn: npt.NDArray[np.int64]) -> None:
        rows, columns = seen.layout.shape
        self._source.data = {
            "x": (drawn % columns + 0.5).tolist(),
            "y": (drawn // columns + 0.5).tolist(),
            "where": [_where(seen.layout, *divmod(cell, columns)) for cell in drawn.tolist()],
            **_paint(seen, drawn),
        }
        gap = 0.9 if max(rows / 40, columns / 60) < 1.5 else 1.18  # no seams where gaps would be less than a pixel
        for glyph in (self._grounds.glyph, self._cells.glyph):
            glyph.update(width=gap, height=gap)
        self.plot.x_range.update(start=-0.2, end=max(columns, _LEAST_COLUMNS) + 0.2)
        self.plot.y_range.update(start=rows + 0.2, end=-0.2)
        _set(self.plot, "height", max(90, min(420, 28 + 22 * rows)) if rows < 18 else 420)
        merged = math.prod(seen.layout.grid_shape) > rows * columns
        _set(self.plot.title, "text", f"Chunks: {_times(seen.layout.grid_shape)}"
             + (", several to a cell" if merged else ""))  # fmt: skip

    def _patch(self, seen: Seen, drawn: npt.NDArray[np.int64]) -> None:
        changed = np.flatnonzero((seen.states[drawn] != self._states[drawn]) | (seen.done[drawn] != self._done[drawn]))
        if changed.size:
            painted = _paint(seen, drawn[changed])
            places = changed.tolist()
            self._source.patch({name: list(zip(places, values, strict=True)) for name, values in painted.items()})


def _paint(seen: Seen, cells: npt.NDArray[np.int64]) -> dict[str, list[Any]]:
    states, done = seen.states[cells].tolist(), seen.done[cells].tolist()
    fills, alphas, whats = [], [], []
    for code, share in zip(states, done, strict=True):
        state = STATES[code]
        partly = state in ("done", "filtered", "missing") and share < 1
        fills.append(PALETTE[state])
        alphas.append(0.0 if state == "planned" else round(0.35 + 0.65 * share, 3) if partly else 1.0)
        whats.append(f"{state}, {share:.0%} of the cell ended" if 0 < share < 1 else state)
    return {"fill": fills, "alpha": alphas, "what": whats}


def _where(layout: Layout, row: int, column: int) -> str:
    places = [str(a) if b - a == 1 else f"{a}..{b - 1}" for a, b in layout.bounds(row, column)]
    return f"({', '.join(places)}{',' if len(places) == 1 else ''})"


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{n:,}" for n in shape) or "1"


class _Line:
    """A series over the seconds of a run."""

    def __init__(self, title: str, name: str, numbers: str, ticks: Mapping[str, Any], colour: str) -> None:
        self._source = ColumnDataSource({"t": [], "y": []}, name=name)
        self.plot = _plot(title, 130)
        self.plot.line("t", "y", source=self._source, line_color=colour, line_width=2)
        self.plot.varea("t", 0, "y", source=self._source, fill_color=colour, fill_alpha=0.15)
        self.plot.y_range.start = self.plot.x_range.start = 0
        self.plot.yaxis.formatter = NumeralTickFormatter(format=numbers)
        self.plot.yaxis.ticker = AdaptiveTicker(desired_num_ticks=3, num_minor_ticks=0, **ticks)
        self.plot.xaxis.formatter = CustomJSTickFormatter(code=_ELAPSED)
        self.plot.xaxis.ticker = AdaptiveTicker(
            base=60, mantissas=[1, 2, 5, 10, 15, 30], desired_num_ticks=6, num_minor_ticks=0
        )
        self.plot.xgrid.visible = False
        self.plot.axis.axis_line_color = self.plot.axis.major_tick_line_color = "#8f959e"
        self.plot.add_tools(HoverTool(tooltips=f"@y{{{numbers}}} after @t{{0.0}} s", mode="vline"))

    def show(self, times: list[float], values: list[float]) -> None:
        """Draw a series."""
        _set(self.plot, "visible", len(times) > 1)
        data = {"t": times, "y": values}
        if data != self._source.data:
            self._source.data = data
