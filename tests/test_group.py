"""What is in a group, consolidated or not, in either version, and which arrays are coordinates."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import zarr_dask_stream as zds
from realparts.http_files import HttpStore
from zarr_dask_stream.source.group import guess, open_group


def write(folder: Path, zarr_format: Any, *, consolidated: bool = False) -> Path:
    """Write a group "deep/er" with a variable, two coordinates, bounds and a subgroup."""
    root = zarr.create_group(folder, zarr_format=zarr_format)
    group = root.create_group("deep/er", attributes={"title": "test"})

    def add(name: str, dims: list[str], **attributes: Any) -> None:
        shape = tuple({"time": 4, "lat": 3, "nv": 2}[dim] for dim in dims)
        extra: dict[str, Any] = {"dimension_names": dims} if zarr_format == 3 else {}
        attributes |= {"_ARRAY_DIMENSIONS": dims} if zarr_format == 2 else {}
        array = group.create_array(name, shape=shape, dtype="f4", attributes=attributes, **extra)
        array[...] = np.ones(shape)

    add("t2m", ["time", "lat"], coordinates="height missing")
    add("time", ["time"], bounds="time_bnds")
    add("height", [])
    add("time_bnds", ["time", "nv"])
    group.create_group("below").create_array("x", shape=(2,), dtype="i2")
    if consolidated:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zarr remarks that consolidation is no part of format 3
            zarr.consolidate_metadata(root.store)
    return folder


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("consolidated", [False, True])
def test_a_group_is_found_with_all_that_is_in_it(tmp_path: Path, zarr_format: int, consolidated: bool) -> None:
    group = open_group(write(tmp_path, zarr_format, consolidated=consolidated), path="/deep/er/")
    assert (group.zarr_format, group.path, group.attributes) == (zarr_format, "deep/er", {"title": "test"})
    assert group.variables == ["t2m", "time_bnds"]
    assert group.coordinates == {"time", "height"}
    assert {name: entry.dims for name, entry in group.entries.items()} == {
        "t2m": ("time", "lat"),
        "time": ("time",),
        "height": (),
        "time_bnds": ("time", "nv"),
    }
    assert group.entry("t2m").attributes["coordinates"] == "height missing"
    assert group.array("below/x").shape == (2,)
    spec = group.array("t2m")
    assert (spec.path, spec.dimension_names) == ("deep/er/t2m", ("time", "lat"))
    assert spec.fingerprint == zds.stream_chunks(tmp_path, path="deep/er/t2m").spec.fingerprint


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_consolidated_metadata_alone_will_do(tmp_path: Path, zarr_format: int) -> None:
    write(tmp_path, zarr_format, consolidated=True)
    names = {"zarr.json", ".zarray", ".zgroup", ".zattrs"}
    for file in [p for p in tmp_path.rglob("*") if p.name in names and p.parent != tmp_path]:
        file.unlink()
    assert open_group(tmp_path, path="deep/er").variables == ["t2m", "time_bnds"]
    stream = zds.stream_dataset(tmp_path, "t2m", group="deep/er", concurrency=1)
    assert [item.data["t2m"].sum() for item in stream] == [12]


def test_consolidated_or_not_on_request(tmp_path: Path) -> None:
    """What was added after consolidation is only seen where consolidated metadata are not used."""
    folder = write(tmp_path, 3, consolidated=True)
    zarr.open_group(folder).create_array("late", shape=(2,), dtype="i2")
    assert "late" not in open_group(folder).entries
    assert "late" in open_group(folder, use_consolidated=False).entries
    with pytest.raises(zds.StoreError, match="no consolidated metadata"):
        zds.stream_dataset(folder, "t2m", group="deep/er", consolidated=True)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_store_that_cannot_be_listed(http_store: HttpStore, zarr_format: int) -> None:
    """Plain HTTP: what is named is found, with the coordinates that are named after dimensions or by it."""
    shutil.copytree(write(http_store.directory / "source", zarr_format), http_store.directory / "data")
    shutil.rmtree(http_store.directory / "source")
    group = open_group(f"{http_store.url}/data", path="deep/er")
    if not group.listed:
        assert group.variables == []
        with pytest.raises(zds.UsageError, match="can't be listed: name some"):
            zds.stream_dataset(f"{http_store.url}/data", group="deep/er")
    stream = zds.stream_dataset(f"{http_store.url}/data", ["t2m"], group="deep/er", concurrency=1)
    (item,) = stream
    assert item.data["t2m"].shape == (4, 3)
    labels = stream._options.labels
    assert labels is not None
    assert set(labels.coords) == {"time", "height"}


def test_dimension_names_of_netcdf_tools(tmp_path: Path) -> None:
    """NCZarr keeps them in the array's document, by full path."""
    array = zarr.create_group(tmp_path, zarr_format=2).create_array("t", shape=(2, 3), dtype="i2")
    array[...] = 1
    document = json.loads((tmp_path / "t" / ".zarray").read_text())
    document["_NCZARR_ARRAY"] = {"dimrefs": ["/y", "/grp/x"]}
    (tmp_path / "t" / ".zarray").write_text(json.dumps(document))
    assert open_group(tmp_path).entry("t").dims == ("y", "x")
    assert zds.stream_dataset(tmp_path).dims == ("y", "x")


@pytest.mark.parametrize("names", [["y"], "yx", [1, 2], {"y": 1}])
def test_dimension_names_that_make_no_sense_are_none(names: Any) -> None:
    attributes = {"_ARRAY_DIMENSIONS": names}
    array = zarr.create_array({}, shape=(2, 2), dtype="i2", zarr_format=2, attributes=attributes)
    assert zds.stream_chunks(array).spec.dimension_names is None


def test_what_is_not_there(tmp_path: Path) -> None:
    folder = write(tmp_path / "store", 3)
    with pytest.raises(zds.UsageError, match=r"no array 't2n' in .*deep/er; did you mean 't2m'\?"):
        zds.stream_dataset(folder, ["t2n"], group="deep/er")
    with pytest.raises(zds.UsageError, match="no array 'below'"):
        zds.stream_dataset(folder, ["below"], group="deep/er")
    with pytest.raises(zds.UsageError, match="no variables to stream; there is none at all: name some"):
        zds.stream_dataset(folder)
    with pytest.raises(zds.UsageError, match="is an array, and a group is needed: stream_chunks"):
        zds.stream_dataset(folder / "deep" / "er" / "t2m")
    with pytest.raises(zds.errors.StoreNotFoundError, match=r"no zarr group at .*nowhere"):
        zds.stream_dataset(folder, group="nowhere")
    with pytest.raises(zds.StoreError, match="no directory"):
        zds.stream_dataset(tmp_path / "nowhere")
    with pytest.raises(zds.UsageError, match="two words for one thing"):
        zds.stream_dataset(folder, group="a", path="b")


def test_a_document_that_is_damaged_is_named_and_spares_the_others(tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    (folder / "deep" / "er" / "t2m" / "zarr.json").write_text("{")
    assert open_group(folder, path="deep/er").variables == ["height", "time_bnds"]
    with pytest.raises(zds.errors.MetadataError, match=r"deep/er/t2m/zarr\.json .* not valid JSON"):
        zds.stream_dataset(folder, ["t2m"], group="deep/er")


def test_guesses() -> None:
    assert guess("tmp", []) == "; there is none at all"
    assert guess("q", map(str, range(20))).endswith("'18', '19', ...")
