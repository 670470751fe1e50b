"""The ready-made reducers together: of nothing, by the laws of a reducer, in a stream."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import zarr_dask_stream as zds
from reductions import ALL, NAMES, Array, cut, fold, quick, xarrays
from zarr_dask_stream.engine.partials import decode_value, encode_value
from zarr_dask_stream.stages import reducers
from zarr_dask_stream.stages.combine import Together


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


# -- on the way through a checkpoint ------------------------------------------------------------------

KEPT: dict[str, zds.Reducer] = {
    **LAWS,
    "count along": reducers.count(axis=0),
    "nan_count along": reducers.nan_count(axis=0),
    "max along": reducers.max(axis=(0, 1)),
    "var along": reducers.var(axis=1, skipna=False),
    "small quantile": reducers.quantile(0.5, size=16, bounds=True),
    "strict min": reducers.min(skipna=False),
    "strict argmax": reducers.argmax(skipna=False),
}
KEPT["together"] = Together({**KEPT, "nested": Together({"sum": reducers.sum(0), "min": reducers.min()})})


def through_json(partial: Any) -> Any:
    return decode_value(json.loads(json.dumps(encode_value(partial))))


def assert_identical(left: Any, right: Any) -> None:
    """Compare types and bits, which an ordinary comparison of NaN, -0.0 or True and 1 would not."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert list(left) == list(right)
        assert_identical(list(left.values()), list(right.values()))
    elif isinstance(left, tuple | list):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_identical(a, b)
    elif isinstance(left, np.ndarray | np.generic) and not left.dtype.hasobject:
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert left.tobytes() == right.tobytes()
    else:
        assert repr(left) == repr(right)


def elements_of(dtype: np.dtype[Any]) -> st.SearchStrategy[Any]:
    if dtype.kind in "mM":
        return hnp.from_dtype(dtype)
    if dtype.kind == "f":
        return st.sampled_from([0.0, -0.0, 1.5, 0.1, 7.25, -300.0, math.inf, -math.inf, math.nan])
    return hnp.from_dtype(dtype) | st.sampled_from([0, 1] if dtype.kind == "b" else [0, np.iinfo(dtype).max])


@pytest.mark.parametrize("name", KEPT)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_partials_survive_a_checkpoint(name: str, data: st.DataObject) -> None:
    dtypes = ["?", "u1", "i8", "u8", "f2", "f4", "f8", *(["M8[s]", "m8[D]"] if "min" in name else [])]
    dtype = np.dtype(data.draw(st.sampled_from(dtypes)))
    shape = data.draw(st.tuples(st.integers(2, 9), st.integers(1, 5)))
    chunks = cut(data.draw(hnp.arrays(dtype, shape, elements=elements_of(dtype))), (2, 3))
    half = data.draw(st.integers(0, len(chunks)))
    reducer = KEPT[name]

    def partial(group: list[zds.Chunk]) -> Any:
        return functools.reduce(reducer.add, group, reducer.create())

    def answer(left: Any, right: Any) -> Any:
        try:
            return reducer.finish(reducer.merge(left, right))
        except zds.UsageError as error:  # nothing has no place
            return str(error)

    first, second = chunks[:half], chunks[half:]
    assert_identical(through_json(partial(first)), partial(first))
    kept = answer(through_json(partial(first)), through_json(partial(second)))
    assert_identical(kept, answer(partial(first), partial(second)))


def test_sums_beyond_64_bits_survive_a_checkpoint() -> None:
    reducer = reducers.mean(axis=0)
    partial = functools.reduce(reducer.add, cut(np.full((4, 3), np.iinfo("i8").max), (1, 3)), reducer.create())
    assert_identical(through_json(partial), partial)
    assert reducer.finish(through_json(partial)).tolist() == [2.0**63] * 3


def test_of_nothing_a_partial_remembers_the_type() -> None:
    reducer = reducers.min()
    empty = zds.Chunk((0,), (slice(0, 1),), np.array([], "M8[s]"))
    got = reducer.finish(through_json(reducer.add(reducer.create(), empty)))
    assert_identical(got, np.datetime64("NaT", "s"))


@pytest.mark.parametrize(("on_error", "breaks", "done"), [("skip", (3, 2), 11), ("raise", (2, 1), 7)])
@pytest.mark.parametrize("name", ["f8", "i8"])
def test_an_interrupted_reduction_goes_on(
    tmp_path: Path, name: str, on_error: Literal["skip", "raise"], breaks: tuple[int, int], done: int
) -> None:
    data = np.random.default_rng(2).normal(0, 50, (12, 10)).astype(name)
    if name == "i8":
        data[:, 3] = np.iinfo("i8").max
    path, broken = str(tmp_path / "data.zarr"), tmp_path / "broken"
    zarr.create_array(path, shape=data.shape, chunks=(3, 4), dtype=name)[:] = data
    flag = str(broken)

    def stumble(chunk: zds.Chunk) -> Array:
        if chunk.index == breaks and Path(flag).exists():
            raise ValueError("not today")
        return np.asarray(chunk.data)

    def stream(checkpoint: Path | None) -> zds.ChunkStream:
        made = zds.stream_chunks(path, concurrency=1, checkpoint=checkpoint, on_error=on_error)
        return made.map(stumble).reduce(KEPT)

    expected = stream(None).compute()
    broken.touch()
    interrupted = stream(tmp_path / "ledger.json")
    if on_error == "skip":
        assert interrupted.compute()["count"] == data.size - 6
        assert interrupted.report.dead_lettered == 1
    else:
        with pytest.raises(zds.ChunkError, match="not today"):
            interrupted.compute()
    broken.unlink()
    resumed = stream(tmp_path / "ledger.json")
    got = resumed.compute()
    # What is left comes last both times, so that not even a rounding differs.
    assert resumed.report.resumed == done
    assert_identical(got, expected)


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
    """What a map returns is known only once it has run."""
    zarr.create_array(str(tmp_path / "c.zarr"), shape=(4,), chunks=(2,), dtype="f4")[:] = 1
    stream = zds.stream_chunks(str(tmp_path / "c.zarr"), concurrency=1).map(lambda chunk: chunk.data * 1j)
    with pytest.raises(zds.ChunkError, match="complex64") as caught:
        stream.reduce(zds.reducers.min()).compute()
    assert isinstance(caught.value.__cause__, zds.UsageError)


@pytest.mark.parametrize(
    ("dtype", "reducer", "message"),
    [
        ("S3", reducers.mean(), r"mean\(\) works on .*\|S3"),
        ("c8", [reducers.count(), reducers.min()], "complex64"),
        ("c8", {"a": {"b": reducers.var()}}, "complex64"),
        ("f4", reducers.mean(axis=2), "the data have 2 axes"),
    ],
)
def test_an_unsuitable_array_is_refused_before_it_is_read(
    tmp_path: Path, dtype: str, reducer: Any, message: str
) -> None:
    path = tmp_path / "data.zarr"
    zarr.create_array(str(path), shape=(4, 2), chunks=(2, 2), dtype=dtype, zarr_format=2)
    stream = zds.stream_chunks(str(path), concurrency=1, missing="raise")
    with pytest.raises(zds.UsageError, match=message):
        stream.reduce(reducer)
    with pytest.raises(zds.UsageError, match=message):
        stream.filter(bool).group_by(lambda index: index[0]).reduce(reducer)
    stream.map(np.mean).reduce(reducer)
    lookalike: Any = Lookalike()
    stream.reduce(lookalike)
    stream.reduce({"any": lookalike})


class Lookalike:
    """Has what a reduction needs, and is no `Reducer`."""

    def create(self) -> int:
        return 0

    def add(self, partial: int, chunk: zds.Chunk) -> int:
        return partial + 1

    def merge(self, left: int, right: int) -> int:
        return left + right

    def finish(self, partial: int) -> int:
        return partial
