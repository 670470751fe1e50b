"""The reverse of a stream: whatever an iterable gives is in the array, or refused with a reason."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from distributed import Client
from hypothesis import given, settings
from hypothesis import strategies as st

import zarr_dask_stream as zds
from conformance.oracle import same_bits, sample
from copying import array_in, keys, read
from zarr_dask_stream.engine.events import ChunksEmitted
from zarr_dask_stream.source.files import LocalFiles

pytestmark = pytest.mark.filterwarnings("ignore:.*:zarr.errors.UnstableSpecificationWarning")


def empty(shape: Any = (10, 6), chunks: Any = (4, 3), dtype: Any = "i4", **options: Any) -> Any:
    return zarr.create_array({}, shape=shape, chunks=chunks, dtype=dtype, **options)


def objects(array: Any) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Walk the stored objects of an array: grid index and region."""
    sizes = array.shards or array.chunks
    for index in np.ndindex(*[-(-n // c) for n, c in zip(array.shape, sizes, strict=True)]):
        yield index, tuple(slice(i * c, min((i + 1) * c, n)) for i, c, n in zip(index, sizes, array.shape, strict=True))


# -- items of every kind --------------------------------------------------------------------------


@st.composite
def arrays(draw: st.DrawFn) -> tuple[Any, Any, list[int], str]:
    """Draw an array, its data, an order of its objects, and how they are named."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple))
    chunks = tuple(draw(st.integers(1, n + 1)) for n in shape)
    shards = tuple(c * draw(st.integers(1, 2)) for c in chunks) if draw(st.booleans()) else None
    array = zarr.create_array(
        {}, shape=shape, chunks=chunks, shards=shards, dtype=draw(st.sampled_from(["i4", "f8", "S2"]))
    )
    places = list(objects(array))
    how = draw(st.sampled_from(["index", "region", "chunk", "array"]))
    order = list(range(len(places)))
    if how != "array":
        order = draw(st.permutations(order))[: draw(st.integers(0, len(order)))]
    return array, sample(array.dtype, shape), list(order), how


@given(arrays(), st.sampled_from([None, 1, 300]))
@settings(max_examples=40, deadline=None)
def test_whatever_is_given_is_there(case: Any, max_bytes: Any) -> None:
    array, data, order, how = case
    places = list(objects(array))
    want = np.zeros(array.shape, array.dtype)

    def items() -> Iterator[Any]:
        for at in order:
            index, region = places[at]
            want[region] = data[region]
            yield {
                "index": (index, data[region]),
                "region": (region, data[region]),
                "chunk": zds.Chunk((9, 9), region, data[region]),
                "array": data[region],
            }[how]

    report = zds.write_chunks(array, items(), concurrency=1, **({} if max_bytes is None else {"max_bytes": max_bytes}))
    assert (report.emitted, report.total) == (len(order), len(order))
    same_bits(read(array.store), want)


def test_an_item_may_cover_several_chunks() -> None:
    array, data = empty(), sample("i4", (10, 6))
    items = [(slice(0, 8), slice(0, 3)), (slice(None), slice(3, None)), (slice(8, 10), slice(0, 3))]
    report = zds.write_chunks(array, [(region, data[region]) for region in items], concurrency=1)
    assert report.emitted == 6
    same_bits(read(array.store), data)


def test_one_axis_needs_no_tuple_and_none_needs_nothing() -> None:
    array = empty((5,), (2,))
    zds.write_chunks(array, [(2, np.array([5])), (slice(0, 2), [1, 2])], concurrency=1)
    assert read(array.store).tolist() == [1, 2, 0, 0, 5]
    scalar = zarr.create_array({}, shape=(), dtype="f8")
    zds.write_chunks(scalar, [np.array(7.5)], concurrency=1)
    assert read(scalar.store) == 7.5


def test_a_stream_goes_straight_in() -> None:
    source = array_in({}, sample("i4", (10, 6)), chunks=(5, 2))
    array = empty()
    zds.write_chunks(array, zds.stream_chunks(source, concurrency=1).rechunk((4, 3)), concurrency=1)
    same_bits(read(array.store), read(source.store))


def test_an_array_is_made(tmp_path: Path) -> None:
    data = sample("f4", (10, 6))
    items = [data[:4], data[4:8], data[8:]]
    options: dict[str, Any] = {"shape": (10, 6), "chunks": (4, 6), "dtype": "f4", "attributes": {"a": 1}}
    zds.write_chunks(tmp_path / "g", items, path="x", concurrency=1, **options)
    same_bits(read(tmp_path / "g", "x"), data)
    assert dict(zarr.open_array(tmp_path / "g", path="x").attrs) == {"a": 1}
    with pytest.raises(zds.UsageError, match="exists: choose another place, or say overwrite=True"):
        zds.write_chunks(tmp_path / "g", items, path="x", concurrency=1, **options)
    zds.write_chunks(tmp_path / "g", [-data[:4]], path="x", overwrite=True, concurrency=1, **options)
    assert not read(tmp_path / "g", "x")[4:].any()


def test_numbers_are_cast_within_their_kind() -> None:
    array = empty((4,), (2,), "f4")
    zds.write_chunks(array, [np.array([1, 2]), [3.5, 4.5] @ np.eye(2)], concurrency=1)
    assert read(array.store).tolist() == [1, 2, 3.5, 4.5]
    small = empty((4,), (2,), "i1")
    report = zds.write_chunks(small, [np.array([1, 300]), np.array([3, 4])], concurrency=1, on_error="skip")
    (letter,) = report.dead_letters
    assert letter.index == (0,)
    assert "values that int8 can't hold" in letter.message
    assert read(small.store).tolist() == [0, 0, 3, 4]


def test_an_array_may_be_used_again_when_the_next_item_is_asked_for() -> None:
    array = empty((40,), (2,))

    def items() -> Iterator[Any]:
        buffer = np.zeros(2, "i4")
        for i in range(20):
            buffer[:] = [2 * i, 2 * i + 1]
            yield buffer
            buffer[:] = -1

    zds.write_chunks(array, items())
    assert read(array.store).tolist() == list(range(40))


def test_chunks_of_fill_values_are_removed() -> None:
    store: dict[str, Any] = {}
    array = array_in(store, np.array([1, 2, 3, 4]), chunks=(2,))
    zds.write_chunks(array, [np.array([0, 0])], concurrency=1)
    assert keys(store) == {"c/1"}


# -- refused --------------------------------------------------------------------------------------

BAD: list[tuple[Any, str]] = [
    (((0, 0), np.zeros((4, 4), "i4")), r"for \[0:4, 0:3\] has shape \(4, 4\), and \(4, 3\) belongs there"),
    (((2, 0), np.zeros((4, 3), "i4")), r"for \[8:10, 0:3\] has shape \(4, 3\), and \(2, 3\) belongs there"),
    (((3, 0), np.zeros((4, 3), "i4")), r"\(3, 0\) is outside the grid of .*, which has \(3, 2\) chunks"),
    (((-1, 0), np.zeros((4, 3), "i4")), "outside the grid"),
    (((0,), np.zeros((4, 3), "i4")), r"\(0,\) names 1 axes, and .* has 2"),
    (((0.5, 0), np.zeros((4, 3), "i4")), r"a place is a grid index \(whole numbers\) or a region \(slices\)"),
    (((0, slice(0, 3)), np.zeros((4, 3), "i4")), "a place is a grid index"),
    (
        ((slice(2, 8), slice(0, 3)), np.zeros((6, 3), "i4")),
        "2:8 of axis 0 holds parts of stored chunks, which are 4",
    ),
    (((slice(0, 4), slice(0, 2)), np.zeros((4, 2), "i4")), r"0:2 of axis 1 holds parts .*\.rechunk"),
    (((slice(0, 4, 2), slice(0, 3)), np.zeros((4, 3), "i4")), "a region is start:stop within the array"),
    (((slice(0, 14), slice(0, 3)), np.zeros((14, 3), "i4")), "a region is start:stop within the array"),
    (((0, 0), np.zeros((4, 3), "f8")), r"holds float64, which is no int32, as .* holds: cast it, \.astype\('int32'\)"),
    (((0, 0), np.full((4, 3), "a")), "holds <U1, which is no int32"),
    (np.zeros((2, 2), "i4"), r"for \[4:8, 0:3\] has shape"),
    ("chunk", "items are arrays in grid order, pairs .* or chunks; got str"),
    (None, "got NoneType"),
    ((1, 2, 3), "got tuple"),
]


@pytest.mark.parametrize(("bad", "words"), BAD, ids=[words[:30] for _, words in BAD])
def test_an_item_that_does_not_fit_ends_it_after_what_came_before(bad: Any, words: str) -> None:
    array, data = empty(), np.ones((4, 3), "i4")
    asked = []

    def items() -> Iterator[Any]:
        yield data
        yield data
        yield bad
        asked.append("more")
        yield data

    with pytest.raises(zds.UsageError, match=words):
        zds.write_chunks(array, items(), concurrency=1)
    assert not asked
    assert read(array.store)[:4].sum() == 24
    assert not read(array.store)[4:].any()


def test_nothing_is_given_twice() -> None:
    array, data = empty(), np.ones((4, 3), "i4")
    with pytest.raises(zds.UsageError, match=r"\[0:4, 0:3\], or a part of it, is given twice"):
        zds.write_chunks(array, [((0, 0), data), ((0, 1), data), ((slice(0, 4), slice(0, 3)), data)], concurrency=1)


def test_more_arrays_than_chunks() -> None:
    with pytest.raises(zds.UsageError, match="has 2 chunks, and there is one more array"):
        zds.write_chunks(empty((4,), (2,)), [np.ones(2, "i4")] * 3, concurrency=1)


def test_shards_are_written_whole() -> None:
    array = empty((8, 6), (2, 3), shards=(4, 6))
    zds.write_chunks(array, [((1, 0), np.ones((4, 6), "i4"))], concurrency=1)
    assert read(array.store)[4:].all()
    with pytest.raises(zds.UsageError, match="holds parts of stored shards, which are 4 long"):
        zds.write_chunks(array, [((slice(0, 2), slice(0, 6)), np.ones((2, 6), "i4"))], concurrency=1)


def test_an_exception_of_the_iterable_comes_after_what_it_gave_is_written() -> None:
    array = empty((8,), (2,))

    def items() -> Iterator[Any]:
        yield np.array([1, 2])
        yield np.array([3, 4])
        raise LookupError("the instrument is gone")

    with pytest.raises(LookupError, match="the instrument is gone"):
        zds.write_chunks(array, items())
    assert read(array.store).tolist() == [1, 2, 3, 4, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("target", "items", "options", "words"),
    [
        (empty(), np.zeros((10, 6)), {}, "items is an iterable of chunks, such as a generator or a list, got ndarray"),
        (empty(), 3, {}, "got int"),
        (empty(), "text", {}, "got str"),
        (empty(), [], {"shape": (3,)}, "the target is an open array, and has a shape"),
        ({}, [], {"shape": (3,)}, "needs a dtype beside its shape"),
        (empty(), [], {"chunks": (3,)}, "written to as it is: leave chunks out, or say shape= to make one"),
        (empty(), [], {"overwrite": True}, "leave overwrite out"),
        (empty(), [], {"chunk": (3,)}, "no option 'chunk'; did you mean 'chunks'"),
        (empty(), [], {"concurrency": 0}, "concurrency is a number of chunks"),
        (empty(), [], {"max_bytes": "lots"}, "max_bytes is bytes"),
        (empty(), [], {"on_error": "ignore"}, "on_error must be"),
        (empty(), [], {"client": "tcp://x"}, "client must be a distributed.Client"),
        (empty(), [], {"checkpoint": 3}, "checkpoint must be a Checkpoint"),
    ],
)
def test_options_that_mean_nothing(target: Any, items: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(zds.UsageError, match=words):
        zds.write_chunks(target, items, **options)


def test_an_array_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(zds.StoreError, match="there is no zarr array at"):
        zds.write_chunks(tmp_path, [], concurrency=1)


# -- bounded --------------------------------------------------------------------------------------


class Watched(np.ndarray[Any, Any]):
    """An array that can be watched."""


def test_items_are_asked_for_as_there_is_room() -> None:
    """With room for three, at most four are asked for and not written; and what is written is let go."""
    array = empty((200,), (2,), "i8")
    asked, held = [0], []
    seen: list[int] = []

    def count(event: Any) -> None:
        if isinstance(event, ChunksEmitted):
            written[0] += len(event.numbers)

    written = [0]

    def items() -> Iterator[Any]:
        for i in range(100):
            asked[0] += 1
            seen.append(asked[0] - written[0])
            data = np.full(2, i).view(Watched)
            held.append(weakref.ref(data))
            yield data

    report = zds.write_chunks(array, items(), max_bytes=3 * 16, callbacks=[count], concurrency=1)
    assert max(seen) <= 4
    assert report.peak_bytes_in_flight <= 3 * 16
    gc.collect()
    assert not [one for one in held if one() is not None]


def test_a_chunk_that_cannot_be_written_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = zarr.create_array(tmp_path / "a", shape=(8,), chunks=(2,), dtype="i4")
    put = LocalFiles.put
    failed: list[str] = []

    def shaky(self: LocalFiles, key: str, value: Any, *, aside: str = "") -> None:
        if key == "c/2" and len(failed) < 2:
            failed.append(key)
            raise OSError(5, "shaky")
        put(self, key, value, aside=aside)

    monkeypatch.setattr(LocalFiles, "put", shaky)
    retry = zds.RetryPolicy(wait_initial=0.01)
    items = list(np.arange(1, 9, dtype="i4").reshape(4, 2))
    report = zds.write_chunks(array, items, concurrency=1, retry=retry)
    assert report.retries == 2
    assert read(tmp_path / "a").tolist() == list(range(1, 9))


# -- stopped and gone on with ---------------------------------------------------------------------


def test_what_a_ledger_has_is_passed_over(tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "a", shape=(20,), chunks=(2,), dtype="i4")
    data = np.arange(1, 21, dtype="i4")

    def items(stop: int | None) -> Iterator[Any]:
        for i in range(10):
            if i == stop:
                raise LookupError
            yield (i,), data[2 * i : 2 * i + 2]

    with pytest.raises(LookupError):
        zds.write_chunks(array, items(4), concurrency=1, checkpoint=tmp_path / "ledger")
    stamps = {n: (tmp_path / "a" / "c" / str(n)).stat().st_mtime_ns for n in range(4)}
    report = zds.write_chunks(array, items(None), concurrency=1, checkpoint=tmp_path / "ledger")
    assert (report.resumed, report.emitted) == (4, 6)
    assert read(tmp_path / "a").tolist() == data.tolist()
    assert stamps == {n: (tmp_path / "a" / "c" / str(n)).stat().st_mtime_ns for n in range(4)}


def test_an_array_that_is_made_is_gone_on_with(tmp_path: Path) -> None:
    data = np.arange(1, 9, dtype="i4").reshape(4, 2)

    def write(count: int) -> zds.Report:
        report = zds.write_chunks(
            tmp_path / "a", list(data)[:count], shape=(8,), chunks=(2,), dtype="i4", concurrency=1,
            checkpoint=tmp_path / "ledger",
        )  # fmt: skip
        assert isinstance(report, zds.Report)
        return report

    assert write(2).emitted == 2
    assert write(4).emitted == 2
    assert read(tmp_path / "a").tolist() == data.reshape(-1).tolist()


# -- on clusters ----------------------------------------------------------------------------------


def test_on_a_cluster_of_processes(client: Client, tmp_path: Path) -> None:
    data = sample("f4", (64, 50))
    array = zarr.create_array(tmp_path / "a", shape=data.shape, chunks=(2, 50), dtype="f4")
    report = zds.write_chunks(array, (data[i : i + 2] for i in range(0, 64, 2)), client=client, max_bytes=8 * 400)
    assert report.emitted == 32
    assert report.peak_bytes_in_flight <= 8 * 400
    same_bits(read(tmp_path / "a"), data)


def test_on_the_cluster_inside_this_process() -> None:
    data = sample("f4", (64, 50))
    array = zarr.create_array({}, shape=data.shape, chunks=(2, 50), dtype="f4")
    zds.write_chunks(array, (data[i : i + 2] for i in range(0, 64, 2)))
    same_bits(read(array.store), data)


def test_under_an_asynchronous_client() -> None:
    data = sample("f4", (64, 50))
    array = zarr.create_array({}, shape=data.shape, chunks=(2, 50), dtype="f4")

    async def write(items: Callable[[], Any]) -> zds.Report:
        async with Client(processes=False, asynchronous=True, dashboard_address=None) as client:
            pending: Any = zds.write_chunks(array, items(), client=client)
            report = await pending
            assert isinstance(report, zds.Report)
            return report

    assert asyncio.run(write(lambda: (data[i : i + 2] for i in range(0, 64, 2)))).emitted == 32
    same_bits(read(array.store), data)
    with pytest.raises(zds.UsageError, match="got int"):
        asyncio.run(write(lambda: [3]))
