"""One run of a stream: here is the only loop and the only clock.

The loop asks the `Supervisor` what to do, has an `Executor` do it, and hands out what comes back. It is a
generator that never waits itself: where it needs inputs it yields a `Wait`, and its driver, blocking or
asynchronous, sends them in.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from zarr_dask_stream.engine.batching import Batcher, BatchLimits, Cutter
from zarr_dask_stream.engine.checkpoint import Ledger, encode_value, fingerprint, identity
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
    choose_executor,
)
from zarr_dask_stream.engine.instructions import Abort, Cancel, Instruction, Notify, Restart, Submit
from zarr_dask_stream.engine.instructions import Fold as FoldIn
from zarr_dask_stream.engine.supervisor import Supervisor
from zarr_dask_stream.engine.task import Work
from zarr_dask_stream.engine.throttle import RateLimit, Throttle
from zarr_dask_stream.engine.window import Window
from zarr_dask_stream.errors import ChunkError, StoreError, UsageError
from zarr_dask_stream.options import Options
from zarr_dask_stream.source.assemble import stored_blocks
from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.source.reader import stored_numbers
from zarr_dask_stream.source.selection import Sieve
from zarr_dask_stream.stages.combine import Fold, Partials, Ungrouped, merge_partials
from zarr_dask_stream.watch.progress import progress_observer
from zarr_dask_stream.watch.report import Report

__all__ = ["Run", "Wait"]

logger = logging.getLogger("zarr_dask_stream")

_LOCAL_KINDS = ("local", "zip", "memory")
_LOCAL_TASK_S = 0.25
_REMOTE_TASK_S = 1.0
_IDLE_S = 1.0  # the loop looks up at least so often, to see whether it was told to stop


@dataclass(frozen=True, slots=True)
class Wait:
    """What the loop asks its driver for: inputs, within so many seconds."""

    seconds: float


class Run:
    """One run of a stream: its machine, its executor, its observers, its clock.

    A `shared` run has several consumers: its driver says when an item has reached one, and when one is through
    with it. Nothing of it may be called by two threads at once.
    """

    def __init__(self, options: Options, work: Work, *, deliver: bool, shared: bool = False) -> None:
        o = options
        if o.fold is not None and isinstance(o.fold.reducer, Ungrouped):
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
        self._shared = shared
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
            Cutter(runs, together=o.together),
            Window(o.limits),
            # On a remote store the first and the last requests of a task are not overlapped: longer tasks.
            Batcher(BatchLimits(target_s=_LOCAL_TASK_S if o.spec.store.kind in _LOCAL_KINDS else _REMOTE_TASK_S)),
            o.retry,
            chunk_nbytes=o.item_nbytes,
            total=total,
            ordered=o.ordered,
            limit=o.limit,
            deliver=self._deliver,
            depth=1 if isinstance(self.executor, SerialExecutor) else None,
            throttle=Throttle(o.rate_limit, o.item_nbytes),
            hedge=o.hedge,
            rng=random.Random(os.urandom(8)),  # noqa: S311  # jitter must differ from client to client
        )

    def _now(self) -> float:
        return time.monotonic() - self._began

    # -- the loop -----------------------------------------------------------------------------------

    def steps(self, threads: Threads) -> Generator[Chunk | Wait, list[Input] | None, None]:
        """Hand out what is ready, else ask for inputs and let the machine judge them: the only loop."""
        machine, plan = self._machine, self._options.plan
        spec = self._options.spec
        resumed = 0 if self._ledger is None else len(self._ledger.done)
        grid_shape, nbytes = plan.grid.grid_shape, self._options.item_nbytes
        self._tell(RunStarted(0.0, self._total, nbytes, grid_shape, spec.store.url, resumed))
        self._do(machine.handle(threads, self._now()))
        while not self._stopped:
            item = machine.take(hold=self._shared)
            if item is not None:
                self._handed_at = time.monotonic()
                yield Chunk.planned(plan, item.number, item.value, item.missing)
                self._count_rest()
                if self._ledger is not None:
                    if not self._shared:
                        self._acknowledged.append(item.number)  # the consumer came back for more
                    self._save_if_due(self._ledger)
                if machine.hungry:
                    self._do(machine.handle(Tick(), self._now()))
            elif machine.done:
                break
            else:
                inputs = (yield Wait(self._patience())) or ()
                self._count_rest()
                for event in inputs:
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

    # -- what a shared run is told by its driver ------------------------------------------------------

    def hand_out(self, numbers: list[int]) -> None:
        """Say that chunks have reached their consumers: their credit returns."""
        self._machine.hand_out(numbers)

    def acknowledge(self, numbers: Iterable[int]) -> None:
        """Say that consumers are through with chunks, for the ledger."""
        if self._ledger is not None:
            self._acknowledged.extend(numbers)

    def demand(self, items: int) -> None:
        """Say how many items have been asked for since the beginning; no more are read."""
        self._machine.demand = items

    def rest(self) -> None:
        """Say that nobody waits for an item."""
        if self._handed_at is None:
            self._handed_at = time.monotonic()

    @property
    def stopped(self) -> bool:
        """Whether the run was asked to end."""
        return self._stopped

    @property
    def keeps_ledger(self) -> bool:
        """Whether it matters what is acknowledged."""
        return self._ledger is not None

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
            self._consumer_s += time.monotonic() - self._handed_at
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
        self._close_ledger()


def _stored_only(options: Options, runs: Iterable[range]) -> Iterable[range]:
    """Leave out what a listing of the store shows to be absent; where it can't be listed, ask chunk by chunk."""
    try:
        if options.blocks is not None:
            numbers = stored_blocks(options.blocks)
        else:
            numbers = np.fromiter(stored_numbers(options.spec, options.plan.box), np.int64)
    except (StoreError, OSError) as error:
        logger.info("the store can't be listed, absent chunks are asked for one by one: %s", error)
        return runs
    return Sieve(runs, numbers)


def _ledger_of(options: Options) -> Ledger:
    """Return the ledger of a stream, with all that makes it this stream and no other."""
    o, spec = options, options.spec
    assert o.checkpoint is not None
    about = {
        "array": spec.store.url,
        "path": spec.path,
        "shape": list(spec.shape),
        "chunks": list(o.plan.grid.chunks),
        "region": [[s.start, s.stop] for s in o.plan.box],
        "missing": o.missing,
        "stages": [type(stage).__name__.lower() for stage in o.stages],
        "where": o.plan.where is not None,
        "reduce": None if o.fold is None else type(o.fold.reducer).__name__,
    }
    parts = {
        "about": about,
        "metadata": spec.fingerprint if o.blocks is None else o.blocks.fingerprints,
        **({} if not o.plan.variant else {"variant": list(o.plan.variant)}),
        **({} if o.plan.halo is None else {"halo": [list(o.plan.halo.depth), list(o.plan.halo.boundary)]}),
        "where": identity(o.plan.where),
        "stages": identity(o.stages),
        "fold": identity(o.fold),
    }
    return Ledger(o.checkpoint, o.plan, fingerprint(parts), about)
