"""What commands print: tables on standard output, plain where it is no terminal; JSON that any parser reads."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import click
import numpy as np
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from zarr_dask_stream.watch.report import Report

__all__ = ["exit_code", "facts", "one_line", "page_of", "plain", "print_json", "report_facts", "screen", "show", "warn"]


class _Reported(Protocol):
    @property
    def report(self) -> Report: ...


@contextmanager
def page_of(stream: _Reported, file: str | None) -> Iterator[None]:
    """Write the report of a stream's run as a page when it is over, in whatever way."""
    try:
        yield
    finally:
        if file is not None:
            try:
                stream.report.to_html(file)
            except OSError as error:
                warn(f"the report can't be written to {file}: {one_line(error)}")


def exit_code(report: Report, *, interrupted: bool) -> int:
    """Return what a run's end means to a script."""
    if interrupted:
        return 130
    return 1 if report.dead_lettered else 0


def screen(*, err: bool = False) -> Console:
    """Return standard output or error: coloured and as wide as a terminal, else plain and never cut."""
    console = Console(highlight=False, stderr=err)
    return console if console.is_terminal else Console(highlight=False, width=200, stderr=err)


def show(console: Console, what: RenderableType) -> None:
    """Print; what goes to a file or pipe has no spaces at the ends of its lines."""
    if console.is_terminal:
        console.print(what)
        return
    with console.capture() as captured:
        console.print(what)
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()), err=console.stderr)


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Lay out labelled values, one to a line."""
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(Text(label), Text(value))
    return table


def report_facts(report: Report) -> list[tuple[str, str]]:
    """Return the account of a run without what the command itself has said already."""
    return [row for row in report.rows() if row[0] not in ("array", "outcome")]


def print_json(value: Any, *, err: bool = False) -> None:
    """Print one JSON object; NaN and infinities, which JSON lacks, become null."""
    click.echo(json.dumps(plain(value), indent=2, allow_nan=False, ensure_ascii=False), err=err)


def plain(value: Any) -> Any:
    """Turn NumPy's scalars, tuples and what JSON lacks into what it has."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value[()]) if value.ndim == 0 else [plain(item) for item in value]
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (np.datetime64, np.timedelta64, complex, np.complexfloating)):
        return str(value)
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (str, int, float)):
        return value
    return str(value)


def one_line(error: BaseException) -> str:
    """Return what an error says as one line, or what it is where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def warn(text: str) -> None:
    """Say something on standard error that belongs to no result."""
    click.secho(text, fg="yellow", err=True)
