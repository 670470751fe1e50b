"""The stand-ins stand in: virtual time, scripted outcomes, stores that fail and heal as told."""

from __future__ import annotations

import asyncio
import pickle
import time
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

import zarr_dask_stream as zds
from zarr_dask_stream.engine.events import Batch, BatchDone, BatchFinished, BatchLost, Category, Failure, Threads, Tick
from zarr_dask_stream.engine.executor import Executor
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.testing import Fault, FaultyStore, LatencyStore, ManualClock, Outcome, ScriptedExecutor, rehearse

QUICK = zds.RetryPolicy(wait_initial=0)


def batches(*counts: int) -> tuple[Batch, ...]:
    made, at = [], 0
    for number, count in enumerate(counts, 1):
        made.append(Batch(number, (range(at, at + count),), count, count * 8))
        at += count
    return tuple(made)


# -- the clock --------------------------------------------------------------------------------------


def test_a_clock_goes_forward_only() -> None:
    clock = ManualClock(5.0)
    clock.advance_to(3.0)
    assert clock() == 5.0
    clock.advance_to(7.0)
    clock.advance(0.5)
    assert clock() == 7.5
    for back in (-1, float("nan")):
        with pytest.raises(UsageError, match="forward"):
            clock.advance(back)


# -- the executor -----------------------------------------------------------------------------------


def test_it_is_an_executor() -> None:
    executor: Executor = ScriptedExecutor()
    assert executor.start() == Threads(4, 1)


def test_batches_take_their_time_and_their_turn() -> None:
    executor = ScriptedExecutor(threads=2, duration=1.0)
    executor.submit(batches(3, 1, 1))
    order = []
    while not executor.idle:
        order += [(event.batch, executor.clock()) for event in executor.wait(None) if isinstance(event, BatchDone)]
    assert order == [(2, 1.0), (3, 2.0), (1, 3.0)]
    assert executor.busy_s == 5.0
    assert executor.busy_share == 5 / 6


def test_wait_goes_no_further_than_it_may() -> None:
    executor = ScriptedExecutor(duration=10.0)
    executor.submit(batches(1))
    assert executor.wait(4.0) == [Tick()]
    assert executor.clock() == 4.0
    assert executor.wait(6.0) != [Tick()]
    assert executor.wait(3.0) == [Tick()]
    assert executor.clock() == 13.0
    with pytest.raises(UsageError, match="nothing is under way"):
        executor.wait(None)


def test_a_script_is_played_attempt_by_attempt() -> None:
    own = Failure(1, Category.CREDENTIALS, "Expired", "token")
    executor = ScriptedExecutor(
        script={0: [Outcome.FILTERED], 1: [own, Outcome.SKIPPED], 2: [Outcome.UNATTEMPTED, OSError(5, "io")]},
        value=lambda n: -n,
    )
    seen = []
    for number in (1, 2, 3):
        executor.submit((Batch(number, (range(4),), 4, 32),))
        [event] = executor.wait(None)
        assert isinstance(event, BatchDone)
        r = event.result
        categories = {f.number: f.category for f in r.failures}
        seen.append((dict(zip(r.numbers, r.values, strict=True)), r.filtered, r.skipped, categories, r.unattempted))
    assert seen == [
        ({3: -3}, [0], [], {1: Category.CREDENTIALS}, [2]),
        ({0: 0, 3: -3}, [], [1], {2: Category.TRANSIENT}, []),
        ({0: 0, 1: -1, 2: -2, 3: -3}, [], [], {}, []),
    ]


def test_workers_die_as_often_as_told() -> None:
    executor = ScriptedExecutor(losses={1: 2})
    kinds = []
    for number in range(3):
        executor.submit((Batch(number, (range(4),), 4, 32),))
        kinds += [type(event) for event in executor.wait(None)]
    assert kinds == [BatchLost, BatchLost, BatchDone]


def test_what_hangs_holds_its_thread_until_it_is_cancelled() -> None:
    executor = ScriptedExecutor(threads=1, hangs={0}, duration=1.0)
    executor.submit(batches(1, 1))
    assert executor.wait(50.0) == [Tick()]
    executor.cancel((1,))
    [event] = executor.wait(None)
    assert isinstance(event, BatchDone)
    assert (event.batch, executor.clock()) == (2, 51.0)
    assert executor.cancelled == [1]


@pytest.mark.parametrize("seed", range(3))
def test_a_seed_decides_the_order(seed: int) -> None:
    def order(seed: int) -> list[int]:
        executor = ScriptedExecutor(threads=8, jitter=0.9, seed=seed)
        executor.submit(batches(*[1] * 8))
        out = []
        while not executor.idle:
            out += [event.batch for event in executor.wait(None) if isinstance(event, BatchDone)]
        return out

    assert order(seed) == order(seed) != order(seed + 100)
    assert sorted(order(seed)) == list(range(1, 9))


def test_it_waits_in_an_event_loop_too() -> None:
    async def main() -> Any:
        executor = ScriptedExecutor()
        await executor.start_async()
        executor.submit(batches(1))
        events = await executor.wait_async(None)
        await executor.close_async()
        return events

    assert [event.batch for event in asyncio.run(main())] == [1]


@pytest.mark.parametrize("options", [{"threads": 0}, {"jitter": 2.0}])
def test_impossible_scripts_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ScriptedExecutor(**options)


# -- stores -----------------------------------------------------------------------------------------


@pytest.fixture
def store() -> FaultyStore:
    store = FaultyStore({})
    array = zarr.create_array(store, shape=(6,), chunks=(2,), dtype="i4", fill_value=9)
    array[:] = np.arange(6)
    return store


def get(store: Any, key: str) -> bytes | None:
    value = sync(store.get(key, default_buffer_prototype()))
    return None if value is None else bytes(value.to_bytes())


def test_a_store_without_faults_is_the_store(store: FaultyStore) -> None:
    assert zarr.open_array(store)[:].tolist() == list(range(6))  # type: ignore[union-attr]  # zarr's types are wide
    assert store.met == 0
    assert store.reads["c/1"] >= 1


def test_a_fault_heals_after_its_times(store: FaultyStore) -> None:
    good = get(store, "c/0")
    assert good is not None
    error = ConnectionResetError("reset")
    store.break_reads({"c/0": [Fault(error=error, times=2), Fault(keep=3), Fault(flip=-1), Fault(absent=True)]})
    for _ in range(2):
        with pytest.raises(ConnectionResetError, match="reset"):
            get(store, "c/0")
    damaged = good[:-1] + bytes([good[-1] ^ 0xFF])
    assert [get(store, "c/0") for _ in range(4)] == [good[:3], damaged, None, good]
    assert store.met == 5


def test_a_pattern_meets_all_its_keys_and_lasts(store: FaultyStore) -> None:
    store.break_reads({"c/*": Fault(error=PermissionError("no"), times=None)})
    for key in ("c/0", "c/1", "c/0"):
        with pytest.raises(PermissionError):
            get(store, key)
    assert get(store, "zarr.json")
    store.heal()
    assert get(store, "c/0")


def test_a_missing_key_stays_missing(store: FaultyStore) -> None:
    store.break_reads({"c/77": Fault(keep=1)})
    assert get(store, "c/77") is None


def test_a_slow_key_is_slow(store: FaultyStore) -> None:
    store.break_reads({"c/0": Fault(delay_s=0.1)})
    began = time.monotonic()
    assert get(store, "c/0")
    assert time.monotonic() - began >= 0.1


@pytest.mark.parametrize("concurrency", [1, None], ids=["sequential", "embedded"])
def test_a_stream_meets_the_faults_and_gets_over_them(store: FaultyStore, concurrency: int | None) -> None:
    store.break_reads({"c/0": ConnectionError("reset"), "c/1": Fault(keep=2), "c/2": PermissionError("final")})
    stream = zds.stream_chunks(store, concurrency=concurrency, retry=QUICK, on_error="skip")
    assert [chunk.data.tolist() for chunk in stream] == [[0, 1], [2, 3]]
    assert stream.report.retries == 2
    [letter] = stream.report.dead_letters
    assert letter.index == (2,)
    assert "final" in letter.message


@pytest.mark.parametrize("kind", [FaultyStore, LatencyStore])
def test_such_a_store_stays_in_its_process(kind: type[FaultyStore | LatencyStore]) -> None:
    with pytest.raises(TypeError, match="lives in this process"):
        pickle.dumps(kind({}))
    assert repr(kind({})).startswith(kind.__name__)


def test_a_view_of_a_store_shares_its_faults(store: FaultyStore) -> None:
    view = store.with_read_only(True)
    assert view.read_only
    store.break_reads({"c/0": ConnectionError("reset")})
    with pytest.raises(ConnectionError):
        get(view, "c/0")
    assert get(store, "c/0"), "the view has met the fault for both"
    assert store.met == view.met == 1


def test_latency_follows_from_the_seed_alone() -> None:
    delays = [LatencyStore({}, delay_s=0.1, spread=0.5, seed=3).delay("c/0", nth) for nth in range(100)]
    assert delays == [LatencyStore({}, delay_s=0.1, spread=0.5, seed=3).delay("c/0", nth) for nth in range(100)]
    assert len(set(delays)) == 100
    assert 0.05 <= min(delays) < 0.07
    assert 0.13 < max(delays) <= 0.15
    assert delays[0] != LatencyStore({}, delay_s=0.1, spread=0.5, seed=4).delay("c/0", 0)
    assert LatencyStore({}, delay_s=lambda rng: rng.random()).delay("c/0", 0) < 1


def test_latency_is_waited_for_by_many_reads_at_once() -> None:
    store = LatencyStore({}, delay_s=0.05)
    array = zarr.create_array(store, shape=(40,), chunks=(1,), dtype="i4", fill_value=0)
    array[:] = 1
    began = time.monotonic()
    stream = zds.stream_chunks(store, concurrency=40)
    assert sum(int(chunk.data[0]) for chunk in stream) == 40
    assert time.monotonic() - began < 40 * 0.05
    assert store.reads["c/7"] == 1


@pytest.mark.parametrize("spread", [-0.1, 1.1])
def test_a_spread_is_a_share(spread: float) -> None:
    with pytest.raises(UsageError, match="spread"):
        LatencyStore({}, spread=spread)


# -- streams without a cluster ------------------------------------------------------------------------


@pytest.fixture
def stream() -> zds.ChunkStream[Any]:
    array = zarr.create_array({}, shape=(60,), chunks=(1,), dtype="i4")
    array[:] = np.arange(60)
    return zds.stream_chunks(array, on_error="skip", retry=zds.RetryPolicy(wait_initial=600, wait_max=7200))


@pytest.mark.parametrize("threads", [1, 5])
def test_a_stream_is_rehearsed_with_its_own_functions_and_policies(stream: zds.ChunkStream[Any], threads: int) -> None:
    calls: list[int] = []

    def double(chunk: zds.Chunk) -> int:
        calls.append(chunk.index[0])  # here, not on a worker
        if chunk.index == (9,):
            raise ZeroDivisionError
        return 2 * int(chunk.data[0])

    stages = stream.map(double).filter(lambda chunk: chunk.data % 4 == 0)
    script: dict[Any, Any] = {
        (4,): [ConnectionError("reset")] * 4,
        (6,): [ConnectionError("reset")] * 5,
        (8,): [Outcome.SKIPPED],
    }
    items = rehearse(stages, script=script, losses={(20,): 1, (30,): 99}, threads=threads, seed=3, jitter=0.5)
    bad = {6, 9, 30}
    assert [(item.index[0], item.data) for item in items] == [(n, 2 * n) for n in range(0, 60, 2) if n not in {*bad, 8}]
    report = stages.report
    assert {letter.index[0]: letter.category for letter in report.dead_letters} == {
        6: "transient",
        9: "function",
        30: "cluster",
    }
    assert report.total == 60 == report.emitted + report.filtered + report.skipped_missing + report.dead_lettered
    assert report.wall_s > 60, "in a time of its own"
    assert calls.count(4) == calls.count(9) == 1
    assert not {6, 30} & set(calls)


def test_a_rehearsal_goes_the_same_way_each_time(stream: zds.ChunkStream[Any]) -> None:
    def once() -> tuple[Any, ...]:
        heard: list[Any] = []
        told = zds.stream_chunks(zarr.create_array({}, shape=(40,), chunks=(1,), dtype="i1"), callbacks=[heard.append])
        script = {(n,): [ConnectionError("reset")] * (n % 3) for n in range(40)}
        rehearse(told, script=script, losses={(7,): 1}, jitter=1.0, seed=5)
        return tuple((type(notice).__name__, notice.at) for notice in heard)

    assert once() == once()


def test_a_rehearsal_takes_no_time_but_the_script_s(stream: zds.ChunkStream[Any]) -> None:
    """What a batch really took would decide how large the next ones are."""
    heard: list[Any] = []
    array = zarr.create_array({}, shape=(40,), chunks=(1,), dtype="i1")
    rehearse(zds.stream_chunks(array, callbacks=[heard.append]), duration=0.25)
    stats = [notice.stats for notice in heard if isinstance(notice, BatchFinished) and notice.stats is not None]
    assert stats
    assert {(one.setup_s, one.wall_s % 0.25) for one in stats} == {(0.0, 0.0)}


def test_a_hedge_is_rehearsed(stream: zds.ChunkStream[Any]) -> None:
    array = zarr.create_array({}, shape=(60,), chunks=(1,), dtype="i4")
    hedged = zds.stream_chunks(array, hedge=zds.Hedge(budget=1.0), concurrency=12)
    slow = {50}

    def duration(batch: Batch) -> float:
        late = slow & {number for run in batch.ranges for number in run}
        slow.difference_update(late)
        return 1000.0 if late else 0.1

    assert len(rehearse(hedged, duration=duration)) == 60
    assert hedged.report.hedges
    assert hedged.report.wall_s < 100


def test_what_batches_and_reduces_is_rehearsed_too(stream: zds.ChunkStream[Any]) -> None:
    [answer] = rehearse(stream.reduce(zds.reducers.sum()), losses={(3,): 1}, script={(5,): [TimeoutError()]})
    assert int(answer.data) == sum(range(60))
    assert [len(batch) for batch in rehearse(stream.batch(size=25))] == [25, 25, 10]
