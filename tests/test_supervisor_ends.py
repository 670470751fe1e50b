"""How the machine comes to an end: early, late, after a limit, with items that nobody has taken yet."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from machines import balanced, done, machine_of, notices, rehearse, submitted, take_all
from zarr_dask_stream.engine.batching import Cutter
from zarr_dask_stream.engine.events import (
    BatchDone,
    BatchLost,
    BatchResult,
    BatchSubmitted,
    Category,
    ChunkDeadLettered,
    ChunksCancelled,
    Failure,
    Notice,
    RunFinished,
    Threads,
    Tick,
)
from zarr_dask_stream.engine.instructions import Cancel, Fold, Instruction
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.testing import Outcome, Rehearsal, ScriptedExecutor

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
