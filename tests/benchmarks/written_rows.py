"""Rows that write: an array copied into another format, codec and layout."""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask.array
import google_crc32c
import numcodecs.blosc
import numpy as np
import zstandard
from distributed import Client
from zarr.codecs import ZstdCodec

import zarr_dask_stream as zds
from benchmarks import data, limit, peers
from benchmarks.contest import Contender, Kind, Outcome, Row, share, times
from benchmarks.data import Stored
from benchmarks.limit import read_file
from benchmarks.local_rows import TENSORSTORE
from benchmarks.places import Bench
from benchmarks.streams import figures_of

_SHARD = (16, 32)


def copy(bench: Bench) -> Row:
    """Version 2 with blosc into version 3 with zstd and shards."""
    grid = (_SHARD[0] * bench.sized(4), 256)
    source = data.make(bench.folder, "copy", Stored("", grid, (128, 128), "blosc2"), bench.seed)
    total = peers.zarr_whole(source)
    stream, dask_name = "stream", "dask, from_zarr + store"

    def contender(name: str, kind: Kind, write: Callable[[Stored, Stored], dict[str, float]]) -> Contender:
        folder = bench.folder / f"copied-{name.split(',', 1)[0]}"
        target = replace(source, url=str(folder / "a"), layout="shards", shard=_SHARD)

        def run() -> Outcome:
            shutil.rmtree(folder, ignore_errors=True)
            begin = time.perf_counter()
            figures = write(source, target)
            seconds = time.perf_counter() - begin
            copied = float(bench.bare.run(limit.sum_shards, target).sum(dtype="f8"))
            return Outcome(source.chunks, copied, figures, seconds)

        return Contender(name, run, kind, work=source.url, family=name)

    return Row(
        f"{source.chunks:,} chunks of 64 KiB, blosc-lz4-shuffle, v2, copied to zstd, v3, shards of 32 MiB; local files",
        [
            contender("limit", "limit", lambda s, t: _bare(bench, s, t)),
            contender(stream, "stream", lambda s, t: _stream(bench, s, t)),
            contender(dask_name, "peer", lambda s, t: _dask(bench.client, s, t)),
            contender(TENSORSTORE, "peer", _tensorstore),
        ],
        [share(stream, "limit", 0.70, "a bare loop"), times(stream, dask_name, 2.0, dask_name)],
        expected={source.url: total},
        absent={"cubed": "writes no shards", "rechunker": "needs zarr 2, which has no shards"},
    )


def _shape_of_shard(target: Stored) -> tuple[int, int]:
    return target.chunk[0] * _SHARD[0], target.chunk[1] * _SHARD[1]


def _stream(bench: Bench, source: Stored, target: Stored) -> dict[str, float]:
    stream = zds.stream_chunks(source.url, client=bench.client, ordered=False).to_zarr(
        target.url, chunks=target.chunk, shards=_shape_of_shard(target), compressors=ZstdCodec(level=1), zarr_format=3
    )
    return figures_of(stream.run())


def _bare(bench: Bench, source: Stored, target: Stored) -> dict[str, float]:
    data.create(target)
    # A process takes whole rows of shards.
    bench.bare.run_parts(_copy_shards, replace(source, shard=_SHARD), target)
    return {}


def _copy_shards(source: Stored, start: int, stop: int, target: Stored) -> None:
    """Copy a range of shards: each is built in memory and written at one stroke."""
    numcodecs.blosc.set_nthreads(1)
    decode, encode = numcodecs.blosc.decompress, zstandard.ZstdCompressor(level=1).compress
    rows, columns = _SHARD
    block = np.empty(source.chunk, "f4")
    width = source.grid[1]
    for i in range(start // width // rows, stop // width // rows):
        for j in range(width // columns):
            parts, index, offset = [], [], 0
            for entry in range(rows * columns):
                number = (i * rows + entry // columns) * width + j * columns + entry % columns
                decode(read_file(f"{source.url}/{source.key(number)}"), block)
                part = encode(block.data)
                parts.append(part)
                index += [offset, len(part)]
                offset += len(part)
            table = np.array(index, "<u8").tobytes()
            path = Path(target.url, f"c/{i}/{j}")
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.writelines([*parts, table, google_crc32c.value(table).to_bytes(4, "little")])


def _dask(client: Client, source: Stored, target: Stored) -> dict[str, float]:
    """Read and write with zarr-python, a shard to a task."""
    made = data.create(target)
    array = dask.array.from_zarr(source.url, chunks=_shape_of_shard(target))
    stored: Any = array.store(made, lock=False, compute=False)
    client.compute(stored, sync=True)
    return {}


def _tensorstore(source: Stored, target: Stored) -> dict[str, float]:
    data.create(target)
    reading = peers.tensorstore_of(source)
    # Opened anew: what an earlier round knows of it has gone with the folder.
    writing = peers.tensorstore_open(target)
    height, width = _shape_of_shard(target)
    places = [
        (slice(i, i + height), slice(j, j + width))
        for i in range(0, target.shape[0], height)
        for j in range(0, target.shape[1], width)
    ]
    for done in peers.ahead((writing[place].write(reading[place]) for place in places), 4):
        done.result()
    return {}
