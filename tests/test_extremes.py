"""Where the smallest and largest values are, and extremes of dates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import zarr_dask_stream as zds
from reductions import cut, cuts, fold, one, quick
from zarr_dask_stream.stages import reducers


@pytest.mark.parametrize("name", ["argmin", "argmax"])
@pytest.mark.parametrize("skipna", [True, False])
@quick
@given(case=cuts(st.sampled_from([1.0, 2.0, 3.0, math.inf, -math.inf, math.nan]), "f8"))
def test_places_like_numpy(name: str, skipna: bool, case: Any) -> None:
    data, chunks, _, sizes = case
    reducer = getattr(reducers, name)(skipna=skipna)
    if skipna and np.isnan(data).all():
        with pytest.raises(zds.UsageError, match="no place to name"):
            fold(reducer, chunks, sizes)
        return
    origin = np.min([[part.start for part in chunk.region] for chunk in chunks], axis=0)
    finder = getattr(np, f"nan{name}" if skipna and not np.isinf(data).any() else name)
    if skipna and np.isinf(data).any():  # NumPy's own stands NaN for an infinity there
        data = np.where(np.isnan(data), {"argmin": 9e9, "argmax": -9e9}[name], np.clip(data, -8e9, 8e9))
    expected = np.array(np.unravel_index(finder(data), data.shape)) + origin
    got = fold(reducer, chunks, sizes)
    assert got == tuple(expected.tolist())
    assert all(type(i) is int for i in got)


def test_places_need_the_shape_of_the_region() -> None:
    with pytest.raises(zds.UsageError, match="has to keep the shape"):
        reducers.argmin().add(None, zds.Chunk((0,), (slice(0, 3),), np.float64(2)))


@pytest.mark.parametrize("dtype", ["M8[D]", "m8[s]"])
@pytest.mark.parametrize("skipna", [True, False])
def test_dates(dtype: str, skipna: bool) -> None:
    data = np.array([[5, 9, 3], [-4, 2, 8]]).astype(dtype)
    data[0, 2] = data[1, 2] = data[0, 0] = "NaT"
    chunks = cut(data, (1, 2))
    assert fold(reducers.count(), chunks) == 3
    assert fold(reducers.nan_count(0), chunks).tolist() == [1, 0, 2]
    smallest = fold(reducers.min(skipna=skipna), chunks)
    along = fold(reducers.max(0, skipna=skipna), chunks)
    assert smallest.dtype == along.dtype == dtype
    if skipna:
        assert smallest == data[1, 0]
        assert fold(reducers.argmin(), chunks) == (1, 0)
        assert along[0] == data[1, 0]
    else:
        assert np.isnat(smallest)
        assert fold(reducers.argmin(skipna=False), chunks) == (0, 0)
        assert np.isnat(along[0])
    assert along[1] == data[0, 1]
    assert np.isnat(along[2])
    assert np.isnat(one(reducers.max(), np.array([], dtype)))
