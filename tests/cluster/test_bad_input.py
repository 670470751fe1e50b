"""Damaged chunks and absurd metadata, through the whole stack on real worker processes."""

from __future__ import annotations

import gzip
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
import zstandard
from distributed import Client
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ZstdCodec

import zarr_dask_stream as zds
from cluster.streaming import CHUNK_COUNT, CHUNKS, SHAPE, assemble, write_array
from counted import balanced
from zarr_dask_stream import errors

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("client")]

CODECS: dict[str, dict[str, Any]] = {
    "zstd with a checksum": {"compressors": [ZstdCodec(level=1, checksum=True)]},
    "crc32c": {"serializer": BytesCodec(), "compressors": [Crc32cCodec()]},
    "gzip": {"compressors": [GzipCodec(level=1)]},
    "blosc": {"compressors": [BloscCodec(cname="lz4")]},
    "nothing": {"compressors": None},
}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    file.write_bytes(raw)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"tail")


def become_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def become_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def only_the_damaged_chunk_is_lost(url: str, data: np.ndarray) -> zds.DeadLetter:
    stream = zds.stream_chunks(url, on_error="skip", retry=zds.RetryPolicy(wait_initial=0.01))
    expected = data.copy()
    expected[18:24, 15:20] = -7
    np.testing.assert_array_equal(assemble(stream), expected)
    (letter,) = stream.report.dead_letters
    assert letter.index == (3, 3)
    assert letter.region == (slice(18, 24), slice(15, 20))
    assert stream.report.emitted == CHUNK_COUNT - 1
    assert balanced(stream.report)
    with pytest.raises(zds.ChunkError) as caught:
        list(zds.stream_chunks(url, retry=zds.RetryPolicy(wait_initial=0.01)))
    assert caught.value.index == (3, 3)
    assert url in str(caught.value)
    return letter


# -- chunks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [cut, empty], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("codec", CODECS)
def test_a_chunk_that_is_cut_off(tmp_path: Path, codec: str, damage: Callable[[Path], None]) -> None:
    data = write_array(str(tmp_path / "array.zarr"), **CODECS[codec])
    damage(tmp_path / "array.zarr" / "c" / "3" / "3")
    letter = only_the_damaged_chunk_is_lost(str(tmp_path / "array.zarr"), data)
    assert letter.error_type == "CorruptChunkError"
    assert letter.attempts == 3, "a body that was cut off may heal by reading it again"


@pytest.mark.parametrize("codec", ["zstd with a checksum", "crc32c", "gzip"])
def test_a_bit_that_flipped(tmp_path: Path, codec: str) -> None:
    data = write_array(str(tmp_path / "array.zarr"), **CODECS[codec])
    flip(tmp_path / "array.zarr" / "c" / "3" / "3")
    letter = only_the_damaged_chunk_is_lost(str(tmp_path / "array.zarr"), data)
    assert letter.error_type == "CorruptChunkError"


def test_a_chunk_with_something_after_it(tmp_path: Path) -> None:
    data = write_array(str(tmp_path / "array.zarr"), **CODECS["nothing"])
    lengthen(tmp_path / "array.zarr" / "c" / "3" / "3")
    assert only_the_damaged_chunk_is_lost(str(tmp_path / "array.zarr"), data).error_type == "CorruptChunkError"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("damage", [become_a_folder, become_a_pipe], ids=lambda damage: damage.__name__)
def test_something_else_in_place_of_a_chunk(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    data = write_array(str(tmp_path / "array.zarr"))
    damage(tmp_path / "array.zarr" / "c" / "3" / "3")
    only_the_damaged_chunk_is_lost(str(tmp_path / "array.zarr"), data)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("codec", ["zstd with a checksum", "gzip"])
def test_a_bomb_is_refused_before_its_memory_is_taken(client: Client, tmp_path: Path, codec: str) -> None:
    half_a_gigabyte = bytes(1 << 29)
    pack = gzip.compress if codec == "gzip" else zstandard.ZstdCompressor().compress
    data = write_array(str(tmp_path / "array.zarr"), **CODECS[codec])
    (tmp_path / "array.zarr" / "c" / "3" / "3").write_bytes(pack(half_a_gigabyte))
    before = client.run(peak_bytes)
    letter = only_the_damaged_chunk_is_lost(str(tmp_path / "array.zarr"), data)
    after = client.run(peak_bytes)
    assert letter.error_type == "CorruptChunkError"
    assert all(after[worker] - before[worker] < 1 << 27 for worker in before)


@pytest.mark.parametrize("damage", [cut, empty], ids=lambda damage: damage.__name__)
def test_a_damaged_shard_costs_its_own_chunks(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    data = write_array(str(tmp_path / "array.zarr"), shards=(12, 10))
    damage(tmp_path / "array.zarr" / "c" / "1" / "1")  # its index is at its end
    policy = zds.RetryPolicy(wait_initial=0.01)
    stream = zds.stream_chunks(str(tmp_path / "array.zarr"), on_error="skip", retry=policy)
    expected = data.copy()
    expected[12:24, 10:20] = -7
    np.testing.assert_array_equal(assemble(stream), expected)
    assert sorted(letter.index for letter in stream.report.dead_letters) == [(2, 2), (2, 3), (3, 2), (3, 3)]
    assert balanced(stream.report)


# -- metadata -----------------------------------------------------------------------------------------------


def rewrite(place: Path, **changes: Any) -> None:
    file = place / "zarr.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def regular(*chunks: Any) -> dict[str, Any]:
    return {"name": "regular", "configuration": {"chunk_shape": list(chunks)}}


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": "large"},
        {"shape": [-4, 50]},
        {"shape": [60, 50, 2]},
        {"shape": [1e400, 50]},
        {"chunk_grid": regular(0, 5)},
        {"chunk_grid": regular(1 << 40, 1 << 40)},
        {"chunk_grid": {"name": "hexagonal"}},
        {"data_type": "int33"},
        {"codecs": [{"name": "bytes"}, {"name": "no-such-codec"}]},
        {"codecs": "zstd"},
        {"fill_value": {"not": "a number"}},
    ],
    ids=str,
)
def test_metadata_that_make_no_sense(tmp_path: Path, changes: dict[str, Any]) -> None:
    place = tmp_path / "array.zarr"
    write_array(str(place))
    rewrite(place, **changes)
    with pytest.raises(errors.MetadataError, match=r"array\.zarr"):
        zds.stream_chunks(str(place))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00\x01", '{"zarr_format": 3}'])
def test_metadata_that_are_none(tmp_path: Path, text: str) -> None:
    place = tmp_path / "array.zarr"
    write_array(str(place))
    (place / "zarr.json").write_text(text)
    with pytest.raises(zds.StoreError, match=r"array\.zarr"):
        zds.stream_chunks(str(place))


@pytest.mark.timeout(30)
def test_an_absurd_shape_is_lazy_or_refused(tmp_path: Path) -> None:
    place = tmp_path / "array.zarr"
    data = write_array(str(place))
    rewrite(place, shape=[1 << 50, 50])
    stream = zds.stream_chunks(str(place), missing="skip", region=(slice(0, 60),))
    np.testing.assert_array_equal(assemble(stream), data)
    first = next(iter(zds.stream_chunks(str(place))))
    np.testing.assert_array_equal(first.data, data[:6, :5])


def test_metadata_that_change_under_way_are_seen_by_the_workers(tmp_path: Path) -> None:
    place = tmp_path / "array.zarr"
    write_array(str(place))
    stream = zds.stream_chunks(str(place))
    rewrite(place, fill_value=7)
    with pytest.raises(errors.StoreNotVisibleError, match="fill_value is 7, expected -1"):
        list(stream)


def test_a_group_where_an_array_is_meant(tmp_path: Path) -> None:
    group = zarr.open_group(str(tmp_path / "group.zarr"), mode="w")
    group.create_array("air/temperature", shape=SHAPE, chunks=CHUNKS, dtype="i4")
    with pytest.raises(errors.StoreNotFoundError, match=r"is a group.*air/temperature"):
        zds.stream_chunks(str(tmp_path / "group.zarr"))
    with pytest.raises(errors.StoreNotFoundError, match="air/temperature"):
        zds.stream_chunks(str(tmp_path / "group.zarr"), path="air/pressure")
