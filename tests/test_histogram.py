"""Histograms against NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import zarr_dask_stream as zds
from reductions import cuts, fold, one, quick
from zarr_dask_stream.stages import reducers

EDGES = st.lists(st.sampled_from([-math.inf, -7.5, -1, 0, 0.1, 1, 2, 3.5, 100, math.inf]), min_size=2, unique=True)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i1", "u1", "i2", "i8", "?"])
@quick
@given(data=st.data())
def test_histogram_like_numpy(dtype: str, data: st.DataObject) -> None:
    elements = {"f": st.sampled_from([-8, -7.5, -1, 0, 0.1, 0.5, 1, 2, 99, math.inf, -math.inf, math.nan])}
    array, chunks, _, sizes = data.draw(cuts(elements.get(dtype[0], hnp.from_dtype(np.dtype(dtype))), dtype))
    edges = sorted(data.draw(EDGES))
    got = fold(reducers.histogram(edges), chunks, sizes)
    plain = array.astype("f8").ravel()
    np.testing.assert_array_equal(got.counts, np.histogram(plain[~np.isnan(plain)], edges)[0])
    np.testing.assert_array_equal(got.edges, edges)
    assert got.counts.dtype == np.int64
    assert got.nan == np.count_nonzero(np.isnan(plain))
    assert got.below == np.count_nonzero(plain < edges[0])
    assert got.above == np.count_nonzero(plain > edges[-1])


def test_histogram_of_a_large_chunk() -> None:
    data = np.random.default_rng(0).normal(10, 3, (500, 400)).astype("f4")
    data[::9, ::7] = np.nan
    got = one(reducers.histogram(40, (0, 20)), data)
    counts, edges = np.histogram(data.astype("f8"), 40, (0, 20))
    np.testing.assert_array_equal(got.counts, counts)
    np.testing.assert_array_equal(got.edges, edges)
    assert got.counts.sum() + got.below + got.above + got.nan == data.size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10,), "need range="),
        ((0, (0, 1)), "at least 1"),
        ((10, (1, 1)), "the first the smaller"),
        ((10, (0, math.inf)), "finite"),
        ((10, (0, 1, 2)), "two numbers"),
        ((10, 5), "two numbers"),
        ((1000, (1.0, math.nextafter(1, 2))), "too fine"),
        (([0, 1], (0, 1)), "says? it already"),
        (([0],), "at least two"),
        (([0, 0, 1],), "above the one before"),
        (([0, math.nan],), "above the one before"),
        (([[0, 1]],), "at least two"),
        (("auto",), "an int or a sequence"),
    ],
)
def test_histogram_refuses(arguments: Any, message: str) -> None:
    with pytest.raises(zds.UsageError, match=message):
        reducers.histogram(*arguments)
