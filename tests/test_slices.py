"""An array slice by slice: which slices, in which order, and that each chunk is read once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

import zarr_dask_stream as zds
from counted import Counting


@given(st.data())
def test_slices_are_those_of_numpy(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    chunks = tuple(data.draw(st.integers(1, n)) for n in shape)
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    bounds = st.none() | st.integers(-11, 11)
    start, stop, step = data.draw(bounds), data.draw(bounds), data.draw(st.none() | st.integers(1, 12))
    values = np.arange(1, 1 + int(np.prod(shape))).reshape(shape)
    array = zarr.create_array({}, shape=shape, chunks=chunks, dtype="i8")
    array[...] = values
    stream = zds.stream_slices(array, axis, start=start, stop=stop, step=step, concurrency=1)
    places = range(shape[axis])[slice(start, stop, step)]
    items = list(stream)
    assert len(stream) == len(places)
    assert [item.index[axis] for item in items] == list(places)
    for item, place in zip(items, places, strict=True):
        np.testing.assert_array_equal(item.data, values.take([place], axis))
        np.testing.assert_array_equal(item.data, values[item.region])


def test_each_chunk_is_read_once(tmp_path: Path) -> None:
    values = np.arange(1, 1 + 20 * 30).reshape(20, 30)
    zarr.create_array(str(tmp_path), shape=values.shape, chunks=(7, 10), dtype="i8")[:] = values
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    store = Counting({path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in files})
    for client in ({}, {"concurrency": 20}):
        store.asked.clear()
        stream = zds.stream_slices(store, 0, **client)
        np.testing.assert_array_equal(np.concatenate([item.data for item in stream]), values)
        assert len(store.chunks) == 9
        assert set(store.chunks.values()) == {1}
        store.asked.clear()
        stream = zds.stream_slices(store, 1, start=5, step=12, **client)
        np.testing.assert_array_equal(np.concatenate([item.data for item in stream], 1), values[:, 5::12])
        assert set(store.chunks.values()) == {1}


def test_what_is_too_large_together_comes_in_parts(tmp_path: Path) -> None:
    values = np.arange(1, 1 + 20 * 30).reshape(20, 30)
    zarr.create_array(str(tmp_path), shape=values.shape, chunks=(10, 30), dtype="i8")[:] = values
    stream = zds.stream_slices(tmp_path, max_bytes=4 * 30 * 8)
    np.testing.assert_array_equal(np.concatenate([item.data for item in stream]), values)
    assert stream.report.peak_bytes_in_flight <= 4 * 30 * 8


def test_stages_regions_and_names() -> None:
    values = np.arange(1, 25).reshape(4, 6)
    array = zarr.create_array({}, shape=(4, 6), chunks=(3, 2), dtype="i8", dimension_names=["time", "x"])
    array[:] = values
    sums = zds.stream_slices(array, "time", region=(..., slice(1, 4))).map(lambda item: int(item.data.sum()))
    assert [item.data for item in sums] == values[:, 1:4].sum(axis=1).tolist()
    assert (
        zds.stream_slices(array, "x", where=lambda index: index[1] % 2 == 0).reduce(zds.reducers.sum()).compute()
        == values[:, ::2].sum()
    )
    around = zds.stream_slices(array, "time").halo({0: 1}, "nearest")
    assert [item.data[:, 0].tolist() for item in around] == [[1, 1, 7], [1, 7, 13], [7, 13, 19], [13, 19, 19]]


def test_a_ledger_goes_on_where_it_stopped(tmp_path: Path) -> None:
    zarr.create_array(str(tmp_path / "a"), shape=(12, 3), chunks=(5, 3), dtype="i8")[:] = 1
    stream = zds.stream_slices(tmp_path / "a", step=2, checkpoint=tmp_path / "ledger")
    first: list[int] = []
    for item in stream:
        if len(first) == 3:
            break
        first.append(item.index[0])
    assert first == [0, 2, 4]
    with pytest.raises(zds.UsageError):
        list(zds.stream_slices(tmp_path / "a", checkpoint=tmp_path / "ledger"))
    assert [item.index[0] for item in stream] == [6, 8, 10]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"axis": 2}, "names axis 2"),
        ({"axis": "time"}, "names axis 'time'"),
        ({"step": 0}, "positive number"),
        ({"step": -1}, "positive number"),
        ({"start": 1.5}, "start is a whole number"),
        ({"stop": True}, "stop is a whole number"),
        ({"region": (slice(0, 2),)}, "say start= and stop="),
    ],
)
def test_bad_slices(options: Any, words: str) -> None:
    array = zarr.create_array({}, shape=(4, 6), chunks=(3, 2), dtype="i8")
    with pytest.raises(zds.UsageError, match=words):
        zds.stream_slices(array, **options)
    with pytest.raises(zds.UsageError, match="with axes"):
        zds.stream_slices(zarr.create_array({}, shape=(), dtype="i8"))
