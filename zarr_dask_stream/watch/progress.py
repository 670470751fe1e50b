"""A bar for people, a callback for programs: both observers of the same notices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from zarr_dask_stream.engine.events import Callback, Notice, RunFinished, RunStarted
from zarr_dask_stream.watch.report import Report, human_bytes

__all__ = ["progress_observer"]


def progress_observer(progress: bool | Callable[[int, int], Any], report: Report) -> Callable[[Notice], None]:
    """Return an observer that shows `report` as a bar, or passes ``(done, total)`` on."""
    if callable(progress):
        return _Counter(progress, report).handle
    return _Bar(report).handle


class _Counter(Callback):
    """Calls ``fn(done, total)`` whenever more chunks have settled."""

    def __init__(self, fn: Callable[[int, int], Any], report: Report) -> None:
        self._fn = fn
        self._report = report
        self._told = -1

    def on_notice(self, notice: Notice) -> None:  # noqa: ARG002  # the report has folded it already
        done = self._report.settled - self._report.cancelled
        if done != self._told and self._report.total is not None:
            self._told = done
            self._fn(done, self._report.total)


class _Bar(Callback):
    """A bar in the terminal or the notebook: chunks, rate, bytes and what went wrong."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._task = self._bar.add_task("chunks", total=None, note="")

    def on_run_started(self, notice: RunStarted) -> None:
        self._bar.update(self._task, total=notice.total)
        self._bar.start()

    def on_notice(self, notice: Notice) -> None:  # noqa: ARG002
        report = self._report
        note = f"{human_bytes(report.bytes_decoded)}"
        if report.retries:
            note += f", {report.retries} retries"
        if report.dead_lettered:
            note += f", {report.dead_lettered} dead"
        self._bar.update(self._task, completed=report.settled - report.cancelled, note=note)

    def on_run_finished(self, notice: RunFinished) -> None:  # noqa: ARG002
        self._bar.stop()
