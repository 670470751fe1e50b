"""Sums of integers are exact, and sums of many floats lose nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from reductions import cut, cuts, fold, quick
from zarr_dask_stream.stages import reducers


@pytest.mark.parametrize("dtype", ["i8", "u8", "i4"])
@quick
@given(data=st.data())
def test_sums_of_integers_are_exact(dtype: str, data: st.DataObject) -> None:
    elements = hnp.from_dtype(np.dtype(dtype)) | st.sampled_from(
        [int(np.iinfo(dtype).max), int(np.iinfo(dtype).min), int(np.iinfo(dtype).max) - 1]
    )
    array, chunks, axis, sizes = data.draw(cuts(elements, dtype))
    got = fold(reducers.sum(axis), chunks, sizes)
    expected = np.sum(array.astype(object), axis=axis)
    assert np.array_equal(np.asarray(got).astype(object), np.asarray(expected))
    if axis is None:
        assert type(got) is int
    elif not isinstance(got, int):
        low, high = int(expected.min()), int(expected.max())
        kind = "i8" if low >= -(2**63) and high < 2**63 else "u8" if low >= 0 and high < 2**64 else "O"
        assert got.dtype == kind


def test_a_sum_beyond_64_bits() -> None:
    data = np.full((4, 3), np.iinfo("i8").max)
    assert fold(reducers.sum(), cut(data, (1, 3)), (2, 2)) == 12 * (2**63 - 1)
    along = fold(reducers.sum(axis=0), cut(data, (1, 2)))
    assert along.dtype == object
    assert along.tolist() == [4 * (2**63 - 1)] * 3
    assert fold(reducers.mean(axis=0), cut(data, (1, 2))).tolist() == [2.0**63] * 3
    assert fold(reducers.mean(), cut(data, (1, 2))) == 2.0**63
    assert fold(reducers.sum(axis=0), cut(-data, (1, 2)))[0] == -4 * (2**63 - 1)


def test_a_sum_of_many_chunks_loses_nothing_to_rounding() -> None:
    parts = np.array([1e16, 1.0, -1e16, 1.0] * 500)
    assert fold(reducers.sum(), cut(parts, (1,)), (300, 700)) == math.fsum(parts) == 1000
    assert fold(reducers.mean(), cut(parts, (1,)), (300, 700)) == 0.5
