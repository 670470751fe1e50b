"""A clock that stands still, and a cluster that plays a script in its time."""

from __future__ import annotations

import enum
import heapq
import random
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from zarr_dask_stream.engine.events import (
    Batch,
    BatchDone,
    BatchLost,
    BatchResult,
    BatchStats,
    Failure,
    Input,
    Threads,
    Tick,
)
from zarr_dask_stream.engine.retry import classify
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.selection import decode_numbers

__all__ = ["ManualClock", "Outcome", "Scripted", "ScriptedExecutor"]


class ManualClock:
    """A clock that stands still until it is told to go on.

    Parameters
    ----------
    now : float
        What it shows at first, seconds.

    Examples
    --------
    >>> clock = ManualClock()
    >>> clock.advance(2.5)
    >>> clock()
    2.5
    """

    def __init__(self, now: float = 0.0) -> None:
        self._now = now

    def __call__(self) -> float:
        """Return the time, seconds."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Go on by so many seconds; raises UsageError for a step back."""
        if not seconds >= 0:
            raise UsageError(f"a clock goes forward only: expected seconds >= 0, got {seconds!r}")
        self._now += seconds

    def advance_to(self, moment: float) -> None:
        """Go on to `moment`, or stay where that has passed."""
        self._now = max(self._now, moment)

    def __repr__(self) -> str:
        return f"ManualClock({self._now})"


class Outcome(enum.Enum):
    """What a script may say of a chunk, besides failing and a value.

    Examples
    --------
    >>> import zarr, zarr_dask_stream as zds
    >>> from zarr_dask_stream.testing import rehearse
    >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4")
    >>> stream = zds.stream_chunks(array)
    >>> items = rehearse(stream, script={(1,): [Outcome.FILTERED]})
    >>> len(items), stream.report.filtered
    (2, 1)
    """

    FILTERED = "filtered"
    SKIPPED = "skipped"
    UNATTEMPTED = "unattempted"


Scripted = BaseException | Failure | Outcome


class ScriptedExecutor:
    """An executor that reads nothing and waits for nothing: it plays a script in virtual time.

    It has the methods of the engine's ``Executor`` protocol. Batches are taken up in the order of
    submission by as many threads as there are, and come back when their duration is over.

    Parameters
    ----------
    clock : ManualClock, optional
        Shown the time by `wait`; a new one by default.
    threads, workers : int
        Size of the cluster.
    value : callable, optional
        ``value(number)``: what a chunk comes to; its number by default.
    script : mapping of int to sequence, optional
        By chunk number: what becomes of its first tries, in turn. An exception is classified as if
        the store had raised it, a `Failure` is taken as it is, an `Outcome` says that the chunk was
        dropped or not tried. After these it succeeds.
    losses : mapping of int to int, optional
        By chunk number: how often the batch that holds it loses its worker.
    hangs : collection of int
        Chunk numbers whose batch never comes back; its thread is free again once it is cancelled.
    duration : float or callable
        Seconds for one chunk, or ``duration(batch)``: seconds for a batch.
    jitter : float
        Share by which durations vary, from 0 to 1: this decides the order of completion.
    seed : int
        Seed of that.

    Attributes
    ----------
    busy_s : float
        Thread-seconds spent on batches that came back.
    submitted, cancelled : list of int
        Ids of batches.
    restarted : list of str
        Workers.

    Examples
    --------
    >>> executor = ScriptedExecutor(threads=1, duration=0.5, script={2: [ConnectionError("reset")]})
    >>> executor.submit((Batch(1, (range(1, 4),), count=3, nbytes=24),))
    >>> [done] = executor.wait(None)
    >>> done.result.numbers, done.result.failures[0].category.value, executor.clock()
    ([1, 3], 'transient', 1.5)
    """

    def __init__(
        self,
        clock: ManualClock | None = None,
        *,
        threads: int = 4,
        workers: int = 1,
        value: Callable[[int], Any] | None = None,
        script: Mapping[int, Sequence[Scripted]] | None = None,
        losses: Mapping[int, int] | None = None,
        hangs: Collection[int] = (),
        duration: float | Callable[[Batch], float] = 0.01,
        jitter: float = 0.0,
        seed: int = 0,
    ) -> None:
        if threads < 1 or not 0 <= jitter <= 1:
            raise UsageError(f"expected at least 1 thread and a jitter from 0 to 1, got {threads} and {jitter}")
        self.clock = clock or ManualClock()
        self.busy_s = 0.0
        self.submitted: list[int] = []
        self.cancelled: list[int] = []
        self.restarted: list[str] = []
        self._threads = Threads(threads, workers)
        self._value = value
        self._script = {number: deque(outcomes) for number, outcomes in (script or {}).items()}
        self._losses = dict(losses or {})
        self._hangs = frozenset(hangs)
        self._duration = duration
        self._jitter = jitter
        self._rng = random.Random(seed)  # noqa: S311  # a script, not a secret
        self._queue: deque[Batch] = deque()
        self._busy: dict[int, tuple[Batch, float]] = {}
        self._ends: list[tuple[float, int]] = []
        self._inputs: list[Input] = []

    # -- the protocol -------------------------------------------------------------------------------

    def start(self) -> Threads:
        """Return the size of the cluster."""
        return self._threads

    async def start_async(self) -> Threads:
        """Return the size of the cluster."""
        return self.start()

    def submit(self, batches: tuple[Batch, ...]) -> None:
        """Queue batches; idle threads take them up at once."""
        self.submitted += [batch.id for batch in batches]
        self._queue.extend(batches)
        self._dispatch()

    def cancel(self, batches: tuple[int, ...]) -> None:
        """Forget batches, queued or under way."""
        self.cancelled += batches
        self._queue = deque(batch for batch in self._queue if batch.id not in batches)
        for batch in batches:
            self._busy.pop(batch, None)
        self._dispatch()

    def restart(self, worker: str) -> None:
        """Note that `worker` was to be restarted."""
        self.restarted.append(worker)

    def wait(self, seconds: float | None) -> list[Input]:
        """Let the time go on to the next completion, for `seconds` at most.

        Raises
        ------
        UsageError
            If nothing will ever complete and no limit is given: a real executor would wait for ever.
        """
        while self._ends and self._ends[0][1] not in self._busy:
            heapq.heappop(self._ends)
        until = None if seconds is None else self.clock() + seconds
        if not self._inputs:
            if self._ends and (until is None or self._ends[0][0] <= until):
                self._complete(self._ends[0][0])
            elif until is None:
                raise UsageError("nothing is under way that could complete: give wait() a number of seconds")
            else:
                self.clock.advance_to(until)
        inputs, self._inputs = self._inputs, []
        return inputs or [Tick()]

    async def wait_async(self, seconds: float | None) -> list[Input]:
        """Like `wait`; time is virtual here too."""
        return self.wait(seconds)

    def wake(self) -> None:
        """Let the next `wait` return at once."""
        self._inputs.append(Tick())

    def close(self) -> None:
        """Forget everything."""
        self._queue.clear()
        self._busy.clear()
        self._ends.clear()

    async def close_async(self) -> None:
        """Forget everything."""
        self.close()

    # -- the script ---------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether no batch is queued or under way."""
        return not (self._queue or self._busy)

    @property
    def busy_share(self) -> float:
        """Share of the thread-seconds so far that went into batches which came back."""
        return self.busy_s / (self._threads.threads * self.clock()) if self.clock() else 0.0

    def resize(self, threads: int, workers: int = 1) -> None:
        """Change the size of the cluster; the next `wait` tells. What is under way goes on."""
        self._threads = Threads(threads, workers)
        self._inputs.append(self._threads)
        self._dispatch()

    def _dispatch(self) -> None:
        while self._queue and len(self._busy) < self._threads.threads:
            batch = self._queue.popleft()
            seconds = self._seconds(batch)
            self._busy[batch.id] = batch, seconds
            if self._hangs and not self._hangs.isdisjoint(decode_numbers(batch.ranges)):
                continue
            heapq.heappush(self._ends, (self.clock() + seconds, batch.id))

    def _seconds(self, batch: Batch) -> float:
        seconds = self._duration(batch) if callable(self._duration) else self._duration * batch.count
        return seconds * self._rng.uniform(1 - self._jitter, 1 + self._jitter) if self._jitter else seconds

    def _complete(self, moment: float) -> None:
        self.clock.advance_to(moment)
        while self._ends and self._ends[0][0] <= moment:
            batch, seconds = self._busy.pop(heapq.heappop(self._ends)[1], (None, 0.0))
            if batch is not None:
                self.busy_s += seconds
                self._inputs.append(self._outcome(batch, seconds))
        self._dispatch()

    def _outcome(self, batch: Batch, seconds: float) -> Input:
        numbers = list(decode_numbers(batch.ranges))
        killers = [number for number in numbers if self._losses.get(number)] if self._losses else []
        if killers:
            self._losses[killers[0]] -= 1
            return BatchLost(batch.id, "its worker died, as the script says")
        result = BatchResult(stats=BatchStats(wall_s=seconds, bytes_result=8 * batch.count, worker="scripted"))
        if self._script:
            for number in numbers:
                self._settle(number, result)
        else:
            result.numbers = numbers
        result.values = result.numbers if self._value is None else [self._value(n) for n in result.numbers]
        return BatchDone(batch.id, result)

    def _settle(self, number: int, result: BatchResult) -> None:
        outcomes = self._script.get(number)
        outcome = outcomes.popleft() if outcomes else None
        if outcome is None:
            result.numbers.append(number)
        elif outcome is Outcome.FILTERED:
            result.filtered.append(number)
        elif outcome is Outcome.SKIPPED:
            result.skipped.append(number)
        elif isinstance(outcome, Failure):
            result.failures.append(outcome)
        elif isinstance(outcome, BaseException):
            kind = type(outcome).__name__
            result.failures.append(Failure(number, classify(outcome), kind, str(outcome) or kind, error=outcome))
        else:
            result.unattempted.append(number)
