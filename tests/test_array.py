from __future__ import annotations

import json
import pickle
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import zarr
from obstore.store import MemoryStore as ObstoreMemory
from zarr.buffer import cpu
from zarr.storage import ObjectStore

from conformance.oracle import assemble, expected, same_bits
from fuzz.mutation import bounded
from realparts.http_files import HttpStore
from zarr_dask_stream.errors import MetadataError, StoreNotFoundError, StoreNotVisibleError, UsageError
from zarr_dask_stream.source import array as array_module
from zarr_dask_stream.source import metadata
from zarr_dask_stream.source.array import ArraySpec, ArraySummary, check_visible, list_arrays, open_array

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # zarr remarks on codecs outside the specification

V3: dict[str, Any] = {
    "zarr_format": 3,
    "node_type": "array",
    "shape": [4],
    "data_type": "int16",
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2]}},
    "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
    "fill_value": 0,
    "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    "attributes": {},
}
V2: dict[str, Any] = {
    "zarr_format": 2, "shape": [4], "chunks": [2], "dtype": "<i2", "order": "C", "fill_value": 0, "filters": None,
    "compressor": None,
}  # fmt: skip


def _store(document: Any, key: str = "zarr.json") -> dict[str, Any]:
    raw = document if isinstance(document, bytes) else json.dumps(document).encode()
    return {key: cpu.Buffer.from_bytes(raw)}


def _v3(**changes: Any) -> dict[str, Any]:
    return _store({**V3, **changes})


def _v2(**changes: Any) -> dict[str, Any]:
    return _store({**V2, **changes}, ".zarray")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    group = zarr.create_group(tmp_path / "s.zarr")
    for path in ("t2m", "deep/er/z500"):
        group.create_array(path, shape=(4, 6), chunks=(2, 3), dtype="f4", attributes={"units": "K"})
    return tmp_path / "s.zarr"


# -- opening --------------------------------------------------------------------------------------


def test_what_is_read(root: Path) -> None:
    spec = open_array(root, path="deep/er/z500")
    assert (spec.shape, spec.chunks, spec.shards, spec.dtype) == ((4, 6), (2, 3), None, np.dtype("f4"))
    assert (spec.zarr_format, spec.path, spec.fill_value, spec.nbytes, spec.chunk_nbytes) == (
        3,
        "deep/er/z500",
        0,
        96,
        24,
    )
    assert spec.attributes == {"units": "K"}
    assert spec.store_key(3) == "deep/er/z500/c/1/1"
    assert "\n" not in repr(spec)
    assert str(root) in repr(spec)


def test_a_spec_travels_small_and_equal(root: Path) -> None:
    spec = open_array(root, path="t2m")
    _ = spec.grid  # a cached property stays at home
    data = pickle.dumps(spec)
    copy = pickle.loads(data)
    assert copy == spec
    assert hash(copy) == hash(spec)
    assert len(data) < 2048
    assert copy.attributes == {}
    assert copy.grid == spec.grid


def test_all_ways_to_the_same_array(root: Path) -> None:
    group = zarr.open_group(root, mode="r")
    array = group["t2m"]
    specs = [open_array(root, path="t2m"), open_array(str(root), path="/t2m/"), open_array(group, path="t2m"),
             open_array(array), open_array(array.store, path="t2m")]  # fmt: skip
    assert len(set(specs)) == 1
    assert open_array(root / "t2m").fingerprint == specs[0].fingerprint


def test_fingerprint_is_structural(root: Path) -> None:
    before = open_array(root, path="t2m").fingerprint
    zarr.open_array(root, path="t2m").attrs["more"] = 1
    zarr.consolidate_metadata(root)
    assert open_array(root, path="t2m").fingerprint == before
    zarr.open_array(root, path="t2m").resize((5, 6))
    assert open_array(root, path="t2m").fingerprint != before


def test_dimension_names(tmp_path: Path) -> None:
    array = zarr.create_array({}, shape=(2, 2), dtype="i2", dimension_names=["y", None])
    assert open_array(array).dimension_names == ("y", None)
    array = zarr.create_array({}, shape=(2, 2), dtype="i2", zarr_format=2, attributes={"_ARRAY_DIMENSIONS": ["y", "x"]})
    assert open_array(array).dimension_names == ("y", "x")
    assert open_array(zarr.create_array({}, shape=(2, 2), dtype="i2")).dimension_names is None


def test_both_formats_at_one_path(tmp_path: Path) -> None:
    old = zarr.create_array(tmp_path / "a", shape=(3,), dtype="i2", zarr_format=2)
    zarr.create_array(tmp_path / "b", shape=(4,), dtype="i2", zarr_format=3)
    shutil.copy(tmp_path / "b" / "zarr.json", tmp_path / "a" / "zarr.json")
    assert open_array(tmp_path / "a").shape == (4,)  # as zarr-python decides
    assert open_array(old).shape == (3,)


def test_estimates_for_elements_of_varying_length() -> None:
    spec = open_array(zarr.create_array({}, shape=(10,), chunks=(4,), dtype=str))
    assert (spec.chunk_nbytes, spec.nbytes) == (256, 640)


# -- nothing there, or something else -------------------------------------------------------------


def test_no_such_array_names_those_there_are(root: Path) -> None:
    with pytest.raises(StoreNotFoundError, match=r"no array 'tm2'.*arrays there: 'deep/er/z500', 't2m'"):
        open_array(root, path="tm2")


def test_a_group_names_its_arrays(root: Path) -> None:
    with pytest.raises(StoreNotFoundError, match=r"is a group.*'deep/er/z500', 't2m'"):
        open_array(root)
    with pytest.raises(StoreNotFoundError, match=r"is a group.*arrays there: 'deep/er/z500'$"):
        open_array(zarr.open_group(root, mode="r")["deep"])


def test_no_store(tmp_path: Path, http_store: HttpStore) -> None:
    with pytest.raises(StoreNotFoundError, match="there is no directory"):
        open_array(tmp_path / "nowhere")
    with pytest.raises(StoreNotFoundError, match="no array was found there"):
        open_array(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreNotFoundError, match="is a file"):
        open_array(tmp_path / "file")
    with pytest.raises(StoreNotFoundError, match="can't be listed"):
        open_array(http_store.url)
    with pytest.raises(OSError, match="Connect"):
        open_array("http://127.0.0.1:9/a.zarr")


def test_hostile_path(root: Path) -> None:
    with pytest.raises(UsageError, match="not a key inside the store"):
        open_array(root, path="../../etc")


# -- malformed metadata ---------------------------------------------------------------------------

MALFORMED: list[tuple[Any, str]] = [
    (_store(b"{"), "not valid JSON"),
    (_store(b"\xff\xfe"), "not valid JSON"),
    (_store(b"[" * 100_000), "not valid JSON"),
    (_store([1]), "should hold a JSON object, got list"),
    (_store({"zarr_format": 4, "node_type": "array"}), "zarr_format 3 and node_type array or group, got 4"),
    (_store({**V3, "node_type": "thing"}), "got 3 and 'thing'"),
    (_v3(shape=None), "shape should be a list of integers"),
    (_v3(shape=[-1]), "shape should be a list of integers from 0"),
    (_v3(shape=[True]), "shape should be a list of integers"),
    (_v3(shape=[2**64]), r"to 2\*\*63 - 1"),
    (_v3(shape=[1.5]), "shape should be"),
    (_v3(shape=[4, 4]), "different numbers of axes"),
    (_v3(shape=[1] * 40, chunk_grid={"name": "regular", "configuration": {"chunk_shape": [1] * 40}}), "40 axes"),
    (_v3(chunk_grid={"name": "regular", "configuration": {"chunk_shape": [0]}}), "integers from 1"),
    (_v3(chunk_grid={"name": "regular", "configuration": {"chunk_shape": [2**50]}}), "one chunk of shape"),
    (_v3(chunk_grid={"name": "regular"}), "chunk_shape should be"),
    (_v3(chunk_grid={"name": "rectilinear", "configuration": {}}), "chunk grid 'rectilinear' is not supported"),
    (_v3(chunk_grid="odd"), "chunk grid 'odd'"),
    (_v3(chunk_key_encoding={"name": "hashed"}), "chunk key encoding 'hashed'"),
    (_v3(chunk_key_encoding={"name": "default", "configuration": {"separator": "../"}}), "separator '../'"),
    (_v3(codecs=[{"name": "my-codec"}]), "codec 'my-codec' can't be used here"),
    (_v3(codecs=[{"name": "sharding_indexed", "configuration": {"chunk_shape": [1], "codecs": [{"name": "odd"}]}}]),
     "codec 'odd' can't be used here"),
    (_v3(codecs="zstd"), "codec"),
    (_v3(codecs=None), "codec chain is malformed"),
    (_v3(codecs=[{"configuration": {}}]), "codec chain is malformed"),
    (_v3(codecs=[]), "zarr can't make sense"),
    (_v3(data_type="float7"), "zarr can't make sense"),
    (_v3(fill_value="red"), "zarr can't make sense"),
    (_v2(chunks=None), "chunks should be a list"),
    (_v2(dtype="<q9"), "zarr can't make sense"),
    (_v2(dimension_separator="-"), "separator '-'"),
    (_v2(compressor={"id": "my-codec"}), "codec 'my-codec' can't be used here.*numcodecs"),
    (_v2(filters=[{"id": "odd"}]), "codec 'odd' can't be used here"),
    (_v2(filters=3), "codec chain is malformed"),
    (_v2(dtype="|O", filters=[{"id": "pickle"}]), "codec 'pickle' runs whatever code"),
    (_v3(codecs=["bytes", "numcodecs.pickle"]), "codec 'pickle' runs whatever code"),
    (_v2(compressor={"id": "vlen-utf8"}), "'vlen-utf8' is a filter"),
    (_v2(filters=[{"id": "zlib"}] * 20), "a chain of 20 codecs"),
    (_v2(dtype=f"<U{2**27}", fill_value=""), "one element would take"),
    (_v2(dtype=f"<U{2**20}", fill_value="", chunks=[2**20], shape=[2**20]), "one chunk of shape"),
]  # fmt: skip


@pytest.mark.parametrize(("store", "message"), MALFORMED, ids=[message[:40] for _, message in MALFORMED])
def test_malformed_metadata(store: dict[str, Any], message: str) -> None:
    with pytest.raises(MetadataError, match=message):
        open_array(store)


@pytest.mark.parametrize("key", ["zarr.json", ".zarray", ".zattrs", ".zmetadata"])
def test_documents_that_are_too_long_are_not_read_to_their_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """A sparse file stands for one of many gigabytes: whoever read it whole would need that memory."""
    monkeypatch.setattr(metadata, "MAX_DOCUMENT_BYTES", 1 << 20)
    zarr_format: Literal[2, 3] = 3 if key == "zarr.json" else 2
    zarr.create_array(tmp_path / "group" / "a", shape=(4,), chunks=(2,), dtype="i4", zarr_format=zarr_format)
    folder = tmp_path / "group" / "a" if key != ".zmetadata" else tmp_path / "group"
    with (folder / key).open("wb") as file:
        file.truncate(1 << 38)

    def look() -> Any:
        group = tmp_path / "group"
        return list_arrays(group) if key == ".zmetadata" else open_array(group, path="a")

    with bounded(1 << 23), pytest.raises(MetadataError, match=rf"{re.escape(key)} of .* is longer than 1 MiB"):
        look()


@pytest.mark.parametrize("kind", ["zip", "http", "obstore"])
def test_long_documents_of_other_stores_are_not_read_to_their_end(
    tmp_path: Path, http_store: HttpStore, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(metadata, "MAX_DOCUMENT_BYTES", 1 << 20)
    long = b" " * (1 << 25)
    source: Any = http_store.url
    if kind == "zip":
        source = tmp_path / "a.zip"
        with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("zarr.json", long)
    elif kind == "http":
        (http_store.directory / "zarr.json").write_bytes(long)
    else:
        objects = ObstoreMemory()
        objects.put("zarr.json", long)
        source = ObjectStore(objects, read_only=True)
    with bounded(1 << 23), pytest.raises(MetadataError, match=r"zarr.json of .* is longer than 1 MiB"):
        open_array(source)


def test_huge_arrays_are_fine_as_long_as_chunks_are_not() -> None:
    spec = open_array(_v3(shape=[2**62]))
    assert spec.grid.grid_shape == (2**61,)
    assert spec.store_key(2**61 - 1) == f"c/{2**61 - 1}"


def test_codecs_by_name_alone() -> None:
    short = open_array(_v3(codecs=[{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]))
    assert [codec["name"] for codec in short.codecs] == ["bytes", "crc32c"]


def test_chunks_of_length_zero_on_an_empty_axis() -> None:
    assert open_array(_v2(shape=[0], chunks=[0])).chunks == (1,)


# -- listing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("consolidated", [False, True])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_list_arrays(tmp_path: Path, consolidated: bool, zarr_format: Any) -> None:
    group = zarr.create_group(tmp_path / "g", zarr_format=zarr_format)
    group.create_array("b/x", shape=(4,), chunks=(2,), dtype="i4")[:] = 1
    group.create_array("a", shape=(4, 6), chunks=(2, 3), dtype="f8")
    if consolidated:
        zarr.consolidate_metadata(tmp_path / "g")
    names = {2: ("<f8", "<i4"), 3: ("float64", "int32")}[zarr_format]
    want = [
        ArraySummary("a", (4, 6), names[0], (2, 3), None, zarr_format),
        ArraySummary("b/x", (4,), names[1], (2,), None, zarr_format),
    ]
    assert list_arrays(tmp_path / "g") == want
    assert list_arrays(zarr.open_group(tmp_path / "g")) == want
    assert [summary.path for summary in list_arrays(tmp_path / "g", path="b")] == ["b/x"]
    assert [summary.path for summary in list_arrays(tmp_path / "g", path="a")] == ["a"]


def test_list_shards_and_damaged_neighbours(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "g")
    group.create_array("s", shape=(8,), chunks=(2,), shards=(4,), dtype="i2")
    (tmp_path / "g" / "bad").mkdir()
    (tmp_path / "g" / "bad" / "zarr.json").write_text("{")
    assert list_arrays(tmp_path / "g") == [ArraySummary("s", (8,), "int16", (2,), (4,), 3)]


# -- the same array on a worker -------------------------------------------------------------------


def _fresh(spec: ArraySpec) -> ArraySpec:
    """Forget that this process has seen the array."""
    array_module._seen.clear()
    return spec


def test_visible(root: Path) -> None:
    spec = open_array(root, path="t2m")
    check_visible(_fresh(spec))
    shutil.rmtree(root)
    check_visible(spec)  # once for each process
    with pytest.raises(StoreNotVisibleError, match="there is no directory"):
        check_visible(_fresh(spec))


def test_not_visible_says_where_and_what_to_do(root: Path) -> None:
    spec = open_array(root, path="t2m")
    (root / "t2m" / "zarr.json").unlink()
    with pytest.raises(StoreNotVisibleError, match=r"t2m.*host .*process \d+.*no array of this name.*shared disk"):
        check_visible(_fresh(spec))


def test_another_array_there(root: Path) -> None:
    spec = open_array(root, path="t2m")
    zarr.create_array(root, name="t2m", shape=(4, 6), chunks=(4, 6), dtype="f8", overwrite=True)
    with pytest.raises(
        StoreNotVisibleError, match=r'another array.*chunk_grid is .*data_type is "float64", expected "float32"'
    ):
        check_visible(_fresh(spec))


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_consolidated_only_is_visible(tmp_path: Path, zarr_format: Any) -> None:
    group = zarr.create_group(tmp_path / "g", zarr_format=zarr_format)
    array = group.create_array("x", shape=(4,), chunks=(2,), dtype="i4", attributes={"a": 1})
    array[:] = np.arange(4)
    want = expected(array)
    zarr.consolidate_metadata(tmp_path / "g")
    for name in ("zarr.json", ".zarray"):
        (tmp_path / "g" / "x" / name).unlink(missing_ok=True)
    spec = open_array(tmp_path / "g", path="x")
    assert spec.metadata_key in {"zarr.json", ".zmetadata"}
    check_visible(_fresh(spec))
    same_bits(assemble(spec), want)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(("dtype", "value"), [("S4", b"abcd"), ("U3", "xyz")])
@pytest.mark.filterwarnings("ignore")  # zarr remarks on dtypes outside the version 3 specification
def test_text_without_axes_keeps_its_length(zarr_format: Any, dtype: str, value: Any) -> None:
    array = zarr.create_array({}, shape=(), dtype=dtype, zarr_format=zarr_format)
    array[...] = value
    spec = open_array(array)
    assert spec.dtype == np.dtype(dtype)
    assert assemble(spec)[()] == value
