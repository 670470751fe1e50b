"""``zds demo``: the main job on real data, with nothing to prepare and nothing left behind."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from zarr_dask_stream.chunks import stream_chunks
from zarr_dask_stream.cli.interrupt import cluster
from zarr_dask_stream.cli.options import output_options, progress_option, workers_option
from zarr_dask_stream.cli.present import facts, print_json, report_facts, screen, show
from zarr_dask_stream.demo import band_means, band_names, sample_file, write_sample
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.stream import ChunkStream
from zarr_dask_stream.watch.report import Report, human_bytes, human_seconds

__all__ = ["demo"]

_NAME = "linke_turbidity.zarr"
_MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
_SPARKS = "▁▂▃▄▅▆▇█"
_LOWEST, _HIGHEST = 1.5, 4.5  # ends of the colours: polar winter and Saharan summer
# From clear blue to dusty red, as numbers of the 256-colour palette, which terminals without more know.
_COLOURS = (24, 31, 37, 72, 143, 179, 173, 167)


@click.command(short_help="Stream real data, nothing to prepare: begin here.")
@click.option(
    "--keep",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help=f"Write the array to DIR/{_NAME} and leave it there, to go on with.",
)
@workers_option
@progress_option
@output_options
def demo(
    *,
    keep: Path | None,
    workers: int | None,
    progress: bool,
    as_json: bool,
    debug: bool,  # noqa: ARG001  # main reads it
) -> int:
    """Stream a year of the Earth's atmosphere through Dask: real data, no arguments, well under a minute.

    The data are a monthly climatology of Linke turbidity, which says how hazy the air is, from the package pvlib. They
    are written as a chunked, compressed Zarr array, streamed through a Dask cluster inside this process, and
    reduced to the mean of each latitude band and month.
    """
    sample_file()  # say what is not installed before anything else
    with _place(keep) as target:
        wrote_s = _write(target, progress=progress)
        with cluster(workers=workers) as client:
            stream = stream_chunks(str(target), client=client, ordered=False, on_error="skip", progress=progress)
            means, ran = band_means(stream)
        if as_json:
            answer = {"bands": band_names(), "months": _MONTHS, "mean": means.tolist()}
            print_json({**answer, "report": ran.report.to_dict()})
        else:
            _show(means, ran.report, _array_facts(target, stream, wrote_s), kept=keep is not None)
    return 1 if ran.report.dead_lettered else 0


@contextmanager
def _place(keep: Path | None) -> Iterator[Path]:
    """Lend a place for the array; a temporary one is gone afterwards, whatever happens."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="zds-demo-") as folder:
            yield Path(folder) / _NAME
        return
    target = keep / _NAME
    if target.exists():
        raise UsageError(f"{target} is there already: remove it, or name another directory with --keep")
    keep.mkdir(parents=True, exist_ok=True)
    yield target


def _write(target: Path, *, progress: bool) -> float:
    """Write the array and return how many seconds that took."""
    began = time.monotonic()
    console = Console(stderr=True)
    waiting = (
        console.status("Writing the sample as a Zarr array") if progress and console.is_terminal else nullcontext()
    )
    with waiting:
        write_sample(target)
    return time.monotonic() - began


def _array_facts(target: Path, stream: ChunkStream, wrote_s: float) -> list[tuple[str, str]]:
    spec = stream.spec
    stored = human_bytes(sum(file.stat().st_size for file in target.rglob("*") if file.is_file()))
    return [
        ("array", f"{' x '.join(map(str, spec.shape))} {spec.dtype}, {human_bytes(spec.nbytes)}"),
        (
            "stored as",
            f"{len(spec.grid):,} chunks of {human_bytes(spec.chunk_nbytes)}, {stored} compressed",
        ),
        ("written to", f"{target} in {human_seconds(wrote_s)}"),
    ]


# -- what a person sees ---------------------------------------------------------------------------


def _show(means: npt.NDArray[np.float64], report: Report, about: list[tuple[str, str]], *, kept: bool) -> None:
    console = screen()
    show(console, Text("How hazy is the air? Mean Linke turbidity by latitude and month", style="bold"))
    show(console, Text("1 is air without dust or vapour, 2 very clear, 3 clear, 4 or more hazy.\n", style="dim"))
    show(console, _table(means, console))
    show(console, Text(f"\n{_extremes(means)}\n"))
    show(console, facts([*about, *report_facts(report)]))
    if kept:
        show(console, Text(f"\nTo go on with the array: zds info {about[-1][1].split(' in ')[0]}"))


def _table(means: npt.NDArray[np.float64], console: Console) -> Table:
    fancy = console.encoding.startswith("utf")
    coloured = console.color_system in ("256", "truecolor")  # fewer colours can't be told apart, or read
    table = Table.grid(padding=(0, 0))
    table.add_column(justify="right", no_wrap=True)
    for _ in _MONTHS:
        table.add_column(justify="right", no_wrap=True, width=4)
    table.add_column(no_wrap=True)
    table.add_row("", *(Text(f"{month} ", style="dim") for month in _MONTHS), Text("  year", style="dim"))
    for name, row in zip(band_names(), means, strict=True):
        label = name.replace(" ", "° ") if fancy else name
        cells = [Text(f" {value:.1f}", style=_style(value) if coloured else "") for value in row]
        table.add_row(Text(f"{label} "), *cells, _year(row, _style(row.mean()) if coloured else "", fancy=fancy))
    return table


def _year(row: npt.NDArray[np.float64], style: str, *, fancy: bool) -> Text:
    """Show the year's mean, and beside it the course of the year."""
    mean = float(row.mean())
    if fancy:
        return Text.assemble(" ", (f" {mean:.1f}", style), " ", (_sparkline(row), "dim"))
    return Text(f"  {mean:.1f} {'#' * round(max(np.nan_to_num(mean), 0.0) * 3)}")


def _sparkline(row: npt.NDArray[np.float64]) -> str:
    """Draw the course of the year between the row's own least and most."""
    known = row[np.isfinite(row)]
    if not known.size:
        return ""
    low, high = float(known.min()), float(known.max())
    span = (high - low) or 1.0
    steps = np.nan_to_num((row - low) / span * (len(_SPARKS) - 1)).round().astype(int)
    return "".join(_SPARKS[step] for step in steps)


def _style(value: float) -> str:
    level = np.nan_to_num((value - _LOWEST) / (_HIGHEST - _LOWEST))
    colour = _COLOURS[min(max(int(level * len(_COLOURS)), 0), len(_COLOURS) - 1)]
    return f"color(231) on color({colour})"


def _extremes(means: npt.NDArray[np.float64]) -> str:
    """Say in a sentence where and when the air is haziest and clearest."""

    def place(at: Any) -> str:
        band, month = np.unravel_index(int(at), means.shape)
        return f"{means[band, month]:.2f} at {band_names()[band]} in {_MONTHS[month]}"

    if np.isnan(means).any():
        return "Some chunks could not be read: nan stands where a mean is missing."
    return f"Haziest: {place(np.argmax(means))}. Clearest: {place(np.argmin(means))}."
