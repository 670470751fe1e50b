"""Streams into arrays: whatever the shapes, the target holds what zarr-python would hold, each object written once."""

from __future__ import annotations

import asyncio
import collections
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from distributed import Client
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec

import zarr_dask_stream as zds
from conformance.oracle import same_bits, sample
from copying import array_in, keys, read
from counted import Counting
from zarr_dask_stream.source.files import LocalFiles

pytestmark = pytest.mark.filterwarnings("ignore:.*:zarr.errors.UnstableSpecificationWarning")

# -- any shapes -----------------------------------------------------------------------------------

CODECS = [None, ZstdCodec(level=1), GzipCodec(level=1), BloscCodec(cname="lz4")]


@st.composite
def copies(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a source and a target that need not fit one another, and a region."""
    ndim = draw(st.integers(0, 3))
    shape = tuple(draw(st.lists(st.integers(1, 14), min_size=ndim, max_size=ndim)))
    starts = [draw(st.integers(0, n - 1)) for n in shape]
    formats = draw(st.tuples(st.sampled_from([2, 3]), st.sampled_from([2, 3])))
    chunks = tuple(draw(st.integers(1, n + 2)) for n in shape)
    shards = tuple(c * draw(st.integers(1, 3)) for c in chunks)
    return {
        "shape": shape,
        "source": tuple(draw(st.integers(1, n + 2)) for n in shape),
        "chunks": chunks,
        "shards": shards if formats[1] == 3 and draw(st.booleans()) else None,
        "formats": formats,
        "region": tuple(slice(a, draw(st.integers(a + 1, n))) for a, n in zip(starts, shape, strict=True)),
        "dtype": draw(st.sampled_from(["i1", "<u2", ">i4", "f4", "<f8", "bool", "S3", "<M8[s]"])),
        "codec": draw(st.sampled_from(CODECS)),
        "missing": draw(st.sampled_from(["fill", "skip"])),
    }


@given(copies())
@settings(max_examples=40, deadline=None)
def test_any_array_into_any_other(case: dict[str, Any]) -> None:
    data = sample(case["dtype"], case["shape"])
    source = array_in({}, data, chunks=case["source"], zarr_format=case["formats"][0])
    target: dict[str, Any] = {}
    options = {"compressors": case["codec"]} if case["formats"][1] == 3 else {}
    shards = {} if case["shards"] is None or not case["shape"] else {"shards": case["shards"]}
    stream = zds.stream_chunks(source, region=case["region"], concurrency=1, missing=case["missing"]).to_zarr(
        target, chunks=case["chunks"], zarr_format=case["formats"][1], **shards, **options
    )
    report = stream.run()
    assert report.total == report.emitted + report.skipped_missing
    got, want = read(target), data[(*case["region"], ...)]
    same_bits(got.astype(got.dtype.newbyteorder("=")), np.asarray(want, want.dtype.newbyteorder("=")))
    # Nothing is stored that zarr-python would leave out.
    again: dict[str, Any] = {}
    array_in(again, want, chunks=case["chunks"], zarr_format=case["formats"][1], **shards, **options)
    if case["dtype"] != "<f8" and case["dtype"] != "f4":  # of NaN and of -0.0 we store the bits, and zarr drops some
        assert keys(target) == keys(again)


@given(copies())
@settings(max_examples=12, deadline=None)
def test_a_copy_and_back_is_the_same_to_the_bit(case: dict[str, Any]) -> None:
    data = sample(case["dtype"], case["shape"])
    source = array_in({}, data, chunks=case["source"], zarr_format=case["formats"][0])
    there: dict[str, Any] = {}
    back: dict[str, Any] = {}
    zds.stream_chunks(source, concurrency=1).to_zarr(there, chunks=case["chunks"], zarr_format=case["formats"][1]).run()
    zds.stream_chunks(zarr.open_array(there), concurrency=1).to_zarr(
        back, chunks=case["source"], zarr_format=case["formats"][0]
    ).run()
    same_bits(read(back), read(source.store))


@pytest.mark.parametrize("chunks", [(4, 5), (3, 3), (20, 1), (20, 20), (8, 10)])
@pytest.mark.parametrize("region", [None, (slice(3, 17), slice(1, 19))])
def test_each_object_is_written_once_and_by_rename(
    tmp_path: Path, chunks: Any, region: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = sample("i4", (20, 20))
    array_in(tmp_path / "source", data, chunks=(4, 5))
    written: collections.Counter[str] = collections.Counter()
    put = LocalFiles.put

    def count(self: LocalFiles, key: str, value: Any, *, aside: str = "") -> None:
        written[key] += 1
        assert key.endswith("json") or aside.startswith(".zds-")
        put(self, key, value, aside=aside)

    monkeypatch.setattr(LocalFiles, "put", count)
    zds.stream_chunks(tmp_path / "source", region=region, concurrency=1).to_zarr(
        tmp_path / "target", chunks=chunks
    ).run()
    want = data if region is None else data[region]
    same_bits(read(tmp_path / "target"), want)
    grid = zarr.open_array(tmp_path / "target").cdata_shape
    assert written == {"zarr.json": 1, **{f"c/{i}/{j}": 1 for i in range(grid[0]) for j in range(grid[1])}}
    assert sorted(p.name for p in (tmp_path / "target").iterdir()) == ["c", "zarr.json"]


@pytest.mark.parametrize("chunks", [(3, 3), (20, 1), (8, 10), (20, 20)])
def test_each_source_chunk_is_read_once_where_boxes_may_hold_whole_ones(chunks: Any) -> None:
    data = sample("i4", (200, 200))
    store: dict[str, Any] = {}
    array_in(store, data, chunks=(4, 5))
    counting = Counting(store)
    zds.stream_chunks(counting, concurrency=1).to_zarr({}, chunks=chunks).run()
    assert counting.chunks == dict.fromkeys(keys(store), 1)


# -- what is taken over ---------------------------------------------------------------------------


def test_a_target_is_like_its_source() -> None:
    source = zarr.create_array(
        {}, shape=(10, 8), chunks=(2, 2), shards=(4, 4), dtype="f4", fill_value=7, compressors=GzipCodec(level=3),
        filters=zarr.codecs.TransposeCodec(order=(1, 0)), attributes={"units": "K"}, dimension_names=["y", "x"],
        chunk_key_encoding={"name": "v2", "separator": "."},
    )  # fmt: skip
    source[:4] = 1
    target: dict[str, Any] = {}
    zds.stream_chunks(source, concurrency=1).to_zarr(target).run()
    made = zarr.open_array(target)
    for name in ("shape", "chunks", "shards", "dtype", "fill_value", "compressors", "filters", "serializer"):
        assert getattr(made, name) == getattr(source, name), name
    assert made.metadata == source.metadata
    assert keys(target) == {"0.0", "0.1"}


def test_what_is_said_stands() -> None:
    source = array_in({}, sample("f4", (6, 6)), chunks=(2, 2), attributes={"units": "K"})
    target: dict[str, Any] = {}
    options: dict[str, Any] = {"chunks": (3, 6), "fill_value": -9.5, "compressors": None, "dimension_names": ["y", "x"]}
    zds.stream_chunks(source, concurrency=1).to_zarr(target, dtype="f8", attributes={"a": 1}, **options).run()
    made: Any = zarr.open_array(target)
    assert (made.chunks, made.dtype, made.fill_value, made.compressors) == ((3, 6), np.dtype("f8"), -9.5, ())
    assert (dict(made.attrs), made.metadata.dimension_names) == ({"a": 1}, ("y", "x"))
    same_bits(read(target), read(source.store).astype("f8"))


def test_a_function_leaves_no_attributes_of_what_was_before() -> None:
    source = array_in({}, sample("f4", (6,)), chunks=(2,), attributes={"units": "K"})
    target: dict[str, Any] = {}
    zds.stream_chunks(source, concurrency=1).map(lambda chunk: chunk.data * 2).to_zarr(target).run()
    assert dict(zarr.open_array(target).attrs) == {}


def test_a_group_decides_on_the_format(tmp_path: Path) -> None:
    source = array_in({}, sample("i2", (4,)), chunks=(2,))
    zarr.create_group(tmp_path / "g", zarr_format=2)
    stream = zds.stream_chunks(source, concurrency=1)
    stream.to_zarr(tmp_path / "g", path="a/b").run()
    assert zarr.open_group(tmp_path / "g", mode="r")["a/b"].metadata.zarr_format == 2
    assert (tmp_path / "g" / "a" / ".zgroup").exists()
    with pytest.raises(zds.UsageError, match="group of version 2, and an array of version 3 in it would not be found"):
        stream.to_zarr(tmp_path / "g", path="c", zarr_format=3)


def test_missing_chunks_stay_missing() -> None:
    source = zarr.create_array({}, shape=(40,), chunks=(4,), dtype="i4", fill_value=5)
    source[8:12] = 1
    for missing, seen in (("skip", 1), ("fill", 10)):
        target: dict[str, Any] = {}
        stream = zds.stream_chunks(source, concurrency=1, missing=missing).to_zarr(target)  # type: ignore[arg-type]  # a word
        assert stream.run().emitted == seen
        assert keys(target) == {"c/2"}


def test_chunks_of_fill_values_are_stored_where_that_is_wanted() -> None:
    source = zarr.create_array({}, shape=(8,), chunks=(4,), dtype="i4")
    target: dict[str, Any] = {}
    zds.stream_chunks(source, concurrency=1).to_zarr(target, config={"write_empty_chunks": True}).run()
    assert keys(target) == {"c/0", "c/1"}
    with zarr.config.set({"array.write_empty_chunks": True}):
        other: dict[str, Any] = {}
        zds.stream_chunks(source, concurrency=1).to_zarr(other).run()
    assert keys(other) == {"c/0", "c/1"}


# -- functions ------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 5), st.data())
@settings(max_examples=15, deadline=None)
def test_coarsening_by_a_declared_rule(length: int, chunk: int, factor: int, data: Any) -> None:
    chunk *= factor
    values = np.arange(length, dtype="f8")
    source = array_in({}, values, chunks=(chunk,))

    def coarsen(one: zds.Chunk) -> Any:
        return np.array([one.data[i : i + factor].mean() for i in range(0, len(one.data), factor)])

    size = data.draw(st.sampled_from([c for c in range(1, chunk // factor + 1) if (chunk // factor) % c == 0]))
    target: dict[str, Any] = {}
    zds.stream_chunks(source, concurrency=1).map(coarsen, chunks=(chunk // factor,)).to_zarr(
        target, chunks=(size,)
    ).run()
    same_bits(read(target), np.array([values[i : i + factor].mean() for i in range(0, length, factor)]))


def test_a_function_may_keep_an_axis_with_length_one() -> None:
    data = sample("i2", (6, 10))
    source = array_in({}, data, chunks=(2, 10))
    target: dict[str, Any] = {}
    total = zds.stream_chunks(source, concurrency=1).map(
        lambda c: c.data.sum(axis=1, keepdims=True, dtype="i8"), dtype="i8", chunks=(None, 1)
    )
    total.to_zarr(target).run()
    same_bits(read(target), data.sum(axis=1, keepdims=True, dtype="i8"))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda c: c.data.astype("f8"), r"holds float64, and int32 was expected: .*\.map\(fn, dtype='float64'\)"),
        (lambda c: c.data[:1], r"has shape \(1, 3\), and \(2, 3\) belongs there: .*\.map\(fn, chunks="),
        (lambda _: None, r"has shape \(\), and \(2, 3\) belongs there"),
        (lambda _: 1 / 0, "division by zero"),
    ],
)
def test_a_function_that_returns_something_else_fails_its_chunk(function: Any, words: str) -> None:
    source = array_in({}, sample("i4", (4, 3)), chunks=(2, 3))
    target: dict[str, Any] = {}

    def half(chunk: zds.Chunk) -> Any:
        return chunk.data if chunk.index == (0, 0) else function(chunk)

    stream = zds.stream_chunks(source, concurrency=1, on_error="skip").map(half).to_zarr(target)
    report = stream.run()
    (letter,) = report.dead_letters
    assert (letter.index, letter.category, letter.attempts) == ((1, 0), "function", 1)
    with pytest.raises(Exception, match=words):
        raise letter.error or AssertionError
    assert keys(target) == {"c/0/0"}
    with pytest.raises(zds.ChunkError, match=words):
        zds.stream_chunks(source, concurrency=1).map(half).to_zarr({}).run()


def test_numbers_that_the_target_cannot_hold_fail_their_chunk() -> None:
    source = array_in({}, np.array([1, 2, 300, 4]), chunks=(2,))
    target: dict[str, Any] = {}
    report = zds.stream_chunks(source, concurrency=1, on_error="skip").to_zarr(target, dtype="i1").run()
    (letter,) = report.dead_letters
    assert "has values that int8 can't hold" in letter.message
    assert read(target).tolist() == [1, 2, 0, 0]
    big = array_in({}, np.array([1e300, 1.5]), chunks=(1,))
    report = zds.stream_chunks(big, concurrency=1, on_error="skip").to_zarr({}, dtype="f4").run()
    assert [letter.index for letter in report.dead_letters] == [(0,)]


def test_filtered_chunks_are_not_written() -> None:
    source = array_in({}, np.arange(1, 9), chunks=(2,))
    target: dict[str, Any] = {}
    zds.stream_chunks(source, concurrency=1).filter(lambda c: c.index != (1,)).to_zarr(target).run()
    assert read(target).tolist() == [1, 2, 0, 0, 5, 6, 7, 8]


def test_functions_of_many_write_too() -> None:
    source = array_in({}, np.arange(1, 11), chunks=(2,))
    target: dict[str, Any] = {}
    stream = zds.stream_chunks(source, concurrency=1).map_batch(lambda batch: [c.data * 2 for c in batch], size=3)
    stream.to_zarr(target).run()
    assert read(target).tolist() == list(range(2, 22, 2))


def test_neighbours_are_read_and_not_written() -> None:
    source = array_in({}, np.arange(1.0, 9.0), chunks=(2,))
    target: dict[str, Any] = {}

    def smooth(chunk: zds.Chunk) -> Any:
        return np.convolve(chunk.data, [1, 1, 1], "same")[chunk.core]

    zds.stream_chunks(source, concurrency=1).halo(1, 0).map(smooth).to_zarr(target).run()
    assert read(target).tolist() == np.convolve(np.arange(1, 9), [1, 1, 1], "same").tolist()


# -- ways to run it -------------------------------------------------------------------------------


def test_items_tell_what_was_written(tmp_path: Path) -> None:
    data = sample("i4", (4, 6))
    data[:2, :3] = 0
    source = array_in({}, data, chunks=(2, 6))
    stream = zds.stream_chunks(source, concurrency=1).to_zarr(tmp_path / "t", chunks=(2, 3), compressors=None)
    items = [(chunk.index, chunk.data) for chunk in stream]
    assert [(index, i.region, i.objects, i.empty, i.stored_bytes) for index, i in items] == [
        ((0, 0), (slice(0, 2), slice(0, 6)), 1, 1, 24),
        ((1, 0), (slice(2, 4), slice(0, 6)), 2, 0, 48),
    ]
    assert stream.report.bytes_written == 72
    assert stream.report.to_dict()["bytes_written"] == 72


def test_on_the_cluster_inside_this_process() -> None:
    data = sample("f4", (60, 50))
    source = array_in({}, data, chunks=(6, 5))
    target: dict[str, Any] = {}
    report = zds.stream_chunks(source, ordered=False).to_zarr(target, chunks=(10, 10), shards=(20, 20)).run()
    assert report.outcome == "done"
    same_bits(read(target), data)


def test_into_memory_of_fsspec() -> None:
    source = array_in({}, sample("f4", (6, 5)), chunks=(2, 5))
    url = f"memory://to-zarr-{os.getpid()}"
    zds.stream_chunks(source, concurrency=1).to_zarr(url).run()
    same_bits(read(url), read(source.store))


def test_under_an_asynchronous_client(tmp_path: Path) -> None:
    data = sample("f4", (60, 50))
    array_in(tmp_path / "source", data, chunks=(6, 5))

    async def write() -> list[int]:
        async with Client(processes=False, asynchronous=True, dashboard_address=None) as client:
            stream = zds.stream_chunks(tmp_path / "source", client=client).to_zarr(tmp_path / "target", chunks=(25, 25))
            return [chunk.data.objects async for chunk in stream]

    assert sum(asyncio.run(write())) == 6
    same_bits(read(tmp_path / "target"), data)


@pytest.mark.parametrize("verify", [True, False, "read"])
def test_what_the_store_does_not_have_is_an_error(tmp_path: Path, verify: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that loses the end of what it is given: seen by its length, or not at all."""
    data = np.arange(1, 9)
    source = array_in({}, data, chunks=(4,))
    put = LocalFiles.put

    def torn(self: LocalFiles, key: str, value: Any, *, aside: str = "") -> None:
        put(self, key, value[:-3] if key == "c/1" else value, aside=aside)

    monkeypatch.setattr(LocalFiles, "put", torn)
    retry = zds.RetryPolicy(attempts=2, wait_initial=0.01)
    report = (
        zds.stream_chunks(source, concurrency=1, on_error="skip", retry=retry)
        .to_zarr(tmp_path / "t", compressors=None, verify=verify)
        .run()
    )
    if verify is False:
        assert not report.dead_letters
    else:
        (letter,) = report.dead_letters
        assert (letter.index, letter.attempts) == ((1,), 2)
        assert "32 bytes were written, and 29 are there" in letter.message


def test_other_bytes_are_seen_by_reading_them_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = array_in({}, np.arange(1, 9), chunks=(4,))
    put = LocalFiles.put

    def turned(self: LocalFiles, key: str, value: Any, *, aside: str = "") -> None:
        put(self, key, bytes(value)[::-1] if key == "c/1" else value, aside=aside)

    monkeypatch.setattr(LocalFiles, "put", turned)
    retry = zds.RetryPolicy(attempts=1)
    stream = zds.stream_chunks(source, concurrency=1, on_error="skip", retry=retry)
    assert not stream.to_zarr(tmp_path / "a").run().dead_letters
    (letter,) = stream.to_zarr(tmp_path / "b", verify="read").run().dead_letters
    assert "other bytes are read than were written" in letter.message
