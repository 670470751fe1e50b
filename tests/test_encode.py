"""Compiled encoders store the bytes that zarr-python stores, object by object, or what decodes to the same."""

from __future__ import annotations

import gzip
import math
import re
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from zarr.buffer import cpu
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, TransposeCodec, ZstdCodec

from conformance.oracle import Array, same_bits, sample, smooth
from zarr_dask_stream.source.array import ArraySpec, open_array
from zarr_dask_stream.source.encode import compile_encoder, compile_encoder_fallback, morton_order

pytestmark = pytest.mark.filterwarnings("ignore")  # zarr remarks on dtypes and codecs outside the specification

METADATA = (".zarray", ".zattrs", ".zgroup", "zarr.json")
DTYPES = ["bool", "i1", "<i2", ">i4", "<u8", "<f2", ">f4", "<f8", "<c16", "<M8[ns]", ">m8[s]", "S4", "<U2"]
SHAPES = st.lists(st.integers(1, 7), max_size=3).map(tuple)


def is_compiled(encode: Any) -> bool:
    """Whether an encoder works without zarr-python."""
    return "_fallback" not in encode.__qualname__


def encoded(spec: ArraySpec, data: Array, *, write_empty: bool = False, compiled: bool = True) -> dict[str, bytes]:
    """Encode a whole array, object by object."""
    encode = (compile_encoder if compiled else compile_encoder_fallback)(spec, write_empty=write_empty)
    objects = spec.grid.shard_grid
    parts = {n: np.asarray(data[objects.region(n)], spec.dtype) for n in range(len(objects))}  # a scalar without axes
    values = {spec.chunk_key(objects.index(n)): encode(part) for n, part in parts.items()}
    return {key: bytes(value) for key, value in values.items() if value is not None}


def timeless(objects: dict[str, bytes]) -> dict[str, bytes]:
    """Blank the time out of what gzip made: it is that of the moment of writing."""
    return {key: re.sub(rb"\x1f\x8b\x08\x00....", b"gzip", value, flags=re.DOTALL) for key, value in objects.items()}


def check(data: Array, *, write_empty: bool = False, compiled: bool | None = None, **options: Any) -> None:
    """Compare with what zarr-python stores of the same data."""
    store: dict[str, Any] = {}
    options = {"shape": data.shape, "dtype": data.dtype, "config": {"write_empty_chunks": write_empty}, **options}
    array = zarr.create_array(store, **options)
    spec = open_array(store)
    array[...] = data
    stored = {key: value.to_bytes() for key, value in store.items() if not key.endswith(METADATA)}
    native = data.astype(spec.dtype)
    for way in (True, False):
        made = encoded(spec, native, write_empty=write_empty, compiled=way)
        if not way or '"zstd"' not in spec.metadata:
            assert timeless(made) == timeless(stored)
            continue
        # Another release of zstd than that of numcodecs may find other matches: what counts is what they decode to.
        assert made.keys() == stored.keys()
        want = np.asarray(array[...]).tobytes()  # filters may round
        store.update({key: cpu.Buffer.from_bytes(value) for key, value in made.items()})
        assert np.asarray(array[...]).tobytes() == want
    if compiled is not None:
        assert is_compiled(compile_encoder(spec, write_empty=write_empty)) is compiled


# -- both formats, any shape ----------------------------------------------------------------------

V2_COMPRESSORS: list[Any] = [
    None, numcodecs.Zstd(3), numcodecs.Blosc("lz4", 5, 1), numcodecs.Blosc("zstd", 1, 2), numcodecs.Blosc("zlib", 9, 0),
    numcodecs.GZip(1), numcodecs.Zlib(1), numcodecs.LZ4(), numcodecs.BZ2(1), numcodecs.CRC32C(),
]  # fmt: skip
V3_COMPRESSORS: list[Any] = [
    None, ZstdCodec(level=3), ZstdCodec(level=1, checksum=True), GzipCodec(level=2), BloscCodec(),
    BloscCodec(cname="lz4", shuffle="shuffle"), BloscCodec(cname="zstd", clevel=1, shuffle="noshuffle"),
    Crc32cCodec(), (ZstdCodec(), Crc32cCodec()),
]  # fmt: skip


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Draw a shape, a chunk shape and a shard shape."""
    shape = draw(SHAPES)
    chunks = tuple(draw(st.integers(1, n + 1)) for n in shape)
    shards = tuple(c * draw(st.integers(1, 3)) for c in chunks)
    return shape, chunks, shards


@given(layouts(), st.sampled_from(DTYPES), st.sampled_from(V2_COMPRESSORS), st.sampled_from("CF"), st.booleans())
@settings(max_examples=25)
def test_version_2(layout: Any, dtype: str, compressor: Any, order: Any, write_empty: bool) -> None:
    shape, chunks, _ = layout
    check(
        smooth(dtype, shape) if np.dtype(dtype).kind not in "SU" else sample(dtype, shape),
        chunks=chunks, zarr_format=2, compressors=compressor, order=order, write_empty=write_empty, compiled=True,
    )  # fmt: skip


@given(
    layouts(), st.sampled_from(DTYPES), st.sampled_from(V3_COMPRESSORS), st.sampled_from(["little", "big"]),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
)  # fmt: skip
@example(((7, 5), (2, 3), (4, 6)), "<f8", ZstdCodec(), "little", (True, False, False))
@settings(max_examples=25)
def test_version_3(layout: Any, dtype: str, compressors: Any, endian: Any, switches: tuple[bool, ...]) -> None:
    shape, chunks, shards = layout
    sharded, transposed, write_empty = switches
    filters = [TransposeCodec(order=tuple(range(len(shape)))[::-1])] if transposed and shape else []
    check(
        smooth(dtype, shape) if np.dtype(dtype).kind not in "SU" else sample(dtype, shape),
        chunks=chunks, shards=shards if sharded and shape else None, compressors=compressors, filters=filters,
        serializer=BytesCodec(endian=endian), write_empty=write_empty, compiled=True,
    )  # fmt: skip


@pytest.mark.parametrize("location", ["start", "end"])
@pytest.mark.parametrize("index_codecs", [[BytesCodec()], [BytesCodec(), Crc32cCodec()], [BytesCodec(endian="big")]])
def test_where_the_index_of_a_shard_lies(location: Any, index_codecs: list[Any]) -> None:
    codec = ShardingCodec(chunk_shape=(2, 3), index_location=location, index_codecs=index_codecs)
    data = smooth("i4", (10, 10))
    data[:2] = 0  # chunks that are not stored
    check(data, chunks=(4, 6), serializer=codec, compressors=None, compiled=True)


def test_a_shard_with_nothing_in_it_is_not_stored() -> None:
    data = np.zeros((8, 8), "i4")
    data[0, 0] = 1
    check(data, chunks=(2, 2), shards=(4, 4), compiled=True)


FILTERS: list[tuple[str, list[Any], int]] = [
    ("<i4", [numcodecs.Delta("<i4")], 2),
    (">i4", [numcodecs.Delta(">i4", astype=">i2")], 2),
    ("<f8", [numcodecs.FixedScaleOffset(offset=10, scale=10, dtype="<f8", astype="<i4")], 2),
    ("<f4", [numcodecs.BitRound(keepbits=8)], 2),
    ("bool", [numcodecs.PackBits()], 2),
    ("<i8", [numcodecs.Delta("<i8", astype="<i4"), numcodecs.Shuffle(elementsize=4)], 2),
    ("<i4", [{"name": "numcodecs.delta", "configuration": {"dtype": "<i4"}}], 3),
    ("<f4", [{"name": "numcodecs.bitround", "configuration": {"keepbits": 4}}], 3),
]


@pytest.mark.parametrize(("dtype", "filters", "version"), FILTERS, ids=repr)
def test_filters(dtype: str, filters: list[Any], version: int) -> None:
    # Compiled in version 2; those of version 3 hang on more than their own settings and are left to zarr.
    check(smooth(dtype, (7, 5)), chunks=(3, 2), filters=filters, zarr_format=version, compiled=version == 2)


@pytest.mark.parametrize("name", ["LZ4", "BZ2", "Zlib", "LZMA", "Zstd", "Blosc", "GZip", "CRC32", "Shuffle"])
def test_codecs_that_version_3_borrows_from_numcodecs(name: str) -> None:
    codec = getattr(zarr.codecs.numcodecs, name)()
    check(smooth("f4", (7, 5)), chunks=(3, 2), compressors=[codec], compiled=True)


@pytest.mark.parametrize("version", [2, 3])
def test_text_of_varying_length_goes_through_zarr(version: int) -> None:
    store: dict[str, Any] = {}
    array = zarr.create_array(store, shape=(5,), chunks=(2,), dtype=str, zarr_format=version)  # type: ignore[arg-type]  # 2 or 3
    data = np.array(["a", "", "long text", "é", ""], array.dtype)
    spec = open_array(store)
    array[...] = data
    stored = {key: value.to_bytes() for key, value in store.items() if not key.endswith(METADATA)}
    assert encoded(spec, data) == stored
    assert not is_compiled(compile_encoder(spec))


def test_nested_shards_go_through_zarr() -> None:
    codec = ShardingCodec(chunk_shape=(4,), codecs=[ShardingCodec(chunk_shape=(2,))])
    check(smooth("i4", (20,)), chunks=(8,), serializer=codec, compressors=None, compiled=False)


# -- what is not stored ---------------------------------------------------------------------------


def _spec(**options: Any) -> ArraySpec:
    store: dict[str, Any] = {}
    zarr.create_array(store, **{"shape": (4,), "chunks": (4,), "dtype": "f8", **options})
    return open_array(store)


@pytest.mark.parametrize(
    ("dtype", "fill", "data", "stored"),
    [
        ("f8", 0.0, [0.0, 0.0, 0.0, 0.0], False),
        ("f8", 0.0, [0.0, 0.0, 0.0, -0.0], True),
        ("f8", -0.0, [0.0, 0.0, 0.0, 0.0], True),
        ("f8", math.nan, [math.nan] * 4, False),
        ("f8", math.nan, [math.nan, math.nan, math.nan, 1.0], True),
        ("c16", 1 + 2j, [1 + 2j] * 4, False),
        ("c16", 1 + 2j, [1 + 2j, 1 + 2j, 1 + 2j, 1 + 3j], True),
        ("i4", 7, [7, 7, 7, 7], False),
        ("i4", 7, [0, 0, 0, 0], True),
        ("S3", b"ab", [b"ab"] * 4, False),
        ("S3", b"ab", [b"ab", b"ab", b"ab", b"abc"], True),
        ("M8[s]", np.datetime64("NaT", "s"), [np.datetime64("NaT", "s")] * 4, False),
    ],
)
def test_a_chunk_of_fill_values_is_not_stored(dtype: str, fill: Any, data: list[Any], stored: bool) -> None:
    spec = _spec(dtype=dtype, fill_value=fill)
    chunk = np.array(data, spec.dtype)
    assert (compile_encoder(spec)(chunk) is not None) is stored
    assert compile_encoder(spec, write_empty=True)(chunk) is not None


def test_another_nan_than_the_fill_value_is_stored() -> None:
    """zarr-python would drop it; its bits are data."""
    spec = _spec(fill_value=math.nan)
    odd = np.full(4, np.frombuffer(b"\x01\0\0\0\0\0\xf8\x7f", "f8")[0])
    assert compile_encoder(spec)(odd) is not None


def test_a_last_element_that_differs_is_seen_beyond_the_first_look() -> None:
    spec = _spec(shape=(100_000,), chunks=(100_000,), dtype="i2")
    data = np.zeros(100_000, "i2")
    assert compile_encoder(spec)(data) is None
    data[-1] = 1
    assert compile_encoder(spec)(data) is not None


def test_without_a_fill_value_everything_is_stored() -> None:
    spec = _spec(zarr_format=2, fill_value=None)
    assert compile_encoder(spec)(np.zeros(4)) is not None


@pytest.mark.parametrize(("version", "codec"), [(2, numcodecs.GZip(1)), (3, GzipCodec(level=1))])
def test_gzip_gives_the_same_bytes_at_any_time(version: int, codec: Any) -> None:
    spec = _spec(dtype="i2", compressors=codec, zarr_format=version)
    value = compile_encoder(spec)(np.arange(4, dtype="i2"))
    assert value is not None
    assert bytes(value[:10]) == b"\x1f\x8b\x08\0\0\0\0\0" + bytes(value[8:10])
    assert np.frombuffer(gzip.decompress(value), "i2").tolist() == [0, 1, 2, 3]


# -- details --------------------------------------------------------------------------------------


def test_data_in_any_memory_order_and_byte_order_of_the_store() -> None:
    store: dict[str, Any] = {}
    array = zarr.create_array(store, shape=(4, 6), chunks=(4, 6), dtype=">i4", zarr_format=2)
    spec, data = open_array(store), smooth("i4", (12, 8))[::3, ::-1][:, :6]
    value = compile_encoder(spec)(np.asfortranarray(data))
    assert value is not None
    store["0.0"] = cpu.Buffer.from_bytes(bytes(value))
    same_bits(np.asarray(array[...]).astype("i4"), np.ascontiguousarray(data))


@pytest.mark.parametrize("shape", [(1,), (2, 2), (3, 5), (4, 1, 3), (2, 3, 4, 5), (33, 3)])
def test_morton_order_is_that_of_zarr(shape: tuple[int, ...]) -> None:
    store: dict[str, Any] = {}
    single = (1,) * len(shape)
    array = zarr.create_array(
        store, name="a", shape=shape, chunks=single, shards=shape, dtype="<u2", compressors=None, fill_value=0
    )
    array[...] = np.arange(1, math.prod(shape) + 1, dtype="<u2").reshape(shape)
    (shard,) = (value for key, value in store.items() if "/c/" in key)
    stored = np.frombuffer(shard.to_bytes(), "<u2", count=math.prod(shape))  # the index of the shard comes after it
    assert morton_order(shape) == [tuple(map(int, np.unravel_index(number - 1, shape))) for number in stored]
