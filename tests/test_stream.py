"""The façade, on the sequential executor and on the cluster inside this process."""

from __future__ import annotations

import asyncio
import itertools
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import dask
import distributed
import numpy as np
import pytest
import zarr

import zarr_dask_stream as zds
from counted import balanced
from zarr_dask_stream.engine.events import ChunksEmitted, Notice, RunFinished, RunStarted

pytestmark = pytest.mark.usefixtures("no_default_client")

SHAPE, CHUNKS = (23, 17), (5, 4)


@pytest.fixture(scope="module")
def data() -> np.ndarray:
    return np.random.default_rng(7).integers(0, 1000, SHAPE).astype("i4")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, data: np.ndarray) -> str:
    path = tmp_path_factory.mktemp("stream") / "array.zarr"
    array = zarr.create_array(str(path), shape=SHAPE, chunks=CHUNKS, dtype="i4", fill_value=-1)
    array[:] = data
    return str(path)


@pytest.fixture
def sparse(tmp_path: Path) -> str:
    """Four chunks, of which (0, 1) and (1, 0) are not stored."""
    array = zarr.create_array(str(tmp_path / "sparse"), shape=(4, 4), chunks=(2, 2), dtype="f4", fill_value=9)
    array[:2, :2] = 1
    array[2:, 2:] = 2
    return str(tmp_path / "sparse")


def assemble(stream: zds.ChunkStream, out: np.ndarray) -> np.ndarray:
    for chunk in stream:
        out[chunk.region] = chunk.data
    return out


# -- the main path ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [True, False])
def test_streams_whole_array(url: str, data: np.ndarray, concurrency: int | None, ordered: bool) -> None:
    stream = zds.stream_chunks(url, concurrency=concurrency, ordered=ordered)
    np.testing.assert_array_equal(assemble(stream, np.zeros_like(data)), data)
    assert len(stream) == 25
    assert stream.report.emitted == 25
    assert stream.report.outcome == "done"
    assert balanced(stream.report)


def test_ordered_is_grid_order(url: str, concurrency: int | None) -> None:
    indices = [chunk.index for chunk in zds.stream_chunks(url, concurrency=concurrency)]
    assert indices == [(i, j) for i in range(5) for j in range(5)]


def test_each_iteration_is_a_new_run(url: str) -> None:
    stream = zds.stream_chunks(url, concurrency=1)
    assert len(list(stream)) == 25
    first = stream.report
    assert len(list(stream)) == 25
    assert stream.report is not first


def test_region_crops(url: str, data: np.ndarray, concurrency: int | None) -> None:
    region = (slice(3, 11), slice(-6, None))
    stream = zds.stream_chunks(url, region=region, concurrency=concurrency)
    out = assemble(stream, np.full_like(data, -7))
    expected = np.full_like(data, -7)
    expected[region] = data[region]
    np.testing.assert_array_equal(out, expected)
    assert stream.report.total == len(stream) == 9


def test_where_is_asked_before_any_read(url: str) -> None:
    asked: list[tuple[int, ...]] = []

    def diagonal(index: tuple[int, ...]) -> bool:
        asked.append(index)
        return index[0] == index[1]

    stream = zds.stream_chunks(url, where=diagonal, concurrency=1)
    assert [chunk.index for chunk in stream] == [(i, i) for i in range(5)]
    assert len(asked) == 25
    assert stream.report.total == 5
    assert stream.report.batches == 5


def test_map_runs_where_the_chunk_is(url: str, data: np.ndarray, concurrency: int | None) -> None:
    stream = zds.stream_chunks(url, concurrency=concurrency).map(lambda c: int(c.data.sum())).map(lambda c: c.data * 2)
    assert sum(chunk.data for chunk in stream) == 2 * int(data.sum())


def test_map_may_return_none(url: str) -> None:
    assert [chunk.data for chunk in zds.stream_chunks(url, concurrency=1).map(lambda _: None)] == [None] * 25


def test_filter_drops_after_the_read(url: str, concurrency: int | None) -> None:
    stream = zds.stream_chunks(url, concurrency=concurrency).filter(lambda c: c.index[1] < 2)
    assert len(list(stream)) == 10
    assert stream.report.filtered == 15
    assert balanced(stream.report)


def test_take_reads_no_more_than_it_hands_out(url: str, concurrency: int | None) -> None:
    stream = zds.stream_chunks(url, concurrency=concurrency).take(7)
    assert [c.index for c in stream] == [(i, j) for i in range(5) for j in range(5)][:7]
    assert len(stream) == 7
    assert stream.report.bytes_decoded <= 7 * 5 * 4 * 4
    assert stream.report.cancelled == 18
    assert balanced(stream.report)


def test_take_after_filter_goes_on_until_it_has_enough(url: str) -> None:
    stream = zds.stream_chunks(url, concurrency=1).filter(lambda c: c.index[1] == 4).take(3)
    assert [c.index for c in stream] == [(0, 4), (1, 4), (2, 4)]
    assert stream.report.filtered == 12
    assert balanced(stream.report)


def test_take_nothing(url: str) -> None:
    stream = zds.stream_chunks(url, concurrency=1).take(0)
    assert list(stream) == []
    assert stream.report.bytes_stored == 0
    assert balanced(stream.report)


def test_run_drains_for_effects(url: str, concurrency: int | None) -> None:
    report = zds.stream_chunks(url, concurrency=concurrency).map(lambda c: c.data).run()
    assert report.emitted == 25
    assert balanced(report)


def test_to_delayed_composes_with_other_graphs(url: str, data: np.ndarray) -> None:
    tasks = list(zds.stream_chunks(url).map(lambda c: int(c.data.sum())).to_delayed())
    assert len(tasks) == 25
    chunks = dask.compute(*tasks, scheduler="sync")  # type: ignore[attr-defined,no-untyped-call]  # dask has no stubs
    assert sum(chunk.data for chunk in chunks) == int(data.sum())
    assert chunks[7].index == (1, 2)


def test_tasks_outlive_their_stream() -> None:
    array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4", fill_value=3)
    tasks = list(zds.stream_chunks(array).to_delayed())
    chunks = dask.compute(*tasks, scheduler="sync")  # type: ignore[attr-defined,no-untyped-call]  # as above
    assert [chunk.data.sum() for chunk in chunks] == [6, 6, 6]


def test_numpy_takes_a_chunk_as_an_array(url: str, data: np.ndarray) -> None:
    chunk = next(iter(zds.stream_chunks(url, concurrency=1)))
    np.testing.assert_array_equal(np.asarray(chunk), data[:5, :4])
    assert chunk.data.flags.writeable
    assert "\n" not in repr(chunk)


# -- missing chunks -----------------------------------------------------------------------------------


def test_missing_fill(sparse: str, concurrency: int | None) -> None:
    chunks = list(zds.stream_chunks(sparse, concurrency=concurrency))
    assert [chunk.missing for chunk in chunks] == [False, True, True, False]
    np.testing.assert_array_equal(chunks[1].data, np.full((2, 2), 9, "f4"))


def test_missing_skip(sparse: str, concurrency: int | None) -> None:
    stream = zds.stream_chunks(sparse, concurrency=concurrency, missing="skip")
    assert [chunk.index for chunk in stream] == [(0, 0), (1, 1)]
    assert stream.report.skipped_missing == 2
    assert balanced(stream.report)


def test_missing_skip_asks_for_nothing_absent(tmp_path: Path) -> None:
    array = zarr.create_array(str(tmp_path / "wide"), shape=(1000, 1000), chunks=(1, 1), dtype="i1", fill_value=0)
    array[17, 4] = array[17, 990] = array[999, 999] = 1
    stream = zds.stream_chunks(str(tmp_path / "wide"), missing="skip", region=(..., slice(0, 995)))
    assert [chunk.index for chunk in stream] == [(17, 4), (17, 990)]
    assert stream.report.skipped_missing == 995_000 - 2
    assert sum(worker.chunks for worker in stream.report.workers.values()) == 2
    assert balanced(stream.report)


def test_missing_skip_without_a_listing(http_store: Any) -> None:
    """Plain HTTP can't be listed: then absent chunks are asked for one by one."""
    array = zarr.create_array(str(http_store.directory / "a"), shape=(4, 4), chunks=(2, 2), dtype="f4", fill_value=9)
    array[:2, :2] = 1
    stream = zds.stream_chunks(f"{http_store.url}/a", missing="skip")
    assert [chunk.index for chunk in stream] == [(0, 0)]
    assert stream.report.skipped_missing == 3


def test_missing_raise_names_the_chunk(sparse: str, concurrency: int | None) -> None:
    stream = zds.stream_chunks(sparse, concurrency=concurrency, missing="raise")
    with pytest.raises(zds.ChunkError, match="is not stored") as caught:
        list(stream)
    assert isinstance(caught.value.__cause__, zds.errors.MissingChunkError)
    assert caught.value.index in {(0, 1), (1, 0)}
    assert caught.value.attempts == 1
    assert balanced(stream.report)


# -- failures -----------------------------------------------------------------------------------------


def fail_at_two_two(chunk: zds.Chunk) -> int:
    if chunk.index == (2, 2):
        raise KeyError("no such station")
    return 1


def test_one_bad_chunk_does_not_fail_the_others(url: str, concurrency: int | None) -> None:
    stream = zds.stream_chunks(url, concurrency=concurrency, on_error="skip").map(fail_at_two_two)
    assert sum(chunk.data for chunk in stream) == 24
    (letter,) = stream.report.dead_letters
    assert (letter.index, letter.attempts, letter.error_type) == ((2, 2), 1, "KeyError")
    assert letter.region == (slice(10, 15), slice(8, 12))
    assert balanced(stream.report)


def test_error_is_raised_with_its_cause(url: str, concurrency: int | None) -> None:
    with pytest.raises(zds.ChunkError, match="no such station") as caught:
        list(zds.stream_chunks(url, concurrency=concurrency).map(fail_at_two_two))
    assert isinstance(caught.value.__cause__, KeyError)


def test_on_error_callable_gets_the_letter(url: str) -> None:
    letters: list[zds.DeadLetter] = []
    stream = zds.stream_chunks(url, concurrency=1, on_error=letters.append).map(fail_at_two_two)
    assert len(list(stream)) == 24
    assert [letter.index for letter in letters] == [(2, 2)]


def test_function_errors_are_retried_only_when_named(url: str) -> None:
    tries: list[int] = []

    def flaky(chunk: zds.Chunk) -> int:
        tries.append(1)
        if len(tries) < 3:
            raise TimeoutError("busy")
        return 1

    policy = zds.RetryPolicy(attempts=5, wait_initial=0.001, on=TimeoutError)
    stream = zds.stream_chunks(url, concurrency=1, retry=policy).map(flaky).take(1)
    assert len(list(stream)) == 1
    assert stream.report.retries == 2


def test_hung_function_is_given_up_and_the_rest_delivered(url: str) -> None:
    hold = threading.Event()

    def hang(chunk: zds.Chunk) -> int:
        if chunk.index == (1, 1):
            time.sleep(30)
        return 1

    policy = zds.RetryPolicy(attempts=1)
    stream = zds.stream_chunks(url, timeout=0.3, retry=policy, on_error="skip").map(hang)
    assert sum(chunk.data for chunk in stream) == 24
    (letter,) = stream.report.dead_letters
    assert letter.index == (1, 1)
    assert letter.error_type == "TimeoutError"
    hold.set()


def test_a_function_that_raises_keyboard_interrupt_fails_its_chunk_only(url: str) -> None:
    def bad(chunk: zds.Chunk) -> int:
        if chunk.index == (1, 1):
            raise KeyboardInterrupt
        return 1

    stream = zds.stream_chunks(url, on_error="skip").map(bad)
    assert sum(chunk.data for chunk in stream) == 24
    assert stream.report.dead_letters[0].error_type == "KeyboardInterrupt"


def test_numpy_integers_are_integers(url: str) -> None:
    assert len(list(zds.stream_chunks(url, concurrency=np.int64(1)).take(np.int64(2)))) == 2  # type: ignore[arg-type]  # callers need not be typed


def test_a_stream_travels_by_pickle_without_its_runs(url: str) -> None:
    stream = zds.stream_chunks(url, concurrency=1).take(3)
    list(stream)
    again = pickle.loads(pickle.dumps(stream))
    assert again.report.outcome == "not started"
    assert [chunk.index for chunk in again] == [(0, 0), (0, 1), (0, 2)]


def test_filled_chunks_are_counted(sparse: str) -> None:
    stream = zds.stream_chunks(sparse)
    assert len(list(stream)) == 4
    assert stream.report.filled_missing == 2
    assert "came as fill values" in str(stream.report)


# -- reductions ---------------------------------------------------------------------------------------


class Total(zds.Reducer):
    def create(self) -> int:
        return 0

    def add(self, partial: int, chunk: zds.Chunk) -> int:
        return partial + int(np.asarray(chunk.data).sum())

    def merge(self, left: int, right: int) -> int:
        return left + right


def test_reduce(url: str, data: np.ndarray, concurrency: int | None) -> None:
    stream = zds.stream_chunks(url, concurrency=concurrency).reduce(Total())
    assert stream.compute() == int(data.sum())
    (item,) = list(stream)
    assert (item.index, item.data) == ((), int(data.sum()))
    assert stream.report.emitted == 25
    assert balanced(stream.report)


def test_group_by(url: str, data: np.ndarray, concurrency: int | None) -> None:
    stream = zds.stream_chunks(url, concurrency=concurrency).group_by(lambda index: index[0]).reduce({"total": Total()})
    expected = {row: {"total": int(data[5 * row : 5 * row + 5].sum())} for row in range(5)}
    assert stream.compute() == expected


def test_group_by_without_reduce_is_refused(url: str) -> None:
    with pytest.raises(zds.UsageError, match=r"needs a \.reduce"):
        list(zds.stream_chunks(url).group_by(lambda index: index[0]))


# -- bounds -------------------------------------------------------------------------------------------


def test_in_flight_is_bounded_by_count(url: str) -> None:
    stream = zds.stream_chunks(url, concurrency=3)
    for _ in stream:
        time.sleep(0.002)
    assert stream.report.peak_chunks_in_flight <= 3


def test_in_flight_is_bounded_by_bytes(url: str) -> None:
    chunk = 5 * 4 * 4
    stream = zds.stream_chunks(url, max_bytes=4 * chunk + 3)
    assert len(list(stream)) == 25
    assert stream.report.peak_bytes_in_flight <= 4 * chunk


def test_first_chunk_always_passes(url: str) -> None:
    stream = zds.stream_chunks(url, max_bytes=1)
    assert len(list(stream)) == 25
    assert stream.report.peak_chunks_in_flight == 1


def test_a_million_chunks_begin_at_once(tmp_path: Path) -> None:
    zarr.create_array(str(tmp_path / "wide"), shape=(1_000_000,), chunks=(1,), dtype="i1", fill_value=3)
    stream = zds.stream_chunks(str(tmp_path / "wide"))
    chunk = next(iter(stream))
    assert int(chunk.data[0]) == 3
    assert chunk.missing


# -- shapes at the edge -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "chunks", "expected"),
    [((), (), 1), ((0,), (4,), 0), ((3, 0), (2, 2), 0), ((1,), (1,), 1), ((3,), (100,), 1)],
)
def test_odd_shapes(
    tmp_path: Path, shape: tuple[int, ...], chunks: tuple[int, ...], expected: int, concurrency: int | None
) -> None:
    array = zarr.create_array(str(tmp_path / "odd"), shape=shape, chunks=chunks, dtype="f8", fill_value=0.5)
    array[...] = 2.5
    stream = zds.stream_chunks(str(tmp_path / "odd"), concurrency=concurrency)
    chunks_got = list(stream)
    assert len(chunks_got) == len(stream) == expected
    assert all(chunk.data.shape == chunk.shape and (chunk.data == 2.5).all() for chunk in chunks_got)
    assert balanced(stream.report)


# -- leaving early ------------------------------------------------------------------------------------


def test_break_cancels_and_leaves_nothing(url: str, leak_check: Any) -> None:
    stream = zds.stream_chunks(url).map(lambda c: c.data)
    for chunk in stream:
        if chunk.index == (0, 3):
            break
    del chunk
    assert stream.report.outcome == "stopped early"
    assert stream.report.emitted == 4
    assert stream.report.cancelled == 21
    assert balanced(stream.report)


def test_exception_in_the_consumer_cancels(url: str, leak_check: Any) -> None:
    stream = zds.stream_chunks(url)

    def consume() -> None:
        for _ in stream:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        consume()
    assert stream.report.outcome == "stopped early"
    assert balanced(stream.report)


def test_close_ends_a_run_from_another_thread(url: str) -> None:
    stream = zds.stream_chunks(url, concurrency=1)
    got = 0
    for _ in stream:
        got += 1
        if got == 2:
            closer = threading.Thread(target=stream.close)
            closer.start()
            closer.join()
    assert got == 2
    assert stream.report.outcome == "stopped early"
    assert balanced(stream.report)


def test_two_streams_at_once(url: str, data: np.ndarray) -> None:
    pairs = zip(zds.stream_chunks(url), zds.stream_chunks(url, ordered=True), strict=True)
    for left, right in pairs:
        np.testing.assert_array_equal(left.data, right.data)


# -- async --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequential", [True, False])
def test_async_for_without_a_client(url: str, sequential: bool) -> None:
    async def main() -> int:
        stream = zds.stream_chunks(url, concurrency=1 if sequential else None)
        return len([chunk async for chunk in stream])

    assert asyncio.run(main()) == 25


def test_async_client(url: str, data: np.ndarray) -> None:
    async def main() -> int:
        async with (
            distributed.LocalCluster(
                n_workers=1,
                threads_per_worker=2,
                processes=False,
                asynchronous=True,
                dashboard_address="127.0.0.1:0",
                scheduler_kwargs={"dashboard": False},
            ) as cluster,
            distributed.Client(cluster, asynchronous=True) as client,
        ):
            stream = zds.stream_chunks(url, client=client).map(lambda c: int(c.data.sum()))
            with pytest.raises(zds.UsageError, match="async for"):
                list(stream)
            total = 0
            async for chunk in stream:
                total += chunk.data
            async for _ in stream:
                break
            return total

    assert asyncio.run(main()) == int(data.sum())


# -- observers ----------------------------------------------------------------------------------------


def test_observers_hear_each_chunk_end_once(url: str) -> None:
    heard: list[Notice] = []
    list(zds.stream_chunks(url, callbacks=[heard.append]))
    assert isinstance(heard[0], RunStarted)
    assert isinstance(heard[-1], RunFinished)
    numbers = [n for notice in heard if isinstance(notice, ChunksEmitted) for n in notice.numbers]
    assert sorted(numbers) == list(range(25))
    assert all(later.at >= earlier.at for earlier, later in itertools.pairwise(heard))


def test_a_failing_observer_is_dropped(url: str, caplog: pytest.LogCaptureFixture) -> None:
    def broken(_: Notice) -> None:
        raise RuntimeError("observer down")

    assert len(list(zds.stream_chunks(url, concurrency=1, callbacks=[broken]))) == 25
    assert "hears no more" in caplog.text


def test_progress_callback(url: str) -> None:
    calls: list[tuple[int, int]] = []
    list(zds.stream_chunks(url, concurrency=1, progress=lambda done, total: calls.append((done, total))))
    assert calls[-1] == (25, 25)
    assert calls == sorted(calls)


# -- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"concurrency": 0}, "at least one"),
        ({"concurrency": 2.5}, "number of chunks"),
        ({"concurrency": True}, "number of chunks"),
        ({"max_bytes": "lots"}, "max_bytes"),
        ({"max_bytes": 0}, "at least one byte"),
        ({"max_bytes": 0.1}, "10%"),
        ({"path": 1}, "path"),
        ({"storage_options": 1}, "storage_options"),
        ({"progress": lambda: 1}, "progress"),
        ({"max_bytes": "-5%"}, "at least one byte"),
        ({"missing": "ignore"}, "missing"),
        ({"ordered": "yes"}, "ordered"),
        ({"timeout": 0}, "timeout"),
        ({"requests": 0}, "requests"),
        ({"hedge": True}, "Hedge"),
        ({"rate_limit": 5}, "RateLimit"),
        ({"timeout": float("nan")}, "timeout"),
        ({"on_error": "ignore"}, "on_error"),
        ({"retry": 3}, "RetryPolicy"),
        ({"where": 3}, "where"),
        ({"where": lambda: True}, "one argument"),
        ({"region": (slice(0, 1),) * 3}, "3 axes"),
        ({"region": 99}, "outside"),
        ({"region": slice(40, 50)}, "outside"),
        ({"region": slice(0, 4, 2)}, "step"),
        ({"region": "0:3"}, "region"),
        ({"callbacks": 3}, "callbacks"),
        ({"callbacks": [3]}, "callback"),
        ({"client": "tcp://127.0.0.1:8786"}, "distributed.Client"),
        ({"progress": 1}, "progress"),
    ],
)
def test_bad_options_are_refused_before_anything_is_read(url: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(zds.UsageError, match=match):
        zds.stream_chunks(url, **options)


def test_bad_stage_functions(url: str) -> None:
    stream = zds.stream_chunks(url)
    with pytest.raises(zds.UsageError, match="map needs a function"):
        stream.map("sum")  # type: ignore[arg-type]  # callers need not be typed
    with pytest.raises(zds.UsageError, match="one argument"):
        stream.filter(lambda: True)  # type: ignore[arg-type,misc]  # callers need not be typed
    with pytest.raises(zds.UsageError, match="take"):
        stream.take(-1)
    with pytest.raises(zds.UsageError, match=r"before \.take"):
        stream.take(3).filter(lambda _: True)
    with pytest.raises(zds.UsageError, match="no chunks any more"):
        stream.reduce(Total()).map(lambda c: c)
    with pytest.raises(zds.UsageError, match="call it"):
        stream.reduce(Total)  # type: ignore[arg-type]  # callers need not be typed
    with pytest.raises(zds.UsageError, match=r"\.reduce"):
        stream.compute()


def test_unpicklable_function_is_named(url: str) -> None:
    lock = threading.Lock()

    def locked(chunk: zds.Chunk) -> int:
        with lock:
            return 1

    with pytest.raises(zds.UsageError, match="map: its function can't be sent"):
        list(zds.stream_chunks(url).map(locked))


def test_where_that_raises_names_the_index(url: str) -> None:
    with pytest.raises(zds.UsageError, match=r"where\(\(0, 0\)\) raised IndexError"):
        list(zds.stream_chunks(url, where=lambda index: index[5], concurrency=1))


def test_closed_client_is_refused(url: str) -> None:
    client = distributed.Client(
        processes=False,
        n_workers=1,
        dashboard_address="127.0.0.1:0",
        set_as_default=False,
        scheduler_kwargs={"dashboard": False},
    )
    client.close()
    with pytest.raises(zds.UsageError, match="closed"):
        zds.stream_chunks(url, client=client)
