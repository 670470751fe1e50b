"""Read a batch of chunks. Failures are data; present and missing are kept apart.

A local store is read in the calling thread, chunk by chunk. A remote one has many requests in flight on
the process's I/O loop while the calling thread decodes what has arrived.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from time import perf_counter

from zarr_dask_stream.errors import CorruptChunkError, StoreError
from zarr_dask_stream.source.array import ArraySpec
from zarr_dask_stream.source.backend import ByteStore, RemoteBytes, TooLongError
from zarr_dask_stream.source.codec import makes_new_memory, most_stored_nbytes
from zarr_dask_stream.source.fetch import Fetcher, Limit, Request
from zarr_dask_stream.source.finisher import ChunkRead, Finisher
from zarr_dask_stream.source.grid import Index, Region
from zarr_dask_stream.source.hedging import Hedge, Stragglers
from zarr_dask_stream.source.remote import POOL_SIZE
from zarr_dask_stream.source.sharded import LocalShards, ShardPlan

__all__ = ["ChunkRead", "read_chunks", "stored_numbers"]

# Encoded bytes in flight that a reader starts with: large chunks need few requests to fill the line.
_START_BYTES = 1 << 26
_START_MOST = 32
_LEAST = 4
# A region of at most so many rows of the grid is listed row by row.
_MOST_ROWS = 64


def read_chunks(
    spec: ArraySpec,
    numbers: Iterable[int],
    *,
    box: Region | None = None,
    fill: bool = True,
    timeout: float | None = 60.0,
    concurrency: int | None = None,
    hedge: Hedge | None = None,
    stopped: Callable[[], bool] | None = None,
) -> Generator[ChunkRead, None, None]:
    """Read chunks, each failure kept to its own chunk.

    Parameters
    ----------
    spec : ArraySpec
        The array.
    numbers : iterable of int
        Linear chunk numbers.
    box : tuple of slice, optional
        Region of interest in array coordinates; chunks are cropped to it.
    fill : bool
        Whether a missing chunk comes with an array of the fill value.
    timeout : float, optional
        Seconds for one request on a remote store. A local read can't be interrupted.
    concurrency : int, optional
        Requests in flight on a remote store. Default: chosen by the size of the chunks and adapted to the
        latency that is measured.
    hedge : Hedge, optional
        When to send a request to a remote store a second time.
    stopped : callable, optional
        Asked now and then while a remote store is waited for: True ends the reading, as nobody wants the rest.

    Yields
    ------
    ChunkRead
        One for each number: in the given order from a local store, as they arrive from a remote one.

    Raises
    ------
    IndexError
        For a number outside the grid.
    UsageError, StoreError
        If the store can't be opened at all, or its codecs are not known here.

    Examples
    --------
    >>> import zarr
    >>> from zarr_dask_stream.source.array import open_array
    >>> array = zarr.create_array({}, shape=(4,), chunks=(2,), dtype="i2", fill_value=7)
    >>> array[:2] = [1, 2]
    >>> [(read.number, read.data, read.missing) for read in read_chunks(open_array(array), [0, 1])]
    [(0, array([1, 2], dtype=int16), False), (1, array([7, 7], dtype=int16), True)]
    """
    store = spec.store.open()
    finish = Finisher(spec, store, box, fill)
    if isinstance(store, RemoteBytes):
        reader = _read_remote_shards if spec.shards is not None else _read_remote
        limit, stragglers = _limit(spec, concurrency), _stragglers(spec, hedge)
        with Fetcher(store, limit, timeout=timeout, stragglers=stragglers, stopped=stopped) as fetcher:
            yield from reader(finish, fetcher, numbers)
    elif spec.shards is not None:
        yield from _read_local_shards(store, finish, numbers)
    else:
        yield from _read_local(store, finish, numbers)


# -- local stores ---------------------------------------------------------------------------------


def _read_local(store: ByteStore, finish: Finisher, numbers: Iterable[int]) -> Iterator[ChunkRead]:
    most = most_stored_nbytes(finish.spec)
    get = store.borrow(most) if makes_new_memory(finish.spec) else partial(store.get_buffer, most=most)
    index_of, key_of, read = finish.grid.index, finish.spec.chunk_key, finish.read
    for number in numbers:
        index = index_of(number)
        begin = perf_counter()
        try:
            raw = get(key_of(index))
        except TooLongError as error:
            yield finish.failed(number, finish.corrupt(index, error), perf_counter() - begin)
            continue
        except Exception as error:  # noqa: BLE001  # a mapping of the user's may raise anything
            yield finish.failed(number, error, perf_counter() - begin)
            continue
        yield read(number, index, raw, perf_counter() - begin)


def _read_local_shards(store: ByteStore, finish: Finisher, numbers: Iterable[int]) -> Iterator[ChunkRead]:
    shards = LocalShards(store, finish.spec)
    for number in numbers:
        index = finish.grid.index(number)
        begin = perf_counter()
        try:
            raw = shards.read(number)
        except CorruptChunkError as error:
            yield finish.failed(number, finish.corrupt(index, error), perf_counter() - begin)
        except (OSError, StoreError) as error:
            yield finish.failed(number, error, perf_counter() - begin)
        else:
            yield finish.read(number, index, raw, perf_counter() - begin)


# -- remote stores --------------------------------------------------------------------------------


def _read_remote(finish: Finisher, fetcher: Fetcher, numbers: Iterable[int]) -> Iterator[ChunkRead]:
    spec, most = finish.spec, most_stored_nbytes(finish.spec)
    requests = (
        Request((number, index), spec.chunk_key(index), cost_bytes=spec.chunk_nbytes, most=most)
        for number, index in ((number, finish.grid.index(number)) for number in numbers)
    )
    while True:
        # In lots: each one wakes the loop's thread.
        if fetcher.room * 4 >= fetcher.outstanding:
            fetcher.submit(itertools.islice(requests, fetcher.room))
        if not fetcher.outstanding:
            return
        answer = fetcher.next()
        if answer is None:
            return
        number, index = answer.request.tag
        if isinstance(answer.error, TooLongError):
            read = finish.failed(number, finish.corrupt(index, answer.error), answer.seconds)
        elif answer.error is not None:
            read = finish.failed(number, answer.error, answer.seconds)
        else:
            read = finish.read(number, index, answer.data, answer.seconds)
        read.hedged = answer.hedged
        yield read


def _read_remote_shards(finish: Finisher, fetcher: Fetcher, numbers: Iterable[int]) -> Iterator[ChunkRead]:
    plan = ShardPlan(finish, numbers)
    while True:
        while fetcher.room and plan.requests:
            fetcher.submit([plan.requests.popleft()])
        yield from plan.settled()
        if fetcher.outstanding:
            answer = fetcher.next()
            if answer is None:
                return
            for read in plan.take(answer):
                read.hedged = answer.hedged
                yield read
        elif not plan.requests:
            yield from plan.settled()
            return


_learned: dict[str, Limit] = {}
_usual: dict[tuple[str, Hedge], Stragglers] = {}


def _stragglers(spec: ArraySpec, hedge: Hedge | None) -> Stragglers | None:
    """Return what this process has learned about how long requests to this store take."""
    return None if hedge is None else _usual.setdefault((spec.store.token, hedge), Stragglers(hedge))


def _limit(spec: ArraySpec, concurrency: int | None) -> Limit:
    """Return the limit for one reader: the caller's number, or what was learned about this store so far."""
    if concurrency is not None:
        return Limit(max(1, concurrency), least=max(1, concurrency), most=max(1, concurrency))
    limit = _learned.get(spec.store.token)
    if limit is None:
        start = min(_START_MOST, max(_LEAST, _START_BYTES // max(1, spec.chunk_nbytes)))
        limit = _learned.setdefault(spec.store.token, Limit(start, least=_LEAST, most=POOL_SIZE))
    return limit


# -- listing --------------------------------------------------------------------------------------


def stored_numbers(spec: ArraySpec, box: Region | None = None) -> Iterator[int]:
    """List the chunks that are stored, instead of asking for each one that might be.

    Parameters
    ----------
    spec : ArraySpec
        The array.
    box : tuple of slice, optional
        Only chunks that touch this region, in array coordinates.

    Yields
    ------
    int
        Chunk numbers in ascending order. Of a shard that is stored, all its chunks (one may still turn out
        to be missing). Keys that are no chunk keys are passed over.

    Raises
    ------
    StoreError
        If the store can't be listed (plain HTTP).

    Examples
    --------
    >>> import zarr
    >>> from zarr_dask_stream.source.array import open_array
    >>> array = zarr.create_array({}, shape=(100, 100), chunks=(10, 10), dtype="i2")
    >>> array[35, 40:60] = 1
    >>> list(stored_numbers(open_array(array)))
    [34, 35]
    """
    grid = spec.grid
    wanted = box if box is not None else tuple(slice(0, n) for n in spec.shape)
    first = tuple(b.start // c for b, c in zip(wanted, grid.chunks, strict=True))
    last = tuple(
        -(-b.stop // c) if b.stop > b.start else b.start // c for b, c in zip(wanted, grid.chunks, strict=True)
    )
    if not len(grid):
        return
    found: list[int] = []
    for index in _stored_objects(spec, first, last):
        per = grid.chunks_per_shard
        start = tuple(max(i * p, a) for i, p, a in zip(index, per, first, strict=True))
        stop = tuple(min((i + 1) * p, b, n) for i, p, b, n in zip(index, per, last, grid.grid_shape, strict=True))
        for row in grid.rows(start, stop):
            found.extend(row)
    found.sort()
    yield from found


def _stored_objects(spec: ArraySpec, first: Index, last: Index) -> Iterator[Index]:
    """Walk the grid indexes of the stored objects (shards where there are any), by their keys.

    `first` and `last` bound the chunks of interest; objects outside may be given too.
    """
    store, objects = spec.store.open(), spec.grid.shard_grid
    if not spec.shape:
        if store.exists(spec.key_prefix):
            yield ()
        return
    for folder in _folders(spec, first, last):
        for key in store.list_names(folder):
            index = _parse_index(key, spec)
            if index is not None and all(i < n for i, n in zip(index, objects.grid_shape, strict=True)):
                yield index


def _folders(spec: ArraySpec, first: Index, last: Index) -> list[str]:
    """Return the folders to list: one for each row of a small region, else all at once."""
    per = spec.grid.chunks_per_shard[0]
    rows = range(first[0] // per, -(-last[0] // per))
    nested = spec.key_separator == "/" and len(spec.shape) > 1
    if nested and len(rows) <= _MOST_ROWS and 2 * len(rows) <= spec.grid.shard_grid.grid_shape[0]:
        return [f"{spec.key_prefix}{row}" for row in rows]
    return [spec.key_prefix.rpartition("/")[0]]


def _parse_index(key: str, spec: ArraySpec) -> Index | None:
    """Read the grid index out of a key; None for any other key."""
    if not key.startswith(spec.key_prefix):
        return None
    parts = key[len(spec.key_prefix) :].split(spec.key_separator)
    # Only what a writer would write: no sign, no leading zero, no digits of other scripts.
    if len(parts) != len(spec.shape) or not all(p.isascii() and p.isdigit() for p in parts):
        return None
    if any(p != "0" and p.startswith("0") for p in parts):
        return None
    return tuple(map(int, parts))
