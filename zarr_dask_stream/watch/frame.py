"""What the live widget shows at one moment, as plain data that is small enough to be sent a few times a second.

The map goes out as two bytes for each cell, series at no more points than a small line has pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_dask_stream.engine.events import DeadLetter
from zarr_dask_stream.watch.chunkmap import COLOURS, GROUNDS, STATES, ChunkMap
from zarr_dask_stream.watch.report import Report, human_bytes, human_seconds

__all__ = ["OVER", "Controls", "Pace", "axes_choices", "axes_name", "make_frame"]

OVER = ("done", "stopped early", "failed")
"""The outcomes of runs that have ended."""

_LETTERS = 50
_MESSAGE = 400
_POINTS = 120
_CHOICES = 6
_PHASES = ("schedule", "fetch", "decode", "compute", "transfer", "consumer")

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Controls:
    """How a stream is set at the moment.

    Attributes
    ----------
    paused, draining : bool
        Whether nothing new is submitted, until it is resumed or for good.
    rate : float or None
        Requests per second that are allowed, all workers together; None: not bounded.
    """

    paused: bool = False
    draining: bool = False
    rate: float | None = None


@dataclass(slots=True)
class Pace:
    """Rates of the last seconds, from looks at the counts.

    Examples
    --------
    >>> pace = Pace()
    >>> pace.look(1.0, 10, 1000); pace.look(3.0, 30, 5000)
    >>> pace.per_s
    (10.0, 2000.0)
    """

    _looks: deque[tuple[float, int, int]] = field(default_factory=lambda: deque(maxlen=40))

    def look(self, now: float, chunks: int, nbytes: int) -> None:
        """Take a look at time `now`, in seconds."""
        self._looks.append((now, chunks, nbytes))

    @property
    def per_s(self) -> tuple[float, float]:
        """Chunks and bytes per second between the first look and the last."""
        if len(self._looks) < 2:
            return 0.0, 0.0
        (began, chunks, nbytes), (ended, more_chunks, more_bytes) = self._looks[0], self._looks[-1]
        seconds = ended - began
        if seconds <= 0:
            return 0.0, 0.0
        return (more_chunks - chunks) / seconds, (more_bytes - nbytes) / seconds


def axes_choices(grid_shape: Sequence[int]) -> list[tuple[int, ...] | None]:
    """Return the pictures of a grid that there are to choose from, the usual one (None) first.

    Examples
    --------
    >>> axes_choices((4, 5)), axes_choices((12, 30, 40))
    ([None], [None, (0, 1), (0, 2), (1, 2)])
    """
    long = [axis for axis, length in enumerate(grid_shape) if length > 1]
    if len(long) < 3:
        return [None]
    return [None, *list(combinations(long, 2))[: _CHOICES - 1]]


def axes_name(axes: Sequence[int] | None, dims: Sequence[str | None] | None) -> str:
    """Return a picture's name in a list to choose from.

    Examples
    --------
    >>> axes_name((0, 2), ("time", "lat", "lon")), axes_name((0, 1), None), axes_name(None, None)
    ('time x lon', 'axis 0 x axis 1', 'the longest')
    """
    if axes is None:
        return "the longest"
    names = [None if dims is None else dims[axis] for axis in axes]
    return " x ".join(f"axis {axis}" if name is None else name for axis, name in zip(axes, names, strict=True))


def make_frame(
    report: Report,
    chunkmap: ChunkMap,
    *,
    pace: Pace,
    controls: Controls,
    workers: int | None = None,
    name: str = "",
    limit: int | None = None,
    maps: Sequence[str] = (),
    shown: int = 0,
    run: int = 0,
) -> dict[str, Any]:
    """Return what there is to see of a run, and how its stream is set.

    Parameters
    ----------
    report : Report
        The account of a run, which may be in the middle.
    chunkmap : ChunkMap
        A picture of the same run: the report's own, or one of other axes.
    pace : Pace
        The looks at this run so far.
    controls : Controls
        How the stream is set.
    workers : int, optional
        Workers at the moment, where that is known.
    name : str
        What the stream is, in a line.
    limit : int, optional
        The run ends when so many chunks were handed out.
    maps : sequence of str
        Names of the pictures to choose from.
    shown : int
        Which of them `chunkmap` is.
    run : int
        Counts the runs of the stream.

    Returns
    -------
    dict
        Plain data; ``"cells"`` and ``"shares"`` are bytes, one for each cell in C order: the state, as a position
        in ``"states"``, and the share of its chunks that have ended, 255 for all.

    Examples
    --------
    >>> from zarr_dask_stream.engine.events import RunStarted
    >>> report = Report()
    >>> report.handle(RunStarted(0.0, 3, 8, (3,), "memory://"))
    >>> frame = make_frame(report, report.chunkmap, pace=Pace(), controls=Controls(paused=True))
    >>> frame["badge"], frame["numbers"], list(frame["cells"]), list(frame["shares"])
    ('paused', ['0/3 chunks', '0 ms gone'], [0, 0, 0], [0, 0, 0])
    """
    picture = chunkmap.picture()
    done, total = _way(report, limit)
    state = _state(report.outcome, controls)
    rows, columns = picture.layout.shape
    letters = report.dead_letters[:_LETTERS]
    return {
        "v": 1,
        "run": run,
        "name": name,
        "url": report.url,
        "state": state,
        "badge": "done, but for dead letters" if state == "done" and report.dead_lettered else state,
        "live": report.outcome == "running",
        "over": report.outcome in OVER,
        "paused": controls.paused,
        "draining": controls.draining,
        "rate": controls.rate,
        "share": None if total is None else min(done / max(total, 1), 1.0) if total else float(state == "done"),
        "numbers": _numbers(report, done, total, pace, paused=controls.paused),
        "troubles": _troubles(report, workers),
        "states": list(STATES),
        "counts": [picture.totals[name] for name in STATES],
        "colours": {ground: list(colours.values()) for ground, colours in COLOURS.items()},
        "grounds": dict(GROUNDS),
        "maps": list(maps),
        "map": shown,
        "layout": picture.layout.to_dict(),
        "cells": picture.states.tobytes(),
        "shares": np.floor(picture.done_share * 255).astype(np.uint8).tobytes(),
        "empty": "" if rows * columns else _why_empty(report),
        "series": _lines(report, pace),
        "time": [
            {"name": phase, "seconds": round(seconds, 6), "text": human_seconds(seconds)}
            for phase, seconds in ((phase, report.time.get(phase, 0.0)) for phase in _PHASES)
        ],
        "dead": report.dead_lettered,
        "letters": [_row(letter) for letter in letters],
    }


def _way(report: Report, limit: int | None) -> tuple[int, int | None]:
    """Return how many chunks have ended, and of how many; or were handed out, where that ends the run."""
    if limit is None:
        return report.settled - report.cancelled, report.total
    return report.emitted, limit if report.total is None else min(limit, report.total)


def _state(outcome: str, controls: Controls) -> str:
    if outcome in OVER:
        return outcome
    if controls.paused:
        return "paused"
    return "draining" if controls.draining and outcome == "running" else outcome


def _why_empty(report: Report) -> str:
    if report.outcome == "not started":
        return "Not started: iterate the stream, or .run() it, and its chunks appear here."
    if report.outcome == "failed":
        return "The run failed before it read anything."
    return "There is no chunk to read."


def _numbers(report: Report, done: int, total: int | None, pace: Pace, *, paused: bool) -> list[str]:
    if report.outcome == "not started":
        return []
    numbers = [f"{done:,}/{'?' if total is None else f'{total:,}'} chunks"]
    if report.outcome != "running":
        seconds = max(report.wall_s, 1e-9)
        rates = [f"{done / seconds:,.{0 if done / seconds >= 10 else 1}f}/s"]
        return [*numbers, human_seconds(report.wall_s), *rates, f"{human_bytes(report.bytes_decoded / seconds)}/s"]
    chunks_per_s, bytes_per_s = pace.per_s
    if chunks_per_s > 0 and not paused:
        numbers += [f"{chunks_per_s:,.{0 if chunks_per_s >= 10 else 1}f}/s", f"{human_bytes(bytes_per_s)}/s"]
        if total is not None and total > done:
            numbers.append(f"{human_seconds(max((total - done) / chunks_per_s, 1.0))} left")
    numbers.append(f"{human_seconds(report.wall_s)} gone")
    return numbers


def _troubles(report: Report, workers: int | None) -> list[str]:
    counts = [
        (report.retries, "retry", "retries"),
        (report.dead_lettered, "dead letter", "dead letters"),
        (report.batches_lost, "task lost", "tasks lost"),
        (report.history.slowed, "slow-down asked for by the store", "slow-downs asked for by the store"),
    ]
    found = [f"{count:,} {one if count == 1 else many}" for count, one, many in counts if count]
    if report.outcome == "running" and workers == 0:
        found.append("waiting for a worker to join the cluster")
    return [*found, report.error[:_MESSAGE]] if report.error else found


def _lines(report: Report, pace: Pace) -> list[dict[str, Any]]:
    seconds = max(report.wall_s, 1e-9)
    running = report.outcome == "running"
    chunks, nbytes = pace.per_s if running else (report.chunks_per_s, report.bytes_decoded / seconds)
    lines = []
    for name, source, now, text in (
        ("Chunks/s", "chunks", chunks, _per_s),
        ("Decoded/s", "decoded", nbytes, human_bytes),
        ("In flight", "in_flight", None, _count),
    ):
        times, values = report.history.series(source)
        values = np.nan_to_num(values)
        if now is not None and len(values) > 2:
            times, values = times[:-1], values[:-1]  # the last bin is not full yet
        times, values = _thinned(times), _thinned(values)
        last = float(values[-1]) if len(values) else 0.0
        lines.append(
            {
                "name": name,
                "now": text(last) if now is None else f"{'' if running else 'mean '}{text(now)}",
                "most": text(max(float(values.max(initial=0.0)), now or 0.0)),
                "times": [round(float(t), 2) for t in times],
                "values": [float(f"{value:.4g}") for value in values],
            }
        )
    return lines


def _thinned(values: _Floats) -> _Floats:
    """Join neighbours to at most `_POINTS` means."""
    step = -(-len(values) // _POINTS)
    if step <= 1:
        return values
    sums = np.add.reduceat(values, np.arange(0, len(values), step))
    counts = np.add.reduceat(np.ones(len(values)), np.arange(0, len(values), step))
    thinned: _Floats = sums / counts
    return thinned


def _per_s(value: float) -> str:
    return f"{value:,.{0 if value >= 10 else 1}f}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _row(letter: DeadLetter) -> list[str]:
    message = letter.message if len(letter.message) <= _MESSAGE else letter.message[:_MESSAGE] + " ..."
    return [str(letter.index), str(letter.attempts), letter.error_type, message]
