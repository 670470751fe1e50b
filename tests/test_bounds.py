"""What is stored is no longer than it could be, or it is not read: whatever the store has, says and sends."""

from __future__ import annotations

import json
import resource
import socket
import struct
import threading
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from obstore.store import S3Store
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, ZstdCodec
from zarr.storage import LocalStore, ObjectStore

from conformance.oracle import same_bits
from fuzz.mutation import bounded
from realparts.http_files import HttpStore
from realparts.s3 import S3Server
from zarr_dask_stream.errors import CorruptChunkError, MetadataError
from zarr_dask_stream.source.array import ArraySpec, open_array
from zarr_dask_stream.source.codec import most_stored_nbytes
from zarr_dask_stream.source.reader import read_chunks
from zarr_dask_stream.source.shard import ShardLayout

TERABYTE = 1 << 40
#: What a test may take at most, for chunks of 80 KB: some MiB, and nothing of what is stored.
MOST_BYTES = 1 << 24
DATA = np.arange(40_000, dtype="f8").reshape(400, 100)

CHAINS: dict[str, dict[str, Any]] = {
    "zstd": {"compressors": [ZstdCodec()]},
    "nothing": {"compressors": None},
    "gzip, version 2": {"compressors": numcodecs.GZip(), "zarr_format": 2},
    "through zarr": {"filters": [numcodecs.Delta("f8"), numcodecs.Base64()], "compressors": None, "zarr_format": 2},
}


def _write(place: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some codecs are not in the specification of version 3
        array = zarr.create_array(place, shape=(400, 100), chunks=(100, 100), dtype="f8", **options)
    array[...] = DATA
    return array


@contextmanager
def peaking(nbytes: int) -> Iterator[None]:
    """Fail where this process grows by more, beyond the most it ever had: memory of C libraries counts, too."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < nbytes, f"{grown:,} bytes more"


def _sparse(file: Path, nbytes: int = TERABYTE) -> None:
    """Put a file in place of a chunk that has no more than a hole in it."""
    with file.open("wb") as stream:
        stream.truncate(nbytes)


def _chunk(spec: ArraySpec, number: int) -> Path:
    return Path(spec.store.url) / spec.store_key(number)


def _refused(spec: ArraySpec, numbers: list[int], *said: str, most_bytes: int = MOST_BYTES) -> None:
    """See that some chunks are refused before they fill the memory, and that the others are as they were."""
    with bounded(most_bytes):
        reads = {read.number: read for read in read_chunks(spec, range(len(spec.grid)), timeout=20)}
    assert sorted(reads) == list(range(len(spec.grid)))
    for number, read in reads.items():
        if number in numbers:
            assert isinstance(read.error, CorruptChunkError), read.error
            assert read.data is None
            for words in (f"chunk {spec.grid.index(number)} of {spec.url}", *said):
                assert words in str(read.error), read.error
        else:
            assert read.error is None, read.error
            same_bits(np.asarray(read.data), DATA[spec.grid.region(number)])


# -- files of this host -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain", CHAINS)
def test_a_terabyte_in_place_of_a_chunk(tmp_path: Path, chain: str) -> None:
    _write(tmp_path / "a", **CHAINS[chain])
    spec = open_array(tmp_path / "a")
    key = spec.store_key(2)
    _sparse(_chunk(spec, 2))
    most = f"at most {most_stored_nbytes(spec):,}"
    _refused(spec, [2], f"{key} has 1,099,511,627,776 bytes", most, "is not read", "write the chunk again")


def test_a_terabyte_among_large_chunks(tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "a", shape=(8, 200_000), chunks=(1, 200_000), dtype="f8", compressors=None)
    array[...] = 1.0
    spec = open_array(tmp_path / "a")
    _sparse(_chunk(spec, 5))  # by then it is known that files are large, and they are read another way
    reads = list(read_chunks(spec, range(8)))
    assert [read.number for read in reads if read.error is not None] == [5]
    assert "has 1,099,511,627,776 bytes" in str(reads[5].error)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("chain", CHAINS)
def test_a_device_in_place_of_a_chunk(tmp_path: Path, chain: str) -> None:
    _write(tmp_path / "a", **CHAINS[chain])
    spec = open_array(tmp_path / "a")
    _chunk(spec, 1).unlink()
    _chunk(spec, 1).symlink_to("/dev/zero")
    _refused(spec, [1], "has more than", "bytes")


def test_an_entry_that_inflates_to_much_more(tmp_path: Path) -> None:
    _write(LocalStore(tmp_path / "a"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in (tmp_path / "a").rglob("*"):
            if file.is_file() and file.parent.name != "3":
                archive.write(file, str(file.relative_to(tmp_path / "a")))
        with archive.open("c/3/0", "w") as entry:
            for _ in range(64):
                entry.write(bytes(1 << 20))
    spec = open_array(tmp_path / "a.zip")
    assert (tmp_path / "a.zip").stat().st_size < 1 << 20
    with bounded(MOST_BYTES):
        (read,) = read_chunks(spec, [3])
    assert "c/3/0 has 67,108,864 bytes" in str(read.error)


def test_a_mapping_with_too_long_a_value() -> None:
    store: dict[str, Any] = {}
    _write(store)
    store["c/1/0"] = bytes(1 << 23)
    _refused(open_array(store), [1], "c/1/0 has 8,388,608 bytes")


# -- shards -------------------------------------------------------------------------------------------------------


def _sharded(place: Path, location: Any = "end") -> ArraySpec:
    inner = ShardingCodec(
        chunk_shape=(50, 100), codecs=[BytesCodec(), ZstdCodec()], index_location=location, index_codecs=[BytesCodec()]
    )
    array = zarr.create_array(
        place, shape=(400, 100), chunks=(200, 100), dtype="f8", serializer=inner, compressors=None
    )
    array[...] = DATA
    return open_array(place)


def _patch(file: Path, at: int, *numbers: int) -> None:
    raw = bytearray(file.read_bytes())
    at = at if at >= 0 else len(raw) + at
    raw[at : at + 8 * len(numbers)] = struct.pack(f"<{len(numbers)}Q", *numbers)
    file.write_bytes(raw)


def test_an_index_that_gives_a_chunk_too_much_room(tmp_path: Path) -> None:
    spec = _sharded(tmp_path / "a", "start")
    _patch(_chunk(spec, 0), 16, 64, TERABYTE >> 1)
    with _chunk(spec, 0).open("r+b") as stream:
        stream.truncate(TERABYTE)
    _refused(spec, [1], "length 549755813888", f"at most {ShardLayout(spec).most_bytes} bytes")


def test_a_long_shard_whose_chunks_are_as_usual(tmp_path: Path, http_store: HttpStore) -> None:
    spec = _sharded(http_store.directory / "a", "start")
    with _chunk(spec, 0).open("r+b") as stream:
        stream.truncate(TERABYTE)  # as where a writer appends what has changed, and leaves holes
    _refused(spec, [])
    _refused(open_array(f"{http_store.url}/a"), [])


@pytest.mark.parametrize("per_shard", [1 << 25, 1 << 50])
def test_an_index_that_would_fill_the_memory(tmp_path: Path, per_shard: int) -> None:
    _sharded(tmp_path / "a")
    file = tmp_path / "a" / "zarr.json"
    document = json.loads(file.read_text())
    document["shape"] = [per_shard * 50, 100]
    document["chunk_grid"]["configuration"]["chunk_shape"] = [per_shard * 50, 100]
    file.write_text(json.dumps(document))
    with bounded(MOST_BYTES), pytest.raises(MetadataError, match=r"a shard of [0-9,]+ chunks|one chunk of shape"):
        list(read_chunks(open_array(tmp_path / "a"), [0]))


# -- chains of codecs ------------------------------------------------------------------------------------------------


def _bomb() -> bytes:
    return zstandard.ZstdCompressor().compress(bytes(1 << 28))


def _in_a_shard(body: bytes) -> bytes:
    """Put a body into a shard of two chunks, of which the other is not stored."""
    return body + struct.pack("<4Q", 0, len(body), 2**64 - 1, 2**64 - 1)


def test_a_bomb_in_a_shard_within_a_shard() -> None:
    inner = ShardingCodec(chunk_shape=(5,), codecs=[BytesCodec(), ZstdCodec()], index_codecs=[BytesCodec()])
    outer = ShardingCodec(chunk_shape=(10,), codecs=[inner], index_codecs=[BytesCodec()])
    store: dict[str, Any] = {}
    zarr.create_array(store, shape=(20,), chunks=(20,), dtype="i4", serializer=outer, compressors=None, fill_value=3)
    store["c/0"] = _in_a_shard(_in_a_shard(_bomb()))
    with peaking(1 << 27):
        first, second = read_chunks(open_array(store), [0, 1])
    assert "expected 20 bytes of data, got 268435456" in str(first.error)
    np.testing.assert_array_equal(np.asarray(second.data), np.full(10, 3))


@pytest.mark.parametrize("wrapper", ["base64", "delta"])
def test_a_bomb_behind_another_codec(wrapper: str) -> None:
    outer: Any = numcodecs.Base64() if wrapper == "base64" else numcodecs.Delta("u1")
    store: dict[str, Any] = {}
    filters = [numcodecs.Zstd(), outer]
    zarr.create_array(store, shape=(10,), chunks=(10,), dtype="i4", filters=filters, compressors=None, zarr_format=2)
    store["0"] = bytes(outer.encode(np.frombuffer(_bomb(), "u1")))
    with peaking(1 << 27):
        if wrapper == "base64":
            (read,) = read_chunks(open_array(store), [0])
            assert "expected 40 bytes of data, got 268435456" in str(read.error)
        else:
            with pytest.raises(MetadataError, match="codec 'zstd' stands behind one that can't be undone here"):
                list(read_chunks(open_array(store), [0]))


@pytest.mark.parametrize(
    "codecs",
    [
        # What the data say to be so many texts, the library makes room for.
        {"dtype": "|O", "fill_value": "", "filters": [{"id": "vlen-utf8"}, {"id": "shuffle", "elementsize": 1}]},
        {
            "dtype": "|O",
            "fill_value": "",
            "filters": [{"id": "vlen-utf8"}, {"id": "crc32"}, {"id": "delta", "dtype": "u1"}],
        },
        {"filters": [{"id": "delta", "dtype": "|S90000000", "astype": "|u1"}]},
        {"filters": [{"id": "astype", "decode_dtype": "|S90000000", "encode_dtype": "|u1"}]},
        {"filters": [{"id": "fixedscaleoffset", "offset": 0, "scale": 1, "dtype": "|S90000000", "astype": "|u1"}]},
        {"dtype": "|b1", "filters": [{"id": "packbits"}] * 9},
        {"filters": [{"id": "delta", "dtype": "<i8", "astype": "|u1"}] * 8},
    ],
    ids=["shuffle", "delta", "wide delta", "wide astype", "wide scale", "eight bits each", "eight bytes each"],
)
def test_chains_that_nothing_would_bound(codecs: dict[str, Any]) -> None:
    document = {"zarr_format": 2, "shape": [16], "chunks": [16], "dtype": "<i4", "order": "C", "fill_value": 0}
    document |= {"compressor": None, "dimension_separator": ".", **codecs}
    store = {".zarray": json.dumps(document).encode(), "0": (1 << 27).to_bytes(4, "little") + b"\1" * 12}
    with (
        peaking(1 << 27),
        pytest.raises(MetadataError, match=r"nothing would bound|makes elements of 90,000,000|of each one"),
    ):
        list(read_chunks(open_array(store), [0]))


@pytest.mark.parametrize("depth", [12, 100, 200])
def test_shards_within_shards_without_end(depth: int) -> None:
    store: dict[str, Any] = {}
    zarr.create_array(store, shape=(4,), chunks=(4,), dtype="i4")
    document = json.loads(store["zarr.json"].to_bytes())
    for _ in range(depth):
        inside = {"chunk_shape": [4], "codecs": document["codecs"], "index_codecs": ["bytes"]}
        document["codecs"] = [{"name": "sharding_indexed", "configuration": inside}]
    with pytest.raises(MetadataError, match="shards within shards, more than 8 deep"):
        open_array({"zarr.json": json.dumps(document).encode()})


@pytest.mark.parametrize("place", ["codecs", "index_codecs"])
def test_codecs_are_checked_in_shards_within_shards(place: str) -> None:
    store: dict[str, Any] = {}
    zarr.create_array(store, shape=(4,), chunks=(4,), dtype="i4")
    document = json.loads(store["zarr.json"].to_bytes())
    for name in (place, "codecs"):
        inside = {"chunk_shape": [4], "codecs": ["bytes"], "index_codecs": ["bytes"], name: document["codecs"]}
        document["codecs"] = [{"name": "sharding_indexed", "configuration": inside}]
        if name == place:
            inside[place] = ["bytes", {"name": "numcodecs.pickle", "configuration": {}}]
    with pytest.raises(MetadataError, match="codec 'pickle' runs whatever code"):
        open_array({"zarr.json": json.dumps(document).encode()})


# -- servers ------------------------------------------------------------------------------------------------------


def test_a_terabyte_on_a_plain_http_server(http_store: HttpStore) -> None:
    _write(http_store.directory / "a")
    _sparse(http_store.directory / "a" / "c/2/0")
    spec = open_array(f"{http_store.url}/a")
    _refused(spec, [2], "c/2/0 has 1,099,511,627,776 bytes")


def _clients(server: S3Server, bucket: str, endpoint: str | None = None) -> dict[str, tuple[Any, Any]]:
    options = server.options_at(endpoint or server.endpoint)
    url = f"s3://{bucket}/a"
    several = {"max_concurrency": 2, "default_cache_type": "none"}
    return {
        "s3fs": (url, options | {"default_cache_type": "none"}),
        "s3fs in parts": (url, options | several),
        "obstore": (url, options),
        "object": (ObjectStore(S3Store(bucket, prefix="a", **server.obstore_options(endpoint))), None),
    }


@pytest.mark.parametrize("kind", ["s3fs", "s3fs in parts", "obstore", "object"])
def test_an_object_that_is_too_long_on_s3(s3_server: S3Server, kind: str) -> None:
    bucket = s3_server.make_bucket(f"bounds-{uuid.uuid4().hex[:8]}")
    store = S3Store(bucket, prefix="a", **s3_server.obstore_options())
    _write(ObjectStore(store))
    store.put("c/2/0", bytes(1 << 25))
    store.put("c/1/0", b"")
    source, options = _clients(s3_server, bucket)[kind]
    spec = open_array(source, storage_options=options)
    reads = {read.number: read for read in read_chunks(spec, range(4), timeout=20)}
    got = "more than" if kind == "s3fs in parts" else "33,554,432 bytes"
    assert f"chunk (2, 0) of {spec.url} is not read: c/2/0 has {got}" in str(reads[2].error)
    assert isinstance(reads[1].error, CorruptChunkError)  # an empty object is one that was cut off
    for number in (0, 3):
        same_bits(np.asarray(reads[number].data), DATA[spec.grid.region(number)])


@dataclass
class Liar:
    """A server that answers with documents as they are, and with chunks without end."""

    port: int
    answer: bytes
    sent: int = 0

    def serve(self, listening: socket.socket, documents: dict[str, bytes], part: bytes) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(connection, documents, part), daemon=True).start()

    def _talk(self, connection: socket.socket, documents: dict[str, bytes], part: bytes) -> None:
        with connection, suppress(OSError):
            data = b""
            while True:
                while b"\r\n\r\n" not in data:
                    got = connection.recv(65536)
                    if not got:
                        return
                    data += got
                request, _, data = data.partition(b"\r\n\r\n")
                path = request.split()[1].decode().partition("?")[0]
                document = next((value for name, value in documents.items() if path.endswith(name)), None)
                common = b'ETag: "a"\r\nLast-Modified: Wed, 21 Oct 2015 07:28:00 GMT\r\n'
                if "/c/" not in path:
                    connection.sendall(b"HTTP/1.1 " + _document(document, common, part=b"\nrange:" in request.lower()))
                    continue
                connection.sendall(b"HTTP/1.1 " + self.answer.replace(b"COMMON\r\n", common))
                while True:
                    connection.sendall(part)
                    self.sent += len(part)


def _document(document: bytes | None, common: bytes, *, part: bool) -> bytes:
    body = document or b""
    said = b"404 Not Found" if document is None else b"206 Partial Content" if part else b"200 OK"
    place = f"Content-Range: bytes 0-{len(body) - 1}/{len(body)}\r\n" if part and body else ""
    return said + b"\r\n" + common + f"{place}Content-Length: {len(body)}\r\n\r\n".encode() + body


#: What a server says of a chunk before it sends without end, and how.
LIES: dict[str, tuple[bytes, bool]] = {
    "a huge length": (b"200 OK\r\nCOMMON\r\nContent-Length: 1099511627776\r\n\r\n", False),
    "no length": (b"200 OK\r\nCOMMON\r\nTransfer-Encoding: chunked\r\n\r\n", True),
    "a wrong length": (b"200 OK\r\nCOMMON\r\nContent-Length: 100\r\nTransfer-Encoding: chunked\r\n\r\n", True),
    "a part": (b"206 Part\r\nCOMMON\r\nContent-Range: bytes 0-67/9999\r\nContent-Length: 999999999999\r\n\r\n", False),
}


@contextmanager
def _lie(documents: dict[str, bytes], answer: bytes, *, chunked: bool) -> Iterator[Liar]:
    block = bytes(1 << 16)
    part = b"10000\r\n" + block + b"\r\n" if chunked else block
    with socket.create_server(("127.0.0.1", 0)) as listening:
        liar = Liar(listening.getsockname()[1], answer)
        threading.Thread(target=liar.serve, args=(listening, documents, part), daemon=True).start()
        yield liar


@pytest.mark.timeout(60)
@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("kind", ["http", "s3fs", "obstore"])
@pytest.mark.parametrize("shards", [False, True])
def test_answers_without_end(tmp_path: Path, kind: str, lie: str, *, shards: bool) -> None:
    if shards:
        _sharded(tmp_path / "a", "start")
    else:
        _write(tmp_path / "a")
    documents = {"zarr.json": (tmp_path / "a/zarr.json").read_bytes()}
    answer, chunked = LIES[lie]
    with ExitStack() as stack:
        liar = stack.enter_context(_lie(documents, answer, chunked=chunked))
        endpoint = f"http://127.0.0.1:{liar.port}"
        options = {"key": "a", "secret": "b", "client_kwargs": {"endpoint_url": endpoint, "region_name": "us-east-1"}}
        if kind == "http":
            spec = open_array(f"{endpoint}/a")
        else:
            spec = open_array(
                "s3://bucket/a", storage_options=options | ({"default_cache_type": "none"} if kind == "s3fs" else {})
            )
        assert type(spec.store.open()).__name__ == ("ObstoreObjects" if kind == "obstore" else "FsspecFiles")
        with bounded(MOST_BYTES):
            (read,) = read_chunks(spec, [1], timeout=20)
        assert isinstance(read.error, CorruptChunkError | OSError), read
        assert not isinstance(read.error, TimeoutError)
        assert liar.sent < 1 << 25  # what the sockets between hold, and no more


# -- nothing that is as it should be is refused ----------------------------------------------------------------------

_V3: list[dict[str, Any]] = [
    {"compressors": None},
    {"compressors": [ZstdCodec(level=0, checksum=True)]},
    {"compressors": [GzipCodec(level=0)]},
    {"compressors": [BloscCodec(cname="zlib", clevel=0)]},
    {"compressors": [BloscCodec(), GzipCodec(level=0), ZstdCodec(), Crc32cCodec()]},
]
_V2: list[dict[str, Any]] = [
    {"compressors": compressor, "zarr_format": 2}
    for compressor in (
        None, numcodecs.Zlib(0), numcodecs.BZ2(1), numcodecs.LZMA(preset=0), numcodecs.LZ4(), numcodecs.Zstd(1),
        numcodecs.Blosc("snappy") if "snappy" in numcodecs.blosc.list_compressors() else numcodecs.Blosc("lz4hc"),
    )
]  # fmt: skip
_FILTERS: list[Callable[[str], list[Any]]] = [
    lambda dtype: [numcodecs.Delta(dtype)],
    lambda dtype: [numcodecs.AsType("f8", dtype)],
    lambda dtype: [numcodecs.FixedScaleOffset(0, 1, dtype, "f8")],
    lambda dtype: [numcodecs.Shuffle(np.dtype(dtype).itemsize), numcodecs.Base64()],
    lambda _: [numcodecs.Fletcher32(), numcodecs.CRC32(), numcodecs.Adler32()],
]


def _nested(codecs: list[Any], side: int, depth: int) -> Any:
    """Return shards within shards, the innermost of single elements: the longest that anything can be stored."""
    chain: Any = ShardingCodec(chunk_shape=(side, side), codecs=codecs)
    for _ in range(depth):
        chain = ShardingCodec(chunk_shape=(side * 2, side * 2), codecs=[chain])
        side *= 2
    return chain


def _drawn(data: st.DataObject) -> tuple[Any, int, dict[str, Any]]:
    """Draw a dtype, the side of a square array of one stored object, and a chain of codecs."""
    dtype = data.draw(st.sampled_from(["u1", "i2", "f4", "f8"]))
    side = data.draw(st.sampled_from([1, 8, 100]))
    kind = data.draw(st.sampled_from(["version 3", "version 2", "filters", "shards"]))
    if kind == "version 3":
        return dtype, side, data.draw(st.sampled_from(_V3))
    if kind == "version 2":
        return dtype, side, data.draw(st.sampled_from(_V2))
    if kind == "filters":
        filters = data.draw(st.sampled_from(_FILTERS))(dtype)
        return dtype, side, {"filters": filters, "compressors": None, "zarr_format": 2}
    codecs: Any = data.draw(
        st.sampled_from([[BytesCodec()], [BytesCodec(), BloscCodec()], [BytesCodec(), GzipCodec()]])
    )
    side, depth = data.draw(st.sampled_from([(8, 0), (8, 2), (16, 3)]))
    return dtype, side, {"serializer": _nested(codecs, 1, depth), "compressors": None}


def _passes(dtype: Any, values: Any, **options: Any) -> None:
    store: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of these are not in the specification yet
        array = zarr.create_array(store, shape=values.shape, chunks=values.shape, dtype=dtype, **options)
        array[...] = values
    spec = open_array(store)
    stored = [len(value) for key, value in store.items() if not key.endswith((".json", ".zarray", ".zattrs"))]
    assert stored
    assert max(stored) <= most_stored_nbytes(spec, len(spec.grid)), options
    assert [read.error for read in read_chunks(spec, range(len(spec.grid)))] == [None] * len(spec.grid)


@given(data=st.data())
@settings(max_examples=25, database=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_zarr_writes_passes(data: st.DataObject) -> None:
    dtype, side, options = _drawn(data)
    # Nothing can be gained on noise, and nothing is the fill value; a float that is small survives an offset.
    noise = np.random.default_rng(data.draw(st.integers(0, 9))).integers(1, 255, (side, side), "u1")
    _passes(dtype, noise.astype(dtype) if dtype in {"u1", "i2"} else noise / np.dtype(dtype).type(255), **options)


@pytest.mark.parametrize("text", ["", "x" * 9, "y" * 100_000])
def test_long_texts_pass(text: str) -> None:
    _passes(str, np.full((16, 16), text or "a", dtype=object))
