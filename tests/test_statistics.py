"""Counts, sums, means, extremes and variances against xarray on the same data, however it is cut and joined."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reductions import NAMES, NUMBERS, cut, cuts, fold, one, quick, xarrays
from zarr_dask_stream.stages import reducers


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("skipna", [True, False])
@quick
@given(case=cuts(NUMBERS, "f8"))
def test_floats_like_xarray(name: str, skipna: bool, case: Any) -> None:
    data, chunks, axis, sizes = case
    options = {} if "count" in name else {"skipna": skipna}
    got = fold(NAMES[name](axis, **options), chunks, sizes)
    expected = xarrays(name, data, axis, skipna=skipna)
    scale = np.nanmax(np.abs(data), initial=0.0)
    # Of numbers below 1e-150 the squares have lost digits, in NumPy as here.
    absolute = {"var": scale**2 * 1e-12 + 1e-300, "std": scale * 1e-9 + 1e-150}.get(name, scale * 1e-12)
    np.testing.assert_allclose(got, expected, rtol=1e-11, atol=absolute)
    assert np.shape(got) == expected.shape


@pytest.mark.parametrize("name", ["sum", "mean", "min", "max", "var", "std"])
@pytest.mark.parametrize("skipna", [True, False])
@quick
@given(case=cuts(st.sampled_from([1.0, 2.5, math.inf, -math.inf, math.nan]), "f4"))
def test_infinities_like_xarray(name: str, skipna: bool, case: Any) -> None:
    data, chunks, axis, sizes = case
    got = fold(NAMES[name](axis, skipna=skipna), chunks, sizes)
    np.testing.assert_allclose(got, xarrays(name, data.astype("f8"), axis, skipna=skipna), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["?", "i1", "u2", "i4", "i8", "u8", ">i8", "f2", "f4", ">f4"])
@pytest.mark.parametrize("name", NAMES)
def test_types_like_numpy(name: str, dtype: str) -> None:
    rng = np.random.default_rng(3)
    data = np.abs(rng.normal(3, 40, (7, 5, 6))).astype(dtype)
    if data.dtype.kind == "f":
        data[rng.random(data.shape) < 0.1] = np.nan
    for axis in (None, (0,), (1, 2)):
        got = fold(NAMES[name](axis), cut(data, (3, 2, 4)), (3, 0, 4))
        np.testing.assert_allclose(got, xarrays(name, data.astype("f8"), axis), rtol=1e-12)
        if name in ("min", "max"):
            assert got.dtype == np.dtype(dtype).newbyteorder("=")
        if name == "sum":
            assert np.asarray(got).dtype == ("f8" if data.dtype.kind == "f" else "i8")


def test_half_and_single_precision_are_accumulated_in_double() -> None:
    halves = np.full(10_000, 7, "f2")
    assert one(reducers.sum(), halves) == 70_000
    assert one(reducers.mean(), np.full(10_000, 60_000, "f2")) == float(np.float16(60_000))
    singles = np.full(1_000_000, 0.1, "f4")
    assert one(reducers.sum(), singles) == pytest.approx(float(np.float32(0.1)) * 1e6, rel=1e-14)


@pytest.mark.parametrize("name", ["sum", "mean", "nan_count", "count"])
def test_complex_numbers(name: str) -> None:
    data = np.array([[1 + 2j, 3 - 1j, np.nan], [2j, 1, -4]], "c8")
    expected = xarrays(name, data.astype("c16"), (0,))
    np.testing.assert_allclose(fold(NAMES[name](0), cut(data, (1, 2))), expected)
