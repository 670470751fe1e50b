"""Everything this package raises on purpose, in one tree, split by whose fault it is.

::

    ZdsError
    ├── UsageError (ValueError)          the caller: an option, a region, a function
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
    "MetadataError",
    "MissingChunkError",
    "StoreError",
    "StoreNotFoundError",
    "StoreNotVisibleError",
    "UsageError",
    "ZdsError",
]


class ZdsError(Exception):
    """Root of the tree: ``except ZdsError`` catches all that this package raises on purpose."""


class UsageError(ZdsError, ValueError):
    """An option, region or function that can't work, found before anything is read."""


class StoreError(ZdsError):
    """The store or the array in it can't be used as asked."""


class StoreNotFoundError(StoreError, FileNotFoundError):
    """There is no store, or no array, at the given place."""

    def __str__(self) -> str:
        # OSError formats its arguments by errno rules; one plain sentence is what we want.
        return str(self.args[0]) if self.args else ""


class MetadataError(StoreError):
    """The metadata is there and is malformed, absurd or of an unknown kind."""


class StoreNotVisibleError(StoreError):
    """A process that has to read the array can't see it, or sees another one."""


class MissingChunkError(StoreError):
    """A chunk is not stored and the stream was told to treat that as a failure."""


class CorruptChunkError(StoreError):
    """A stored chunk does not decode to what its metadata promise."""


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
    """The cluster can't run the stream: no workers, a lost scheduler, a version that differs."""
