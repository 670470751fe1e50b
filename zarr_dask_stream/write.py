"""The reverse of a stream: `write_chunks` takes data from an iterable and writes them on the workers."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import zarr

from zarr_dask_stream.engine.checkpoint import Checkpoint
from zarr_dask_stream.engine.feed import Feed
from zarr_dask_stream.engine.retry import RetryPolicy
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.options import OnError, Options, Progress, check_kind, run_options
from zarr_dask_stream.source.array import open_array
from zarr_dask_stream.source.blocks import Blocks
from zarr_dask_stream.source.metadata import join
from zarr_dask_stream.source.selection import ChunkPlan, parse_region
from zarr_dask_stream.source.store import store_errors
from zarr_dask_stream.source.target import (
    Target,
    check_options,
    check_writing,
    existing_target,
    find_place,
    new_target,
)
from zarr_dask_stream.source.writer import Verify
from zarr_dask_stream.stages.layout import writes_empty
from zarr_dask_stream.stages.sink import Placement, Sink
from zarr_dask_stream.stream import ChunkStream
from zarr_dask_stream.watch.report import Report

__all__ = ["write_chunks"]


def write_chunks(
    target: Any,
    items: Iterable[Any],
    *,
    path: str = "",
    storage_options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    verify: Verify = True,
    client: Any = None,
    concurrency: int | None = None,
    max_bytes: int | str = "256 MiB",
    retry: RetryPolicy | None = None,
    timeout: float | None = 60.0,
    on_error: OnError = "raise",
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    progress: Progress = False,
    callbacks: Iterable[Any] = (),
    **create: Any,
) -> Report:
    """Write data into an array, chunk by chunk, encoded and stored on the workers of a Dask cluster.

    Items are asked for as there is room for them. What came before an item that is refused, or before an exception
    of the iterable, is written; then the exception is raised.

    Parameters
    ----------
    target : str, path, zarr.Array, zarr store, mapping or zarr.Group
        The array, or where it is; with a `shape` (and what else ``zarr.create_array`` takes), where it is made.
    items : iterable
        Each is ``(index, data)`` with the grid index of a stored chunk, ``(region, data)`` with slices, a `Chunk`, or
        an array alone, which goes where the array before it ended, in grid order. In a sharded array, shards take
        the place of chunks. Data have the shape of their place, cropped to the array, and are cast within their
        kind. They are copied: an array may be used again when the next item is asked for.
    path, storage_options
        As `stream_chunks` takes them.
    overwrite : bool
        Replace an array that is there by one that is made.
    verify : bool or "read"
        As ``.to_zarr(...)`` takes it.
    client, concurrency, retry, timeout, on_error, progress, callbacks
        As `stream_chunks` takes them. Data reach the workers of a cluster through its scheduler.
    max_bytes : int or str
        Bytes of data asked for and not written yet, a hard bound; one chunk larger than that passes alone.
    checkpoint : str, path or Checkpoint, optional
        A durable ledger of what is written, and on the disk. With the same items once more, what it has is passed
        over.
    **create
        What ``zarr.create_array`` takes, to make the array: shape and dtype at least.

    Returns
    -------
    Report
        Its chunks are stored objects: what was given, and what became of it. Under an asynchronous client, an
        awaitable of it.

    Raises
    ------
    UsageError
        If an item does not fit: a place that is no whole chunk (or shard), is outside the array or was given before,
        another shape, another kind of dtype. Or an option can't work.
    StoreError
        If there is no such array, or the store can't be read.
    ChunkError
        If a chunk could not be written, unless `on_error` says otherwise.

    Examples
    --------
    >>> import numpy as np, zarr
    >>> array = zarr.create_array({}, shape=(3, 4), chunks=(2, 4), dtype="f4")
    >>> rows = (((i, 0), np.full((len(range(i * 2, min(i * 2 + 2, 3))), 4), i)) for i in range(2))
    >>> write_chunks(array, rows, concurrency=1)
    Report(done: 2/2 emitted, 0 filtered, 0 missing, 0 dead, 0 cancelled, 0 retries, ... s)
    >>> array[:, 0]
    array([0., 0., 1.], dtype=float32)
    >>> write_chunks(array, [((0, 0), np.zeros((3, 4)))], concurrency=1)
    Traceback (most recent call last):
        ...
    zarr_dask_stream.errors.UsageError: the array for [0:2, 0:4] has shape (3, 4), and (2, 4) belongs there
    """
    told = run_options(
        missing="fill",
        ordered=False,
        concurrency=concurrency,
        max_bytes=max_bytes,
        retry=retry,
        timeout=timeout,
        on_error=on_error,
        checkpoint=checkpoint,
        progress=progress,
        callbacks=callbacks,
        client=client,
    )
    check_kind("storage_options", Mapping, storage_options)
    check_writing(overwrite, verify)
    if isinstance(items, (np.ndarray, zarr.Array, str, bytes, Mapping)) or not isinstance(items, Iterable):
        raise UsageError(f"items is an iterable of chunks, such as a generator or a list, got {type(items).__name__}")
    with store_errors():
        made = _target(target, path, storage_options, create, overwrite=overwrite)
        if told["checkpoint"] is None and not made.exists:
            made.check_free()
    feed = Feed(made.spec, items)
    stream = ChunkStream(_options(made, feed, told, write_empty=writes_empty(create.get("config")), verify=verify))
    if getattr(client, "asynchronous", False):
        pending: Any = _write_async(stream, feed)
        return pending  # type: ignore[no-any-return]  # as Dask's own methods do
    stream.run()
    return _judged(stream, feed)


def _options(made: Target, feed: Feed, told: dict[str, Any], *, write_empty: bool, verify: Verify) -> Options:
    """Return a stream's options whose items come from the caller, each what one stored object holds."""
    spec, ledger = made.spec, told["checkpoint"]
    blocks = Blocks.of(spec, spec.grid.shard_grid.chunks)
    zeros, lengths = (0,) * len(spec.shape), blocks.grid.chunks
    token = uuid.uuid4().hex[:12] if ledger is None else ledger.token
    sink = Sink(
        spec=spec,
        placement=Placement(zeros, lengths, lengths),
        write_empty=write_empty,
        verify=verify,
        fresh=not made.exists,
        aside=join(spec.path, f".zds-{token}") if spec.store.kind == "local" else "",
        durable=ledger is not None,
    )
    plan = ChunkPlan(blocks.grid, parse_region(None, spec.shape))
    return Options(spec=spec, plan=plan, blocks=blocks, target=made, sink=sink, feed=feed, **told)


async def _write_async(stream: ChunkStream, feed: Feed) -> Report:
    async for _ in stream:
        pass
    return _judged(stream, feed)


def _judged(stream: ChunkStream, feed: Feed) -> Report:
    if feed.error is not None:
        raise feed.error
    return stream.report


def _target(
    target: Any, path: str, storage_options: Mapping[str, Any] | None, create: Mapping[str, Any], *, overwrite: bool
) -> Target:
    """Return the array that is written to: one that is there, or with a shape one that is made."""
    making = {name: value for name, value in create.items() if name != "shape"}
    check_options(making)
    if "shape" in create:
        if isinstance(target, zarr.Array) and not path:
            raise UsageError("the target is an open array, and has a shape: leave shape= out, or name another place")
        if create.get("dtype") is None:
            raise UsageError("an array that is made needs a dtype beside its shape: say dtype=")
        place = find_place(target, path, storage_options)
        version = place.version_above()
        return new_target(
            place, {**({} if version is None else {"zarr_format": version}), **create}, overwrite=overwrite
        )
    extra = sorted({*making} - {"config"}) + ["overwrite"] * overwrite
    if extra:
        raise UsageError(
            f"an array that is there is written to as it is: leave {', '.join(extra)} out, or say shape= to make one"
        )
    if isinstance(target, zarr.Array) and not path:
        return existing_target(target)
    return Target(open_array(target, path=path, storage_options=storage_options))
