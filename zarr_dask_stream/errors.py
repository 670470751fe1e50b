"""Everything this package raises on purpose, in one tree, split by whose fault it is.

::

    ZdsError
    ├── UsageError (ValueError)          the caller: an option, a region, a function
    │   └── LedgerInUseError             another run has the ledger: the same again later
    ├── StoreError                       the data, or the way to it
    │   ├── StoreNotFoundError (FileNotFoundError)   no such store, no such array
    │   ├── MetadataError                what is there can't be understood
    │   ├── StoreNotVisibleError         the client sees it, a worker does not
    │   ├── MissingChunkError            a chunk is not stored and ``missing="raise"``
    │   └── CorruptChunkError            a chunk is stored and can't be decoded
    ├── ChunkError                       one chunk failed for good; says which and why
    └── ClusterError                     the scheduler or the workers

Programming errors of this package are never wrapped: they surface as they are.
"""

from __future__ import annotations

__all__ = [
    "ChunkError",
    "ClusterError",
    "CorruptChunkError",
    "LedgerInUseError",
    "MetadataError",
    "MissingChunkError",
    "StoreError",
    "StoreNotFoundError",
    "StoreNotVisibleError",
    "UsageError",
    "ZdsError",
]


class ZdsError(Exception):
    """Root of the tree: ``except ZdsError`` catches all that this package raises on purpose.

    Examples
    --------
    >>> import zarr_dask_stream as zds
    >>> try:
    ...     zds.stream_chunks("/no/such/array.zarr")
    ... except ZdsError as error:
    ...     print(type(error).__name__)
    StoreNotFoundError
    """


class UsageError(ZdsError, ValueError):
    """An option, region or function that can't work, found before anything is read.

    Examples
    --------
    >>> import zarr, zarr_dask_stream as zds
    >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4")
    >>> zds.stream_chunks(array, concurrency=0)
    Traceback (most recent call last):
        ...
    zarr_dask_stream.errors.UsageError: ...concurrency...
    """


class LedgerInUseError(UsageError):
    """Another run is using the ledger of a ``checkpoint``: nothing is wrong, and the same is right later.

    Examples
    --------
    >>> import tempfile, zarr, zarr_dask_stream as zds
    >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     stream = zds.stream_chunks(array, concurrency=1, checkpoint=f"{folder}/job.ledger")
    ...     for chunk in stream:
    ...         try:
    ...             stream.run()
    ...         except LedgerInUseError as error:
    ...             print(chunk.index, str(error)[:37])
    ...             break
    (0,) another run is using the ledger ...
    """


class StoreError(ZdsError):
    """The store or the array in it can't be used as asked.

    Examples
    --------
    >>> import zarr, zarr_dask_stream as zds
    >>> zds.stream_chunks(zarr.storage.MemoryStore())
    Traceback (most recent call last):
        ...
    zarr_dask_stream.errors.StoreNotFoundError: ...
    """


class StoreNotFoundError(StoreError, FileNotFoundError):
    """There is no store, or no array, at the given place.

    Examples
    --------
    >>> import zarr_dask_stream as zds
    >>> zds.stream_chunks("/no/such/array.zarr")
    Traceback (most recent call last):
        ...
    zarr_dask_stream.errors.StoreNotFoundError: ...
    """

    def __str__(self) -> str:
        # OSError formats its arguments by errno rules; one plain sentence is what we want.
        return str(self.args[0]) if self.args else ""


class MetadataError(StoreError):
    """The metadata is there and is malformed, absurd or of an unknown kind.

    Examples
    --------
    >>> import zarr, zarr_dask_stream as zds
    >>> from zarr.core.buffer import default_buffer_prototype
    >>> from zarr.core.sync import sync
    >>> store = zarr.storage.MemoryStore()
    >>> sync(store.set("zarr.json", default_buffer_prototype().buffer.from_bytes(b"{")))
    >>> zds.stream_chunks(store)
    Traceback (most recent call last):
        ...
    zarr_dask_stream.errors.MetadataError: ...
    """


class StoreNotVisibleError(StoreError):
    """A process that has to read the array can't see it, or sees another one.

    Examples
    --------
    >>> issubclass(StoreNotVisibleError, StoreError)
    True
    """


class MissingChunkError(StoreError):
    """A chunk is not stored and the stream was told to treat that as a failure.

    Examples
    --------
    >>> import zarr, zarr_dask_stream as zds
    >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4")
    >>> try:
    ...     zds.stream_chunks(array, missing="raise", concurrency=1).run()
    ... except ChunkError as error:
    ...     print(error.index, type(error.__cause__).__name__)
    (0,) MissingChunkError
    """


class CorruptChunkError(StoreError):
    """A stored chunk does not decode to what its metadata promise.

    Examples
    --------
    >>> import zarr, zarr_dask_stream as zds
    >>> store = {}
    >>> array = zarr.create_array(store, shape=(6,), chunks=(2,), dtype="i4", fill_value=7)
    >>> array[:] = 1
    >>> store["c/1"] = store["c/1"][:3]
    >>> stream = zds.stream_chunks(store, concurrency=1, on_error="skip", retry=zds.RetryPolicy(corrupt_attempts=1))
    >>> [(letter.index, letter.error_type) for letter in stream.run().dead_letters]
    [((1,), 'CorruptChunkError')]
    """


class ChunkError(ZdsError):
    """One chunk failed for good.

    Parameters
    ----------
    message : str
        What happened, as one sentence.
    index : tuple of int
        Grid index of the chunk.
    attempts : int
        How many times the chunk was tried.

    Notes
    -----
    The last error is the ``__cause__``.

    Examples
    --------
    >>> error = ChunkError("chunk (0, 3) failed", index=(0, 3), attempts=4)
    >>> error.index, error.attempts
    ((0, 3), 4)
    """

    def __init__(self, message: str, index: tuple[int, ...] = (), attempts: int = 1) -> None:
        super().__init__(message, index, attempts)
        self.index = index
        self.attempts = attempts

    def __str__(self) -> str:
        return str(self.args[0])


class ClusterError(ZdsError):
    """The cluster can't run the stream: no workers, a lost scheduler, a version that differs.

    Examples
    --------
    >>> import zarr, zarr_dask_stream as zds
    >>> from zarr_dask_stream.testing import rehearse
    >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4")
    >>> stream = zds.stream_chunks(array, retry=zds.RetryPolicy(worker_budget=2))
    >>> rehearse(stream, losses={(0,): 99, (1,): 99, (2,): 99})
    Traceback (most recent call last):
        ...
    zarr_dask_stream.errors.ClusterError: ...workers...
    """
