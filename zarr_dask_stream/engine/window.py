"""The credit machine: how many chunks and bytes may be in flight, and in which order they leave.

Rules
-----
1. A chunk is in flight from its submission until the consumer takes it, or until it is settled in
   another way (filtered, skipped, dead-lettered). Waiting for a retry, waiting in the reorder
   buffer and waiting to be taken are all in flight.
2. Neither the count nor the bytes in flight ever pass their limit, with one exception: where
   nothing is in flight, one chunk passes, however large it is. A stream of chunks larger than the
   limit therefore runs, one chunk at a time.
3. Credit returns when a chunk leaves. Nothing here waits: "not now" is a returned 0 or None.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from zarr_dask_stream.errors import UsageError

__all__ = ["Item", "Outbox", "Window", "WindowLimits"]


@dataclass(frozen=True, kw_only=True)
class WindowLimits:
    """Bounds of what is in flight.

    Parameters
    ----------
    chunks : int or None
        Chunks; None for no bound of its own.
    nbytes : int
        Decoded bytes.
    """

    chunks: int | None
    nbytes: int

    def __post_init__(self) -> None:
        if self.chunks is not None and self.chunks < 1:
            raise UsageError(f"at least one chunk must be in flight, got concurrency={self.chunks}")
        if self.nbytes < 1:
            raise UsageError(f"max_bytes must be at least 1, got {self.nbytes}")

    def capacity(self, chunk_nbytes: int) -> int:
        """Return how many chunks of that size may be in flight at once (at least 1)."""
        by_bytes = self.nbytes // max(chunk_nbytes, 1)
        return max(1, by_bytes if self.chunks is None else min(by_bytes, self.chunks))


class Window:
    """Counts chunks and bytes in flight against their limits.

    Examples
    --------
    >>> window = Window(WindowLimits(chunks=4, nbytes=100))
    >>> window.room(30)
    3
    >>> window.reserve(3, 90)
    >>> window.room(30)
    0
    >>> window.release(1, 30)
    >>> window.room(30), window.peak_chunks, window.peak_bytes
    (1, 3, 90)
    """

    def __init__(self, limits: WindowLimits) -> None:
        self.limits = limits
        self.chunks = 0
        self.nbytes = 0
        self.peak_chunks = 0
        self.peak_bytes = 0

    def room(self, chunk_nbytes: int) -> int:
        """Return how many more chunks of that size may be submitted now."""
        room = (self.limits.nbytes - self.nbytes) // max(chunk_nbytes, 1)
        if self.limits.chunks is not None:
            room = min(room, self.limits.chunks - self.chunks)
        return max(room, 0 if self.chunks else 1)

    def reserve(self, chunks: int, nbytes: int) -> None:
        """Take credit for chunks that are about to be submitted."""
        self.chunks += chunks
        self.nbytes += nbytes
        self.peak_chunks = max(self.peak_chunks, self.chunks)
        self.peak_bytes = max(self.peak_bytes, self.nbytes)

    def release(self, chunks: int, nbytes: int) -> None:
        """Give credit back for chunks that left."""
        self.chunks -= chunks
        self.nbytes -= nbytes
        assert self.chunks >= 0
        assert self.nbytes >= 0


class Item(NamedTuple):
    """A finished chunk on its way to the consumer."""

    number: int
    value: Any
    missing: bool


class Outbox:
    """Finished chunks in the order they may leave.

    Parameters
    ----------
    ordered : bool
        True: in the order in which `expect` announced them; one that is not there yet holds back
        those behind it. False: in the order in which they were put in.

    Examples
    --------
    >>> box = Outbox(ordered=True)
    >>> box.expect([range(3)])
    >>> box.put(Item(1, "b", False)); box.pop() is None
    True
    >>> box.drop(0); box.pop().value
    'b'
    """

    def __init__(self, *, ordered: bool) -> None:
        self._ordered = ordered
        self._ready: deque[Item] = deque()
        self._held: dict[int, Item | None] = {}
        self._expected: deque[range] = deque()
        self._head: Iterator[int] = iter(())
        self._next: int | None = None

    def __len__(self) -> int:
        return len(self._ready) + len(self._held)

    @property
    def ready(self) -> int:
        """Items that may leave now."""
        return len(self._ready)

    def expect(self, ranges: Iterable[range]) -> None:
        """Announce chunk numbers, in the order in which they have to leave."""
        if self._ordered:
            self._expected.extend(ranges)

    def put(self, item: Item) -> None:
        """Add a finished chunk."""
        if not self._ordered:
            self._ready.append(item)
            return
        self._held[item.number] = item
        self._advance()

    def extend(self, items: Iterable[Item]) -> None:
        """Add finished chunks."""
        if not self._ordered:
            self._ready.extend(items)
            return
        self._held.update((item.number, item) for item in items)
        self._advance()

    def drop(self, number: int) -> None:
        """Say that a chunk will never come: those behind it wait no longer."""
        if self._ordered:
            self._held[number] = None
            self._advance()

    def pop(self) -> Item | None:
        """Take the next item that may leave, or None."""
        return self._ready.popleft() if self._ready else None

    def _advance(self) -> None:
        held = self._held
        while True:
            if self._next is None:
                self._next = next(self._head, None)
                if self._next is None:
                    if not self._expected:
                        return
                    self._head = iter(self._expected.popleft())
                    continue
            if self._next not in held:
                return
            item = held.pop(self._next)
            self._next = None
            if item is not None:
                self._ready.append(item)
