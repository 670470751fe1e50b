"""The machine by example: instructions compared as data, whole runs in virtual time."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from zarr_dask_stream.engine.batching import Batcher, BatchLimits, Cutter
from zarr_dask_stream.engine.events import (
    Batch,
    BatchDone,
    BatchFinished,
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
    Failure,
    Notice,
    RunFinished,
    Threads,
    Tick,
)
from zarr_dask_stream.engine.instructions import Abort, Cancel, Fold, Instruction, Notify, Submit
from zarr_dask_stream.engine.retry import RetryPolicy
from zarr_dask_stream.engine.supervisor import Supervisor
from zarr_dask_stream.engine.throttle import RateLimit, Throttle
from zarr_dask_stream.engine.window import Item, Window, WindowLimits
from zarr_dask_stream.errors import ClusterError, StoreError, StoreNotVisibleError, UsageError
from zarr_dask_stream.source.grid import ChunkGrid
from zarr_dask_stream.source.hedging import Hedge
from zarr_dask_stream.source.selection import ChunkPlan, parse_region
from zarr_dask_stream.testing import Outcome, Rehearsal, ScriptedExecutor

NBYTES = 10
PLAIN = RetryPolicy(wait_initial=1.0, wait_jitter=0.0)


def plan_of(chunks: int, where: Callable[[tuple[int, ...]], Any] | None = None) -> ChunkPlan:
    grid = ChunkGrid((chunks,), (1,))
    return ChunkPlan(grid, parse_region(None, grid.shape), where)


def machine_of(
    chunks: int = 10,
    *,
    window: int | None = 100,
    nbytes: int = 10**9,
    policy: RetryPolicy = PLAIN,
    batch: int = 8192,
    where: Callable[[tuple[int, ...]], Any] | None = None,
    seed: int = 0,
    **options: Any,
) -> Supervisor:
    plan = plan_of(chunks, where)
    return Supervisor(
        plan,
        Cutter(plan.runs()),
        Window(WindowLimits(chunks=window, nbytes=nbytes)),
        Batcher(BatchLimits(chunks=batch)),
        policy,
        chunk_nbytes=NBYTES,
        total=chunks if where is None else None,
        rng=random.Random(seed),
        **options,
    )


def notices(instructions: list[Instruction]) -> list[Notice]:
    return [i.notice for i in instructions if isinstance(i, Notify)]


def submitted(instructions: list[Instruction]) -> list[Batch]:
    return [batch for i in instructions if isinstance(i, Submit) for batch in i.batches]


def done(batch: Batch, *, failures: list[Failure] | None = None, **outcomes: Any) -> BatchDone:
    """Make a result of a batch in which what is not named otherwise succeeded."""
    numbers = [n for run in batch.ranges for n in run]
    other = {f.number for f in failures or []}
    for kind in ("filtered", "skipped", "unattempted"):
        other |= set(outcomes.get(kind, ()))
    good = [n for n in numbers if n not in other]
    result = BatchResult(numbers=good, values=[n * 100 for n in good], failures=failures or [], **outcomes)
    return BatchDone(batch.id, result)


def reset(number: int) -> Failure:
    return Failure(number, Category.TRANSIENT, "ConnectionResetError", "reset")


def take_all(machine: Supervisor) -> list[int]:
    taken = []
    while (item := machine.take()) is not None:
        taken.append(item.number)
    return taken


def rehearse(machine: Supervisor, **script: Any) -> tuple[list[Item], Rehearsal]:
    run = Rehearsal(machine, ScriptedExecutor(**script))
    return list(run.items()), run


def balanced(run: Rehearsal) -> bool:
    report, counts = run.report, run.machine.counts
    ends = [report.emitted, report.filtered, report.skipped_missing, report.dead_lettered, report.cancelled]
    assert ends == [counts.emitted, counts.filtered, counts.skipped, counts.dead, counts.cancelled]
    return report.total == sum(ends) == counts.settled and len(report.dead_letters) == counts.dead


# -- step by step -------------------------------------------------------------------------------------


def test_the_first_steps_as_data() -> None:
    machine = machine_of(3, batch=1, threads=1)
    first = machine.handle(Threads(1, 1), 0.0)
    batches = tuple(Batch(n + 1, (range(n, n + 1),), 1, NBYTES, fresh=True) for n in range(3))
    assert first == [
        Notify(ClusterChanged(0.0, 1, 1)),
        Submit(batches),
        *(Notify(BatchSubmitted(0.0, batch, 3, 30)) for batch in batches),
    ]
    second = machine.handle(done(batches[1]), 1.0)
    assert [type(notice) for notice in notices(second)] == [BatchFinished]
    assert machine.take() is None, "chunk 1 waits for chunk 0"
    machine.handle(done(batches[0]), 1.5)
    assert machine.take() == Item(0, 0, False)
    assert machine.take() == Item(1, 100, False)
    assert machine.handle(Tick(), 2.0) == [Notify(ChunksEmitted(2.0, (0, 1)))]
    machine.handle(done(batches[2]), 2.5)
    assert [machine.done, take_all(machine), machine.done] == [False, [2], True]
    assert machine.finish("done", 3.0) == [
        Notify(ChunksEmitted(3.0, (2,))),
        Notify(RunFinished(3.0, "done", 3, 0.0, 3, 30)),
    ]
    assert machine.finish("done", 4.0) == machine.handle(Tick(), 4.0) == []


def test_a_retry_waits_for_its_backoff() -> None:
    machine = machine_of(1)
    [batch] = submitted(machine.handle(Threads(1, 1), 0.0))
    answer = machine.handle(done(batch, failures=[reset(0)]), 5.0)
    assert notices(answer)[-1] == ChunkRetried(5.0, reset(0), 1, 1.0)
    assert not submitted(answer)
    assert machine.next_timer() == 6.0
    assert machine.in_flight == 1, "a chunk that waits for its retry keeps its credit"
    assert not submitted(machine.handle(Tick(), 5.999))
    [again] = submitted(machine.handle(Tick(), 6.0))
    assert again.id != batch.id, "a new task, not the failed one"
    assert (again.ranges, again.count, again.nbytes, again.attempt) == ((range(1),), 1, NBYTES, 2)
    assert machine.next_timer() is None


def test_the_last_attempt_ends_in_a_dead_letter() -> None:
    items, run = rehearse(machine_of(3, policy=RetryPolicy(attempts=3)), script={1: [ConnectionError("no")] * 9})
    assert [item.number for item in items] == [0, 2]
    [letter] = run.report.dead_letters
    assert (letter.index, letter.attempts, letter.category, letter.error_type) == (
        (1,),
        3,
        "transient",
        "ConnectionError",
    )
    assert letter.region == (slice(1, 2),)
    assert "3 attempts" in letter.reason
    assert run.report.retries == 2
    assert balanced(run)


def test_a_neighbour_of_a_bad_chunk_is_delivered_at_once() -> None:
    machine = machine_of(1000, batch=4, window=1000)
    batch = wide_batch(machine, 4)
    low = batch.ranges[0][0]
    machine.handle(done(batch, failures=[reset(low + 3)]), 3.0)
    assert take_all(machine) == [low, low + 1, low + 2]


def test_a_timed_out_chunk_is_tried_alone_and_others_together() -> None:
    slow = Failure(2, Category.TIMEOUT, "TimeoutError", "slow")
    machine = machine_of(8, batch=8, window=100, policy=RetryPolicy(wait_initial=0))
    batches = submitted(machine.handle(Threads(1, 1), 0.0))
    failures = {0: [reset(0)], 1: [reset(1)], 2: [slow]}
    out: list[Instruction] = []
    machine.paused = True
    for batch in batches:
        out += machine.handle(done(batch, failures=failures.get(batch.ranges[0][0], [])), 1.0)
    machine.paused = False
    again = [b for b in submitted(machine.handle(Tick(), 1.0)) if b.attempt == 2]
    assert {b.ranges for b in again} == {(range(2),), (range(2, 3),)}


def test_an_array_that_is_not_visible_stops_the_run_and_loses_no_notice() -> None:
    machine = machine_of(6, batch=1, window=100, deliver=False)
    batches = submitted(machine.handle(Threads(4, 1), 0.0))
    assert len(batches) >= 2
    blind = Failure(0, Category.NOT_VISIBLE, "StoreNotVisibleError", "not here")
    answer = machine.handle(done(batches[0], failures=[blind]), 1.0)
    assert isinstance(answer[-1], Abort)
    assert isinstance(answer[-1].error, StoreNotVisibleError)
    assert not submitted(answer)
    machine.check()
    end = notices(machine.finish("failed", 2.0))
    assert end[0] == ChunksCancelled(2.0, 6)
    assert machine.counts.settled == 6


def test_what_goes_with_an_abort_is_told_before_it() -> None:
    machine = machine_of(100, window=1000, policy=RetryPolicy(), deliver=False)
    for batch in submitted(machine.handle(Threads(1, 1), 0.0)):
        [*_, wide] = submitted(machine.handle(done(batch), 1.0)) or [batch]
    assert wide.count > 2
    first, second, third = next(iter(wide.ranges))[:3]
    answer = machine.handle(
        done(
            wide,
            failures=[
                Failure(first, Category.NOT_VISIBLE, "StoreNotVisibleError", "not here"),
                Failure(second, Category.PERMANENT, "OSError", "bad"),
            ],
            filtered=[third],
        ),
        2.0,
    )
    kinds = [type(notice) for notice in notices(answer)]
    assert ChunkDeadLettered in kinds
    assert ChunksFiltered in kinds
    assert [isinstance(i, Abort) for i in answer] == [False] * (len(answer) - 1) + [True]


# -- workers that die -----------------------------------------------------------------------------------


def wide_batch(machine: Supervisor, count: int) -> Batch:
    """Run a machine until a batch of at least so many chunks is out, and lose nothing on the way."""
    batches = submitted(machine.handle(Threads(1, 1), 0.0))
    while True:
        batch = batches.pop(0)
        if batch.count >= count:
            machine.paused = True
            for other in batches:
                machine.handle(done(other), 1.0)
            take_all(machine)
            machine.paused = False
            return batch
        batches += submitted(machine.handle(done(batch), 1.0))
        take_all(machine)
        batches += submitted(machine.handle(Tick(), 1.0))


def test_a_batch_that_lost_its_worker_comes_back_in_pieces() -> None:
    machine = machine_of(10_000, window=10_000)
    batch = wide_batch(machine, 64)
    answer = machine.handle(BatchLost(batch.id, "died"), 2.0)
    [again] = [b for b in submitted(answer) if b.ranges[0][0] in batch.ranges[0]]
    assert (again.ranges, again.suspect) == (batch.ranges, True), "workers die for many reasons: once is no proof"
    answer = machine.handle(BatchLost(again.id, "died"), 3.0)
    pieces = [b for b in submitted(answer) if b.ranges[0][0] in batch.ranges[0]]
    assert len(pieces) == 16
    assert all(piece.suspect for piece in pieces)
    assert [n for b in pieces for r in b.ranges for n in r] == [n for r in batch.ranges for n in r]
    assert not any(isinstance(notice, ChunkRetried) for notice in notices(answer)), "nobody is to blame yet"
    machine.check()


def test_a_stream_costs_a_bounded_number_of_workers() -> None:
    """Every chunk kills: the stream stops at its budget and says so, instead of eating the cluster."""
    machine = machine_of(1000, window=1000, policy=RetryPolicy(worker_budget=5))
    queue, deaths, now = submitted(machine.handle(Threads(4, 4), 0.0)), 0, 0.0
    while True:
        batch = queue.pop(0)
        now += 1.0
        deaths += batch.suspect
        answer = machine.handle(BatchLost(batch.id, "died"), now)
        machine.check()
        aborts = [i for i in answer if isinstance(i, Abort)]
        if aborts:
            break
        queue += submitted(answer)
    assert isinstance(aborts[0].error, ClusterError)
    assert "6 workers" in str(aborts[0].error)
    assert deaths == 6


def test_only_the_chunk_that_kills_workers_is_buried() -> None:
    items, run = rehearse(machine_of(500, window=500), losses={333: 10**9}, threads=2)
    assert [item.number for item in items] == [n for n in range(500) if n != 333]
    [letter] = run.report.dead_letters
    assert letter.index == (333,)
    assert letter.category == "cluster"
    assert "no other suspect" in letter.reason
    assert run.report.batches_lost >= 2
    assert balanced(run)


def test_a_worker_that_dies_once_costs_no_chunk() -> None:
    items, run = rehearse(machine_of(300, window=300), losses={100: 1, 200: 2}, threads=3)
    assert len(items) == 300
    assert run.report.dead_lettered == 0
    assert balanced(run)


def test_a_task_that_was_called_back_is_simply_done_again() -> None:
    machine = machine_of(10_000, window=10_000)
    batch = wide_batch(machine, 64)
    again = submitted(machine.handle(BatchLost(batch.id, "cancelled", deaths=0), 2.0))[0]
    assert (again.ranges, again.attempt) == (batch.ranges, 1)


def lose_for_ever(machine: Supervisor, poison: int, answer: Callable[[Batch], Any]) -> tuple[set[int], list[Any]]:
    """Drive a machine by hand: each batch with `poison` in it meets `answer`."""
    queue, now, out, letters = submitted(machine.handle(Threads(1, 1), 0.0)), 0.0, set(), []
    for _ in range(2000):
        if not queue:
            due = machine.next_timer()
            if due is None:
                break
            now = max(due, now)
        batch = queue.pop(0) if queue else None
        event: Any = Tick() if batch is None else done(batch)
        if batch is not None and any(poison in run for run in batch.ranges):
            event = answer(batch)
        instructions = machine.handle(event, now)
        machine.check()
        queue += submitted(instructions)
        letters += [notice.letter for notice in notices(instructions) if isinstance(notice, ChunkDeadLettered)]
        out |= set(take_all(machine))
        queue += submitted(machine.handle(Tick(), now))
    assert machine.done, "it must come to an end"
    return out, letters


@pytest.mark.parametrize(
    "answer",
    [
        lambda batch: BatchLost(batch.id, "its result was lost on the way", TypeError("no"), 0),
        lambda batch: BatchDone(batch.id, BatchResult(unattempted=[n for run in batch.ranges for n in run])),
    ],
    ids=["result lost", "never tried"],
)
def test_a_chunk_of_which_nothing_ever_comes_is_given_up(answer: Callable[[Batch], Any]) -> None:
    machine = machine_of(200, window=200)
    out, [letter] = lose_for_ever(machine, 77, answer)
    assert out == set(range(200)) - {77}
    assert letter.index == (77,)
    assert "nothing came back" in letter.reason


# -- ends -----------------------------------------------------------------------------------------------


def test_leaving_early_accounts_for_everything() -> None:
    run = Rehearsal(machine_of(1000, window=50), ScriptedExecutor(script={2: [Outcome.FILTERED], 4: [ValueError("x")]}))
    items = run.items()
    assert [next(items).number for _ in range(5)] == [0, 1, 3, 5, 6]
    items.close()  # type: ignore[attr-defined]  # it is a generator
    assert run.report.outcome == "stopped early"
    assert run.report.emitted == 5
    assert run.report.cancelled == 1000 - 5 - run.report.filtered - run.report.dead_lettered
    assert balanced(run)
    assert run.machine.take() is None, "what was counted as cancelled is not handed out"


def test_what_runs_is_called_back_at_the_end() -> None:
    machine = machine_of(10, batch=1)
    batches = submitted(machine.handle(Threads(2, 1), 0.0))
    answer = machine.finish("stopped early", 1.0)
    assert answer[0] == Cancel(tuple(batch.id for batch in batches))
    assert notices(answer)[0] == ChunksCancelled(1.0, 10)


def test_an_early_end_does_not_walk_a_huge_plan() -> None:
    def endless() -> Iterator[range]:
        for number in range(1000):
            yield range(number * 10**6, (number + 1) * 10**6)
        pytest.fail("walked on")

    machine = machine_of(10**9)
    machine._cutter = Cutter(endless())
    machine.handle(Threads(2, 1), 0.0)
    machine.finish("stopped early", 1.0)
    assert machine.counts.cancelled == 10**9


def test_a_where_that_would_raise_later_does_not_spoil_an_early_end() -> None:
    def where(index: tuple[int, ...]) -> bool:
        if index[0] > 900:
            raise KeyError("too far")
        return True

    machine = machine_of(2000, where=where, window=10)
    machine.handle(Threads(1, 1), 0.0)
    [*_, end] = notices(machine.finish("stopped early", 1.0))
    assert isinstance(end, RunFinished)
    assert end.total == machine.counts.cancelled >= 500


def test_a_where_that_raises_is_raised() -> None:
    def where(index: tuple[int, ...]) -> bool:
        raise KeyError("month")

    machine = machine_of(10, where=where)
    with pytest.raises(UsageError, match="month"):
        machine.handle(Threads(1, 1), 0.0)


@pytest.mark.parametrize("wanted", [{5, 900_000}, {0, 1, 300_000, 300_001, 999_999}, set()])
def test_what_a_sparse_predicate_finds_leaves_before_it_finds_more(wanted: set[int]) -> None:
    asked = 0

    def where(index: tuple[int, ...]) -> bool:
        nonlocal asked
        asked += 1
        return index[0] in wanted

    run = Rehearsal(machine_of(1_000_000, where=where), ScriptedExecutor())
    found = []
    for item in run.items():
        found.append(item.number)
        assert asked - item.number < 100_000, "it walked on first"
    assert found == sorted(wanted)
    assert asked == 1_000_000
    assert balanced(run)


def test_a_long_search_can_be_left_at_any_time() -> None:
    asked = 0

    def where(_: tuple[int, ...]) -> bool:
        nonlocal asked
        asked += 1
        return False

    machine = machine_of(10_000_000, where=where)
    machine.handle(Threads(1, 1), 0.0)
    assert (machine.done, machine.next_timer() is not None) == (False, True)
    machine.handle(Tick(), 1.0)
    assert asked < 100_000
    machine.draining = True
    assert machine.done


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("n", [0, 1, 7, 100, 200])
def test_take_reads_exactly_what_it_hands_out(n: int, ordered: bool) -> None:
    items, run = rehearse(machine_of(100, limit=n, ordered=ordered, batch=4), jitter=0.9, seed=n)
    read = [x for notice in run.notices if isinstance(notice, BatchSubmitted) for r in notice.batch.ranges for x in r]
    assert len(items) == min(n, 100)
    assert sorted(read) == sorted(item.number for item in items) == list(range(min(n, 100)))
    assert run.report.outcome == "done"
    assert balanced(run)


def test_take_reads_on_where_chunks_were_filtered() -> None:
    script = {n: [Outcome.FILTERED] for n in range(0, 100, 2)}
    items, run = rehearse(machine_of(100, limit=10), script=script)
    assert [item.number for item in items] == list(range(1, 20, 2))
    assert balanced(run)


def test_a_run_for_its_effects_needs_no_consumer() -> None:
    items, run = rehearse(machine_of(100, deliver=False, window=5), script={3: [Outcome.SKIPPED], 4: [OSError("x")]})
    assert items == []
    assert (run.report.emitted, run.report.skipped_missing, run.report.dead_lettered) == (98, 1, 1)
    assert balanced(run)


def test_a_partial_becomes_an_instruction() -> None:
    machine = machine_of(1, deliver=False)
    [batch] = submitted(machine.handle(Threads(1, 1), 0.0))
    answer = machine.handle(BatchDone(batch.id, BatchResult(numbers=[0], partial={(): 7})), 1.0)
    assert Fold({(): 7}) in answer
    assert machine.done


def test_an_answer_that_comes_twice_counts_once() -> None:
    machine = machine_of(1)
    [batch] = submitted(machine.handle(Threads(1, 1), 0.0))
    machine.handle(done(batch), 1.0)
    assert machine.handle(done(batch), 1.0) == []
    assert machine.handle(BatchLost(batch.id, "died"), 1.0) == []
    assert take_all(machine) == [0]


def test_an_empty_plan_is_done_at_once() -> None:
    items, run = rehearse(machine_of(0))
    assert items == []
    assert (run.report.total, run.report.outcome) == (0, "done")


# -- windows, rates, stragglers ---------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(("window", "nbytes"), [(1, 10**6), (3, 10**6), (None, 45), (None, 1), (64, 10**6)])
def test_small_windows_run_to_the_end(ordered: bool, window: int | None, nbytes: int) -> None:
    script = {5: [ConnectionError("x")] * 2, 9: [Outcome.FILTERED], 11: [Outcome.UNATTEMPTED], 30: [ValueError("y")]}
    items, run = rehearse(
        machine_of(60, window=window, nbytes=nbytes, ordered=ordered), script=script, jitter=1.0, seed=3, losses={20: 1}
    )
    numbers = [item.number for item in items]
    expected = [n for n in range(60) if n not in (9, 30)]
    assert (numbers if ordered else sorted(numbers)) == expected
    assert run.report.peak_chunks_in_flight <= (window or max(nbytes // NBYTES, 1))
    assert balanced(run)


def test_one_slow_chunk_holds_the_order_but_not_beyond_the_window() -> None:
    machine = machine_of(200, window=20, batch=1)
    items, run = rehearse(machine, threads=4, duration=lambda batch: 100.0 if batch.ranges[0][0] == 0 else 0.1)
    assert [item.number for item in items] == list(range(200))
    assert run.report.peak_chunks_in_flight == 20


def test_the_cluster_may_grow_and_shrink() -> None:
    run = Rehearsal(machine_of(2000, window=2000), ScriptedExecutor(threads=1, duration=0.1))
    sizes = {10: 16, 500: 2}
    for count, _ in enumerate(run.items()):
        if count in sizes:
            run.executor.resize(sizes[count])
    assert [n.threads for n in run.notices if isinstance(n, ClusterChanged)] == [1, 16, 2]
    assert balanced(run)


def test_a_cluster_without_workers_is_waited_for() -> None:
    machine = machine_of(10)
    machine.handle(Threads(0, 0, 5.0), 5.0)
    machine.check()
    assert machine.running > 0
    assert not machine.done


def test_a_rate_holds_over_a_whole_run() -> None:
    throttle = Throttle(RateLimit(requests=100), NBYTES)
    _, run = rehearse(machine_of(1000, window=1000, throttle=throttle), threads=8, duration=1e-6)
    assert run.executor.clock() >= 9.0
    assert run.executor.clock() <= 12.0
    assert balanced(run)


def test_a_straggler_gets_one_copy_and_the_first_answer_wins() -> None:
    late = {40}

    def duration(batch: Batch) -> float:
        slow = [n for run in batch.ranges for n in run if n in late]
        late.difference_update(slow)
        return 1000.0 if slow else 0.1

    machine = machine_of(100, batch=1, hedge=Hedge(budget=1.0), window=100)
    items, run = rehearse(machine, duration=duration)
    assert [item.number for item in items] == list(range(100))
    assert run.executor.clock() < 100
    assert len(run.executor.cancelled) == 1
    assert run.report.hedges == 1
    assert balanced(run)


@pytest.mark.parametrize("which", [0, 1])
def test_a_lost_copy_leaves_the_other_one(which: int) -> None:
    machine = machine_of(40, batch=1, hedge=Hedge(budget=1.0), window=100, deliver=False)
    queue = submitted(machine.handle(Threads(1, 1), 0.0))
    while len(queue) and machine.counts.emitted < 38:
        queue += submitted(machine.handle(done(queue.pop(0)), 1.0))
    answer = machine.handle(Tick(), 1000.0)
    copies = submitted(answer)
    assert copies
    pair = [next(b for b in queue if b.ranges == copies[0].ranges), copies[0]]
    machine.handle(BatchLost(pair[which].id, "died"), 1001.0)
    machine.check()
    machine.handle(done(pair[1 - which]), 1002.0)
    machine.check()
    assert machine.counts.emitted == 39
    assert machine.counts.dead == 0


@pytest.mark.parametrize(("window", "nbytes"), [(8, 10**9), (None, 85), (32, 10**9), (2, 10**9)])
def test_a_straggler_that_holds_back_a_full_window_gets_its_copy_within_it(window: int | None, nbytes: int) -> None:
    late = {20}

    def duration(batch: Batch) -> float:
        slow = [n for run in batch.ranges for n in run if n in late]
        late.difference_update(slow)
        return 1000.0 if slow else 0.1 * batch.count

    machine = machine_of(300, hedge=Hedge(budget=1.0), window=window, nbytes=nbytes)
    items, run = rehearse(machine, duration=duration)
    assert [item.number for item in items] == list(range(300))
    assert run.report.hedges >= 1
    assert run.executor.clock() < 500
    assert run.report.peak_chunks_in_flight <= (window or nbytes // NBYTES)
    assert run.report.peak_bytes_in_flight <= nbytes
    assert balanced(run)


@pytest.mark.parametrize(("window", "nbytes"), [(1, 10**9), (None, NBYTES), (None, 1)])
def test_a_window_for_one_chunk_has_no_room_for_copies(window: int | None, nbytes: int) -> None:
    machine = machine_of(40, hedge=Hedge(budget=1.0), window=window, nbytes=nbytes)
    items, run = rehearse(machine, duration=lambda batch: 50.0 if batch.ranges[0][0] == 30 else 0.1)
    assert len(items) == 40
    assert (run.report.hedges, run.report.peak_chunks_in_flight) == (0, 1)


def test_the_credit_of_copies_returns_with_the_end_of_a_run() -> None:
    machine = machine_of(40, batch=1, where=lambda _: True, hedge=Hedge(budget=1.0), window=20, deliver=False)
    queue = submitted(machine.handle(Threads(4, 1), 0.0))
    while machine.counts.emitted < 20:
        queue += submitted(machine.handle(done(queue.pop(0)), 1.0))
    assert submitted(machine.handle(Tick(), 1000.0))
    machine.check()
    [*_, end] = notices(machine.finish("stopped early", 1001.0))
    assert isinstance(end, RunFinished)
    assert end.total == 40 == machine.counts.emitted + machine.counts.cancelled


def test_a_store_that_fails_for_everything_stops_the_run() -> None:
    machine = machine_of(5000, window=5000, policy=RetryPolicy(wait_initial=1.0))
    script = {n: [ConnectionError("down")] * 99 for n in range(5000)}
    run = Rehearsal(machine, ScriptedExecutor(script=script))
    with pytest.raises(StoreError, match="nearly every read has failed"):
        run.run()
    assert balanced(run)


# -- the same again -------------------------------------------------------------------------------------

WILD: dict[str, Any] = {
    "script": {
        **{n: [ConnectionError("reset")] * (n % 7) for n in range(0, 400, 3)},
        **{n: [TimeoutError("slow")] for n in range(1, 400, 31)},
        **{n: [Outcome.SKIPPED] for n in range(2, 400, 50)},
        **{n: [Outcome.UNATTEMPTED] * 2 for n in range(5, 400, 60)},
    },
    "losses": {50: 1, 151: 99},
    "jitter": 1.0,
    "threads": 5,
}


@pytest.mark.parametrize("ordered", [True, False])
def test_a_recorded_run_replays_to_the_same_instructions(ordered: bool) -> None:
    def machine() -> Supervisor:
        return machine_of(400, window=60, ordered=ordered, seed=11, policy=RetryPolicy(), hedge=Hedge())

    items, run = rehearse(machine(), **WILD)
    assert len(items) == run.report.emitted > 300
    assert run.report.retries > 100
    assert balanced(run)
    assert Rehearsal.replay(machine(), run.log) == run.steps


def test_other_jitter_gives_other_instructions() -> None:
    _, run = rehearse(machine_of(400, window=60, seed=11, policy=RetryPolicy()), **WILD)
    other = machine_of(400, window=60, seed=12, policy=RetryPolicy())
    assert Rehearsal.replay(other, run.log) != run.steps


def test_each_chunk_has_one_terminal_notice() -> None:
    _, run = rehearse(machine_of(400, window=60, policy=RetryPolicy()), **WILD)
    ends: Counter[int] = Counter()
    for notice in run.notices:
        if isinstance(notice, (ChunksEmitted, ChunksFiltered)):
            ends.update(notice.numbers)
        elif isinstance(notice, ChunksSkipped):
            ends.update(n for r in notice.numbers for n in r)
        elif isinstance(notice, ChunkDeadLettered):
            ends[notice.number] += 1
    assert ends == dict.fromkeys(range(400), 1)
    json.dumps(run.report.to_dict())


# -- items gathered before a consumer gets them -------------------------------------------------------


@pytest.mark.parametrize("total", [20, None])
@pytest.mark.parametrize("stop_after", [None, 7])
def test_items_gathered_beyond_the_window_are_accounted_for_when_they_are_handed_out(
    total: int | None, stop_after: int | None
) -> None:
    machine = machine_of(20, window=4, where=None if total else lambda _: True)
    executor = ScriptedExecutor(threads=2)
    heard: list[Notice] = []

    def carry_out(instructions: list[Instruction]) -> None:
        heard.extend(notices(instructions))
        executor.submit(tuple(submitted(instructions)))
        machine.check()

    carry_out(machine.handle(executor.start(), 0.0))
    gathered: list[int] = []
    taken = 0
    while not machine.done and taken != stop_after:
        item = machine.take(hold=True)
        if item is None:
            for event in executor.wait(0.1):
                carry_out(machine.handle(event, executor.clock()))
            continue
        machine.stow(1)
        machine.check()
        gathered.append(item.number)
        taken += 1
        if taken % 6 == 0:  # more than fit into the window at once
            machine.hand_out(gathered[:3])
            failures = [Failure(n, Category.FUNCTION, "OSError", "full") for n in gathered[3:]]
            carry_out(machine.refuse(failures, "its sink raised", executor.clock()))
            gathered = []
        elif taken == 20:
            machine.hand_out(gathered)
        if machine.hungry:
            carry_out(machine.handle(Tick(), executor.clock()))
    carry_out(machine.finish("done", executor.clock()))
    dead = [notice.letter for notice in heard if isinstance(notice, ChunkDeadLettered)]
    if stop_after is None:
        assert machine.counts.emitted == 11
        assert [letter.index[0] for letter in dead] == [3, 4, 5, 9, 10, 11, 15, 16, 17]
        assert {(letter.attempts, letter.reason) for letter in dead} == {(1, "its sink raised")}
    else:
        assert (machine.counts.emitted, machine.counts.dead, machine.counts.cancelled) == (3, 3, 14)
    assert machine.counts.settled == 20
    assert machine.window.peak_chunks <= 4


def test_a_limit_counts_what_was_gathered() -> None:
    machine = machine_of(20, window=4, limit=3)
    machine.handle(Threads(1, 1), 0.0)
    while machine.running:
        for batch in list(range(1, 10)):
            machine.handle(BatchDone(batch, BatchResult(numbers=[batch - 1], values=[0])), 0.0)
        while machine.take(hold=True) is not None:
            machine.stow(1)
    assert machine.take(hold=True) is None
    assert not machine.done
    machine.hand_out([0, 1, 2])
    assert machine.done


def test_while_holding_only_one_batch_at_a_time_goes_out() -> None:
    machine = machine_of(6, batch=1, threads=2, deliver=False)
    machine.holding = True
    first = submitted(machine.handle(Threads(2, 1), 0.0))
    assert len(first) == 1
    hungry = [machine.hungry]
    assert machine.frontier == 1
    failed = machine.handle(done(first[0], failures=[reset(0)]), 1.0)
    assert submitted(failed) == []
    [again] = submitted(machine.handle(Tick(), 2.0))
    assert again.ranges == (range(1),), "a chunk that failed is tried again all the same"
    assert (first[0].fresh, again.fresh) == (True, False)
    second = submitted(machine.handle(done(again), 3.0))
    assert [batch.ranges for batch in second] == [(range(1, 2),)]
    machine.holding = False
    hungry.append(machine.hungry)
    assert hungry == [False, True]
    assert len(submitted(machine.handle(Tick(), 3.0))) == 4
    assert machine.frontier is None


def test_chunks_that_hung_together_are_tried_one_by_one_at_no_cost() -> None:
    machine = machine_of(40, batch=40, threads=1)
    [first, *_] = submitted(machine.handle(Threads(1, 1), 0.0))
    [rest, *_] = submitted(machine.handle(done(first), 0.0))
    numbers = [n for run in rest.ranges for n in run]
    assert len(numbers) > 2
    result = BatchResult(numbers=numbers[:1], values=[0], apart=numbers[1:])
    batches = submitted(machine.handle(BatchDone(rest.id, result), 1.0))
    alone = [batch for batch in batches if not batch.fresh]
    assert [batch.ranges for batch in alone] == [(range(n, n + 1),) for n in numbers[1:]]
    assert {batch.attempt for batch in alone} == {1}
