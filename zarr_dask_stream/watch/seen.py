"""What a client says there is to see of its run, checked, and as the texts of a page.

It has come over the network. Texts are escaped, numbers are taken as numbers, and what makes no sense is refused as a
whole.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_dask_stream.watch.account import human_bytes, human_seconds
from zarr_dask_stream.watch.board import Posted
from zarr_dask_stream.watch.charts import PHASE_COLOURS
from zarr_dask_stream.watch.chunkmap import COLOURS, OUTSIDE, STATES, Layout

__all__ = ["PALETTE", "Seen", "head", "label_of", "table_of", "title_of"]

PALETTE = COLOURS["light"]  # the dashboard has a light ground, whatever the reader's system prefers
_SILENT_S = 10.0
_MOST_CELLS = 16_384
_MOST_POINTS = 500
_MOST_CAUSES = 8
_MOST_ROWS = 12
_LONGEST_TEXT = 400
_COLUMNS = (
    "Stream", "Client", "State", "Chunks", "Done", "Chunks/s", "Decoded", "In flight", "Retries", "Dead letters",
    "Time left", "Last news",
)  # fmt: skip
_PHASES = {name: colours[0] for name, colours in PHASE_COLOURS.items()}
_OUTCOMES = {
    "running": ("#0b62b8", "running"),
    "done": ("#1c6e4a", "done"),
    "stopped early": ("#4a4f57", "stopped early"),
    "failed": ("#a4001d", "failed"),
    "gone": ("#a4001d", "client gone"),
}


@dataclass(frozen=True)
class Seen:
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
    def of(cls, snapshot: Mapping[str, Any]) -> Seen:
        """Check a snapshot; `ValueError` where it makes no sense."""
        try:
            return cls._of(snapshot)
        except (TypeError, LookupError, AttributeError, OverflowError) as error:
            raise ValueError(f"expected a snapshot of a run: {error!r}") from error

    @classmethod
    def _of(cls, snapshot: Mapping[str, Any]) -> Seen:
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


def _outcome(posted: Posted) -> tuple[str, str]:
    return _OUTCOMES.get(posted.outcome, ("#4a4f57", "stopped early"))


def head(posted: list[Posted], *, full: bool) -> str:
    """Return the heading of the page: how many streams there are, and what to do."""
    if not posted:
        return (
            "<h1>Zarr streams</h1><p>No stream has been seen so far. Streams that any client of this scheduler runs "
            "with <code>zarr_dask_stream</code> appear here by themselves; one that is under way within five "
            "seconds.</p>"
        )
    running = sum(one.running for one in posted)
    ended = len(posted) - running
    more = " More may be under way than are shown." if full else ""
    return f"<h1>Zarr streams</h1><p>{running} running, {ended} ended.{more}</p>"


def table_of(posted: list[Posted], shown: Posted, now: float) -> str:
    """Return the table of runs; from the counts, which are checked, and what the snapshot adds where it can."""
    heads = "".join(f'<th scope="col"{_aligned(name)}>{name}</th>' for name in _COLUMNS)
    marks = [' aria-current="true"' if one is shown else "" for one in posted[:_MOST_ROWS]]
    rows = "".join(f"<tr{mark}>{_row(one, now)}</tr>" for mark, one in zip(marks, posted, strict=False))
    more = len(posted) - _MOST_ROWS
    rest = f"<p>{more} more can be chosen below.</p>" if more > 0 else ""
    table = f'<table class="runs"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<div class="scroll">{table}</div>{rest}'


def _row(posted: Posted, now: float) -> str:
    news = posted.news
    ends = news.counts.get("chunks", {})
    settled, planned = sum(ends.values()), news.planned
    rates = posted.snapshot.get("rates")
    rates = rates if isinstance(rates, dict) else {}
    colour, outcome = _outcome(posted)
    dead = ends.get("dead_lettered", 0)
    cells = (
        _text(news.name),
        _text(news.whose),
        f'<b style="color:{colour}">{outcome}</b>',
        f"{settled:,.0f} of {planned:,.0f}" if planned else f"{settled:,.0f}",
        f"{min(settled / planned, 1):.0%}" if planned else "",
        _maybe(rates.get("chunks_per_s"), lambda rate: f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"),
        human_bytes(news.counts.get("bytes", {}).get("decoded", 0)),
        f"{news.in_flight:,.0f}" if posted.running else "0",
        f"{news.counts.get('again', {}).get('retries', 0):,.0f}",
        f'<b class="bad">{dead:,.0f}</b>' if dead else "0",
        _maybe(rates.get("left_s"), human_seconds) if posted.running else "",
        "now" if now - posted.heard < 2 else f"{_ago(now - posted.heard)} ago",
    )
    return "".join(f"<td{_aligned(name)}>{cell}</td>" for name, cell in zip(_COLUMNS, cells, strict=True))


def _aligned(name: str) -> str:
    return "" if name in ("Stream", "Client", "State") else ' class="n"'


def label_of(posted: Posted) -> str:
    """Return what tells a run from the others, as plain text."""
    return f"{posted.news.name}, {_outcome(posted)[1]}, {posted.news.whose}, no. {posted.number}"


def _text(value: Any) -> str:
    return html.escape(str(value)[:_LONGEST_TEXT])


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


def title_of(posted: Posted, now: float, *, readable: bool) -> str:
    """Return the heading of one run: which array, how it stands, and what is wrong with it."""
    colour, outcome = _outcome(posted)
    url = posted.snapshot.get("url")
    lines = [
        f'<h2>{html.escape(posted.news.name)} <span style="color:{colour}">{outcome}</span></h2>',
        f"<p>{_text(url if isinstance(url, str) else '')}</p>",
    ]
    error = posted.snapshot.get("error")
    if isinstance(error, str) and error:
        lines.append(f'<p class="bad">{_text(error)}</p>')
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
        ("Chunks in flight", f"{_number(counts['in_flight']):,.0f}"),
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
        f'<li><i style="background:{PALETTE[name]}"></i>{name} {count:,.0f}</li>'
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
        f"<tr><td>{_text(cause['error_type'])}</td><td>{_text(cause['message'])}</td>"
        f'<td class="n">{_number(cause["tries"]):,.0f}</td><td class="n">{_number(cause["dead"]):,.0f}</td></tr>'
        for cause in causes[:_MOST_CAUSES]
    )
    return (
        '<h2>What failed</h2><table><tr><th scope="col">Error</th><th scope="col">Message</th>'
        f'<th scope="col" class="n">Tried again</th><th scope="col" class="n">Given up</th></tr>{rows}</table>'
    )
