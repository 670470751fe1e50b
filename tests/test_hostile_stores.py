"""Folders and ledgers that somebody has prepared to do harm."""

from __future__ import annotations

import json
import os
import resource
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zarr
from click.testing import CliRunner

import zarr_dask_stream as zds
from zarr_dask_stream.cli.command import zds as zds_command
from zarr_dask_stream.errors import StoreError, ZdsError
from zarr_dask_stream.source.array import list_arrays, open_array
from zarr_dask_stream.source.hierarchy import walk_hierarchy
from zarr_dask_stream.source.reader import read_chunks
from zarr_dask_stream.source.store import StoreSpec

# -- folders that have no end -----------------------------------------------------------------------------------


def _array(place: Path) -> None:
    zarr.create_array(place, shape=(4,), chunks=(2,), dtype="i4")[:] = 1


@pytest.mark.timeout(20)
def test_links_that_lead_round(tmp_path: Path) -> None:
    root = tmp_path / "root"
    group = zarr.create_group(root)
    group.create_array("a/x", shape=(4,), chunks=(2,), dtype="i4")
    group.create_group("b")
    for name in ("l1", "l2", "l3"):
        (root / name).symlink_to(root)
        (root / "a" / name).symlink_to(root / "b")
        (root / "b" / name).symlink_to(root / "a")
    (root / "none").symlink_to(root / "none")
    _array(tmp_path / "elsewhere")
    (root / "z").symlink_to(tmp_path / "elsewhere")
    found = [summary.path for summary in list_arrays(root)]
    assert found[0] == "a/x"
    assert found[-1] == "z", "links to elsewhere are followed"
    assert len(found) == len(set(found)) < 20
    hierarchy = walk_hierarchy(StoreSpec.parse(root), "")
    assert hierarchy is not None
    assert hierarchy.arrays == found


def test_folders_within_folders() -> None:
    document = json.dumps({"zarr_format": 3, "node_type": "group"}).encode()
    keys = ["a/" * depth + "zarr.json" for depth in range(2000)]
    store: dict[str, Any] = dict.fromkeys(keys, document)
    assert list_arrays(store) == []
    with pytest.raises(StoreError, match="more than 64 deep"):
        walk_hierarchy(StoreSpec.parse(store), "")


# -- words that a terminal obeys --------------------------------------------------------------------------------

OBEYED = "\x1b]0;title\x07\x1b[2J\x9b2J\u202e"


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("command", ["info", "info --path a", "info --path nowhere", "verify --path a"])
def test_what_a_store_says_moves_no_cursor(tmp_path: Path, command: str, *, as_json: bool) -> None:
    names = [f"x{OBEYED}"]
    group = zarr.create_group(tmp_path / "g")
    group.create_array("a", shape=(4,), chunks=(2,), dtype="i4", attributes={OBEYED: OBEYED}, dimension_names=names)
    (tmp_path / "g/a/c").mkdir()
    (tmp_path / "g/a/c/0").write_bytes(OBEYED.encode())
    array = json.loads((tmp_path / "g/a/zarr.json").read_text())
    document = json.loads((tmp_path / "g/zarr.json").read_text())
    inside = {"kind": "inline", "must_understand": False, "metadata": {f"b{OBEYED}": array, "a": array, "../c": array}}
    (tmp_path / "g/zarr.json").write_text(json.dumps(document | {"consolidated_metadata": inside}))
    name, *options = command.split()
    done = CliRunner().invoke(zds_command, [name, str(tmp_path / "g"), *options, *(["--json"] if as_json else [])])
    said = done.output + done.stderr
    assert done.exit_code == {"info": 3 if "nowhere" in command else 0, "verify": 1}[name], said
    assert not set(OBEYED) - set("0;title2J[]") & set(said)
    if command == "info":
        assert "is not a key inside the store" in said  # of one; the others are shown


# -- chunks that no memory holds --------------------------------------------------------------------------------


@contextmanager
def _address_space(more_bytes: int) -> Iterator[None]:
    """Let this process ask for so much more memory than it has, and for no more."""
    usual = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more_bytes, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, usual)


def test_a_fill_value_for_more_than_there_is_memory() -> None:
    store: dict[str, Any] = {}
    zarr.create_array(store, shape=(4,), chunks=(2,), dtype="i4")
    document = json.loads(store["zarr.json"].to_bytes())
    document |= {"shape": [2**62], "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2**37]}}}
    spec = open_array({"zarr.json": json.dumps(document).encode()})
    with _address_space(1 << 33):  # a kernel may promise any amount of memory, and end whoever takes it at its word
        first, second = read_chunks(spec, [0, 1])
    assert isinstance(first.error, MemoryError)
    assert isinstance(second.error, MemoryError)


# -- ledgers ----------------------------------------------------------------------------------------------------


def _stream(folder: Path, ledger: Any) -> Any:
    if not (folder / "a").exists():
        _array(folder / "a")
    return zds.stream_chunks(folder / "a", checkpoint=ledger, concurrency=1)


@pytest.mark.parametrize("planted", [".x.ledger.tmp", "x.ledger.lock", "x.ledger"])
def test_links_beside_a_ledger_lead_nowhere(tmp_path: Path, planted: str) -> None:
    victim, shared = tmp_path / "victim", tmp_path / "shared"
    victim.write_text("precious")
    shared.mkdir()
    (shared / planted).symlink_to(victim)
    if planted == ".x.ledger.tmp":
        assert len(list(_stream(tmp_path, shared / "x.ledger"))) == 2
    else:
        with pytest.raises(StoreError, match=r"x\.ledger"):
            list(_stream(tmp_path, shared / "x.ledger"))
    assert victim.read_text() == "precious"


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_something_else_in_place_of_a_ledger(tmp_path: Path, kind: str) -> None:
    ledger = tmp_path / "x.ledger"
    if kind == "pipe":
        os.mkfifo(ledger)
    elif kind == "device":
        ledger.symlink_to("/dev/zero")
    else:
        ledger.mkdir()
    with pytest.raises(StoreError, match=r"x\.ledger.*not a file"):
        list(_stream(tmp_path, ledger))


@pytest.mark.parametrize("url", ["https://me:canary-word@[host/a", "simplecache::https://me:canary-word@[host/a"])
def test_urls_that_make_no_sense(url: str) -> None:
    for ask in (zds.stream_chunks, lambda place: zds.Checkpoint(url=place)):
        with pytest.raises(zds.UsageError, match="a senseless URL") as caught:
            ask(url)
        assert "canary-word" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "url",
    [
        "http://me:canary-word@127.0.0.1:9/x.ledger",
        "http://127.0.0.1:9/x.ledger?signature=canary-word",
        "simplecache::http://me:canary-word@127.0.0.1:9/x.ledger",
        "s3://me:canary-word@bucket/x.ledger",
        "ftp://me:canary-word@127.0.0.1:9/x.ledger",
        "nosuch://me:canary-word@host/x.ledger",
    ],
)
def test_urls_of_ledgers_keep_their_secrets(tmp_path: Path, url: str) -> None:
    stream = _stream(tmp_path, zds.Checkpoint(url=url))
    with pytest.raises(ZdsError, match=r"ledger|checkpoint") as caught:
        list(stream)
    said = "".join(traceback.format_exception(caught.value)) + repr(stream) + repr(zds.Checkpoint(url=url))
    assert "canary-word" not in said
