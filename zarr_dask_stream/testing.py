"""Stand-ins for the tests of people who use this package, and for ours: virtual time, scripted faults, slow stores.

`ScriptedExecutor` takes the place of a cluster and `ManualClock` that of time, so that a run with
hours of backoff and a thousand workers is over in milliseconds and goes the same way each time.
`FaultyStore` and `LatencyStore` wrap a real store; arrays in them are read by this package and by
zarr alike.
"""

from __future__ import annotations

import asyncio
import enum
import fnmatch
import heapq
import random
import threading
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest, Store
from zarr.storage import MemoryStore, WrapperStore

from zarr_dask_stream.engine.events import (
    Batch,
    BatchDone,
    BatchLost,
    BatchResult,
    BatchStats,
    Failure,
    Input,
    Notice,
    Threads,
    Tick,
)
from zarr_dask_stream.engine.instructions import Abort, Cancel, Fold, Instruction, Notify, Restart, Submit
from zarr_dask_stream.engine.retry import classify
from zarr_dask_stream.engine.supervisor import Supervisor
from zarr_dask_stream.engine.task import Work, run_batch
from zarr_dask_stream.engine.window import Item
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.preparation import work_of
from zarr_dask_stream.source.selection import decode_numbers, encode_numbers
from zarr_dask_stream.stream import ChunkStream
from zarr_dask_stream.watch.report import Report

__all__ = [
    "Fault",
    "FaultyStore",
    "LatencyStore",
    "ManualClock",
    "Outcome",
    "Rehearsal",
    "ScriptedExecutor",
    "rehearse",
]

T = TypeVar("T")

_IDLE_S = 1.0


# -- time and the cluster ---------------------------------------------------------------------------


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


class _RealReads(ScriptedExecutor):
    """Plays its script, and has all that succeeds there read and put through the stages, in this thread."""

    def __init__(self, work: Work, **script: Any) -> None:
        super().__init__(**script)
        self._work = work

    def _outcome(self, batch: Batch, seconds: float) -> Input:
        played = super()._outcome(batch, seconds)
        if not isinstance(played, BatchDone) or not played.result.numbers:
            return played
        script, real = played.result, run_batch(self._work, encode_numbers(played.result.numbers), worker="scripted")
        real.failures += script.failures
        real.filtered += script.filtered
        real.skipped += script.skipped
        real.unattempted += script.unattempted
        real.stats.wall_s = seconds
        return BatchDone(batch.id, real)


def rehearse(
    stream: ChunkStream[Any],
    *,
    script: Mapping[Any, Sequence[Scripted]] | None = None,
    losses: Mapping[Any, int] | None = None,
    hangs: Collection[Any] = (),
    **executor: Any,
) -> list[Any]:
    """Iterate a stream without a cluster, in virtual time, with faults where the script has them.

    The store is read and your functions are called in this thread, so that a debugger stops in them. The
    stream's policies (retries, hedging, rate, window) are at work as always; hours of backoff take no time.

    Parameters
    ----------
    stream : ChunkStream
        What to run; its ``report`` tells of the run.
    script : mapping of tuple of int to sequence, optional
        By grid index: what becomes of a chunk's first tries, in turn, as in `ScriptedExecutor`.
    losses : mapping of tuple of int to int, optional
        By grid index: how often the batch that holds it loses its worker.
    hangs : collection of tuple of int
        Grid indices whose batch never comes back.
    **executor
        More for `ScriptedExecutor`: threads, duration, jitter, seed, clock.

    Returns
    -------
    list
        The items, as a loop over the stream would get them.

    Examples
    --------
    >>> import zarr, zarr_dask_stream as zds
    >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i2", fill_value=5)
    >>> stream = zds.stream_chunks(array, on_error="skip").map(lambda chunk: int(chunk.data.sum()))
    >>> items = rehearse(stream, script={(0,): [TimeoutError()] * 2}, losses={(2,): 99})
    >>> [(item.index, item.data) for item in items], stream.report.retries
    ([((0,), 10), ((1,), 10)], 3)
    >>> [(letter.index, letter.category) for letter in stream.report.dead_letters]
    [((2,), 'cluster')]
    """
    number = stream._options.plan.grid.number  # noqa: SLF001  # a stream does not show its plan
    place = _RealReads(
        work_of(stream._options),  # noqa: SLF001  # nor what travels to workers
        script={number(index): outcomes for index, outcomes in (script or {}).items()},
        losses={number(index): times for index, times in (losses or {}).items()},
        hangs=[number(index) for index in hangs],
        **executor,
    )
    return list(stream._rehearse(place))  # noqa: SLF001  # made for this


class Rehearsal:
    """A run of a `Supervisor` on a `ScriptedExecutor`: the engine's loop without array, cluster or time.

    Parameters
    ----------
    machine : Supervisor
        A new machine.
    executor : ScriptedExecutor
        Where its batches go.
    check : bool
        Assert the machine's invariants after each step.

    Attributes
    ----------
    notices : list of Notice
        What observers would have heard.
    partials : list
        Partials of a reduction, as they came.
    report : Report
        The notices, folded.
    log : list of (float, Input or None)
        Times and inputs, None where the consumer took an item: all that the run depended on. See
        `replay`.
    steps : list of list of Instruction
        What the machine answered to each.

    Examples
    --------
    >>> from zarr_dask_stream.engine.batching import Batcher, BatchLimits, Cutter
    >>> from zarr_dask_stream.engine.retry import RetryPolicy
    >>> from zarr_dask_stream.engine.window import Window, WindowLimits
    >>> from zarr_dask_stream.source.grid import ChunkGrid
    >>> from zarr_dask_stream.source.selection import ChunkPlan, parse_region
    >>> plan = ChunkPlan(ChunkGrid((6,), (1,)), parse_region(None, (6,)))
    >>> machine = Supervisor(
    ...     plan, Cutter(plan.runs()), Window(WindowLimits(chunks=3, nbytes=1000)), Batcher(BatchLimits()),
    ...     RetryPolicy(), chunk_nbytes=8, total=len(plan),
    ... )
    >>> run = Rehearsal(machine, ScriptedExecutor(script={1: [ConnectionError("reset")]}))
    >>> [item.number for item in run.items()]
    [0, 1, 2, 3, 4, 5]
    >>> run.report.retries, run.report.outcome
    (1, 'done')
    """

    def __init__(self, machine: Supervisor, executor: ScriptedExecutor, *, check: bool = True) -> None:
        self.machine = machine
        self.executor = executor
        self.notices: list[Notice] = []
        self.partials: list[Any] = []
        self.report = Report()
        self.log: list[tuple[float, Input | None]] = []
        self.steps: list[list[Instruction]] = []
        self._check = check

    def items(self) -> Iterator[Item]:
        """Run, and hand out what the machine gives; leaving early ends the run as it would a stream."""
        machine, clock = self.machine, self.executor.clock
        outcome, error = "failed", ""
        try:
            self._handle(self.executor.start())
            while True:
                item = machine.take()
                if item is not None:
                    self.log.append((clock(), None))
                    yield item
                    if machine.hungry:
                        self._handle(Tick())
                elif machine.done:
                    break
                else:
                    for event in self.executor.wait(self._patience()):
                        self._handle(event)
            outcome = "done"
        except GeneratorExit:
            outcome = "stopped early"
            raise
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
            raise
        finally:
            self._carry_out(machine.finish(outcome, clock(), error=error))
            self.executor.close()

    def run(self) -> Report:
        """Run to the end and return the report."""
        for _ in self.items():
            pass
        return self.report

    def _patience(self) -> float | None:
        due = self.machine.next_timer()
        return _IDLE_S if due is None else max(due - self.executor.clock(), 0.0)

    def _handle(self, event: Input) -> None:
        now = self.executor.clock()
        self.log.append((now, event))
        instructions = self.machine.handle(event, now)
        self.steps.append(instructions)
        if self._check:
            self.machine.check()
        self._carry_out(instructions)

    def _carry_out(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, Notify):
                self.notices.append(instruction.notice)
                self.report.handle(instruction.notice)
            elif isinstance(instruction, Submit):
                self.executor.submit(instruction.batches)
            elif isinstance(instruction, Cancel):
                self.executor.cancel(instruction.batches)
            elif isinstance(instruction, Restart):
                self.executor.restart(instruction.worker)
            elif isinstance(instruction, Fold):
                self.partials.append(instruction.partial)
            elif isinstance(instruction, Abort):
                raise instruction.error

    @staticmethod
    def replay(machine: Supervisor, log: Iterable[tuple[float, Input | None]]) -> list[list[Instruction]]:
        """Feed a recorded log to a new machine and return its answers.

        They are the recorded ones if the machine was made like the first: same plan, options and seed.
        """
        answers = []
        for now, event in log:
            if event is None:
                machine.take()
            else:
                answers.append(machine.handle(event, now))
        return answers


# -- stores -----------------------------------------------------------------------------------------


class _Wrapped(WrapperStore[Store]):
    """A store of this process, in which each read passes by `_pass`.

    It can't be pickled, so that faults and delays are shared by all who read from it.
    """

    def __init__(self, store: Store | MutableMapping[str, Any]) -> None:
        super().__init__(store if isinstance(store, Store) else MemoryStore(store))

    async def _pass(self, key: str, value: Buffer | None, prototype: BufferPrototype) -> Buffer | None:
        raise NotImplementedError

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Read a key, or a range of it."""
        return await self._pass(key, await self._store.get(key, prototype, byte_range), prototype)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Read ranges of keys, each as if by `get`."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def _get_many(
        self, requests: Iterable[tuple[str, BufferPrototype, ByteRequest | None]]
    ) -> AsyncGenerator[tuple[str, Buffer | None], None]:
        for key, prototype, byte_range in requests:
            yield key, await self.get(key, prototype, byte_range)

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError(f"{type(self).__name__} lives in this process and can't be pickled")

    def __str__(self) -> str:
        return f"{type(self).__name__}({self._store})"

    __repr__ = __str__


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What goes wrong when a key is read.

    Parameters
    ----------
    error : Exception, optional
        Raised instead of an answer.
    keep : int, optional
        Only the first so many bytes arrive.
    flip : int, optional
        The bits of the byte at this place are turned over (counted from the end where negative).
    absent : bool
        The key reads as not stored.
    delay_s : float
        Seconds to wait first.
    times : int or None
        How many reads it lasts; None: for ever.

    Examples
    --------
    >>> import zarr, zarr_dask_stream as zds
    >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4", fill_value=7)
    >>> array[:] = 1
    >>> store = FaultyStore(array.store, {"c/1": Fault(absent=True)})
    >>> [chunk.missing for chunk in zds.stream_chunks(store, concurrency=1)]
    [False, True, False]
    """

    error: Exception | None = None
    keep: int | None = None
    flip: int | None = None
    absent: bool = False
    delay_s: float = 0.0
    times: int | None = 1

    def spoil(self, data: bytes) -> bytes:
        r"""Return `data` cut off and damaged.

        Examples
        --------
        >>> Fault(keep=3, flip=0).spoil(b"abcdef")
        b'\x9ebc'
        """
        kept = bytearray(data[: self.keep])
        if self.flip is not None and kept:
            kept[self.flip % len(kept)] ^= 0xFF
        return bytes(kept)


class FaultyStore(_Wrapped):
    """A store in which chosen reads go wrong, a chosen number of times.

    Parameters
    ----------
    store : zarr store or dict
        Where the data are. Writing is never disturbed.
    faults : mapping of str to Fault, Exception or a sequence of these
        By key, or by a pattern such as ``"c/*/0"``. Several are met one after the other; an
        exception alone is raised once.

    Attributes
    ----------
    reads : Counter of str
        How often each key was read.

    Notes
    -----
    Workers in the same process share its faults; in another process it can't be opened.

    Examples
    --------
    >>> import zarr
    >>> store = FaultyStore({})
    >>> array = zarr.create_array(store, shape=(4,), chunks=(2,), dtype="i2")
    >>> array[:] = 7
    >>> store.break_reads({"c/1": [ConnectionError("reset"), Fault(keep=1)]})
    >>> from zarr_dask_stream import RetryPolicy, stream_chunks
    >>> stream = stream_chunks(store, concurrency=1, retry=RetryPolicy(wait_initial=0))
    >>> [chunk.data.tolist() for chunk in stream], stream.report.retries, store.met
    ([[7, 7], [7, 7]], 2, 2)
    """

    def __init__(
        self,
        store: Store | MutableMapping[str, Any],
        faults: Mapping[str, Fault | Exception | Sequence[Fault | Exception]] | None = None,
    ) -> None:
        super().__init__(store)
        self.reads: Counter[str] = Counter()
        self._met: Counter[str] = Counter()
        self._faults: dict[str, deque[Fault]] = {}
        self._left: dict[str, int | None] = {}
        self._lock = threading.Lock()
        self.break_reads(faults or {})

    def _with_store(self, store: Store) -> FaultyStore:
        view = FaultyStore(store)
        view.reads, view._met, view._lock = self.reads, self._met, self._lock
        view._faults, view._left = self._faults, self._left
        return view

    @property
    def met(self) -> int:
        """How many reads met a fault."""
        return self._met.total()

    def break_reads(self, faults: Mapping[str, Fault | Exception | Sequence[Fault | Exception]]) -> None:
        """Set the faults of more keys; those of a key that has some already are replaced."""
        with self._lock:
            for pattern, given in faults.items():
                several = given if isinstance(given, Sequence) else [given]
                self._faults[pattern] = deque(f if isinstance(f, Fault) else Fault(error=f) for f in several)
                self._left.pop(pattern, None)

    def heal(self) -> None:
        """Forget all faults."""
        with self._lock:
            self._faults.clear()
            self._left.clear()

    def _next(self, key: str) -> Fault | None:
        with self._lock:
            self.reads[key] += 1
            for pattern, faults in self._faults.items():
                if faults and fnmatch.fnmatchcase(key, pattern):
                    self._met[pattern] += 1
                    return self._use(pattern, faults)
        return None

    def _use(self, pattern: str, faults: deque[Fault]) -> Fault:
        fault = faults[0]
        if fault.times is not None:
            left = self._left.get(pattern)
            self._left[pattern] = left = (fault.times if left is None else left) - 1
            if left <= 0:
                faults.popleft()
                self._left[pattern] = None
        return fault

    async def _pass(self, key: str, value: Buffer | None, prototype: BufferPrototype) -> Buffer | None:
        fault = self._next(key)
        if fault is None:
            return value
        if fault.delay_s:
            await asyncio.sleep(fault.delay_s)
        if fault.error is not None:
            raise fault.error.with_traceback(None)
        if fault.absent or value is None:
            return None
        return prototype.buffer.from_bytes(fault.spoil(value.to_bytes()))


class LatencyStore(_Wrapped):
    """A store in which each read takes its time.

    Parameters
    ----------
    store : zarr store or dict
        Where the data are.
    delay_s : float or callable
        Seconds added to each read, or ``delay_s(rng)`` for a distribution of your own.
    spread : float
        Share by which a fixed delay varies, from 0 to 1.
    seed : int
        The delay of the n-th read of a key follows from this, whatever is read in between.

    Examples
    --------
    >>> store = LatencyStore({}, delay_s=0.03, spread=0.5, seed=1)
    >>> [round(store.delay("c/0", nth), 4) for nth in (0, 1)] == [round(store.delay("c/0", nth), 4) for nth in (0, 1)]
    True
    """

    def __init__(
        self,
        store: Store | MutableMapping[str, Any],
        *,
        delay_s: float | Callable[[random.Random], float] = 0.03,
        spread: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(store)
        if not 0 <= spread <= 1:
            raise UsageError(f"spread is a share from 0 to 1, got {spread!r}")
        self._delay_s, self._spread, self._seed = delay_s, spread, seed
        self.reads: Counter[str] = Counter()
        self._lock = threading.Lock()

    def _with_store(self, store: Store) -> LatencyStore:
        view = LatencyStore(store, delay_s=self._delay_s, spread=self._spread, seed=self._seed)
        view.reads, view._lock = self.reads, self._lock
        return view

    def delay(self, key: str, nth: int) -> float:
        """Return the seconds that the `nth` read of `key` (from 0) takes."""
        rng = random.Random(f"{self._seed}/{key}/{nth}")  # noqa: S311  # a script, not a secret
        if callable(self._delay_s):
            return self._delay_s(rng)
        return self._delay_s * rng.uniform(1 - self._spread, 1 + self._spread)

    async def _pass(self, key: str, value: Buffer | None, prototype: BufferPrototype) -> Buffer | None:  # noqa: ARG002
        with self._lock:
            nth = self.reads[key]
            self.reads[key] += 1
        await asyncio.sleep(self.delay(key, nth))
        return value
