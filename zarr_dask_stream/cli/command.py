"""The command ``zds``: its commands gathered, errors as one sentence, exit codes that scripts can rely on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from zarr_dask_stream.cli.bench import bench
from zarr_dask_stream.cli.copy import copy
from zarr_dask_stream.cli.demo import demo
from zarr_dask_stream.cli.info import info
from zarr_dask_stream.cli.interrupt import Terminated, heed_termination
from zarr_dask_stream.cli.present import one_line
from zarr_dask_stream.cli.run import run
from zarr_dask_stream.cli.stats import stats
from zarr_dask_stream.cli.verify import verify
from zarr_dask_stream.errors import ClusterError, LedgerInUseError, StoreError, UsageError

__all__ = ["main", "zds"]

_USAGE, _UNREACHABLE, _BUG, _LATER, _INTERRUPTED, _UNREAD, _TERMINATED = 2, 3, 70, 75, 130, 141, 143


class _Unread(Exception):  # noqa: N818  # no error: `zds stats ... | head -1` is a sane thing to write
    """Standard output was closed by whoever read it."""


class _Commands(click.Group):
    """Turns whatever ends a command into an exit code and, on standard error, one sentence."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run, and exit with the command's code."""
        debug = "--debug" in (sys.argv[1:] if args is None else args)
        try:
            code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except BaseException as error:  # each has its exit code; --debug shows where it came from
            if not standalone_mode:
                raise
            if debug and not isinstance(error, click.ClickException):
                traceback.print_exc()
            sys.exit(_explain(error))
        if not standalone_mode:
            return code
        sys.exit(code)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; whoever reads its output may have seen enough."""
        try:
            code = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError as error:
            raise _Unread from error
        return code


def _explain(error: BaseException) -> int:
    """Say what went wrong and return the exit code."""
    code, sentence = _judge(error)
    if sentence:
        with contextlib.suppress(OSError):  # standard error may be gone, the exit code is not
            click.echo(f"{click.style('Error:', fg='red', bold=True)} {sentence}", err=True)
    return code


def _judge(error: BaseException) -> tuple[int, str]:
    match error:
        case click.Abort() | KeyboardInterrupt():
            return _INTERRUPTED, "interrupted"
        case Terminated():
            return _TERMINATED, "terminated"
        case _Unread():
            # What is still buffered has nowhere to go; Python would complain of that when it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _UNREAD, ""
        case SystemExit(code=code):
            return code if isinstance(code, int) else 1, ""
        case click.UsageError(ctx=ctx):
            where = "" if ctx is None else f" (see '{ctx.command_path} --help')"
            return _USAGE, f"{' '.join(error.format_message().split())}{where}"
        case click.ClickException():
            return _USAGE, error.format_message()
        case LedgerInUseError():
            return _LATER, one_line(error)
        case UsageError() | ImportError():
            return _USAGE, one_line(error)
        case StoreError() | ClusterError() | OSError():
            return _UNREACHABLE, one_line(error)
    return _BUG, f"this should not happen: {type(error).__name__}: {one_line(error)} (--debug shows where)"


def _set_logging(*, debug: bool) -> None:
    logging.basicConfig(format="%(name)s: %(message)s" if debug else "%(message)s", level=logging.WARNING)
    # What happens to a cluster while it goes down is news to nobody who stopped it.
    if not debug:
        os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "critical")  # worker processes read it
    for name in ("distributed", "tornado", "asyncio", "bokeh"):
        logging.getLogger(name).setLevel(logging.INFO if debug else logging.CRITICAL + 1)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 done but for some chunks, 2 wrong usage, 3 no such array, or store or cluster out of "
    "reach, 75 another run has the ledger: try again later, 130 interrupted.",
)
@click.version_option(importlib.metadata.version("zarr-dask-stream"), "--version", "-V", prog_name="zds")
def zds() -> None:
    """Stream the chunks of Zarr arrays through a Dask cluster.

    A URL is a path, or whatever fsspec opens: s3://bucket/data.zarr, https://..., data.zarr.zip. Results go to
    standard output, progress and errors to standard error.

    \b
    Begin with:
      zds demo                    real data, nothing to prepare
      zds info data.zarr          what is in there
      zds stats data.zarr --path temperature
      zds run analysis:maximum data.zarr --out maxima.jsonl
    """  # noqa: D301  # \b tells click to keep the lines as they are


for _command in (demo, info, stats, verify, copy, run, bench):
    zds.add_command(_command)


def main() -> None:
    """Run ``zds`` as a program."""
    heed_termination()
    _set_logging(debug="--debug" in sys.argv)
    zds()
