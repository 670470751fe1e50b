"""Items in batches, to sinks by key, and functions of many chunks: on the sequential executor and on a cluster."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from distributed import Client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import zarr_dask_stream as zds
from counted import balanced

N = 25
NBYTES = 16


@pytest.fixture(scope="module")
def data() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 1000, 4 * N).astype("i4")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, data: np.ndarray) -> str:
    path = str(tmp_path_factory.mktemp("batches") / "array.zarr")
    array = zarr.create_array(path, shape=data.shape, chunks=(4,), dtype="i4")
    array[:] = data
    return path


def numbers(batches: Any) -> list[list[int]]:
    return [[chunk.index[0] for chunk in batch] for batch in batches]


def whole(report: zds.Report) -> bool:
    return balanced(report) and report.total == N


# -- batches ------------------------------------------------------------------------------------------


def test_batches_hold_all_items_in_order(url: str, data: np.ndarray, concurrency: int | None) -> None:
    stream = zds.stream_chunks(url, concurrency=concurrency).batch(size=10)
    batches = list(stream)
    assert numbers(batches) == [list(range(10)), list(range(10, 20)), list(range(20, 25))]
    assert [batch.trigger for batch in batches] == ["size", "size", "end"]
    assert [batch.nbytes for batch in batches] == [10 * NBYTES, 10 * NBYTES, 5 * NBYTES]
    np.testing.assert_array_equal(np.concatenate([chunk.data for batch in batches for chunk in batch]), data)
    assert stream.report.emitted == N
    assert stream.report.outcome == "done"
    assert whole(stream.report)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bounds=st.tuples(st.none() | st.integers(1, 30), st.none() | st.integers(1, 200)),
    limit=st.none() | st.integers(0, 30),
    concurrency=st.none() | st.integers(2, 6),
    ordered=st.booleans(),
)
def test_any_bounds_on_a_cluster(
    threads_client: Client, url: str, *, bounds: tuple[Any, Any], limit: Any, concurrency: Any, ordered: bool
) -> None:
    size, nbytes = bounds
    if size is None and nbytes is None:
        size = 7
    stream = zds.stream_chunks(url, client=threads_client, concurrency=concurrency, ordered=ordered)
    batched = (stream if limit is None else stream.take(limit)).batch(size, bytes=nbytes)
    batches = list(batched)
    count = N if limit is None else min(limit, N)
    flat = [number for batch in numbers(batches) for number in batch]
    assert len(flat) == len(set(flat)) == count
    if ordered:
        assert flat == list(range(count))
    most = min(size or N, max((nbytes or 10**9) // NBYTES, 1))
    assert [len(batch) for batch in batches] == [most] * (count // most) + [count % most] * (count % most > 0)
    assert concurrency is None or batched.report.peak_chunks_in_flight <= concurrency
    assert batched.report.emitted == count
    assert whole(batched.report)


def test_a_batch_may_be_larger_than_the_window(url: str) -> None:
    stream = zds.stream_chunks(url, concurrency=1).batch(size=12)
    assert [len(batch) for batch in stream] == [12, 12, 1]
    assert stream.report.peak_chunks_in_flight == 1


def test_no_batch_is_larger_than_what_may_be_in_flight(url: str, concurrency: int | None) -> None:
    stream = zds.stream_chunks(url, concurrency=concurrency, max_bytes=5 * NBYTES)
    for batched in (stream.batch(size=100), stream.batch(seconds=1000), stream.batch(bytes="1 MiB")):
        batches = list(batched)
        assert [(len(batch), batch.trigger) for batch in batches] == [(5, "bytes")] * 5
        assert batched.report.peak_bytes_in_flight <= 5 * NBYTES
    small = stream.map(lambda chunk: int(chunk.data[0])).batch(size=10, bytes=10**9)
    assert max(map(len, small)) == 1, "a number may weigh 64 bytes"


def test_results_are_weighed_not_chunks(url: str) -> None:
    stream = zds.stream_chunks(url, concurrency=1).map(lambda _: np.zeros(100)).batch(bytes=2000)
    assert [(len(batch), batch.trigger) for batch in stream][:2] == [(2, "bytes"), (2, "bytes")]


GATE = threading.Event()


def wait_at_the_gate(chunk: zds.Chunk) -> int:
    if chunk.index[0] >= 3:
        assert GATE.wait(60)
    return 0


def test_a_batch_closes_by_the_clock_while_nothing_arrives(url: str) -> None:
    GATE.clear()
    stream = zds.stream_chunks(url, concurrency=4).map(wait_at_the_gate).batch(size=20, seconds=0.2)
    early = 0
    try:
        for batch in stream:
            if early < 3:  # the fourth chunk waits for us
                assert batch.trigger == "seconds"
                early += len(batch)
            if early == 3:
                GATE.set()
    finally:
        GATE.set()
    assert early == 3
    assert whole(stream.report)


def test_a_batch_closes_by_the_clock_under_async_for(url: str) -> None:
    async def main() -> list[zds.Batch]:
        batches = []
        async for batch in zds.stream_chunks(url, concurrency=4).map(wait_at_the_gate).batch(size=20, seconds=0.2):
            batches.append(batch)
            if sum(map(len, batches)) == 3:
                GATE.set()
        return batches

    GATE.clear()
    try:
        batches = asyncio.run(main())
    finally:
        GATE.set()
    assert sum(map(len, batches)) == N
    assert batches[0].trigger == "seconds"


def test_time_spent_with_a_batch_does_not_close_the_next_one(url: str) -> None:
    # An item is left over whenever a batch closes by its bytes, and waits while the consumer is at work.
    stream = zds.stream_chunks(url, concurrency=1).map(lambda _: np.zeros(10)).batch(bytes=200, seconds=0.5)
    batches = iter(stream)
    first = next(batches)
    threading.Event().wait(1.0)
    assert (len(first), first.trigger) == (2, "bytes")
    assert next(batches).trigger == "bytes"


def test_leaving_early_cancels_what_was_gathered(url: str, concurrency: int | None) -> None:
    stream = zds.stream_chunks(url, concurrency=concurrency).batch(size=4)
    for batch in itertools.islice(stream, 2):
        assert len(batch) == 4
    assert stream.report.emitted == 8
    assert stream.report.cancelled == N - 8
    assert stream.report.outcome == "stopped early"
    assert whole(stream.report)


def test_draining_hands_out_what_was_gathered(url: str) -> None:
    stream = zds.stream_chunks(url, concurrency=1).batch(size=4)
    batches = []
    for batch in stream:
        batches.append(batch)
        stream.drain()
    assert batches[0].trigger == "size"
    assert sum(map(len, batches)) == stream.report.emitted
    assert whole(stream.report)


def test_what_fails_or_is_filtered_is_in_no_batch(url: str, concurrency: int | None) -> None:
    def stumble(chunk: zds.Chunk) -> int:
        if chunk.index[0] % 5 == 3:
            raise ValueError("three")
        return int(chunk.index[0])

    stream = zds.stream_chunks(url, concurrency=concurrency, on_error="skip")
    batched = stream.filter(lambda chunk: chunk.index[0] % 5 != 1).map(stumble).batch(size=6)
    assert numbers(batched) == [[0, 2, 4, 5, 7, 9], [10, 12, 14, 15, 17, 19], [20, 22, 24]]
    assert (batched.report.filtered, batched.report.dead_lettered) == (5, 5)
    assert whole(batched.report)


def test_a_batch_is_done_when_the_consumer_comes_back(url: str, tmp_path: Path) -> None:
    whole = numbers(zds.stream_chunks(url, concurrency=1).batch(size=4))
    for stop in range(1, len(whole) + 1):
        ledger = str(tmp_path / f"{stop}.ledger")

        def stream(ledger: str = ledger) -> zds.ChunkStream[zds.Batch]:
            return zds.stream_chunks(url, concurrency=1, checkpoint=ledger).batch(size=4)

        head = numbers(itertools.islice(stream(), stop))
        rest = numbers(stream())
        assert head + rest[1:] == whole
        assert head[-1] == rest[0], "the last one was not acknowledged"
        assert numbers(stream()) == []


def test_batches_under_async_for(url: str, concurrency: int | None) -> None:
    stream = zds.stream_chunks(url, concurrency=concurrency).batch(size=10)

    async def main() -> list[zds.Batch]:
        return [batch async for batch in stream]

    assert numbers(asyncio.run(main())) == [list(range(10)), list(range(10, 20)), list(range(20, 25))]
    assert whole(stream.report)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda s: s.batch(), "needs a bound"),
        (lambda s: s.batch(0), "size of a batch is a whole number"),
        (lambda s: s.batch(bytes="many"), 'bytes is bytes, a size such as "512 MiB"'),
        (lambda s: s.batch(seconds=-1), "seconds of a batch"),
        (lambda s: s.batch(3).map(len), "put other stages before it"),
        (lambda s: s.batch(3).take(1), "put other stages before it"),
        (lambda s: s.batch(3).batch(3), "put other stages before it"),
        (lambda s: s.batch(3).reduce(zds.reducers.count()), "choose one of them"),
        (lambda s: s.batch(3).group_by(len), "put other stages before it"),
        (lambda s: s.batch(3).window(every=3), "choose one of them"),
        (lambda s: s.reduce(zds.reducers.count()).batch(3), "one by one"),
        (lambda s: s.batch(3).producer(), r"leave .batch\(...\) and .route\(...\) out"),
        (lambda s: s.batch(3).share(2), r"leave .batch\(...\) and .route\(...\) out"),
        (lambda s: s.batch(3).to_delayed(), "no place there"),
        (lambda s: s.map_batch(3, size=2), "map_batch needs a function of a batch"),
        (lambda s: s.map_batch(lambda: 1, size=2), "with one argument"),
        (lambda s: s.map_batch(len), "needs a bound"),
        (lambda s: s.map_batch(len, size=0), "size of a batch"),
        (lambda s: s.route(3, {"a": print}), "route needs a function"),
        (lambda s: s.route(len, {}), "needs sinks"),
        (lambda s: s.route(len, [print]), "needs sinks"),
        (lambda s: s.route(len, {"a": 3}), "the sink 'a' needs a function"),
        (lambda s: s.route(len, {"a": lambda: 1}), "the sink 'a' calls"),
        (lambda s: s.route(len, {"a": print}).route(len, {"a": print}), "have their sinks"),
        (lambda s: s.route(len, {"a": print}).batch(3), "put other stages before it"),
        (lambda s: s.reduce(zds.reducers.count()).route(len, {"a": print}), "hands out answers"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_read(
    url: str, make: Callable[[Any], Any], says: str
) -> None:
    with pytest.raises(zds.UsageError, match=says):
        make(zds.stream_chunks(url))


def test_a_repr_names_the_stages(url: str) -> None:
    stream = zds.stream_chunks(url)
    assert "mapbatch, batch, route" in repr(stream.map_batch(list, size=2).batch(3).route(parity, {"a": print}))
    assert "window, reduce" in repr(stream.window(every=3).reduce(zds.reducers.count()))


# -- sinks --------------------------------------------------------------------------------------------


def parity(chunk: zds.Chunk) -> str:
    return "odd" if chunk.index[0] % 2 else "even"


class Sinks:
    def __init__(self, fails: Callable[[Any], bool] = lambda _: False) -> None:
        self.fails = fails
        self.got: dict[str, list[Any]] = {"odd": [], "even": []}

    def taker(self, name: str) -> Callable[[Any], None]:
        def take(item: Any) -> None:
            if self.fails(item):
                raise OSError(f"{name} is full")
            self.got[name].append(item)

        return take

    def __call__(self) -> dict[str, Callable[[Any], None]]:
        return {name: self.taker(name) for name in self.got}


def test_items_go_to_the_sink_of_their_key_in_batches_of_their_own(url: str, concurrency: int | None) -> None:
    sinks = Sinks()
    stream = zds.stream_chunks(url, concurrency=concurrency).batch(size=5).route(parity, sinks())
    report = stream.run()
    assert numbers(sinks.got["even"]) == [[0, 2, 4, 6, 8], [10, 12, 14, 16, 18], [20, 22, 24]]
    assert numbers(sinks.got["odd"]) == [[1, 3, 5, 7, 9], [11, 13, 15, 17, 19], [21, 23]]
    assert [(batch.key, batch.trigger) for batch in sinks.got["odd"]] == [("odd", "size")] * 2 + [("odd", "end")]
    assert report.emitted == N
    assert whole(report)


def test_without_batches_a_sink_gets_one_item_after_the_other(url: str) -> None:
    sinks = Sinks()
    stream = zds.stream_chunks(url, concurrency=1).map(lambda chunk: int(chunk.data[0])).route(parity, sinks())
    taken = list(stream)
    assert all(isinstance(chunk, zds.Chunk) for chunk in taken)
    assert [chunk.index[0] for chunk in taken] == list(range(N))
    assert [chunk.index[0] for chunk in sinks.got["odd"]] == list(range(1, N, 2))
    assert whole(stream.report)


def test_a_sink_that_fails_loses_its_own_items_only(url: str, concurrency: int | None) -> None:
    sinks = Sinks(lambda batch: 13 in [chunk.index[0] for chunk in batch])
    stream = zds.stream_chunks(url, concurrency=concurrency, on_error="skip").batch(size=5).route(parity, sinks())
    report = stream.run()
    assert numbers(sinks.got["odd"]) == [[1, 3, 5, 7, 9], [21, 23]]
    assert sum(map(len, sinks.got["even"])) == 13
    assert [letter.index[0] for letter in report.dead_letters] == [11, 13, 15, 17, 19]
    letter = report.dead_letters[0]
    assert (letter.error_type, letter.message, letter.reason) == ("OSError", "odd is full", "the sink 'odd' raised")
    assert (letter.category, letter.attempts) == ("function", 1)
    assert "test_stream_batches" in letter.traceback
    assert whole(report)


def test_a_sink_that_fails_stops_the_stream_unless_told_otherwise(url: str) -> None:
    sinks = Sinks(lambda chunk: chunk.index == (7,))
    stream = zds.stream_chunks(url, concurrency=1).route(parity, sinks())
    with pytest.raises(zds.ChunkError, match=r"chunk \(7,\).*OSError: odd is full \(the sink 'odd' raised\)") as caught:
        stream.run()
    assert isinstance(caught.value.__cause__, OSError)
    assert (stream.report.emitted, stream.report.dead_lettered, stream.report.cancelled) == (7, 1, 17)
    assert whole(stream.report)


class Flaky:
    """A sink that fails some times, and then takes what it is given."""

    def __init__(self, times: int, error: Exception) -> None:
        self.left, self.error = times, error
        self.calls: list[Any] = []
        self.got: list[Any] = []

    def __call__(self, batch: Any) -> None:
        self.calls.append(batch)
        if self.left:
            self.left -= 1
            raise self.error
        self.got.append(batch)


SOON = zds.RetryPolicy(attempts=4, wait_initial=0.001)


def test_a_sink_is_called_again_as_its_policy_says(url: str, concurrency: int | None) -> None:
    sink = Flaky(2, OSError("the database is restarting"))
    stream = zds.stream_chunks(url, concurrency=concurrency).batch(size=5)
    report = stream.route(lambda _: "all", {"all": sink}, retry=SOON).run()
    assert numbers(sink.got) == [list(range(n, n + 5)) for n in range(0, N, 5)], "nothing twice, nothing out of order"
    assert [len(sink.calls), report.retries, report.emitted, report.dead_lettered] == [7, 10, N, 0]
    assert balanced(report)


def test_a_sink_that_goes_on_failing_is_named_in_the_dead_letters(url: str) -> None:
    sink = Flaky(4, OSError("the disk is full"))
    stream = zds.stream_chunks(url, concurrency=1, on_error="skip").batch(size=5)
    report = stream.route(lambda _: "disk", {"disk": sink}, retry=SOON).run()
    assert [letter.index[0] for letter in report.dead_letters] == [0, 1, 2, 3, 4]
    letter = report.dead_letters[0]
    assert (letter.reason, letter.attempts, letter.message) == ("the sink 'disk' raised 4 times", 4, "the disk is full")
    assert sum(map(len, sink.got)) == N - 5
    assert balanced(report)


def test_errors_that_a_policy_does_not_name_are_final(url: str) -> None:
    sink, policy = Flaky(1, ValueError("no such table")), zds.RetryPolicy(wait_initial=0.001, on=OSError)
    stream = zds.stream_chunks(url, concurrency=1, on_error="skip").batch(size=5)
    report = stream.route(lambda _: "all", {"all": sink}, retry=policy).run()
    assert (report.dead_lettered, report.retries, report.emitted) == (5, 0, N - 5)
    with pytest.raises(zds.UsageError, match="retry must be a RetryPolicy, got int: 3"):
        stream.route(len, {"a": print}, retry=3)  # type: ignore[arg-type]


def test_a_stream_that_is_closed_does_not_wait_for_a_sink(url: str, tmp_path: Path) -> None:
    """What the sink has not taken is not done, and comes again."""
    ledger = str(tmp_path / "ledger")
    stream = zds.stream_chunks(url, concurrency=1, checkpoint=ledger).batch(size=5)
    sink = Flaky(9, OSError("busy"))

    def closing(batch: Any) -> None:
        routed.close()
        sink(batch)

    routed = stream.route(lambda _: "all", {"all": closing}, retry=zds.RetryPolicy(wait_initial=30.0, wait_jitter=0.0))
    report = routed.run()
    assert (report.outcome, report.emitted, report.cancelled, len(sink.calls)) == ("stopped early", 0, N, 1)
    assert balanced(report)
    again = Flaky(0, OSError())
    assert stream.route(lambda _: "all", {"all": again}).run().emitted == N
    assert report.wall_s < 30


def test_a_sink_that_is_awaited_is_called_again_too(url: str) -> None:
    sink = Flaky(1, OSError("reset"))

    async def send(batch: Any) -> None:
        sink(batch)

    async def main() -> int:
        async with Client(processes=False, asynchronous=True, dashboard_address=None, n_workers=1) as client:
            stream = zds.stream_chunks(url, client=client).batch(size=5)
            taken = [batch async for batch in stream.route(lambda _: "all", {"all": send}, retry=SOON)]
            return sum(map(len, taken))

    assert asyncio.run(main()) == N
    assert sum(map(len, sink.got)) == N


def test_an_item_without_a_sink_is_a_dead_letter(url: str) -> None:
    def key(chunk: zds.Chunk) -> Any:
        number = chunk.index[0]
        return {3: "none", 4: 1 // (number - 4) if number == 4 else 0, 5: []}.get(number, "all")

    got: list[Any] = []
    stream = zds.stream_chunks(url, concurrency=1, on_error="skip").batch(size=100).route(key, {"all": got.append})
    report = stream.run()
    assert sum(map(len, got)) == N - 3
    assert [(letter.index[0], letter.error_type) for letter in report.dead_letters] == [
        (3, "UsageError"),
        (4, "ZeroDivisionError"),
        (5, "TypeError"),
    ]
    assert "the key of chunk (3,) is 'none', and there are sinks for 'all'" in report.dead_letters[0].message
    assert whole(report)


def test_what_a_sink_has_taken_is_done_and_what_it_refused_is_tried_again(url: str, tmp_path: Path) -> None:
    ledger = str(tmp_path / "ledger")

    def run(sinks: Sinks) -> zds.Report:
        stream = zds.stream_chunks(url, concurrency=1, on_error="skip", checkpoint=ledger)
        return stream.batch(size=5).route(parity, sinks()).run()

    first = Sinks(lambda batch: batch.key == "odd")
    assert run(first).dead_lettered == 12
    second = Sinks()
    report = run(second)
    assert (report.resumed, report.emitted) == (13, 12)
    assert numbers(second.got["odd"]) == [[1, 3, 5, 7, 9], [11, 13, 15, 17, 19], [21, 23]]
    assert second.got["even"] == []


def test_each_sink_has_its_items_once_though_the_run_is_stopped_after_any(url: str, tmp_path: Path) -> None:
    for stop in range(1, 6):
        ledger = str(tmp_path / f"{stop}.ledger")
        got: list[Any] = []
        stream = zds.stream_chunks(url, concurrency=1, checkpoint=ledger).batch(size=5)
        routed = stream.route(parity, {"odd": got.append, "even": got.append})
        for _ in itertools.islice(routed, stop):
            pass
        routed.run()
        assert sorted(number for batch in numbers(got) for number in batch) == list(range(N))


def test_coroutine_sinks_are_awaited_and_others_leave_the_loop_alone(url: str) -> None:
    threads: set[int] = set()
    got: list[int] = []

    async def odd(batch: zds.Batch) -> None:
        await asyncio.sleep(0)
        if batch[0].index[0] == 11:
            raise OSError("full")
        got.extend(number for [number] in numbers([[chunk] for chunk in batch]))

    def even(batch: zds.Batch) -> None:
        threads.add(threading.get_ident())
        got.extend(number for [number] in numbers([[chunk] for chunk in batch]))

    stream = zds.stream_chunks(url, on_error="skip").batch(size=5).route(parity, {"odd": odd, "even": even})
    with pytest.raises(zds.UsageError, match="the sink 'odd' is a coroutine function"):
        stream.run()

    async def main() -> None:
        async for batch in stream:
            assert batch.key in ("odd", "even")

    asyncio.run(main())
    assert sorted(got) == [n for n in range(N) if n not in (11, 13, 15, 17, 19)]
    assert threading.get_ident() not in threads
    assert stream.report.dead_lettered == 5
    assert whole(stream.report)


# -- functions of many --------------------------------------------------------------------------------


def totals(batch: zds.Batch) -> Any:
    return np.stack([chunk.data for chunk in batch]).sum(axis=1)


def test_a_function_of_many_gives_each_chunk_its_own_value(url: str, data: np.ndarray, concurrency: int | None) -> None:
    stream = zds.stream_chunks(url, concurrency=concurrency).map_batch(totals, size=8)
    assert {chunk.index[0]: int(chunk.data) for chunk in stream} == dict(enumerate(data.reshape(N, 4).sum(axis=1)))
    assert whole(stream.report)


def sizes(batch: zds.Batch) -> list[tuple[int, str]]:
    return [(len(batch), batch.trigger)] * len(batch)


def test_tasks_are_cut_into_whole_batches(url: str) -> None:
    chunks = list(zds.stream_chunks(url, concurrency=100).map_batch(sizes, size=8))
    assert [chunk.data for chunk in chunks] == [(8, "size")] * 24 + [(1, "end")]
    tight = list(zds.stream_chunks(url, concurrency=5).map_batch(sizes, size=8))
    assert [chunk.data for chunk in tight] == [(5, "end")] * 25, "no more than may be in flight"
    weighed = list(zds.stream_chunks(url, concurrency=100).map_batch(sizes, size=8, bytes=3 * NBYTES))
    assert {chunk.data for chunk in weighed} <= {(3, "bytes"), (2, "end"), (1, "end")}


def test_stages_before_and_after_a_function_of_many(url: str, concurrency: int | None) -> None:
    stream = (
        zds.stream_chunks(url, concurrency=concurrency)
        .filter(lambda chunk: chunk.index[0] % 3 > 0)
        .map(lambda chunk: chunk.index[0])
        .map_batch(lambda batch: [chunk.data * 10 for chunk in batch], size=4)
        .map(lambda chunk: chunk.data + 1)
        .map_batch(lambda batch: [-chunk.data for chunk in batch], size=3)
        .filter(lambda chunk: chunk.data != -71)
    )
    assert [chunk.data for chunk in stream] == [-(10 * n + 1) for n in range(N) if n % 3 and n != 7]
    assert whole(stream.report)


def test_what_a_function_of_many_returns_can_be_folded(url: str, data: np.ndarray, concurrency: int | None) -> None:
    stream = zds.stream_chunks(url, concurrency=concurrency).map_batch(totals, size=8).reduce(zds.reducers.sum())
    assert stream.compute() == data.sum()


def refuse_seven(batch: zds.Batch) -> list[int]:
    if any(chunk.index == (7,) for chunk in batch):
        raise ArithmeticError(f"seven is among {len(batch)}")
    return [chunk.index[0] for chunk in batch]


def test_a_function_that_fails_for_one_chunk_fails_for_that_chunk(url: str, concurrency: int | None) -> None:
    stream = zds.stream_chunks(url, concurrency=concurrency, on_error="skip").map_batch(refuse_seven, size=8)
    assert [chunk.data for chunk in stream] == [n for n in range(N) if n != 7]
    [letter] = stream.report.dead_letters
    assert (letter.index, letter.error_type, letter.message) == ((7,), "ArithmeticError", "seven is among 1")
    assert whole(stream.report)
    with pytest.raises(zds.ChunkError, match="seven is among 1"):
        list(zds.stream_chunks(url, concurrency=concurrency).map_batch(refuse_seven, size=8))


def test_a_wrong_number_of_values_is_said_at_once(url: str, concurrency: int | None) -> None:
    stream = zds.stream_chunks(url, concurrency=concurrency).map_batch(lambda _: [1, 2, 3], size=8)
    with pytest.raises(zds.ChunkError, match="returned 3 values: return one for each"):
        list(stream)


def test_missing_chunks_stay_marked(tmp_path: Path) -> None:
    array = zarr.create_array(str(tmp_path / "sparse"), shape=(8,), chunks=(2,), dtype="i4", fill_value=9)
    array[:2] = 1
    stream = zds.stream_chunks(str(tmp_path / "sparse")).map_batch(totals, size=3)
    assert [(int(chunk.data), chunk.missing) for chunk in stream] == [(2, False), (18, True), (18, True), (18, True)]


def test_each_chunk_of_a_graph_of_ones_own_is_a_batch_of_one(url: str) -> None:
    task = next(iter(zds.stream_chunks(url).map_batch(sizes, size=8).to_delayed()))
    assert task.compute(scheduler="sync").data == (1, "end")


# -- on worker processes ------------------------------------------------------------------------------


@pytest.mark.cluster
def test_all_of_it_on_worker_processes(client: Client, url: str, data: np.ndarray) -> None:
    got: dict[bool, list[Any]] = {True: [], False: []}
    stream = zds.stream_chunks(url, client=client, on_error="skip").map_batch(
        lambda batch: np.stack([chunk.data for chunk in batch]).sum(axis=1), size=4
    )
    routed = stream.batch(size=3).route(
        lambda chunk: bool(chunk.data > 2000), {True: got[True].append, False: got[False].append}
    )
    report = routed.run()
    sums = data.reshape(N, 4).sum(axis=1)
    for large, batches in got.items():
        assert [number for batch in numbers(batches) for number in batch] == np.flatnonzero(
            (sums > 2000) == large
        ).tolist()
        assert [len(batch) for batch in batches[:-1]] == [3] * (len(batches) - 1)
    assert whole(report)
