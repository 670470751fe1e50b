"""From what xarray has opened back to what is stored: exactly, or refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import zarr_dask_stream as zds
from zarr_dask_stream.opened import of_dataset
from zarr_dask_stream.source.traced import is_loaded, kind_of, trace

#: Ways to open: without Dask, in stored chunks, in others, and in one.
WAYS: list[dict[str, Any]] = [{"chunks": None}, {"chunks": {}}, {"chunks": {"time": 3, "lat": 2}}, {"chunks": -1}]


def assert_same(found: Any, expected: Any) -> None:
    xr.testing.assert_identical(found, expected)
    for name in [*expected.coords, *getattr(expected, "data_vars", ())]:
        assert found[name].dtype == expected[name].dtype, name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset with packed values, times, flags, text, and coordinates of all kinds."""
    numbers = np.arange(480).reshape(10, 6, 8)
    times = np.datetime64("2000-01-01", "ns") + np.arange(10) * np.timedelta64(1, "D")
    found = xr.Dataset(
        {
            "t2m": (("time", "lat", "lon"), np.where(numbers % 7, numbers / 10, np.nan), {"units": "K"}),
            "plain": (("time", "lat", "lon"), numbers),
            "when": (("time", "lat"), times[:, None] + np.arange(6) * np.timedelta64(1, "h")),
            "flag": (("lat", "lon"), numbers[0] % 2 == 1),
            "text": (("lat",), np.array(list("abcdef"), dtype=object)),
            "mean": ((), 2.5),
        },
        {
            "time": times,
            "lat": np.linspace(-50, 50, 6, dtype="f4"),
            "area": (("lat", "lon"), numbers[0] / 3),
            "height": ("lat", np.arange(6.0)),
            "run": times[0],
        },
        {"title": "made up"},
    )
    packed = {"dtype": "i2", "scale_factor": 0.1, "add_offset": 20.0, "_FillValue": -9, "chunks": (4, 3, 4)}
    place = tmp_path_factory.mktemp("traced") / "data"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr remarks on what is no part of version 3
        found.to_zarr(place, encoding={"t2m": packed, "plain": {"chunks": (3, 6, 5)}, "area": {"chunks": (2, 8)}})
    return place


def opened(folder: Path, **way: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dask remarks on chunks that cut stored ones
        return xr.open_zarr(folder, **way)


def kept(folder: Path, *names: str) -> list[str]:
    """Leave out the text where xarray loads it as it opens a store: releases up to 2026.7 do."""
    loads = is_loaded(opened(folder, chunks=None).text)
    return [name for name in names if name != "text" or not loads]


def entries(n: int) -> st.SearchStrategy[slice | int]:
    """Draw slices and positions as people write them, from either end."""
    bound = st.none() | st.integers(-n - 2, n + 2)
    return st.builds(slice, bound, bound) | st.integers(-n, n - 1)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_selection_is_traced_to_its_place(folder: Path, data: st.DataObject) -> None:
    found = opened(folder, **data.draw(st.sampled_from(WAYS)))
    for _ in range(data.draw(st.integers(1, 3))):
        dims = [str(dim) for dim in found.t2m.dims if found.sizes[dim]]
        chosen = data.draw(st.sets(st.sampled_from(dims))) if dims else set()
        found = found.isel({dim: data.draw(entries(found.sizes[dim])) for dim in sorted(chosen)})
    expected = found.copy().load()
    for name in kept(folder, "t2m", "plain", "when", "flag", "text", "mean"):
        traced = trace(found[name], name)
        whole = zarr.open_group(folder, mode="r")[name]
        assert isinstance(whole, zarr.Array)
        values: Any = np.asarray(whole[traced.region])
        for step in traced.steps:
            values = step(values)
        values = np.squeeze(values, traced.pinned)
        np.testing.assert_array_equal(values, expected[name].values)
        assert np.asarray(values).dtype == expected[name].dtype == traced.dtype


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_items_are_pieces_of_what_xarray_shows(folder: Path, data: st.DataObject) -> None:
    whole = opened(folder, **data.draw(st.sampled_from(WAYS)))
    mixed = kept(folder, "plain", "flag", "when", "text")
    names = data.draw(st.sampled_from([["t2m"], ["t2m", "plain", "mean"], mixed]))
    found = whole[names].isel(
        {dim: data.draw(entries(n)) for dim, n in whole.sizes.items() if data.draw(st.booleans())}
    )
    stream = zds.stream_dataset(found, concurrency=1)
    expected = found.copy().load()
    starts = [part.start for part in stream._options.plan.box]
    count = 0
    for item in stream:
        here = {
            str(dim): slice(part.start - start, part.stop - start)
            for dim, part, start in zip(stream.dims or (), item.region, starts, strict=True)
        }
        piece = expected.isel({dim: part for dim, part in here.items() if dim in expected.dims})
        labelled = item.to_xarray()
        assert_same(labelled, piece)
        for name in names:
            assert item.data[name].dtype == expected[name].dtype
            np.testing.assert_array_equal(item.data[name].reshape(piece[name].shape), piece[name].values)
        count += 1
    assert count == len(stream)
    assert bool(count) == all(expected.sizes.values())


@pytest.mark.parametrize("way", WAYS[:2])
def test_the_chunks_of_a_dataarray(folder: Path, way: Any) -> None:
    found = opened(folder, **way).t2m.isel(time=slice(3, 9), lon=-2)
    stream = zds.stream_chunks(found, concurrency=1)
    assert stream.dims == ("time", "lat", "lon[6]")
    expected = found.copy().load()
    regions = []
    for item in stream:
        time, lat, lon = item.region
        piece = expected.isel(time=slice(time.start - 3, time.stop - 3), lat=lat)
        assert lon == slice(6, 7)
        np.testing.assert_array_equal(item.data[..., 0], piece.values)
        assert_same(item.to_xarray(), piece)
        regions.append((time.start, time.stop))
    assert sorted(set(regions)) == [(3, 4), (4, 8), (8, 9)]
    assert stream.reduce(zds.reducers.mean()).compute() == pytest.approx(float(expected.mean()))
    boxes = stream.rechunk({"time": 10, "lat": -1})
    assert [item.region[0] for item in boxes] == [slice(3, 9)]


def test_values_that_are_decoded_already_are_not_decoded_again(folder: Path) -> None:
    (item, *_) = zds.stream_dataset(opened(folder), "t2m", concurrency=1)
    with pytest.raises(zds.UsageError, match="mask_and_scale: the values are decoded as the xarray object was opened"):
        item.to_xarray(mask_and_scale=False)
    raw = opened(folder, mask_and_scale=False)
    (item, *_) = zds.stream_dataset(raw, "t2m", concurrency=1)
    assert item.data["t2m"].dtype == np.dtype("i2")
    assert_same(item.to_xarray(), raw[["t2m"]].isel(time=slice(0, 4), lat=slice(0, 3), lon=slice(0, 4)).load())


def test_what_was_changed_beside_the_values_is_kept(folder: Path) -> None:
    found = opened(folder)[["t2m"]].rename({"lat": "y", "t2m": "temperature"}).assign_attrs(title="other")
    found.temperature.attrs["units"] = "kelvin"
    found = found.assign_coords(y=np.arange(6) * 10)
    (item, *_) = zds.stream_dataset(found, concurrency=1)
    part = found.isel(time=slice(0, 4), y=slice(0, 3), lon=slice(0, 4))
    assert_same(item.to_xarray(), part.copy().load())


def test_a_dataarray_may_be_streamed_as_a_dataset(folder: Path) -> None:
    (item, *_) = zds.stream_dataset(opened(folder).t2m, coords=["time"], concurrency=1)
    assert list(item.to_xarray().coords) == ["time"]
    assert item.to_xarray().t2m.shape == (4, 3, 4)


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "arithmetic": (lambda ds: ds.t2m + 1, "does more than slice|is in memory"),
    "a step": (lambda ds: ds.t2m.isel(time=slice(None, None, 2)), "sliced with step 2"),
    "backwards": (lambda ds: ds.t2m.isel(time=slice(None, None, -1)), "sliced with step -1"),
    "a list": (lambda ds: ds.t2m.isel(time=[1, 3]), "list of positions or a mask|does more than slice"),
    "a mask": (lambda ds: ds.t2m[:, ds.height.values > 2], "list of positions or a mask|does more than slice"),
    "points": (
        lambda ds: ds.t2m.isel(time=xr.DataArray([0, 1], dims="p"), lat=xr.DataArray([1, 0], dims="p")),
        "points of it picked|does more than slice",
    ),
    "another order": (lambda ds: ds.t2m.transpose("lon", "time", "lat"), "reordered|does more than slice"),
    "loaded": (lambda ds: ds.t2m.load(), "is in memory"),
    "concatenated": (lambda ds: xr.concat([ds.t2m, ds.t2m], "time"), "does more than slice|is in memory"),
    "a mean": (lambda ds: ds.t2m.mean("time"), "does more than slice|is in memory"),
    "cast": (lambda ds: ds.t2m.astype("f4"), "does more than slice|is in memory"),
    "filled": (lambda ds: ds.t2m.fillna(0), "does more than slice|is in memory"),
    "shifted": (lambda ds: ds.t2m.shift(time=1), "does more than slice|is in memory"),
    "rolled": (lambda ds: ds.plain.roll(time=1), "does more than slice|is in memory"),
    "stacked": (lambda ds: ds.t2m.stack(z=("lat", "lon")), "does more than slice|is in memory|one of several levels"),
    "made": (lambda _: xr.DataArray(np.arange(4.0), dims="x"), "is in memory"),
    "an index": (lambda ds: ds.time, "is in memory"),
    "expanded": (
        lambda ds: ds.t2m.expand_dims("member"),
        "does more than slice|is in memory|selects in an unknown way",
    ),
    "sorted": (lambda ds: ds.t2m.sortby("lat", ascending=False), "list of positions|does more than slice"),
    "chunked anew": (lambda ds: ds.t2m.chunk({"time": 5}).chunk({"time": 3}), "does more than slice"),
}


@pytest.mark.parametrize("way", WAYS[:3], ids=["plain", "stored chunks", "other chunks"])
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_traced_exactly_is_refused(folder: Path, way: Any, what: str) -> None:
    change, words = REFUSED[what]
    with pytest.raises(zds.UsageError, match=words):
        zds.stream_chunks(change(opened(folder, **way)))


@pytest.mark.parametrize("chunked", [False, True])
def test_text_that_an_older_xarray_has_loaded_is_refused_with_a_way_out(folder: Path, chunked: bool) -> None:
    text = opened(folder, chunks=None).text.load().variable
    if chunked:
        parts = pytest.importorskip("xarray.core.indexing")  # such releases hand it to Dask like this
        source = parts.ImplicitToExplicitIndexingAdapter(parts.NumpyIndexingAdapter(text.values))
        text = xr.Variable("lat", dask.array.from_array(source, 3, name="text"))
    with pytest.raises(zds.UsageError, match=r"in memory.* load all text .* pass the URL instead"):
        trace(text, "text")
    with pytest.raises(zds.UsageError, match=r"chunks=None\)$"):
        trace(opened(folder, chunks=None).t2m.load(), "t2m")


GRAPHS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "blocks in another order": (lambda d: d.blocks[[1, 0]], "does more than slice"),
    "blocks twice": (lambda d: d.blocks[[0, 0]], "does more than slice"),
    "joined": (lambda d: dask.array.concatenate([d[:2], d[2:4]]), "does more than slice"),
    "stacked": (lambda d: dask.array.stack([d[0], d[1]]), "does more than slice"),
    "flipped": (lambda d: dask.array.flip(d, 1), "sliced with step -1"),
    "rolled": (lambda d: dask.array.roll(d, 1, axis=0), "does more than slice"),
    "gaps within blocks": (lambda d: d[:, ::2], "sliced with step 2"),
    "a function": (lambda d: d.map_blocks(np.negative), "does more than slice"),
    "from memory": (
        lambda d: dask.array.from_array(np.zeros(d.shape), d.chunks),
        "does more than slice",
    ),
    "made": (lambda d: dask.array.zeros(d.shape, chunks=d.chunks), "does more than slice"),
    "persisted": (lambda d: d.persist(scheduler="sync"), "does more than slice"),
    "a field": (lambda d: d.astype([("a", "f8")])["a"], "does more than slice"),
}


@pytest.mark.parametrize("what", GRAPHS)
def test_dask_graphs_that_do_more_than_slice(folder: Path, what: str) -> None:
    change, words = GRAPHS[what]
    changed = change(opened(folder, chunks={}).plain.data)
    with pytest.raises(zds.UsageError, match=words):
        trace(xr.Variable([f"d{axis}" for axis in range(changed.ndim)], changed), "plain")


def test_dask_graphs_that_only_slice(folder: Path) -> None:
    data = opened(folder, chunks={}).plain.data  # blocks of (3, 6, 5)
    for changed, place in (
        (data[1:][3:], (slice(4, 10), slice(0, 6), slice(0, 8))),
        (data[3:9, :, 5:], (slice(3, 9), slice(0, 6), slice(5, 8))),
        (data[2:][:-1, 1][..., 3:6], (slice(2, 9), 1, slice(3, 6))),
    ):
        traced = trace(xr.Variable([f"d{axis}" for axis in range(changed.ndim)], changed), "plain")
        assert traced.place == place
        numbers = np.arange(480).reshape(10, 6, 8)
        np.testing.assert_array_equal(changed.compute(scheduler="sync"), numbers[place])


def test_characters_that_were_joined_are_refused(tmp_path: Path) -> None:
    letters = zarr.create_group(tmp_path, zarr_format=2).create_array("t", shape=(3, 4), chunks=(2, 2), dtype="S1")
    letters.attrs["_ARRAY_DIMENSIONS"] = ["x", "string4"]
    letters[...] = b"a"
    found = xr.open_zarr(tmp_path, chunks=None, consolidated=False)
    with pytest.raises(zds.UsageError, match=r"characters were joined to strings .*concat_characters=False"):
        zds.stream_chunks(found.t)
    # Where they are joined afterwards, a box has all letters of a word.
    items = [item.to_xarray() for item in zds.stream_dataset(tmp_path, concurrency=1)]
    assert_same(xr.concat(items, "x"), found.load())


def test_an_array_that_has_grown_since_it_was_opened_is_refused(tmp_path: Path) -> None:
    array = zarr.create_group(tmp_path).create_array("t", shape=(4,), dtype="i2", dimension_names=["x"])
    found = xr.open_zarr(tmp_path, consolidated=False, chunks=None)
    array.resize((6,))
    with pytest.raises(zds.UsageError, match=r"opened with shape \(4,\), and has \(6,\) now"):
        zds.stream_chunks(found.t)


def test_variables_of_different_places_do_not_go_together(folder: Path) -> None:
    found = opened(folder, chunks=None)
    early, late = found.t2m.isel(time=slice(0, 4)), found.plain.isel(time=slice(4, 8))
    both = early.to_dataset().drop_vars("time").assign(late=late.drop_vars("time"))
    with pytest.raises(zds.UsageError, match="0:4 of 't2m' is shown beside 4:8 of 'plain'"):
        zds.stream_dataset(both)


def test_what_goes_along_with_an_xarray_object(folder: Path) -> None:
    found = opened(folder)
    with pytest.raises(zds.UsageError, match="stream_dataset takes it"):
        zds.stream_chunks(found)
    with pytest.raises(zds.UsageError, match="slice it, with"):
        zds.stream_chunks(found.t2m, region=3)
    with pytest.raises(zds.UsageError, match=r"region= does not go with an xarray object: slice the object itself"):
        zds.stream_dataset(found, region={"time": 1})
    with pytest.raises(zds.UsageError, match="group= does not go with an xarray object: it is open already"):
        zds.stream_dataset(found, group="a")
    with pytest.raises(zds.UsageError, match=r"no variable 't2n' in the Dataset; did you mean 't2m'\?"):
        zds.stream_dataset(found, "t2n")
    with pytest.raises(zds.UsageError, match=r"no coordinate 'hight' of these variables; did you mean 'height'\?"):
        zds.stream_dataset(found, "t2m", coords=["hight"])
    with pytest.raises(zds.UsageError, match="no variables to stream"):
        zds.stream_dataset(found[["time"]])


def test_a_coordinate_that_cannot_be_traced_is_refused_or_left_out(folder: Path) -> None:
    found = opened(folder).assign_coords(twice=lambda ds: 2 * ds.area)
    with pytest.raises(zds.UsageError, match=r"'twice' can't be traced back .*\(mul"):
        zds.stream_dataset(found, "t2m")
    with pytest.raises(zds.UsageError, match=r"coordinate 'twice' .* leave it out: \.drop_vars\('twice'\)"):
        zds.stream_chunks(found.t2m)
    assert len(zds.stream_dataset(found, "t2m", coords=["time"])) == len(
        zds.stream_chunks(found.t2m.drop_vars("twice"))
    )
    numbered = opened(folder, chunks=None).t2m.assign_coords(day=("time", np.arange(10)), hour=("time", np.arange(10)))
    levels = numbered.set_index(time=["day", "hour"])
    with pytest.raises(zds.UsageError, match="one of several levels"):
        zds.stream_chunks(levels)


def test_coordinates_that_are_too_large_to_go_along(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zarr_dask_stream.opened._SMALL_BYTES", 64)
    found = opened(folder, chunks=None)
    (item, *_) = zds.stream_chunks(found.t2m, concurrency=1)
    with pytest.raises(zds.UsageError, match=r"coordinates 'area', 'time' are too large to go with each task: drop"):
        item.to_xarray()
    (item, *_) = zds.stream_dataset(found[["t2m"]].drop_vars("time"), concurrency=1)
    part = found[["t2m"]].drop_vars("time").isel(time=slice(0, 4), lat=slice(0, 3), lon=slice(0, 4))
    assert_same(item.to_xarray(), part.copy().load())


def test_decoded_values_have_no_constant_edge(folder: Path) -> None:
    stream = zds.stream_chunks(opened(folder).t2m)
    with pytest.raises(zds.UsageError, match="a constant boundary is a stored value"):
        stream.halo(1, 0)
    stream = zds.stream_chunks(opened(folder).t2m, concurrency=1).halo({"lon": 1}, "nearest")
    (item, *_) = stream
    np.testing.assert_array_equal(item.data[..., 0], item.data[..., 1])
    assert item.data.dtype == np.dtype("f8")


def test_xarray_objects_on_a_cluster(folder: Path, client: object) -> None:
    """The functions that decode travel with the work."""
    found = opened(folder).isel(time=slice(1, None))
    stream = zds.stream_dataset(found, ["t2m", "when"])
    expected = found[["t2m", "when"]].compute()
    answer = stream.reduce({"t2m": zds.reducers.mean()}).compute()
    assert answer["t2m"] == pytest.approx(float(expected.t2m.mean()))
    for item in stream:
        time, lat, lon = item.region
        part = expected.isel(time=slice(time.start - 1, time.stop - 1), lat=lat, lon=lon)
        assert_same(item.to_xarray(), part)


def test_what_is_of_xarray_is_known_without_it() -> None:
    assert kind_of(xr.Dataset()) == "Dataset"
    assert kind_of(xr.DataArray(1)) == "DataArray"
    assert kind_of({}) == kind_of("Dataset") == kind_of(xr.Variable((), 1)) == ""
    with pytest.raises(zds.UsageError):
        of_dataset(xr.Dataset(), None, True, None)
