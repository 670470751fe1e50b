"""Items labelled by xarray are what xarray itself makes of the same part of the same store."""

from __future__ import annotations

import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import zarr_dask_stream as zds
from zarr_dask_stream.source import labels as labels_module

LENGTHS = {"time": 7, "lat": 4, "lon": 5}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"mask_and_scale": False},
    {"decode_times": False},
    {"decode_coords": False},
    {"decode_cf": False},
    {"decode_timedelta": True},
    {"decode_times": xr.coders.CFDatetimeCoder(time_unit="s")},
    {"decode_times": xr.coders.CFDatetimeCoder(use_cftime=True)},
]
NUMBERS: list[dict[str, Any]] = [
    {},
    {"dtype": "i2", "scale_factor": 0.25, "add_offset": 3.0, "_FillValue": -999},
    {"dtype": "u1", "scale_factor": np.float32(2), "_FillValue": 255},
    {"dtype": "i1", "_Unsigned": "true", "_FillValue": -1},
    {"dtype": "i4", "missing_value": 7, "_FillValue": 7},
    {"dtype": "f4", "_FillValue": np.nan},
    {"dtype": "f4", "add_offset": 100.0},
    {"dtype": ">f8", "_FillValue": None},
    {"dtype": "f2"},
]
TIMES: list[dict[str, Any]] = [
    {"units": "days since 2000-01-01", "dtype": "i4"},
    {"units": "hours since 1970-01-01", "dtype": "f8", "_FillValue": -1.0},
    {"units": "days since 1850-01-01", "calendar": "noleap"},
    {"units": "seconds since 0001-01-01", "calendar": "proleptic_gregorian"},
]
VALUES = ["numbers", "times", "durations", "flags", "text", "bytes", "letters", "complex"]


def variable(data: st.DataObject, kind: str, dims: tuple[str, ...]) -> xr.Variable:
    """Draw values of a kind, with an encoding that suits them."""
    shape = tuple(LENGTHS[dim] for dim in dims)
    count = np.arange(int(np.prod(shape))).reshape(shape)
    attrs = {"long_name": kind, "valid_range": [0, 9]}
    encoding: dict[str, Any] = (
        {"chunks": tuple(data.draw(st.integers((n + 1) // 2, n)) for n in shape)} if shape else {}
    )
    if kind == "numbers":
        encoding |= data.draw(st.sampled_from(NUMBERS))
        values: Any = count % 100 + 0.5 * (encoding.get("dtype", "f") in ("f4", ">f8", "f2"))
        if encoding.get("_FillValue", 0) is not None and encoding.get("dtype") != "f2":
            values = np.where(count % 6 == 5, np.nan, values.astype("f8"))
    elif kind == "times":
        encoding |= data.draw(st.sampled_from(TIMES))
        values = np.datetime64("2001-02-03", "ns") + count * np.timedelta64(1, "D")
        if encoding.get("calendar") == "noleap":
            values = xr.date_range("2001-02-03", periods=count.size, calendar="noleap", use_cftime=True).values
            values = values.reshape(shape)
    elif kind == "durations":
        values = (count * 3).astype("m8[h]").astype("m8[ns]")
        encoding |= {"units": "hours"}
    elif kind == "flags":
        values = count % 2 == 1
    elif kind == "text":
        values = np.array([f"word {n}" for n in count.flat], dtype=object).reshape(shape)
    else:
        values = count.astype({"bytes": "S4", "letters": "U3", "complex": "c8"}[kind])
    return xr.Variable(dims, values, attrs, encoding)


def dataset(data: st.DataObject) -> xr.Dataset:
    kinds = st.sampled_from(VALUES)
    variables = {
        f"v{at}": variable(
            data, data.draw(kinds), data.draw(st.sampled_from([tuple(LENGTHS), ("time",), ("lon", "lat")]))
        )
        for at in range(data.draw(st.integers(1, 2)))
    }
    variables["full"] = variable(data, data.draw(kinds), tuple(LENGTHS))
    coords: dict[str, Any] = {
        "time": variable(data, data.draw(st.sampled_from(["times", "numbers"])), ("time",)),
        "lon": ("lon", np.linspace(0, 1, 5, dtype=data.draw(st.sampled_from(["f4", "f8"])))),
        "label": variable(data, data.draw(kinds), ("lat",)),
        "area": variable(data, "numbers", ("lat", "lon")),
        "run": variable(data, data.draw(st.sampled_from(["times", "numbers", "letters"])), ()),
    }
    chosen = data.draw(st.sets(st.sampled_from(sorted(coords))))
    found = xr.Dataset(variables, {name: coords[name] for name in sorted(chosen)}, {"title": "made up", "n": 3})
    if "time" in chosen and data.draw(st.booleans()):
        found["time"].attrs["bounds"] = "time_bnds"
        found["time_bnds"] = (("time", "nv"), np.stack([found.time.values] * 2, axis=1))
    return found


def region_of(item: zds.Chunk, dims: Any) -> dict[str, slice]:
    return dict(zip(dims, item.region, strict=True))


def assert_same(found: Any, expected: Any) -> None:
    """Compare down to the dtypes, which assert_identical is lenient about."""
    xr.testing.assert_identical(found, expected)
    for name in [*expected.coords, *getattr(expected, "data_vars", ())]:
        assert found[name].dtype == expected[name].dtype, name
        assert type(found[name].variable) is type(expected[name].variable)


@pytest.mark.filterwarnings("ignore")  # xarray and zarr remark on unusual encodings; what counts is what comes out
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_an_item_is_what_xarray_opens(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("data")
    source = dataset(data)
    version, consolidated = data.draw(st.sampled_from([2, 3])), data.draw(st.booleans())
    source.to_zarr(folder, zarr_format=version, consolidated=consolidated)
    options = data.draw(st.sampled_from(OPTIONS))
    whole = xr.open_zarr(folder, consolidated=consolidated, **options)
    names = data.draw(st.sampled_from([["full"], ["full", "v0"], [*source.data_vars]]))
    dims = {dim: whole.sizes[dim] for name in names for dim in whole[name].dims}
    region = {
        dim: slice(data.draw(st.integers(0, n - 1)), data.draw(st.integers(1, n)))
        for dim, n in dims.items()
        if data.draw(st.booleans())
    }
    stream = zds.stream_dataset(folder, names, region=region, chunks={"nv": 2} if "nv" in dims else None, concurrency=1)
    for item in stream:
        assert_same(item.to_xarray(**options), whole[names].isel(region_of(item, stream.dims)).load())


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Return a dataset with packed values, times in a calendar of their own, and coordinates of all kinds."""
    times = xr.date_range("2000-01-01", periods=10, calendar="noleap", use_cftime=True)
    t2m = np.where(np.arange(480).reshape(10, 6, 8) % 7, np.arange(480).reshape(10, 6, 8) / 10, np.nan)
    found = xr.Dataset(
        {"t2m": (("time", "lat", "lon"), t2m, {"units": "K", "grid_mapping": "crs"}), "crs": ((), 0, {"name": "x"})},
        {
            "time": times,
            "lat": np.linspace(-50, 50, 6, dtype="f4"),
            "lon": ("lon", np.arange(8.0), {"units": "degrees_east"}),
            "area": (("lat", "lon"), np.arange(48.0).reshape(6, 8)),
            "height": ("lat", np.arange(6.0)),
            "name": "hello",
        },
        {"title": "made up"},
    )
    packed = {"dtype": "i2", "scale_factor": 0.1, "add_offset": 20.0, "_FillValue": -9, "chunks": (4, 3, 4)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr remarks on strings and consolidation, which are no part of version 3
        found.to_zarr(tmp_path / "data", encoding={"t2m": packed, "area": {"chunks": (2, 8)}})
    return tmp_path / "data"


def test_the_values_of_an_item_are_stored_ones(store: Path) -> None:
    item = next(iter(zds.stream_dataset(store, "t2m", concurrency=1)))
    assert item.data["t2m"].dtype == np.dtype("i2")
    assert list(item.data) == ["t2m"]
    assert item.to_xarray().t2m.dtype == np.dtype("f8")


def test_neighbours_are_labelled_too(store: Path) -> None:
    whole = xr.open_zarr(store)
    stream = zds.stream_dataset(store, "t2m", concurrency=1).halo({"time": 1, "lon": (2, 0)})
    for item in stream:
        around = {
            "time": slice(max(item.region[0].start - 1, 0), item.region[0].stop + 1),
            "lat": item.region[1],
            "lon": slice(max(item.region[2].start - 2, 0), item.region[2].stop),
        }
        assert_same(item.to_xarray(), whole[["t2m"]].isel(around).load())


def test_beyond_the_edge_there_are_no_coordinates(store: Path) -> None:
    items = list(zds.stream_dataset(store, "t2m", concurrency=1).halo({"time": 1}, {"time": "periodic"}))
    with pytest.raises(zds.UsageError, match="reaches beyond the edge"):
        items[0].to_xarray()
    assert items[4].region[0] == slice(4, 8)
    assert items[4].to_xarray().sizes["time"] == 6


def test_the_chunks_of_an_array_alone_have_dimensions_and_attributes(store: Path) -> None:
    whole = xr.open_zarr(store)["t2m"].drop_vars(["time", "lat", "lon", "area", "height", "name"])
    for chunk in zds.stream_chunks(store, path="t2m", concurrency=1):
        assert_same(chunk.to_xarray(), whole.isel(region_of(chunk, whole.dims)).load())
    for chunk in zds.stream_slices(store, "time", path="t2m", concurrency=1):
        assert_same(chunk.to_xarray(), whole.isel(region_of(chunk, whole.dims)).load())


def test_the_coordinate_of_a_dimension_alone(store: Path) -> None:
    (chunk,) = zds.stream_chunks(store, path="lat", concurrency=1)
    assert_same(chunk.to_xarray(), xr.open_zarr(store)["lat"].drop_vars(["name", "height"]).load())


def test_an_array_that_is_no_member_of_a_group_has_no_name() -> None:
    array = zarr.create_array({}, shape=(2,), dtype="i2", dimension_names=["values"])
    (chunk,) = zds.stream_chunks(array, concurrency=1)
    xr.testing.assert_identical(chunk.to_xarray(), xr.DataArray(np.zeros(2, "i2"), dims="values"))


def test_items_are_labelled_on_the_workers_of_a_cluster(store: Path, client: object) -> None:
    whole = xr.open_zarr(store).load()
    stream = zds.stream_dataset(store, "t2m")
    means = {item.index: item.data for item in stream.map(lambda item: item.to_xarray().mean("time"))}
    for item in stream:
        xr.testing.assert_identical(means[item.index], whole[["t2m"]].isel(region_of(item, stream.dims)).mean("time"))
        assert_same(item.to_xarray(), whole[["t2m"]].isel(region_of(item, stream.dims)))  # and on the client


def test_a_map_that_replaced_the_data_is_told_of(store: Path) -> None:
    stream = zds.stream_dataset(store, "t2m", concurrency=1)
    (item, *_) = stream.filter(lambda item: item.index == (0, 0, 0))
    assert item.to_xarray().t2m.shape == (4, 3, 4)
    (item, *_) = stream.map(lambda item: item.data)
    with pytest.raises(zds.UsageError, match="a map has replaced its data"):
        item.to_xarray()
    twice = stream.map(lambda item: item.data).map(lambda item: item.to_xarray())
    with pytest.raises(zds.ChunkError, match="a map has replaced the data"):
        list(twice)


def test_an_array_without_names_cannot_be_labelled() -> None:
    group = zarr.create_group({})
    group.create_array("a", shape=(2,), dtype="i2")
    for stream in (zds.stream_dataset(group, concurrency=1), zds.stream_chunks(group, path="a", concurrency=1)):
        (item,) = stream
        with pytest.raises(zds.UsageError, match="no dimension names"):
            item.to_xarray()


def test_xarray_is_needed_to_label_and_for_nothing_else(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xarray", None)
    (item, *_) = zds.stream_dataset(store, "t2m", concurrency=1)
    with pytest.raises(zds.UsageError, match=r"pip install 'zarr-dask-stream\[xarray\]'"):
        item.to_xarray()


def test_items_own_their_coordinates(store: Path) -> None:
    """A map that writes to what it gets must not change what the next one gets."""

    def spoil(item: zds.Chunk) -> float:
        found = item.to_xarray()
        total = float(found.area.sum() + found.height.sum())
        found.area[...] = found.height[...] = -1e9
        return total

    totals = [item.data for item in zds.stream_dataset(store, "t2m", chunks={"lat": -1, "lon": -1}).map(spoil)]
    assert totals == [np.arange(48).sum() + np.arange(6).sum()] * 3


def test_labels_travel_light(store: Path) -> None:
    """What was worked out on one side is not sent to the other."""
    stream = zds.stream_dataset(store, "t2m", concurrency=1)
    labels = stream._options.labels
    assert isinstance(labels, labels_module.Labels)
    before = len(pickle.dumps(labels))
    for item in stream:
        item.to_xarray()
    assert labels._whole
    assert len(pickle.dumps(labels)) == before < 10_000
