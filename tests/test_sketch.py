"""Quantiles: exact for few values, within their bound for many."""

from __future__ import annotations

import math
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import zarr_dask_stream as zds
from reductions import NUMBERS, cut, cuts, fold, one, quick
from zarr_dask_stream.stages import reducers

QS = [0, 0.001, 0.25, 0.5, 0.9, 1]


@quick
@given(case=cuts(NUMBERS | st.sampled_from([math.inf, -math.inf]), "f4"))
def test_quantiles_of_few_values_are_exact(case: Any) -> None:
    data, chunks, _, sizes = case
    got = fold(reducers.quantile(QS), chunks, sizes)
    valid = data[~np.isnan(data)].astype("f8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.quantile(valid, QS) if valid.size else np.full(len(QS), np.nan)
    np.testing.assert_array_equal(got, expected)
    scalar = fold(reducers.quantile(0.5), chunks)
    assert np.ndim(scalar) == 0


@quick
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 6000),
    chunk=st.integers(1, 900),
    kind=st.sampled_from(["normal", "sorted", "heavy", "few"]),
    sizes=st.lists(st.integers(0, 9), max_size=9),
)
def test_quantiles_keep_their_bound(seed: int, n: int, chunk: int, kind: str, sizes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 5, n).astype("f8") if kind == "few" else rng.standard_cauchy(n)
    data = np.sort(data) if kind == "sorted" else data
    data[rng.random(n) < 0.02] = np.nan if kind == "heavy" else 0
    valid = np.sort(data[~np.isnan(data)])
    assume(valid.size)
    size = 16
    got = fold(reducers.quantile(QS, size=size, bounds=True), cut(data, (chunk,)), tuple(sizes))
    assert got.rank_error <= (1 + math.log2(max(1, valid.size / size))) / size
    assert (got.value[0], got.value[-1]) == (valid[0], valid[-1])
    assert ((got.low <= got.value) & (got.value <= got.high)).all()
    if not got.rank_error:
        np.testing.assert_array_equal(got.value, np.quantile(valid, QS))
        return
    assert (got.low <= np.quantile(valid, QS, method="lower")).all()
    assert (got.high >= np.quantile(valid, QS, method="higher")).all()
    slack = got.rank_error * valid.size + 1
    wanted = np.array(QS) * (valid.size - 1) + 1
    assert (np.searchsorted(valid, got.value, "left") + 1 <= wanted + slack).all()
    assert (np.searchsorted(valid, got.value, "right") >= wanted - slack).all()


def test_quantiles_of_many_values() -> None:
    data = np.random.default_rng(1).normal(size=(1000, 1000)).astype("f4")
    reducer = reducers.quantile([0.01, 0.5, 0.99], bounds=True)
    got = fold(reducer, cut(data, (100, 250)))
    assert 0 < got.rank_error < 0.003
    true = np.sort(data, axis=None)
    ranks = np.searchsorted(true, got.value) / data.size
    np.testing.assert_allclose(ranks, [0.01, 0.5, 0.99], atol=0.0005)
    assert len(pickle.dumps(reducer.add(reducer.create(), cut(data, (1000, 1000))[0]))) < 50_000


def test_quantile_without_skipping() -> None:
    assert math.isnan(one(reducers.quantile(0.5, skipna=False), np.array([1, np.nan])))
    assert one(reducers.quantile(0.5, skipna=False), np.array([1, 4])) == 2.5


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((50,), {}, "not percent"),
        (("median",), {}, "a number"),
        ((0.5,), {"size": 3}, "at least 16"),
        ((math.nan,), {}, "0 to 1"),
    ],
)
def test_quantile_refuses(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(zds.UsageError, match=message):
        reducers.quantile(*arguments, **options)
