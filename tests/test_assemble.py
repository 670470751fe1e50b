"""Boxes put together from chunks: values, missing chunks, broken chunks, and what is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import zarr_dask_stream as zds
from counted import Counting
from zarr_dask_stream.source.array import open_array
from zarr_dask_stream.source.assemble import read_blocks, stored_blocks
from zarr_dask_stream.source.blocks import Blocks
from zarr_dask_stream.source.selection import ChunkPlan, parse_region


@settings(deadline=None)
@given(st.data())
def test_boxes_hold_what_the_array_holds(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    chunks, size = (tuple(data.draw(st.integers(1, n)) for n in shape) for _ in range(2))
    array = zarr.create_array({}, shape=shape, chunks=chunks, dtype="i4", fill_value=-1)
    array[...] = np.arange(int(np.prod(shape))).reshape(shape)
    out = np.full(shape, -9)
    for chunk in zds.stream_chunks(array, concurrency=1).rechunk(size):
        assert chunk.data.shape == chunk.shape
        assert chunk.data.flags.writeable
        out[chunk.region] = chunk.data
    np.testing.assert_array_equal(out, array[...])


@pytest.mark.parametrize(("missing", "items"), [("fill", 4), ("skip", 3)])
def test_a_box_is_missing_where_none_of_its_chunks_is_stored(missing: Any, items: int) -> None:
    array = zarr.create_array({}, shape=(8, 8), chunks=(2, 2), dtype="i4", fill_value=5)
    array[:4] = 1
    array[4:6, 4:6] = 2
    stream = zds.stream_chunks(array, missing=missing).rechunk((4, 4))
    found = {chunk.index: chunk for chunk in stream}
    assert len(found) == items
    np.testing.assert_array_equal(found[1, 1].data, array[4:, 4:])
    assert not found[1, 1].missing
    assert stream.report.skipped_missing == 4 - items
    if missing == "fill":
        assert found[1, 0].missing
        assert (found[1, 0].data == 5).all()


def test_missing_raise_names_the_box() -> None:
    array = zarr.create_array({}, shape=(8,), chunks=(2,), dtype="i4")
    array[:6] = 1
    with pytest.raises(zds.ChunkError, match=r"\(1,\).*not stored"):
        list(zds.stream_chunks(array, missing="raise").rechunk(4))


def test_a_box_with_a_broken_chunk_is_named_and_the_others_come(tmp_path: Path) -> None:
    array = zarr.create_array(str(tmp_path / "a"), shape=(8,), chunks=(1,), dtype="i4")
    array[:] = np.arange(1, 9)
    (tmp_path / "a" / "c" / "5").write_bytes(b"no zstd")
    stream = zds.stream_chunks(tmp_path / "a", on_error="skip", retry=zds.RetryPolicy(attempts=1)).rechunk(2)
    assert [chunk.data.tolist() for chunk in stream] == [[1, 2], [3, 4], [7, 8]]
    (letter,) = stream.report.dead_letters
    assert letter.index == (2,)
    assert "(5,)" in letter.message


def test_each_chunk_is_read_once_for_boxes_of_whole_chunks(tmp_path: Path) -> None:
    array = zarr.create_array(str(tmp_path), shape=(8, 8), chunks=(2, 2), dtype="i4", fill_value=-1)
    array[:] = np.arange(64).reshape(8, 8)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    store = Counting({path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in files})
    assert len(list(zds.stream_chunks(store, concurrency=1).rechunk((4, -1)))) == 2
    assert set(store.chunks.values()) == {1}
    assert len(store.chunks) == 16


def test_boxes_of_one_task_share_their_chunks(tmp_path: Path) -> None:
    """Every chunk lies in two boxes, and is fetched and decoded once."""
    array = zarr.create_array(str(tmp_path), shape=(8, 8), chunks=(4, 4), dtype="i4", fill_value=-1)
    array[:] = np.arange(64).reshape(8, 8)
    blocks = Blocks.of(open_array(array), (2, 8))
    plan = ChunkPlan(blocks.grid, parse_region(None, (8, 8)))
    marks: list[int] = []
    reads = list(read_blocks(blocks, plan, range(4), on_read=lambda: marks.append(1)))
    assert len(marks) == 4
    np.testing.assert_array_equal(np.concatenate([read.data for read in reads if read.data is not None]), array[:])
    assert sum(read.stored_bytes for read in reads) == sum(f.stat().st_size for f in tmp_path.glob("c/*/*"))


def test_listing_finds_the_boxes_of_stored_chunks() -> None:
    array = zarr.create_array({}, shape=(100,), chunks=(3,), dtype="i4")
    array[50] = 1
    assert stored_blocks(Blocks.of(open_array(array), (7,))).tolist() == [6, 7]


def test_what_is_read_is_said_first() -> None:
    array = zarr.create_array({}, shape=(8,), chunks=(2,), dtype="i4")
    stream = zds.stream_chunks(array)
    with pytest.raises(zds.UsageError, match="before all other stages"):
        stream.map(lambda c: c.data).rechunk(4)
    with pytest.raises(zds.UsageError, match="before all other stages"):
        stream.take(3).halo(1)
    with pytest.raises(zds.UsageError, match="where= is asked about stored chunks"):
        zds.stream_chunks(array, where=lambda _index: True).rechunk(4)


def test_a_checkpoint_of_other_boxes_is_refused(tmp_path: Path) -> None:
    array = zarr.create_array(str(tmp_path / "a"), shape=(8,), chunks=(2,), dtype="i4")
    array[:] = 1
    ledger = tmp_path / "ledger.json"
    stream = zds.stream_chunks(array, checkpoint=ledger).rechunk(4)
    assert len(list(stream)) == 2
    assert list(stream) == []
    with pytest.raises(zds.UsageError):
        list(zds.stream_chunks(array, checkpoint=ledger))
    with pytest.raises(zds.UsageError):
        list(zds.stream_chunks(array, checkpoint=ledger).rechunk(4).halo(1))


def test_boxes_that_begin_where_the_region_does() -> None:
    array = zarr.create_array({}, shape=(10, 9), chunks=(3, 4), dtype="i4")
    array[:] = data = np.arange(90, dtype="i4").reshape(10, 9)
    spec = open_array(array)
    blocks = Blocks.of(spec, (4, 5), origin=(2, 3))
    plan = ChunkPlan(blocks.grid, (slice(2, 9), slice(3, 9)))
    out = np.zeros_like(data)
    for read in read_blocks(blocks, plan, list(plan)):
        region = plan.region(read.number)
        assert read.data is not None
        out[region] = read.data
    assert (out[2:9, 3:9] == data[2:9, 3:9]).all()
    assert not out[:2].any()
    assert not out[9:].any()
    assert next(plan.region(number) for number in plan) == (slice(2, 6), slice(3, 8))


def test_listing_finds_boxes_that_begin_elsewhere() -> None:
    array = zarr.create_array({}, shape=(100,), chunks=(3,), dtype="i4")
    array[50] = 1  # elements 48 to 50 are stored
    assert stored_blocks(Blocks.of(open_array(array), (7,), origin=(43,))).tolist() == [0, 1]
    assert stored_blocks(Blocks.of(open_array(array), (7,), origin=(60,))).tolist() == []
