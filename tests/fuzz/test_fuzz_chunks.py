"""Stored bytes that are nearly right: chunks and shards of every usual codec, read or refused, at no great expense.

Tried for version 0.1: 210 inputs or more for each test and codec, 19,890 in all, with three seeds. They found filters
that made gigabytes of a few bytes, which are refused now; since then 4,620 of them without a finding. Usually it is 15
each.
"""

from __future__ import annotations

import json
import warnings
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from obstore.store import MemoryStore as ObstoreMemory
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, TransposeCodec, ZstdCodec
from zarr.storage import ObjectStore

from fuzz.mutation import as_json, bounded, changed, fine_or_refused, fuzzed, spliced
from zarr_dask_stream.errors import CorruptChunkError, ZdsError
from zarr_dask_stream.source.array import ArraySpec, open_array
from zarr_dask_stream.source.codec import compile_chain, compile_fallback
from zarr_dask_stream.source.reader import read_chunks

#: A chunk here is a few kilobytes; a few copies of it and the tables of its decoder fit in this many times over.
MOST_BYTES = 1 << 22
#: How much memory its decoder takes is said by the header of an LZMA stream, and how long text is by the header of its
#: zstandard frame: no more than this is granted.
MOST_STATED_BYTES = 1 << 29
SHAPE, CHUNKS = (40, 30), (20, 15)


def _named(name: str, **configuration: Any) -> dict[str, Any]:
    return {"name": f"numcodecs.{name}", "configuration": configuration}


CHAINS: dict[str, dict[str, Any]] = {
    "plain": {"compressors": None},
    "zstd": {"compressors": ZstdCodec(checksum=True)},
    "gzip": {"compressors": GzipCodec()},
    "blosc-lz4": {"compressors": BloscCodec(cname="lz4", shuffle="shuffle")},
    "blosc-zstd": {"compressors": BloscCodec(cname="zstd", shuffle="bitshuffle")},
    "blosc-zlib": {"compressors": BloscCodec(cname="zlib", shuffle="noshuffle")},
    "crc32c": {"compressors": [ZstdCodec(), Crc32cCodec()]},
    "swapped": {"serializer": BytesCodec(endian="big"), "filters": [TransposeCodec(order=(1, 0))]},
    "v3-delta": {"filters": [_named("delta", dtype="<i4")], "compressors": [_named("zlib")]},
    "v3-lz4": {"compressors": [_named("lz4"), _named("fletcher32")]},
    "v3-lzma": {"compressors": [_named("bz2"), _named("lzma")]},
    "shards": {"shards": (40, 30), "compressors": ZstdCodec()},
    "shards-start": {
        "chunks": (40, 30),
        "serializer": ShardingCodec(chunk_shape=CHUNKS, codecs=[BytesCodec(), GzipCodec()], index_location="start"),
        "compressors": None,
    },
    "shards-bare": {
        "chunks": (40, 30),
        "serializer": ShardingCodec(chunk_shape=CHUNKS, codecs=[BytesCodec()], index_codecs=[BytesCodec()]),
        "compressors": None,
    },
    "within-shards": {
        "chunks": (40, 30),
        "serializer": ShardingCodec(
            chunk_shape=CHUNKS, codecs=[ShardingCodec(chunk_shape=(10, 5), codecs=[BytesCodec(), ZstdCodec()])]
        ),
        "compressors": None,
    },
    "v2-base64": {"zarr_format": 2, "compressors": None, "filters": [numcodecs.Zstd(), numcodecs.Base64()]},
    "v2-blosc": {"zarr_format": 2, "compressors": numcodecs.Blosc()},
    "v2-lz4-delta": {"zarr_format": 2, "compressors": numcodecs.LZ4(), "filters": [numcodecs.Delta("i4")]},
    "v2-shuffle": {"zarr_format": 2, "compressors": numcodecs.Zlib(), "filters": [numcodecs.Shuffle(4)], "order": "F"},
    "v2-bz2": {"zarr_format": 2, "compressors": numcodecs.BZ2(), "filters": [numcodecs.CRC32()]},
    "v2-lzma": {"zarr_format": 2, "compressors": numcodecs.LZMA()},
    "text": {"dtype": str, "compressors": ZstdCodec()},
    "v2-text": {"zarr_format": 2, "dtype": str, "compressors": numcodecs.Zstd()},
    "v2-text-zlib": {"zarr_format": 2, "dtype": str, "filters": [numcodecs.VLenUTF8(), numcodecs.Zlib()]},
    "bool": {"zarr_format": 2, "dtype": "?", "compressors": None, "filters": [numcodecs.PackBits()]},
}


def _write(options: dict[str, Any], store: Any) -> Any:
    options = {"chunks": CHUNKS, "dtype": "i4"} | options
    data: Any = np.arange(1200).reshape(SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of these are not in the specification yet
        array = zarr.create_array(store, shape=SHAPE, **options)
        array[:] = data.astype("U4") if options["dtype"] is str else data % 2 if options["dtype"] == "?" else data
    return store


STORES: dict[str, dict[str, bytes]] = {
    name: {key: value.to_bytes() for key, value in _write(options, {}).items()} for name, options in CHAINS.items()
}


def _keys(store: dict[str, bytes]) -> list[str]:
    return sorted(key for key in store if not key.endswith(("zarr.json", ".zarray", ".zattrs")))


def _most_bytes(name: str) -> int:
    return MOST_STATED_BYTES if "lzma" in name or "text" in name else MOST_BYTES


def _look(spec: ArraySpec, nbytes: int) -> None:
    with bounded(nbytes):
        reads = list(read_chunks(spec, range(len(spec.grid)), timeout=10))
    assert sorted(read.number for read in reads) == list(range(len(spec.grid)))
    for read in reads:
        if read.error is None:
            assert read.data is not None
            assert read.data.shape == CHUNKS
            assert read.data.dtype == spec.dtype
        else:
            assert isinstance(read.error, CorruptChunkError), repr(read.error)
            assert len(str(read.error)) < 2000


@pytest.mark.parametrize("name", CHAINS)
@given(data=st.data())
@fuzzed
def test_changed_chunks(name: str, data: st.DataObject) -> None:
    store = dict(STORES[name])
    key = data.draw(st.sampled_from(_keys(store)))
    store[key] = data.draw(spliced(store[key]))
    _look(open_array(store), _most_bytes(name))


@pytest.mark.parametrize("name", [name for name in CHAINS if name.startswith("shards")])
@given(data=st.data())
@fuzzed
def test_changed_indexes_of_shards(name: str, data: st.DataObject) -> None:
    """Only the index, with a checksum that fits where there is one: what it says is nonsense, not how it is kept."""
    store = dict(STORES[name])
    (key,) = _keys(store)
    shard = store[key]
    checked = 0 if name == "shards-bare" else 4
    size = 4 * 16
    at = 0 if name == "shards-start" else len(shard) - size - checked
    table = np.frombuffer(shard[at : at + size], "<u8").copy()
    words = st.sampled_from((0, 1, 2**64 - 1, 2**63, 2**63 - 1, 2**32, len(shard), len(shard) - 1, size))
    for _ in range(data.draw(st.integers(1, 3))):
        table[data.draw(st.integers(0, 7))] = data.draw(words | st.integers(0, 2 * len(shard)))
    index = table.tobytes()
    if checked:
        index = numcodecs.CRC32C(location="end").encode(index)
        index = bytes(index)
    store[key] = shard[:at] + index + shard[at + size + checked :]
    _look(open_array(store), MOST_BYTES)


@pytest.mark.parametrize("name", ["zstd", "shards", "shards-bare"])
@given(data=st.data())
@fuzzed
def test_changed_objects_of_a_remote_store(name: str, data: st.DataObject) -> None:
    objects = ObstoreMemory()
    values = dict(STORES[name])
    key = data.draw(st.sampled_from(_keys(values)))
    values[key] = data.draw(spliced(values[key]))
    for place, value in values.items():
        objects.put(place, value)
    _look(open_array(ObjectStore(objects, read_only=True)), MOST_BYTES)


@pytest.mark.parametrize("name", [name for name in CHAINS if "shards" not in name])
@given(data=st.data())
@fuzzed
def test_bytes_that_never_were_a_chunk(name: str, data: st.DataObject) -> None:
    """Also for zarr's own pipeline, which decodes what is not known here."""
    spec = open_array(STORES[name])
    raw = data.draw(st.binary(max_size=200))
    for decode in (compile_chain(spec), compile_fallback(spec)):
        with bounded(_most_bytes(name)):
            try:
                assert decode(raw).shape == CHUNKS
            except CorruptChunkError as error:
                assert len(str(error)) < 2000  # noqa: PT017  # either will do


@pytest.mark.parametrize("name", CHAINS)
@given(data=st.data())
@fuzzed
def test_changed_codecs(name: str, data: st.DataObject) -> None:
    """The chunks are as they were, and the chain that is said to have made them is another one."""
    store = dict(STORES[name])
    key = "zarr.json" if "zarr.json" in store else ".zarray"
    document = json.loads(store[key])
    chain = {part: document[part] for part in ("codecs", "compressor", "filters") if part in document}
    changed_chain = data.draw(changed(chain))
    store[key] = as_json({**document, **changed_chain} if isinstance(changed_chain, dict) else changed_chain)
    with fine_or_refused(MOST_STATED_BYTES):
        spec = open_array(store)
        for read in read_chunks(spec, range(len(spec.grid)), timeout=10):
            assert read.error is None or isinstance(read.error, ZdsError), repr(read.error)
