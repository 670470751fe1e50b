"""A bar for people, a callback for programs: observers of the same notices as the report.

The bar costs the stream nothing per chunk. It does not follow events: a thread of its own looks at the
report a few times a second. Where there is nothing to draw on (a pipe, a log file), lines take its
place, at intervals. Both go to standard error, so that results can be piped.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from zarr_dask_stream.engine.events import Callback, ClusterChanged, Notice, RunFinished, RunStarted
from zarr_dask_stream.watch.report import Report, human_bytes, human_seconds

__all__ = ["progress_observer"]

_REFRESHES_PER_S = 5
_LINE_EVERY_S = 10.0
_LOOKS = 50  # how many looks back the rate reaches: ten seconds of them


def progress_observer(
    progress: bool | Callable[[int, int], Any],
    report: Report,
    console: Console | None = None,
    *,
    limit: int | None = None,
) -> Callable[[Notice], None]:
    """Return an observer of one run that shows how far it is, or passes ``(done, total)`` on.

    Parameters
    ----------
    progress : True or callable
        True: a bar in a terminal or notebook, lines elsewhere. A callable is called with
        ``(done, total)`` whenever more chunks have reached their end. If it raises, it is treated
        like any observer: the error is logged, it hears no more, the stream goes on.
    report : Report
        The account of the run; it must hear of each notice before this observer does.
    console : rich.console.Console, optional
        Where to draw. Default: standard error.
    limit : int, optional
        The run ends when so many chunks were handed out: what is shown is the way to there.
    """
    way = _Way(report, limit)
    if callable(progress):
        return _Counter(progress, way).handle
    console = console if console is not None else Console(stderr=True)
    return (_Bar if _can_draw(console) else _Lines)(way, console).handle


def _can_draw(console: Console) -> bool:
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal and not console.is_dumb_terminal


class _Way:
    """How far a run is on the way to its end."""

    def __init__(self, report: Report, limit: int | None) -> None:
        self.report = report
        self._limit = limit

    @property
    def total(self) -> int | None:
        """Chunks to settle, or to hand out where the run ends after so many; None while that is not known."""
        planned = self.report.total
        if self._limit is None or planned is None:
            return planned if self._limit is None else self._limit
        return min(self._limit, planned)

    @property
    def done(self) -> int:
        """Of these, how many are settled, or handed out."""
        report = self.report
        return report.settled - report.cancelled if self._limit is None else report.emitted


class _Counter(Callback):
    """Calls ``fn(done, total)`` whenever the run has come further."""

    def __init__(self, fn: Callable[[int, int], Any], way: _Way) -> None:
        self._fn = fn
        self._way = way
        self._told = -1

    def __repr__(self) -> str:
        return f"progress={self._fn!r}"  # the log names an observer that raised

    def on_notice(self, notice: Notice) -> None:  # noqa: ARG002  # the report has folded it already
        done, total = self._way.done, self._way.total
        if done != self._told and total is not None:
            self._told = done
            self._fn(done, total)


class _Meter:
    """What there is to say about a run at a moment; the rate is that of the last seconds."""

    def __init__(self, way: _Way) -> None:
        self._way = way
        self._report = way.report
        self._looks: deque[tuple[float, int, int]] = deque(maxlen=_LOOKS)
        self.workers: int | None = None

    def look(self, now: float) -> None:
        """Take a sample at time `now`."""
        self._looks.append((now, self._way.done, self._report.bytes_decoded))

    def speed(self) -> tuple[float, float]:
        """Chunks and decoded bytes per second, between the first and the last look."""
        if len(self._looks) < 2:
            return 0.0, 0.0
        (began, chunks, nbytes), (ended, more_chunks, more_bytes) = self._looks[0], self._looks[-1]
        seconds = max(ended - began, 1e-9)
        return (more_chunks - chunks) / seconds, (more_bytes - nbytes) / seconds

    def parts(self) -> list[str]:
        """Return count, rates and time left while it runs; what it came to afterwards."""
        report, done, whole = self._report, self._way.done, self._way.total
        total = "?" if whole is None else f"{whole:,}"
        if report.outcome != "running":
            seconds = max(report.wall_s, 1e-9)
            parts = [f"{done:,}/{total} chunks", human_seconds(report.wall_s)]
            parts += [f"{done / seconds:,.0f}/s", f"{human_bytes(report.bytes_decoded / seconds)}/s"]
            return parts if report.outcome == "done" else [*parts, report.outcome]
        chunks_per_s, bytes_per_s = self.speed()
        parts = [f"{done:,}/{total} chunks"]
        if chunks_per_s:
            parts += [f"{chunks_per_s:,.{0 if chunks_per_s >= 10 else 1}f}/s", f"{human_bytes(bytes_per_s)}/s"]
        if chunks_per_s and whole is not None:
            parts.append(f"{human_seconds(max((whole - done) / chunks_per_s, 1.0))} left")
        return parts

    def troubles(self) -> list[str]:
        """Return what a person may want to act on."""
        report = self._report
        counts = [
            (report.retries, "retry", "retries"),
            (report.dead_lettered, "dead letter", "dead letters"),
        ]
        found = [f"{count:,} {one if count == 1 else many}" for count, one, many in counts if count]
        if report.outcome == "running" and self.workers == 0:
            found.append("waiting for a worker to join the cluster")
        return found


class _Bar(Callback):
    """A bar in the terminal or the notebook, and a line below it where there is trouble."""

    def __init__(self, way: _Way, console: Console) -> None:
        self._way = way
        self._meter = _Meter(way)
        self._ascii = not console.encoding.startswith("utf")
        # Prints of the consumer go above the bar, but only where both end on one screen: a stdout
        # that was redirected into a file must keep its prints.
        together = not console.is_jupyter and console.is_terminal and sys.stdout.isatty()
        self._live = Live(
            console=console,
            get_renderable=self._draw,
            refresh_per_second=_REFRESHES_PER_S,
            redirect_stdout=together,
            redirect_stderr=not console.is_jupyter and sys.stderr.isatty(),
        )

    def _draw(self) -> RenderableType:
        report, done, whole = self._way.report, self._way.done, self._way.total
        if report.outcome == "running":
            self._meter.look(time.monotonic())
        dot = " | " if self._ascii else " · "
        total = None if whole is None else max(whole, 1)
        finished = whole is not None and done >= whole
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(ratio=1, min_width=8)
        grid.add_column(no_wrap=True)
        bar = ProgressBar(
            total,
            total if finished and total else done,
            pulse=total is None,
            complete_style="cyan",
            finished_style="green",
        )
        grid.add_row(bar, Text(dot.join(self._meter.parts())))
        troubles = self._meter.troubles()
        if troubles:
            style = "red" if report.dead_lettered else "yellow"
            grid.add_row("", Text(dot.join(troubles), style=style))
        return grid

    def on_run_started(self, notice: RunStarted) -> None:  # noqa: ARG002  # a callback is called with it
        self._live.start(refresh=True)

    def on_cluster_changed(self, notice: ClusterChanged) -> None:
        self._meter.workers = notice.workers

    def on_run_finished(self, notice: RunFinished) -> None:  # noqa: ARG002  # a callback is called with it
        try:
            if self._live.console.is_jupyter:
                self._live.refresh()  # in a terminal, stopping draws once more
        finally:
            self._live.stop()  # the cursor comes back, whatever happened


class _Lines(Callback):
    """A line every ten seconds and one at the end, for logs; told by notices, without a thread."""

    def __init__(self, way: _Way, console: Console) -> None:
        self._meter = _Meter(way)
        self._console = console
        self._due_at = _LINE_EVERY_S

    def _print(self) -> None:
        text = ", ".join([*self._meter.parts(), *self._meter.troubles()])
        self._console.print(f"zds: {text}", markup=False, highlight=False, soft_wrap=True)

    def on_run_started(self, notice: RunStarted) -> None:
        self._meter.look(notice.at)

    def on_notice(self, notice: Notice) -> None:
        if isinstance(notice, ClusterChanged):
            self._meter.workers = notice.workers
        if notice.at < self._due_at or isinstance(notice, RunFinished):
            return
        self._meter.look(notice.at)
        self._print()
        self._due_at = notice.at + _LINE_EVERY_S

    def on_run_finished(self, notice: RunFinished) -> None:  # noqa: ARG002  # a callback is called with it
        self._print()
