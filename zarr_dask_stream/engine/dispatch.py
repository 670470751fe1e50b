"""Who gets which item where several consumers share a run, and how many are asked for in all.

Rules
-----
1. An item that was put in is held, and so in flight, until it has *left*: until the consumer it is for has
   taken it, or with `Broadcast` the last of them.
2. A consumer that has left gets nothing more. What waited for it goes to the others, with `Broadcast` it
   is forgotten: they have copies of their own.
3. Demand is counted since the beginning. It is what all have asked for together; with `Broadcast` what the
   one has asked for that asked for least.

Nothing here waits: "nothing yet" is an empty list.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.chunk import Chunk, Variables

__all__ = ["Broadcast", "Dispatch", "OnDemand", "Partition", "Receipts"]


class Dispatch:
    """What all ways to share a run have in common: a queue for each consumer, and what each has asked for.

    Parameters
    ----------
    consumers : int
        How many there are; they are numbered from 0.

    Attributes
    ----------
    how : str
        The word for it.
    copies : bool
        Whether each consumer gets every item.
    present : set of int
        The consumers that have not left.
    """

    how = ""
    copies = False

    def __init__(self, consumers: int) -> None:
        self.present = set(range(consumers))
        self._queues: list[deque[Any]] = [deque() for _ in range(consumers)]
        self._asked = [0] * consumers
        self._taken = [0] * consumers
        self._left: list[int] = []

    # -- items --------------------------------------------------------------------------------------

    def put(self, chunk: Chunk) -> None:
        """Add a finished chunk."""
        raise NotImplementedError

    def take(self, who: int, most: int | None = None) -> list[Chunk]:
        """Return what is there for a consumer, in order, `most` items at most."""
        queue = self._queue(who)
        count = len(queue) if most is None else min(most, len(queue))
        chunks = [self._hand(queue.popleft()) for _ in range(count)]
        self._taken[who] += count
        return chunks

    def give_back(self, who: int, chunks: Iterable[Chunk]) -> None:
        """Put items back that somebody took and then could not use: they come first again."""
        raise NotImplementedError

    def left(self) -> list[int]:
        """Return the numbers of the chunks that have left since this was asked last: their credit returns."""
        numbers, self._left = self._left, []
        return numbers

    def waiting(self, who: int) -> int:
        """Return how many items wait for a consumer."""
        return len(self._queue(who))

    def __len__(self) -> int:
        raise NotImplementedError

    def _queue(self, who: int) -> deque[Any]:
        return self._queues[who]

    def _hand(self, held: Any) -> Chunk:
        raise NotImplementedError

    # -- demand -------------------------------------------------------------------------------------

    @property
    def demand(self) -> int:
        """Items asked for since the beginning."""
        return sum(self._asked)

    def ask(self, who: int, count: int) -> None:
        """Ask for so many more items; a negative number takes that back."""
        self._asked[who] += count

    def leave(self, who: int) -> None:
        """Let a consumer go; twice does no harm."""
        if who not in self.present:
            return
        self.present.discard(who)
        self._asked[who] = self._taken[who]
        held, self._queues[who] = self._queues[who], deque()
        self._pass_on(held)

    def _pass_on(self, held: deque[Any]) -> None:
        raise NotImplementedError


class OnDemand(Dispatch):
    """Who asks gets: each item goes to one consumer, whichever takes it first.

    Examples
    --------
    >>> from zarr_dask_stream.source.grid import ChunkGrid
    >>> from zarr_dask_stream.source.selection import ChunkPlan
    >>> plan = ChunkPlan(ChunkGrid((3,), (1,)), (slice(0, 3),))
    >>> shared = OnDemand(2)
    >>> for number in plan:
    ...     shared.put(Chunk.planned(plan, number, None))
    >>> [chunk.index for chunk in shared.take(1, 2)], [chunk.index for chunk in shared.take(0)]
    ([(0,), (1,)], [(2,)])
    >>> shared.left()
    [0, 1, 2]
    """

    how = "demand"

    def __init__(self, consumers: int = 1) -> None:
        super().__init__(consumers)
        self._shared: deque[tuple[Chunk, bool]] = deque()

    def __len__(self) -> int:
        return len(self._shared)

    def put(self, chunk: Chunk) -> None:
        """Add a finished chunk."""
        self._shared.append((chunk, True))

    def give_back(self, who: int, chunks: Iterable[Chunk]) -> None:
        """Put items back; they have left already, and what was asked for with them is not asked for any more."""
        returned = [(chunk, False) for chunk in chunks]
        self._shared.extendleft(reversed(returned))
        self._taken[who] -= len(returned)
        self._asked[who] -= len(returned)

    def _queue(self, who: int) -> deque[Any]:
        return self._shared if who in self.present else deque()

    def _hand(self, held: tuple[Chunk, bool]) -> Chunk:
        chunk, in_flight = held
        if in_flight:
            self._left.append(_number(chunk))
        return chunk

    def _pass_on(self, held: deque[Any]) -> None:
        assert not held


class Broadcast(Dispatch):
    """Each consumer gets every item; the slowest decides when it leaves.

    Arrays are handed out as views that can't be written to: they are the same memory for all.

    Examples
    --------
    >>> from zarr_dask_stream.source.grid import ChunkGrid
    >>> from zarr_dask_stream.source.selection import ChunkPlan
    >>> plan = ChunkPlan(ChunkGrid((3,), (3,)), (slice(0, 3),))
    >>> shared = Broadcast(2)
    >>> shared.put(Chunk.planned(plan, 0, np.zeros(3)))
    >>> [chunk] = shared.take(0)
    >>> shared.left(), len(shared), chunk.data.flags.writeable
    ([], 1, False)
    >>> len(shared.take(1)), len(shared)
    (1, 0)
    """

    how = "broadcast"
    copies = True

    @property
    def demand(self) -> int:
        """Items that even the one has asked for that asked for least."""
        return min((self._asked[who] for who in self.present), default=0)

    def __len__(self) -> int:
        return max(map(len, self._queues), default=0)

    def put(self, chunk: Chunk) -> None:
        """Add a finished chunk."""
        copies = _Copies(chunk, len(self.present))
        for who in self.present:
            self._queues[who].append(copies)
        if not self.present:
            self._left.append(_number(chunk))

    def _hand(self, held: _Copies) -> Chunk:
        self._drop(held)
        return held.chunk.with_data(_guarded(held.chunk.data), as_read=True)

    def _drop(self, held: _Copies) -> None:
        held.count -= 1
        if not held.count:
            self._left.append(_number(held.chunk))

    def _pass_on(self, held: deque[Any]) -> None:
        for copies in held:
            self._drop(copies)


def _guarded(data: Any) -> Any:
    """Return views of arrays that can't be written to; what is no array as it is."""
    if isinstance(data, Variables):
        arrays, coords = ({name: _guarded(one) for name, one in some.items()} for some in (data, data.coords))
        return Variables(arrays, axes=data.axes, coords=coords)
    if isinstance(data, np.ndarray):
        data = data.view()
        data.flags.writeable = False
    return data


@dataclass(slots=True)
class _Copies:
    """A chunk, and how many consumers have not taken it yet."""

    chunk: Chunk
    count: int


class Partition(Dispatch):
    """Each key belongs to one consumer, which gets all its items, in the order in which they come.

    Keys are given out in turns as they first appear, so that the consumers have equally many, and the same
    ones in every run of an ordered stream. When a consumer leaves, its keys are given out again. Every key
    that was seen is remembered.

    Parameters
    ----------
    consumers : int
        How many there are.
    key : callable
        ``key(index)`` of the grid index; what it returns can be hashed.

    Examples
    --------
    >>> from zarr_dask_stream.source.grid import ChunkGrid
    >>> from zarr_dask_stream.source.selection import ChunkPlan
    >>> plan = ChunkPlan(ChunkGrid((3, 2), (1, 1)), (slice(0, 3), slice(0, 2)))
    >>> shared = Partition(2, lambda index: index[0])
    >>> for number in plan:
    ...     shared.put(Chunk.planned(plan, number, None))
    >>> [chunk.index for chunk in shared.take(0)], [chunk.index for chunk in shared.take(1)]
    ([(0, 0), (0, 1), (2, 0), (2, 1)], [(1, 0), (1, 1)])
    """

    how = "partition"

    def __init__(self, consumers: int, key: Callable[[Any], Hashable]) -> None:
        super().__init__(consumers)
        self._key = key
        self._owner: dict[Hashable, int] = {}
        self._turn = 0

    def __len__(self) -> int:
        return sum(map(len, self._queues))

    def put(self, chunk: Chunk) -> None:
        """Add a finished chunk.

        Raises
        ------
        UsageError
            If the key function raises, or returns what can't be hashed.
        """
        try:
            key = self._key(chunk.index)
            owner = self._owner.get(key)
        except Exception as error:
            raise UsageError(
                f"key({chunk.index}) raised {type(error).__name__}: {error}. It is called with the grid index of a "
                "chunk and returns something that can be hashed"
            ) from error
        if owner not in self.present:
            owner = self._owner[key] = self._next()
        if owner < 0:
            self._left.append(_number(chunk))
        else:
            self._queues[owner].append(chunk)

    def _next(self) -> int:
        """Return whose turn it is; -1 where nobody is left."""
        for _ in self._queues:
            who = self._turn
            self._turn = (who + 1) % len(self._queues)
            if who in self.present:
                return who
        return -1

    def _hand(self, held: Chunk) -> Chunk:
        self._left.append(_number(held))
        return held

    def _pass_on(self, held: deque[Any]) -> None:
        for chunk in held:
            self.put(chunk)


class Receipts:
    """Which of the items handed out are done, where each has to be confirmed by so many consumers.

    Parameters
    ----------
    consumers : int
        Confirmations that each item needs.

    Examples
    --------
    >>> receipts = Receipts(2)
    >>> receipts.confirm([4, 5]), receipts.confirm([4])
    ([], [4])
    """

    def __init__(self, consumers: int = 1) -> None:
        self._consumers = consumers
        self._missing: dict[int, int] = {}
        self._complete = True

    def confirm(self, numbers: Iterable[int]) -> list[int]:
        """Note that a consumer is through with these; return those that all are through with."""
        if self._consumers == 1:
            return list(numbers)
        done = []
        for number in numbers:
            missing = self._missing.pop(number, self._consumers if self._complete else 0) - 1
            if missing == 0:
                done.append(number)
            elif missing > 0:
                self._missing[number] = missing
        return done

    def forfeit(self) -> None:
        """Note that a consumer will confirm nothing more: what nobody has confirmed yet can't become done."""
        self._complete = self._consumers == 1


def _number(chunk: Chunk) -> int:
    assert chunk.number is not None, "an answer of a reduction is no chunk"
    return chunk.number
