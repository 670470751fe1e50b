"""`stream_chunks`: everything is checked, metadata are read, and a lazy stream comes out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from zarr_dask_stream.engine.checkpoint import Checkpoint
from zarr_dask_stream.engine.retry import RetryPolicy
from zarr_dask_stream.engine.throttle import RateLimit
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.opened import Opened, of_dataarray
from zarr_dask_stream.options import OnError, Options, Progress, check_count, check_kind, run_options
from zarr_dask_stream.source.array import ArraySpec, open_array
from zarr_dask_stream.source.hedging import Hedge
from zarr_dask_stream.source.labels import array_labels
from zarr_dask_stream.source.selection import ChunkPlan, Missing, RegionLike, parse_region
from zarr_dask_stream.source.store import store_errors
from zarr_dask_stream.source.traced import kind_of
from zarr_dask_stream.stages.transform import check_function
from zarr_dask_stream.stream import ChunkStream

__all__ = ["stream_chunks"]


def stream_chunks(
    array: Any,
    *,
    path: str = "",
    storage_options: Mapping[str, Any] | None = None,
    client: Any = None,
    region: RegionLike = None,
    where: Callable[[tuple[int, ...]], Any] | None = None,
    missing: Missing = "fill",
    ordered: bool = True,
    concurrency: int | None = None,
    max_bytes: int | str = "10%",
    requests: int | None = None,
    retry: RetryPolicy | None = None,
    timeout: float | None = 60.0,
    hedge: Hedge | None = None,
    rate_limit: RateLimit | None = None,
    on_error: OnError = "raise",
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    progress: Progress = False,
    callbacks: Iterable[Any] = (),
) -> ChunkStream:
    """Stream the chunks of a Zarr array through a Dask cluster.

    Everything is checked here, and nothing but metadata is read. Iterate the result with ``for``, or
    with ``async for`` under an asynchronous client.

    Parameters
    ----------
    array : str, path, zarr.Array, zarr store, mapping or xarray.DataArray
        The array, or the store it is in (then with `path`). URLs are opened with fsspec. A DataArray that was
        opened from Zarr, and perhaps sliced, is traced back to its array: items hold the values that it shows.
    path : str
        Path of the array inside the store.
    storage_options : mapping, optional
        Options for the file system of a URL (credentials, endpoint). Never shown or logged.
    client : distributed.Client, optional
        By default the active client. Where there is none, a cluster inside this process is started
        for each run and ended with it; with ``concurrency=1`` not even that: chunks are read one by
        one in the calling thread. So they are inside a function that another stream calls on a worker.
    region : int, slice, Ellipsis or tuple of these, optional
        In array coordinates. Only chunks that intersect it are read, and they are cropped to it. An
        integer keeps its axis, with length 1.
    where : callable, optional
        ``where(index) -> bool`` on the grid index, asked before anything is read.
    missing : {"fill", "skip", "raise"}
        What to do with a chunk that is not stored: hand out the fill value (with ``chunk.missing``
        set), leave it out (counted in the report), or treat it as a failure.
    ordered : bool
        True: in grid order (C order). False: as they complete.
    concurrency : int, optional
        Chunks in flight: submitted and not yet taken. By default bounded by `max_bytes` alone, with
        the number of chunks to a task following the measured cost of a chunk.
    max_bytes : int or str
        Decoded bytes in flight, a hard bound: bytes, "512 MiB", or a share of this host's memory.
        One chunk larger than the bound passes alone.
    requests : int, optional
        Requests that each task keeps in flight on a remote store. By default adapted to the latency that
        is measured. Local stores are read one chunk after the other by each task.
    retry : RetryPolicy, optional
        How often, how soon and after which errors a chunk is tried again.
    timeout : float or None
        Seconds for one attempt at one chunk, reading and stages each. Not enforced on functions in
        the sequential stream, which has no second thread to watch from.
    hedge : Hedge, optional
        Start a second copy of a read that takes much longer than usual; the first answer wins. A copy of
        a task counts in the window like the first: a window for one chunk has no room for any.
    rate_limit : RateLimit, optional
        Bound on requests and bytes per second, all workers together; ``stream.rate_limit`` changes it
        while a run goes on. Without it, the stream still slows down when the store asks for it.
    on_error : {"raise", "skip"} or callable
        After a chunk's last attempt: raise `ChunkError`; put it among ``report.dead_letters`` and go
        on; or call this with the `DeadLetter` (on the client) and go on.
    checkpoint : str, path or Checkpoint, optional
        A durable ledger: the same stream started again with it goes on where the last run stopped. A
        chunk is done when the consumer asks for the next item (at least once to a consumer, exactly
        once into a reduction).
    progress : bool or callable
        True: a bar in the terminal or notebook. ``progress(done, total)``: called as chunks settle.
    callbacks : iterable of Callback or callable
        Observers, each called with every event of the run.

    Returns
    -------
    ChunkStream
        Lazy; each iteration is a new run.

    Raises
    ------
    UsageError
        An option is out of range, a region lies outside the array, a function can't be called.
    StoreError
        There is no such store or array, the store can't be read, or the metadata can't be understood.

    Examples
    --------
    >>> import numpy as np, zarr
    >>> array = zarr.create_array({}, shape=(4, 6), chunks=(2, 3), dtype="i4")
    >>> array[:] = np.arange(24).reshape(4, 6)
    >>> stream = stream_chunks(array).map(lambda chunk: int(chunk.data.sum()))
    >>> len(stream), {chunk.index: chunk.data for chunk in stream}
    (4, {(0, 0): 24, (0, 1): 42, (1, 0): 96, (1, 1): 114})
    >>> stream.report
    Report(done: 4/4 emitted, 0 filtered, 0 missing, 0 dead, 0 cancelled, 0 retries, ... s)
    """
    told = run_options(
        missing=missing,
        ordered=ordered,
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
    check_count("requests", "requests", requests)
    check_kind("rate_limit", RateLimit, rate_limit)
    check_kind("hedge", Hedge, hedge)
    if where is not None:
        check_function(where, "where", "the grid index")
    if not isinstance(path, str):
        raise UsageError(f"path is text, the array's place inside the store, got {path!r}")
    check_kind("storage_options", Mapping, storage_options)
    with store_errors():
        opened = _open(array, path, storage_options, region)
    spec, labels = opened.spec, opened.labels
    plan = ChunkPlan(spec.grid, opened.box, where, labels=labels)
    return ChunkStream(
        Options(
            spec=spec,
            plan=plan,
            rate_limit=rate_limit,
            requests=requests,
            hedge=hedge,
            labels=labels,
            stages=() if opened.decode is None else (opened.decode,),
            **told,
        )
    )


def _open(array: Any, path: str, storage_options: Mapping[str, Any] | None, region: RegionLike) -> Opened:
    kind = kind_of(array)
    if kind == "Dataset":
        raise UsageError("a Dataset has several arrays: stream_dataset takes it, stream_chunks one of its variables")
    if kind == "DataArray":
        if path or storage_options or region is not None:
            raise UsageError("path=, storage_options= and region= don't go with a DataArray: slice it, with .isel(...)")
        return of_dataarray(array)
    spec = array if isinstance(array, ArraySpec) else open_array(array, path=path, storage_options=storage_options)
    return Opened(spec, None, array_labels(spec), parse_region(region, spec.shape))
