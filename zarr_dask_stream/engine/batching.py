"""How many chunks go into one task, and which.

A Dask task costs about 2 ms from end to end, whatever it does; a small chunk takes 20 µs to read.
So chunks travel in batches whose size follows the measured cost of a chunk: long enough to make the
task's cost vanish, short enough to keep every thread busy and to lose little when a worker dies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from zarr_dask_stream.engine.events import BatchStats
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.selection import Sieve

__all__ = ["BatchLimits", "Batcher", "Cutter"]

_TASK_COST_S = 0.0025  # what one task costs the client and the scheduler
_STEEPEST = 4.0  # a batch so many times smaller than usual says no more than that: one slow chunk is half of it
_PATIENCE = 16  # pieces to walk in vain for the rest of a batch, once something was found
_FURTHEST = 8192  # pieces of a plan to count when a run is left early


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """Bounds of one batch.

    Parameters
    ----------
    target_s : float
        Duration to aim at, seconds. Raised where so many threads would ask for more tasks than one
        client can make.
    chunks : int
        Most chunks in one batch.
    result_bytes : int
        Most bytes of results to travel in one message.
    growth : int
        A batch is at most so many times the one it was measured on.
    first : int
        Size of the first batches, of which nothing is known yet.
    least_s : float
        The last batches are shared out evenly, but not into batches shorter than this.
    unit : int
        Batches are whole multiples of so many chunks, or less than one where no more fit.
    """

    target_s: float = 0.25
    chunks: int = 8192
    result_bytes: int = 32 * 2**20
    growth: int = 32
    first: int = 1
    least_s: float = 0.04
    unit: int = 1


class Batcher:
    """Chooses the size of the next batch from what earlier ones cost.

    Examples
    --------
    >>> batcher = Batcher(BatchLimits(target_s=0.2))
    >>> batcher.size(capacity=4096, remaining=10**6, threads=4)
    1
    >>> batcher.observe(1, BatchStats(wall_s=0.001, bytes_result=8))
    >>> batcher.size(capacity=4096, remaining=10**6, threads=4)
    32
    """

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._cost_s = 0.0
        self._result_bytes = 0.0
        self._grown = limits.first
        self._usual = 0.0
        self._seen = 0.0

    def observe(self, chunks: int, stats: BatchStats) -> None:
        """Learn from a batch of `chunks` chunks that came back."""
        if chunks < 1:
            return
        cost = max(stats.wall_s - stats.setup_s, 1e-7) / chunks
        if self._cost_s and chunks * _STEEPEST < self._usual:
            cost = min(cost, _STEEPEST * self._cost_s)
        self._usual = max(0.75 * self._usual, float(chunks))
        # Follow a rising cost at once and a falling one slowly: too long a batch hurts more. But many chunks say more
        # than the few that were seen so far: the first one of a run also pays for what is done once.
        weight = max(0.5 if cost > self._cost_s else 0.25, chunks / (chunks + self._seen))
        self._cost_s += weight * (cost - self._cost_s)
        self._seen = 0.5 * self._seen + chunks
        result = stats.bytes_result / chunks
        self._result_bytes += (0.5 if self._result_bytes else 1.0) * (result - self._result_bytes)
        if chunks * 2 > self._grown:
            self._grown = min(chunks * self._limits.growth, self._limits.chunks)

    def size(self, *, capacity: int, remaining: int | None, threads: int) -> int:
        """Return how many chunks the next batch should have (at least 1).

        Parameters
        ----------
        capacity : int
            Chunks that may be in flight in all: at least two batches a thread have to fit in.
        remaining : int or None
            Chunks not submitted yet, if known: the last ones are shared out evenly.
        threads : int
            Task threads of the cluster.
        """
        threads = max(threads, 1)
        size = min(self._grown, self._limits.chunks, capacity // (2 * threads + 1))
        if self._cost_s:
            target = max(self._limits.target_s, threads * _TASK_COST_S)
            size = min(size, int(target / self._cost_s))
        if self._result_bytes:
            size = min(size, int(self._limits.result_bytes / self._result_bytes))
        if remaining is not None:
            least = int(self._limits.least_s / self._cost_s) if self._cost_s else 1
            size = min(size, max(-(-remaining // (2 * threads)), least), max(remaining, 1))
        return self._rounded(max(size, 1), capacity)

    def _rounded(self, size: int, capacity: int) -> int:
        unit = self._limits.unit
        return size if unit == 1 else min(max(size // unit, 1) * unit, max(capacity, 1))


class Cutter:
    """Cuts the planned runs into batches, in order, without ever listing them.

    Parameters
    ----------
    runs : iterable of range
        Planned numbers.
    together : bool
        Keep each run in one batch where it fits: its items are cut from the same stored chunks.

    Examples
    --------
    >>> cutter = Cutter([range(0, 5), range(8, 10)])
    >>> cutter.cut(3), cutter.cut(3), cutter.cut(3), cutter.exhausted
    ((range(0, 3),), (range(3, 5), range(8, 9)), (range(9, 10),), True)
    """

    def __init__(self, runs: Iterable[range], *, together: bool = False) -> None:
        self._together = together
        self._sieve = runs if isinstance(runs, Sieve) else None
        self._runs: Iterator[range] = iter(runs)
        self._head: range = range(0)
        self._ended = False
        self._last = 0

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left to cut; False also where a predicate has to be walked further to know."""
        self._search()
        return self._ended and not self._head

    @property
    def searching(self) -> bool:
        """Whether nothing has been found to cut next, and there may be something."""
        return not (self._head or self._ended)

    def _search(self) -> None:
        """Look for the next number, but not far: others may have waited for this thread long enough."""
        for _ in range(_PATIENCE):
            if not self.searching:
                return
            self._advance()

    def _advance(self) -> None:
        following = next(self._runs, None)
        self._ended = following is None
        self._head = following or range(0)

    @property
    def head(self) -> int | None:
        """The number that is cut next, while that is searched for the one that was cut last; None at the end."""
        self._search()
        if self._head:
            return self._head[0]
        return None if self._ended else self._last

    def fit(self, count: int, most: int) -> int:
        """Return how many numbers to cut instead of `count`, so that what belongs together stays so.

        Examples
        --------
        >>> cutter = Cutter([range(0, 5), range(5, 10)], together=True)
        >>> cutter.fit(1, 100), cutter.cut(7), cutter.fit(1, 4)
        (5, (range(0, 5),), 1)
        """
        if not self._together or self.exhausted or len(self._head) > most:
            return count
        return max(count, len(self._head))

    def cut(self, count: int) -> tuple[range, ...]:
        """Return the next `count` numbers, or as many as are left; fewer where they lie far apart.

        A predicate that refuses nearly everything is walked in empty runs: what was found must not wait
        until a batch is full.
        """
        ranges: list[range] = []
        while count > 0:
            self._search()
            if not self._head:
                break
            if self._together and ranges and len(self._head) > count:
                break
            piece = self._head[:count]
            self._head = self._head[len(piece) :]
            count -= len(piece)
            ranges.append(piece)
            self._last = piece[-1]
        return tuple(ranges)

    def take_absent(self) -> int:
        """Return how many planned numbers were passed over as not stored since the last call."""
        return 0 if self._sieve is None else self._sieve.take_absent()

    def rest(self) -> int:
        """Walk on and return how many numbers were left; a predicate is asked two million times at most."""
        left = len(self._head)
        self._head = range(0)
        pieces = 0
        with contextlib.suppress(UsageError):  # a `where` that raises there is no longer of interest
            for run in self._runs:
                left += len(run)
                pieces += not run
                if pieces > _FURTHEST:
                    break
        return left
