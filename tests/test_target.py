"""Places: which lie in one another, what is in them; documents of arrays that do not exist yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.storage import MemoryStore

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.array import open_array
from zarr_dask_stream.source.target import Place, find_place, new_target

OPTIONS = {"shape": (4, 6), "chunks": (2, 3), "dtype": "f4"}


@pytest.mark.parametrize(
    ("left", "right", "meets"),
    [
        ("/a/b", "/a/b", True), ("/a/b", "/a/b/c", True), ("/a/b/c", "/a/b", True), ("/a/b", "/a/bc", False),
        ("/a/x/../b", "/a/b", True), ("s3://bucket/a", "s3://bucket/a/", True), ("s3://one/a", "s3://other/a", False),
        ("file:///a/b", "/a/b/c", True), ("simplecache::file:///a/b", "/a/b", True),
    ],
)  # fmt: skip
def test_places_that_meet(left: str, right: str, meets: bool) -> None:
    assert find_place(left).meets(find_place(right)) is meets
    assert find_place(right).meets(find_place(left)) is meets


def test_paths_belong_to_places() -> None:
    store: dict[str, Any] = {}
    assert not find_place(store, "a").meets(find_place(store, "b"))
    assert find_place(store, "a").meets(find_place(MemoryStore(store), "a/b"))
    assert not find_place(store, "a").meets(find_place({}, "a"))
    group = zarr.open_group(MemoryStore(store), path="g", mode="w")
    assert find_place(group, "x").path == "g/x"


@pytest.mark.parametrize("version", [2, 3])
def test_an_array_is_described_before_it_exists(tmp_path: Path, version: int) -> None:
    place = find_place(tmp_path / "new", "a/b")
    target = new_target(place, {**OPTIONS, "zarr_format": version, "attributes": {"n": 1}})
    assert not (tmp_path / "new").exists()
    target.check_free()
    target.create()
    target.create()  # which does no harm
    made = open_array(tmp_path / "new", path="a/b")
    assert (made.fingerprint, made.attributes) == (target.spec.fingerprint, {"n": 1})
    assert isinstance(zarr.open_group(tmp_path / "new", mode="r")["a"], zarr.Group)
    target.check_same()


def test_groups_above_are_left_as_they_are(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "g", attributes={"mine": 1})
    new_target(find_place(tmp_path / "g", "a"), OPTIONS).create()
    assert dict(zarr.open_group(tmp_path / "g", mode="r").attrs) == {"mine": 1}
    assert Place(find_place(tmp_path / "g").store, "a").version_above() == 3
    assert find_place(tmp_path / "g").version_above() is None


def test_only_what_is_there_itself_counts(tmp_path: Path) -> None:
    """A consolidated copy of an array that is gone takes no place."""
    group = zarr.create_group(tmp_path / "g", zarr_format=2)
    group.create_array("a", shape=(2,), dtype="i2")
    zarr.consolidate_metadata(tmp_path / "g")
    for path in (tmp_path / "g" / "a").iterdir():
        path.unlink()
    assert find_place(tmp_path / "g", "a").node() is None


@pytest.mark.parametrize("options", [{"chunks": (2,)}, {"shards": (3, 3)}, {"dtype": "nothing"}, {"fill_value": "x"}])
def test_what_zarr_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="zarr can't make such a target"):
        new_target(find_place({}), {**OPTIONS, **options})


def test_an_array_that_is_replaced_loses_its_chunks(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "a", shape=(8,), chunks=(2,), dtype="i4", zarr_format=2)[:] = np.arange(1, 9)
    target = new_target(find_place(tmp_path / "a"), OPTIONS, overwrite=True)
    target.create()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["zarr.json"]
