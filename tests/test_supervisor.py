"""The machine by example: instructions compared as data, whole runs in virtual time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from machines import NBYTES, balanced, done, machine_of, notices, rehearse, reset, submitted, take_all
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
    RunFinished,
    Threads,
    Tick,
)
from zarr_dask_stream.engine.instructions import Abort, Instruction, Notify, Submit
from zarr_dask_stream.engine.retry import RetryPolicy
from zarr_dask_stream.engine.supervisor import Supervisor
from zarr_dask_stream.engine.window import Item
from zarr_dask_stream.errors import ClusterError, StoreNotVisibleError
from zarr_dask_stream.source.hedging import Hedge
from zarr_dask_stream.testing import Outcome, Rehearsal

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
