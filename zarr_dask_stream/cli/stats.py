"""``zds stats``: the usual statistics of an array in one pass, and how fast it went."""

from __future__ import annotations

from typing import Any

import click
import numpy as np

from zarr_dask_stream.cli.options import (
    StreamRequest,
    checkpoint_option,
    output_options,
    report_option,
    stream_options,
)
from zarr_dask_stream.cli.present import exit_code, facts, page_of, print_json, report_facts, screen, show, warn
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.array import ArraySpec
from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.stages import reducers
from zarr_dask_stream.stages.combine import Reducer
from zarr_dask_stream.watch.report import Report, human_bytes

__all__ = ["MissingCount", "stats"]


class MissingCount(Reducer):
    """How many chunks are not stored."""

    def create(self) -> int:
        """Return none."""
        return 0

    def add(self, partial: int, chunk: Chunk) -> int:
        """Count the chunk where it came from the fill value."""
        return partial + chunk.missing

    def merge(self, left: int, right: int) -> int:
        """Add up."""
        return left + right


_STATISTICS: dict[str, Any] = {
    "count": reducers.count(),
    "nan_count": reducers.nan_count(),
    "min": reducers.min(),
    "max": reducers.max(),
    "mean": reducers.mean(),
    "std": reducers.std(),
}


@click.command(short_help="Count, min, max, mean and std in one pass.")
@stream_options
@checkpoint_option
@report_option
@output_options
def stats(
    request: StreamRequest,
    *,
    checkpoint: str | None,
    page: str | None,
    as_json: bool,
    debug: bool,  # noqa: ARG001  # main reads it
) -> int:
    """Count, smallest, largest, mean and standard deviation of an array, in one pass.

    NaN is counted and left out of the rest. Chunks that are not stored take part with the fill value. Exit code 1:
    some chunks could not be read, and the numbers are those of the others.
    """
    with request.open(ordered=False, missing="fill", checkpoint=checkpoint) as stream:
        spec = stream.spec
        reduced = stream.reduce(_suitable(spec) | {"missing_chunks": MissingCount()})
        with request.drain.over(reduced), page_of(reduced, page):
            answers = _compute(reduced)
        report = reduced.report
    if as_json:
        print_json({"url": spec.store.url, "path": spec.path, **answers, "report": report.to_dict()})
    else:
        _show(spec, answers, report)
    if report.dead_lettered:
        warn(
            f"{report.dead_lettered:,} of {report.total or 0:,} chunks could not be read and are not in these numbers, "
            f"the first {report.dead_letters[0].index}: {report.dead_letters[0].message}. 'zds verify' names them all"
        )
    if report.cancelled:
        warn(f"{report.cancelled:,} of {report.total or 0:,} chunks were not read and are not in these numbers")
    return exit_code(report, interrupted=request.drain.asked)


def _compute(reduced: Any) -> dict[str, Any]:
    """Return the answers: none where the run was given up before its end."""
    answers: dict[str, Any] = {}
    for item in reduced:
        answers.update(item.data)
    return answers


def _suitable(spec: ArraySpec) -> dict[str, Reducer]:
    """Return what is defined for the dtype: dates have a smallest one, but no standard deviation."""
    chosen: dict[str, Reducer] = {}
    for name, reducer in _STATISTICS.items():
        try:
            reducer.check(spec.dtype)
        except UsageError:
            continue
        chosen[name] = reducer
    if not chosen:
        raise UsageError(f"stats needs an array of numbers or dates, and {spec.url} holds {spec.dtype}")
    return chosen


def _show(spec: ArraySpec, answers: dict[str, Any], report: Report) -> None:
    rows = [("array", f"{spec.url} ({spec.dtype}, shape {' x '.join(map(str, spec.shape)) or '()'})")]
    rows += [(name.replace("_", " "), _text(value)) for name, value in answers.items()]
    seconds = report.wall_s or float("nan")
    rows.append(("throughput", f"{report.chunks_per_s:,.0f} chunks/s, {human_bytes(report.bytes_decoded / seconds)}/s"))
    console = screen()
    show(console, facts(rows))
    show(console, "")
    show(console, facts(report_facts(report)))


def _text(value: Any) -> str:
    if isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.timedelta64)):
        return f"{int(value):,}"
    if isinstance(value, (float, np.floating)):
        return f"{value:.8g}"
    return str(value)
