"""The façade: options become a plan, a machine and an executor; here is the only loop and the only clock.

`stream_chunks` checks everything and reads only metadata. The `ChunkStream` it returns is lazy:
each iteration is a new run, which asks the `Supervisor` what to do, has an `Executor` do it, and
hands out what comes back.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import time
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from zarr_dask_stream.engine.batching import Batcher, BatchLimits, Cutter
from zarr_dask_stream.engine.checkpoint import Checkpoint, Ledger, encode_value, fingerprint, identity
from zarr_dask_stream.engine.events import (
    Callback,
    ChunkDeadLettered,
    ChunksEmitted,
    ChunksFiltered,
    ChunksSkipped,
    ClusterChanged,
    DeadLetter,
    Input,
    Notice,
    RunStarted,
    Threads,
    Tick,
)
from zarr_dask_stream.engine.executor import (
    Executor,
    SerialExecutor,
    check_client,
    choose_executor,
    delayed_chunks,
    memory_budget,
)
from zarr_dask_stream.engine.retry import RetryPolicy
from zarr_dask_stream.engine.supervisor import Abort, Cancel, Instruction, Notify, Restart, Submit, Supervisor
from zarr_dask_stream.engine.supervisor import Fold as FoldIn
from zarr_dask_stream.engine.task import Work
from zarr_dask_stream.engine.throttle import RateLimit, Throttle
from zarr_dask_stream.engine.window import Window, WindowLimits
from zarr_dask_stream.errors import ChunkError, StoreError, UsageError
from zarr_dask_stream.source.array import ArraySpec, open_array
from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.source.hedging import Hedge
from zarr_dask_stream.source.reader import stored_numbers
from zarr_dask_stream.source.selection import ChunkPlan, Missing, RegionLike, Sieve, parse_region
from zarr_dask_stream.stages.combine import Fold, Partials, Reducer, as_reducer, check_data, merge_partials
from zarr_dask_stream.stages.transform import Filter, Map, Stage, check_function
from zarr_dask_stream.watch.progress import progress_observer
from zarr_dask_stream.watch.report import Report

__all__ = ["ChunkStream", "stream_chunks"]

logger = logging.getLogger("zarr_dask_stream")

OnError = Literal["raise", "skip"] | Callable[[DeadLetter], Any]
Progress = bool | Callable[[int, int], Any]
_LOCAL_KINDS = ("local", "zip", "memory")
_LOCAL_TASK_S = 0.25
_REMOTE_TASK_S = 1.0
_IDLE_S = 1.0  # the loop looks up at least so often, to see whether it was told to stop


@dataclass(frozen=True, kw_only=True)
class _Options:
    """Everything that was asked for, checked; a stream is this and nothing else."""

    spec: ArraySpec
    plan: ChunkPlan
    missing: Missing
    ordered: bool
    limits: WindowLimits
    retry: RetryPolicy
    timeout: float | None
    on_error: OnError
    progress: Progress
    callbacks: tuple[Any, ...]
    client: Any
    stages: tuple[Stage, ...] = ()
    fold: Fold | None = None
    limit: int | None = None
    rate_limit: RateLimit | None = None
    requests: int | None = None
    hedge: Hedge | None = None
    checkpoint: Checkpoint | None = None


@dataclass(frozen=True, slots=True)
class _Wait:
    """What the loop asks its driver for: inputs, within so many seconds."""

    seconds: float


def stream_chunks(
    array: Any,
    *,
    path: str = "",
    storage_options: Mapping[str, Any] | None = None,
    client: Any = None,
    region: RegionLike = None,
    where: Callable[[tuple[int, ...]], Any] | None = None,
    missing: Missing = "fill",
    ordered: bool = True,
    concurrency: int | None = None,
    max_bytes: int | str = "10%",
    requests: int | None = None,
    retry: RetryPolicy | None = None,
    timeout: float | None = 60.0,
    hedge: Hedge | None = None,
    rate_limit: RateLimit | None = None,
    on_error: OnError = "raise",
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    progress: Progress = False,
    callbacks: Iterable[Any] = (),
) -> ChunkStream:
    """Stream the chunks of a Zarr array through a Dask cluster.

    Everything is checked here, and nothing but metadata is read. Iterate the result with ``for``, or
    with ``async for`` under an asynchronous client.

    Parameters
    ----------
    array : str, path, zarr.Array, zarr store or mapping
        The array, or the store it is in (then with `path`). URLs are opened with fsspec.
    path : str
        Path of the array inside the store.
    storage_options : mapping, optional
        Options for the file system of a URL (credentials, endpoint). Never shown or logged.
    client : distributed.Client, optional
        By default the active client. Where there is none, a cluster inside this process is started
        for each run and ended with it; with ``concurrency=1`` not even that: chunks are read one by
        one in the calling thread.
    region : int, slice, Ellipsis or tuple of these, optional
        In array coordinates. Only chunks that intersect it are read, and they are cropped to it. An
        integer keeps its axis, with length 1.
    where : callable, optional
        ``where(index) -> bool`` on the grid index, asked before anything is read.
    missing : {"fill", "skip", "raise"}
        What to do with a chunk that is not stored: hand out the fill value (with ``chunk.missing``
        set), leave it out (counted in the report), or treat it as a failure.
    ordered : bool
        True: in grid order (C order). False: as they complete.
    concurrency : int, optional
        Chunks in flight: submitted and not yet taken. By default bounded by `max_bytes` alone, with
        the number of chunks to a task following the measured cost of a chunk.
    max_bytes : int or str
        Decoded bytes in flight, a hard bound: bytes, "512 MiB", or a share of this host's memory.
        One chunk larger than the bound passes alone.
    requests : int, optional
        Requests that each task keeps in flight on a remote store. By default adapted to the latency that
        is measured. Local stores are read one chunk after the other by each task.
    retry : RetryPolicy, optional
        How often, how soon and after which errors a chunk is tried again.
    timeout : float or None
        Seconds for one attempt at one chunk, reading and stages each. Not enforced on functions in
        the sequential stream, which has no second thread to watch from.
    hedge : Hedge, optional
        Start a second copy of a read that takes much longer than usual; the first answer wins.
    rate_limit : RateLimit, optional
        Bound on requests and bytes per second, all workers together; ``stream.rate_limit`` changes it
        while a run goes on. Without it, the stream still slows down when the store asks for it.
    on_error : {"raise", "skip"} or callable
        After a chunk's last attempt: raise `ChunkError`; put it among ``report.dead_letters`` and go
        on; or call this with the `DeadLetter` (on the client) and go on.
    checkpoint : str, path or Checkpoint, optional
        A durable ledger: the same stream started again with it goes on where the last run stopped. A
        chunk is done when the consumer asks for the next item (at least once to a consumer, exactly
        once into a reduction).
    progress : bool or callable
        True: a bar in the terminal or notebook. ``progress(done, total)``: called as chunks settle.
    callbacks : iterable of Callback or callable
        Observers, each called with every event of the run.

    Returns
    -------
    ChunkStream
        Lazy; each iteration is a new run.

    Raises
    ------
    UsageError
        An option is out of range, a region lies outside the array, a function can't be called.
    StoreError
        There is no such store or array, or its metadata can't be understood.

    Examples
    --------
    >>> import numpy as np, zarr
    >>> array = zarr.create_array({}, shape=(4, 6), chunks=(2, 3), dtype="i4")
    >>> array[:] = np.arange(24).reshape(4, 6)
    >>> stream = stream_chunks(array).map(lambda chunk: int(chunk.data.sum()))
    >>> len(stream), {chunk.index: chunk.data for chunk in stream}
    (4, {(0, 0): 24, (0, 1): 42, (1, 0): 96, (1, 1): 114})
    >>> stream.report
    Report(done: 4/4 emitted, 0 filtered, 0 missing, 0 dead, 0 cancelled, 0 retries, ... s)
    """
    _check_count("concurrency", "chunks", concurrency)
    _check_count("requests", "requests", requests)
    _check_choices(missing, ordered, progress, on_error)
    _check_kind("retry", RetryPolicy, retry)
    _check_kind("rate_limit", RateLimit, rate_limit)
    _check_kind("hedge", Hedge, hedge)
    _check_timeout(timeout)
    if callable(on_error):
        check_function(on_error, "on_error", "a DeadLetter")
    if where is not None:
        check_function(where, "where", "the grid index")
    check_client(client)
    ledger = Checkpoint(url=checkpoint) if isinstance(checkpoint, (str, os.PathLike)) else checkpoint
    _check_kind("checkpoint", Checkpoint, ledger)
    limits = WindowLimits(chunks=concurrency, nbytes=memory_budget(max_bytes))
    observers = _check_callbacks(callbacks)
    spec = open_array(array, path=path, storage_options=storage_options)
    plan = ChunkPlan(spec.grid, parse_region(region, spec.shape), where)
    return ChunkStream(
        _Options(
            spec=spec,
            plan=plan,
            missing=missing,
            ordered=ordered,
            limits=limits,
            retry=retry if retry is not None else RetryPolicy(),
            timeout=timeout,
            on_error=on_error,
            progress=progress,
            callbacks=observers,
            client=client,
            rate_limit=rate_limit,
            requests=requests,
            hedge=hedge,
            checkpoint=ledger,
        )
    )


def _check_count(name: str, of: str, value: Any) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise UsageError(f"{name} is a number of {of}, at least one, or None, got {value!r}")


def _check_kind(name: str, kind: type, value: Any) -> None:
    if value is not None and not isinstance(value, kind):
        raise UsageError(f"{name} must be a {kind.__name__}, got {type(value).__name__}: {value!r}")


def _check_choices(missing: Any, ordered: Any, progress: Any, on_error: Any) -> None:
    if missing not in ("fill", "skip", "raise"):
        raise UsageError(f'missing must be "fill", "skip" or "raise", got {missing!r}')
    if not isinstance(ordered, bool):
        raise UsageError(f"ordered must be True or False, got {ordered!r}")
    if not callable(progress) and not isinstance(progress, bool):
        raise UsageError(f"progress must be True, False or a function of (done, total), got {progress!r}")
    if not callable(on_error) and on_error not in ("raise", "skip"):
        raise UsageError(f'on_error must be "raise", "skip" or a function of a DeadLetter, got {on_error!r}')


def _check_timeout(timeout: Any) -> None:
    if timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
        raise UsageError(f"timeout is seconds greater than 0, or None, got {timeout!r}")


def _check_callbacks(callbacks: Any) -> tuple[Any, ...]:
    if callable(callbacks) or isinstance(callbacks, Callback):
        return (callbacks,)
    try:
        observers = tuple(callbacks)
    except TypeError:
        raise UsageError(f"callbacks must be a list of observers, got {callbacks!r}") from None
    for observer in observers:
        if not isinstance(observer, Callback) and not callable(observer):
            raise UsageError(f"a callback is a zds.Callback or a function of an event, got {observer!r}")
    return observers


class ChunkStream:
    """The chunks of an array as a lazy stream; made by `stream_chunks`.

    Stages return new streams, iterating starts a run. ``len(stream)`` is the number of planned
    chunks. Leaving a loop early, an exception in it and `close` cancel what is in flight.

    Examples
    --------
    >>> import zarr
    >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4", fill_value=7)
    >>> stream = stream_chunks(array, concurrency=1)
    >>> stream
    ChunkStream(int32[6] in 3 chunks of [2], ordered, concurrency=1)
    >>> [chunk.data.tolist() for chunk in stream.take(2)]
    [[7, 7], [7, 7]]
    """

    def __init__(self, options: _Options) -> None:
        self._options = options
        self._report = Report(outcome="not started")
        self._runs: weakref.WeakSet[_Run] = weakref.WeakSet()

    # -- what it is ---------------------------------------------------------------------------------

    @property
    def report(self) -> Report:
        """Account of the latest run, also while it goes on."""
        return self._report

    @property
    def spec(self) -> ArraySpec:
        """The array: shape, chunks, dtype and so on."""
        return self._options.spec

    def __len__(self) -> int:
        planned = len(self._options.plan)
        return planned if self._options.limit is None else min(planned, self._options.limit)

    def __repr__(self) -> str:
        o = self._options
        shape = ", ".join(map(str, o.spec.shape))
        chunks = ", ".join(map(str, o.spec.chunks))
        words = ["ordered" if o.ordered else "as completed"]
        if o.limits.chunks is not None:
            words.append(f"concurrency={o.limits.chunks}")
        if not o.plan.whole or o.plan.where is not None:
            words.append(f"{o.plan.box_size:,} of them planned" if o.plan.where is None else "a selection")
        words += [type(stage).__name__.lower() for stage in o.stages]
        if o.fold is not None:
            words.append("reduce")
        return f"ChunkStream({o.spec.dtype}[{shape}] in {len(o.spec.grid):,} chunks of [{chunks}], {', '.join(words)})"

    # -- stages -------------------------------------------------------------------------------------

    def _with(self, **changes: Any) -> ChunkStream:
        if self._options.fold is not None:
            raise UsageError("a reduced stream has no chunks any more: put other stages before .reduce(...)")
        return ChunkStream(dataclasses.replace(self._options, **changes))

    def map(self, fn: Callable[[Chunk], Any]) -> ChunkStream:
        """Call ``fn(chunk)`` on the workers; the item keeps its place, its data become the result.

        Only results travel to the client. The function travels by pickle.
        """
        check_function(fn, "map", "the chunk")
        return self._with(stages=(*self._options.stages, Map(fn)))

    def filter(self, pred: Callable[[Chunk], Any]) -> ChunkStream:
        """Keep the chunks for which ``pred(chunk)`` is true; asked on the workers, after the read.

        To leave chunks out before they are read, use ``where=`` of `stream_chunks`.
        """
        check_function(pred, "filter", "the chunk")
        if self._options.limit is not None:
            raise UsageError("put .filter(...) before .take(...): after it, fewer items than asked for would come")
        return self._with(stages=(*self._options.stages, Filter(pred)))

    def take(self, n: int) -> ChunkStream:
        """Hand out `n` items and end; where nothing is filtered, exactly `n` chunks are read."""
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:  # type: ignore[redundant-expr]  # a bool is an int
            raise UsageError(f"take needs a number of items >= 0, got {n!r}")
        limit = self._options.limit
        return self._with(limit=n if limit is None else min(limit, n))

    def reduce(self, reducer: Reducer | Mapping[str, Reducer] | Iterable[Reducer]) -> ChunkStream:
        """Fold the chunks into one answer, on the workers; only partials travel.

        Parameters
        ----------
        reducer : Reducer, mapping of str to Reducer, or sequence of Reducer
            Several are folded in one pass; the answer is then a dict by name.

        Returns
        -------
        ChunkStream
            With one item for each key (``()`` without `group_by`): ``.index`` is the key and
            ``.data`` the answer. `compute` is the short way to it.
        """
        key = self._options.fold.key if self._options.fold is not None else None
        if self._options.fold is not None and not isinstance(self._options.fold.reducer, _Ungrouped):
            raise UsageError("the stream is reduced already")
        if self._options.limit is not None:
            raise UsageError("take(...) hands out items, and a reduction folds them: use region= or where= instead")
        reducer, spec = as_reducer(reducer), self._options.spec
        if not any(isinstance(stage, Map) for stage in self._options.stages):
            check_data(reducer, spec.dtype, len(spec.shape))
        return ChunkStream(dataclasses.replace(self._options, fold=Fold(reducer, key)))

    def group_by(self, key: Callable[[tuple[int, ...]], Hashable]) -> ChunkStream:
        """Reduce separately for each ``key(index)``; to be followed by ``.reduce(...)``."""
        check_function(key, "group_by", "the grid index")
        return self._with(fold=Fold(_Ungrouped(), key))

    # -- ways to run it -----------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Chunk]:
        yield from self._drive(self._new_run(deliver=True))

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        run = self._new_run(deliver=True)
        try:
            steps = run.steps(await run.executor.start_async())
            reply: list[Input] | None = None
            while True:
                try:
                    step = steps.send(reply)
                except StopIteration:
                    break
                if isinstance(step, _Wait):
                    reply = await run.executor.wait_async(step.seconds)
                else:
                    reply = None
                    yield step
        except BaseException as error:
            run.failed(error)
            raise
        finally:
            try:
                run.end()
            finally:
                await run.executor.close_async()

    def run(self) -> Report:
        """Drain the stream for its effects and return the report; results stay on the workers."""
        for _ in self._drive(self._new_run(deliver=False)):
            pass
        return self._report

    def compute(self) -> Any:
        """Run a reduced stream and return its answer, or a dict of answers by key after `group_by`."""
        if self._options.fold is None:
            raise UsageError("compute() goes with .reduce(...); iterate the stream, or .run() it for its effects")
        answers = {item.index: item.data for item in self}
        return answers[()] if self._options.fold.key is None else answers

    def to_delayed(self) -> Iterator[Any]:
        """Yield one ``dask.delayed`` for each planned chunk, for graphs of your own.

        Each computes to a `Chunk`, after the map stages; errors are raised by the task, as in any
        Dask graph: window, retries and dead letters are the stream's and are not in there.
        """
        o = self._options
        if o.fold is not None or any(isinstance(stage, Filter) for stage in o.stages):
            raise UsageError("to_delayed() makes one task for each chunk: filter and reduce have no place there")
        plan = self._options.plan
        tasks = delayed_chunks(self._work(), plan)
        return iter(tasks) if o.limit is None else (task for task, _ in zip(tasks, range(o.limit), strict=False))

    @property
    def rate_limit(self) -> RateLimit | None:
        """Bound on requests and bytes per second; may be set while a run goes on."""
        return self._options.rate_limit

    @rate_limit.setter
    def rate_limit(self, limit: RateLimit | None) -> None:
        if limit is not None and not isinstance(limit, RateLimit):
            raise UsageError(f"rate_limit must be a RateLimit or None, got {limit!r}")
        self._options = dataclasses.replace(self._options, rate_limit=limit)
        for run in list(self._runs):
            run.change_rate(limit)

    def pause(self) -> None:
        """Submit nothing new until `resume`; what is in flight comes back and can be taken."""
        for run in list(self._runs):
            run.pause(paused=True)

    def resume(self) -> None:
        """Go on after `pause`."""
        for run in list(self._runs):
            run.pause(paused=False)

    def drain(self) -> None:
        """Read nothing more: hand out what is in flight, save the checkpoint, and end."""
        for run in list(self._runs):
            run.drain()

    def close(self) -> None:
        """Cancel every run of this stream; closing twice does no harm."""
        for run in list(self._runs):
            run.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _new_run(self, *, deliver: bool) -> _Run:
        run = _Run(self._options, self._work(discard=not deliver), deliver=deliver)
        self._report = run.report
        self._runs.add(run)
        return run

    def _drive(self, run: _Run) -> Generator[Chunk, None, None]:
        """Feed the loop from a blocking executor."""
        try:
            steps = run.steps(run.executor.start())
            reply: list[Input] | None = None
            while True:
                try:
                    step = steps.send(reply)
                except StopIteration:
                    break
                if isinstance(step, _Wait):
                    reply = run.executor.wait(step.seconds)
                else:
                    reply = None
                    yield step
        except BaseException as error:
            run.failed(error)
            raise
        finally:
            try:
                run.end()
            finally:
                run.executor.close()

    def _work(self, *, discard: bool = False) -> Work:
        o = self._options
        return Work(
            spec=o.spec,
            box=o.plan.box,
            missing=o.missing,
            timeout=o.timeout,
            fetches=o.requests,
            hedge=o.hedge,
            stages=o.stages,
            fold=o.fold,
            retry=o.retry,
            discard=discard,
        )


class _Ungrouped(Reducer):
    """Holds the place between ``group_by`` and ``reduce``."""


class _Run:
    """One run of a stream: its machine, its executor, its observers, its clock."""

    def __init__(self, options: _Options, work: Work, *, deliver: bool) -> None:
        o = options
        if o.fold is not None and isinstance(o.fold.reducer, _Ungrouped):
            raise UsageError("group_by(...) needs a .reduce(...) after it")
        self._options = o
        self._began = time.monotonic()
        self._stopped = False
        self._error = ""
        self._outcome = "done"
        self._consumer_s = 0.0
        self._handed_at: float | None = None
        self._said_empty_at = 0.0
        self._partials: Partials = {}
        self._ledger = _ledger_of(o) if o.checkpoint is not None else None
        self._deliver = deliver and o.fold is None
        self._acknowledged: list[int] = []
        self.report = Report(url=o.spec.store.url)
        self._observers: list[Callable[[Notice], Any]] = [self.report.handle]
        if o.progress:
            self._observers.append(progress_observer(o.progress, self.report))
        self._observers += [c.handle if isinstance(c, Callback) else c for c in o.callbacks]
        runs: Iterable[range] = o.plan.runs(by_shard=not (o.ordered and self._deliver))
        total = len(o.plan) if o.plan.where is None or o.progress else None
        if self._ledger is not None:
            self._open_ledger(self._ledger)
            runs = self._ledger.done.missing_from(runs)
            total = None if total is None else total - len(self._ledger.done)
        if o.missing == "skip":
            runs = _stored_only(o, runs)
        self._total = total
        try:
            self.executor: Executor = choose_executor(work, o.client, serial=o.limits.chunks == 1)
        except BaseException:
            self._close_ledger()
            raise
        self._machine = Supervisor(
            o.plan,
            Cutter(runs),
            Window(o.limits),
            # On a remote store the first and the last requests of a task are not overlapped: longer tasks.
            Batcher(BatchLimits(target_s=_LOCAL_TASK_S if o.spec.store.kind in _LOCAL_KINDS else _REMOTE_TASK_S)),
            o.retry,
            chunk_nbytes=o.spec.chunk_nbytes,
            total=total,
            ordered=o.ordered,
            limit=o.limit,
            deliver=self._deliver,
            depth=1 if isinstance(self.executor, SerialExecutor) else None,
            throttle=Throttle(o.rate_limit, o.spec.chunk_nbytes),
            hedge=o.hedge,
            rng=random.Random(os.urandom(8)),  # noqa: S311  # jitter must differ from client to client
        )

    def _now(self) -> float:
        return time.monotonic() - self._began

    # -- the loop -----------------------------------------------------------------------------------

    def steps(self, threads: Threads) -> Generator[Chunk | _Wait, list[Input] | None, None]:
        """Hand out what is ready, else ask for inputs and let the machine judge them: the only loop."""
        machine, plan = self._machine, self._options.plan
        spec = self._options.spec
        resumed = 0 if self._ledger is None else len(self._ledger.done)
        self._tell(RunStarted(0.0, self._total, spec.chunk_nbytes, spec.grid.grid_shape, spec.store.url, resumed))
        self._do(machine.handle(threads, self._now()))
        while not self._stopped:
            item = machine.take()
            if item is not None:
                self._handed_at = time.monotonic()
                yield Chunk.planned(plan, item.number, item.value, item.missing)
                self._consumer_s += time.monotonic() - self._handed_at
                self._handed_at = None
                if self._ledger is not None:
                    self._acknowledged.append(item.number)  # the consumer came back for more
                    self._save_if_due(self._ledger)
                if machine.hungry:
                    self._do(machine.handle(Tick(), self._now()))
            elif machine.done:
                break
            else:
                for event in (yield _Wait(self._patience())) or ():
                    self._do(machine.handle(event, self._now()))
                if self._ledger is not None:
                    self._save_if_due(self._ledger)
        if self._options.fold is not None and not self._stopped:
            yield from self._answers(self._options.fold)

    def _patience(self) -> float:
        due = self._machine.next_timer()
        return _IDLE_S if due is None else min(max(due - self._now(), 0.0), _IDLE_S)

    def _answers(self, fold: Fold) -> Iterator[Chunk]:
        if fold.key is None and not self._partials:
            self._partials[()] = fold.reducer.create()
        for key, partial in self._partials.items():
            yield Chunk(key, (), fold.reducer.finish(partial))

    # -- carrying out instructions --------------------------------------------------------------------

    def _do(self, instructions: list[Instruction]) -> None:
        failure: BaseException | None = None
        for instruction in instructions:
            if isinstance(instruction, Notify):
                self._tell(instruction.notice)
                if isinstance(instruction.notice, ChunkDeadLettered) and failure is None:
                    failure = self._dead(instruction.notice.letter)
            elif isinstance(instruction, Submit):
                if failure is None:
                    self.executor.submit(instruction.batches)
            elif isinstance(instruction, Cancel):
                self.executor.cancel(instruction.batches)
            elif isinstance(instruction, FoldIn):
                assert self._options.fold is not None
                merge_partials(self._options.fold.reducer, self._partials, instruction.partial)
            elif isinstance(instruction, Restart):
                self.executor.restart(instruction.worker)
            elif isinstance(instruction, Abort):
                failure = failure or instruction.error
        if failure is not None:
            raise failure  # at the end: what happened beside it is told and counted first

    def _dead(self, letter: DeadLetter) -> BaseException | None:
        """Do with a chunk that was given up what the caller asked for; return what is to be raised."""
        if callable(self._options.on_error):
            try:
                self._options.on_error(letter)
            except BaseException as error:  # noqa: BLE001  # the caller's own way to stop the stream
                return error
        elif self._options.on_error == "raise":
            tries = "1 attempt" if letter.attempts == 1 else f"{letter.attempts} attempts"
            failure = ChunkError(
                f"chunk {letter.index} of {self._options.spec.store.url} failed after {tries}: "
                f'{letter.error_type}: {letter.message} ({letter.reason}). on_error="skip" goes on without it',
                index=letter.index,
                attempts=letter.attempts,
            )
            failure.__cause__ = letter.error
            return failure
        return None

    # -- the ledger ---------------------------------------------------------------------------------

    def _open_ledger(self, ledger: Ledger) -> None:
        if self._options.fold is not None:
            encode_value(self._options.fold.reducer.create())  # refuse before the work, not after it
        ledger.open(self._now(), time.time())
        self._partials = ledger.partials

    def _close_ledger(self) -> None:
        if self._ledger is not None:
            self._ledger.acknowledge(self._acknowledged)
            self._ledger.close(self._now(), time.time())

    def _note(self, notice: Notice) -> None:
        """Mark as done what needs no consumer: the rest is marked when the consumer comes back."""
        assert self._ledger is not None
        if isinstance(notice, ChunksFiltered) or (isinstance(notice, ChunksEmitted) and not self._deliver):
            self._ledger.acknowledge(notice.numbers)
        elif isinstance(notice, ChunksSkipped):
            for run in notice.numbers:
                self._ledger.acknowledge(run)

    def _save_if_due(self, ledger: Ledger) -> None:
        now = self._now()
        due = ledger.due(now, len(self._acknowledged))
        if due or len(self._acknowledged) >= 1024:  # one by one, marking would cost more than reading
            ledger.acknowledge(self._acknowledged)
            self._acknowledged = []
        if due:
            ledger.save(now, time.time())

    def _tell(self, notice: Notice) -> None:
        if self._ledger is not None:
            self._note(notice)
        if isinstance(notice, ClusterChanged):
            self._say_if_empty(notice)
        for observer in list(self._observers):
            try:
                observer(notice)
            except Exception:
                logger.exception("the observer %r failed and hears no more of this run", observer)
                self._observers.remove(observer)

    def _say_if_empty(self, notice: ClusterChanged) -> None:
        """Say that there is no worker: after a few seconds, then ever more rarely."""
        if not notice.waiting_s:
            self._said_empty_at = 0.0
        elif notice.waiting_s >= 2 * self._said_empty_at:
            self._said_empty_at = notice.waiting_s
            logger.warning(
                "no Dask worker for %.0f s: the stream goes on as soon as one joins the cluster", notice.waiting_s
            )

    # -- ends ---------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask the run to end; safe from any thread."""
        self._stopped = True

    def pause(self, *, paused: bool) -> None:
        """Stop submitting, or go on."""
        self._machine.paused = paused

    def drain(self) -> None:
        """Submit nothing more; end when what is out was handed out."""
        self._machine.draining = True

    def change_rate(self, limit: RateLimit | None) -> None:
        """Take another bound on the rate."""
        self._machine.throttle.change(limit, self._now())

    def failed(self, error: BaseException) -> None:
        """Note why the run ended before its time."""
        if isinstance(error, (GeneratorExit, KeyboardInterrupt)):
            self._outcome = "stopped early"
        else:
            self._outcome = "failed"
            self._error = f"{type(error).__name__}: {error}"

    def end(self) -> None:
        """Close the account; the executor is closed by the driver."""
        if self._handed_at is not None:
            self._consumer_s += time.monotonic() - self._handed_at
        unfinished = self._stopped or self._machine.draining or not self._machine.done
        if self._outcome == "done" and unfinished:
            self._outcome = "stopped early"
        for instruction in self._machine.finish(
            self._outcome, self._now(), consumer_s=self._consumer_s, error=self._error
        ):
            if isinstance(instruction, Notify):
                self._tell(instruction.notice)
            elif isinstance(instruction, Cancel):
                self.executor.cancel(instruction.batches)
        self._close_ledger()


def _stored_only(options: _Options, runs: Iterable[range]) -> Iterable[range]:
    """Leave out what a listing of the store shows to be absent; where it can't be listed, ask chunk by chunk."""
    try:
        numbers = np.fromiter(stored_numbers(options.spec, options.plan.box), np.int64)
    except StoreError as error:
        logger.info("the store can't be listed, absent chunks are asked for one by one: %s", error)
        return runs
    return Sieve(runs, numbers)


def _ledger_of(options: _Options) -> Ledger:
    """Return the ledger of a stream, with all that makes it this stream and no other."""
    o, spec = options, options.spec
    assert o.checkpoint is not None
    about = {
        "array": spec.store.url,
        "path": spec.path,
        "shape": list(spec.shape),
        "chunks": list(spec.chunks),
        "region": [[s.start, s.stop] for s in o.plan.box],
        "missing": o.missing,
        "stages": [type(stage).__name__.lower() for stage in o.stages],
        "where": o.plan.where is not None,
        "reduce": None if o.fold is None else type(o.fold.reducer).__name__,
    }
    parts = {
        "about": about,
        "metadata": spec.fingerprint,
        "where": identity(o.plan.where),
        "stages": identity(o.stages),
        "fold": identity(o.fold),
    }
    return Ledger(o.checkpoint, o.plan, fingerprint(parts), about)
