"""Whatever tensorstore writes is read as tensorstore reads it, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr

from conformance.oracle import assemble, expected, same_bits, sample, smooth
from zarr_dask_stream.source.array import open_array

SHAPE, CHUNKS = (7, 10), (3, 4)

V2: list[dict[str, Any]] = [
    {},
    {"order": "F"},
    {"dimension_separator": "/"},
    {"compressor": None},
    {"compressor": {"id": "zlib", "level": 2}},
    {"compressor": {"id": "bz2", "level": 2}},
    {"compressor": {"id": "zstd", "level": 2}},
    {"compressor": {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1}},
    {"compressor": {"id": "blosc", "cname": "zstd", "clevel": 5, "shuffle": 2}},
]
BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
BIG = {"name": "bytes", "configuration": {"endian": "big"}}
V3: list[list[dict[str, Any]]] = [
    [BYTES],
    [BIG],
    [BYTES, {"name": "gzip", "configuration": {"level": 1}}],
    [BYTES, {"name": "zstd", "configuration": {"level": 1}}],
    [BYTES, {"name": "blosc", "configuration": {"cname": "lz4", "clevel": 5, "shuffle": "shuffle", "typesize": 4}}],
    [BYTES, {"name": "crc32c"}],
    [{"name": "transpose", "configuration": {"order": [1, 0]}}, BIG, {"name": "zstd", "configuration": {"level": 1}}],
]


def _sharded(location: str, inner: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "name": "sharding_indexed",
            "configuration": {
                "chunk_shape": [1, 2],
                "codecs": inner,
                "index_codecs": [BYTES, {"name": "crc32c"}],
                "index_location": location,
            },
        }
    ]


def _write(path: Path, driver: str, metadata: dict[str, Any], data: np.ndarray[Any, Any]) -> None:
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": str(path)}, "metadata": metadata, "create": True}
    array = tensorstore.open(spec).result()
    array[0:5, :].write(data[:5]).result()


def _compare(path: Path, driver: str) -> None:
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": str(path)}}
    theirs = tensorstore.open(spec).result().read().result()
    ours = assemble(open_array(path))
    same_bits(ours, np.ascontiguousarray(theirs).astype(ours.dtype))
    same_bits(ours, expected(zarr.open(path, mode="r")))


@pytest.mark.parametrize("metadata", V2, ids=json.dumps)
@pytest.mark.parametrize("dtype", ["<f4", ">i2", "|b1", "<c16", ">f8", "|u1"])
def test_v2(tmp_path: Path, metadata: dict[str, Any], dtype: str) -> None:
    full = {"shape": SHAPE, "chunks": CHUNKS, "dtype": dtype, "fill_value": None, **metadata}
    _write(tmp_path, "zarr", full, sample(dtype, SHAPE))
    _compare(tmp_path, "zarr")


@pytest.mark.parametrize(
    "codecs", [*V3, *(_sharded(at, inner) for at in ("start", "end") for inner in V3)], ids=json.dumps
)
@pytest.mark.parametrize("dtype", ["float32", "int16", "bool", "complex64"])
def test_v3(tmp_path: Path, codecs: list[dict[str, Any]], dtype: str) -> None:
    full = {
        "shape": SHAPE,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": CHUNKS}},
        "data_type": dtype,
        "codecs": codecs,
    }
    if codecs[0]["name"] == "sharding_indexed":
        full["chunk_grid"] = {"name": "regular", "configuration": {"chunk_shape": [3, 4]}}
    _write(tmp_path, "zarr3", full, smooth(dtype, SHAPE))
    _compare(tmp_path, "zarr3")
