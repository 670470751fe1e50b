"""Windows and triggers of a stream, against NumPy: on the sequential executor, in one process and on a cluster."""

from __future__ import annotations

import asyncio
import itertools
import os
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
from zarr_dask_stream.engine.events import ChunksEmitted, Notice
from zarr_dask_stream.stages.windows import parse_along

SHAPE, CHUNKS = (12, 9, 10), (2, 4, 5)


@pytest.fixture(scope="module")
def data() -> np.ndarray:
    return np.random.default_rng(3).integers(-1000, 1000, SHAPE).astype("i4")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, data: np.ndarray) -> str:
    path = str(tmp_path_factory.mktemp("windows") / "array.zarr")
    array = zarr.create_array(path, shape=SHAPE, chunks=CHUNKS, dtype="i4", dimension_names=("time", "y", "x"))
    array[:] = data
    return path


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, data: np.ndarray) -> str:
    path = str(tmp_path_factory.mktemp("windows") / "sharded.zarr")
    array = zarr.create_array(path, shape=SHAPE, chunks=(1, 3, 5), shards=(4, 6, 10), dtype="i4")
    array[:] = data
    return path


# -- against NumPy --------------------------------------------------------------------------------------


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    region = []
    for n in SHAPE:
        start = draw(st.integers(0, n - 1))
        region.append(slice(start, draw(st.integers(start + 1, n))))
    axes = tuple(sorted(draw(st.sets(st.integers(0, 2), min_size=1))))
    return {
        "region": tuple(region),
        "along": axes,
        "size": tuple(draw(st.integers(1, region[a].stop - region[a].start)) for a in axes),
        "step": tuple(draw(st.integers(1, 12)) for _ in axes),
        "ordered": draw(st.booleans()),
        "sharded": draw(st.booleans()),
        "serial": draw(st.booleans()),
    }


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request=requests())
def test_each_window_is_what_numpy_says(
    threads_client: Client, url: str, sharded: str, data: np.ndarray, *, request: dict[str, Any]
) -> None:
    where = {"concurrency": 1} if request["serial"] else {"client": threads_client}
    stream = zds.stream_chunks(
        sharded if request["sharded"] else url, region=request["region"], ordered=request["ordered"], **where
    )
    reducers = {"sum": zds.reducers.sum(), "range": zds.reducers.max(axis=0), "n": zds.reducers.count()}
    windowed = stream.window(along=request["along"], size=request["size"], step=request["step"]).reduce(reducers)
    results = list(windowed)
    plan = zds.stream_chunks(url, region=request["region"])._options.plan
    along = parse_along(plan, None, request["along"], request["size"], request["step"])
    assert sorted(result.index for result in results) == [along.index(k) for k in range(len(along))]
    if request["ordered"]:
        assert [result.index for result in results] == [along.index(k) for k in range(len(along))]
    for result in results:
        part = data[result.region]
        assert result.data["sum"] == part.sum()
        assert result.data["n"] == part.size
        np.testing.assert_array_equal(result.data["range"], part.max(axis=0))
    assert [result.region for result in sorted(results, key=lambda r: r.index)] == [
        along.region(k) for k in range(len(along))
    ]
    assert windowed.report.emitted == windowed.report.total, "each chunk is read once, in however many windows it is"
    assert balanced(windowed.report)


def test_windows_come_while_the_rest_is_still_to_be_read(url: str, data: np.ndarray) -> None:
    stream = zds.stream_chunks(url, concurrency=1).window(along="time", size=4, step=2).reduce(zds.reducers.mean())
    folded = []
    for result in stream:
        assert float(result.data) == pytest.approx(data[result.region].mean())
        folded.append(stream.report.emitted)
    assert folded == [12, 18, 24, 30, 36], "each as soon as its last chunk is in"


def test_the_mean_over_time_is_built_region_by_region(url: str, data: np.ndarray, concurrency: int | None) -> None:
    stream = zds.stream_chunks(url, concurrency=concurrency).window(along=("y", "x"), size=(4, 5))
    means = stream.reduce(zds.reducers.mean(axis=0))
    out = np.full(SHAPE[1:], np.nan)
    order = []
    for result in means:
        assert result.data.shape == tuple(part.stop - part.start for part in result.region[1:])
        out[result.region[1:]] = result.data
        order.append(result.index)
    assert order == list(itertools.product(range(3), range(2)))
    np.testing.assert_allclose(out, data.mean(axis=0))


def test_chunks_are_read_in_the_order_of_the_windows(url: str) -> None:
    seen: list[int] = []
    stream = zds.stream_chunks(url, concurrency=1, callbacks=[hears(seen)]).window(along=2, size=5)
    for result in stream.reduce(zds.reducers.sum()):
        assert len(seen) == 18 * (result.index + 1)


def hears(seen: list[int]) -> Callable[[Notice], None]:
    def hear(notice: Notice) -> None:
        if isinstance(notice, ChunksEmitted):
            seen.extend(notice.numbers)

    return hear


def test_a_run_holds_partials_of_open_windows_only(url: str) -> None:
    held: list[int] = []

    def look(notice: Notice) -> None:
        if isinstance(notice, ChunksEmitted):
            [run] = stream._runs
            assert run._answers is not None
            held.append(run._answers.nbytes)

    boxes = zds.stream_chunks(url, concurrency=1, callbacks=[look]).rechunk((1, -1, 5))
    for stream, most in (
        (boxes.window(along=(0, 2), size=(1, 5)).reduce(Blob()), 1),
        (boxes.window(along=0, size=4, step=2).reduce(Blob()), 3),
        (boxes.window(along=2, size=5).reduce(Blob()), 1),
    ):
        held.clear()
        assert {len(result.data) for result in stream} == {4000}
        assert max(held) <= most * 4000
        assert len(held) == 24


class Blob(zds.Reducer):
    def create(self) -> Any:
        return bytes(4000)

    def add(self, partial: Any, chunk: zds.Chunk) -> Any:
        return partial

    def merge(self, left: Any, right: Any) -> Any:
        return left


def test_where_partials_fill_the_memory_less_is_read_ahead(url: str) -> None:
    ahead: list[int] = []
    # The first chunk fails once, and its window waits for it, while those behind it pile up.
    stream = zds.stream_chunks(
        url,
        concurrency=2,
        max_bytes=20_000,
        callbacks=[hears(ahead)],
        retry=zds.RetryPolicy(on=ArithmeticError, wait_initial=1.0, wait_jitter=0.0),
    )
    FAILED.clear()
    results = list(stream.rechunk((1, -1, -1)).map(fail_once).window(along=0, size=1).reduce(Blob()))
    assert [result.index for result in results] == list(range(12))
    before = ahead[: ahead.index(0)]
    assert 4 <= len(before) <= 7, "those behind it went on, but not to the end"


FAILED: set[int] = set()


def fail_once(chunk: zds.Chunk) -> Any:
    if chunk.index[0] == 0 and 0 not in FAILED:
        FAILED.add(0)
        raise ArithmeticError("not yet")
    return chunk.data


def test_groups_in_windows(url: str, data: np.ndarray, concurrency: int | None) -> None:
    stream = zds.stream_chunks(url, concurrency=concurrency)
    east = stream.group_by(lambda index: "west" if index[2] == 0 else "east")
    for grouped in (east.window(along=0, size=4), stream.window(along=0, size=4).group_by(lambda i: "we"[i[2]])):
        answers = grouped.reduce(zds.reducers.sum()).compute()
        assert [answer for _, answer in sorted((k[1], v) for k, v in answers.items() if k[0][0] == "w")] == [
            data[at : at + 4, :, :5].sum() for at in (0, 4, 8)
        ]
        assert len(answers) == 6


def test_windows_that_cut_chunks_and_a_map_that_keeps_their_shape(url: str, data: np.ndarray) -> None:
    stream = zds.stream_chunks(url).map(lambda chunk: chunk.data * 2.0).window(along=(0, 1), size=(3, 5), step=(2, 3))
    for result in stream.reduce(zds.reducers.sum()):
        assert result.data == 2 * data[result.region].sum()


def test_windows_that_end_with_chunks_take_any_map(url: str, data: np.ndarray, concurrency: int | None) -> None:
    stream = zds.stream_chunks(url, concurrency=concurrency).map(lambda chunk: int(chunk.data.sum()))
    answers = stream.window(along=0, size=4, step=2).reduce(zds.reducers.sum()).compute()
    assert answers == {k: data[2 * k : 2 * k + 4].sum() for k in range(5)}
    with pytest.raises(zds.ChunkError, match="a window ends inside chunk"):
        stream.window(along=0, size=3).reduce(zds.reducers.sum()).compute()


def test_what_lies_between_windows_is_not_read(url: str, data: np.ndarray, concurrency: int | None) -> None:
    stream = zds.stream_chunks(url, concurrency=concurrency, where=lambda index: index[1] != 1)
    windowed = stream.window(along=0, size=2, step=6).reduce(zds.reducers.sum())
    kept = np.delete(data, range(4, 8), axis=1)
    assert windowed.compute() == {0: kept[:2].sum(), 1: kept[6:8].sum()}
    assert windowed.report.total == len(windowed) == 2 * 2 * 2
    assert balanced(windowed.report)


def test_boxes_of_another_shape_have_windows_too(url: str, data: np.ndarray) -> None:
    stream = zds.stream_chunks(url).rechunk((3, -1, -1)).map(lambda chunk: int(chunk.data.max()))
    assert stream.window(along=0, size=6).reduce(zds.reducers.max()).compute() == {0: data[:6].max(), 1: data[6:].max()}


def test_several_arrays_have_windows_by_the_names_of_their_dimensions(tmp_path: Path) -> None:
    group = zarr.open_group(str(tmp_path / "group"), mode="w")
    arrays = {}
    for name, shape, dims in (("low", (12, 6), ("time", "x")), ("high", (12, 2, 6), ("time", "z", "x"))):
        chunks = (2, *shape[1:])
        stored = group.create_array(name, shape=shape, chunks=chunks, dtype="f8", dimension_names=dims)
        stored[:] = arrays[name] = np.random.default_rng(len(shape)).random(shape)
    stream = zds.stream_dataset(str(tmp_path / "group"), ["low", "high"], concurrency=1)
    for size in (4, 3):  # with the items, and through them
        results = list(stream.window(along="time", size=size, step=2).reduce(zds.reducers.mean()))
        assert len(results) == 5 + (size == 3)
        for result in results:
            span = result.region[stream.dims.index("time")] if stream.dims else None
            for name, values in arrays.items():
                assert result.data[name] == pytest.approx(values[span].mean())


# -- what is not in a window ------------------------------------------------------------------------------


def test_a_chunk_that_dies_completes_its_windows(url: str, data: np.ndarray, concurrency: int | None) -> None:
    def refuse(chunk: zds.Chunk) -> Any:
        if chunk.index == (2, 0, 0):
            raise ArithmeticError("no")
        return chunk.data

    stream = zds.stream_chunks(url, concurrency=concurrency, on_error="skip").filter(lambda c: c.index != (0, 1, 1))
    windowed = stream.map(refuse).window(along=0, size=4).reduce(zds.reducers.count())
    results = list(windowed)
    assert [(r.folded, r.filtered, r.skipped, r.dead, r.missing) for r in results] == [
        (11, 1, 0, 0, False),
        (11, 0, 0, 1, False),
        (12, 0, 0, 0, False),
    ]
    assert [int(result.data) for result in results] == [360 - 40, 360 - 40, 360]
    assert repr(results[1]).endswith("complete, 11 chunks, 1 dead)")
    assert balanced(windowed.report)


@pytest.mark.parametrize("where", [None, lambda index: index[0] != 2])
def test_chunks_that_are_not_stored(tmp_path: Path, concurrency: int | None, where: Any) -> None:
    array = zarr.create_array(str(tmp_path / "sparse"), shape=(8, 4), chunks=(1, 2), dtype="i4", fill_value=9)
    array[1] = 1
    array[4, :2] = 2
    stream = zds.stream_chunks(str(tmp_path / "sparse"), concurrency=concurrency, missing="skip", where=where)
    results = list(stream.window(along=0, size=2).reduce(zds.reducers.sum()))
    assert [(int(r.data), r.folded, r.skipped, r.missing) for r in results] == [
        (4, 2, 2, False),
        (0, 0, 4 if where is None else 2, True),
        (4, 1, 3, False),
        (0, 0, 4, True),
    ]
    filled = zds.stream_chunks(str(tmp_path / "sparse"), concurrency=concurrency, where=where)
    assert [r.folded for r in filled.window(along=0, size=2).reduce(zds.reducers.sum())] == [
        4, 4 if where is None else 2, 4, 4,
    ]  # fmt: skip


def test_a_failure_that_is_not_skipped_ends_the_stream(url: str) -> None:
    def refuse(chunk: zds.Chunk) -> Any:
        return 1 // (chunk.index[0] - 2)

    stream = zds.stream_chunks(url, concurrency=1).map(refuse).window(along=0, size=2).reduce(zds.reducers.count())
    came = []
    with pytest.raises(zds.ChunkError, match="ZeroDivisionError"):
        came += [result.index for result in stream]
    assert balanced(stream.report)


# -- triggers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [False, True])
def test_a_trigger_every_so_many_chunks(url: str, data: np.ndarray, concurrency: int | None, reset: bool) -> None:
    stream = zds.stream_chunks(url, concurrency=concurrency).window(every=10, reset=reset).reduce(zds.reducers.sum())
    results = list(stream)
    assert [result.index for result in results] == list(range(len(results)))
    steps = [result.folded for result in results]
    more = steps if reset else list(np.diff([0, *steps]))
    assert all(10 <= step < 20 for step in more[:-1])
    assert sum(more) == 36
    assert [result.trigger for result in results[:-1]] == ["every"] * (len(results) - 1)
    total = sum(int(result.data) for result in results) if reset else int(results[-1].data)
    assert total == data.sum()
    assert balanced(stream.report)


GATE = threading.Event()


def wait_at_the_gate(chunk: zds.Chunk) -> int:
    if chunk.index[0] >= 3:
        assert GATE.wait(60)
    return 1


def test_a_trigger_by_the_clock_while_nothing_arrives(url: str) -> None:
    GATE.clear()
    stream = zds.stream_chunks(url, concurrency=24).map(wait_at_the_gate)
    seen = []
    try:
        for result in stream.window(seconds=0.1).reduce(zds.reducers.sum()):
            seen.append((result.trigger, int(result.data)))
            GATE.set()
    finally:
        GATE.set()
    assert seen[0][0] == "seconds"
    assert 0 < seen[0][1] <= 18
    assert seen[-1][1] == 36


def test_a_trigger_under_async_for_and_windows_too(url: str, data: np.ndarray, concurrency: int | None) -> None:
    async def main() -> None:
        stream = zds.stream_chunks(url, concurrency=concurrency)
        last = None
        async for result in stream.window(every=5).reduce(zds.reducers.sum()):
            last = result.data
        assert last == data.sum()
        windows = stream.window(along=0, size=6, step=3).reduce(zds.reducers.sum())
        assert [int(result.data) async for result in windows] == [data[3 * k : 3 * k + 6].sum() for k in range(3)]

    asyncio.run(main())


# -- going on after a stop ----------------------------------------------------------------------------------

REQUESTS: dict[str, Callable[[zds.ChunkStream], Any]] = {
    "tumbling": lambda s: s.window(along=0, size=2),
    "sliding": lambda s: s.window(along=0, size=5, step=2),
    "boxes": lambda s: s.window(along=(1, 2), size=(5, 4), step=(3, 3)),
    "gaps": lambda s: s.window(along=0, size=1, step=3),
    "groups": lambda s: s.window(along=0, size=4, step=2).group_by(lambda index: index[1]),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_the_rest_is_the_same_wherever_a_run_was_stopped(url: str, tmp_path: Path, name: str) -> None:
    def stream(ledger: str | None) -> Any:
        chunks = zds.stream_chunks(url, concurrency=1, checkpoint=ledger)
        return REQUESTS[name](chunks).reduce(zds.reducers.sum(axis=0))

    def told(results: Any) -> list[Any]:
        return [(result.index, result.region, result.data.tolist(), result.folded) for result in results]

    whole = told(stream(None))
    assert len(whole) > 3
    for stop in range(1, len(whole) + 1):
        ledger = str(tmp_path / f"{stop}.ledger")
        head = told(itertools.islice(stream(ledger), stop))
        assert head == whole[:stop]
        again = stream(ledger)
        assert told(again) == whole[stop - 1 :], "what was not acknowledged comes again, what was does not"
        assert told(stream(ledger)) == []


@pytest.mark.parametrize("stop", [1, 7, 20])
def test_a_run_that_was_stopped_between_windows_goes_on(url: str, data: np.ndarray, tmp_path: Path, stop: int) -> None:
    ledger = str(tmp_path / "ledger")
    seen: list[int] = []

    def end_it(notice: Notice) -> None:
        hears(seen)(notice)
        if len(seen) >= stop:
            first.close()

    first = zds.stream_chunks(url, concurrency=1, checkpoint=ledger, callbacks=[end_it])
    first = first.window(along=0, size=6, step=4).reduce(zds.reducers.sum())
    came = {result.index: result.data for result in first}
    assert first.report.emitted == stop
    second = zds.stream_chunks(url, concurrency=1, checkpoint=ledger)
    rest = second.window(along=0, size=6, step=4).reduce(zds.reducers.sum()).compute()
    assert {**came, **rest} == {0: data[:6].sum(), 1: data[4:10].sum(), 2: data[8:].sum()}


@pytest.mark.parametrize("reset", [False, True])
def test_triggers_go_on_where_they_were(url: str, data: np.ndarray, tmp_path: Path, reset: bool) -> None:
    for stop in range(1, 8):
        ledger = str(tmp_path / f"{stop}.ledger")

        def stream(ledger: str = ledger) -> Any:
            chunks = zds.stream_chunks(url, concurrency=1, checkpoint=ledger)
            return chunks.window(every=5, reset=reset).reduce(zds.reducers.sum())

        head = list(itertools.islice(stream(), stop))
        rest = list(stream())
        # Items that the consumer came back after are done: the last one was not.
        results = [*head[:-1], *rest] if len(head) == stop else head
        assert [result.index for result in results] == list(range(len(results)))
        total = sum(int(result.data) for result in results) if reset else int(results[-1].data)
        assert total == data.sum()


def test_dead_chunks_are_tried_again_for_windows_that_are_not_done(url: str, data: np.ndarray, tmp_path: Path) -> None:
    ledger = str(tmp_path / "ledger")

    def stream() -> Any:
        chunks = zds.stream_chunks(url, concurrency=1, checkpoint=ledger, on_error="skip")
        return chunks.map(stumble).window(along=0, size=4, step=2).reduce(zds.reducers.sum())

    BROKEN.add((1, 0, 0))
    head = list(itertools.islice(stream(), 2))
    assert [(result.index, result.dead) for result in head] == [(0, 1), (1, 1)]
    BROKEN.clear()
    rest = list(stream())
    assert [(result.index, result.dead) for result in rest] == [(1, 0), (2, 0), (3, 0), (4, 0)]
    assert [int(result.data) for result in rest] == [data[2 * k : 2 * k + 4].sum() for k in range(1, 5)]


BROKEN: set[tuple[int, ...]] = set()


def stumble(chunk: zds.Chunk) -> Any:
    if chunk.index in BROKEN:
        raise ArithmeticError("broken")
    return chunk.data


def test_another_window_is_another_stream(url: str, tmp_path: Path) -> None:
    ledger = str(tmp_path / "ledger")
    stream = zds.stream_chunks(url, concurrency=1, checkpoint=ledger)
    stream.window(along=0, size=4).reduce(zds.reducers.sum()).compute()
    with pytest.raises(zds.UsageError, match="another stream"):
        stream.window(along=0, size=6).reduce(zds.reducers.sum()).compute()


# -- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda s: s.window(), "needs along= and size="),
        (lambda s: s.window(size=3), "needs along= and size="),
        (lambda s: s.window(along=0), "size is a number of elements"),
        (lambda s: s.window(along="t", size=3), "no dimension 't'; its dimension names: 'time', 'y', 'x'"),
        (lambda s: s.window(along=3, size=3), "along=3 is not an axis"),
        (lambda s: s.window(along=0, size=13), "longer than the stream's region along axis 0, 12"),
        (lambda s: s.window(along=0, size=3, every=3), "choose one"),
        (lambda s: s.window(along=0, size=3, reset=True), "choose one"),
        (lambda s: s.window(every=0), "every is a number of chunks"),
        (lambda s: s.window(seconds=0), "seconds is a number greater than 0"),
        (lambda s: s.window(every=3, step=2), "needs along="),
        (lambda s: s.window(every=3).window(every=3), "one .window"),
        (lambda s: s.window(every=3).map(len), "put other stages before"),
        (lambda s: s.window(every=3).batch(3), "one by one"),
        (lambda s: s.reduce(zds.reducers.sum()).window(every=3), "before .reduce"),
        (lambda s: s.take(3).window(every=3).reduce(zds.reducers.sum()), "take"),
        (lambda s: list(s.window(along=0, size=3)), r"window\(...\) needs a .reduce"),
        (lambda s: list(s.group_by(len)), r"group_by\(...\) needs a .reduce"),
    ],
)
def test_what_makes_no_window_is_refused_before_anything_is_read(
    url: str, make: Callable[[Any], Any], says: str
) -> None:
    with pytest.raises(zds.UsageError, match=says):
        make(zds.stream_chunks(url))


def test_slices_are_windows_of_their_own(url: str) -> None:
    with pytest.raises(zds.UsageError, match="slices are windows"):
        zds.stream_slices(url).window(along=0, size=3)
    counts = zds.stream_slices(url).window(every=4, reset=True).reduce(zds.reducers.count())
    assert sum(int(result.data) for result in counts) == np.prod(SHAPE)


def test_an_empty_region_has_no_windows(url: str) -> None:
    stream = zds.stream_chunks(url, region=slice(0, 0), concurrency=1)
    assert list(stream.window(along=0, size=3).reduce(zds.reducers.sum())) == []
    [result] = stream.window(every=3).reduce(zds.reducers.count())
    assert (result.data, result.trigger, result.missing) == (0, "end", True)


# -- on worker processes ------------------------------------------------------------------------------------


def die_once(marker: str) -> Callable[[zds.Chunk], Any]:
    def fn(chunk: zds.Chunk) -> Any:
        if chunk.index == (3, 0, 0) and not os.path.exists(marker):  # noqa: PTH110  # travels by value, imports little
            with open(marker, "w"):  # noqa: PTH123  # on a worker, without imports
                os._exit(1)
        return chunk.data

    return fn


@pytest.mark.cluster
def test_windows_on_worker_processes(client: Client, url: str, data: np.ndarray) -> None:
    stream = zds.stream_chunks(url, client=client).filter(lambda chunk: chunk.index[2] == 1)
    results = list(stream.window(along=0, size=6, step=3).reduce(zds.reducers.mean(axis=(0, 2))))
    for result in results:
        np.testing.assert_allclose(result.data, data[result.region][..., 5:].mean(axis=(0, 2)))
    assert [(result.folded, result.filtered) for result in results] == [(9, 9), (12, 12), (9, 9)]
    last = list(stream.window(every=8).reduce(zds.reducers.count()))[-1]
    assert int(last.data) == data.size // 2


@pytest.mark.slow
@pytest.mark.cluster
def test_windows_on_worker_processes_of_which_one_dies(
    client: Client, url: str, data: np.ndarray, tmp_path: Path
) -> None:
    stream = zds.stream_chunks(url, client=client).map(die_once(str(tmp_path / "died")))
    results = list(stream.window(along=0, size=6, step=3).reduce(zds.reducers.sum()))
    assert (tmp_path / "died").exists()
    assert [int(result.data) for result in results] == [data[3 * k : 3 * k + 6].sum() for k in range(3)]
    assert [result.folded for result in results] == [18, 24, 18]
    client.wait_for_workers(2)
