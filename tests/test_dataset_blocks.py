"""Boxes of several arrays at once: values, what is read, what is missing, what is broken, whose memory it is."""

from __future__ import annotations

import collections
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import zarr_dask_stream as zds
from counted import Counting
from zarr_dask_stream.source.array import ArraySpec, open_array
from zarr_dask_stream.source.assemble import read_blocks, stored_blocks
from zarr_dask_stream.source.blocks import Blocks, Member
from zarr_dask_stream.source.chunk import Chunk, Variables
from zarr_dask_stream.source.grid import ChunkGrid
from zarr_dask_stream.source.halo import Halo
from zarr_dask_stream.source.selection import ChunkPlan

DTYPES = ["i2", "f8", "u1", ">i4", "bool", "S3", "M8[s]"]
#: What numpy.pad calls the edges of a halo.
PADDING: dict[str, Any] = {"periodic": "wrap", "reflect": "symmetric", "nearest": "edge"}


def write(group: zarr.Group, name: str, values: np.ndarray[Any, Any], chunks: Any, **extra: Any) -> ArraySpec:
    array = group.create_array(name, shape=values.shape, chunks=chunks, dtype=values.dtype, **extra)
    array[...] = values
    return open_array(group, path=name)


def expected(
    values: np.ndarray[Any, Any], region: tuple[slice, ...], depth: Any, boundary: Any
) -> np.ndarray[Any, Any]:
    """What a box with its neighbours holds, worked out by numpy.pad."""
    for axis, ((before, after), edge) in enumerate(zip(depth, boundary, strict=True)):
        part, length = region[axis], values.shape[axis]
        if edge is None:
            picked = slice(max(part.start - before, 0), min(part.stop + after, length))
        else:
            width = [(0, 0)] * values.ndim
            width[axis] = (before, after)
            values = np.pad(values, width, mode=PADDING[edge])
            picked = slice(part.start, part.stop + before + after)
        values = values[(*[slice(None)] * axis, picked)]
    return values


@pytest.mark.filterwarnings("ignore:The data type")  # zarr remarks on what is no part of version 3
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_boxes_hold_what_the_arrays_hold(data: st.DataObject) -> None:
    """Any dimensions in any order, chunks, shards, regions, neighbours, formats, and chunks that are not stored."""
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    grid = ChunkGrid(tuple(lengths), tuple(data.draw(st.integers(1, n)) for n in lengths))
    depth = tuple((data.draw(st.integers(0, min(n, 2))), data.draw(st.integers(0, min(n, 2)))) for n in lengths)
    boundary = tuple(data.draw(st.sampled_from([None, *PADDING])) for _ in lengths)
    group = zarr.create_group({}, zarr_format=data.draw(st.sampled_from([2, 3])))
    values, members = {}, []
    for at in range(data.draw(st.integers(1, 3))):
        axes = tuple(data.draw(st.permutations(range(len(lengths))))[: data.draw(st.integers(0, len(lengths)))])
        shape = tuple(lengths[axis] for axis in axes)
        chunks = tuple(data.draw(st.integers(1, n)) for n in shape)
        extra: dict[str, Any] = {}
        if axes and group.metadata.zarr_format == 3 and data.draw(st.booleans()):
            extra["shards"] = tuple(c * data.draw(st.integers(1, 3)) for c in chunks)
        dtype = np.dtype(data.draw(st.sampled_from(DTYPES)))
        name = f"array{at}"
        raw = np.arange(int(np.prod(shape)) * dtype.itemsize, dtype="u1") % 120 * data.draw(st.integers(0, 1))
        values[name] = (raw if dtype.kind != "b" else raw % 2).view(dtype).reshape(shape)
        members.append((name, Member(write(group, name, values[name], chunks, **extra), axes)))
    blocks = Blocks(grid, tuple(members), Halo(depth, boundary), named=True)
    box = tuple(slice(*sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2)))) for n in lengths)
    plan = ChunkPlan(grid, box, halo=blocks.halo)
    numbers = data.draw(st.permutations(list(plan)))
    reads = list(read_blocks(blocks, plan, numbers))
    assert [read.number for read in reads] == numbers
    for read in reads:
        assert read.error is None
        found: Any = read.data
        assert isinstance(found, Variables)
        item = Chunk.planned(plan, read.number, found)
        for name, member in members:
            pick = [(item.region[a], depth[a], boundary[a]) for a in member.axes]
            want = expected(values[name], *(tuple(one) for one in zip(*pick, strict=True))) if pick else values[name]
            np.testing.assert_array_equal(found[name], want)
            assert found[name].dtype == want.dtype.newbyteorder("=")
            assert found[name].flags.writeable


def pair(group: zarr.Group) -> Blocks:
    """Return a grid of four boxes over a wide array, one of its columns, and a number."""
    wide = write(group, "wide", np.arange(1, 25).reshape(4, 6), (2, 3))
    column = write(group, "column", np.arange(100, 106), (3,))
    number = write(group, "number", np.array(7), ())
    members = (("wide", Member(wide, (0, 1))), ("column", Member(column, (1,))), ("number", Member(number, ())))
    return Blocks(ChunkGrid((4, 6), (2, 3)), members, named=True)


def plan_of(blocks: Blocks) -> ChunkPlan:
    return ChunkPlan(blocks.grid, tuple(slice(0, n) for n in blocks.grid.shape), halo=blocks.halo)


def test_items_own_their_arrays() -> None:
    """One chunk of the column goes into two boxes of the batch: writing to one must not change the other."""
    blocks = pair(zarr.create_group({}))
    found: list[Any] = [read.data for read in read_blocks(blocks, plan_of(blocks), range(4))]
    for data in found:
        for values in data.values():
            values[...] = -1
            assert all((other >= 0).all() for later in found if later is not data for other in later.values())
            values[...] = 0


def test_a_batch_reads_what_its_boxes_share_once() -> None:
    blocks = pair(zarr.create_group({}))
    marks: list[int] = []
    assert len(list(read_blocks(blocks, plan_of(blocks), range(4), on_read=lambda: marks.append(1)))) == 4
    assert len(marks) == 4 + 2 + 1


def test_arrays_of_other_chunks_are_read_once_each(tmp_path: Path) -> None:
    """Two grids that only meet every twelve elements: each chunk still is fetched once for the whole stream."""
    group = zarr.create_group(tmp_path)
    for name, length in (("a", 4), ("b", 6)):
        array = group.create_array(name, shape=(40,), chunks=(length,), dtype="i4", dimension_names=["x"])
        array[:] = np.arange(1, 41)
    store = Counting({p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()})
    stream = zds.stream_dataset(store, concurrency=1)
    items = list(stream)
    assert [item.shape for item in items] == [(12,), (12,), (12,), (4,)]
    np.testing.assert_array_equal(np.concatenate([item.data["a"] - item.data["b"] for item in items]), 0)
    assert store.chunks == {key: 1 for key in store if "/c/" in key}


def test_bytes_of_an_item_are_those_of_all_arrays() -> None:
    blocks = pair(zarr.create_group({}))
    assert blocks.nbytes == (2 * 3 + 3 + 1) * 8


def holes(tmp_path: Path) -> Blocks:
    """Return boxes over two arrays of four chunks: both have the first, one has the second, none the others."""
    group = zarr.create_group(tmp_path)
    members = []
    for name, stored in (("a", 1), ("b", 2)):
        spec = write(group, name, np.repeat([5, 6, 0, 0], 2), (2,), fill_value=9)
        for chunk in range(stored, 4):
            (tmp_path / name / "c" / str(chunk)).unlink()
        members.append((name, Member(spec, (0,))))
    return Blocks(ChunkGrid((8,), (2,)), tuple(members), named=True)


def test_an_item_is_missing_where_nothing_of_it_is_stored(tmp_path: Path) -> None:
    blocks = holes(tmp_path)
    reads = list(read_blocks(blocks, plan_of(blocks), range(4)))
    assert [read.missing for read in reads] == [False, False, True, True]
    assert [{k: v.tolist() for k, v in read.data.items()} for read in reads[1:3]] == [  # type: ignore[union-attr]  # it would fail here
        {"a": [9, 9], "b": [6, 6]},
        {"a": [9, 9], "b": [9, 9]},
    ]
    assert stored_blocks(blocks).tolist() == [0, 1]


def test_missing_raise_names_the_array(tmp_path: Path) -> None:
    blocks = holes(tmp_path)
    problems = [read.error for read in read_blocks(blocks, plan_of(blocks), range(2), missing="raise")]
    assert problems[0] is None
    assert isinstance(problems[1], zds.errors.MissingChunkError)
    assert str(problems[1]).startswith(f"chunk (1,) of {tmp_path / 'a'} is not stored")


def test_coordinates_say_nothing_about_what_is_missing(tmp_path: Path) -> None:
    blocks = holes(tmp_path)
    (name, b), a = blocks.members[1], blocks.members[0]
    blocks = Blocks(blocks.grid, (a, (name, Member(b.spec, b.axes, coord=True))), named=True)
    reads = list(read_blocks(blocks, plan_of(blocks), range(4)))
    assert [read.missing for read in reads] == [False, True, True, True]
    data: Any = reads[1].data
    assert list(data) == ["a"]
    assert data.coords["b"].tolist() == [6, 6]
    assert stored_blocks(blocks).tolist() == [0]


def test_a_broken_chunk_is_named_with_its_array(tmp_path: Path) -> None:
    blocks = pair(zarr.create_group(tmp_path))
    (tmp_path / "column" / "c" / "1").write_bytes(b"no zstd")
    errors = {read.number: read.error for read in read_blocks(blocks, plan_of(blocks), range(4))}
    assert [number for number, error in errors.items() if error is not None] == [1, 3]
    assert f"chunk (1,) of {tmp_path / 'column'}" in str(errors[3])


def test_items_of_several_arrays_survive_a_pickle() -> None:
    data = Variables({"a": np.arange(3)}, axes={"a": (1,)}, coords={"b": np.ones(2)})
    copy = pickle.loads(pickle.dumps(data))
    assert (type(copy), list(copy), copy.axes) == (Variables, ["a"], {"a": (1,)})
    np.testing.assert_array_equal(copy.coords["b"], [1, 1])


def test_an_item_of_several_arrays_is_no_array() -> None:
    item = Chunk((0,), (slice(0, 3),), Variables({"a": np.arange(3)}, axes={"a": (0,)}))
    with pytest.raises(TypeError, match="several arrays"):
        np.asarray(item)
    assert repr(item) == "Chunk(index=(0,), region=[0:3], data=Variables(a=int64[3]))"
    with pytest.raises(KeyError):
        item.part("b")


class Flaky(dict[str, Any]):
    """A store that refuses each chunk so many times before it gives it."""

    def __init__(self, content: dict[str, Any], refusals: int, error: Exception) -> None:
        super().__init__(content)
        self.refusals, self.error = refusals, error
        self.asked: collections.Counter[str] = collections.Counter()

    def __getitem__(self, key: str) -> Any:
        if "c/" in key:
            self.asked[key] += 1
            if self.asked[key] <= self.refusals:
                raise self.error
        return super().__getitem__(key)


def flaky(tmp_path: Path, refusals: int, error: Exception) -> Flaky:
    array = zarr.create_array(tmp_path, shape=(50,), chunks=(1,), dtype="i4", fill_value=-1)
    array[:] = np.arange(50)
    content = {p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    return Flaky(content, refusals, error)


def test_what_failed_of_a_box_is_read_again_and_nothing_else(tmp_path: Path) -> None:
    """Read again as a whole, a box of fifty chunks that each fail once would come at the fifty-first try."""
    store = flaky(tmp_path, 1, ConnectionResetError(104, "reset"))
    stream = zds.stream_chunks(store, concurrency=1).rechunk(-1)
    assert [chunk.data.tolist() for chunk in stream] == [list(range(50))]
    assert set(store.asked.values()) == {2}
    assert stream.report.retries == 50


@pytest.mark.parametrize(("attempts", "asked"), [(1, 1), (2, 4), (3, 9)])
def test_tries_within_a_box_are_bounded(tmp_path: Path, attempts: int, asked: int) -> None:
    store = flaky(tmp_path, 99, ConnectionResetError(104, "reset"))
    retry = zds.RetryPolicy(attempts=attempts, wait_initial=0.001, wait_max=0.001)
    stream = zds.stream_chunks(store, concurrency=1, retry=retry, on_error="skip").rechunk(-1)
    assert list(stream) == []
    assert set(store.asked.values()) == {asked}
    assert stream.report.dead_letters[0].attempts == attempts


def test_a_store_that_asks_for_less_within_a_box_is_heard(tmp_path: Path) -> None:
    store = flaky(tmp_path, 1, OSError("SlowDown: Please reduce your request rate."))
    events: list[str] = []
    stream = zds.stream_chunks(store, concurrency=1, callbacks=[lambda event: events.append(type(event).__name__)])
    assert len(list(stream.rechunk(25))) == 2
    assert "SlowedDown" in events
    assert stream.report.dead_lettered == 0
