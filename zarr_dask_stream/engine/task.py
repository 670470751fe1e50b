"""What runs on a worker: read a batch of chunks, put them through the stages, say what became of each.

`run_batch` never raises for a chunk: failures are outcomes, named chunk by chunk. `run_guarded` adds
a deadline: the batch runs in a thread of its own, and if one chunk hangs, the thread is left behind
and the outcomes so far go home.
"""

from __future__ import annotations

import contextvars
import math
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import cloudpickle
import numpy as np

from zarr_dask_stream.engine.events import BatchResult, Category, Failure
from zarr_dask_stream.engine.feed import Cargo
from zarr_dask_stream.engine.retry import RetryPolicy, classify
from zarr_dask_stream.errors import MissingChunkError
from zarr_dask_stream.source.array import ArraySpec, check_visible
from zarr_dask_stream.source.assemble import read_blocks
from zarr_dask_stream.source.blocks import Blocks
from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.source.grid import Region
from zarr_dask_stream.source.hedging import Hedge
from zarr_dask_stream.source.labels import Labels
from zarr_dask_stream.source.mosaic import Mosaic, read_mosaics
from zarr_dask_stream.source.reader import ChunkRead, read_chunks
from zarr_dask_stream.source.selection import ChunkPlan, Missing, decode_numbers
from zarr_dask_stream.source.writer import ArrayWriter
from zarr_dask_stream.stages.batch import is_ctrl_c, nbytes_of
from zarr_dask_stream.stages.combine import Fold, Partials, merge_partials
from zarr_dask_stream.stages.sink import Sink
from zarr_dask_stream.stages.transform import Filter, Map, Outcome, Pipeline, Stage, compile_stages

__all__ = ["Work", "run_batch", "run_guarded", "zombies"]

_LOOK_S = 0.5  # how often a batch under way is looked at; called back, it has so long to end by itself
_TRIES_WITHIN = 3  # of one chunk of a box, before the stream judges the box
_PASSING = frozenset({Category.TRANSIENT, Category.THROTTLED, Category.CORRUPT})
_GRACE_S = 2.0  # beyond the reader's own timeout, before a silent thread is given up
_REFRESH_EVERY_S = 30.0  # expired credentials are renewed once for all chunks that trip over them
_zombies: list[threading.Thread] = []
_refreshed: dict[str, float] = {}


@dataclass(frozen=True, kw_only=True)
class Work:
    """All a worker needs to know of a stream; sent with every batch, unpacked once per process.

    `timeout` is seconds for one attempt at one chunk, or None. `fetches` is how many requests one
    batch keeps in flight on a remote store, or None to leave it to the reader. Where it is `fed`, data come with
    each batch instead of from a store.
    """

    spec: ArraySpec
    box: Region
    missing: Missing = "fill"
    timeout: float | None = 60.0
    fetches: int | None = None
    hedge: Hedge | None = None
    stages: tuple[Stage, ...] = ()
    fold: Fold | None = None
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    discard: bool = False
    blocks: Blocks | None = None
    sink: Sink | None = None
    fed: bool = False
    labels: Labels | None = None

    def plan(self) -> ChunkPlan:
        """Return the plan as far as a worker needs it: places, not which chunks are wanted."""
        if self.blocks is not None:
            return ChunkPlan(self.blocks.grid, self.box, halo=self.blocks.halo, labels=self.labels)
        return ChunkPlan(self.spec.grid, self.box, labels=self.labels)

    def specs(self) -> tuple[ArraySpec, ...]:
        """Return every array that is read, and the one that is written."""
        read = (self.spec,) if self.blocks is None else tuple(member.spec for _, member in self.blocks.members)
        return read if self.sink is None else (*read, self.sink.spec)


class _Run:
    """One batch on its way through. What it has done so far can be read from another thread."""

    def __init__(
        self, work: Work, numbers: list[int], worker: str, cancelled: Callable[[], bool], cargo: Cargo | None = None
    ) -> None:
        self.work = work
        self.cargo = cargo
        self.numbers = numbers
        self.worker = worker
        self.cancelled = cancelled
        self.result = BatchResult()
        self.values: list[Any] = []
        self.missing: list[int] = []
        self.partials: Partials = {}
        self.careful = False
        self.lock = threading.Lock()
        self.marked = self.began = time.perf_counter()
        self.took: list[float] = []
        self.current: int | None = None
        self.calling: tuple[int | None, ...] = ()  # chunks that a function of many has been given
        self.abandoned = False
        self._writer: ArrayWriter | None = None
        self._plan = work.plan()
        single = [stage for stage in work.stages if isinstance(stage, (Map, Filter))]
        self._apply = compile_stages(single)
        self._pipeline = Pipeline(work.stages, self._mark_call) if len(single) < len(work.stages) else None

    # -- the walk -----------------------------------------------------------------------------------

    def go(self) -> None:
        begin = time.perf_counter()
        stats = self.result.stats
        try:
            for spec in self.work.specs():
                check_visible(spec)
            if self.work.sink is not None:
                self.work.sink.check()
        except Exception as error:  # noqa: BLE001  # whatever it is, it is the outcome of every chunk
            self._all_failed(error)
        else:
            stats.setup_s = time.perf_counter() - begin
            self._walk_to_the_end()
        stats.wall_s = time.perf_counter() - begin

    def _walk_to_the_end(self) -> None:
        try:
            self._walk()
        except OSError as error:  # of the store as a whole: a chunk's own trouble comes with the chunk
            for number in self._open_numbers():
                self._fail(number, error)

    def _walk(self) -> None:
        reads = self._reads()
        if self.work.sink is not None:
            self._writer = self.work.sink.open(self.work.timeout, lambda: self.abandoned, self._mark)
        settle = self._settle
        stats = self.result.stats
        took = self.took.append
        check_at = time.perf_counter() + 0.1
        try:
            for read in reads:
                took(read.fetch_s + read.decode_s)
                stats.fetch_s += read.fetch_s
                stats.decode_s += read.decode_s
                stats.bytes_stored += read.stored_bytes
                stats.hedges += read.hedged
                self.current = read.number
                # Reading and stages have a timeout each.
                self.marked = begin = time.perf_counter()
                settle(read)
                self.marked = end = time.perf_counter()
                self.current = None
                stats.compute_s += end - begin
                if self.abandoned or (end > check_at and self.cancelled()):
                    break
                if end > check_at:
                    check_at = end + 0.1
            else:
                self._flush()
            self._finish_writing()
        finally:
            if self._writer is not None:
                self._writer.close()
            close = getattr(reads, "close", None)
            if close is not None:
                close()

    def _reads(self) -> Iterator[ChunkRead]:
        work = self.work
        options: dict[str, Any] = {
            "timeout": work.timeout,
            "concurrency": work.fetches,
            "hedge": work.hedge,
            "stopped": lambda: self.abandoned,
        }
        if work.fed:
            assert self.cargo is not None
            given = self.cargo.arrays
            return (ChunkRead(number, given[number], False, None, 0, 0.0, 0.0) for number in self.numbers)
        if work.blocks is not None:
            # What is only cut up again for a target need not be put together before.
            apart = work.sink is not None and not work.stages and not work.blocks.named and work.blocks.whole
            options |= {"missing": work.missing, "on_read": self._mark, "again": self._again}
            return (read_mosaics if apart else read_blocks)(work.blocks, self._plan, self.numbers, **options)
        box = None if self._plan.whole else work.box
        return read_chunks(work.spec, self.numbers, box=box, fill=work.missing == "fill", **options)

    def _again(self, error: Exception, tried: int) -> bool:
        """Whether one of the chunks of a box is read again, before the stream judges the box as a whole."""
        category, retry, stats = classify(error), self.work.retry, self.result.stats
        allowed = min(retry.attempts, _TRIES_WITHIN) if category in _PASSING else 1
        if category is Category.CORRUPT:
            allowed = min(allowed, retry.corrupt_attempts)
        if tried >= allowed:
            return False
        stats.again += 1
        stats.throttled += category is Category.THROTTLED
        return True

    def _mark(self) -> None:
        self.marked = time.perf_counter()

    def _mark_call(self, chunks: Sequence[Chunk]) -> None:
        """Note that a function of many is called, with a timeout of its own, or has returned."""
        self.calling = tuple(chunk.number for chunk in chunks)
        self.marked = time.perf_counter()

    def _flush(self) -> None:
        """Put chunks that wait for others through the rest of the stages: no others come."""
        if self._pipeline is None:
            return
        begin = time.perf_counter()
        for outcome in self._pipeline.flush():
            if self.abandoned:
                return
            self._conclude(outcome)
        self.result.stats.compute_s += time.perf_counter() - begin

    def _settle(self, read: ChunkRead) -> None:
        """Decide what becomes of one chunk that was read."""
        if self.abandoned:
            return
        number, work = read.number, self.work
        if read.error is not None:
            self._fail(number, read.error)
            return
        if read.missing and work.missing != "fill":
            self._settle_missing(number)
            return
        data: Any = read.data
        if isinstance(data, (np.ndarray, Mosaic)):
            self.result.stats.bytes_decoded += data.nbytes
        elif data is not None:  # several arrays by name
            self.result.stats.bytes_decoded += sum(array.nbytes for array in data.values())
        source = Chunk.planned(self._plan, number, data, read.missing)
        if self._pipeline is not None:
            for outcome in self._pipeline.push(source):
                self._conclude(outcome)
            return
        chunk: Chunk | None = source
        try:
            if work.stages:
                chunk = self._apply(source)
        except BaseException as error:
            if is_ctrl_c(error):
                raise
            self._fail(number, error, in_function=True)
            return
        self._take(number, chunk, missing=read.missing)

    def _conclude(self, outcome: Outcome) -> None:
        """Take what came out of the stages, for a chunk that may have been read some time ago."""
        number, chunk = outcome.number, outcome.chunk
        assert number is not None
        if outcome.error is not None:
            self._fail(number, outcome.error, in_function=True)
        else:
            self._take(number, chunk, missing=chunk is not None and chunk.missing)

    def _take(self, number: int, chunk: Chunk | None, *, missing: bool) -> None:
        """Fold what came out of the stages, write it, or keep it for the way home."""
        fold, writer = self.work.fold, self._writer
        if chunk is not None and writer is not None:
            self._write(writer, number, chunk)
        elif chunk is None or fold is None or self._fold(fold, number, chunk):
            self._commit(number, chunk, missing=missing)

    def _settle_missing(self, number: int) -> None:
        work = self.work
        if work.missing == "skip":
            with self.lock:
                if not self.abandoned:
                    self.result.skipped.append(number)
            return
        index = self._plan.grid.index(number)
        error = MissingChunkError(f'chunk {index} of {work.spec.store.url} is not stored and missing="raise"')
        self._fail(number, error)

    # -- into a target ------------------------------------------------------------------------------

    def _write(self, writer: ArrayWriter, number: int, chunk: Chunk) -> None:
        assert self.work.sink is not None
        try:
            region, data = self.work.sink.fit(chunk)
        except Exception as error:  # noqa: BLE001  # what a function returned may be anything
            self._fail(number, error, in_function=True)
            return
        writer.write((number, chunk), region, data)
        self._take_written(writer)

    def _take_written(self, writer: ArrayWriter, *, wait: bool = False) -> None:
        for (number, chunk), written, error in writer.settled(wait=wait):
            if error is not None:
                self._fail(number, error)
            else:
                self.result.stats.bytes_written += written.stored_bytes
                self._commit(number, chunk.with_data(written), missing=chunk.missing)

    def _finish_writing(self) -> None:
        """Wait for what is on its way to a remote store, and for the disk of a local one."""
        writer, sink = self._writer, self.work.sink
        if writer is None or sink is None or self.abandoned:
            return
        self._take_written(writer, wait=True)
        if sink.durable and not self.abandoned:
            try:
                writer.flush()
            except OSError as error:
                self._lose_written(error)

    def _lose_written(self, error: OSError) -> None:
        """Take back that chunks are written: it is not known which of them would be found after a loss of power."""
        with self.lock:
            numbers, self.result.numbers = self.result.numbers, []
            self.values, self.missing = [], []
        for number in numbers:
            self._fail(number, error)

    def _fold(self, fold: Fold, number: int, chunk: Chunk) -> bool:
        """Fold one chunk; a reducer that raises half-way must not leave half a chunk behind.

        Chunks are folded straight into the batch's partial until one raises. Then that partial can't
        be trusted: it is dropped, its chunks are handed back to be read again, and the rest of the
        batch is folded carefully, each chunk on its own before it is merged. If it is the merging that
        raises, the partial merged into can't be trusted either.
        """
        alone: Partials = {}
        untouched = self.careful
        try:
            if self.careful:
                fold.add(alone, chunk)
                untouched = False
                merge_partials(fold.reducer, self.partials, alone)
            else:
                fold.add(self.partials, chunk)
        except BaseException as error:
            if is_ctrl_c(error):
                raise
            with self.lock:
                if not (untouched or self.abandoned):
                    self._forget_partials()
                self.careful = True
            self._fail(number, error, in_function=True)
            return False
        return True

    def _forget_partials(self) -> None:
        self.result.numbers = []
        self.missing = []
        self.partials = {}

    def _commit(self, number: int, chunk: Chunk | None, *, missing: bool) -> None:
        with self.lock:
            if self.abandoned:
                return  # the outcomes have gone home without this thread
            if chunk is None:
                self.result.filtered.append(number)
                return
            self.result.numbers.append(number)
            if self.work.fold is None and not self.work.discard:
                self.values.append(chunk.data)
            if missing:
                self.missing.append(number)

    # -- failures -----------------------------------------------------------------------------------

    def _fail(self, number: int, error: BaseException, *, in_function: bool = False) -> None:
        failure = self._failure(number, error, in_function=in_function)
        with self.lock:
            if not self.abandoned:
                self.result.failures.append(failure)

    def _failure(self, number: int, error: BaseException, *, in_function: bool = False) -> Failure:
        category = classify(error, in_function=in_function)
        if category is Category.CREDENTIALS:
            for spec in self.work.specs():
                _refresh(spec)
        lines = traceback.format_exception(type(error), error, error.__traceback__)
        return Failure(
            number=number,
            category=category,
            error_type=type(error).__name__,
            message=_text(error),
            retryable=in_function and _wanted(self.work.retry, error),
            error=_portable(error),
            traceback="".join(lines[-12:]) if in_function else "",
            worker=self.worker,
        )

    def _all_failed(self, error: BaseException) -> None:
        self.result.failures.extend(self._failure(number, error) for number in self.numbers)

    # -- the way home -------------------------------------------------------------------------------

    def finish(self, *, hung: bool = False) -> BatchResult:
        """Close the accounts: what has no outcome was not attempted, or hung."""
        result = self.result
        if hung:
            with self.lock:
                self.abandoned = True
                if self.work.sink is not None and self.work.sink.durable:
                    result.numbers, self.values, self.missing = [], [], []  # nobody has waited for the disk
                if self.work.fold is not None and (self.current is not None or self.calling):
                    self._forget_partials()  # the thread may hang in the middle of a fold
        result.stats.latency = latency_histogram(self.took)
        result.stats.worker = self.worker
        result.stats.zombies = zombies()
        result.missing = frozenset(self.missing)
        result.stats.filled = len(self.missing)
        result.values, nbytes = _pack(self.values)
        result.stats.bytes_result = nbytes
        if self.work.fold is not None:
            result.partial = self.partials or None
        rest = self._open_numbers()
        if hung:
            result.stats.wall_s = max(self.marked - self.began, 0.0)  # what it did before it hung
        if hung and len(self.calling) > 1:
            # Any of them may be to blame: alone, each is judged for itself.
            result.apart = [number for number in rest if number in self.calling]
            rest = [number for number in rest if number not in self.calling]
        elif hung and rest:
            guilty = next((one for one in (*self.calling, self.current) if one in rest), rest[0])
            rest.remove(guilty)
            what = "reading it" if self.current is None and not self.calling else "a stage function"
            error = TimeoutError(f"{what} took longer than the timeout of {self.work.timeout} s")
            result.failures.append(self._failure(guilty, error))
        result.unattempted = rest
        return result

    def _open_numbers(self) -> list[int]:
        """Return the chunks that have no outcome so far."""
        result = self.result
        seen = {*result.numbers, *result.filtered, *result.skipped, *(f.number for f in result.failures)}
        return [number for number in self.numbers if number not in seen] if len(seen) < len(self.numbers) else []


def latency_histogram(seconds: Sequence[float]) -> dict[int, int]:
    """Count durations by bucket on a log scale, eight buckets to a factor of two.

    Examples
    --------
    >>> latency_histogram([1.0, 2.0, 2.1, 0.0])
    {-240: 1, 0: 1, 8: 2}
    """
    if not seconds:
        return {}
    logs = np.log2(np.maximum(np.array(seconds), 1e-9)) * 8
    buckets, counts = np.unique(np.maximum(np.floor(logs), -240).astype(int), return_counts=True)
    return dict(zip(buckets.tolist(), counts.tolist(), strict=True))


def run_batch(
    work: Work,
    ranges: tuple[range, ...],
    *,
    worker: str = "",
    cancelled: Callable[[], bool] = lambda: False,
    cargo: Cargo | None = None,
) -> BatchResult:
    """Read and process a batch in the calling thread.

    Parameters
    ----------
    work : Work
        The stream.
    ranges : tuple of range
        Chunk numbers.
    worker : str
        Name of this worker, for reports.
    cancelled : callable
        Asked every 0.1 s or so: True cuts the batch short.
    cargo : Cargo, optional
        The data, where no store has them.
    """
    run = _Run(work, list(decode_numbers(ranges)), worker or _here(), cancelled, cargo)
    run.go()
    return run.finish()


def run_guarded(
    work: Work,
    ranges: tuple[range, ...],
    *,
    worker: str = "",
    cancelled: Callable[[], bool] = lambda: False,
    cargo: Cargo | None = None,
) -> BatchResult:
    """Like `run_batch`, but give up on a chunk that hangs beyond the timeout, or after it was called back.

    The hanging thread can't be stopped; it is left behind as a daemon and counted by `zombies`.
    """
    if work.timeout is None:
        return run_batch(work, ranges, worker=worker, cancelled=cancelled, cargo=cargo)
    run = _Run(work, list(decode_numbers(ranges)), worker or _here(), cancelled, cargo)
    problem: list[BaseException] = []

    def body() -> None:
        try:
            run.go()
        except BaseException as error:  # noqa: BLE001  # carried over to the task's own thread
            problem.append(error)

    # With the context of the task: functions may ask which worker they run on.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(body,), name="zds-batch", daemon=True)
    thread.start()
    allowed = work.timeout + _GRACE_S
    called_back = False
    while True:
        thread.join(min(max(run.marked + allowed - time.perf_counter(), 0.001), _LOOK_S))
        if not thread.is_alive():
            break
        # A worker can't close while a task of it runs: nobody who stops a stream should wait for a dead server.
        if called_back or time.perf_counter() - run.marked > allowed:
            _zombies.append(thread)
            return run.finish(hung=True)
        called_back = cancelled()
    if problem:
        raise problem[0]
    return run.finish()


def _refresh(spec: ArraySpec) -> None:
    """Reopen the store with fresh credentials, once per process for a whole wave of failures."""
    now = time.monotonic()
    if now - _refreshed.get(spec.store.token, -math.inf) > _REFRESH_EVERY_S:
        _refreshed[spec.store.token] = now
        spec.store.refresh()


def zombies() -> int:
    """Count threads of this process that were left behind and still run."""
    _zombies[:] = [thread for thread in _zombies if thread.is_alive()]
    return len(_zombies)


def _here() -> str:
    return f"{socket.gethostname()}:{threading.get_native_id()}"


def _text(error: BaseException) -> str:
    """Return what the error says; a user's exception may refuse even that."""
    try:
        text = str(error).strip()
    except Exception:  # noqa: BLE001  # whatever its __str__ raises
        text = ""
    return text or type(error).__name__


def _wanted(policy: RetryPolicy, error: BaseException) -> bool:
    """Ask the user's predicate; one that raises wants nothing."""
    try:
        return policy.wants(error)
    except Exception:  # noqa: BLE001  # the error of the chunk is the one to report
        return False


def _portable(error: BaseException) -> BaseException | None:
    """Return the exception if it survives the trip to the client, else None."""
    try:
        copy = cloudpickle.loads(cloudpickle.dumps(error))
    except Exception:  # noqa: BLE001  # a user's exception may refuse in any way
        return None
    return error if type(copy) is type(error) else None


def _pack(values: list[Any]) -> tuple[Any, int]:
    """Turn scalars of one kind into one array, so that they travel as one buffer; count bytes."""
    if not values:
        return (), 0
    if _are_scalars(values):
        packed = np.array(values, dtype=values[0].dtype)
        return packed, packed.nbytes
    return values, sum(nbytes_of(value) for value in _some(values)) * len(values) // min(len(values), 16)


def _are_scalars(values: list[Any]) -> bool:
    """Whether an array of the values gives each of them back as it was."""
    first = values[0]
    # Strings and records would lose trailing zeros in an array, and subclasses themselves.
    if not isinstance(first, np.generic) or isinstance(first, np.flexible) or first.dtype.type is not type(first):
        return False
    return all(type(value) is type(first) and value.dtype == first.dtype for value in values)


def _some(values: list[Any]) -> Iterator[Any]:
    yield from values[:16]
