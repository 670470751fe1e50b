"""Where a target may be: arrays that are there, places that are taken, items that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import zarr_dask_stream as zds
from conformance.oracle import same_bits, sample
from copying import array_in, keys, read

# -- an array that is there -----------------------------------------------------------------------


def test_a_region_keeps_its_place_in_an_array_of_the_same_shape() -> None:
    data = sample("i4", (12, 10))
    source = array_in({}, data, chunks=(3, 10))
    target = zarr.create_array({}, shape=(12, 10), chunks=(4, 5), dtype="i4", fill_value=-1)
    target[:] = -2
    region = (slice(4, 12), slice(5, 10))
    zds.stream_chunks(source, region=region, concurrency=1).to_zarr(target).run()
    want = np.full((12, 10), -2)
    want[region] = data[region]
    assert (np.asarray(target[:]) == want).all()


def test_a_region_fills_an_array_of_its_own_shape() -> None:
    data = sample("i4", (12, 10))
    source = array_in({}, data, chunks=(3, 10))
    target = zarr.create_array({}, shape=(7, 3), chunks=(2, 2), dtype="i4")
    zds.stream_chunks(source, region=(slice(5, 12), slice(1, 4)), concurrency=1).to_zarr(target).run()
    assert (np.asarray(target[:]) == data[5:12, 1:4]).all()


def test_what_becomes_empty_is_removed_from_an_array_that_is_there() -> None:
    source = array_in({}, np.array([0, 0, 3, 4]), chunks=(2,))
    store: dict[str, Any] = {}
    target = array_in(store, np.array([1, 2, 3, 4]), chunks=(2,))
    zds.stream_chunks(source, concurrency=1).to_zarr(target).run()
    assert read(store).tolist() == [0, 0, 3, 4]
    assert keys(store) == {"c/1"}


@pytest.mark.parametrize(
    ("options", "shape", "chunks", "region", "words"),
    [
        ({}, (11, 10), (4, 5), None, r"target has shape \(11, 10\), and \(12, 10\) is to be written"),
        ({}, (13, 10), (4, 5), None, r"target has shape \(13, 10\)"),
        ({}, (12, 10), (4, 5), (slice(2, 8),), r"axis 0 is stored in lengths of 4, and 2:8 of it is to be written"),
        ({}, (12, 10), (4, 5), (slice(4, 9),), "begins and ends where its stored objects do"),
        ({"chunks": (2, 2)}, (12, 10), (4, 5), None, "written to as it is: leave chunks out"),
        ({"overwrite": True}, (12, 10), (4, 5), None, "leave overwrite out"),
    ],
)
def test_an_array_that_does_not_fit_is_refused(options: Any, shape: Any, chunks: Any, region: Any, words: str) -> None:
    source = array_in({}, sample("i4", (12, 10)), chunks=(3, 10))
    store: dict[str, Any] = {}
    target = zarr.create_array(store, shape=shape, chunks=chunks, dtype="i4")
    with pytest.raises(zds.UsageError, match=words):
        zds.stream_chunks(source, region=region, concurrency=1).to_zarr(target, **options)
    assert not keys(store)


def test_an_array_opened_for_reading_is_refused(tmp_path: Path) -> None:
    source = array_in({}, sample("i4", (4,)), chunks=(2,))
    array_in(tmp_path / "t", sample("i4", (4,)), chunks=(2,))
    with pytest.raises(zds.UsageError, match="opened for reading only: open it with mode='r\\+'"):
        zds.stream_chunks(source).to_zarr(zarr.open_array(tmp_path / "t", mode="r"))


# -- refused before any work ------------------------------------------------------------------------


def test_a_place_that_is_taken_is_refused(tmp_path: Path) -> None:
    source = array_in({}, sample("i4", (4,)), chunks=(2,))
    stream = zds.stream_chunks(source, concurrency=1)
    array_in(tmp_path / "array", sample("i8", (3,)), chunks=(2,))
    zarr.create_group(tmp_path / "group")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "letter.txt").write_text("mine")
    with pytest.raises(zds.UsageError, match="array exists: choose another place, or say overwrite=True"):
        stream.to_zarr(tmp_path / "array")
    for overwrite in (False, True):
        with pytest.raises(zds.UsageError, match="is a group, and would have to go with all that is in it"):
            stream.to_zarr(tmp_path / "group", overwrite=overwrite)
        with pytest.raises(zds.UsageError, match=r"not empty and no Zarr array \('letter.txt'\)"):
            stream.to_zarr(tmp_path / "files", overwrite=overwrite)
        with pytest.raises(zds.UsageError, match="is an array, and 'in/it' can't lie inside it"):
            stream.to_zarr(tmp_path / "array", path="in/it", overwrite=overwrite)
    assert read(tmp_path / "array").tolist() == sample("i8", (3,)).tolist()
    stream.to_zarr(tmp_path / "array", overwrite=True).run()
    assert read(tmp_path / "array").tolist() == read(source.store).tolist()


def test_a_place_that_is_taken_between_making_and_running_is_refused(tmp_path: Path) -> None:
    source = array_in({}, sample("i4", (4,)), chunks=(2,))
    stream = zds.stream_chunks(source, concurrency=1).to_zarr(tmp_path / "t")
    stream.run()
    with pytest.raises(zds.UsageError, match="exists"):
        stream.run()


def test_nothing_is_made_before_it_runs(tmp_path: Path) -> None:
    source = array_in({}, sample("i4", (4,)), chunks=(2,))
    zds.stream_chunks(source, concurrency=1).to_zarr(tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_what_was_there_is_gone_when_it_is_replaced(tmp_path: Path) -> None:
    array_in(tmp_path / "t", sample("i4", (40,)), chunks=(2,), zarr_format=2)
    source = array_in({}, sample("i4", (4,)), chunks=(2,))
    zds.stream_chunks(source, concurrency=1).to_zarr(tmp_path / "t", overwrite=True).run()
    files = sorted(str(p.relative_to(tmp_path / "t")) for p in (tmp_path / "t").rglob("*") if p.is_file())
    assert files == ["c/0", "c/1", "zarr.json"]


@pytest.mark.parametrize("kind", ["itself", "inside", "around", "a link"])
def test_the_source_is_never_written_over(tmp_path: Path, kind: str) -> None:
    data = sample("i4", (4,))
    array_in(tmp_path / "group" / "source", data, chunks=(2,))
    (tmp_path / "link").symlink_to(tmp_path / "group")
    target = {
        "itself": tmp_path / "group" / "source",
        "inside": tmp_path / "group" / "source" / "c",
        "around": tmp_path / "group",
        "a link": tmp_path / "link" / "source",
    }[kind]
    with pytest.raises(zds.UsageError, match="is the source itself, or one lies inside the other"):
        zds.stream_chunks(tmp_path / "group" / "source").to_zarr(target, overwrite=True)
    same_bits(read(tmp_path / "group" / "source"), data)
    store: dict[str, Any] = {}
    array = array_in(store, data, chunks=(2,), name="a")
    with pytest.raises(zds.UsageError, match="is the source itself"):
        zds.stream_chunks(array).to_zarr(store, path="a", overwrite=True)
    zds.stream_chunks(array, concurrency=1).to_zarr(store, path="b").run()
    same_bits(read(store, "b"), data)


def test_items_that_do_not_hold_whole_objects_are_refused_where_they_cannot_be_cut_anew() -> None:
    source = array_in({}, sample("i4", (12, 12)), chunks=(4, 3))
    stream = zds.stream_chunks(source)
    words = r"chunks of \[6, 3\], and items of \[4, 3\] hold parts of them, .* put \.rechunk\(\(6, 3\)\) before"
    with pytest.raises(zds.UsageError, match=words):
        stream.map(lambda c: c.data).to_zarr({}, chunks=(6, 3))
    with pytest.raises(zds.UsageError, match=words):
        stream.filter(lambda _: True).to_zarr({}, chunks=(6, 3))
    with pytest.raises(zds.UsageError, match=words):
        stream.take(1).to_zarr({}, chunks=(6, 3))
    with pytest.raises(zds.UsageError, match=words):
        zds.stream_chunks(source, where=lambda index: index[0] == 0).to_zarr({}, chunks=(6, 3))
    with pytest.raises(zds.UsageError, match=r"shards of \[8, 3\].*\.rechunk\(\(8, 3\)\)"):
        stream.map(lambda c: c.data).to_zarr({}, chunks=(2, 3), shards=(8, 3))
    with pytest.raises(zds.UsageError, match="hold parts of them, so that several tasks would write to one: choose"):
        stream.map(lambda c: c.data[::2], chunks=(2, 3)).to_zarr({}, chunks=(4, 3))
    target: dict[str, Any] = {}
    zds.stream_chunks(source, concurrency=1).rechunk((12, 3)).map(lambda c: -c.data).to_zarr(
        target, chunks=(6, 3)
    ).run()
    same_bits(read(target), -read(source.store))


def test_what_is_rechunked_is_stored_in_such_chunks() -> None:
    source = array_in({}, sample("i4", (12, 12)), chunks=(4, 3))
    target: dict[str, Any] = {}
    zds.stream_chunks(source, concurrency=1).rechunk((5, 12)).map(lambda c: -c.data).to_zarr(target).run()
    assert zarr.open_array(target).chunks == (5, 12)


def test_a_region_that_begins_inside_an_item_has_no_rule() -> None:
    source = array_in({}, sample("i4", (12,)), chunks=(4,))
    stream = zds.stream_chunks(source, region=slice(2, 12)).map(lambda c: c.data[::2], chunks=2)
    with pytest.raises(zds.UsageError, match=r"begins at 2 of axis 0, inside an item, .* begin at a multiple of 4"):
        stream.to_zarr({})
    target: dict[str, Any] = {}
    stream = zds.stream_chunks(source, region=slice(4, 11), concurrency=1)
    stream.map(lambda c: c.data[::2], chunks=2).to_zarr(target).run()
    assert read(target).tolist() == read(source.store)[4:11:2].tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chunk": (2,)}, "no option 'chunk'; did you mean 'chunks'"),
        ({"zarr_format": 4}, "zarr_format is 2 or 3, got 4"),
        ({"chunks": (0,)}, "zarr can't make such a target"),
        ({"shards": (3,)}, "zarr can't make such a target"),
        ({"dtype": "U3"}, "items hold int64, and the target <U3, which is of another kind"),
        ({"dtype": "f4", "zarr_format": 2, "dimension_names": ["x"]}, "zarr can't make such a target"),
        ({"verify": "twice"}, 'verify is True, False or "read"'),
        ({"path": 3}, "path is text"),
        ({"path": "../up"}, "not a key inside the store"),
        ({"storage_options": "no"}, "storage_options must be a Mapping"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], words: str) -> None:
    source = array_in({}, np.arange(4), chunks=(2,))
    with pytest.raises(zds.UsageError, match=words):
        zds.stream_chunks(source).to_zarr({}, **options)


@pytest.mark.parametrize("target", [None, 3, object()])
def test_targets_that_are_none(target: Any) -> None:
    source = array_in({}, np.arange(4), chunks=(2,))
    with pytest.raises(zds.UsageError, match="expected a URL, a path, a zarr array, group or store, or a mapping"):
        zds.stream_chunks(source).to_zarr(target)


def test_a_target_is_the_last_stage() -> None:
    source = array_in({}, np.arange(4), chunks=(2,))
    stream = zds.stream_chunks(source).to_zarr({})
    more_stages: list[Callable[[], Any]] = [
        lambda: stream.map(lambda c: c.data),
        lambda: stream.filter(lambda _: True),
        lambda: stream.reduce(zds.reducers.sum()),
        lambda: stream.to_zarr({}),
        lambda: stream.take(1),
    ]
    for more in more_stages:
        with pytest.raises(zds.UsageError, match=r"put \.to_zarr\(\.\.\.\) last"):
            more()
    with pytest.raises(zds.UsageError, match="batch, route and to_zarr have no place there"):
        next(stream.to_delayed())
    with pytest.raises(zds.UsageError, match="have no place before it"):
        zds.stream_chunks(source).batch(size=2).to_zarr({})


@pytest.mark.parametrize("chunks", [0, (1, 2), "x", (True,), 1.5])
def test_rules_that_are_none(chunks: Any) -> None:
    source = array_in({}, np.arange(4), chunks=(2,))
    with pytest.raises(zds.UsageError, match="chunks"):
        zds.stream_chunks(source).map(lambda c: c.data, chunks=chunks).to_zarr({})
    with pytest.raises(zds.UsageError, match="dtype is what NumPy takes for one"):
        zds.stream_chunks(source).map(lambda c: c.data, dtype="no such")
