"""Variance and moments against their definitions, where the numbers are unkind."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from reductions import cut, cuts, fold, one, quick
from zarr_dask_stream.stages import reducers


@pytest.mark.parametrize("axis", [None, 0])
def test_variance_survives_a_large_mean(axis: int | None) -> None:
    noise = np.random.default_rng(5).normal(0, 1, (60_000, 2))
    data = 1e9 + noise
    exact = np.var(data - 1e9, axis=axis)  # the subtraction is exact: what is left is what the sum kept of the noise
    chunks = cut(data, (700, 1))
    # The means of chunks are rounded at 1e-7, which is all that is lost.
    np.testing.assert_allclose(fold(reducers.var(axis), chunks, (30, 40)), exact, rtol=1e-8)
    np.testing.assert_allclose(one(reducers.var(axis), data), exact, rtol=1e-8)
    naive = np.mean(data**2, axis=axis) - np.mean(data, axis=axis) ** 2
    assert not np.allclose(naive, exact, rtol=0.1), "the case is too easy"


def test_variance_survives_a_drift_inside_a_chunk() -> None:
    data = 1e8 * np.arange(50_000) + np.random.default_rng(0).normal(size=50_000)
    assert one(reducers.var(), data) == pytest.approx(np.var(data), rel=1e-12)


@quick
@given(constant=st.floats(-1e6, 1e6), rows=st.integers(1, 9), sizes=st.lists(st.integers(0, 4), max_size=4))
def test_a_constant_has_no_variance_and_no_shape(constant: float, rows: int, sizes: list[int]) -> None:
    for axis in (None, 0):
        got = fold(reducers.moments(axis), cut(np.full((rows, 3), constant), (2, 1)), tuple(sizes))
        np.testing.assert_allclose(got.mean, constant, rtol=1e-15)
        assert np.max(got.variance) <= (1e-16 * constant) ** 2
        assert np.isnan(got.skewness).all()
        assert np.isnan(got.kurtosis).all()
    assert one(reducers.var(), np.full(100_000, 2.5)) == 0


@pytest.mark.parametrize("ddof", [0, 1, 3])
def test_ddof(ddof: int) -> None:
    data = np.array([[1.0, np.nan, 4.0], [2.0, 5.0, np.nan], [7.0, np.nan, np.nan]])
    for axis in (None, 0):
        got = fold(reducers.std(axis, ddof=ddof), cut(data, (2, 2)))
        n = np.count_nonzero(~np.isnan(data), axis=axis)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = np.where(n > ddof, np.nanstd(data, axis=axis, ddof=ddof), np.nan)
        np.testing.assert_allclose(got, expected)


@quick
@given(case=cuts(st.floats(-100, 100) | st.just(math.nan), "f8"))
def test_moments_by_their_definition(case: Any) -> None:
    data, chunks, axis, sizes = case
    got = fold(reducers.moments(axis), chunks, sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mean = np.nanmean(data, axis=axis, keepdims=True)
        variance, third, fourth = (np.nanmean((data - mean) ** power, axis=axis) for power in (2, 3, 4))
        np.testing.assert_array_equal(got.count, np.count_nonzero(~np.isnan(data), axis=axis))
        np.testing.assert_allclose(got.mean, np.nanmean(data, axis=axis), atol=1e-11)
        np.testing.assert_allclose(got.variance, variance, atol=1e-9)
        assume((np.isnan(variance) | (variance > 1e-3)).all())
        np.testing.assert_allclose(got.skewness, third / variance**1.5, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(got.kurtosis, fourth / variance**2 - 3, rtol=1e-6, atol=1e-6)


def test_moments_of_many_blocks() -> None:
    data = np.random.default_rng(0).gamma(2, size=100_000).astype("f4")
    got = fold(reducers.moments(), cut(data, (30_000,)))
    d = data.astype("f8") - got.mean
    assert got.count == data.size
    assert got.skewness == pytest.approx(np.mean(d**3) / np.mean(d**2) ** 1.5, rel=1e-12)
    assert got.kurtosis == pytest.approx(np.mean(d**4) / np.mean(d**2) ** 2 - 3, rel=1e-12)
