"""``zds verify``: decode every chunk and name each one that can't be."""

from __future__ import annotations

import json
from typing import IO

import click
from rich.text import Text

from zarr_dask_stream.cli.options import StreamRequest, output_options, stream_options
from zarr_dask_stream.cli.present import facts, plain, print_json, report_facts, screen, show
from zarr_dask_stream.engine.events import Callback, ChunkDeadLettered, DeadLetter
from zarr_dask_stream.watch.report import Report

__all__ = ["verify"]


class _Ledger(Callback):
    """Writes dead letters down as they come, so that an interrupted run leaves those it had."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def on_chunk_dead_lettered(self, notice: ChunkDeadLettered) -> None:
        """Write one line."""
        self._file.write(json.dumps(plain(notice.letter.to_dict()), ensure_ascii=False) + "\n")
        self._file.flush()


@click.command(short_help="Decode every chunk and name each bad one.")
@stream_options
@click.option(
    "--dead-letters",
    type=click.File("w", encoding="utf-8", lazy=False),
    metavar="FILE",
    help="Write each bad chunk as a line of JSON: index, region, attempts, category, message.",
)
@output_options
def verify(
    request: StreamRequest,
    *,
    dead_letters: IO[str] | None,
    as_json: bool,
    debug: bool,  # noqa: ARG001  # main reads it
) -> int:
    """Decode every chunk and name each one that is damaged or can't be read.

    Chunks that are not stored are counted, and are not damage: Zarr leaves out what holds only the fill value.
    Exit code 1: there are bad chunks.
    """
    callbacks = [] if dead_letters is None else [_Ledger(dead_letters)]
    with request.open(ordered=False, missing="skip", callbacks=callbacks) as stream:
        spec = stream.spec
        report = stream.run()
    bad = sorted(report.dead_letters, key=lambda letter: letter.index)
    if as_json:
        counts = {"good": report.emitted, "not_stored": report.skipped_missing, "bad": len(bad)}
        place = {"url": spec.store.url, "path": spec.path}
        print_json({**place, "chunks": report.total, **counts, "report": report.to_dict()})
    else:
        _show(spec.url, bad, report)
    return 1 if bad else 0


def _show(url: str, bad: list[DeadLetter], report: Report) -> None:
    console = screen()
    for letter in bad:
        tries = "" if letter.attempts == 1 else f" after {letter.attempts} attempts"
        line = Text.assemble((f"bad chunk {letter.index}", "red"), f"{tries}: {letter.message}")
        console.print(line, soft_wrap=True)
    verdict = (
        Text(f"{len(bad):,} of {report.total or 0:,} chunks of {url} are bad", style="bold red")
        if bad
        else Text(f"all {report.emitted:,} stored chunks of {url} are good", style="bold green")
    )
    if report.skipped_missing:
        verdict.append(f"; {report.skipped_missing:,} are not stored", style="default")
    console.print(verdict, soft_wrap=True)
    show(console, "")
    show(console, facts(report_facts(report)))
