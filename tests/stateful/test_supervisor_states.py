"""The supervisor under any history that hypothesis can think of, against a model that only counts."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from zarr_dask_stream.engine.batching import Batcher, BatchLimits, Cutter
from zarr_dask_stream.engine.events import (
    Batch,
    BatchDone,
    BatchHedged,
    BatchLost,
    BatchResult,
    BatchStats,
    Category,
    ChunkDeadLettered,
    ChunksCancelled,
    ChunksEmitted,
    ChunksFiltered,
    ChunksSkipped,
    Failure,
    Input,
    Notice,
    Threads,
    Tick,
)
from zarr_dask_stream.engine.instructions import Abort, Cancel, Instruction, Notify, Submit
from zarr_dask_stream.engine.retry import RetryPolicy
from zarr_dask_stream.engine.supervisor import Supervisor
from zarr_dask_stream.engine.throttle import RateLimit, Throttle
from zarr_dask_stream.engine.window import Window, WindowLimits
from zarr_dask_stream.source.grid import ChunkGrid
from zarr_dask_stream.source.hedging import Hedge
from zarr_dask_stream.source.selection import ChunkPlan, parse_region
from zarr_dask_stream.watch.report import Report

NBYTES = 10
GOOD, FILTERED, SKIPPED, UNATTEMPTED = "good", "filtered", "skipped", "unattempted"
FATAL = {Category.NOT_VISIBLE}
OUTCOMES: list[Any] = [GOOD, GOOD, GOOD, FILTERED, SKIPPED, UNATTEMPTED, *(c for c in Category if c not in FATAL)]


class SupervisorStates(RuleBasedStateMachine):
    """Feeds a `Supervisor` and keeps a plain account of its own beside it."""

    @initialize(
        chunks=st.integers(0, 120),
        window=st.none() | st.integers(1, 40),
        nbytes=st.sampled_from([1, 25, 200, 10**9]),
        ordered=st.booleans(),
        deliver=st.booleans(),
        limit=st.none() | st.integers(0, 60),
        refused=st.none() | st.integers(2, 5),
        attempts=st.integers(1, 4),
        budget=st.none() | st.integers(0, 3),
        largest=st.sampled_from([1, 3, 8192]),
        hedge=st.sampled_from([None, *[Hedge(quantile=0.5, factor=1.0, min_s=0.0, budget=1.0)] * 2]),
        rate=st.sampled_from([None, None, RateLimit(requests=5)]),
    )
    def begin(
        self,
        *,
        chunks: int,
        window: int | None,
        nbytes: int,
        ordered: bool,
        deliver: bool,
        limit: int | None,
        refused: int | None,
        attempts: int,
        budget: int | None,
        largest: int,
        hedge: Hedge | None,
        rate: RateLimit | None,
    ) -> None:
        grid = ChunkGrid((chunks,), (1,))
        where = None if refused is None else lambda index: index[0] % refused != 0
        self.plan = ChunkPlan(grid, parse_region(None, grid.shape), where)
        self.limits = WindowLimits(chunks=window, nbytes=nbytes)
        self.ordered, self.deliver, self.limit = ordered, deliver, limit
        self.machine = Supervisor(
            self.plan,
            Cutter(self.plan.runs()),
            Window(self.limits),
            Batcher(BatchLimits(chunks=largest)),
            RetryPolicy(attempts=attempts, budget=budget, breaker=None),
            chunk_nbytes=NBYTES,
            total=chunks if where is None else None,
            ordered=ordered,
            limit=limit,
            deliver=deliver,
            threads=1,
            throttle=Throttle(rate, NBYTES),
            hedge=hedge,
            rng=random.Random(0),
        )
        for _ in range(8):  # what is usual is known from the start, or hardly any history would come to a copy
            self.machine._copies.observe(elapsed_s=0.01, chunks=1)
        self.now = 0.0
        self.report = Report()
        self.out: dict[int, Batch] = {}
        self.pairs: list[tuple[int, int]] = []
        self.in_flight: set[int] = set()
        self.ends: Counter[int] = Counter()
        self.cancelled = 0
        self.taken: list[int] = []
        self.untold: set[int] = set()
        self.aborted = False
        self.finished = False
        self.feed(Threads(1, 1))

    # -- between model and machine ------------------------------------------------------------------

    def feed(self, event: Input) -> None:
        self.follow(self.machine.handle(event, self.now))

    def follow(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            assert not self.aborted, "an abort is the last instruction"
            if isinstance(instruction, Submit):
                for batch in instruction.batches:
                    numbers = [n for run in batch.ranges for n in run]
                    assert len(numbers) == len(set(numbers)) == batch.count
                    assert batch.nbytes == batch.count * NBYTES
                    assert batch.id not in self.out
                    assert not self.ends.keys() & set(numbers), "what has ended is not read again"
                    self.out[batch.id] = batch
                    self.in_flight.update(numbers)
            elif isinstance(instruction, Cancel):
                for batch_id in instruction.batches:
                    del self.out[batch_id]
            elif isinstance(instruction, Abort):
                self.aborted = True
            elif isinstance(instruction, Notify):
                self.hear(instruction.notice)

    def hear(self, notice: Notice) -> None:
        self.report.handle(notice)
        if isinstance(notice, (ChunksEmitted, ChunksFiltered)):
            self.settle(notice.numbers)
        elif isinstance(notice, ChunksSkipped):
            self.settle(n for run in notice.numbers for n in run)
        elif isinstance(notice, ChunkDeadLettered):
            self.settle([notice.number])
            assert notice.letter.index == (notice.number,)
        elif isinstance(notice, ChunksCancelled):
            self.cancelled += notice.count
        elif isinstance(notice, BatchHedged):
            assert notice.batch.id in self.out, "there is nothing to make a copy of"
            self.pairs.append((notice.batch.id, notice.copy.id))

    def settle(self, numbers: Any) -> None:
        numbers = list(numbers)
        self.ends.update(numbers)
        self.in_flight.difference_update(numbers)
        self.untold.difference_update(numbers)

    def answer(self, batch: Batch, outcomes: list[Any]) -> BatchDone:
        """Make a result with these outcomes, over and over, for the chunks of a batch."""
        result = BatchResult(stats=BatchStats(wall_s=0.001, bytes_result=8))
        numbers = (n for run in batch.ranges for n in run)
        for number, outcome in zip(numbers, itertools.cycle(outcomes), strict=False):
            if outcome is GOOD:
                result.numbers.append(number)
            elif outcome is FILTERED:
                result.filtered.append(number)
            elif outcome is SKIPPED:
                result.skipped.append(number)
            elif outcome is UNATTEMPTED:
                result.unattempted.append(number)
            else:
                result.failures.append(Failure(number, outcome, "OSError", "scripted"))
        result.values = [-n for n in result.numbers]
        return BatchDone(batch.id, result)

    def pick(self, which: int) -> Batch:
        keys = list(self.out)
        return self.out.pop(keys[which % len(keys)])

    def copied(self) -> int:
        """Count the chunks of which two copies are out."""
        return sum(self.out[one].count for one, other in self.pairs if one in self.out and other in self.out)

    @property
    def alive(self) -> bool:
        return not (self.finished or self.aborted)

    # -- what may happen ----------------------------------------------------------------------------

    @precondition(lambda self: self.alive and self.out)
    @rule(which=st.integers(0, 100), outcomes=st.lists(st.sampled_from(OUTCOMES), min_size=1, max_size=8))
    def a_batch_comes_back(self, which: int, outcomes: list[Any]) -> None:
        self.feed(self.answer(self.pick(which), outcomes))

    @precondition(lambda self: self.alive and self.out)
    @rule(most=st.integers(2, 12))
    def all_goes_well_for_a_while(self, most: int) -> None:
        for _ in range(most):
            if self.out:
                self.feed(self.answer(self.pick(0), [GOOD]))

    @precondition(lambda self: self.alive and self.out)
    @rule(which=st.integers(0, 100), deaths=st.sampled_from([0, 1]))
    def a_batch_is_lost(self, which: int, deaths: int) -> None:
        self.feed(BatchLost(self.pick(which).id, "scripted", None, deaths))

    @precondition(lambda self: self.alive)
    @rule(seconds=st.sampled_from([0.0, 0.01, 1.0, 100.0]))
    def time_goes_by(self, seconds: float) -> None:
        self.now += seconds
        self.feed(Tick())

    @precondition(lambda self: self.alive and self.out and self.machine._copies.on)
    @rule()
    def all_that_is_out_is_late(self) -> None:
        self.now += 10.0
        self.feed(Tick())

    @precondition(lambda self: self.alive)
    @rule(most=st.integers(1, 30), ask=st.booleans())
    def the_consumer_takes(self, most: int, ask: bool) -> None:
        for _ in range(most):
            if not self.take():
                break
        if ask and self.machine.hungry:
            self.feed(Tick())

    def take(self) -> bool:
        item = self.machine.take()
        if item is None:
            return False
        assert item.value == -item.number
        assert item.number in self.in_flight - self.untold
        self.untold.add(item.number)
        self.taken.append(item.number)
        return True

    @precondition(lambda self: self.alive)
    @rule(threads=st.integers(0, 6))
    def the_cluster_changes(self, threads: int) -> None:
        self.feed(Threads(threads, min(threads, 2)))

    @precondition(lambda self: self.alive)
    @rule(paused=st.booleans())
    def somebody_pauses(self, paused: bool) -> None:
        self.machine.paused = paused

    @precondition(lambda self: self.alive)
    @rule(batch=st.integers(10**6, 10**7))
    def an_answer_that_nobody_asked_for(self, batch: int) -> None:
        ended = set(self.ends) | self.untold
        self.feed(BatchLost(batch, "late"))
        assert set(self.ends) == ended

    @precondition(lambda self: self.alive and self.out)
    @rule(which=st.integers(0, 100), outcomes=st.lists(st.sampled_from([*OUTCOMES, *FATAL]), max_size=5))
    def a_worker_is_blind(self, which: int, outcomes: list[Any]) -> None:
        self.feed(self.answer(self.pick(which), [Category.NOT_VISIBLE, *outcomes]))
        assert self.aborted

    @precondition(lambda self: not self.finished)
    @rule()
    def the_run_ends_early(self) -> None:
        self.end("stopped early")

    @precondition(lambda self: self.finished)
    @rule()
    def nothing_moves_after_the_end(self) -> None:
        self.now += 1.0
        assert self.machine.handle(Tick(), self.now) == []
        assert self.machine.take() is None

    # -- what must hold -----------------------------------------------------------------------------

    @invariant()
    def its_own_invariants(self) -> None:
        if hasattr(self, "machine"):
            self.machine.check()

    @invariant()
    def limits_and_sums(self) -> None:
        if not hasattr(self, "machine") or self.finished:
            return
        flying = len(self.in_flight - self.untold) + self.copied()
        assert self.machine.in_flight == flying
        assert self.limits.chunks is None or flying <= self.limits.chunks
        assert flying * NBYTES <= self.limits.nbytes or flying == 1
        assert max(self.ends.values(), default=1) == 1, "one terminal notice for each chunk"
        assert self.machine.running == len(self.out)
        self.agree(untold=len(self.untold))
        if self.limit is not None:
            assert len(self.taken) <= self.limit
            assert self.machine.counts.emitted <= self.limit

    def agree(self, untold: int) -> None:
        counts, report = self.machine.counts, self.report
        assert counts.emitted == report.emitted + untold
        assert (counts.filtered, counts.skipped) == (report.filtered, report.skipped_missing)
        assert counts.dead == report.dead_lettered == len(report.dead_letters)

    @invariant()
    def order(self) -> None:
        if hasattr(self, "machine") and self.ordered:
            assert self.taken == sorted(self.taken)

    def moving(self) -> bool:
        return bool(self.out) or self.machine.done or self.machine.next_timer() is not None

    def teardown(self) -> None:
        """From wherever it got to, a run whose reads succeed from now on comes to its end."""
        if not hasattr(self, "machine") or self.finished:
            return
        if self.aborted:
            self.end("failed")
            return
        self.machine.paused = False
        self.feed(Threads(2, 1))
        for _ in range(20_000):
            while self.take():
                pass
            if self.machine.done:
                break
            if self.out:
                self.feed(self.answer(self.pick(0), [GOOD]))
                continue
            due = self.machine.next_timer()
            if due is not None:
                self.now = max(self.now, due)
            self.feed(Tick())
            assert due is not None or self.moving(), "it is stuck"
        assert self.machine.done, "it goes on for ever"
        self.machine.check()
        wanted = list(self.plan)
        if self.limit is None and not self.cancelled:
            assert not self.in_flight - self.untold
            told = set(self.ends) | self.untold
            assert told == set(wanted)
            if self.deliver and self.ordered:
                lost = told - set(self.taken)
                assert self.taken == [n for n in wanted if n not in lost]
        self.end("done")

    def end(self, outcome: str) -> None:
        self.aborted = False
        self.follow(self.machine.finish(outcome, self.now))
        self.finished = True
        assert not self.out, "all that runs is called back"
        self.agree(untold=0)
        counts = self.machine.counts
        assert counts.cancelled == self.cancelled == self.report.cancelled
        assert counts.settled == self.report.total == self.report.settled == len(self.plan)
        assert self.machine.take() is None
        assert self.machine.handle(Tick(), self.now) == []
        assert self.machine.finish(outcome, self.now) == []


SupervisorStates.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestSupervisor = SupervisorStates.TestCase
