from __future__ import annotations

import bz2
import gzip
import json
import lzma
import pickle
import struct
import threading
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import blosc
from zarr.buffer import cpu
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, TransposeCodec, ZstdCodec

from conformance.oracle import compare_paths, is_compiled, same_bits, sample, smooth
from zarr_dask_stream.errors import CorruptChunkError
from zarr_dask_stream.source.array import ArraySpec, open_array
from zarr_dask_stream.source.codec import compile_chain, compile_fallback, compile_index
from zarr_dask_stream.source.inflate import BYTES_CODECS, Size, build_step, encoded_size

pytestmark = pytest.mark.filterwarnings("ignore")  # zarr remarks on dtypes and codecs outside the specification

COUNT = 1000
NBYTES = COUNT * 4


def _one_chunk(**options: Any) -> tuple[ArraySpec, bytes]:
    """Write one chunk with zarr-python; return the array's description and the chunk's bytes."""
    store: dict[str, Any] = {}
    data = options.pop("data")
    array = zarr.create_array(store, shape=data.shape, chunks=data.shape, dtype=data.dtype, **options)
    array[...] = data
    keys = [key for key in store if not key.endswith((".zarray", ".zattrs", "zarr.json"))]
    spec = open_array(store)
    return spec, store[keys[0]].to_bytes() if keys else b""


def _v2(compressor: Any, dtype: str = "<f4", count: int = COUNT) -> ArraySpec:
    """Describe a version 2 array of one chunk."""
    config = None if compressor is None else {"id": compressor}
    document = {
        "zarr_format": 2, "shape": [count], "chunks": [count], "dtype": dtype, "order": "C", "fill_value": 0,
        "filters": None, "compressor": config,
    }  # fmt: skip
    return open_array({".zarray": cpu.Buffer.from_bytes(json.dumps(document).encode())})


ENCODERS: dict[str, Any] = {
    "zstd": zstandard.ZstdCompressor().compress,
    "blosc": lambda data: blosc.compress(data, b"lz4", 5, 1),
    "lz4": numcodecs.LZ4().encode,
    "gzip": gzip.compress,
    "zlib": zlib.compress,
    "bz2": bz2.compress,
    "lzma": lzma.compress,
}
VALUES = smooth("<f4", (COUNT,))


def _encode(name: str, data: bytes) -> bytes:
    return bytes(ENCODERS[name](data))


# -- both ways give the same ----------------------------------------------------------------------

DTYPES = ["bool", "i1", "<i2", ">i4", "<u8", "<f2", ">f4", "<f8", ">c16", "<M8[ns]", ">m8[s]", "S4", "<U2"]
SHAPES = st.lists(st.integers(1, 6), max_size=4).map(tuple)
V2_COMPRESSORS = st.sampled_from(
    [None, numcodecs.Zstd(), numcodecs.Blosc("lz4"), numcodecs.Blosc("zstd", 3, 2), numcodecs.LZ4(), numcodecs.GZip(),
     numcodecs.Zlib(), numcodecs.BZ2(), numcodecs.LZMA()]
)  # fmt: skip
V3_COMPRESSORS = st.lists(
    st.sampled_from([ZstdCodec(), BloscCodec(typesize=4), GzipCodec(), Crc32cCodec()]), max_size=3
)


@given(dtype=st.sampled_from(DTYPES), shape=SHAPES, order=st.sampled_from("CF"), compressor=V2_COMPRESSORS,
       seed=st.integers(0, 99))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_compiled_and_fallback_agree_in_version_2(
    dtype: str, shape: tuple[int, ...], order: Any, compressor: Any, seed: int
) -> None:
    data = sample(dtype, shape, seed)
    spec, raw = _one_chunk(data=data, zarr_format=2, order=order, compressors=compressor, fill_value=None)
    if raw:
        assert is_compiled(spec)
        compare_paths(spec, raw)


@given(dtype=st.sampled_from(DTYPES[:-2]), shape=SHAPES, endian=st.sampled_from(["little", "big"]),
       compressors=V3_COMPRESSORS, seed=st.integers(0, 99), draw=st.data())  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_compiled_and_fallback_agree_in_version_3(
    *, dtype: str, shape: tuple[int, ...], endian: Any, compressors: Any, seed: int, draw: st.DataObject
) -> None:
    data = sample(np.dtype(dtype).newbyteorder("="), shape, seed)
    axes = draw.draw(st.permutations(range(len(shape))))
    filters = [TransposeCodec(order=axes)] if len(shape) > 1 else []
    spec, raw = _one_chunk(data=data, filters=filters, serializer=BytesCodec(endian=endian), compressors=compressors)
    if raw:
        assert is_compiled(spec)
        compare_paths(spec, raw)


@given(dtype=st.sampled_from(["<i2", "<i4", ">i4", "<i8"]), count=st.integers(1, 50), seed=st.integers(0, 9),
       filters=st.lists(st.sampled_from(["delta", "shuffle", "crc32", "fixedscaleoffset"]), max_size=3))  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_compiled_and_fallback_agree_on_filters(dtype: str, count: int, seed: int, filters: list[str]) -> None:
    make = {
        "delta": lambda: numcodecs.Delta(dtype),
        "shuffle": lambda: numcodecs.Shuffle(np.dtype(dtype).itemsize),
        "crc32": numcodecs.CRC32,
        "fixedscaleoffset": lambda: numcodecs.FixedScaleOffset(offset=0, scale=1, dtype=dtype),
    }
    try:
        spec, raw = _one_chunk(
            data=smooth(dtype, (count,)) + seed, zarr_format=2, filters=[make[name]() for name in filters],
            compressors=numcodecs.Zstd(), fill_value=None,
        )  # fmt: skip
    except ValueError:
        return  # numcodecs can't encode this order of filters (a delta of checksummed bytes)
    try:
        want = compile_fallback(spec)(raw)
    except CorruptChunkError:
        return  # zarr-python can't read what it wrote here
    same_bits(compile_chain(spec)(raw), want)


# -- what a decoder promises ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ENCODERS, "none"])
def test_result_is_new_and_writable(name: str) -> None:
    spec = _v2(None if name == "none" else name)
    raw = VALUES.tobytes() if name == "none" else _encode(name, VALUES.tobytes())
    decode = compile_chain(spec)
    first, second = decode(raw), decode(raw)
    first[:] = -1
    same_bits(second, VALUES.astype("f4"))
    same_bits(decode(memoryview(raw)), second)


def test_decoders_are_compiled_once_for_equal_arrays() -> None:
    assert compile_chain(_v2("zstd")) is compile_chain(pickle.loads(pickle.dumps(_v2("zstd"))))
    assert compile_chain(_v2("zstd")) is not compile_chain(_v2("gzip"))


@pytest.mark.parametrize("name", [*ENCODERS])
def test_many_threads_at_once(name: str) -> None:
    decode = compile_chain(_v2(name))
    chunks = [np.full(COUNT, i, "<f4") for i in range(8)]
    raws = [_encode(name, chunk.tobytes()) for chunk in chunks]
    barrier = threading.Barrier(4)

    def work(worker: int) -> None:
        barrier.wait()
        for turn in range(50):
            i = (worker + turn) % 8
            same_bits(decode(raws[i]), chunks[i])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_fallback_in_many_threads() -> None:
    words = np.array([["a", "bb"], ["", "é"]], dtype=np.dtypes.StringDType())
    spec, raw = _one_chunk(data=words)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: compile_chain(spec)(raw), range(40)):
            assert got.tolist() == words.tolist()


# -- damaged chunks -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ENCODERS])
@pytest.mark.parametrize("keep", [0, 1, 3, 7, 15, 0.5, 0.99])
def test_truncated(name: str, keep: float) -> None:
    raw = _encode(name, sample("<f4", (COUNT,)).tobytes())
    raw = raw[: int(keep if keep >= 1 or keep == 0 else keep * len(raw))]
    with pytest.raises(CorruptChunkError):
        compile_chain(_v2(name))(raw)


@pytest.mark.parametrize("name", ["gzip", "zlib", "bz2", "lzma"])
def test_flipped_bits_behind_a_checksum(name: str) -> None:
    raw = bytearray(_encode(name, sample("<f4", (COUNT,)).tobytes()))
    raw[len(raw) // 2] ^= 4
    with pytest.raises(CorruptChunkError) as caught:
        compile_chain(_v2(name))(bytes(raw))
    assert caught.value.__cause__ is not None or "expected" in str(caught.value)


@given(name=st.sampled_from([*ENCODERS]), position=st.floats(0, 0.999), bit=st.integers(0, 7))
@settings(max_examples=200, deadline=None)
def test_any_flipped_bit_gives_an_array_of_the_right_shape_or_an_error(name: str, position: float, bit: int) -> None:
    raw = bytearray(_encode(name, VALUES.tobytes()))
    raw[int(position * len(raw))] ^= 1 << bit
    try:
        data = compile_chain(_v2(name))(bytes(raw))
    except CorruptChunkError:
        return
    assert (data.shape, data.dtype) == ((COUNT,), np.dtype("f4"))


@given(st.binary(max_size=200), st.sampled_from([*ENCODERS]))
@settings(max_examples=200, deadline=None)
def test_noise_is_an_error(noise: bytes, name: str) -> None:
    with pytest.raises(CorruptChunkError):
        compile_chain(_v2(name))(noise)


def test_checksum_of_version_3() -> None:
    spec, raw = _one_chunk(data=VALUES, compressors=[Crc32cCodec()])
    with pytest.raises(CorruptChunkError, match="checksum"):
        compile_chain(spec)(raw[:10] + bytes([raw[10] ^ 1]) + raw[11:])
    with pytest.raises(CorruptChunkError, match="expected 4000 bytes"):
        compile_chain(spec)(raw[:-8])


@pytest.mark.parametrize("name", [*ENCODERS])
@pytest.mark.parametrize("count", [COUNT - 1, COUNT + 1, 1])
def test_wrong_size(name: str, count: int) -> None:
    with pytest.raises(CorruptChunkError, match=r"expected 4000 bytes of data, got (more than )?\d+"):
        compile_chain(_v2(name))(_encode(name, b"\1" * 4 * count))


def test_wrong_size_without_compression() -> None:
    for count in (0, NBYTES - 1, NBYTES + 1):
        with pytest.raises(CorruptChunkError, match=f"expected 4000 bytes of data, got {count}"):
            compile_chain(_v2(None))(b"x" * count)


@cache
def _bombs() -> dict[str, tuple[str, bytes]]:
    zeros = bytes(1 << 25)
    stream = zstandard.ZstdCompressor(write_content_size=False)
    lying = _encode("zstd", bytes(1 << 20))
    honest = _encode("blosc", bytes(NBYTES))
    huge = struct.pack("<BBBBIII", 2, 1, 33, 4, 2**31 - 17, 2**31 - 17, len(honest))
    return {
        **{name: (name, _encode(name, zeros)) for name in ENCODERS},
        "zstd without a stated size": ("zstd", stream.compress(zeros)),
        "zstd in many frames": ("zstd", stream.compress(bytes(1 << 20)) * 64),
        "zstd that states 2**60 bytes": ("zstd", lying[:4] + b"\xe0" + struct.pack("<Q", 1 << 60) + lying[9:]),
        "blosc that states 2**31 bytes": ("blosc", huge + honest[16:]),
        "lz4 that states 2**31 bytes": ("lz4", struct.pack("<I", 2**31 - 1) + b"\0" * 20),
        "gzip in many members": ("gzip", gzip.compress(bytes(1 << 20)) * 64),
    }  # fmt: skip


@pytest.mark.parametrize("kind", [*_bombs()])
def test_bombs_are_found_before_they_grow(kind: str) -> None:
    name, raw = _bombs()[kind]
    decode = compile_chain(_v2(name))
    tracemalloc.start()
    try:
        with pytest.raises(CorruptChunkError, match="expected 4000 bytes of data"):
            decode(raw)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 << 20  # lzma takes a dictionary of 8 MiB to begin with


def test_bomb_behind_another_compressor() -> None:
    spec, _ = _one_chunk(data=VALUES, compressors=[GzipCodec(), ZstdCodec()])
    bomb = _encode("zstd", _encode("gzip", bytes(1 << 26)))
    with pytest.raises(CorruptChunkError, match="expected 4000 bytes"):
        compile_chain(spec)(bomb)
    with pytest.raises(CorruptChunkError, match="expected at most"):
        compile_chain(spec)(_encode("zstd", bytes(1 << 26)))


def test_bomb_of_strings() -> None:
    spec, _ = _one_chunk(data=np.array(["a", "b"], dtype=np.dtypes.StringDType()))
    with pytest.raises(CorruptChunkError, match="expected at most 268435456 bytes of data"):
        compile_chain(spec)(zstandard.ZstdCompressor(write_content_size=True).compress(bytes((1 << 28) + 1)))


@pytest.mark.parametrize("damage", [b"", b"\2\0\0\0\xff\xff\xff\x7fab", b"\xff\xff\xff\xff"])
def test_damaged_strings(damage: bytes) -> None:
    spec, _ = _one_chunk(data=np.array(["a", "b"], dtype=np.dtypes.StringDType()), compressors=None)
    with pytest.raises(CorruptChunkError):
        compile_chain(spec)(damage)


# -- frames that other writers make ---------------------------------------------------------------


def test_zstd_without_a_stated_size_and_in_several_frames() -> None:
    data = VALUES.tobytes()
    decode = compile_chain(_v2("zstd"))
    unsized = zstandard.ZstdCompressor(write_content_size=False)
    sized = zstandard.ZstdCompressor()
    for raw in (
        unsized.compress(data),
        sized.compress(data[:1000]) + sized.compress(data[1000:]),
        unsized.compress(data[:1000]) + unsized.compress(data[1000:]),
    ):
        same_bits(decode(raw), VALUES.astype("f4"))
    with pytest.raises(CorruptChunkError):
        decode(sized.compress(data) + b"more")
    with pytest.raises(CorruptChunkError):
        decode(unsized.compress(data)[:-5])


def test_gzip_in_several_members_and_with_padding() -> None:
    data = VALUES.tobytes()
    decode = compile_chain(_v2("gzip"))
    same_bits(decode(gzip.compress(data[:10]) + gzip.compress(data[10:])), VALUES.astype("f4"))
    same_bits(decode(gzip.compress(data) + bytes(10)), VALUES.astype("f4"))


def test_large_zstd_chunks() -> None:
    count = 1 << 20
    data = smooth("<f4", (count,))
    decode = compile_chain(_v2("zstd", count=count))
    raw = _encode("zstd", data.tobytes())
    same_bits(decode(raw), data.astype("f4"))
    for damaged in (raw[:-1], raw + b"x", raw[:100]):
        with pytest.raises(CorruptChunkError):
            decode(damaged)


# -- parts ----------------------------------------------------------------------------------------


def test_index_of_a_shard() -> None:
    codecs: list[Any] = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    decode, length = compile_index(codecs, (2, 3))
    assert length == 2 * 3 * 16 + 4
    with pytest.raises(CorruptChunkError, match="checksum"):
        decode(bytes(length))
    with pytest.raises(ValueError, match="gzip"):
        compile_index([*codecs, {"name": "gzip"}], (2, 3))


def test_sizes() -> None:
    assert encoded_size("crc32c", Size(10, exact=True)) == Size(14, exact=True)
    assert encoded_size("zstd", Size(10, exact=True)).exact is False
    assert {"zstd", "blosc", "gzip", "zlib", "lz4", "bz2", "lzma", "crc32c", "shuffle"} <= BYTES_CODECS
    with pytest.raises(CorruptChunkError, match="expected at most 3 bytes of data, got 4"):
        build_step("zstd", {}, Size(3, exact=False))(_encode("zstd", b"abcd"))
