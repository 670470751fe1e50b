"""The options that commands share, and the stream that they describe."""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import click

from zarr_dask_stream.chunks import stream_chunks
from zarr_dask_stream.cli.expression import IndexExpression, parse_region_text
from zarr_dask_stream.cli.interrupt import Drain, cluster
from zarr_dask_stream.cli.letters import FailedChunks, LetterFile
from zarr_dask_stream.engine.checkpoint import Checkpoint
from zarr_dask_stream.engine.cluster import memory_budget
from zarr_dask_stream.engine.retry import RetryPolicy
from zarr_dask_stream.engine.throttle import RateLimit
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.array import ArraySpec, open_array
from zarr_dask_stream.source.hedging import Hedge
from zarr_dask_stream.source.store import store_errors
from zarr_dask_stream.stream import ChunkStream

__all__ = [
    "StoreRequest",
    "StreamRequest",
    "checkpoint_option",
    "collect_options",
    "letter_options",
    "output_options",
    "own_file",
    "progress_option",
    "report_option",
    "store_options",
    "stream_options",
    "workers_option",
]

Command = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class StoreRequest:
    """Which array, or group, of which store."""

    url: str
    path: str
    storage_options: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class StreamRequest(StoreRequest):
    """Which chunks, where they are read, and how hard to try."""

    scheduler: str | None
    workers: int | None
    region: tuple[int | slice | EllipsisType, ...] | None
    where: IndexExpression | None
    retries: int
    timeout: float
    max_bytes: str
    concurrency: int | None
    rate_limit: RateLimit | None
    hedge: bool
    progress: bool
    drain: Drain = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "drain", Drain(self.timeout))

    def check(self) -> ArraySpec:
        """Read the array's metadata: a mistyped URL should be told at once, not after a cluster has started."""
        if self.scheduler and self.workers:
            raise UsageError("--scheduler names a cluster and --workers starts one: give one of them")
        with store_errors():
            spec = open_array(self.url, path=self.path, storage_options=self.storage_options)
        if self.where is not None:
            self.where.check(len(spec.shape))
        return spec

    @contextmanager
    def open(
        self,
        *,
        letters: LetterFile | None = None,
        only_failed: FailedChunks | None = None,
        checkpoint: str | None = None,
        client: Any = None,
        **options: Any,
    ) -> Iterator[ChunkStream]:
        """Describe the stream, on the cluster that was asked for; both end with the block. A `client` given stays."""
        spec = self.check()
        where = self.where if only_failed is None else only_failed.condition(spec, self.where)
        if letters is not None:
            letters.begin(spec)
        observers = [] if letters is None else [letters]
        with nullcontext(client) if client is not None else cluster(self.scheduler, self.workers) as lent:
            ledger = self.ledger(checkpoint)
            yield self.stream(lent, where=where, checkpoint=ledger, callbacks=observers, **options)

    def stream(self, client: Any, *, callbacks: Sequence[Any] = (), **options: Any) -> ChunkStream:
        """Describe the stream, on the cluster of a client."""
        return stream_chunks(
            self.url,
            path=self.path,
            storage_options=self.storage_options,
            client=client,
            region=self.region,
            concurrency=self.concurrency,
            max_bytes=self.max_bytes,
            retry=RetryPolicy(attempts=self.retries + 1),
            timeout=self.timeout,
            rate_limit=self.rate_limit,
            hedge=Hedge() if self.hedge else None,
            on_error="skip",
            progress=self.progress,
            callbacks=[self.drain, *callbacks],
            **{"where": self.where, **options},
        )

    def ledger(self, url: str | None) -> Checkpoint | None:
        """Return the place of the ledger; on the kind of store that the array is on, it takes the same options."""
        if url is None:
            return None
        scheme, found, _ = url.partition("://")
        same = bool(found) and self.url.startswith(f"{scheme}://")
        return Checkpoint(url=url, storage_options=self.storage_options if same else {})


# -- values ---------------------------------------------------------------------------------------


if TYPE_CHECKING:
    _Type = click.ParamType[Any]
else:
    _Type = click.ParamType  # has a parameter from click 8.4 on


class _Parsed(_Type):
    """A value that a function of ours makes of text; its UsageError becomes click's."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


def _checked_size(text: str) -> str:
    memory_budget(text)
    return text


_PER = {"s": 1.0, "min": 60.0, "h": 3600.0}
_RATE = re.compile(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*(?:/\s*(s|min|h))?\s*", re.ASCII | re.IGNORECASE)


def _parse_rate(text: str) -> RateLimit:
    """Read "200", "200/s", "6000/min" as requests, "50 MiB/s" as stored bytes."""
    found = _RATE.fullmatch(text)
    try:
        number, unit, per = found.groups() if found else ("", "", "")
        seconds = _PER[(per or "s").lower()]
        if unit:
            return RateLimit(bytes=memory_budget(f"{number} {unit}"), per=seconds)
        return RateLimit(requests=float(number), per=seconds)
    except ValueError:  # UsageError is one
        example = "200/s, 6000/min or '50 MiB/s'"
        raise UsageError(f"expected chunks or bytes for a time, such as {example}, got {text!r}") from None


def collect_options(_ctx: click.Context, _param: click.Parameter, pairs: tuple[str, ...]) -> dict[str, Any]:
    """Turn K=V into options, ``a.b=V`` into nested ones. Values may be secrets: none is ever quoted."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        names = key.strip().split(".")
        if not equals or not all(names):
            raise click.BadParameter("expected K=V, such as anon=true or client_kwargs.endpoint_url=http://host:9000")
        place = options
        for name in names[:-1]:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise click.BadParameter(f"{key!r} goes below {name!r}, which was given a value of its own")
        place[names[-1]] = _parse_value(text)
    return options


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


# -- options --------------------------------------------------------------------------------------


def _add(options: list[Callable[[Command], Command]]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_STORE: list[Callable[[Command], Command]] = [
    click.argument("url"),
    click.option("--path", default="", metavar="PATH", help="Path of the array inside the store."),
    click.option(
        "--storage-option",
        "storage_options",
        multiple=True,
        metavar="K=V",
        callback=collect_options,
        help="Option for the file system of the URL; may be repeated. V is JSON or else text; a dotted K nests: "
        "client_kwargs.endpoint_url=http://host:9000. Other users of this host can see it: give secrets through "
        "the environment or the provider's own files.",
    ),
]

workers_option = click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Run on N worker processes of this host. Default: one worker inside this process, a thread per core.",
)

_STREAM: list[Callable[[Command], Command]] = [
    click.option(
        "--region",
        type=_Parsed("region", parse_region_text),
        metavar="TEXT",
        help="Part of the array, in NumPy's notation: '0:10,5,...'. Only chunks that it touches are read.",
    ),
    click.option(
        "--where",
        type=_Parsed("condition", IndexExpression),
        metavar="TEXT",
        help="Condition on a chunk's place in the grid, asked before it is read: 'i0 % 2 == 0 and i1 < 10'. "
        "i0, i1, ... (or index[0], ...) are the place along each axis; beside them integers, + - * // %, comparisons, "
        "in (1, 2), and, or, not, parentheses.",
    ),
    click.option(
        "--retries",
        type=click.IntRange(min=0),
        default=4,
        show_default=True,
        metavar="N",
        help="Further tries of a chunk whose reading failed and may succeed later.",
    ),
    click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        default=60.0,
        show_default=True,
        metavar="SECONDS",
        help="For one try of one chunk.",
    ),
    click.option(
        "--max-bytes",
        type=_Parsed("size", _checked_size),
        default="10%",
        show_default=True,
        metavar="SIZE",
        help="Most decoded bytes in flight: bytes, '512 MiB', or a share of this host's memory.",
    ),
    click.option(
        "--concurrency", type=click.IntRange(min=1), metavar="N", help="Most chunks in flight. 1: one after the other."
    ),
    click.option(
        "--rate-limit",
        type=_Parsed("rate", _parse_rate),
        metavar="N[/s]",
        help="Most chunks asked for per second, all workers together; also '6000/min', or bytes: '50 MiB/s'.",
    ),
    click.option(
        "--hedge/--no-hedge",
        default=False,
        show_default=True,
        help="Start a second copy of a read that takes much longer than usual; the first answer wins.",
    ),
    click.option("--scheduler", metavar="ADDRESS", help="Run on the Dask cluster of this scheduler (tcp://host:8786)."),
    workers_option,
]

checkpoint_option = click.option(
    "--checkpoint",
    metavar="URL",
    help="Ledger of the chunks that are done, at a path or URL: the same command goes on where it was stopped. "
    "Where its URL begins as the array's does, the --storage-option are its options too.",
)


def own_file(_ctx: click.Context, _param: click.Parameter, file: str | None) -> str | None:
    """Return a path with the home directory in place of ``~``, which shells leave alone in ``--out=~/file``."""
    return None if file is None else os.path.expanduser(file)  # noqa: PTH111  # where there is no home, pathlib raises


_LETTERS: list[Callable[[Command], Command]] = [
    click.option(
        "--dead-letters",
        metavar="FILE",
        callback=own_file,
        help="Write each bad chunk as a line of JSON: index, region, attempts, category, message.",
    ),
    click.option(
        "--only-failed",
        type=_Parsed("file", FailedChunks.read),
        metavar="FILE",
        help="Only the chunks that --dead-letters wrote to this file; together with --where and --region, those of "
        "them that fulfil both.",
    ),
]


def _writable(ctx: click.Context, param: click.Parameter, file: str | None) -> str | None:
    """Refuse before the work what could not be written after it."""
    file = own_file(ctx, param, file)
    if file is not None and not Path(file).absolute().parent.is_dir():
        raise click.BadParameter(f"there is no folder {str(Path(file).absolute().parent)!r} to put the page in")
    return file


report_option = click.option(
    "--report",
    "page",
    type=click.Path(dir_okay=False, writable=True),
    metavar="FILE.html",
    callback=_writable,
    help="Write the run as one page: chunk map, rates over time, latencies, workers, causes of errors, advice.",
)
progress_option = click.option(
    "--progress/--no-progress",
    default=None,
    callback=lambda _ctx, _param, value: sys.stderr.isatty() if value is None else value,
    help="A bar on standard error, or lines where it is no terminal. Default: on a terminal.",
)
_OUTPUT: list[Callable[[Command], Command]] = [
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text."),
    click.option("--debug", is_flag=True, help="Show tracebacks of errors, and what Dask logs."),
]


def output_options(command: Command) -> Command:
    """Add --json and --debug."""
    return _add(_OUTPUT)(command)


def letter_options(command: Command) -> Command:
    """Add --dead-letters and --only-failed."""
    return _add(_LETTERS)(command)


def store_options(command: Command) -> Command:
    """Add what says where an array is; the command gets it as a `StoreRequest`."""
    return _add(_STORE)(_gathered(StoreRequest, command))


def stream_options(command: Command) -> Command:
    """Add what says what to stream, and how; the command gets it as a `StreamRequest`."""
    return _add([*_STORE, *_STREAM, progress_option])(_gathered(StreamRequest, command))


def _gathered(kind: type[StoreRequest], command: Command) -> Command:
    @functools.wraps(command)
    def run(**values: Any) -> Any:
        request = kind(**{one.name: values.pop(one.name) for one in fields(kind) if one.init})
        return command(request, **values)

    return run
