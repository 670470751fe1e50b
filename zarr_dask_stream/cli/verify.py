"""``zds verify``: decode every chunk and name each one that can't be."""

from __future__ import annotations

import click
from rich.text import Text

from zarr_dask_stream.cli.letters import FailedChunks, letter_file
from zarr_dask_stream.cli.options import (
    StreamRequest,
    checkpoint_option,
    letter_options,
    output_options,
    report_option,
    stream_options,
)
from zarr_dask_stream.cli.present import exit_code, facts, page_of, print_json, report_facts, screen, show
from zarr_dask_stream.engine.events import DeadLetter
from zarr_dask_stream.watch.report import Report

__all__ = ["verify"]


@click.command(short_help="Decode every chunk and name each bad one.")
@stream_options
@checkpoint_option
@letter_options
@report_option
@output_options
def verify(
    request: StreamRequest,
    *,
    checkpoint: str | None,
    dead_letters: str | None,
    only_failed: FailedChunks | None,
    page: str | None,
    as_json: bool,
    debug: bool,  # noqa: ARG001  # main reads it
) -> int:
    """Decode every chunk and name each one that is damaged or can't be read.

    Chunks that are not stored are counted, and are not damage: Zarr leaves out what holds only the fill value. After a
    repair, --only-failed looks at the bad ones again. Exit code 1: there are bad chunks.
    """
    with (
        letter_file(dead_letters) as letters,
        request.open(
            ordered=False, missing="skip", letters=letters, only_failed=only_failed, checkpoint=checkpoint
        ) as stream,
        request.drain.over(stream),
        page_of(stream, page),
    ):
        spec = stream.spec
        report = stream.run()
    bad = sorted(report.dead_letters, key=lambda letter: letter.index)
    if as_json:
        counts = {"good": report.emitted, "not_stored": report.skipped_missing, "bad": len(bad)}
        place = {"url": spec.store.url, "path": spec.path}
        print_json({**place, "chunks": report.total, **counts, "report": report.to_dict()})
    else:
        _show(spec.url, bad, report)
    return exit_code(report, interrupted=request.drain.asked)


def _show(url: str, bad: list[DeadLetter], report: Report) -> None:
    console = screen()
    for letter in bad:
        tries = "" if letter.attempts == 1 else f" after {letter.attempts} attempts"
        line = Text.assemble((f"bad chunk {letter.index}", "red"), f"{tries}: {letter.message}")
        console.print(line, soft_wrap=True)
    verdict = _verdict(url, len(bad), report)
    if report.skipped_missing:
        verdict.append(f"; {report.skipped_missing:,} are not stored", style="default")
    if report.resumed:
        verdict.append(f"; {report.resumed:,} were done by earlier runs", style="default")
    if report.cancelled:
        verdict.append(f"; {report.cancelled:,} were not looked at", style="yellow")
    console.print(verdict, soft_wrap=True)
    show(console, "")
    show(console, facts(report_facts(report)))


def _verdict(url: str, bad: int, report: Report) -> Text:
    if bad:
        return Text(f"{bad:,} of {report.total or 0:,} chunks of {url} are bad", style="bold red")
    if report.cancelled or report.resumed:
        return Text(f"{report.emitted:,} chunks of {url} were looked at and are good", style="bold green")
    return Text(f"all {report.emitted:,} stored chunks of {url} are good", style="bold green")
