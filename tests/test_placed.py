"""What all ready-made reducers refuse, and the box that an answer with axes lies in."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import zarr_dask_stream as zds
from reductions import ALL, NAMES, Array, cut, fold, one
from zarr_dask_stream.stages import reducers


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("values", [np.array(["a"]), np.array([b"a"]), np.zeros(1, "i4,f8"), np.array([None])])
def test_types_without_arithmetic_are_refused_by_name(name: str, values: Array) -> None:
    reducer = ALL[name]
    with pytest.raises(zds.UsageError) as caught:
        one(reducer, values)
    assert name in str(caught.value)
    assert str(values.dtype) in str(caught.value)
    assert isinstance(reducer, reducers.Statistic)
    with pytest.raises(zds.UsageError, match="works on"):
        reducer.check(values.dtype)


@pytest.mark.parametrize("name", ["min", "var", "histogram", "quantile", "moments", "argmax"])
def test_complex_numbers_have_no_order(name: str) -> None:
    with pytest.raises(zds.UsageError, match="complex64"):
        one(ALL[name], np.zeros(2, "c8"))


def test_masked_arrays_are_refused() -> None:
    with pytest.raises(zds.UsageError, match="mask"):
        one(reducers.sum(), np.ma.masked_array([1, 2], [True, False]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis": "time"}, "must be an int"),
        ({"axis": True}, "must be an int"),
        ({"axis": (0, 0)}, "twice"),
        ({"placed": True}, "needs axis="),
    ],
)
def test_options_are_checked_at_once(options: Any, message: str) -> None:
    with pytest.raises(zds.UsageError, match=message):
        reducers.mean(**options)
    with pytest.raises(zds.UsageError, match="ddof"):
        reducers.var(ddof=-1)


def test_axes_are_checked_against_the_data() -> None:
    data = np.zeros((2, 3))
    with pytest.raises(zds.UsageError, match="from -2 to 1, because the data have 2 axes"):
        one(reducers.mean(axis=2), data)
    with pytest.raises(zds.UsageError, match="twice"):
        one(reducers.mean(axis=(0, -2)), data)
    with pytest.raises(zds.UsageError, match="has to keep the shape"):
        reducers.mean(axis=0).add({}, zds.Chunk((0, 0), (slice(0, 2), slice(0, 3)), np.zeros(3)))
    reducers.mean(axis=-1).check("f4", 2)


def test_the_answer_covers_the_box_that_was_streamed() -> None:
    data = np.arange(24.0).reshape(4, 6)
    region, answer = fold(reducers.mean(axis=0, placed=True), cut(data, (2, 4), origin=(10, 20)))
    assert region == (slice(20, 26),)
    np.testing.assert_array_equal(answer, data.mean(axis=0))
    placed = fold(reducers.moments(axis=1, placed=True), cut(data, (2, 4), origin=(10, 20)))
    assert placed.region == (slice(10, 14),)
    np.testing.assert_array_equal(placed.data.count, [6, 6, 6, 6])
    everything = fold(reducers.sum(axis=(0, 1), placed=True), cut(data, (2, 4)))
    assert everything == ((), data.sum())


@pytest.mark.parametrize(
    ("name", "dtype", "gap"),
    [("sum", "i4", 0), ("count", "f4", 0), ("mean", "f4", math.nan), ("max", "i4", math.nan), ("min", "M8[s]", None)],
)
def test_holes_in_the_box_hold_nothing(name: str, dtype: str, gap: float | None) -> None:
    data = np.arange(1, 19).reshape(2, 9).astype(dtype)
    chunks = [chunk for chunk in cut(data, (1, 3)) if chunk.index[1] != 1]
    got = fold(NAMES[name](axis=0), chunks)
    full = fold(NAMES[name](axis=0), cut(data, (1, 3)))
    np.testing.assert_array_equal(got[[0, 1, 2, 6, 7, 8]], full[[0, 1, 2, 6, 7, 8]])
    assert np.isnat(got[3:6]).all() if gap is None else np.array_equal(got[3:6], [gap] * 3, equal_nan=True)


def test_a_partial_is_no_larger_than_the_answer() -> None:
    reducer = reducers.mean(axis=0)
    partial = reducer.create()
    for chunk in cut(np.ones((200, 64), "f4"), (10, 16)):
        partial = reducer.add(partial, chunk)
    assert sorted(partial) == [((i, i + 16),) for i in range(0, 64, 16)]
