"""``zds copy``: arrays and groups into other layouts and formats, everything kept that was not asked for otherwise."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from click.testing import CliRunner, Result
from distributed import LocalCluster

from conformance.oracle import same_bits, sample
from copying import array_in, read
from realparts.s3 import S3Server
from zarr_dask_stream.cli.command import zds
from zarr_dask_stream.source.files import LocalFiles

# zarr remarks on dtypes and on consolidated metadata, which are not in the specification of version 3.
pytestmark = [
    pytest.mark.filterwarnings(one)
    for one in (
        "ignore:.*:zarr.errors.UnstableSpecificationWarning",
        "ignore:Consolidated metadata is:zarr.errors.ZarrUserWarning",
    )
]


def copy(*args: Any) -> Result:
    """Run in this thread, unless a cluster is named: to start one for each array takes longer than the rest."""
    here = () if {"--scheduler", "--workers", "--concurrency"} & set(args) else ("--concurrency", "1")
    return CliRunner().invoke(zds, ["copy", *map(str, args), *here, "--no-progress"])


def done(*args: Any) -> Result:
    result = copy(*args)
    assert result.exit_code == 0, result.output + result.stderr
    return result


def refused(*args: Any, code: int = 2) -> str:
    """Return the one sentence of a copy that was refused."""
    result = copy(*args)
    assert result.exit_code == code, result.output + result.stderr
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture
def array(tmp_path: Path) -> Path:
    array_in(tmp_path / "array", sample("f4", (20, 30)), chunks=(5, 7), attributes={"units": "K"}, fill_value=-1)
    return tmp_path / "array"


@pytest.fixture(params=[2, 3])
def group(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A group with groups in it, arrays of one and two axes and of none, text, and one of which nothing is stored."""
    root = zarr.create_group(tmp_path / "group", zarr_format=request.param, attributes={"title": "T", "n": [1, 2]})
    root.create_group("empty", attributes={"a": 1})
    for path, data, chunks in (
        ("x", np.arange(30), (10,)),
        ("deep/down/t", sample("f4", (20, 30)), (5, 7)),
        ("scalar", np.array(7.5), ()),
        ("words", np.array([b"a", b"bcd", b""] * 10), (7,)),
    ):
        made = root.create_array(
            path, shape=data.shape, chunks=chunks or "auto", dtype=data.dtype, attributes={"of": path}
        )
        made[...] = data
    root.create_array("nothing", shape=(8,), chunks=(2,), dtype="i2", fill_value=3)
    return tmp_path / "group"


def assert_same_hierarchy(source: Path, target: Path) -> None:
    """Compare all groups and arrays with their attributes and data."""
    ours, theirs = zarr.open_group(target, mode="r"), zarr.open_group(source, mode="r")
    mine, yours = (dict(one.members(max_depth=None)) for one in (ours, theirs))
    assert mine.keys() == yours.keys()
    assert dict(ours.attrs) == dict(theirs.attrs)
    for path, node in yours.items():
        assert dict(mine[path].attrs) == dict(node.attrs), path
        if isinstance(node, zarr.Array):
            copied: Any = mine[path]
            assert copied.fill_value == node.fill_value
            same_bits(np.asarray(copied[...]).astype(node.dtype), np.asarray(node[...]))


# -- one array ------------------------------------------------------------------------------------


def test_an_array_as_it_is(array: Path, tmp_path: Path) -> None:
    done(array, tmp_path / "copy")
    assert zarr.open_array(tmp_path / "copy").metadata == zarr.open_array(array).metadata
    same_bits(read(tmp_path / "copy"), read(array))


@pytest.mark.parametrize("options", [(), ("--format", "2"), ("--format", "3", "--shards", "10,14")])
def test_an_array_in_another_layout(array: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    chunks = () if "--shards" in options else ("--chunks", "6,-1")
    result = done(array, tmp_path / "copy", *chunks, "--codec", "gzip:2", "--verify", *options)
    made: Any = zarr.open_array(tmp_path / "copy")
    assert (made.chunks, made.shards) == (((5, 7), (10, 14)) if not chunks else ((6, 30), None))
    assert "level=2" in repr(made.compressors)
    same_bits(read(tmp_path / "copy"), read(array))
    assert "compared: every stored chunk holds the same, to the bit" in result.stdout


def test_a_region_and_a_path(array: Path, tmp_path: Path) -> None:
    done(array, tmp_path / "store.zarr", "--target-path", "in/it", "--region", "3:19,5:", "--verify")
    same_bits(read(tmp_path / "store.zarr", "in/it"), read(array)[3:19, 5:])
    assert isinstance(zarr.open_group(tmp_path / "store.zarr", mode="r")["in"], zarr.Group)


def test_shards_are_kept_and_left_out(tmp_path: Path) -> None:
    array_in(tmp_path / "a", sample("i4", (16, 16)), chunks=(2, 2), shards=(8, 8))
    done(tmp_path / "a", tmp_path / "kept")
    done(tmp_path / "a", tmp_path / "out", "--shards", "none")
    done(tmp_path / "a", tmp_path / "old", "--format", "2")
    made = [zarr.open_array(tmp_path / name) for name in ("kept", "out", "old")]
    assert [(one.chunks, one.shards) for one in made] == [((2, 2), (8, 8)), ((2, 2), None), ((2, 2), None)]
    for name in ("kept", "out", "old"):
        same_bits(read(tmp_path / name), read(tmp_path / "a"))


def test_chunks_that_are_not_stored_stay_so(tmp_path: Path) -> None:
    source = zarr.create_array(tmp_path / "a", shape=(100,), chunks=(5,), dtype="i4", fill_value=-1)
    source[10:20] = 1
    done(tmp_path / "a", tmp_path / "copy", "--chunks", "10")
    assert sorted(p.name for p in (tmp_path / "copy" / "c").iterdir()) == ["1"]


@pytest.mark.parametrize("codec", ["none", "zstd", "zstd:5", "gzip", "blosc", "blosc:1", "blosc-zstd:3"])
@pytest.mark.parametrize("version", ["2", "3"])
def test_codecs(array: Path, tmp_path: Path, codec: str, version: str) -> None:
    done(array, tmp_path / "copy", "--codec", codec, "--format", version)
    text = str(zarr.open_array(tmp_path / "copy").compressors)
    name, _, level = codec.partition(":")
    if name == "none":
        assert text == "()"
    else:
        assert name.partition("-")[0] in text.lower()
        assert f"level={level}" in text
    same_bits(read(tmp_path / "copy"), read(array))


# -- groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [None, "2", "3"])
def test_a_group_with_all_that_is_in_it(group: Path, tmp_path: Path, version: Any) -> None:
    result = done(group, tmp_path / "copy", "--verify", *([] if version is None else ["--format", version]))
    assert_same_hierarchy(group, tmp_path / "copy")
    before = zarr.open_group(group, mode="r").metadata.zarr_format
    assert zarr.open_group(tmp_path / "copy", mode="r").metadata.zarr_format == int(version or before)
    assert "5 of 5 arrays" in result.stdout
    assert not list((tmp_path / "copy").rglob(".zmetadata"))


@pytest.mark.parametrize("version", ["2", "3"])
def test_consolidated_metadata_are_kept(group: Path, tmp_path: Path, version: str) -> None:
    zarr.consolidate_metadata(group)
    done(group, tmp_path / "copy", "--format", version)
    opened = zarr.open_consolidated(tmp_path / "copy")
    assert {path for path, _ in opened.members(max_depth=None)} == {
        path for path, _ in zarr.open_group(group, mode="r").members(max_depth=None)
    }
    name = ".zmetadata" if version == "2" else "zarr.json"
    ours = json.loads((tmp_path / "copy" / name).read_text())
    zarr.consolidate_metadata(tmp_path / "copy")
    theirs = json.loads((tmp_path / "copy" / name).read_text())
    assert _plain(ours) == _plain(theirs)


def _plain(document: Any) -> Any:
    """Leave out what zarr-python writes into groups of a consolidated document, which have nothing consolidated."""
    if isinstance(document, dict):
        inner = {"kind": "inline", "must_understand": False, "metadata": {}}
        return {k: _plain(v) for k, v in document.items() if not (k == "consolidated_metadata" and v == inner)}
    return document


def test_chunk_lengths_are_for_arrays_with_so_many_axes(group: Path, tmp_path: Path) -> None:
    done(group, tmp_path / "copy", "--chunks", "10,-1")
    copied: Any = zarr.open_group(tmp_path / "copy", mode="r")
    assert copied["deep/down/t"].chunks == (10, 30)
    assert copied["x"].chunks == (10,)


def test_what_is_there_is_replaced_as_a_whole(group: Path, tmp_path: Path) -> None:
    other: Any = 5 - zarr.open_group(group, mode="r").metadata.zarr_format
    old = zarr.create_group(tmp_path / "copy", zarr_format=other)
    old.create_array("x", shape=(3,), dtype="i1")
    old.create_array("gone", shape=(3,), dtype="i1")
    assert "exists: choose another place, or say --overwrite" in refused(group, tmp_path / "copy")
    done(group, tmp_path / "copy", "--overwrite")
    assert_same_hierarchy(group, tmp_path / "copy")


@pytest.mark.parametrize("there_and_back", [(2, 3), (3, 2)])
def test_xarray_sees_the_same_dataset(tmp_path: Path, there_and_back: tuple[int, int]) -> None:
    """With what it takes for missing: in version 2 the fill value itself, in version 3 an attribute."""
    before, after = there_and_back
    values = np.arange(12.0).reshape(3, 4)
    values[1, 1] = np.nan
    dataset = xr.Dataset(
        {"t": (("y", "x"), values), "n": (("y", "x"), np.arange(12).reshape(3, 4)), "m": ("x", [0, 5, 0, 7])},
        {"x": [0, 1, 2, 3], "y": [10.0, 20.0, 30.0]},
        {"title": "T"},
    )
    encoding = {"t": {"_FillValue": -9999.0, "dtype": "f4"}, "m": {"_FillValue": 5}}
    dataset.to_zarr(tmp_path / "a", zarr_format=before, encoding=encoding, consolidated=True)
    done(tmp_path / "a", tmp_path / "b", "--format", after)
    with xr.open_zarr(tmp_path / "a") as theirs, xr.open_zarr(tmp_path / "b") as ours:
        xr.testing.assert_identical(ours.load(), theirs.load())
        assert ours["t"].dims == ("y", "x")
        assert ours["t"].encoding["_FillValue"] == -9999.0
    done(tmp_path / "b", tmp_path / "c", "--format", before)
    with xr.open_zarr(tmp_path / "a") as theirs, xr.open_zarr(tmp_path / "c") as ours:
        xr.testing.assert_identical(ours.load(), theirs.load())


# -- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--chunks", "2"), "--chunks has 1 lengths, and"),
        (("--chunks", "2,x"), "such as 100,-1, got '2,x'"),
        (("--chunks", "0,1"), "such as 100,-1"),
        (("--shards", "9,14"), "zarr can't make such a target"),
        (("--shards", "10,14", "--format", "2"), "zarr can't make such a target"),
        (("--codec", "lzma"), "--codec is NAME or NAME:LEVEL with one of none, zstd"),
        (("--codec", "zstd:fast"), "--codec zstd:fast"),
        (("--codec", "blosc-x"), "--codec is NAME"),
        (("--format", "4"), "--format"),
        (("--region", "50:60,:"), "lies outside the array"),
        (("--where", "i0 == 1"), "--where speaks of stored chunks"),
        (("--path", "no"), "there is no array 'no'"),
    ],
)
def test_what_does_not_fit_is_wrong_usage(array: Path, tmp_path: Path, options: tuple[str, ...], says: str) -> None:
    assert says in refused(array, tmp_path / "copy", *options, code=3 if "--path" in options else 2)
    assert not (tmp_path / "copy").exists()


def test_places_that_will_not_do(array: Path, group: Path, tmp_path: Path) -> None:
    assert "exists" in refused(array, array.parent / "group", "--target-path", "x")
    assert "is the source, or one lies inside the other" in refused(array, array, "--overwrite")
    assert "is the source, or one lies inside the other" in refused(group, group / "deep" / "new")
    assert "is the source, or one lies inside the other" in refused(group, tmp_path, "--overwrite")
    assert "is a group, and would have to go" in refused(array, group, "--overwrite")
    assert "--region is a part of one array" in refused(group, tmp_path / "copy", "--region", "1:2")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").touch()
    assert "is not empty and no Zarr group ('letter')" in refused(group, tmp_path / "mine", "--overwrite")
    assert "there is no zarr array at" in refused(tmp_path / "mine", tmp_path / "copy", code=3)


# -- ends -----------------------------------------------------------------------------------------


def test_a_bad_chunk_is_named_and_the_rest_is_copied(array: Path, tmp_path: Path) -> None:
    chunk = array / "c" / "1" / "2"
    chunk.write_bytes(chunk.read_bytes()[:20])
    result = copy(array, tmp_path / "copy", "--retries", "0")
    assert result.exit_code == 1
    assert "not copied: (1, 2): CorruptChunkError" in result.stderr
    want = read(tmp_path / "copy")
    want[5:10, 14:21] = -1
    same_bits(read(tmp_path / "copy"), want)


def test_a_difference_is_found(array: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = LocalFiles.put

    def turned(self: LocalFiles, key: str, value: Any, *, aside: str = "") -> None:
        put(self, key, bytes(value)[::-1] if key == "c/1/2" else value, aside=aside)

    monkeypatch.setattr(LocalFiles, "put", turned)
    result = copy(array, tmp_path / "copy", "--codec", "none", "--verify")
    assert result.exit_code == 1
    assert "compared: they differ" in result.stdout
    assert "the array differs in box" in result.stderr


def test_a_copy_goes_on_where_it_was_stopped(group: Path, tmp_path: Path) -> None:
    bad = next(path for path in (group / "deep" / "down" / "t").rglob("*[0-9]") if path.is_file())
    good = bad.read_bytes()
    bad.write_bytes(good[:10])
    options = (group, tmp_path / "copy", "--checkpoint", tmp_path / "ledgers", "--retries", "0")
    assert copy(*options).exit_code == 1
    bad.write_bytes(good)
    report = json.loads(done(*options, "--json").stdout)["report"]
    assert (report["emitted"], report["resumed"]) == (1, 20 + 3 + 1 + 5 - 1)
    assert_same_hierarchy(group, tmp_path / "copy")
    # And once more, also with the word to replace what is there: it is what it began.
    assert json.loads(done(*options, "--overwrite", "--json").stdout)["report"]["emitted"] == 0
    assert_same_hierarchy(group, tmp_path / "copy")


def test_json(array: Path, tmp_path: Path) -> None:
    found = json.loads(done(array, tmp_path / "copy", "--chunks", "20,30", "--json", "--verify").stdout)
    (one,) = found["arrays"]
    assert (one["path"], one["chunks"], one["zarr_format"]) == ("", [[5, 7], [20, 30]], [3, 3])
    assert (found["verified"], found["different"], found["report"]["dead_lettered"]) == (True, [], 0)
    assert found["report"]["bytes_written"] == sum(
        p.stat().st_size for p in (tmp_path / "copy" / "c").rglob("*") if p.is_file()
    )


def test_on_the_cluster_inside_this_process(group: Path, tmp_path: Path) -> None:
    done(group, tmp_path / "copy", "--concurrency", "8", "--verify")
    assert_same_hierarchy(group, tmp_path / "copy")


# -- on real parts --------------------------------------------------------------------------------


def test_on_a_scheduler(local_cluster: LocalCluster, group: Path, tmp_path: Path) -> None:
    done(group, tmp_path / "copy", "--scheduler", local_cluster.scheduler_address, "--verify")
    assert_same_hierarchy(group, tmp_path / "copy")


def test_to_s3_and_back(s3_server: S3Server, group: Path, tmp_path: Path) -> None:
    bucket = s3_server.make_bucket(f"copy-{uuid.uuid4().hex[:8]}")
    options = s3_server.storage_options
    words = [f"key={options['key']}", f"secret={options['secret']}"]
    words += [f"client_kwargs.{name}={value}" for name, value in options["client_kwargs"].items()]
    there = [part for word in words for part in ("--target-option", word)]
    back = [part for word in words for part in ("--storage-option", word)]
    done(group, f"s3://{bucket}/a", *there, "--verify")
    done(f"s3://{bucket}/a", tmp_path / "copy", *back)
    assert_same_hierarchy(group, tmp_path / "copy")
    # Between two places of one kind, the options of the source do for both.
    done(f"s3://{bucket}/a", f"s3://{bucket}/b", *back)
    done(f"s3://{bucket}/b", tmp_path / "again", *back)
    assert_same_hierarchy(group, tmp_path / "again")
