"""Streams of several arrays from end to end: in process, on a cluster, on S3; options, stages, reports, refusals."""

from __future__ import annotations

import asyncio
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import xarray as xr
import zarr
from distributed import Client, LocalCluster

import zarr_dask_stream as zds
from realparts.fault_proxy import FaultProxy, Faults
from realparts.http_files import HttpStore
from realparts.s3 import S3Server

TIMES, LATS, LONS = 10, 6, 8
T2M = np.arange(1, 481, dtype="f4").reshape(TIMES, LATS, LONS)
RAIN = (T2M.transpose(0, 2, 1) * 2).astype("i4")
WEIGHT = np.linspace(1, 2, LATS)


def fill(group: zarr.Group, **extra: Any) -> zarr.Group:
    """Write two arrays whose axes are in different order, one that has not all dimensions, and coordinates."""
    for name, values, chunks, dims in (
        ("t2m", T2M, (2, 3, 8), ["time", "lat", "lon"]),
        ("rain", RAIN, (3, 4, 6), ["time", "lon", "lat"]),
        ("weight", WEIGHT, (6,), ["lat"]),
        ("time", np.arange(TIMES) * 10, (1,), ["time"]),
        ("lat", np.linspace(-50, 50, LATS), (LATS,), ["lat"]),
    ):
        options: dict[str, Any] = (
            {"shards": tuple(2 * c for c in chunks)} if extra.get("sharded") and name in ("t2m", "rain") else {}
        )
        array = group.create_array(
            name, shape=values.shape, chunks=chunks, dtype=values.dtype, dimension_names=dims, fill_value=-1, **options
        )
        array[...] = values
    group["time"].attrs["units"] = "days since 2000-01-01"
    return group


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fill(zarr.create_group(tmp_path / "data"))
    return tmp_path / "data"


def check(stream: zds.ChunkStream, *, missing: int = 0) -> None:
    """Compare every item with the arrays, and put the items together to the whole."""
    seen = np.zeros(T2M.shape, int)
    for item in stream:
        time, lat, lon = item.region
        np.testing.assert_array_equal(item.data["t2m"], T2M[time, lat, lon])
        np.testing.assert_array_equal(item.data["rain"], RAIN[time, lon, lat])
        np.testing.assert_array_equal(item.data["weight"], WEIGHT[lat])
        seen[item.region] += 1
    assert (seen == 1).all()
    report = stream.report
    assert report.total == report.emitted == len(stream)


def test_items_hold_the_same_box_of_all_arrays(folder: Path) -> None:
    stream = zds.stream_dataset(folder, concurrency=1)
    assert stream.dims == ("time", "lon", "lat")
    assert "rain: int32[10, 8, 6], t2m: float32[10, 6, 8], weight: float64[6] along time, lon, lat" in repr(stream)
    stream = zds.stream_dataset(folder, ["t2m", "rain", "weight"], concurrency=1)
    assert stream.dims == ("time", "lat", "lon")
    assert stream._options.plan.grid.chunks == (6, 6, 8)
    check(stream)


SOURCES: dict[str, Callable[[Path], Any]] = {
    "text": str,
    "path": Path,
    "URL": lambda folder: folder.as_uri(),
    "group": lambda folder: zarr.open_group(folder, mode="r"),
    "store": lambda folder: zarr.storage.LocalStore(folder, read_only=True),
    "mapper": lambda folder: fsspec.get_mapper(str(folder)),
    "zip": lambda folder: shutil.make_archive(str(folder), "zip", folder),
    "mapping": lambda folder: {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    },
}


@pytest.mark.parametrize("kind", SOURCES)
def test_what_a_group_can_be(folder: Path, kind: str) -> None:
    source = SOURCES[kind](folder)
    check(zds.stream_dataset(source, ["t2m", "rain", "weight"], concurrency=1))


@pytest.mark.parametrize("ordered", [True, False])
def test_on_a_cluster(folder: Path, client: Client, ordered: bool) -> None:
    names = ["t2m", "rain", "weight"]
    check(zds.stream_dataset(folder, names, ordered=ordered))
    check(zds.stream_dataset(folder, names, ordered=ordered, chunks={"time": 1, "lat": 4, "lon": 3}))
    totals = zds.stream_dataset(folder, names).reduce(
        {"t2m": zds.reducers.sum(), "rain": zds.reducers.max(axis=(0, 2))}
    )
    answer = totals.compute()
    assert answer["t2m"] == T2M.sum(dtype="f8")
    np.testing.assert_array_equal(answer["rain"], RAIN.max(axis=(0, 2)))


@pytest.mark.parametrize("sharded", [False, True])
def test_on_s3(s3_server: S3Server, request: pytest.FixtureRequest, sharded: bool) -> None:
    """Found by listing, by a cluster; then by consolidated metadata, and as xarray opens it."""
    bucket = f"dataset-{int(sharded)}"
    s3_server.make_bucket(bucket)
    url, options = f"s3://{bucket}/data.zarr", s3_server.storage_options
    group = fill(zarr.create_group(url, storage_options=options), sharded=sharded)
    names = ["t2m", "rain", "weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr remarks that consolidation is no part of format 3
        zarr.consolidate_metadata(group.store)
    region = {"time": slice(2, 9)}
    stream = zds.stream_dataset(url, names, storage_options=options, region=region, chunks={"lat": 6}, concurrency=1)
    whole = xr.open_zarr(url, storage_options=options)[names]
    for item in stream:
        place = dict(zip(stream.dims or (), item.region, strict=True))
        xr.testing.assert_identical(item.to_xarray(), whole.isel(place).load())
    check(zds.stream_dataset(xr.open_zarr(url, storage_options=options), names, concurrency=1))
    request.getfixturevalue("client")
    check(zds.stream_dataset(url, names, storage_options=options, consolidated=False))


def test_regions_and_positions_by_name(folder: Path) -> None:
    stream = zds.stream_dataset(folder, ["t2m", "weight"], region={"time": 4, "lat": slice(-2, None)}, concurrency=1)
    (item,) = stream
    assert item.region == (slice(4, 5), slice(4, 6), slice(0, 8))
    np.testing.assert_array_equal(item.data["t2m"], T2M[4:5, 4:])
    np.testing.assert_array_equal(item.data["weight"], WEIGHT[4:])
    positional = zds.stream_dataset(folder, ["t2m", "weight"], region=(4, slice(-2, None)), concurrency=1)
    assert [one.region for one in positional] == [item.region]


def test_where_is_asked_with_the_index_in_the_common_grid(folder: Path) -> None:
    stream = zds.stream_dataset(folder, ["t2m"], where=lambda index: index == (1, 1, 0), concurrency=1)
    assert [item.region for item in stream] == [(slice(2, 4), slice(3, 6), slice(0, 8))]


def test_stages(folder: Path) -> None:
    stream = zds.stream_dataset(folder, ["t2m", "rain"], chunks={"time": 1}, concurrency=1)
    assert stream.filter(lambda item: item.data["t2m"].max() > 440).map(lambda item: item.index[0]).run().emitted == 1
    assert [item.data for item in stream.map(lambda item: sorted(item.data)).take(1)] == [["rain", "t2m"]]
    assert next(iter(stream.batch(size=4))).items[3].data["rain"].shape == (1, 8, 6)
    (task, *_) = stream.take(1).to_delayed()
    np.testing.assert_array_equal(task.compute(scheduler="sync").data["rain"], RAIN[:1])
    halo = stream.halo({"time": (1, 0)}, {"time": "nearest"})
    for item in halo:
        np.testing.assert_array_equal(item.data["rain"][0], RAIN[max(item.index[0] - 1, 0)])
        np.testing.assert_array_equal(
            item.data["rain"][item.core[0], item.core[2], item.core[1]], RAIN[item.index[0]][None]
        )
    with pytest.raises(zds.UsageError, match="has to fit the array's dtype int32"):
        stream.halo(1, 0.5)
    whole = stream.rechunk({"time": -1})
    assert [item.data["t2m"].shape for item in whole] == [T2M.shape]
    with pytest.raises(zds.UsageError, match="dimension 'tim', which none of the arrays has; did you mean 'time'"):
        stream.rechunk({"tim": 1})


def test_items_that_go_to_several_consumers(folder: Path) -> None:
    """What is the same memory for all can't be written to, and is labelled all the same."""
    left, right = zds.stream_dataset(folder, ["t2m"], concurrency=2).share(2, "broadcast")
    with left, right:
        one, other = next(iter(left)), next(iter(right))
        assert one.data is not other.data
        assert not one.data["t2m"].flags.writeable
        xr.testing.assert_identical(one.to_xarray(), other.to_xarray())


def test_windows_along_a_dimension(folder: Path) -> None:
    stream = zds.stream_dataset(folder, ["t2m", "rain"], concurrency=1)
    found = stream.window(along="time", size=4).reduce({"rain": zds.reducers.sum()}).compute()
    assert found == {at: {"rain": RAIN[4 * at : 4 * at + 4].sum()} for at in range(3)}


def test_under_an_asynchronous_client(folder: Path, local_cluster: LocalCluster) -> None:
    async def total() -> float:
        async with Client(local_cluster.scheduler_address, asynchronous=True) as client:
            stream = zds.stream_dataset(folder, ["t2m", "weight"], client=client)
            return sum([float(item.data["t2m"].sum(dtype="f8")) async for item in stream])

    assert asyncio.run(total()) == T2M.sum(dtype="f8")


def test_a_chunk_that_cannot_be_read_is_named_with_its_array(folder: Path) -> None:
    (folder / "rain" / "c" / "0" / "1" / "0").write_bytes(b"no zstd")
    stream = zds.stream_dataset(folder, ["t2m", "rain"], on_error="skip", retry=zds.RetryPolicy(attempts=1))
    assert len(list(stream)) == 1
    (letter,) = stream.report.dead_letters
    assert letter.index == (0, 0, 0)
    assert f"chunk (0, 1, 0) of {folder / 'rain'}" in letter.message
    assert stream.report.total == 2


@pytest.mark.parametrize(("missing", "items"), [("fill", 2), ("skip", 1), ("raise", 0)])
def test_items_of_which_nothing_is_stored(folder: Path, missing: Any, items: int) -> None:
    for name in ("t2m", "rain"):
        for file in [p for p in (folder / name / "c").rglob("*") if p.is_file()]:
            if int(file.relative_to(folder / name / "c").parts[0]) >= 6 // {"t2m": 2, "rain": 3}[name]:
                file.unlink()
    stream = zds.stream_dataset(folder, ["t2m", "rain"], missing=missing, concurrency=1)
    if not items:
        with pytest.raises(zds.ChunkError, match=r"chunk \(3, 0, 0\) of .*t2m is not stored"):
            list(stream)
        return
    found = list(stream)
    assert [item.missing for item in found] == [False, True][:items]
    assert stream.report.skipped_missing == 2 - items
    if missing == "fill":
        assert (found[1].data["rain"] == -1).all()


def test_a_job_goes_on_from_its_checkpoint(folder: Path, tmp_path: Path) -> None:
    def stream(*names: str) -> zds.ChunkStream:
        return zds.stream_dataset(folder, names, chunks={"time": 1}, checkpoint=tmp_path / "ledger", concurrency=1)

    first = [item.index for item in stream("t2m", "rain").take(4)]
    rest = [item.index for item in stream("t2m", "rain")]
    assert max(first + rest) == (9, 0, 0)
    assert len({*first, *rest}) == 10
    assert len(rest) in (6, 7)  # the one that was in hand when the loop ended may come again
    with pytest.raises(zds.UsageError):
        list(stream("t2m"))


def test_coordinates_on_request(folder: Path) -> None:
    def coords(chosen: Any) -> set[str]:
        (item, *_) = zds.stream_dataset(folder, ["t2m"], coords=chosen, concurrency=1)
        return set(item.to_xarray().coords)

    assert coords(True) == {"time", "lat"}
    assert coords(False) == set()
    assert coords(["lat"]) == {"lat"}
    with pytest.raises(zds.UsageError, match=r"no array 'lot' in .*; did you mean 'lat'\?"):
        coords(["lot"])
    with pytest.raises(zds.UsageError, match="'rain' does not lie along dimensions of the variables, \\['lat'\\]"):
        zds.stream_dataset(folder, ["weight"], coords=["rain"])


def test_large_coordinates_are_read_with_the_items(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zarr_dask_stream.opened._SMALL_BYTES", 64)
    stream = zds.stream_dataset(folder, ["t2m"], concurrency=1)
    labels = stream._options.labels
    assert labels is not None
    assert set(labels.coords) == {"lat"}
    for item in stream:
        assert list(item.data) == ["t2m"]
        place = dict(zip(stream.dims or (), item.region, strict=True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # xarray remarks that metadata are not consolidated
            expected = xr.open_zarr(folder)[["t2m"]].isel(place).load()
        xr.testing.assert_identical(item.to_xarray(), expected)


def test_a_coordinate_that_cannot_be_read_is_an_error_before_any_work(folder: Path) -> None:
    (folder / "lat" / "c" / "0").write_bytes(b"no zstd")
    with pytest.raises(zds.StoreError, match=r"coordinate .*lat can't be read: chunk \(0,\)"):
        zds.stream_dataset(folder, ["t2m"])
    assert len(zds.stream_dataset(folder, ["t2m"], coords=False)) > 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"variables": ["t2m", "tm"]}, "no array 'tm'.*did you mean 't2m'"),
        ({"variables": ["t2m", "t2m"]}, "names something twice"),
        ({"variables": []}, "no variables to stream"),
        ({"variables": 3}, "a name or a list of names"),
        ({"variables": [3]}, "a name or a list of names"),
        ({"variables": {"t2m": 1}}, "a name or a list of names"),
        ({"region": {"tim": 0}}, "dimension 'tim'.*did you mean 'time'"),
        ({"region": {"time": 10}}, "index 10 is outside"),
        ({"chunks": {"lan": 1}}, "dimension 'lan'.*did you mean 'lon'|did you mean 'lat'"),
        ({"concurrency": 0}, "concurrency"),
        ({"missing": "drop"}, "missing must be"),
        (
            {"variables": ["weight", "time"], "chunks": {"lat": 2}},
            r"no array has all of the dimensions \['lat', 'time'\]",
        ),
    ],
)
def test_bad_input_is_refused_before_any_work(folder: Path, given: dict[str, Any], words: str) -> None:
    with pytest.raises(zds.UsageError, match=words):
        zds.stream_dataset(folder, **given)
    with pytest.raises(TypeError, match="no_such_option"):
        zds.stream_dataset(folder, no_such_option=1)


def test_over_a_road_that_breaks(http_store: HttpStore, fault_proxy: Callable[..., FaultProxy]) -> None:
    """Chunks of coordinates are tried again too, one by one: of ten that are read, three fail at first."""
    fill(zarr.create_group(http_store.directory / "data"))
    proxy = fault_proxy(http_store.url, seed=3)
    proxy.set(Faults(slow_down=0.15, reset=0.1, truncate=0.05, match="/c/"))
    eager = zds.RetryPolicy(attempts=12, corrupt_attempts=12, wait_initial=0.02, wait_max=0.2)
    stream = zds.stream_dataset(f"{proxy.url}/data", ["t2m", "rain", "weight"], retry=eager, concurrency=1)
    check(stream)
    labels = stream._options.labels
    assert labels is not None
    np.testing.assert_array_equal(labels.coords["time"][1], np.arange(TIMES) * 10)
    proxy.set(Faults(slow_down=1, match="/lat/c/"))
    with pytest.raises(zds.StoreError, match=r"coordinate .*/lat can't be read"):
        zds.stream_dataset(f"{proxy.url}/data", ["t2m"])


def test_lengths_that_differ(folder: Path) -> None:
    zarr.open_group(folder).create_array("short", shape=(3,), dtype="i2", dimension_names=["time"])
    with pytest.raises(zds.UsageError, match="dimension 'time' has 10 elements in 't2m' and 3 in 'short'"):
        zds.stream_dataset(folder, ["t2m", "short"])


def test_a_dataset_of_a_process_that_the_workers_cannot_see(client: Client) -> None:
    stream = zds.stream_dataset(fill(zarr.create_group({})))
    with pytest.raises(zds.errors.StoreNotVisibleError, match="lives in the memory of another process"):
        list(stream)


def test_a_consolidated_description_that_is_out_of_date(folder: Path) -> None:
    """Workers see the array itself, and say what differs."""
    group = zarr.open_group(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr remarks that consolidation is no part of format 3
        zarr.consolidate_metadata(group.store)
    zarr.open_array(folder / "t2m").resize((20, 6, 8))
    with pytest.raises(
        zds.errors.StoreNotVisibleError, match=r"another array is there \(shape is \[20, 6, 8\], expected \[10, 6, 8\]"
    ):
        list(zds.stream_dataset(folder, ["t2m"], concurrency=1))
    assert zds.stream_dataset(folder, ["t2m"], coords=False, consolidated=False).spec.shape == (20, 6, 8)
