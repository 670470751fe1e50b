"""One run of a stream: here is the only loop and the only clock.

The loop asks the `Supervisor` what to do, has an `Executor` do it, and hands out what comes back. It is a
generator that never waits itself: where it needs inputs it yields a `Wait`, where a sink is to be called a `Call`,
and its driver, blocking or asynchronous, sends in what came of it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import random
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from zarr_dask_stream.engine.batching import Batcher, Cutter
from zarr_dask_stream.engine.dask_executor import DaskExecutor
from zarr_dask_stream.engine.events import (
    BatchSubmitted,
    Callback,
    Category,
    ChunkDeadLettered,
    ChunkRetried,
    ChunksEmitted,
    ChunksFiltered,
    ChunksSkipped,
    ClusterChanged,
    DeadLetter,
    Failure,
    Input,
    Notice,
    RunStarted,
    Threads,
    Tick,
)
from zarr_dask_stream.engine.executor import (
    Executor,
    SerialExecutor,
    choose_executor,
)
from zarr_dask_stream.engine.instructions import Abort, Cancel, Instruction, Notify, Restart, Submit
from zarr_dask_stream.engine.instructions import Fold as FoldIn
from zarr_dask_stream.engine.retry import GiveUp
from zarr_dask_stream.engine.supervisor import Supervisor
from zarr_dask_stream.engine.task import Work
from zarr_dask_stream.engine.throttle import RateLimit, Throttle
from zarr_dask_stream.engine.window import Window
from zarr_dask_stream.errors import ChunkError, UsageError
from zarr_dask_stream.options import Options
from zarr_dask_stream.preparation import batch_limits, stored_only
from zarr_dask_stream.record import Record, open_target
from zarr_dask_stream.source.chunk import Chunk, numbers_of
from zarr_dask_stream.source.selection import decode_numbers
from zarr_dask_stream.stages.answers import answers_of
from zarr_dask_stream.stages.batch import Batch, Batches, BatchRule
from zarr_dask_stream.stages.combine import Ungrouped
from zarr_dask_stream.stages.windows import Along
from zarr_dask_stream.watch.chunkmap import ChunkMap
from zarr_dask_stream.watch.progress import progress_observer
from zarr_dask_stream.watch.publisher import Publisher
from zarr_dask_stream.watch.report import Report
from zarr_dask_stream.watch.snapshot import snapshot

__all__ = ["Call", "Run", "Step", "Wait"]

logger = logging.getLogger("zarr_dask_stream")

_IDLE_S = 1.0  # the loop looks up at least so often, to see whether it was told to stop


@dataclass(frozen=True, slots=True)
class Wait:
    """What the loop asks its driver for: inputs, within so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Call:
    """What the loop asks its driver to do: call a sink with an item, and send back the exception or None."""

    sink: Callable[[Any], Any]
    item: Chunk | Batch


Step = Chunk | Batch | Wait | Call


class Run:
    """One run of a stream: its machine, its executor, its observers, its clock.

    A `shared` run has several consumers: its driver says when an item has reached one, and when one is through
    with it. Nothing of it may be called by two threads at once. A rehearsal brings an executor and a clock.
    """

    def __init__(
        self,
        options: Options,
        work: Work,
        *,
        deliver: bool,
        shared: bool = False,
        executor: Executor | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        o = options
        if o.fold is not None and isinstance(o.fold.reducer, Ungrouped):
            what = "group_by(...)" if o.fold.window is None else "window(...)"
            raise UsageError(f"{what} needs a .reduce(...) after it")
        self._options = o
        self._clock = clock
        self._began = clock()
        self._stopped = False
        self._ended = False
        self._error = ""
        self._outcome = "done"
        self._consumer_s = 0.0
        self._sink_retries = 0
        self._handed_at: float | None = None
        self._said_empty_at = 0.0
        self._answers = None if o.fold is None else answers_of(o.fold, o.plan, ordered=o.ordered)
        self._windows = None if o.fold is None or o.fold.window is None else self._answers
        rule = o.batch if o.route is None else o.batch or BatchRule(size=1)
        self._batches = None if rule is None or not deliver else Batches(rule)
        self._deliver = deliver and o.fold is None
        self._shared = shared
        self._record = (
            None
            if o.checkpoint is None
            else Record(o, self._answers, delivers=self._deliver, now=self._now, wall=time.time)
        )
        self.report = Report(url=o.spec.store.url)
        self._more_maps: list[ChunkMap] = []
        self._observers: list[Callable[[Notice], Any]] = [self.report.handle]
        if o.progress:
            self._observers.append(progress_observer(o.progress, self.report, limit=o.limit))
        self._observers += [c.for_run().handle if isinstance(c, Callback) else c for c in o.callbacks]
        if self._record is not None:
            self._record.open()
        try:
            if o.target is not None:
                open_target(o, o.target, self._record)
            runs, self._total = self._planned()
            cargo = None if o.feed is None else o.feed.cargo
            self.executor = executor or choose_executor(work, o.client, serial=o.limits.chunks == 1, cargo=cargo)
        except BaseException:
            if self._record is not None:
                self._record.close()
            raise
        # Jitter must differ from client to client.
        self._rng = random.Random(os.urandom(8) if executor is None else 0)  # noqa: S311  # and is no secret
        self._machine = self._supervisor(runs)
        if isinstance(self.executor, DaskExecutor) and self.executor.client is not None:
            seen = functools.partial(snapshot, self.report, self.report.chunkmap, self.report.history)
            self._observers.append(Publisher(self.executor.client, seen).handle)

    def _planned(self) -> tuple[Iterable[range], int | None]:
        """Return the numbers to submit, in order, and how many they are, where that is known."""
        o = self._options
        done = None if self._record is None else self._record.done
        if o.feed is not None:
            self._observers.insert(0, o.feed.hear)
            return o.feed.runs(done), None
        runs: Iterable[range]
        if o.fold is not None and isinstance(o.fold.window, Along):
            runs = o.plan.runs_along(o.fold.window.axes)
        else:
            runs = o.plan.runs(by_shard=not (o.ordered and self._deliver))
        total = len(o.plan) if o.plan.where is None or o.progress else None
        if done is not None:
            runs = done.missing_from(runs)
            total = None if total is None else total - len(done)
        return (stored_only(o, runs) if o.missing == "skip" else runs), total

    def _supervisor(self, runs: Iterable[range]) -> Supervisor:
        """Return the machine that decides, for these numbers."""
        o = self._options
        return Supervisor(
            o.plan,
            Cutter(runs, together=o.together),
            Window(o.limits),
            Batcher(batch_limits(o)),
            o.retry,
            chunk_nbytes=o.item_nbytes,
            total=self._total,
            ordered=o.ordered,
            limit=o.limit,
            deliver=self._deliver,
            depth=1 if isinstance(self.executor, SerialExecutor) else None,
            throttle=Throttle(o.rate_limit, o.item_nbytes),
            hedge=o.hedge,
            rng=self._rng,
        )

    def _now(self) -> float:
        return self._clock() - self._began

    # -- the loop -----------------------------------------------------------------------------------

    def steps(self, threads: Threads) -> Generator[Step, Any, None]:
        """Hand out what is ready, else ask for inputs and let the machine judge them: the only loop."""
        machine, plan = self._machine, self._options.plan
        self._begin()
        if machine.paused:
            logger.warning("the stream is paused: it begins when resume() is called from another thread or task")
        self._do(machine.handle(threads, self._now()))
        inputs: deque[Input] = deque()
        plain = self._answers is None and self._batches is None
        heeds = not plain or self._record is not None
        routes = self._options.route is not None
        while not self._stopped:
            item: Chunk | Batch | None
            if plain:  # the usual way, at the cost of no call
                taken = machine.take(hold=self._shared)
                item = None if taken is None else Chunk.planned(plan, taken.number, taken.value, taken.missing)
            else:
                item = self._next()
            if item is not None:
                if routes and isinstance(item, Batch) and not (yield from self._sink(item)):
                    continue
                self._handed_at = self._clock()
                yield item if plain else self._shown(item)
                self._count_rest()
                if heeds:
                    self._acknowledge(item)  # the consumer came back for more
                if machine.hungry:
                    self._handle(Tick())
            elif inputs:
                self._handle(inputs.popleft())
            elif machine.done:
                if self._is_over():
                    break
            else:
                inputs = self._take_in((yield Wait(self._patience())) or ())

    def _begin(self) -> None:
        """Say what the run is about, and what earlier ones have done of it."""
        o, plan = self._options, self._options.plan
        resumed = 0 if self._record is None else len(self._record.done)
        self._tell(
            RunStarted(
                0.0, self._total, o.item_nbytes, plan.grid.grid_shape, o.spec.store.url, resumed,
                plan.start, plan.stop, o.limits.chunks, o.limits.nbytes,
            )
        )  # fmt: skip
        if self._record is not None:
            for numbers in self._record.done.numbers():
                for chunkmap in (self.report.chunkmap, *self._more_maps):
                    chunkmap.resume(numbers)

    def _take_in(self, events: Iterable[Input]) -> deque[Input]:
        """Take in what has happened; return what is left for one by one, as each may complete a window."""
        self._count_rest()
        left = deque(events)
        while left and self._windows is None:
            self._handle(left.popleft())
        if self._record is not None:
            self._record.save_if_due()
        return left

    def _is_over(self) -> bool:
        """Whether nothing more will be handed out; a reduction may have an answer when it hears of the end."""
        if self._answers is None or self._ended:
            return True
        self._answers.end()
        self._ended = True
        return False

    def _handle(self, event: Input) -> None:
        if self._windows is not None:
            # What is folded costs memory until its window is done: then nothing is read ahead.
            self._machine.holding = self._windows.nbytes > self._options.limits.nbytes
        self._do(self._machine.handle(event, self._now()))

    def _patience(self) -> float:
        dues = [self._machine.next_timer(), None if self._windows is None else self._windows.deadline]
        if self._batches is not None and self._batches.deadline is not None:
            dues.append(self._batches.deadline + self._consumer_s)
        seconds = [max(due - self._now(), 0.0) for due in dues if due is not None]
        return min([*seconds, _IDLE_S])

    # -- what is handed out ---------------------------------------------------------------------------

    def _next(self) -> Chunk | Batch | None:
        """Return the answer or batch that can be handed out now, or None."""
        if self._batches is not None:
            return self._next_batch(self._batches)
        assert self._answers is not None
        if self._windows is not None:
            self._windows.passed(self._machine.frontier)
        return self._answers.take(self._now())

    def _next_batch(self, batches: Batches) -> Batch | None:
        """Gather items until a batch closes; None where there are no more for now."""
        machine = self._machine
        while True:
            # An item waits for its batch only while the consumer waits too.
            batch = batches.take(self._now() - self._consumer_s)
            if batch is not None:
                if self._options.route is None:
                    machine.hand_out(numbers_of(batch))
                return batch
            item = machine.take(hold=True)
            if item is None:
                if not len(batches) or not machine.done_but_for(len(batches)):
                    return None
                batches.end()
                continue
            machine.stow(1)
            self._gather(batches, Chunk.planned(self._options.plan, item.number, item.value, item.missing))
            if machine.hungry:
                self._handle(Tick())

    def _gather(self, batches: Batches, chunk: Chunk) -> None:
        key, route = None, self._options.route
        if route is not None:
            try:
                key = route.place(chunk)
            except Exception as error:  # noqa: BLE001  # of the user's function, or its key: this chunk's own
                self._refuse([chunk], error, "it has no sink")
                return
        batches.add(chunk, self._now() - self._consumer_s, key)

    def _shown(self, item: Chunk | Batch) -> Chunk | Batch:
        return item[0] if isinstance(item, Batch) and self._options.batch is None else item

    def _sink(self, batch: Batch) -> Generator[Call | Wait, Any, bool]:
        """Have the sink of a batch called, perhaps again; return whether it took it."""
        assert self._options.route is not None
        began, attempts = self._now(), 0
        while True:
            self._handed_at = self._clock()
            error = yield Call(self._options.route.sinks[batch.key], self._shown(batch))
            self._count_rest()
            if error is None:
                break
            attempts += 1
            delay_s = self._sink_delay(batch, error, attempts, began)
            if delay_s is None:
                times = "" if attempts == 1 else f" {attempts} times"
                self._refuse(batch, error, f"the sink {batch.key!r} raised{times}", attempts)
                return False
            due = self._now() + delay_s
            while (left := due - self._now()) > 0 and not self._stopped:
                self._take_in((yield Wait(min(left, _IDLE_S))) or ())
            if self._stopped:
                return False
        self._machine.hand_out(numbers_of(batch))
        if self._record is not None:
            self._record.acknowledge(numbers_of(batch))
        return True

    def _sink_delay(self, batch: Batch, error: BaseException, attempts: int, began: float) -> float | None:
        """Say in how many seconds a sink that has raised is to be called again; None for not at all."""
        policy, now = self._options.sink_retry, self._now()
        if policy is None or not (policy.on is None or policy.wants(error)):
            return None
        failures = _failures(batch, error)
        wanted = dataclasses.replace(failures[0], retryable=True)
        verdict = policy.decide(wanted, attempts, now - began, self._rng, self._sink_retries)
        if isinstance(verdict, GiveUp):
            return None
        self._sink_retries += 1
        for failure in failures:
            self._tell(ChunkRetried(now, failure, attempts, verdict.delay_s))
        return verdict.delay_s

    def _refuse(self, chunks: Iterable[Chunk], error: BaseException, why: str, attempts: int = 1) -> None:
        self._do(self._machine.refuse(_failures(chunks, error), why, self._now(), attempts))

    def _acknowledge(self, item: Chunk | Batch) -> None:
        """Take what the consumer has come back after as done."""
        if self._answers is not None:
            over = self._answers.acknowledge(self._now())
            if self._record is not None:
                self._record.acknowledge(over)
            self._machine.holding = self._answers.nbytes > self._options.limits.nbytes
        if self._record is not None:
            if self._deliver and not self._shared and self._options.route is None:
                self._record.acknowledge(numbers_of([item] if isinstance(item, Chunk) else item))
            self._record.save_if_due()

    # -- what a shared run is told by its driver ------------------------------------------------------

    def hand_out(self, numbers: list[int]) -> None:
        """Say that chunks have reached their consumers: their credit returns."""
        self._machine.hand_out(numbers)

    def acknowledge(self, numbers: Iterable[int]) -> None:
        """Say that consumers are through with chunks, for the ledger."""
        if self._record is not None:
            self._record.acknowledge(numbers)

    def demand(self, items: int) -> None:
        """Say how many items have been asked for since the beginning; no more are read."""
        self._machine.demand = items

    def rest(self) -> None:
        """Say that nobody waits for an item."""
        if self._handed_at is None:
            self._handed_at = self._clock()

    @property
    def sinks(self) -> Mapping[Any, Callable[[Any], Any]]:
        """What `Call` steps are for: the sinks of a routed stream, by key."""
        return {} if self._options.route is None else self._options.route.sinks

    @property
    def stopped(self) -> bool:
        """Whether the run was asked to end."""
        return self._stopped

    @property
    def keeps_ledger(self) -> bool:
        """Whether it matters what is acknowledged."""
        return self._record is not None

    @property
    def restless(self) -> bool:
        """Whether the loop would do something if its wait ended now."""
        return self._machine.hungry or self._machine.done

    @property
    def done(self) -> bool:
        """Whether every planned chunk has reached its end."""
        return self._machine.done

    @property
    def running(self) -> int:
        """Batches out on the cluster."""
        return self._machine.running

    def _count_rest(self) -> None:
        if self._handed_at is not None:
            self._consumer_s += self._clock() - self._handed_at
            self._handed_at = None

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
                assert self._answers is not None
                self._answers.merge(instruction.partial)
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

    def _tell(self, notice: Notice) -> None:
        if self._record is not None:
            self._record.hear(notice)
        if self._windows is not None:
            self._count(notice)
        if isinstance(notice, ClusterChanged):
            self._say_if_empty(notice)
        for observer in list(self._observers):
            try:
                observer(notice)
            except Exception:
                logger.exception("the observer %r failed and hears no more of this run", observer)
                self._observers.remove(observer)

    def _count(self, notice: Notice) -> None:
        """Tell the windows what has become of their chunks."""
        windows = self._windows
        assert windows is not None
        if isinstance(notice, BatchSubmitted):
            if notice.batch.fresh:
                windows.sent(list(decode_numbers(notice.batch.ranges)))
        elif isinstance(notice, ChunksEmitted):
            windows.settled(notice.numbers, "folded")
        elif isinstance(notice, ChunksFiltered):
            windows.settled(notice.numbers, "filtered")
        elif isinstance(notice, ChunksSkipped):
            windows.settled(list(decode_numbers(notice.numbers)), "skipped")
        elif isinstance(notice, ChunkDeadLettered):
            windows.settled([notice.number], "dead")

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
        changed, self._machine.paused = self._machine.paused is not paused, paused
        if changed and not paused:
            self.executor.wake()

    @property
    def draining(self) -> bool:
        """Whether nothing more is submitted, for good."""
        return self._machine.draining

    def drain(self) -> None:
        """Submit nothing more; end when what is out was handed out."""
        self._machine.draining = True

    def tell_also(self, observer: Callback, maps: Iterable[ChunkMap] = ()) -> None:
        """Have one more observer hear of this run, which has not begun; of what is done already, its maps too."""
        self._observers.append(observer.handle)
        self._more_maps.extend(maps)

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
        self._count_rest()
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
        try:
            if self._options.sink is not None:
                self._options.sink.tidy()
        finally:
            if self._record is not None:
                self._record.close()


def _failures(chunks: Iterable[Chunk], error: BaseException) -> list[Failure]:
    """Return what a function on the client has done to chunks."""
    told = traceback.TracebackException.from_exception(error)
    kind, lines = type(error).__name__, "".join(list(told.format())[-12:])
    return [
        Failure(number, Category.FUNCTION, kind, str(told) or kind, error=error, traceback=lines)
        for number in numbers_of(chunks)
    ]
