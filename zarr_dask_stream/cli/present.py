"""What commands print: tables on standard output, plain where it is no terminal; JSON that any parser reads."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import click
import numpy as np
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from zarr_dask_stream.watch.report import Report

__all__ = [
    "exit_code",
    "facts",
    "one_line",
    "page_of",
    "plain",
    "print_json",
    "printable",
    "report_facts",
    "screen",
    "show",
    "warn",
]

#: What a terminal obeys instead of showing it: control characters, and those that turn the direction of text.
_OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


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
        table.add_row(Text(printable(label)), Text(printable(value)))
    return table


def report_facts(report: Report) -> list[tuple[str, str]]:
    """Return the account of a run without what the command itself has said already."""
    return [row for row in report.rows() if row[0] not in ("array", "outcome")]


def print_json(value: Any, *, err: bool = False) -> None:
    """Print one JSON object; NaN and infinities, which JSON lacks, become null."""
    text = json.dumps(plain(value), indent=2, allow_nan=False, ensure_ascii=False)
    click.echo(_OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text), err=err)


def printable(text: str) -> str:
    r"""Write out what a terminal would obey: names come from stores, and those from anybody.

    Examples
    --------
    >>> print(printable("t2m\x1b[2J, größer"))
    t2m\x1b[2J, größer
    """
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


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
    return printable(" ".join(str(error).split())) or type(error).__name__


def warn(text: str) -> None:
    """Say something on standard error that belongs to no result."""
    click.secho(printable(text), fg="yellow", err=True)
