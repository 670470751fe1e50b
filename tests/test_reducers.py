"""The ready-made reducers against NumPy and xarray on the same data, however it is cut and joined."""

from __future__ import annotations

import itertools
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import zarr_dask_stream as zds
from zarr_dask_stream.stages import reducers

Array = np.ndarray[Any, Any]
Make = Callable[..., zds.Reducer]

# Many of the properties below are tried for every reducer: a few dozen histories of each are enough.
quick = settings(max_examples=30, deadline=None)

NAMES: dict[str, Make] = {
    name: getattr(reducers, name) for name in ("count", "sum", "mean", "min", "max", "var", "std", "nan_count")
}


def cut(data: Array, chunks: tuple[int, ...], origin: tuple[int, ...] | None = None) -> list[zds.Chunk]:
    """Cut `data`, which lies at `origin` of its array, as a stream would."""
    origin = origin or (0,) * data.ndim
    out = []
    for corner in itertools.product(*(range(0, n, c) for n, c in zip(data.shape, chunks, strict=True))):
        local = tuple(slice(i, min(i + c, n)) for i, c, n in zip(corner, chunks, data.shape, strict=True))
        region = tuple(slice(s.start + o, s.stop + o) for s, o in zip(local, origin, strict=True))
        out.append(zds.Chunk(tuple(i // c for i, c in zip(corner, chunks, strict=True)), region, data[local]))
    return out


def fold(reducer: zds.Reducer, chunks: list[zds.Chunk], sizes: tuple[int, ...] = ()) -> Any:
    """Fold runs of so many chunks each into partials, send each by pickle, and merge them from both ends."""
    partials, rest = [], list(chunks)
    for size in sizes or (len(chunks),):
        partial = reducer.create()
        for chunk in rest[:size]:
            partial = reducer.add(partial, chunk)
        rest = rest[size:]
        partials.append(pickle.loads(pickle.dumps(partial)))
    partials += [reducer.add(reducer.create(), chunk) for chunk in rest]
    while len(partials) > 1:
        partials = [reducer.merge(partials.pop(), partials.pop(0)), *partials]
    return reducer.finish(partials[0])


def one(reducer: zds.Reducer, values: Any) -> Any:
    """Reduce an array as a single chunk, or a number as what a map returned."""
    shape = np.shape(values)
    return fold(reducer, [zds.Chunk((0,) * len(shape), tuple(slice(0, n) for n in shape), values)])


@st.composite
def axes_of(draw: st.DrawFn, ndim: int) -> Any:
    kept = draw(
        st.sampled_from([None, *(c for n in range(1, ndim + 1) for c in itertools.combinations(range(ndim), n))])
    )
    return kept if kept is None else tuple(draw(st.sampled_from([axis, axis - ndim])) for axis in kept)


@st.composite
def cuts(draw: st.DrawFn, elements: st.SearchStrategy[Any], dtype: Any) -> tuple[Array, list[zds.Chunk], Any, Any]:
    """Draw an array, its chunks (anywhere in a larger array, in any order), axes, and sizes of batches."""
    shape = draw(hnp.array_shapes(max_dims=3, max_side=6))
    data = draw(hnp.arrays(dtype, shape, elements=elements))
    chunks = tuple(draw(st.integers(1, n)) for n in shape)
    origin = tuple(draw(st.integers(0, 9)) for _ in shape)
    pieces = draw(st.permutations(cut(data, chunks, origin)))
    return data, pieces, draw(axes_of(len(shape))), tuple(draw(st.lists(st.integers(0, 4), max_size=5)))


NUMBERS = st.floats(-1e6, 1e6) | st.sampled_from([0.0, 1.0, -1.0, math.nan])


def xarrays(name: str, data: Array, axis: Any, **options: Any) -> Any:
    """What xarray says, of the data in double precision."""
    labelled = xr.DataArray(data)
    dims = None if axis is None else tuple(labelled.dims[i] for i in axis)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "nan_count":
            return np.asarray(labelled.isnull().sum(dims))
        return np.asarray(getattr(labelled, name)(dims, **({} if name == "count" else options)))


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


# -- sums of integers ---------------------------------------------------------------------------------


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


# -- variance -----------------------------------------------------------------------------------------


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


# -- histogram ----------------------------------------------------------------------------------------

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
        ((10,), "needs range="),
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


# -- quantiles ----------------------------------------------------------------------------------------

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


# -- places -------------------------------------------------------------------------------------------


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


# -- dates --------------------------------------------------------------------------------------------


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


# -- what is refused ----------------------------------------------------------------------------------

ALL: dict[str, zds.Reducer] = {
    **{name: make() for name, make in NAMES.items()},
    "moments": reducers.moments(),
    "histogram": reducers.histogram(4, (-10, 10)),
    "quantile": reducers.quantile(0.5),
    "argmin": reducers.argmin(),
    "argmax": reducers.argmax(),
}


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


# -- nothing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("name", NAMES)
def test_a_stream_without_chunks(name: str, axis: int | None) -> None:
    reducer = NAMES[name](axis)
    answer = reducer.finish(reducer.create())
    assert np.ndim(answer) == 0
    if name in ("count", "sum", "nan_count"):
        assert answer == 0
    else:
        assert math.isnan(answer)


def test_nothing_of_the_others() -> None:
    assert reducers.histogram(2, (0, 1)).finish(None).counts.tolist() == [0, 0]
    assert math.isnan(reducers.quantile(0.5).finish(None))
    assert np.isnan(reducers.quantile([0.5, 0.6]).finish(None)).all()
    assert math.isnan(reducers.quantile(0.5, bounds=True).finish(None).low)
    assert reducers.moments().finish(None).count == 0
    with pytest.raises(zds.UsageError, match="no place"):
        reducers.argmin().finish(None)


@pytest.mark.parametrize("dtype", ["f4", "i4"])
def test_empty_values_count_for_nothing(dtype: str) -> None:
    """What a map selects from a chunk may be empty."""
    empty = zds.Chunk((0,), (slice(0, 3),), np.array([], dtype))
    some = zds.Chunk((1,), (slice(3, 6),), np.array([4, 2], dtype))
    for name in ("count", "sum", "mean", "min", "max", "var", "nan_count", "moments", "histogram", "quantile"):
        reducer = ALL[name]
        alone, both = fold(reducer, [some]), fold(reducer, [empty, some, empty], (1, 1))
        np.testing.assert_equal(both, alone)
    if dtype == "f4":
        assert math.isnan(fold(reducers.min(), [empty]))
    else:
        with pytest.raises(zds.UsageError, match="no values at all"):
            fold(reducers.min(), [empty])
    assert math.isnan(fold(reducers.mean(), [empty]))
    assert math.isnan(fold(reducers.var(), [empty]))
    assert fold(reducers.sum(), [empty]) == 0


# -- boxes --------------------------------------------------------------------------------------------


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


# -- the laws of a reducer ----------------------------------------------------------------------------

LAWS = {
    **ALL,
    "sum along": reducers.sum(axis=0),
    "mean along": reducers.mean(axis=0),
    "min along": reducers.min(axis=0),
    "moments along": reducers.moments(axis=0),
}


def same(left: Any, right: Any) -> None:
    for a, b in zip(left, right, strict=True) if isinstance(left, tuple) else [(left, right)]:
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("dtype", ["f8", "i8"])
@quick
@given(
    values=hnp.arrays("f8", (9,), elements=st.integers(-50, 50).map(float)),
    gaps=st.sets(st.integers(0, 7)),
    order=st.permutations(range(3)),
)
def test_laws(name: str, dtype: str, values: Array, gaps: set[int], order: list[int]) -> None:
    reducer = LAWS[name]
    if dtype == "f8":
        values[list(gaps)] = np.nan
    chunks = cut(values.astype(dtype), (1,))
    groups = [chunks[:3], chunks[3:5], chunks[5:]]

    def partial(group: list[zds.Chunk]) -> Any:
        out = reducer.create()
        for chunk in group:
            out = reducer.add(out, chunk)
        return out

    a, b, c = (groups[i] for i in order)
    merge, finish = reducer.merge, reducer.finish
    together = finish(partial(chunks))
    same(finish(merge(merge(partial(a), partial(b)), partial(c))), together)
    same(finish(merge(partial(a), merge(partial(b), partial(c)))), together)
    same(finish(merge(merge(reducer.create(), partial(c)), merge(partial(b), partial(a)))), together)
    same(finish(merge(partial(chunks), reducer.create())), together)
    assert "(" in repr(reducer)


def test_numbers_from_a_map() -> None:
    chunks = [zds.Chunk((i,), (slice(i, i + 1),), value) for i, value in enumerate([1, 2.5, np.float32(3), True])]
    assert fold(reducers.sum(), chunks, (1, 2)) == 7.5
    assert fold(reducers.count(), chunks) == 4
    assert fold(reducers.max(), chunks) == 3
    assert fold(reducers.mean(), chunks) == 1.875


def test_names_in_a_list_and_representations() -> None:
    several = [reducers.min(), reducers.max(), reducers.mean(axis=0), reducers.histogram(2, (0, 1))]
    assert [one.name for one in several] == ["min", "max", "mean", "histogram"]
    assert repr(reducers.var(axis=(0, 2), skipna=False, ddof=1)) == "var(axis=(0, 2), skipna=False, ddof=1)"
    assert repr(reducers.std(ddof=1)) == "std(ddof=1)"
    assert repr(reducers.mean(0, placed=True)) == "mean(axis=0, placed=True)"
    assert repr(reducers.histogram([0, 1, math.inf])) == "histogram(2 bins from 0 to inf)"


# -- in a stream --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Array]:
    data = np.random.default_rng(11).normal(280, 9, (30, 21, 17)).astype("f4")
    data[:, :4, :4] = np.nan
    data[6:12, 8:16, 5:10] = -5  # never stored: the fill value
    path = str(tmp_path_factory.mktemp("reducers") / "data.zarr")
    array = zarr.create_array(path, shape=data.shape, chunks=(6, 8, 5), dtype="f4", fill_value=-5)
    array[:] = data
    assert not (Path(path) / "c" / "1" / "1" / "1").exists()
    return path, data


@pytest.mark.parametrize("concurrency", [1, None])
def test_several_at_once(stored: tuple[str, Array], concurrency: int | None) -> None:
    path, data = stored
    wide = data.astype("f8")
    stream = zds.stream_chunks(path, concurrency=concurrency)
    got = stream.reduce(
        [
            zds.reducers.count(),
            zds.reducers.sum(),
            zds.reducers.min(),
            zds.reducers.max(),
            zds.reducers.mean(),
            zds.reducers.std(),
            zds.reducers.nan_count(),
            zds.reducers.histogram(20, (200, 300)),
            zds.reducers.quantile([0.1, 0.5]),
            zds.reducers.argmax(),
            zds.reducers.moments(),
        ]
    ).compute()
    assert got["count"] == np.count_nonzero(~np.isnan(data))
    assert got["nan_count"] == np.count_nonzero(np.isnan(data))
    assert got["sum"] == pytest.approx(np.nansum(wide), rel=1e-14)
    assert got["mean"] == pytest.approx(np.nanmean(wide), rel=1e-14)
    assert got["std"] == pytest.approx(np.nanstd(wide), rel=1e-12)
    assert (got["min"], got["max"]) == (np.nanmin(data), np.nanmax(data))
    assert data[got["argmax"]] == got["max"]
    assert got["histogram"].below == np.count_nonzero(wide < 200) >= 240
    assert got["moments"].variance == pytest.approx(np.nanvar(wide), rel=1e-12)
    np.testing.assert_allclose(got["quantile"], np.nanquantile(wide, [0.1, 0.5]), rtol=1e-3)


@pytest.mark.parametrize("concurrency", [1, None])
def test_along_axes_with_a_region(stored: tuple[str, Array], concurrency: int | None) -> None:
    path, data = stored
    region = (slice(4, 29), slice(3, 20), slice(1, 13))
    stream = zds.stream_chunks(path, region=region, concurrency=concurrency, ordered=False)
    got = stream.reduce(
        {"mean": zds.reducers.mean(axis=0), "max": zds.reducers.max(axis=(0, 2), placed=True)}
    ).compute()
    labelled = xr.DataArray(data[region].astype("f8"))
    np.testing.assert_allclose(got["mean"], labelled.mean("dim_0"), rtol=1e-13)
    assert got["max"].region == (slice(3, 20),)
    np.testing.assert_array_equal(got["max"].data, labelled.max(("dim_0", "dim_2")))


def test_skipped_chunks_take_no_part(stored: tuple[str, Array]) -> None:
    path, data = stored
    smallest = {
        missing: zds.stream_chunks(path, missing=missing, concurrency=1).reduce(zds.reducers.min()).compute()
        for missing in ("fill", "skip")
    }
    assert smallest == {"fill": -5, "skip": np.nanmin(data[data > 0])}


def test_grouped(stored: tuple[str, Array]) -> None:
    path, data = stored
    got = zds.stream_chunks(path, concurrency=1).group_by(lambda index: index[0]).reduce(zds.reducers.mean(0)).compute()
    assert list(got) == [0, 1, 2, 3, 4]
    for step, answer in got.items():
        np.testing.assert_allclose(
            answer, xarrays("mean", data[6 * step : 6 * step + 6].astype("f8"), (0,)), rtol=1e-13
        )


def test_an_unsuitable_type_names_itself(tmp_path: Path) -> None:
    zarr.create_array(str(tmp_path / "c.zarr"), shape=(4,), chunks=(2,), dtype="c8")[:] = 1
    with pytest.raises(zds.ChunkError, match="complex64") as caught:
        zds.stream_chunks(str(tmp_path / "c.zarr"), concurrency=1).reduce(zds.reducers.min()).compute()
    assert isinstance(caught.value.__cause__, zds.UsageError)
