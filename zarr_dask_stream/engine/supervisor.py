"""The machine that decides: inputs in, instructions out. No clock, no wait, no Dask.

The loop in ``run.py`` feeds `Supervisor.handle` with what happened and the time, and carries out
what comes back. Each planned chunk walks one road::

    planned --cut--> running --done--> emitted | filtered | skipped
                        |
                        +--failed--> waiting (backoff) --due--> running
                        |                 ...until the policy gives up--> dead letter
                        +--worker lost--> suspect: again, then in pieces, until the one that kills is alone
    anything not settled when the run ends: cancelled

Invariants, held at every step (`check` asserts them, and the tests call it after each input):

- chunks and bytes in flight never pass the window's limits, but for one oversized chunk alone;
- in flight = running + waiting + in the outbox, where a second copy of a batch counts like the first;
- planned = emitted + filtered + skipped + dead-lettered + in flight without copies + not cut yet.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from zarr_dask_stream.engine.batching import Batcher, Cutter
from zarr_dask_stream.engine.copies import Copies, Running
from zarr_dask_stream.engine.events import (
    Batch,
    BatchDone,
    BatchFinished,
    BatchHedged,
    BatchLost,
    BatchResult,
    BatchSubmitted,
    Category,
    ChunkDeadLettered,
    ChunkRetried,
    ChunksCancelled,
    ChunksEmitted,
    ChunksFiltered,
    ChunksSkipped,
    ClusterChanged,
    DeadLetter,
    Failure,
    Input,
    RunFinished,
    Threads,
)
from zarr_dask_stream.engine.health import Health
from zarr_dask_stream.engine.instructions import Abort, Cancel, Fold, Instruction, Notify, Submit
from zarr_dask_stream.engine.quarantine import Bury, Quarantine, Retry, Sentence
from zarr_dask_stream.engine.queueing import Queue
from zarr_dask_stream.engine.retry import Breaker, GiveUp, RetryPolicy
from zarr_dask_stream.engine.throttle import Throttle
from zarr_dask_stream.engine.waiting import Again, WaitingRoom
from zarr_dask_stream.engine.window import Item, Outbox, Window
from zarr_dask_stream.errors import StoreNotVisibleError, ZdsError
from zarr_dask_stream.source.hedging import Hedge
from zarr_dask_stream.source.selection import ChunkPlan, encode_numbers

__all__ = ["Counts", "Supervisor"]

_BREATH_S = 0.005  # a long search leaves so much time for what comes in: the loop of a client shares our processor


@dataclass(slots=True)
class Counts:
    """How many planned chunks have reached each end."""

    emitted: int = 0
    filtered: int = 0
    skipped: int = 0
    dead: int = 0
    cancelled: int = 0

    @property
    def settled(self) -> int:
        """Chunks that have reached one."""
        return self.emitted + self.filtered + self.skipped + self.dead + self.cancelled


class Supervisor:
    """Decides what to submit, to retry, to give up and to hand out.

    Parameters
    ----------
    plan : ChunkPlan
        Where the chunks are.
    cutter : Cutter
        The planned numbers, in the order of submission.
    window : Window
        Credit; see its rules.
    batcher : Batcher
        Size of batches.
    policy : RetryPolicy
        Judge of failures.
    chunk_nbytes : int
        Decoded bytes of one chunk: what each costs the window.
    total : int or None
        Planned chunks, or None until a `where` predicate has been walked.
    ordered : bool
        Hand out in the order of submission.
    limit : int or None
        Hand out so many items and stop.
    deliver : bool
        False where nobody takes items (a run for its effects): done is taken.
    depth : int or None
        Most batches submitted and not finished; None: two for each thread and one more.
    threads : int
        Task threads, until an input says otherwise.
    throttle : Throttle, optional
        Bound on the rate of requests; none by default.
    hedge : Hedge, optional
        When to start a second copy of a straggling batch; never by default.
    rng : random.Random
        Source of the jitter.

    Attributes
    ----------
    paused : bool
        Submit nothing until it is False again.
    draining : bool
        Submit nothing more at all: the run is done when what is out has come back and was taken.
    holding : bool
        Submit nothing new while something is in flight; what failed is still tried again.
    demand : int or None
        Items asked for since the beginning: no chunk is submitted beyond them. None: whatever the window holds.
    """

    def __init__(
        self,
        plan: ChunkPlan,
        cutter: Cutter,
        window: Window,
        batcher: Batcher,
        policy: RetryPolicy,
        *,
        chunk_nbytes: int,
        total: int | None = None,
        ordered: bool = True,
        limit: int | None = None,
        deliver: bool = True,
        depth: int | None = None,
        threads: int = 1,
        throttle: Throttle | None = None,
        hedge: Hedge | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._plan = plan
        self._cutter = cutter
        self.window = window
        self._batcher = batcher
        self._policy = policy
        self._chunk_nbytes = chunk_nbytes
        self._total = total
        self._limit = limit
        self._deliver = deliver
        self._depth = depth
        self._rng = rng or random.Random(0)  # noqa: S311  # jitter is not a secret
        self._threads = threads
        self._queue = Queue(threads)
        self.throttle = throttle or Throttle(None, chunk_nbytes)
        self._health = Health(Breaker(policy.breaker), self.throttle)
        self._copies = Copies(hedge)
        self._copied = 0  # chunks in flight that are a second copy
        self._quarantine = Quarantine(policy, self._rng, plan.grid.index)
        self.paused = False
        self.draining = False
        self.holding = False
        self.demand: int | None = None
        self._held = 0  # items taken by somebody who has not handed them out yet
        self._stowed = 0  # of these, items whose credit has returned
        self._held_until: float | None = None
        self._outbox = Outbox(ordered=ordered)
        self._running: dict[int, Running] = {}
        self._waiting = WaitingRoom()
        self._serial = 0
        self._submitted = 0
        self._retries = 0
        self._want = 1
        self._search_at = math.inf  # when to go on looking for chunks that a predicate wants
        self._taken: list[int] = []
        self._finished = False
        self._abort: ZdsError | None = None
        self.counts = Counts()

    # -- what the loop asks -------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether every planned chunk has reached its end, or enough have been handed out."""
        if self._limit is not None and self.counts.emitted >= self._limit:
            return True
        if self.draining:
            return not (self._running or self._outbox.ready or self._held)
        left = self._running or self._waiting or len(self._outbox) or self._held
        return not left and self._cutter.exhausted

    def done_but_for(self, gathered: int) -> bool:
        """Whether all that is left are so many items that were taken with `hold`."""
        if self._limit is not None and self.counts.emitted + gathered >= self._limit:
            return True
        if self._held > gathered or self._running:
            return False
        if self.draining:
            return not self._outbox.ready
        return not (self._waiting or len(self._outbox)) and self._cutter.exhausted

    @property
    def hungry(self) -> bool:
        """Whether the consumer has made enough room for another batch, and wants more."""
        unmet = self._unmet
        want = self._want if unmet is None else min(self._want, unmet)
        return (
            want > 0
            and len(self._running) < self._most_running
            and self._held_until is None
            and not (self.paused or self.draining or (self.holding and self.window.chunks))
            and self.window.room(self._chunk_nbytes) >= want + self._spare(want)
            and not self._cutter.exhausted
        )

    def next_timer(self) -> float | None:
        """Time of the next thing to do without an input, or None."""
        if self.paused or self.draining:
            return None
        due = min(self._waiting.next_due, self._search_at)
        if self._held_until is not None:
            due = self._held_until
        if self._copies.on and self._running:
            due = min(due, self._copies.look_at)
        return None if math.isinf(due) else due

    def take(self, *, hold: bool = False) -> Item | None:
        """Hand the next item out, if one may leave; its credit returns.

        With `hold` it stays in flight until `hand_out` says that a consumer has it.
        """
        if self._finished or (self._limit is not None and self.counts.emitted + self._held >= self._limit):
            return None
        item = self._outbox.pop()
        if item is not None:
            if hold or self._stowed:
                self._held += 1
                if not hold:
                    self.hand_out((item.number,))
            else:  # the same for one, at the cost of no call
                self._taken.append(item.number)
                self.counts.emitted += 1
                self.window.release(1, self._chunk_nbytes)
        return item

    def hand_out(self, numbers: Sequence[int]) -> None:
        """Say that items taken with `hold` have reached a consumer; their credit returns."""
        self._held -= len(numbers)
        if self._finished:
            return  # accounted for as cancelled
        self._taken.extend(numbers)
        self.counts.emitted += len(numbers)
        self._release_held(len(numbers))

    def stow(self, count: int) -> None:
        """Say that items taken with `hold` lie where other bounds hold: their credit returns before they do."""
        self._stowed += count
        self.window.release(count, count * self._chunk_nbytes)

    def refuse(self, failures: Sequence[Failure], why: str, now: float, attempts: int = 1) -> list[Instruction]:
        """Give up items taken with `hold`: who was to have them does not take them."""
        self._held -= len(failures)
        if self._finished:
            return []
        self.counts.dead += len(failures)
        self._release_held(len(failures))
        return [self._letter(failure, why, attempts, now) for failure in failures]

    def _release_held(self, count: int) -> None:
        stowed = min(count, self._stowed)
        self._stowed -= stowed
        self.window.release(count - stowed, (count - stowed) * self._chunk_nbytes)

    @property
    def frontier(self) -> int | None:
        """The chunk that goes out next: all that the plan has before it went out. None: all did."""
        return self._cutter.head

    @property
    def in_flight(self) -> int:
        """Chunks submitted and not taken yet; one of which there are two copies counts twice."""
        return self.window.chunks

    @property
    def running(self) -> int:
        """Batches out on the cluster."""
        return len(self._running)

    # -- the machine --------------------------------------------------------------------------------

    def handle(self, event: Input, now: float) -> list[Instruction]:
        """Take one input at time `now` and say what to do."""
        if self._finished:
            return []
        out: list[Instruction] = []
        self._flush_taken(now, out)
        if isinstance(event, BatchDone):
            self._batch_done(event, now, out)
        elif isinstance(event, BatchLost):
            self._batch_lost(event, now, out)
        elif isinstance(event, Threads):
            self._threads = max(event.threads, 1)
            self._queue.resized(self._threads, now)
            out.append(Notify(ClusterChanged(now, event.workers, event.threads, event.waiting_s)))
        self._held_until = None
        self._abort = self._abort or self._health.diagnosis(now)
        if self._abort is not None:
            # The last instruction: what happened before it is told, and nothing is submitted any more.
            out.append(Abort(self._abort))
        elif not (self.paused or self.draining):
            self._submit_due(now, out)
            self._submit_new(now, out)
            self._submit_copies(now, out)
        return out

    def finish(self, outcome: str, now: float, *, consumer_s: float = 0.0, error: str = "") -> list[Instruction]:
        """End the run: call back what is out, and account for what was never handed out."""
        if self._finished:
            return []
        self._finished = True
        out: list[Instruction] = []
        self._flush_taken(now, out)
        if self._running:
            out.append(Cancel(tuple(self._running)))
        for batch in list(self._running):
            self._drop_twin(batch, now)
        self._flush_absent(now, out)  # found on the way here
        self.counts.cancelled = left = self._left()
        if left:
            out.append(Notify(ChunksCancelled(now, left)))
        out.append(
            Notify(
                RunFinished(
                    now, outcome, self.counts.settled, consumer_s,
                    self.window.peak_chunks, self.window.peak_bytes, error,
                )
            )
        )  # fmt: skip
        self._running.clear()
        self._waiting.clear()
        return out

    def _left(self) -> int:
        """Count what was planned and never given out."""
        if self._total is not None:
            return self._total - self.counts.settled  # a plan of 10^9 chunks is not walked to its end for this
        return self.window.chunks + self._stowed + self._cutter.rest() + self._cutter.take_absent()

    def check(self) -> None:
        """Assert the invariants."""
        running = sum(r.batch.count for r in self._running.values())
        waiting = self._waiting.chunks
        limits = self.window.limits
        if not self._finished:
            # Dropped chunks may sit in the reorder buffer as place holders without credit.
            assert 0 <= self._stowed <= self._held
            least = running + waiting + self._held - self._stowed
            assert least <= self.window.chunks <= least + len(self._outbox)
            assert self.window.nbytes == self.window.chunks * self._chunk_nbytes
        if self.window.chunks > 1:
            assert self.window.nbytes <= limits.nbytes
        if limits.chunks is not None:
            assert self.window.chunks <= limits.chunks
        if self._total is not None:
            in_flight = 0 if self._finished else self.window.chunks - self._copied + self._stowed
            assert self.counts.settled + in_flight <= self._total

    # -- outcomes -----------------------------------------------------------------------------------

    def _batch_done(self, event: BatchDone, now: float, out: list[Instruction]) -> None:
        running = self._running.pop(event.batch, None)
        if running is None:
            return  # called back earlier: its chunks have gone another way
        twin = self._drop_twin(event.batch, now)
        if twin is not None:
            out.append(Cancel((twin,)))
        result = event.result
        elapsed = now - running.since
        filled = tuple(result.missing)
        idle_s = max(elapsed - result.stats.wall_s - event.transfer_s, 0.0)
        queued_s = min(self._queue.ended(event.batch, now), idle_s)
        out.append(
            Notify(
                BatchFinished(
                    now, running.batch, result.stats, elapsed, event.transfer_s, filled=filled, queued_s=queued_s
                )
            )
        )
        attempted = running.batch.count - len(result.unattempted)
        self._batcher.observe(attempted, result.stats)
        self.throttle.settle(attempted, result.stats.bytes_stored, now)
        self._copies.observe(elapsed_s=elapsed, chunks=running.batch.count)
        if result.partial is not None:
            out.append(Fold(result.partial))
        self._settle_values(result, now, out)
        if result.filtered:
            self.counts.filtered += len(result.filtered)
            self._drop(result.filtered)
            out.append(Notify(ChunksFiltered(now, tuple(result.filtered))))
        if result.skipped:
            self.counts.skipped += len(result.skipped)
            self._drop(result.skipped)
            out.append(Notify(ChunksSkipped(now, encode_numbers(result.skipped), len(result.skipped))))
        out.extend(self._health.hear(result, now))
        for failure in result.failures:
            self._chunk_failed(failure, now, out)
        for number in result.apart:
            self._waiting.add(Again((number,), now, alone=True))
        if attempted:
            self._waiting.add(Again(tuple(result.unattempted), now))
        else:
            self._obey(
                self._quarantine.returned(running.batch, "the worker tried none of its chunks", None, now), now, out
            )

    def _settle_values(self, result: BatchResult, now: float, out: list[Instruction]) -> None:
        if not result.numbers:
            return
        if self._quarantine:
            for number in result.numbers:
                self._quarantine.forget(number)
        if self._deliver and result.partial is None:
            missing = result.missing
            self._outbox.extend(
                Item(number, value, number in missing)
                for number, value in zip(result.numbers, result.values, strict=True)
            )
            return
        self.counts.emitted += len(result.numbers)
        self._drop(result.numbers)
        out.append(Notify(ChunksEmitted(now, tuple(result.numbers))))

    def _chunk_failed(self, failure: Failure, now: float, out: list[Instruction]) -> None:
        if failure.category is Category.NOT_VISIBLE:
            known = failure.error if isinstance(failure.error, ZdsError) else None
            self._abort = self._abort or known or StoreNotVisibleError(failure.message)
            self._waiting.add(Again((failure.number,), now))
            return
        attempts, elapsed = self._quarantine.failed(failure.number, now)
        verdict = self._policy.decide(failure, attempts, elapsed, self._rng, self._retries)
        if isinstance(verdict, GiveUp):
            self._bury(failure, verdict.why, now, out)
            return
        self._retries += 1
        out.append(Notify(ChunkRetried(now, failure, attempts, verdict.delay_s)))
        alone = failure.category is Category.TIMEOUT
        self._waiting.add(Again((failure.number,), now + verdict.delay_s, alone=alone))

    def _bury(self, failure: Failure, why: str, now: float, out: list[Instruction]) -> None:
        attempts = self._quarantine.forget(failure.number)
        self.counts.dead += 1
        self._drop([failure.number])
        out.append(self._letter(failure, why, attempts, now))

    def _letter(self, failure: Failure, why: str, attempts: int, now: float) -> Instruction:
        number, plan = failure.number, self._plan
        letter = DeadLetter.of(failure, plan.grid.index(number), plan.region(number), attempts, why)
        return Notify(ChunkDeadLettered(now, number, letter))

    def _batch_lost(self, event: BatchLost, now: float, out: list[Instruction]) -> None:
        running = self._running.pop(event.batch, None)
        if running is None:
            return
        self._queue.ended(event.batch, now)
        if self._part_from_twin(running.batch):
            return  # its other copy goes on
        out.append(Notify(BatchFinished(now, running.batch, None, now - running.since, 0.0, lost=event.reason)))
        self._obey(self._quarantine.lost(running.batch, event, now), now, out)

    def _obey(self, sentences: list[Sentence], now: float, out: list[Instruction]) -> None:
        """Do with chunks of which nothing came back what the quarantine says."""
        for sentence in sentences:
            if isinstance(sentence, Again):
                self._waiting.add(sentence)
            elif isinstance(sentence, Retry):
                self._retries += 1
                out.append(Notify(ChunkRetried(now, sentence.failure, sentence.attempt, 0.0)))
            elif isinstance(sentence, Bury):
                self._bury(sentence.failure, sentence.why, now, out)
            else:
                self._abort = self._abort or sentence.error

    # -- stragglers -----------------------------------------------------------------------------------

    def _submit_copies(self, now: float, out: list[Instruction]) -> None:
        batches: list[Batch] = []
        for batch in self._copies.late(self._running.values(), now):
            # Without credit it stays late, and is looked at again.
            if self.window.room(self._chunk_nbytes) < batch.count or not self._copies.afford(batch):
                continue
            self._serial += 1
            copy = dataclasses.replace(batch, id=self._serial, fresh=False)
            self._copies.pair(batch.id, copy.id)
            self._running[copy.id] = Running(copy, now)
            self._queue.submitted(copy.id, now)
            self._copied += copy.count
            self.window.reserve(copy.count, copy.nbytes)
            batches.append(copy)
            out.append(Notify(BatchHedged(now, batch, copy)))
        self._announce(batches, now, out)

    def _spare(self, size: int) -> int:
        """Chunks to leave room for beside a new batch: a copy of one of its size.

        Where a straggler holds back the order, and with it the whole window, there has to be credit left to
        start it a second time.
        """
        return size if self._copies.on and self._running and not self._copies.out else 0

    def _part_from_twin(self, batch: Batch) -> bool:
        """Return whether another copy of a batch that is not out any more still is; the credit of one returns."""
        if self._copies.part(batch.id) is None:
            return False
        self._release_copy(batch)
        return True

    def _drop_twin(self, batch: int, now: float) -> int | None:
        """Forget the other copy of a batch, and return its number; its credit returns."""
        twin = self._copies.part(batch)
        if twin is not None:
            self._release_copy(self._running.pop(twin).batch)
            self._queue.ended(twin, now)
        return twin

    def _release_copy(self, batch: Batch) -> None:
        self._copied -= batch.count
        self.window.release(batch.count, batch.nbytes)

    # -- submission ---------------------------------------------------------------------------------

    @property
    def _most_running(self) -> int:
        return self._depth if self._depth is not None else 2 * self._threads + 1

    def _submit_new(self, now: float, out: list[Instruction]) -> None:
        batches: list[Batch] = []
        self._search_at = math.inf
        while len(self._running) < self._most_running and not self._cutter.exhausted:
            if self._cutter.searching:
                self._search_at = now + _BREATH_S
                break
            if self.holding and self.window.chunks:
                break
            size = self._next_size()
            if size < 1 or self.window.room(self._chunk_nbytes) < size + self._spare(size):
                break
            size = min(size, self._allowance(now))
            if size < 1:
                break
            ranges = self._cutter.cut(size)
            self._submitted += sum(len(run) for run in ranges)
            self._outbox.expect(ranges)
            batches.append(self._start(ranges, now, credit=True))
        self._announce(batches, now, out)
        self._flush_absent(now, out)

    def _allowance(self, now: float) -> int:
        """Return how many requests may go out now; where none may, note when to look again."""
        if self.throttle.idle:
            return 2**62
        room = self.throttle.room(now)
        if room < 1:
            self._held_until = now + self.throttle.wait()
        return room

    @property
    def _unmet(self) -> int | None:
        """Items that may still be submitted, by what was asked for and by the limit; None for no bound."""
        if self._limit is None and self.demand is None:
            return None
        bound = min(bound for bound in (self._limit, self.demand) if bound is not None)
        return bound - self.counts.emitted - self.window.chunks - self._stowed + self._copied

    def _next_size(self) -> int:
        remaining = None if self._total is None else self._total - self._submitted
        unmet = self._unmet
        if self.demand is not None and unmet is not None:  # what is asked for is shared out like the rest of a plan
            remaining = unmet if remaining is None else min(remaining, unmet)
        capacity = self.window.limits.capacity(self._chunk_nbytes)
        if self._copies.on:
            capacity -= capacity // (2 * self._threads + 2)  # the room for a copy: see `_spare`
        size = self._batcher.size(
            capacity=capacity,
            remaining=remaining,
            threads=self._threads,
        )
        size = self._cutter.fit(size, capacity)
        if unmet is not None:
            size = min(size, unmet)
        self._want = max(size, 1)
        return size

    def _submit_due(self, now: float, out: list[Instruction]) -> None:
        batches = [
            self._start(encode_numbers(again.numbers), now, suspect=again.suspect)
            for again in self._waiting.take_due(now, lambda: self._allowance(now) >= 1)
        ]
        self._announce(batches, now, out)

    def _start(self, ranges: tuple[range, ...], now: float, *, credit: bool = False, suspect: bool = False) -> Batch:
        count = sum(len(run) for run in ranges)
        nbytes = count * self._chunk_nbytes
        self._serial += 1
        attempt = self._quarantine.attempts(ranges[0][0]) + 1
        batch = Batch(self._serial, ranges, count, nbytes, attempt, suspect, fresh=credit)
        if credit:
            self.window.reserve(count, nbytes)
        self.throttle.spend(count)
        self._running[batch.id] = Running(batch, now)
        self._queue.submitted(batch.id, now)
        self._copies.started(count)
        return batch

    def _announce(self, batches: list[Batch], now: float, out: list[Instruction]) -> None:
        if batches:
            out.append(Submit(tuple(batches)))
            chunks, nbytes = self.window.chunks, self.window.nbytes
            out.extend(Notify(BatchSubmitted(now, batch, chunks, nbytes)) for batch in batches)

    def _drop(self, numbers: Iterable[int]) -> None:
        count = 0
        for number in numbers:
            self._outbox.drop(number)
            self._quarantine.forget(number)
            count += 1
        self.window.release(count, count * self._chunk_nbytes)

    def _flush_absent(self, now: float, out: list[Instruction]) -> None:
        """Account for stretches of the plan that a listing showed to be empty."""
        absent = self._cutter.take_absent()
        if absent:
            self._submitted += absent
            self.counts.skipped += absent
            out.append(Notify(ChunksSkipped(now, (), absent)))

    def _flush_taken(self, now: float, out: list[Instruction]) -> None:
        if self._taken:
            out.append(Notify(ChunksEmitted(now, tuple(self._taken))))
            self._taken = []
