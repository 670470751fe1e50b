"""The machine that decides: inputs in, instructions out. No clock, no wait, no Dask.

The loop in ``stream.py`` feeds `Supervisor.handle` with what happened and the time, and carries out
what comes back. Each planned chunk walks one road::

    planned --cut--> running --done--> emitted | filtered | skipped
                        |
                        +--failed--> waiting (backoff) --due--> running
                        |                 ...until the policy gives up--> dead letter
                        +--worker lost--> suspect: again, then in pieces, until the one that kills is alone
    anything not settled when the run ends: cancelled

Invariants, held at every step (`check` asserts them, and the tests call it after each input):

- chunks and bytes in flight never pass the window's limits, but for one oversized chunk alone;
- in flight = running + waiting + in the outbox;
- planned = emitted + filtered + skipped + dead-lettered + in flight + not cut yet.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from zarr_dask_stream.engine.batching import Batcher, Cutter
from zarr_dask_stream.engine.events import (
    Batch,
    BatchDone,
    BatchFinished,
    BatchHedged,
    BatchLost,
    BatchResult,
    BatchStats,
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
    Notice,
    RunFinished,
    SlowedDown,
    Threads,
    WorkerRetired,
)
from zarr_dask_stream.engine.retry import Breaker, GiveUp, RetryPolicy
from zarr_dask_stream.engine.throttle import Throttle
from zarr_dask_stream.engine.window import Item, Outbox, Window
from zarr_dask_stream.errors import ClusterError, StoreError, StoreNotVisibleError, ZdsError
from zarr_dask_stream.source.hedging import Hedge, Stragglers
from zarr_dask_stream.source.selection import ChunkPlan, decode_numbers, encode_numbers

__all__ = ["Abort", "Cancel", "Counts", "Fold", "Instruction", "Notify", "Restart", "Submit", "Supervisor"]

_SPLIT = 16  # a suspect batch that lost its worker again comes back in so many pieces
_DEATHS = 2  # so many times a chunk may lose its worker while alone in a batch
_RETURNS = 5  # so many times a chunk may come back untried, or its result be lost on the way
_ZOMBIES = 4  # a worker with so many hanging threads is restarted
_LOOK_S = 0.02  # stragglers are looked for at most so often
_RETRY_GROUP = 64  # chunks whose retries fall due together share a task, up to so many


@dataclass(frozen=True, slots=True)
class Submit:
    """Send these batches to the workers."""

    batches: tuple[Batch, ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Call these batches back; what still comes of them is ignored."""

    batches: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fold:
    """Merge a partial of the reduction into what there is."""

    partial: Any


@dataclass(frozen=True, slots=True)
class Notify:
    """Tell the observers."""

    notice: Notice


@dataclass(frozen=True, slots=True)
class Abort:
    """Stop the run with this error: nothing that follows could be right."""

    error: ZdsError


@dataclass(frozen=True, slots=True)
class Restart:
    """Restart this worker: its threads hang in chunks that were given up."""

    worker: str


Instruction = Submit | Cancel | Fold | Notify | Abort | Restart


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


@dataclass(slots=True)
class _Running:
    batch: Batch
    since: float


@dataclass(slots=True)
class _Trouble:
    """What is known of a chunk that has failed at least once."""

    attempts: int = 0
    first_at: float = 0.0
    deaths: int = 0
    returns: int = 0


@dataclass(order=True, slots=True)
class _Waiting:
    due: float
    serial: int
    numbers: tuple[int, ...] = field(compare=False)
    alone: bool = field(compare=False, default=False)
    suspect: bool = field(compare=False, default=False)


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
        self.throttle = throttle or Throttle(None, chunk_nbytes)
        self._breaker = Breaker(policy.breaker)
        self._stragglers = Stragglers(hedge)
        self._look_every_s = max(_LOOK_S, 0.0 if hedge is None else hedge.min_s)
        self._look_at = -math.inf
        self._twins: dict[int, int] = {}
        self._restarted: set[str] = set()
        self._workers_spent = 0
        self.paused = False
        self.draining = False
        self._held_until: float | None = None
        self._last_failure: Failure | None = None
        self._outbox = Outbox(ordered=ordered)
        self._running: dict[int, _Running] = {}
        self._waiting: list[_Waiting] = []
        self._trouble: dict[int, _Trouble] = {}
        self._serial = 0
        self._submitted = 0
        self._retries = 0
        self._want = 1
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
            return not (self._running or self._outbox.ready)
        return not (self._running or self._waiting or len(self._outbox)) and self._cutter.exhausted

    @property
    def hungry(self) -> bool:
        """Whether the consumer has made enough room for another batch."""
        return (
            len(self._running) < self._most_running
            and self._held_until is None
            and not (self.paused or self.draining)
            and self.window.room(self._chunk_nbytes) >= self._want
            and not self._cutter.exhausted
        )

    def next_timer(self) -> float | None:
        """Time of the next thing to do without an input, or None."""
        if self.paused or self.draining:
            return None
        due = self._waiting[0].due if self._waiting else math.inf
        if self._held_until is not None:
            due = self._held_until
        if self._stragglers.on and self._running:
            due = min(due, self._look_at)
        return None if math.isinf(due) else due

    def take(self) -> Item | None:
        """Hand the next item out, if one may leave; its credit returns."""
        if self._finished or (self._limit is not None and self.counts.emitted >= self._limit):
            return None
        item = self._outbox.pop()
        if item is not None:
            self._taken.append(item.number)
            self.counts.emitted += 1
            self.window.release(1, self._chunk_nbytes)
        return item

    @property
    def in_flight(self) -> int:
        """Chunks submitted and not taken yet."""
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
            out.append(Notify(ClusterChanged(now, event.workers, event.threads, event.waiting_s)))
        self._held_until = None
        if self._abort is None and self._breaker.is_open(now):
            self._abort = self._nothing_works()
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
        return self.window.chunks + self._cutter.rest() + self._cutter.take_absent()

    def check(self) -> None:
        """Assert the invariants."""
        running = sum(r.batch.count for r in self._running.values())
        running -= sum(self._running[a].batch.count for a, b in self._twins.items() if a > b)
        waiting = sum(len(w.numbers) for w in self._waiting)
        limits = self.window.limits
        if not self._finished:
            # Dropped chunks may sit in the reorder buffer as place holders without credit.
            assert running + waiting <= self.window.chunks <= running + waiting + len(self._outbox)
            assert self.window.nbytes == self.window.chunks * self._chunk_nbytes
        if self.window.chunks > 1:
            assert self.window.nbytes <= limits.nbytes
        if limits.chunks is not None:
            assert self.window.chunks <= limits.chunks
        if self._total is not None:
            assert self.counts.settled + self.window.chunks * (not self._finished) <= self._total

    # -- outcomes -----------------------------------------------------------------------------------

    def _batch_done(self, event: BatchDone, now: float, out: list[Instruction]) -> None:
        running = self._running.pop(event.batch, None)
        if running is None:
            return  # called back earlier: its chunks have gone another way
        self._call_twin_back(event.batch, out)
        result = event.result
        elapsed = now - running.since
        out.append(Notify(BatchFinished(now, running.batch, result.stats, elapsed, event.transfer_s)))
        attempted = running.batch.count - len(result.unattempted)
        self._batcher.observe(attempted, result.stats)
        self.throttle.settle(attempted, result.stats.bytes_stored, now)
        self._stragglers.observe(elapsed_s=elapsed, chunks=running.batch.count)
        self._watch_worker(result.stats, now, out)
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
        self._hear_complaints(result, now, out)
        for failure in result.failures:
            self._chunk_failed(failure, now, out)
        if attempted:
            self._wait(tuple(result.unattempted), now)
        else:
            self._returned(running.batch, "the worker tried none of its chunks", None, now, out)

    def _settle_values(self, result: BatchResult, now: float, out: list[Instruction]) -> None:
        if not result.numbers:
            return
        if self._trouble:
            for number in result.numbers:
                self._trouble.pop(number, None)
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
            self._abort = self._abort or _abort_error(failure)
            self._wait((failure.number,), now)
            return
        trouble = self._trouble.setdefault(failure.number, _Trouble(first_at=now))
        trouble.attempts += 1
        verdict = self._policy.decide(failure, trouble.attempts, now - trouble.first_at, self._rng, self._retries)
        if isinstance(verdict, GiveUp):
            self._bury(failure, verdict.why, now, out)
            return
        self._retries += 1
        out.append(Notify(ChunkRetried(now, failure, trouble.attempts, verdict.delay_s)))
        alone = failure.category is Category.TIMEOUT
        self._wait((failure.number,), now + verdict.delay_s, alone=alone)

    def _bury(self, failure: Failure, why: str, now: float, out: list[Instruction]) -> None:
        trouble = self._trouble.pop(failure.number)
        letter = DeadLetter(
            index=self._plan.grid.index(failure.number),
            region=self._plan.region(failure.number),
            attempts=trouble.attempts + trouble.deaths or trouble.returns,
            category=failure.category.value,
            error_type=failure.error_type,
            message=failure.message,
            reason=why,
            worker=failure.worker,
            traceback=failure.traceback,
            error=failure.error,
        )
        self.counts.dead += 1
        self._drop([failure.number])
        out.append(Notify(ChunkDeadLettered(now, failure.number, letter)))

    def _batch_lost(self, event: BatchLost, now: float, out: list[Instruction]) -> None:
        running = self._running.pop(event.batch, None)
        if running is None:
            return
        batch = running.batch
        elapsed = now - running.since
        if self._lose_twin(event.batch):
            return  # its other copy goes on
        out.append(Notify(BatchFinished(now, batch, None, elapsed, 0.0, lost=event.reason)))
        if event.deaths == 0:
            self._returned(batch, event.reason, event.error, now, out)
        elif not batch.suspect:
            # Workers die for many reasons, and every batch on them is lost: once is no proof.
            self._wait(tuple(decode_numbers(batch.ranges)), now, alone=True, suspect=True)
        else:
            self._suspect_lost(batch, event, now, out)

    def _suspect_lost(self, batch: Batch, event: BatchLost, now: float, out: list[Instruction]) -> None:
        """Close in on the chunk that kills, and count what that costs the cluster."""
        self._workers_spent += event.deaths
        if self._workers_spent > self._policy.worker_budget:
            self._abort = ClusterError(
                f"chunks of this stream have cost the cluster {self._workers_spent} workers; the last batch began with "
                f"chunk {self._plan.grid.index(batch.ranges[0][0])}: {event.reason}. Look at the workers' logs "
                "(out of memory? a crashing library?); RetryPolicy(worker_budget=...) allows more"
            )
            self._wait(tuple(decode_numbers(batch.ranges)), now, alone=True, suspect=True)
        elif batch.count > 1:
            self._wait_in_pieces(list(decode_numbers(batch.ranges)), now, suspect=True)
        else:
            self._single_lost(batch.ranges[0][0], event, now, out)

    def _returned(
        self, batch: Batch, reason: str, error: BaseException | None, now: float, out: list[Instruction]
    ) -> None:
        """Take a batch up again of which nothing came, though no worker died of it.

        Mostly nobody is to blame (somebody called the task back), so the first time costs nothing. But a
        result that can't travel comes back for ever: hence smaller and smaller pieces, and an end.
        """
        numbers = list(decode_numbers(batch.ranges))
        returns = 0
        for number in numbers:
            trouble = self._trouble.setdefault(number, _Trouble(first_at=now))
            trouble.returns += 1
            returns = max(returns, trouble.returns)
        delay = 0.0 if returns == 1 else self._policy.backoff(returns - 1, self._rng)
        if returns == 1:
            self._wait(tuple(numbers), now, alone=batch.suspect, suspect=batch.suspect)
        elif batch.count > 1:
            self._wait_in_pieces(numbers, now + delay, suspect=batch.suspect)
        elif returns <= _RETURNS:
            self._wait((numbers[0],), now + delay, alone=True, suspect=batch.suspect)
        else:
            kind = type(error).__name__ if error else "ResultLost"
            failure = Failure(numbers[0], Category.CLUSTER, kind, reason, error=error)
            self._bury(failure, f"nothing came back {returns} times", now, out)

    def _wait_in_pieces(self, numbers: list[int], due: float, *, suspect: bool) -> None:
        piece = -(-len(numbers) // _SPLIT)
        for at in range(0, len(numbers), piece):
            self._wait(tuple(numbers[at : at + piece]), due, alone=True, suspect=suspect)

    def _single_lost(self, number: int, event: BatchLost, now: float, out: list[Instruction]) -> None:
        """Judge a chunk that was alone when its worker died: now the blame has an address."""
        trouble = self._trouble.setdefault(number, _Trouble(first_at=now))
        trouble.deaths += 1
        failure = Failure(
            number,
            Category.CLUSTER,
            type(event.error).__name__ if event.error else "WorkerLost",
            event.reason,
            error=event.error,
        )
        if trouble.deaths >= _DEATHS:
            self._bury(failure, f"{trouble.deaths} times a worker died with no other suspect in hand", now, out)
            return
        self._retries += 1
        out.append(Notify(ChunkRetried(now, failure, trouble.attempts + trouble.deaths, 0.0)))
        self._wait((number,), now, alone=True, suspect=True)

    # -- what failures say about the world ------------------------------------------------------------

    def _hear_complaints(self, result: BatchResult, now: float, out: list[Instruction]) -> None:
        good = len(result.numbers) + len(result.filtered) + len(result.skipped)
        categories = [failure.category for failure in result.failures]
        self._breaker.observe(good=good, failures=categories, now=now)
        if categories:
            self._last_failure = result.failures[-1]
        if Category.THROTTLED in categories and self.throttle.slow_down(now):
            out.append(Notify(SlowedDown(now, self.throttle.requests_per_s)))

    def _nothing_works(self) -> StoreError:
        failure = self._last_failure
        assert failure is not None
        return StoreError(
            f"nearly every read has failed for a while, the last with {failure.error_type}: {failure.message}. "
            "Is the store reachable from the workers, and are the credentials valid there? "
            "RetryPolicy(breaker=None) goes on regardless"
        )

    def _watch_worker(self, stats: BatchStats, now: float, out: list[Instruction]) -> None:
        if stats.zombies >= _ZOMBIES and stats.worker not in self._restarted:
            self._restarted.add(stats.worker)
            out.append(Restart(stats.worker))
            out.append(Notify(WorkerRetired(now, stats.worker, stats.zombies)))

    # -- stragglers -----------------------------------------------------------------------------------

    def _patience(self, batch: Batch) -> float:
        """How long a batch may be out before something is done about it."""
        if batch.suspect or batch.id in self._twins:
            return math.inf
        return self._stragglers.patience(chunks=batch.count)

    def _find_stragglers(self, now: float) -> list[Batch]:
        """Look through what is out, now and then: with thousands of batches, each look has its price."""
        if not self._stragglers.on or now < self._look_at:
            return []
        late: list[Batch] = []
        first = math.inf
        for running in self._running.values():
            due = running.since + self._patience(running.batch)
            if due <= now:
                late.append(running.batch)
            else:
                first = min(first, due)
        pause = self._look_every_s
        self._look_at = min(now + pause, max(first, now + pause / 4))
        return late

    def _submit_copies(self, now: float, out: list[Instruction]) -> None:
        batches: list[Batch] = []
        late = self._find_stragglers(now)
        for batch in late:
            if not self._stragglers.afford(batch.count):
                self._twins[batch.id] = batch.id  # asked once; it has to do without
                continue
            self._serial += 1
            copy = dataclasses.replace(batch, id=self._serial)
            self._twins[batch.id], self._twins[copy.id] = copy.id, batch.id
            self._running[copy.id] = _Running(copy, now)
            batches.append(copy)
            out.append(Notify(BatchHedged(now, batch, copy)))
        self._announce(batches, now, out)

    def _call_twin_back(self, batch: int, out: list[Instruction]) -> None:
        twin = self._twins.pop(batch, None)
        if twin is not None and twin != batch:
            self._twins.pop(twin, None)
            if self._running.pop(twin, None) is not None:
                out.append(Cancel((twin,)))

    def _lose_twin(self, batch: int) -> bool:
        """Forget one of two copies; return whether the other one is still out."""
        twin = self._twins.pop(batch, None)
        if twin is None or twin == batch:
            return False
        self._twins.pop(twin, None)
        return twin in self._running

    # -- submission ---------------------------------------------------------------------------------

    @property
    def _most_running(self) -> int:
        return self._depth if self._depth is not None else 2 * self._threads + 1

    def _submit_new(self, now: float, out: list[Instruction]) -> None:
        batches: list[Batch] = []
        while len(self._running) < self._most_running and not self._cutter.exhausted:
            size = self._next_size()
            if size < 1 or self.window.room(self._chunk_nbytes) < size:
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

    def _next_size(self) -> int:
        remaining = None if self._total is None else self._total - self._submitted
        size = self._batcher.size(
            capacity=self.window.limits.capacity(self._chunk_nbytes),
            remaining=remaining,
            threads=self._threads,
        )
        if self._limit is not None:
            size = min(size, self._limit - self.counts.emitted - self.window.chunks)
        self._want = max(size, 1)
        return size

    def _submit_due(self, now: float, out: list[Instruction]) -> None:
        batches: list[Batch] = []
        group: list[int] = []
        while self._waiting and self._waiting[0].due <= now and self._allowance(now) >= 1:
            waiting = heapq.heappop(self._waiting)
            if waiting.alone:
                batches.append(self._start(encode_numbers(waiting.numbers), now, suspect=waiting.suspect))
                continue
            group.extend(waiting.numbers)
            if len(group) >= _RETRY_GROUP:
                batches.append(self._start(encode_numbers(group), now))
                group = []
        if group:
            batches.append(self._start(encode_numbers(group), now))
        self._announce(batches, now, out)

    def _start(self, ranges: tuple[range, ...], now: float, *, credit: bool = False, suspect: bool = False) -> Batch:
        count = sum(len(run) for run in ranges)
        nbytes = count * self._chunk_nbytes
        self._serial += 1
        first = self._trouble.get(ranges[0][0])
        attempt = 1 if first is None else first.attempts + 1
        batch = Batch(self._serial, ranges, count, nbytes, attempt, suspect)
        if credit:
            self.window.reserve(count, nbytes)
        self.throttle.spend(count)
        self._running[batch.id] = _Running(batch, now)
        self._stragglers.started(count)
        return batch

    def _announce(self, batches: list[Batch], now: float, out: list[Instruction]) -> None:
        if batches:
            out.append(Submit(tuple(batches)))
            chunks, nbytes = self.window.chunks, self.window.nbytes
            out.extend(Notify(BatchSubmitted(now, batch, chunks, nbytes)) for batch in batches)

    def _wait(self, numbers: tuple[int, ...], due: float, *, alone: bool = False, suspect: bool = False) -> None:
        if not numbers:
            return
        self._serial += 1
        heapq.heappush(self._waiting, _Waiting(due, self._serial, numbers, alone, suspect))

    def _drop(self, numbers: Iterable[int]) -> None:
        count = 0
        for number in numbers:
            self._outbox.drop(number)
            self._trouble.pop(number, None)
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


_ABORTS: dict[Category, Callable[[str], ZdsError]] = {
    Category.NOT_VISIBLE: StoreNotVisibleError,
    Category.CLUSTER: ClusterError,
}


def _abort_error(failure: Failure) -> ZdsError:
    if isinstance(failure.error, ZdsError):
        return failure.error
    return _ABORTS[failure.category](failure.message)
