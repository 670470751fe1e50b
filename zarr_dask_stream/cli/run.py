"""``zds run``: a function of one's own on every chunk, results as lines of JSON."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import cloudpickle

from zarr_dask_stream.cli.letters import FailedChunks, letter_file
from zarr_dask_stream.cli.options import (
    StreamRequest,
    checkpoint_option,
    letter_options,
    output_options,
    own_file,
    report_option,
    stream_options,
)
from zarr_dask_stream.cli.present import (
    exit_code,
    facts,
    one_line,
    page_of,
    print_json,
    report_facts,
    screen,
    show,
    warn,
)
from zarr_dask_stream.cli.results import JsonOf, ResultFile, result_file
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.stages.transform import check_function
from zarr_dask_stream.stream import ChunkStream
from zarr_dask_stream.watch.report import Report

__all__ = ["run"]


@click.command(short_help="Call a function of your own on every chunk.")
@click.argument("function", metavar="MODULE:FUNCTION")
@stream_options
@click.option(
    "--out",
    default="-",
    metavar="FILE",
    callback=own_file,
    help="Where the lines go. Default, and '-': standard output.",
)
@click.option("--ordered", is_flag=True, help="In grid order. Default: as they complete.")
@checkpoint_option
@letter_options
@report_option
@output_options
def run(
    request: StreamRequest,
    *,
    function: str,
    out: str,
    ordered: bool,
    checkpoint: str | None,
    dead_letters: str | None,
    only_failed: FailedChunks | None,
    page: str | None,
    as_json: bool,
    debug: bool,  # noqa: ARG001  # main reads it
) -> int:
    """Call FUNCTION(chunk) of MODULE on the workers for every chunk, and write what it returns as lines of JSON.

    MODULE is found as 'python -m' finds it, first in the current directory. The function gets a chunk (.data, .index,
    .region, .missing) and returns numbers, text, None, lists, dicts, NumPy scalars or arrays; NaN becomes null. A line
    is {"index": [0, 1], "region": [[0, 10], [10, 20]], "value": ...}.

    With --checkpoint or --only-failed, FILE is appended to. With --checkpoint each chunk is in it at least once: after
    a kill, those that were written and not yet saved as done are written again, and counted in a warning.

    The report goes to standard output, or to standard error where the lines go there. Exit code 1: some chunks have
    no line.
    """
    called = _find(function)
    with _travelling(called, apart=request.scheduler is not None), letter_file(dead_letters) as letters:
        spec = request.check()
        with (
            result_file(out, spec, append=checkpoint is not None or only_failed is not None) as file,
            request.open(ordered=ordered, letters=letters, only_failed=only_failed, checkpoint=checkpoint) as chunks,
        ):
            stream = chunks.map(JsonOf(called))
            with request.drain.over(stream), page_of(stream, page):
                _write(stream, file)
    _say(stream.report, file, out, as_json=as_json)
    return exit_code(stream.report, interrupted=request.drain.asked)


def _write(stream: ChunkStream, file: ResultFile) -> None:
    grid = stream.spec.grid
    checked = False
    for item in stream:
        if not checked:
            file.check(stream.report.resumed)
            checked = True
        file.write(grid.number(item.index), item.data)
    file.check(stream.report.resumed)


def _say(report: Report, file: ResultFile, out: str, *, as_json: bool) -> None:
    err = out == "-"
    if as_json:
        print_json(
            {"out": out, "lines": report.emitted, "lines_again": file.again, "report": report.to_dict()}, err=err
        )
    else:
        where = "standard output" if err else out
        show(screen(err=err), facts([("results", f"{report.emitted:,} lines to {where}"), *report_facts(report)]))
    if file.again:
        warn(
            f"{file.again:,} chunks stand in {out} more than once: an earlier run ended before "
            "it could save them as done"
        )
    if report.dead_lettered:
        first = report.dead_letters[0]
        warn(
            f"{report.dead_lettered:,} of {report.total or 0:,} chunks have no line, the first {first.index}: "
            f"{first.error_type}: {first.message}. --dead-letters FILE lists them, --only-failed FILE runs them again"
        )


# -- the function ---------------------------------------------------------------------------------


def _find(name: str) -> Callable[..., Any]:
    """Import the function; whatever stands in the way is the user's to know."""
    module_name, colon, path = name.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module_name.split("."), *path.split("."))):
        raise UsageError(f"expected MODULE:FUNCTION, such as analysis:maximum or package.module:function, got {name!r}")
    found: Any = _imported(module_name)
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise UsageError(f"{module_name} has no {path!r}{_functions(found)}") from None
    check_function(found, name, "the chunk")
    function: Callable[..., Any] = found
    return function


def _imported(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # worker processes of this host inherit it
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and (name == missing or name.startswith(f"{missing}.")):
            raise UsageError(f"there is no module {missing!r} in {here} or among the installed ones") from error
        raise UsageError(f"{name} can't be imported: {type(error).__name__}: {one_line(error)}") from error


def _functions(place: Any) -> str:
    own = (
        [n for n, f in vars(place).items() if callable(f) and not n.startswith("_")]
        if hasattr(place, "__dict__")
        else []
    )
    mine = [n for n in own if getattr(getattr(place, n), "__module__", None) == getattr(place, "__name__", "")]
    return f", but {', '.join(sorted(mine)[:8])}" if mine else ""


@contextmanager
def _travelling(function: Callable[..., Any], *, apart: bool) -> Iterator[None]:
    """Have the modules of this directory travel whole to workers that can't import them."""
    here = Path.cwd().resolve()
    modules = [module for module in list(sys.modules.values()) if apart and _is_below(module, here)]
    modules = modules if any(module.__name__ == function.__module__ for module in modules) else []
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def _is_below(module: Any, here: Path) -> bool:
    """Whether a module is the user's own work in this directory, rather than installed there."""
    file = getattr(module, "__file__", None)
    name = getattr(module, "__name__", "__main__")
    if not isinstance(file, str) or name.partition(".")[0] in ("__main__", "zarr_dask_stream"):
        return False
    path = Path(file).resolve()
    return path.is_relative_to(here) and "site-packages" not in path.parts and path.parts[-1] != "zds"
