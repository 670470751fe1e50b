"""All there is to see of a run at one moment, as plain data: what a widget, a page or another process shows.

Its size is bounded whatever the grid and however long the run. Arrays of cells travel as base64 of bytes.
"""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_dask_stream.watch.advice import advise
from zarr_dask_stream.watch.chunkmap import COLOURS, STATES, ChunkMap
from zarr_dask_stream.watch.history import LATENCIES, LEVELS, RATES, History
from zarr_dask_stream.watch.report import Report

__all__ = ["VERSION", "snapshot"]

VERSION = 1

_POINTS = 120  # of a series
_MOST_ROWS = {"workers": 32, "causes": 12, "letters": 20, "advice": 8}
_LONGEST_TEXT = 300
_MOST_CELLS = 16_384


def snapshot(report: Report, chunkmap: ChunkMap, history: History) -> dict[str, Any]:
    """Return what there is to see of a run now, as plain data for JSON.

    Parameters
    ----------
    report : Report
        Its sums.
    chunkmap : ChunkMap
        Its grid.
    history : History
        How it went.

    Returns
    -------
    dict
        Under 100 KB as JSON. ``"v"`` is the version of this layout, 1:

        - ``url``, ``outcome``, ``error``, ``at`` (seconds since the run began);
        - ``counts``: chunks by their end, and ``total`` (null while not known), ``settled``, ``in_flight``,
          ``retries``, ``hedges``, ``resumed``, ``filled_missing``;
        - ``bytes``: ``stored``, ``decoded``, ``written``, ``in_flight``, ``max_in_flight`` (0: not known), ``peak``;
        - ``rates`` of the last ten seconds: ``chunks_per_s``, ``decoded_per_s``, and ``left_s`` (null while not known);
        - ``map``: ``layout`` (see `Layout.to_dict`), ``states`` and ``done`` (base64 of one byte a cell, row by row: a
          position in ``names``, with ``len(names)`` for cells outside the run; the share that has ended, of 255),
          ``names``, ``colours``, ``totals``;
        - ``series``: for each name ``t`` and ``y``, at most 120 points;
        - ``latency``: for each name ``edges`` and ``counts``; ``time``: seconds by phase;
        - ``advice``: what would help, the most urgent first (see `advise`);
        - ``workers``, ``causes``, ``letters``: the first rows of each, and how many there are in ``rows``.

    Examples
    --------
    >>> shown = snapshot(Report(url="memory://"), ChunkMap(), History())
    >>> shown["v"], shown["url"], shown["map"]["layout"]["kind"]
    (1, 'memory://', 'empty')
    """
    picture = chunkmap.picture()
    if math.prod(picture.layout.shape) > _MOST_CELLS:
        raise ValueError(f"a snapshot holds at most {_MOST_CELLS} cells, got a map of {picture.layout.shape}")
    rates = _rates(report, history)
    settled, total = report.settled, report.total
    left = None if total is None or report.outcome != "running" else max(total - settled, 0)
    return {
        "v": VERSION,
        "url": _short(report.url),
        "outcome": report.outcome,
        "error": _short(report.error),
        "at": round(report.wall_s, 3),
        "counts": {
            "total": total,
            "settled": settled,
            "emitted": report.emitted,
            "filtered": report.filtered,
            "skipped_missing": report.skipped_missing,
            "dead_lettered": report.dead_lettered,
            "cancelled": report.cancelled,
            "in_flight": picture.totals["in flight"] + picture.totals["retried"],
            "retries": report.retries,
            "hedges": report.hedges,
            "resumed": report.resumed,
            "filled_missing": report.filled_missing,
        },
        "bytes": {
            "stored": report.bytes_stored,
            "decoded": report.bytes_decoded,
            "written": report.bytes_written,
            "in_flight": (picture.totals["in flight"] + picture.totals["retried"]) * history.chunk_nbytes,
            "max_in_flight": history.max_nbytes,
            "peak": report.peak_bytes_in_flight,
        },
        "rates": {
            **rates,
            "left_s": None if left is None or not rates["chunks_per_s"] else round(left / rates["chunks_per_s"], 1),
        },
        "map": {
            "layout": picture.layout.to_dict(),
            "states": _packed(picture.states),
            "done": _packed(np.round(picture.done_share * 255).astype(np.uint8)),
            "names": list(STATES),
            "colours": COLOURS,
            "totals": picture.totals,
        },
        "series": {name: _thinned(*history.series(name)) for name in (*RATES, *LEVELS)},
        "latency": {name: _histogram(history, name) for name in LATENCIES},
        "time": {name: round(seconds, 4) for name, seconds in list(report.time.items())},
        "advice": [
            {name: _short(text) for name, text in one.to_dict().items()}
            for one in advise(report, history)[: _MOST_ROWS["advice"]]
        ],
        **_tables(report, history),
    }


def _rates(report: Report, history: History) -> dict[str, float]:
    """Return what was done per second of late, or of the whole run when it is over."""
    if report.outcome != "running":
        wall = max(report.wall_s, 1e-9)
        chunks, decoded = (report.settled - report.cancelled) / wall, report.bytes_decoded / wall
    else:
        chunks, decoded = history.recent("chunks"), history.recent("decoded")
    return {"chunks_per_s": round(chunks, 3), "decoded_per_s": round(decoded, 1)}


def _tables(report: Report, history: History) -> dict[str, Any]:
    workers = sorted(history.workers.items(), key=lambda item: -item[1].chunks)
    causes, letters = history.causes, report.dead_letters
    return {
        "workers": [
            {"name": _short(name), **{key: _rounded(value) for key, value in past.to_dict().items()}}
            for name, past in workers[: _MOST_ROWS["workers"]]
        ],
        "causes": [
            {
                "error_type": _short(cause.error_type),
                "message": _short(cause.message),
                "category": cause.category,
                "tries": cause.tries,
                "dead": cause.dead,
                "first_s": round(cause.first_s, 3),
                "last_s": round(cause.last_s, 3),
                "sample": list(cause.sample),
                "sample_message": _short(cause.sample_message),
                "workers": len(cause.workers),
            }
            for cause in causes[: _MOST_ROWS["causes"]]
        ],
        "letters": [
            {
                "index": list(letter.index),
                "attempts": letter.attempts,
                "category": letter.category,
                "error_type": _short(letter.error_type),
                "message": _short(letter.message),
                "worker": _short(letter.worker),
            }
            for letter in letters[-_MOST_ROWS["letters"] :]  # the last ones: what fails now
        ],
        "rows": {"workers": len(workers), "causes": len(causes), "letters": report.dead_lettered},
    }


def _thinned(times: npt.NDArray[np.float64], values: npt.NDArray[np.float64]) -> dict[str, list[float]]:
    """Return a series with fewer points: means of neighbours."""
    step = -(-len(times) // _POINTS)
    if step > 1:
        starts = np.arange(0, len(times), step)
        counts = np.diff(np.append(starts, len(times)))
        times, values = np.add.reduceat(times, starts) / counts, np.add.reduceat(values, starts) / counts
    return {"t": [round(t, 3) for t in times.tolist()], "y": [_rounded(y) for y in values.tolist()]}


def _histogram(history: History, name: str) -> dict[str, list[float]]:
    """Return a histogram, two bins to a factor of two: eight would be more than one can see."""
    edges, counts = history.latency(name)
    if not counts.size:
        return {"edges": [], "counts": []}
    bucket = round(math.log2(float(edges[0])) * 8)
    padded = np.concatenate([np.zeros(bucket % 4, np.int64), counts, np.zeros(-(bucket + len(counts)) % 4, np.int64)])
    joined = padded.reshape(-1, 4).sum(axis=1)
    first = (bucket - bucket % 4) / 8
    return {
        "edges": [float(f"{2.0 ** (first + n / 2):.4g}") for n in range(len(joined) + 1)],
        "counts": joined.tolist(),
    }


def _packed(cells: npt.NDArray[np.uint8]) -> str:
    return base64.b64encode(np.ascontiguousarray(cells).tobytes()).decode("ascii")


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.4g}")


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 3] + "..."
