"""The façade: a `ChunkStream` is lazy, and each of its stages gives a new one.

What a stage means is said here and decided in ``composition.py``. Each iteration is a new `Run`, driven from a
blocking executor or from an event loop.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, Self, cast

from typing_extensions import TypeVar

from zarr_dask_stream.composition import (
    batch_mapped,
    batched,
    filtered,
    grouped,
    haloed,
    mapped,
    rechunked,
    reduced,
    routed,
    taken,
    windowed,
    written,
)
from zarr_dask_stream.demand import Consumer, How, Producer, Share, feed, feed_async, share
from zarr_dask_stream.driver import drive, drive_async
from zarr_dask_stream.engine.cluster import active_client
from zarr_dask_stream.engine.payload import delayed_chunks
from zarr_dask_stream.engine.retry import RetryPolicy
from zarr_dask_stream.engine.throttle import RateLimit
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.options import Options
from zarr_dask_stream.preparation import work_of
from zarr_dask_stream.run import Run
from zarr_dask_stream.source.array import ArraySpec
from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.source.writer import Verify
from zarr_dask_stream.stages.answers import WindowResult
from zarr_dask_stream.stages.batch import Batch
from zarr_dask_stream.stages.combine import Reducer
from zarr_dask_stream.stages.transform import Filter
from zarr_dask_stream.watch.report import Report
from zarr_dask_stream.watch.widget import StreamWidget

__all__ = ["ChunkStream"]

T_co = TypeVar("T_co", covariant=True, default=Chunk)


class ChunkStream(Generic[T_co]):
    """The chunks of an array as a lazy stream; made by `stream_chunks`.

    Stages return new streams, iterating starts a run. It yields `Chunk`, after ``.batch`` `Batch`, after
    ``.window`` and ``.reduce`` `WindowResult`. ``len(stream)`` is the number of planned chunks. Leaving a
    loop early, an exception in it and `close` cancel what is in flight.

    Examples
    --------
    >>> import zarr, zarr_dask_stream as zds
    >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4", fill_value=7)
    >>> stream = zds.stream_chunks(array, concurrency=1)
    >>> stream
    ChunkStream(int32[6] in 3 chunks of [2], ordered, concurrency=1)
    >>> [chunk.data.tolist() for chunk in stream.take(2)]
    [[7, 7], [7, 7]]
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._report = Report(outcome="not started")
        self._runs: weakref.WeakSet[Run] = weakref.WeakSet()
        self._widgets: weakref.WeakSet[StreamWidget] = weakref.WeakSet()
        self._paused = False

    # -- what it is ---------------------------------------------------------------------------------

    @property
    def report(self) -> Report:
        """Account of the latest run, also while it goes on.

        Examples
        --------
        >>> import zarr, zarr_dask_stream as zds
        >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4", fill_value=7)
        >>> stream = zds.stream_chunks(array, concurrency=1)
        >>> stream.report.outcome
        'not started'
        >>> _ = list(stream)
        >>> stream.report.outcome, stream.report.emitted
        ('done', 3)
        """
        return self._report

    @property
    def spec(self) -> ArraySpec:
        """The array: shape, chunks, dtype and so on; of several, the first with all dimensions.

        Examples
        --------
        >>> import zarr, zarr_dask_stream as zds
        >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4", fill_value=7)
        >>> spec = zds.stream_chunks(array).spec
        >>> spec.shape, spec.chunks, spec.dtype, int(spec.fill_value)
        ((6,), (2,), dtype('int32'), 7)
        """
        return self._options.spec

    @property
    def target(self) -> ArraySpec | None:
        """The array that ``.to_zarr(...)`` writes to, as it is or will be; None without.

        Examples
        --------
        >>> import zarr, zarr_dask_stream as zds
        >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4", fill_value=7)
        >>> zds.stream_chunks(array).to_zarr({}, chunks=(3,)).target.chunks
        (3,)
        """
        return None if self._options.sink is None else self._options.sink.spec

    @property
    def dims(self) -> tuple[str | None, ...] | None:
        """Names of the axes of ``chunk.index`` and ``chunk.region``, or None where they have none.

        Examples
        --------
        >>> import zarr, zarr_dask_stream as zds
        >>> array = zarr.create_array({}, shape=(6, 2), chunks=(2, 2), dtype="i4", dimension_names=["time", "lat"])
        >>> zds.stream_chunks(array).dims
        ('time', 'lat')
        """
        return self._options.dims

    def __len__(self) -> int:
        planned = len(self._options.plan)
        return planned if self._options.limit is None else min(planned, self._options.limit)

    def __repr__(self) -> str:
        return f"ChunkStream({self._options.describe()})"

    # -- other items than stored chunks ---------------------------------------------------------------

    def rechunk(self, chunks: int | Sequence[int | None] | Mapping[int | str, int]) -> ChunkStream:
        """Stream boxes of another shape than the stored chunks.

        Parameters
        ----------
        chunks : int, sequence, or mapping of axis (number or dimension name) to int
            Elements along each axis, in Dask's words: -1 for the whole axis, None to keep the length of the
            stored chunks.

        Returns
        -------
        ChunkStream
            Its ``.index`` counts boxes. A stored chunk is read once for all boxes of a task that need it;
            boxes of whole chunks read each chunk once.

        Raises
        ------
        UsageError
            If the lengths don't fit the array, or stages or ``where=`` already speak of stored chunks.

        Examples
        --------
        >>> import numpy as np, zarr, zarr_dask_stream as zds
        >>> array = zarr.create_array({}, shape=(4, 6), chunks=(2, 2), dtype="i4")
        >>> array[:] = np.arange(24).reshape(4, 6)
        >>> [chunk.data.tolist() for chunk in zds.stream_chunks(array).rechunk((1, -1)).take(2)]
        [[[0, 1, 2, 3, 4, 5]], [[6, 7, 8, 9, 10, 11]]]
        """
        return ChunkStream(rechunked(self._options, chunks))

    def halo(self, depth: int | Sequence[Any] | Mapping[Any, Any], boundary: Any = None) -> ChunkStream:
        """Read the elements around each item with it, from the store.

        Parameters
        ----------
        depth : int, sequence, or mapping of axis (number or dimension name) to int
            Elements on either side, for all axes, each axis or the axes named; or ``(before, after)`` for an axis.
        boundary : {None, "periodic", "reflect", "nearest"}, number, or one for each axis
            What stands beyond the edge of the array, in the words of ``dask.array.map_overlap``. None: nothing;
            items at the edge are smaller.

        Returns
        -------
        ChunkStream
            ``chunk.data`` holds the neighbours too, ``chunk.core`` says where the chunk itself lies in it, and
            ``chunk.region`` stays the chunk's own place.

        Raises
        ------
        UsageError
            If an axis does not exist, a depth is larger than the array, or a word is not known.

        Examples
        --------
        >>> import numpy as np, zarr, zarr_dask_stream as zds
        >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4")
        >>> array[:] = [1, 2, 3, 4, 5, 6]
        >>> stream = zds.stream_chunks(array).halo(1, "periodic")
        >>> [chunk.data.tolist() for chunk in stream]
        [[6, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 1]]
        >>> def smooth(chunk):
        ...     return np.convolve(chunk.data, [1, 1, 1])[2:-2]
        >>> [chunk.data.tolist() for chunk in stream.map(smooth)]
        [[9, 6], [9, 12], [15, 12]]
        """
        return ChunkStream(haloed(self._options, depth, boundary))

    # -- stages -------------------------------------------------------------------------------------

    def map(
        self, fn: Callable[[Chunk], Any], *, dtype: Any = None, chunks: int | Sequence[int | None] | None = None
    ) -> ChunkStream:
        """Call ``fn(chunk)`` on the workers; the item keeps its place, its data become the result.

        Only results travel to the client. The function travels by pickle.

        Parameters
        ----------
        fn : callable
            Its result may be anything, but for a target: see `to_zarr`.
        dtype : data-type, optional
            What `fn` returns, where that is another dtype than it is given. Needed by `to_zarr` alone.
        chunks : int or sequence, optional
            The shape that `fn` makes of a full chunk, where that is another one, with None for an axis that it
            leaves alone. Of a part at the edge of the array it makes the same share, rounded up. Needed by
            `to_zarr` alone.

        Examples
        --------
        >>> import numpy as np, zarr, zarr_dask_stream as zds
        >>> array = zarr.create_array({}, shape=(5, 4), chunks=(2, 4), dtype="i2")
        >>> array[:] = np.arange(20).reshape(5, 4)
        >>> target = {}
        >>> pairs = zds.stream_chunks(array).map(lambda c: c.data[:, ::2] / 2, dtype="f8", chunks=(None, 2))
        >>> _ = pairs.to_zarr(target).run()
        >>> zarr.open_array(target)[:].tolist()
        [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0], [8.0, 9.0]]
        """
        return ChunkStream(mapped(self._options, fn, dtype=dtype, chunks=chunks))

    def filter(self, pred: Callable[[Chunk], Any]) -> ChunkStream:
        """Keep the chunks for which ``pred(chunk)`` is true; asked on the workers, after the read.

        To leave chunks out before they are read, use ``where=`` of `stream_chunks`.

        Examples
        --------
        >>> import zarr, zarr_dask_stream as zds
        >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4")
        >>> array[:] = range(6)
        >>> stream = zds.stream_chunks(array, concurrency=1).filter(lambda chunk: chunk.data.sum() > 4)
        >>> [chunk.index for chunk in stream], stream.report.filtered
        ([(1,), (2,)], 1)
        """
        return ChunkStream(filtered(self._options, pred))

    def map_batch(
        self,
        fn: Callable[[Batch], Any],
        *,
        size: int | None = None,
        bytes: int | str | None = None,  # noqa: A002  # the word for it in a call
    ) -> ChunkStream:
        """Call ``fn(batch)`` on the workers for several chunks at once; each keeps its place and gets its own value.

        For functions that are better at many than at one: a vectorised model, a database.

        Parameters
        ----------
        fn : callable
            Given a `Batch`, a sequence of chunks; returns a list (or an array) of as many values, in their
            order. ``batch.trigger`` says why the batch is no larger: "size", "bytes", "end" where the task has no
            more chunks, "error" for a part of a batch for which the function failed.
        size : int
            Chunks. Tasks are cut into whole batches, as far as ``concurrency`` and ``max_bytes`` of the stream
            let so many chunks be in flight.
        bytes : int or str
            Bytes of their data.

        Returns
        -------
        ChunkStream
            With one item for each chunk, as after `map`.

        Notes
        -----
        Where a call raises, its batch is halved until the chunk to blame is alone, so that the others get their
        values: the function is called again with chunks that it has seen. The ``timeout`` of the stream is for
        one call.

        Raises
        ------
        UsageError
            If a bound makes no sense, there is none, or the function can't be called with one argument.

        Examples
        --------
        >>> import numpy as np, zarr, zarr_dask_stream as zds
        >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4")
        >>> array[:] = range(6)
        >>> def model(batch):
        ...     return np.stack([chunk.data for chunk in batch]).sum(axis=1)
        >>> [int(chunk.data) for chunk in zds.stream_chunks(array).map_batch(model, size=16)]
        [1, 5, 9]
        """
        return ChunkStream(batch_mapped(self._options, fn, size=size, nbytes=bytes))

    def take(self, n: int) -> ChunkStream:
        """Hand out `n` items and end; where nothing is filtered, exactly `n` chunks are read.

        Examples
        --------
        >>> import zarr, zarr_dask_stream as zds
        >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4", fill_value=7)
        >>> stream = zds.stream_chunks(array, concurrency=1).take(2)
        >>> [chunk.index for chunk in stream], stream.report.cancelled
        ([(0,), (1,)], 1)
        """
        return ChunkStream(taken(self._options, n))

    def reduce(self, reducer: Reducer | Mapping[str, Any] | Iterable[Reducer]) -> ChunkStream[T_co]:
        """Fold the chunks into one answer, on the workers; only partials travel.

        Parameters
        ----------
        reducer : Reducer, mapping of str to Reducer, or sequence of Reducer
            Several are folded in one pass; the answer is then a dict by name. On a stream of several arrays
            (`stream_dataset`) each array is reduced, and the answer is a dict by array: a mapping whose keys are
            names of arrays gives each its own reducer, and leaves the others out.

        Returns
        -------
        ChunkStream
            With one item for each key (``()`` without `group_by`): ``.index`` is the key and
            ``.data`` the answer. `compute` is the short way to it. After `window`, one for each window.

        Examples
        --------
        >>> import zarr, zarr_dask_stream as zds
        >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4")
        >>> array[:] = range(6)
        >>> stream = zds.stream_chunks(array, concurrency=1)
        >>> answer = stream.reduce({"low": zds.reducers.min(), "mean": zds.reducers.mean()}).compute()
        >>> int(answer["low"]), float(answer["mean"])
        (0, 2.5)
        """
        return ChunkStream(reduced(self._options, reducer))

    def group_by(self, key: Callable[[tuple[int, ...]], Hashable]) -> ChunkStream[T_co]:
        """Reduce separately for each ``key(index)``; to be followed by ``.reduce(...)``.

        Examples
        --------
        >>> import zarr, zarr_dask_stream as zds
        >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4")
        >>> array[:] = range(6)
        >>> stream = zds.stream_chunks(array, concurrency=1).group_by(lambda index: index[0] > 0)
        >>> {key: int(total) for key, total in stream.reduce(zds.reducers.sum()).compute().items()}
        {False: 1, True: 14}
        """
        return ChunkStream(grouped(self._options, key))

    def window(
        self,
        *,
        along: int | str | Sequence[int | str] | None = None,
        size: int | Sequence[int] | None = None,
        step: int | Sequence[int] | None = None,
        every: int | None = None,
        seconds: float | None = None,
        reset: bool = False,
    ) -> ChunkStream[WindowResult]:
        """Reduce window by window, each answer as soon as it is there; to be followed by ``.reduce(...)``.

        Either windows along axes of the array, or triggers: answers to what was folded so far.

        Parameters
        ----------
        along : int, str, or sequence of these
            Axes, by number or dimension name. Chunks are read in the order of the windows; along the other
            axes a window is as long as the stream's region.
        size, step : int or sequence of int
            Elements along each of these axes, counted from the beginning of the region; `step` is `size` unless
            given. Windows overlap where it is smaller, and what lies between them is not read where it is
            larger. The last one is shorter where the axis ends first.
        every : int
            An answer after so many more chunks, at the end of the task that brings them.
        seconds : float
            An answer after so many seconds, if something was folded meanwhile.
        reset : bool
            With `every` or `seconds`: begin anew after each answer.

        Returns
        -------
        ChunkStream
            Of `WindowResult`: ``.index`` is the number of the window (one for each axis where `along` is a
            sequence; ``(key, number)`` with `group_by`), ``.region`` its box, ``.data`` the answer. A window is
            complete when all its chunks are folded, filtered, not stored or given up; ``.folded``,
            ``.filtered``, ``.skipped`` and ``.dead`` say how many. In grid order, or as they are complete with
            ``ordered=False``.

        Notes
        -----
        Chunks that lie in several windows are read and folded once. Partial results are held for windows that
        are not complete, and no longer; where they take more than ``max_bytes``, less is read ahead. A chunk
        through which a window ends is cut, so maps before it have to keep its shape; where windows end with
        chunks, they may return anything. With a ``checkpoint``, a window is done when the consumer asks for the
        next one.

        Raises
        ------
        UsageError
            If an axis does not exist, a window is longer than the region, or windows and triggers are mixed.

        Examples
        --------
        >>> import numpy as np, zarr, zarr_dask_stream as zds
        >>> from zarr_dask_stream import reducers
        >>> array = zarr.create_array({}, shape=(6, 4), chunks=(1, 2), dtype="i4")
        >>> array[:] = np.arange(24).reshape(6, 4)
        >>> means = zds.stream_chunks(array).window(along=0, size=4, step=2).reduce(reducers.mean())
        >>> [(result.index, result.region[0], float(result.data), result.folded) for result in means]
        [(0, slice(0, 4, None), 7.5, 8), (1, slice(2, 6, None), 15.5, 8)]
        >>> columns = zds.stream_chunks(array).window(along=(1,), size=2).reduce(reducers.max(axis=0))
        >>> columns.compute()
        {(0,): array([20, 21], dtype=int32), (1,): array([22, 23], dtype=int32)}
        """
        o = self._options
        return ChunkStream(windowed(o, along=along, size=size, step=step, every=every, seconds=seconds, reset=reset))

    # -- items together -------------------------------------------------------------------------------

    def batch(
        self,
        size: int | None = None,
        *,
        bytes: int | str | None = None,  # noqa: A002  # the word for it in a call
        seconds: float | None = None,
    ) -> ChunkStream[Batch]:
        """Hand items out in batches; the last stage, or the last before `route`.

        Parameters
        ----------
        size : int
            Items; a batch closes when it has so many.
        bytes : int or str
            Bytes of their data; closes before an item that would be too much. At most, and by default, the
            stream's ``max_bytes``: beside what is in flight, one open batch is in memory.
        seconds : float
            Closes so long after its first item, however few there are, while the consumer waits. In the
            sequential stream, when the task at hand is over.

        Returns
        -------
        ChunkStream
            Of `Batch`, a sequence of items; ``batch.trigger`` says why it closed: "size", "bytes", "seconds" or
            "end". With a ``checkpoint``, its chunks are done when the consumer asks for the next batch.

        Raises
        ------
        UsageError
            If there is no bound, one makes no sense, or the stream is reduced.

        Examples
        --------
        >>> import zarr, zarr_dask_stream as zds
        >>> array = zarr.create_array({}, shape=(10,), chunks=(2,), dtype="i4", fill_value=7)
        >>> for batch in zds.stream_chunks(array).batch(size=3, seconds=60):
        ...     print(batch, [chunk.index for chunk in batch])
        Batch(3 items, closed by size) [(0,), (1,), (2,)]
        Batch(2 items, closed by end) [(3,), (4,)]
        """
        return ChunkStream(batched(self._options, size=size, nbytes=bytes, seconds=seconds))

    def route(
        self,
        key: Callable[[Chunk], Any],
        sinks: Mapping[Any, Callable[[Any], Any]],
        *,
        retry: RetryPolicy | None = None,
    ) -> ChunkStream[T_co]:
        """Send each item to one of several sinks, called on the client.

        Parameters
        ----------
        key : callable
            ``key(chunk)`` names the sink of an item, by its place or its data.
        sinks : mapping
            Functions by key. After `batch` each is called with a `Batch` of its own items, else with one
            `Chunk` after the other. A sink has its items once it returns; coroutine functions are awaited where
            the stream is iterated with ``async for``, and other functions run in a thread there.
        retry : RetryPolicy, optional
            How often and how soon a sink that has raised is called again with the same items, which wait meanwhile,
            and those behind them too. Its ``on`` says for which errors; without it, for any. None: never, because
            a sink that had stored some of the items would store them twice.

        Returns
        -------
        ChunkStream
            To be drained with `run`; iterating it yields what the sinks have taken.

        Notes
        -----
        An exception of a sink, the last one of those that are tried again, is for the items it was called with: they
        become dead letters that name the sink, as ``on_error`` says, and the other sinks go on. So does an item for
        whose key there is no sink. With a ``checkpoint``, items are done when their sink has returned.

        Raises
        ------
        UsageError
            If there are no sinks, one can't be called with one argument, or the stream is reduced.

        Examples
        --------
        >>> import numpy as np, zarr, zarr_dask_stream as zds
        >>> array = zarr.create_array({}, shape=(8,), chunks=(2,), dtype="i4")
        >>> array[:] = [1, 2, 0, 0, 5, 6, 0, 0]
        >>> wet, dry = [], []
        >>> stream = zds.stream_chunks(array).batch(size=2)
        >>> stream = stream.route(lambda chunk: bool(chunk.data.any()), {True: wet.append, False: dry.append})
        >>> report = stream.run()
        >>> [[chunk.index for chunk in batch] for batch in (*wet, *dry)], report.emitted
        ([[(0,), (2,)], [(1,), (3,)]], 4)
        """
        return ChunkStream(routed(self._options, key, sinks, retry))

    # -- into an array ------------------------------------------------------------------------------

    def to_zarr(
        self,
        target: Any,
        *,
        path: str = "",
        storage_options: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        verify: Verify = True,
        **create: Any,
    ) -> ChunkStream:
        """Write each item to its place in an array, on the workers; nothing of it travels to the client.

        Each stored object of the target (a shard, or else a chunk) is written by one task, at one stroke: who
        reads meanwhile sees all of it or nothing. Without other stages, items are cut anew where they don't hold
        whole objects; with other stages such a target is refused, and the message says which ``.rechunk(...)``
        before them would do.

        Parameters
        ----------
        target : str, path, zarr store, mapping, zarr.Group or zarr.Array
            Where an array is made, when the stream is run: in the shape of what the stream covers, a region of the
            source becoming all of it. An open `zarr.Array` is written to as it is: it has that shape, or that of
            the whole source, and then a region keeps its place (it has to begin and end where stored objects do).
            Zip files and plain HTTP can't be written to. A mapping, or ``memory://``, belongs to this process, and
            goes with the cluster inside it.
        path : str
            Path of the array inside the store. Groups above it are made where there are none.
        storage_options : mapping, optional
            Options for the file system of a URL. Never shown or logged.
        overwrite : bool
            Replace an array that is there, when the stream is run. Without it, a place where something is, is
            refused before any work. The source can't be replaced.
        verify : bool or "read"
            True: the store confirms the length of each object that it was given; S3, its MD5, in the same answer.
            "read": each is read back and compared. What does not fit is tried again.
        **create
            What ``zarr.create_array`` takes: chunks, shards, dtype, compressors, filters, serializer, fill_value,
            zarr_format, attributes, dimension_names, chunk_key_encoding, order, config. What is not said is as in
            the source (codecs, as far as the format has them; attributes, where no function was mapped). After
            ``.rechunk(...)`` chunks are what items are.

        Returns
        -------
        ChunkStream
            ``.run()`` it. Iterating it writes too: each item's data say what was written.

        Raises
        ------
        UsageError
            If the target can't be made so, its place is taken, it is the source, or items don't fit it.

        Notes
        -----
        A chunk that holds nothing but the fill value is not stored, unless
        ``config={"write_empty_chunks": True}``; with ``missing="skip"`` of `stream_chunks`, chunks that the source
        does not have are not even looked at. Numbers are cast to the target's dtype within their kind, and one
        that it can't hold fails its chunk. With a ``checkpoint`` a chunk is done when it is written and survives a
        loss of power; the same stream started again goes on into the same target. Consolidated metadata of groups
        above are not renewed.

        Examples
        --------
        >>> import numpy as np, zarr, zarr_dask_stream as zds
        >>> array = zarr.create_array({}, shape=(4, 6), chunks=(2, 2), dtype="i4")
        >>> array[:] = np.arange(24).reshape(4, 6)
        >>> target = {}
        >>> stream = zds.stream_chunks(array, concurrency=1).to_zarr(target, chunks=(1, 3), shards=(4, 3))
        >>> sum(chunk.data.objects for chunk in stream)
        2
        >>> bool((zarr.open_array(target)[:] == array[:]).all())
        True
        """
        return ChunkStream(
            written(
                self._options,
                target,
                create,
                path=path,
                storage_options=storage_options,
                overwrite=overwrite,
                verify=verify,
            )
        )

    # -- ways to run it -----------------------------------------------------------------------------

    def __iter__(self) -> Iterator[T_co]:
        return drive(functools.partial(self._new_run, deliver=True))

    def __aiter__(self) -> AsyncIterator[T_co]:
        return drive_async(functools.partial(self._new_run, deliver=True))

    def run(self) -> Report:
        """Drain the stream for its effects and return the report.

        Results stay on the workers, unless `route` sends them to sinks.

        Examples
        --------
        >>> import zarr, zarr_dask_stream as zds
        >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4", fill_value=7)
        >>> seen = []
        >>> zds.stream_chunks(array, concurrency=1).map(lambda chunk: seen.append(chunk.index)).run().emitted
        3
        >>> seen
        [(0,), (1,), (2,)]
        """
        for _ in drive(functools.partial(self._new_run, deliver=self._options.route is not None)):
            pass
        return self._report

    def compute(self) -> Any:
        """Run a reduced stream and return its answer, or a dict of answers by key or window.

        Examples
        --------
        >>> import zarr, zarr_dask_stream as zds
        >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4")
        >>> array[:] = range(6)
        >>> int(zds.stream_chunks(array, concurrency=1).reduce(zds.reducers.max()).compute())
        5
        """
        fold = self._options.fold
        if fold is None:
            raise UsageError("compute() goes with .reduce(...); iterate the stream, or .run() it for its effects")
        answers = {item.index: item.data for item in cast("ChunkStream", self)}
        return answers[()] if fold.key is None and fold.window is None else answers

    def to_delayed(self) -> Iterator[Any]:
        """Yield one ``dask.delayed`` for each planned chunk, for graphs of your own.

        Each computes to a `Chunk`, after the map stages; errors are raised by the task, as in any
        Dask graph: window, retries and dead letters are the stream's and are not in there.

        Examples
        --------
        >>> import zarr, zarr_dask_stream as zds
        >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4")
        >>> array[:] = range(6)
        >>> import dask
        >>> tasks = zds.stream_chunks(array).map(lambda chunk: int(chunk.data.sum())).to_delayed()
        >>> [chunk.data for chunk in dask.compute(*tasks, scheduler="sync")]
        [1, 5, 9]
        """
        o = self._options
        if o.fold is not None or any(isinstance(stage, Filter) for stage in o.stages):
            raise UsageError("to_delayed() makes one task for each chunk: filter and reduce have no place there")
        if o.batch is not None or o.route is not None or o.sink is not None:
            raise UsageError("to_delayed() makes one task for each chunk: batch, route and to_zarr have no place there")
        tasks = delayed_chunks(work_of(o), o.plan)
        return iter(tasks) if o.limit is None else (task for task, _ in zip(tasks, range(o.limit), strict=False))

    # -- ways to share it ---------------------------------------------------------------------------

    def producer(self, *, auto_ack: bool = True) -> Producer:
        """Make a producer, which reads what it is asked for with ``.ask(n)`` and nothing else.

        Parameters
        ----------
        auto_ack : bool
            With a ``checkpoint``: an item is done when the thread or task that got it asks again. False: when
            ``.ack(items)`` is called.

        Returns
        -------
        Producer
            Use it in a ``with`` or ``async with`` block, or close it.

        Examples
        --------
        >>> import zarr, zarr_dask_stream as zds
        >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4", fill_value=7)
        >>> stream = zds.stream_chunks(array, concurrency=1)
        >>> with stream.producer() as producer:
        ...     [chunk] = producer.ask(1)
        >>> chunk.index, stream.report.peak_chunks_in_flight
        ((0,), 1)
        """
        return Producer(self._shared_run("producer"), auto_ack=auto_ack)

    def share(
        self, n: int, how: How = "demand", *, key: Callable[[tuple[int, ...]], Hashable] | None = None
    ) -> tuple[Share, ...]:
        """Share one run among `n` consumers, each a loop in a thread or task of its own.

        What is in flight is bounded for all of them together, with what waits for one that is slow.

        Parameters
        ----------
        n : int
            Consumers.
        how : {"demand", "partition", "broadcast"}
            "demand": each item goes to whichever asks first. "partition": all items of a key to the same
            consumer, in order; keys are given out in turns as they first appear. "broadcast": every item to
            each, in the same order, arrays as views that can't be written to; the slowest sets the pace.
        key : callable, optional
            For "partition": ``key(index)`` of the grid index.

        Returns
        -------
        tuple of Share
            A consumer that leaves early does not stop the others, and the last one ends the run.

        Raises
        ------
        UsageError
            If a word or number is out of range, or the stream is a reduced one.

        Examples
        --------
        >>> import zarr, zarr_dask_stream as zds
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> array = zarr.create_array({}, shape=(4, 6), chunks=(2, 2), dtype="i4", fill_value=7)
        >>> shares = zds.stream_chunks(array, concurrency=4).share(2, "partition", key=lambda index: index[0])
        >>> with ThreadPoolExecutor(2) as pool:
        ...     list(pool.map(lambda share: [chunk.index for chunk in share], shares))
        [[(0, 0), (0, 1), (0, 2)], [(1, 0), (1, 1), (1, 2)]]
        """
        return share(self._shared_run("share"), n, how, key)

    def feed(
        self, *consumers: Consumer, how: How = "demand", key: Callable[[tuple[int, ...]], Hashable] | None = None
    ) -> Report:
        """Hand the items to consumers until the stream is over, and return the report.

        Parameters
        ----------
        *consumers : Consumer
            The first is fed in this thread, each other in one of its own.
        how, key
            As for `share`.

        Raises
        ------
        ChunkError, StoreError, ClusterError
            As a loop over the stream would.
        Exception
            What ``handle_items`` of a consumer raised, unless its ``on_error`` is "skip".

        Examples
        --------
        >>> import zarr, zarr_dask_stream as zds
        >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4")
        >>> array[:] = range(6)
        >>> class Total(zds.Consumer):
        ...     max_demand, min_demand = 2, 1
        ...     total = 0
        ...     def handle_items(self, items):
        ...         self.total += sum(int(chunk.data.sum()) for chunk in items)
        >>> total = Total()
        >>> zds.stream_chunks(array, concurrency=2).feed(total).emitted, total.total
        (3, 15)
        """
        feed(self._shared_run("feed"), consumers, how, key)
        return self._report

    async def feed_async(
        self, *consumers: Consumer, how: How = "demand", key: Callable[[tuple[int, ...]], Hashable] | None = None
    ) -> Report:
        """Hand the items to consumers, each in a task; ``handle_items`` may be a coroutine function. See `feed`."""
        await feed_async(self._shared_run("feed"), consumers, how, key)
        return self._report

    def _shared_run(self, what: str) -> Callable[[], Run]:
        if self._options.fold is not None:
            raise UsageError(
                f"a reduced stream has no chunks any more, and reads them all before its first answer: put "
                f".{what}(...) on the stream before .reduce(...), or compute() it"
            )
        if self._options.batch is not None or self._options.route is not None:
            raise UsageError(f"{what} hands out items, one or several at once: leave .batch(...) and .route(...) out")
        # Found here and now: the thread that waits first need not know of this one's client.
        client = self._options.client or active_client()
        return functools.partial(self._new_run, deliver=True, shared=True, client=client)

    # -- ways to watch and steer it -------------------------------------------------------------------

    def widget(self) -> StreamWidget:
        """Make a live widget for notebooks: chunk map, rates, dead letters, and buttons that act.

        Display it before the stream is iterated, in the same cell or an earlier one. It follows every run of this
        very stream; stages return new streams, so it comes last.

        Returns
        -------
        StreamWidget
            Shown as the last value of a cell, or by ``display(stream.widget())``. When a run is over, a picture
            without scripts takes its place, which stays in the saved notebook.

        Raises
        ------
        UsageError
            If anywidget is not installed; the extra ``notebook`` has it.

        Notes
        -----
        While a cell iterates the stream, the kernel is busy. Buttons act all the same with ipykernel 7.4 or newer
        in any front end, and with older releases of ipykernel 7 in JupyterLab from 4.4. Elsewhere they act at the
        end of the cell, unless the stream runs in a thread: ``threading.Thread(target=stream.run).start()``.

        Examples
        --------
        >>> import zarr, zarr_dask_stream as zds
        >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4", fill_value=7)
        >>> stream = zds.stream_chunks(array, concurrency=1)
        >>> widget = stream.widget()
        >>> widget.frame["badge"]
        'not started'
        >>> widget.close()
        """
        o = self._options
        widget = StreamWidget(self, name=repr(self), grid_shape=o.plan.grid.grid_shape, dims=self.dims, limit=o.limit)
        self._widgets.add(widget)
        return widget

    @property
    def rate_limit(self) -> RateLimit | None:
        """Bound on requests and bytes per second; may be set while a run goes on.

        Examples
        --------
        >>> import zarr, zarr_dask_stream as zds
        >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4", fill_value=7)
        >>> stream = zds.stream_chunks(array, concurrency=1)
        >>> stream.rate_limit = zds.RateLimit(requests=100)
        >>> stream.rate_limit.requests_per_s
        100.0
        """
        return self._options.rate_limit

    @rate_limit.setter
    def rate_limit(self, limit: RateLimit | None) -> None:
        if limit is not None and not isinstance(limit, RateLimit):
            raise UsageError(f"rate_limit must be a RateLimit or None, got {limit!r}")
        self._options = dataclasses.replace(self._options, rate_limit=limit)
        for run in list(self._runs):
            run.change_rate(limit)

    @property
    def paused(self) -> bool:
        """Whether nothing new is submitted, since `pause`.

        Examples
        --------
        >>> import zarr, zarr_dask_stream as zds
        >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4", fill_value=7)
        >>> stream = zds.stream_chunks(array)
        >>> stream.pause()
        >>> stream.paused
        True
        >>> stream.resume()
        >>> stream.paused
        False
        """
        return self._paused

    def pause(self) -> None:
        """Submit nothing new until `resume`; what is in flight comes back and can be taken.

        A run that begins meanwhile waits from the start. Whoever takes items waits too: `resume` comes from
        another thread, or from another task of the event loop.
        """
        self._paused = True
        for run in list(self._runs):
            run.pause(paused=True)

    def resume(self) -> None:
        """Go on after `pause`."""
        self._paused = False
        for run in list(self._runs):
            run.pause(paused=False)

    @property
    def draining(self) -> bool:
        """Whether the latest run goes on only to hand out what is in flight, since `drain`."""
        running = self._report.outcome == "running"
        return running and any(run.draining for run in list(self._runs) if run.report is self._report)

    def drain(self) -> None:
        """End the runs that are under way: read nothing more, hand out what is in flight, save the checkpoint.

        Examples
        --------
        >>> import zarr, zarr_dask_stream as zds
        >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4", fill_value=7)
        >>> stream, seen = zds.stream_chunks(array, concurrency=1), []
        >>> for chunk in stream:
        ...     seen.append(chunk.index)
        ...     stream.drain()
        >>> seen, stream.report.cancelled
        ([(0,)], 2)
        """
        for run in list(self._runs):
            run.drain()

    def close(self) -> None:
        """Cancel every run of this stream; closing twice does no harm.

        Examples
        --------
        >>> import zarr, zarr_dask_stream as zds
        >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4", fill_value=7)
        >>> stream = zds.stream_chunks(array, concurrency=1)
        >>> items = iter(stream)
        >>> _ = next(items)
        >>> stream.close()
        >>> list(items), stream.report.outcome
        ([], 'stopped early')
        """
        for run in list(self._runs):
            run.stop()

    def __reduce__(self) -> tuple[Any, ...]:
        # Runs, reports and clients belong to this process: what travels is the description.
        return ChunkStream, (dataclasses.replace(self._options, client=None),)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _new_run(self, *, deliver: bool, shared: bool = False, client: Any = None, **stand_ins: Any) -> Run:
        options = self._options if client is None else dataclasses.replace(self._options, client=client)
        run = Run(options, work_of(options, discard=not deliver), deliver=deliver, shared=shared, **stand_ins)
        self._report = run.report
        run.pause(paused=self._paused)
        self._runs.add(run)
        for widget in list(self._widgets):
            widget.follow(run.report, run.tell_also)
        return run

    def _rehearse(self, executor: Any) -> Iterator[Any]:
        """Iterate on a stand-in for a cluster, in its time; for `zarr_dask_stream.testing.rehearse`."""
        return drive(functools.partial(self._new_run, deliver=True, executor=executor, clock=executor.clock))
