"""Encode and store a few boxes at once; say of each what became of it.

A box is made of whole stored objects (shards, or else chunks), so that none of them is ever read to be changed.
On a local store each is written before the next is encoded. On a remote one many requests are in flight on the
process's I/O loop while the calling thread encodes.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from errno import EIO, ETIMEDOUT
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from zarr_dask_stream.source.array import ArraySpec
from zarr_dask_stream.source.backend import RemoteBytes
from zarr_dask_stream.source.encode import compile_encoder
from zarr_dask_stream.source.grid import Region
from zarr_dask_stream.source.mosaic import Mosaic

__all__ = ["ArrayWriter", "BoxWritten", "Verify", "Written", "cast_exactly", "is_castable"]

Verify = bool | Literal["read"]

# What one writer keeps in flight to a remote store.
_MOST_REQUESTS = 32
_MOST_BYTES = 1 << 24
_LOOK_S = 0.2  # how often somebody who waits for a store looks whether he still should


@dataclass(frozen=True, slots=True)
class Written:
    """What became of one item in the target of a sink: the item's data.

    Attributes
    ----------
    region : tuple of slice
        Where it lies, in the target's coordinates.
    objects : int
        Chunks (or shards) stored.
    empty : int
        Chunks (or shards) left out, because they hold nothing but the fill value.
    stored_bytes : int
        Bytes of what is stored.
    """

    region: Region
    objects: int = 0
    empty: int = 0
    stored_bytes: int = 0


class BoxWritten(NamedTuple):
    """What became of one box: what is stored of it, or why it is not. `tag` is the caller's name for it."""

    tag: Any
    written: Written
    error: Exception | None = None


class _Box:
    """A box on its way: of some of its objects nothing has been heard yet."""

    __slots__ = ("empty", "error", "objects", "open", "region", "stored_bytes", "tag")

    def __init__(self, tag: Any, region: Region) -> None:
        self.tag = tag
        self.region = region
        self.open = 1  # as long as it is being encoded
        self.objects = self.empty = self.stored_bytes = 0
        self.error: Exception | None = None


class _Request(NamedTuple):
    box: _Box
    future: Future[None]
    key: str
    nbytes: int
    since: float


class ArrayWriter:
    """Writes boxes into one array, for one thread.

    Parameters
    ----------
    spec : ArraySpec
        The array; its metadata are stored already.
    write_empty : bool
        Store what holds nothing but the fill value, too.
    verify : bool or "read"
        True: the store confirms what it has stored: its length, or where the service answers with one, its
        digest. "read": it is read back and compared.
    fresh : bool
        Whether nothing was stored before: then what is left out needs no removing.
    aside : str
        Folder of the store for files that are not whole yet.
    timeout : float, optional
        Seconds for one request to a remote store. Writing a file can't be interrupted.
    stopped : callable, optional
        Asked now and then while a remote store is waited for: True ends the waiting, as nobody wants the rest.
    mark : callable, optional
        Told after each object: a box of many is no hung one.

    Examples
    --------
    >>> import zarr
    >>> from zarr_dask_stream.source.array import open_array
    >>> array = zarr.create_array({}, shape=(4,), chunks=(2,), dtype="i2")
    >>> writer = ArrayWriter(open_array(array))
    >>> writer.write("all", (slice(0, 4),), np.array([1, 2, 0, 0], "i2"))
    >>> next(writer.settled()).written
    Written(region=(slice(0, 4, None),), objects=1, empty=1, stored_bytes=13)
    >>> array[:]
    array([1, 2, 0, 0], dtype=int16)
    """

    def __init__(
        self,
        spec: ArraySpec,
        *,
        write_empty: bool = False,
        verify: Verify = True,
        fresh: bool = False,
        aside: str = "",
        timeout: float | None = 60.0,
        stopped: Callable[[], bool] = lambda: False,
        mark: Callable[[], Any] = lambda: None,
    ) -> None:
        self._spec, self._objects = spec, spec.grid.shard_grid
        self._verify, self._fresh, self._aside, self._timeout = verify, fresh, aside, timeout
        self._stopped, self._mark = stopped, mark
        self._encode = compile_encoder(spec, write_empty=write_empty)
        self._store = spec.store.open()
        self._requests: deque[_Request] = deque()
        self._sent_bytes = 0
        self._done: deque[BoxWritten] = deque()

    def write(self, tag: Any, region: Region, data: npt.NDArray[Any] | Mosaic) -> None:
        """Encode a box and store it, or begin to; `settled` says what became of it.

        Parameters
        ----------
        tag : Any
            The caller's name for the box.
        region : tuple of slice
            Where it lies in the array: whole objects, up to the array's edge.
        data : numpy.ndarray or Mosaic
            Of the region's shape and the array's dtype; read before this returns.
        """
        box = _Box(tag, region)
        try:
            for key, piece in self._pieces(region, data):
                self._put(box, key, self._encode(piece))
                self._mark()
        except Exception as error:  # noqa: BLE001  # a store of the user's may raise anything
            box.error = error
        self._close_one(box)

    def _pieces(self, region: Region, data: npt.NDArray[Any] | Mosaic) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        objects = self._objects
        start = [part.start // c for part, c in zip(region, objects.chunks, strict=True)]
        stop = [-(-part.stop // c) for part, c in zip(region, objects.chunks, strict=True)]
        for row in objects.rows(start, stop):
            for number in row:
                index = objects.index(number)
                places = zip(objects.region_of(index), region, strict=True)
                cut: tuple[Any, ...] = tuple(slice(one.start - box.start, one.stop - box.start) for one, box in places)
                # With the dots, an array even without axes.
                piece: Any = data.within(cut) if isinstance(data, Mosaic) else data[(*cut, ...)]
                yield self._spec.chunk_key(index), piece

    def settled(self, *, wait: bool = False) -> Iterator[BoxWritten]:
        """Yield boxes of which is known what became of them; with `wait` all of them."""
        while self._requests and (wait or self._requests[0].future.done()):
            self._hear()
        while self._done:
            yield self._done.popleft()

    def flush(self) -> None:
        """Return when what is stored survives a loss of power."""
        self._store.flush()

    def close(self) -> None:
        """Give up what is on its way."""
        for request in self._requests:
            request.future.cancel()
        self._requests.clear()

    # -- one object after the other ---------------------------------------------------------------------

    def _put(self, box: _Box, key: str, value: Any) -> None:
        store = self._store
        if value is None:
            box.empty += 1
            if not self._fresh:
                store.remove([key])
        elif isinstance(store, RemoteBytes):
            self._send(store, box, key, bytes(value))
        else:
            store.put(key, value, aside=self._aside)
            self._check(key, value)
            self._count(box, len(value))

    def _count(self, box: _Box, nbytes: int) -> None:
        box.objects += 1
        box.stored_bytes += nbytes

    def _check(self, key: str, value: Any) -> None:
        """See that the store has what it was given."""
        if self._verify is False:
            return
        store = self._store
        size = store.size(key)
        if size != len(value):
            raise OSError(EIO, f"writing {key} of {store.url}: {len(value)} bytes were written, and {size} are there")
        if self._verify == "read" and bytes(store.get(key) or b"") != bytes(value):
            raise OSError(EIO, f"writing {key} of {store.url}: other bytes are read than were written")

    # -- many requests at a time ------------------------------------------------------------------------

    def _send(self, store: RemoteBytes, box: _Box, key: str, value: bytes) -> None:
        while self._requests and (len(self._requests) >= _MOST_REQUESTS or self._sent_bytes + len(value) > _MOST_BYTES):
            self._hear()
        confirm, compare = self._verify is True, self._verify == "read"
        digest = hashlib.md5(value, usedforsecurity=False).hexdigest() if confirm and store.tells_digests else ""
        future = store.begin(store.send(key, value, verify=confirm, compare=compare, digest=digest))
        box.open += 1
        self._sent_bytes += len(value)
        self._requests.append(_Request(box, future, key, len(value), time.monotonic()))

    def _hear(self) -> None:
        """Wait for the oldest request, and note what became of it."""
        request = self._requests.popleft()
        error = self._outcome(request)
        self._sent_bytes -= request.nbytes
        if error is None:
            self._count(request.box, request.nbytes)
        request.box.error = request.box.error or error
        self._close_one(request.box)
        self._mark()

    def _outcome(self, request: _Request) -> Exception | None:
        deadline = None if self._timeout is None else request.since + self._timeout
        where = f"writing {request.key} of {self._store.url}"
        while True:
            try:
                error = request.future.exception(_LOOK_S)
            except FutureTimeoutError:
                if self._stopped() or (deadline is not None and time.monotonic() > deadline):
                    request.future.cancel()
                    return TimeoutError(ETIMEDOUT, f"{where} took longer than the timeout of {self._timeout} s")
            except CancelledError:
                return TimeoutError(ETIMEDOUT, f"{where} was given up")
            else:
                if error is not None and not isinstance(error, Exception):
                    raise error
                return error

    def _close_one(self, box: _Box) -> None:
        box.open -= 1
        if not box.open:
            written = Written(box.region, box.objects, box.empty, box.stored_bytes)
            self._done.append(BoxWritten(box.tag, written, box.error))


def is_castable(given: np.dtype[Any], dtype: np.dtype[Any]) -> bool:
    """Whether values of one dtype can become values of another one of the same kind.

    Examples
    --------
    >>> is_castable(np.dtype("f8"), np.dtype("f4")), is_castable(np.dtype("f4"), np.dtype("i8"))
    (True, False)
    >>> is_castable(np.dtype("i4"), np.dtype("U9"))  # NumPy would
    False
    """
    texts = "SUT"
    return np.can_cast(given, dtype, "same_kind") and (given.kind in texts) == (dtype.kind in texts)


def cast_exactly(data: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any] | None:
    """Cast within a kind; return None where the target can't hold a value, instead of wrapping it around.

    Examples
    --------
    >>> cast_exactly(np.array([1, 2]), np.dtype("i1")), cast_exactly(np.array([1, 300]), np.dtype("i1"))
    (array([1, 2], dtype=int8), None)
    >>> cast_exactly(np.array([1.5, np.nan]), np.dtype("f4")), cast_exactly(np.array([1e300]), np.dtype("f4"))
    (array([1.5, nan], dtype=float32), None)
    """
    if data.dtype == dtype:
        return data
    if not is_castable(data.dtype, dtype):
        return None
    try:
        with np.errstate(over="raise"):
            out = data.astype(dtype)
    except FloatingPointError:
        return None
    # Floats may be rounded; whole numbers, text and times may not be changed.
    times = dtype.kind in "mM"
    exact = not (times or dtype.kind in "iuSU") or np.can_cast(data.dtype, dtype, "safe")
    exact = exact or np.array_equal(out, data, equal_nan=times)
    return out if exact else None
