"""Chunks in groups: for a consumer that likes many at once, and for functions on a worker that do.

Rules
-----
1. A batch closes when it holds `size` items, or before an item that would carry it beyond `bytes`, or
   `seconds` after its first item, whichever comes first; what is left at the end is a batch too.
2. One item larger than `bytes` is a batch of its own: a batch is never empty.
3. Nothing here waits: `Batches.deadline` says when to look again.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.scalars import as_real, as_whole
from zarr_dask_stream.source.chunk import Chunk

__all__ = ["Batch", "BatchRule", "Batches", "MapBatch", "Route", "Trigger", "is_ctrl_c", "nbytes_of"]

Trigger = Literal["size", "bytes", "seconds", "end", "error"]

_LOOKED_AT = 256  # members of a container that are weighed; the rest is taken to be like them


class Batch(Sequence[Chunk]):
    """Some chunks together, and why there are not more of them.

    Attributes
    ----------
    items : tuple of Chunk
        What it holds; the batch itself is a sequence of them.
    trigger : {"size", "bytes", "seconds", "end", "error"}
        Why it closed. "error": it is a part of a batch for which a function of ``.map_batch`` failed.
    nbytes : int
        Bytes of the items' data, as far as they tell.
    key : hashable
        Where ``.route`` sends it; None without.

    Examples
    --------
    >>> batch = Batch((Chunk((0,), (slice(0, 2),), np.arange(2)), Chunk((1,), (slice(2, 4),), np.ones(2))), "size")
    >>> batch, len(batch), [float(chunk.data.sum()) for chunk in batch]
    (Batch(2 items, closed by size), 2, [1.0, 2.0])
    """

    __slots__ = ("items", "key", "nbytes", "trigger")

    def __init__(self, items: Sequence[Chunk], trigger: Trigger, *, nbytes: int = 0, key: Hashable = None) -> None:
        self.items = tuple(items)
        self.trigger = trigger
        self.nbytes = nbytes
        self.key = key

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self.items)

    @overload
    def __getitem__(self, at: int) -> Chunk: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Chunk, ...]: ...
    def __getitem__(self, at: int | slice) -> Chunk | tuple[Chunk, ...]:
        return self.items[at]

    def __repr__(self) -> str:
        key = "" if self.key is None else f", for {self.key!r}"
        items = "1 item" if len(self) == 1 else f"{len(self):,} items"
        return f"Batch({items}, closed by {self.trigger}{key})"


@dataclass(frozen=True, kw_only=True)
class BatchRule:
    """When a batch closes: at so many items, bytes or seconds, whichever comes first.

    Raises
    ------
    UsageError
        If no bound is given, or one is not greater than 0.
    """

    size: int | None = None
    nbytes: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("size", self.size), ("bytes", self.nbytes)):
            if value is not None and (as_whole(value) or 0) < 1:
                raise UsageError(f"{name} of a batch is a whole number, at least 1, got {value!r}")
        s = self.seconds
        if s is not None and (as_real(s) or 0.0) <= 0:
            raise UsageError(f"seconds of a batch is a number greater than 0, got {s!r}")
        if self.size is None and self.nbytes is None and s is None:
            raise UsageError("a batch needs a bound: size=, bytes= or seconds=")


class _Open:
    __slots__ = ("items", "nbytes", "since")

    def __init__(self, since: float) -> None:
        self.items: list[Chunk] = []
        self.nbytes = 0
        self.since = since


class Batches:
    """Items in, batches out; one open batch for each key.

    Parameters
    ----------
    rule : BatchRule
        When a batch closes.

    Examples
    --------
    >>> batches = Batches(BatchRule(size=2, seconds=5))
    >>> for at, name in enumerate("abc"):
    ...     batches.add(Chunk(name, (), name), now=float(at))
    >>> batches.take(2.0), batches.take(2.0), batches.deadline
    (Batch(2 items, closed by size), None, 7.0)
    >>> batches.take(7.0)
    Batch(1 item, closed by seconds)
    """

    def __init__(self, rule: BatchRule) -> None:
        self._rule = rule
        self._open: dict[Hashable, _Open] = {}
        self._closed: deque[Batch] = deque()

    def __len__(self) -> int:
        """Items in batches that nobody has taken."""
        return sum(len(one.items) for one in self._open.values()) + sum(map(len, self._closed))

    def __iter__(self) -> Iterator[Chunk]:
        for batch in self._closed:
            yield from batch
        for one in self._open.values():
            yield from one.items

    @property
    def deadline(self) -> float | None:
        """When the oldest open batch closes by itself, or None."""
        if self._rule.seconds is None or not self._open:
            return None
        return min(one.since for one in self._open.values()) + self._rule.seconds

    def add(self, item: Chunk, now: float, key: Hashable = None) -> None:
        """Put an item into the open batch of its key, and close what is full."""
        rule, nbytes = self._rule, nbytes_of(item.data)
        one = self._open.get(key)
        if one is not None and rule.nbytes is not None and one.nbytes + nbytes > rule.nbytes:
            self._close(key, "bytes")
            one = None
        if one is None:
            one = self._open[key] = _Open(now)
        one.items.append(item)
        one.nbytes += nbytes
        if rule.size is not None and len(one.items) >= rule.size:
            self._close(key, "size")
        elif rule.nbytes is not None and one.nbytes >= rule.nbytes:
            self._close(key, "bytes")

    def take(self, now: float) -> Batch | None:
        """Return the next batch that is closed at time `now`, or None."""
        deadline = self.deadline
        if deadline is not None and now >= deadline:
            seconds = self._rule.seconds or 0.0
            for key in [key for key, one in self._open.items() if one.since + seconds <= now]:
                self._close(key, "seconds")
        return self._closed.popleft() if self._closed else None

    def end(self) -> None:
        """Close what is open: nothing more will come."""
        for key in list(self._open):
            self._close(key, "end")

    def _close(self, key: Hashable, trigger: Trigger) -> None:
        one = self._open.pop(key)
        self._closed.append(Batch(one.items, trigger, nbytes=one.nbytes, key=key))


@dataclass(frozen=True)
class Route:
    """Where items go: ``key(chunk)`` names one of the sinks.

    Examples
    --------
    >>> route = Route(lambda chunk: "wet" if chunk.data > 0 else "dry", {"wet": print, "dry": print})
    >>> route.place(Chunk((0,), (), 3))
    'wet'
    """

    key: Callable[[Chunk], Any]
    sinks: Mapping[Any, Callable[[Any], Any]]

    def place(self, chunk: Chunk) -> Any:
        """Return the key of the sink for a chunk; raises what the key function raises, or UsageError."""
        key = self.key(chunk)
        if key not in self.sinks:
            names = ", ".join(repr(name) for name in self.sinks)
            raise UsageError(f"route: the key of chunk {chunk.index} is {key!r}, and there are sinks for {names}")
        return key


# -- on the worker ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MapBatch:
    """``fn(batch) -> values``: one value for each chunk of a batch, from one call.

    Examples
    --------
    >>> double = MapBatch(lambda batch: [2 * chunk.data for chunk in batch], BatchRule(size=2))
    >>> [chunk.data for chunk, error in double.apply(Batch((Chunk((0,), (), 3), Chunk((1,), (), 4)), "size"))]
    [6, 8]
    """

    fn: Callable[[Batch], Any]
    rule: BatchRule

    def apply(
        self, batch: Batch, before: Callable[[Batch], Any] | None = None
    ) -> Iterator[tuple[Chunk, BaseException | None]]:
        """Yield each chunk with its value, or as it was and with the error that it caused.

        Where a call fails, its batch is halved until the chunk to blame is alone: the others get their values.
        `before` hears of each call.
        """
        if before is not None:
            before(batch)
        try:
            answer = self.fn(batch)
            problem = self._problem(answer, len(batch))
            values = [] if problem else list(answer)
        except BaseException as error:
            if is_ctrl_c(error):
                raise
            if len(batch) == 1:
                yield batch.items[0], error
                return
            half = len(batch) // 2
            for part in (batch.items[:half], batch.items[half:]):
                yield from self.apply(Batch(part, "error", nbytes=batch.nbytes * len(part) // len(batch)), before)
            return
        if problem:  # with fewer chunks it would be the same: nothing to narrow down
            yield from ((chunk, UsageError(problem)) for chunk in batch)
            return
        for chunk, value in zip(batch, values, strict=True):
            yield chunk.with_data(value), None

    def _problem(self, answer: Any, count: int) -> str:
        """Say why an answer is not one value for each chunk; empty where it is."""
        given = f"map_batch: {getattr(self.fn, '__name__', repr(self.fn))} was given {count} chunk{'s' * (count > 1)}"
        if (
            isinstance(answer, (str, bytes, Mapping, AbstractSet))
            or not (hasattr(answer, "__len__") and hasattr(answer, "__iter__"))
            or getattr(answer, "ndim", 1) == 0
        ):
            kind = type(answer).__name__
            return f"{given} and returned {kind}: return a list of values, one for each chunk, in their order"
        if len(answer) != count:
            return f"{given} and returned {len(answer)} values: return one for each chunk, in their order"
        return ""


def is_ctrl_c(error: BaseException) -> bool:
    """Whether a person stops this program; elsewhere than in the main thread a function has raised it itself."""
    return isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread()


def nbytes_of(value: Any, depth: int = 2) -> int:
    """Guess the size of a result, bytes: to choose how many go together, not to account for memory.

    Examples
    --------
    >>> nbytes_of(np.zeros(4)), nbytes_of("abc"), nbytes_of({"low": np.zeros(4), "high": np.zeros(4)})
    (32, 3, 128)
    """
    nbytes = getattr(value, "nbytes", None)
    if isinstance(nbytes, (int, np.integer)):
        return int(nbytes)
    if isinstance(value, (bytes, bytearray, str)):
        return len(value)
    if depth and isinstance(value, (tuple, list, dict)):
        members = list(value.values() if isinstance(value, dict) else value)[:_LOOKED_AT]
        return 64 + sum(nbytes_of(member, depth - 1) for member in members) * len(value) // max(len(members), 1)
    return 64
