"""Reducers for items of several arrays: which reducer for which array, and what would be counted twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import zarr

import zarr_dask_stream as zds
from zarr_dask_stream import reducers

T2M = np.arange(24, dtype="f4").reshape(4, 6) / 7
TP = np.arange(24, dtype="i4").reshape(4, 6) ** 2
LAT = np.linspace(-1, 1, 6)


@pytest.fixture
def stream() -> zds.ChunkStream:
    group = zarr.create_group({})
    for name, values, chunks, dims in (
        ("t2m", T2M, (1, 6), ["time", "lat"]),
        ("tp", TP, (2, 3), ["time", "lat"]),
        ("weight", LAT, (6,), ["lat"]),
    ):
        group.create_array(name, shape=values.shape, chunks=chunks, dtype=values.dtype, dimension_names=dims)[:] = (
            values
        )
    return zds.stream_dataset(group, concurrency=1)


def only(stream: zds.ChunkStream, *names: str) -> zds.ChunkStream:
    """Return the stream without arrays that come with several items."""
    return stream.map(lambda item: {name: item.data[name] for name in names})


def test_one_reducer_for_each_array(stream: zds.ChunkStream) -> None:
    answer = stream.reduce({"t2m": reducers.mean(), "tp": reducers.sum(axis=0)}).compute()
    assert list(answer) == ["t2m", "tp"]
    assert answer["t2m"] == pytest.approx(T2M.astype("f8").mean())
    np.testing.assert_array_equal(answer["tp"], TP.sum(axis=0))


def test_several_for_an_array(stream: zds.ChunkStream) -> None:
    answer = stream.reduce({"tp": [reducers.min(), reducers.max()]}).compute()
    assert answer == {"tp": {"min": TP.min(), "max": TP.max()}}


def test_the_same_for_all_in_groups() -> None:
    group = zarr.create_group({})
    for name in ("a", "b"):
        array = group.create_array(name, shape=(6,), chunks=(2,), dtype="i4", dimension_names=["x"])
        array[:] = np.arange(6) * (1 if name == "a" else 10)
    stream = zds.stream_dataset(group, concurrency=1)
    assert stream.reduce(reducers.sum()).compute() == {"a": 15, "b": 150}
    assert stream.reduce({"low": reducers.min(), "n": reducers.count()}).compute() == {
        "a": {"low": 0, "n": 6},
        "b": {"low": 0, "n": 6},
    }
    by_half = stream.group_by(lambda index: index[0] // 2).reduce(reducers.sum()).compute()
    assert by_half == {0: {"a": 6, "b": 60}, 1: {"a": 9, "b": 90}}


def test_places_are_those_of_the_array(stream: zds.ChunkStream) -> None:
    """The position of the largest value is given along the array's own axes."""
    group = zarr.create_group({})
    values = {"a": np.arange(24).reshape(4, 6), "b": -np.arange(24).reshape(6, 4)}
    for name, dims in (("a", ["x", "y"]), ("b", ["y", "x"])):
        shape = values[name].shape
        group.create_array(name, shape=shape, chunks=(2, 2), dtype="i4", dimension_names=dims)[:] = values[name]
    answer = zds.stream_dataset(group, concurrency=1).reduce(reducers.argmax()).compute()
    assert {name: tuple(where) for name, where in answer.items()} == {"a": (3, 5), "b": (0, 0)}


def test_a_function_of_the_whole_item_is_a_map(stream: zds.ChunkStream) -> None:
    weighted = stream.map(lambda item: (item.data["t2m"] * item.data["weight"]).sum(dtype="f8"))
    assert weighted.reduce(reducers.sum()).compute() == pytest.approx(float((T2M * LAT).sum(dtype="f8")))


@pytest.mark.parametrize(
    ("reducer", "words"),
    [
        (reducers.mean(), r"'weight' has not the dimension 'time'.*by name \('t2m', 'tp'\)"),
        ({"weight": reducers.sum()}, "'weight' has not the dimension 'time'"),
        ({"t2m": reducers.sum(), "low": reducers.min()}, "'t2m' are arrays of the items and 'low' not"),
        ({"tp": reducers.mean(axis=5)}, r"'tp': mean\(axis=5\) needs axes from -2 to 1"),
        ({"tp": reducers.mean}, "got the class Mean"),
        ({"tp": {}}, "at least one reducer"),
        (3, "needs a Reducer"),
    ],
)
def test_what_cannot_be_reduced(stream: zds.ChunkStream, reducer: Any, words: str) -> None:
    with pytest.raises(zds.UsageError, match=words):
        stream.reduce(reducer)


def test_an_array_without_a_dimension_counts_once_where_there_is_one_item_along_it(stream: zds.ChunkStream) -> None:
    whole = stream.rechunk({"time": -1, "lat": 3})
    assert whole.reduce({"weight": reducers.count()}).compute() == {"weight": 6}


def test_a_reduction_of_several_arrays_goes_on_from_its_checkpoint(tmp_path: Any) -> None:
    group = zarr.create_group(tmp_path / "data")
    for name in ("a", "b"):
        group.create_array(name, shape=(8,), chunks=(1,), dtype="i4", dimension_names=["x"])[:] = np.arange(8)
    ledger = tmp_path / "ledger"
    seen: list[Any] = []

    def stop(event: Any) -> None:
        seen.append(event)

    stream = zds.stream_dataset(group, checkpoint=ledger, concurrency=1, callbacks=[stop])
    assert stream.reduce(reducers.sum()).compute() == {"a": 28, "b": 28}
    again = zds.stream_dataset(group, checkpoint=ledger, concurrency=1)
    assert again.reduce(reducers.sum()).compute() == {"a": 28, "b": 28}
    assert again.report.emitted == 0
