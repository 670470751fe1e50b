"""Memory that is used again as soon as nobody refers to it.

Dask starts its worker processes with ``MALLOC_TRIM_THRESHOLD_=65536``: whatever is freed goes back to the system at
once, and has to be asked for, page by page, for the next chunk. For chunks of 64 KiB and more that costs as much as
decoding them, or several times as much where the decoder needs memory of its own. Two things help:

- `lend`: buffers for decoded chunks are kept. One is free again when no array and no view of it is left, which its
  reference count tells; nobody has to give anything back.
- `settle_allocator`: the C library of a worker process keeps a few MiB of what is freed.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["KEPT_BYTES", "Keeper", "lend", "lend_array", "settle_allocator"]

Buffer = npt.NDArray[np.uint8]

#: Most bytes that a process keeps, in use and free ones together; and most while a stream runs inside it, whose
#: chunks wait there for the consumer.
KEPT_BYTES = 32 * 2**20
_KEPT_INSIDE_BYTES = 512 * 2**20
_LEAST_BYTES = 16 * 2**10  # smaller ones cost nothing worth keeping
_TRIES = 4  # buffers to look at before a new one is made

# What Dask gives its workers where nobody says otherwise, and what glibc's mallopt calls the two thresholds.
_OF_DASK = "65536"
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_TRIM_BYTES, _MMAP_BYTES = 8 * 2**20, 4 * 2**20

_shelves: dict[int, deque[Buffer]] = {}
_keepers: set[Keeper] = set()


class Keeper:
    """As long as one is open, this process keeps more; with the last one it lets all go that is free.

    Examples
    --------
    >>> keeper = Keeper()
    >>> keeper.open()
    >>> keeper.close()
    """

    def open(self) -> None:
        """Keep more."""
        _keepers.add(self)

    def close(self) -> None:
        """Keep no more than usual; closing twice does no harm."""
        if self in _keepers:
            _keepers.discard(self)
            if not _keepers:
                _shelves.clear()


def lend(nbytes: int) -> Buffer:
    """Return an uninitialised, writable array of `nbytes` bytes, for as long as anybody holds it or a view of it.

    Examples
    --------
    >>> kept = lend(65536)[:10]
    >>> lend(65536).base is None, np.shares_memory(kept, lend(65536))
    (True, False)
    """
    if not _FREE or not _LEAST_BYTES <= nbytes <= KEPT_BYTES:
        return np.empty(nbytes, np.uint8)
    shelf = _shelves.get(nbytes)
    buffer = None if shelf is None else _find(shelf, _FREE)
    if buffer is None:
        buffer = np.empty(nbytes, np.uint8)
        _keep(buffer)
    return buffer


def lend_array(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Return an uninitialised array in C order on such memory.

    Examples
    --------
    >>> lend_array((2, 3), np.dtype("f4")).shape
    (2, 3)
    """
    if dtype.hasobject:
        return np.empty(shape, dtype)
    return np.ndarray(shape, dtype, lend(math.prod(shape) * dtype.itemsize))


def settle_allocator() -> bool:
    """Let the C library of this process keep what is freed, up to 8 MiB for each of its heaps; return whether it does.

    Only where Dask's own setting keeps it from that: a process whose environment has another
    ``MALLOC_TRIM_THRESHOLD_``, or any ``MALLOC_MMAP_THRESHOLD_``, is left as it is.
    """
    if os.environ.get("MALLOC_TRIM_THRESHOLD_") != _OF_DASK or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library has no such call
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _MMAP_BYTES)) and bool(mallopt(_TRIM_THRESHOLD, _TRIM_BYTES))


def _find(shelf: deque[Buffer], free: int) -> Buffer | None:
    """Return a buffer to which nothing refers but the shelf, or None."""
    for _ in range(_TRIES):
        try:
            buffer = shelf.popleft()  # off the shelf, no other thread can find it
        except IndexError:
            return None
        if sys.getrefcount(buffer) == free:
            shelf.append(buffer)
            return buffer
        shelf.append(buffer)
    return None


def _keep(buffer: Buffer) -> None:
    """Put a new buffer on its shelf; where that is too much, those of other sizes go first."""
    nbytes = buffer.nbytes
    most = _KEPT_INSIDE_BYTES if _keepers else KEPT_BYTES
    shelf = _shelves.setdefault(nbytes, deque())
    if sum(size * len(buffers) for size, buffers in list(_shelves.items())) + nbytes > most:
        for size in list(_shelves):
            if size != nbytes:
                _shelves.pop(size, None)
        if (len(shelf) + 1) * nbytes > most:
            return
    shelf.append(buffer)


def _count_when_free() -> int:
    """Find out what the reference count of a free buffer is on this interpreter; 0 where that can't be told."""
    if not hasattr(sys, "getrefcount") or not getattr(sys, "_is_gil_enabled", lambda: True)():
        return 0
    for count in (1, 2, 3):
        shelf = deque([np.empty(1, np.uint8)])
        if _find(shelf, count) is not None:
            view = shelf[0][:]
            return count if _find(shelf, count) is None and view.base is not None else 0
    return 0


_FREE = _count_when_free()
