"""What bounds the machine: windows, rates, workers that come and go, and the copies of stragglers within them."""

from __future__ import annotations

import pytest

from machines import NBYTES, balanced, done, machine_of, notices, rehearse, reset, submitted
from zarr_dask_stream.engine.events import (
    Batch,
    BatchLost,
    ClusterChanged,
    RunFinished,
    Threads,
    Tick,
)
from zarr_dask_stream.engine.retry import RetryPolicy
from zarr_dask_stream.engine.throttle import RateLimit, Throttle
from zarr_dask_stream.errors import StoreError
from zarr_dask_stream.source.hedging import Hedge
from zarr_dask_stream.testing import Outcome, Rehearsal, ScriptedExecutor


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
