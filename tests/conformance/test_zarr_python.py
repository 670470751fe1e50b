"""Whatever zarr-python writes is read as zarr-python reads it, to the bit."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
from zarr.buffer import cpu
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, TransposeCodec, ZstdCodec

from conformance.oracle import FIXED_TEXT, PLAIN, TIMES, assemble, check, expected, same_bits, sample, smooth
from zarr_dask_stream.source.array import open_array
from zarr_dask_stream.source.reader import read_chunks, stored_numbers

# zarr remarks on dtypes and codecs outside the version 3 specification.
pytestmark = pytest.mark.filterwarnings("ignore")

SHAPE, CHUNKS = (7, 10), (3, 4)
LITTLE_AND_BIG = [f"{order}{name}" for name in [*PLAIN, *TIMES, "U3"] for order in "<>" if np.dtype(name).itemsize > 1]
STRUCTURED = np.dtype([("a", "<i4"), ("b", "<f8"), ("c", "S3")])
MIXED = np.dtype([("x", ">f4"), ("n", "<u2"), ("t", ">i8")])


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [*LITTLE_AND_BIG, "bool", "i1", "u1", *FIXED_TEXT])
def test_v2_dtypes(dtype: str, order: Any) -> None:
    array = zarr.create_array({}, shape=SHAPE, chunks=CHUNKS, dtype=dtype, zarr_format=2, order=order)
    array[...] = sample(dtype, SHAPE)
    check(array, compiled=True)


@pytest.mark.parametrize("dtype", [STRUCTURED, MIXED], ids=["one order", "both orders"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_v2_structured(dtype: Any, order: Any) -> None:
    data = np.zeros(SHAPE, dtype)
    data[dtype.names[-1]] = sample(dtype[dtype.names[-1]], SHAPE)
    array = zarr.create_array({}, shape=SHAPE, chunks=CHUNKS, dtype=dtype, zarr_format=2, order=order)
    array[...] = data
    check(array, compiled=True)


@pytest.mark.parametrize("dtype", ["bool", *[d for d in PLAIN if d != "bool"], *TIMES, *FIXED_TEXT[:2]])
@pytest.mark.parametrize("endian", ["little", "big"])
def test_v3_dtypes(dtype: str, endian: Any) -> None:
    array = zarr.create_array(
        {}, shape=SHAPE, chunks=CHUNKS, dtype=dtype, serializer=BytesCodec(endian=endian), compressors=ZstdCodec()
    )
    array[...] = sample(dtype, SHAPE)
    check(array, compiled=True)


def test_v3_structured() -> None:
    data = np.zeros(SHAPE, STRUCTURED)
    data["b"] = sample("f8", SHAPE)
    array = zarr.create_array({}, shape=SHAPE, chunks=CHUNKS, dtype=STRUCTURED)
    array[...] = data
    check(array)


COMPRESSORS_V2: list[Any] = [
    None,
    numcodecs.Zstd(level=3),
    numcodecs.Zstd(level=1, checksum=True),
    numcodecs.Zlib(level=1),
    numcodecs.GZip(level=1),
    numcodecs.BZ2(level=1),
    numcodecs.LZMA(preset=1),
    numcodecs.LZMA(format=3, check=-1, filters=[{"id": 33, "preset": 1}]),
    numcodecs.LZ4(),
    numcodecs.CRC32C(),
    *(
        numcodecs.Blosc(cname=cname, clevel=clevel, shuffle=shuffle)
        for cname in ("lz4", "lz4hc", "zstd", "zlib", "blosclz")
        for shuffle in (0, 1, 2)
        for clevel in (0, 5)
    ),
]


@pytest.mark.parametrize("compressor", COMPRESSORS_V2, ids=repr)
def test_v2_compressors(compressor: Any) -> None:
    for dtype in ("<f4", ">i2", "u1"):
        array = zarr.create_array({}, shape=SHAPE, chunks=CHUNKS, dtype=dtype, zarr_format=2, compressors=compressor)
        array[...] = smooth(dtype, SHAPE)
        check(array, compiled=True)


FILTERS: list[tuple[str, list[Any]]] = [
    ("<i4", [numcodecs.Delta("<i4")]),
    ("<i4", [numcodecs.Delta("<i4", astype="<i2")]),
    (">i4", [numcodecs.Delta(">i4", astype=">i2")]),
    ("<f8", [numcodecs.FixedScaleOffset(offset=10, scale=10, dtype="<f8", astype="<i4")]),
    (">f8", [numcodecs.FixedScaleOffset(offset=0, scale=1, dtype=">f8", astype="<i2")]),
    ("<f4", [numcodecs.BitRound(keepbits=8)]),
    ("<f4", [numcodecs.Quantize(digits=2, dtype="<f4")]),
    ("<f8", [numcodecs.Quantize(digits=2, dtype="<f8", astype="<f4")]),
    ("bool", [numcodecs.PackBits()]),
    ("<i4", [numcodecs.Shuffle(elementsize=4)]),
    ("<i2", [numcodecs.Shuffle(elementsize=4)]),
    ("<f8", [numcodecs.AsType(encode_dtype="<f4", decode_dtype="<f8")]),
    ("<i8", [numcodecs.Delta("<i8", astype="<i4"), numcodecs.Shuffle(elementsize=4)]),
    ("<i4", [numcodecs.Delta("<i4"), numcodecs.CRC32()]),
    ("<i4", [numcodecs.Adler32()]),
    ("<i4", [numcodecs.Fletcher32()]),
    ("<i4", [numcodecs.CRC32(), numcodecs.Zlib()]),
]


@pytest.mark.parametrize(("dtype", "filters"), FILTERS, ids=repr)
@pytest.mark.parametrize("order", ["C", "F"])
def test_v2_filters(dtype: str, filters: list[Any], order: Any) -> None:
    array = zarr.create_array(
        {}, shape=SHAPE, chunks=CHUNKS, dtype=dtype, zarr_format=2, order=order, filters=filters,
        compressors=numcodecs.Zstd(),
    )  # fmt: skip
    array[...] = smooth(dtype, SHAPE)
    check(array, compiled=True)


@pytest.mark.parametrize("filters", [[numcodecs.VLenUTF8()], [numcodecs.VLenBytes()]], ids=repr)
def test_v2_objects(filters: list[Any]) -> None:
    """As older versions wrote them."""
    words = np.array(["a", "bé", ""] if "VLenUTF8" in repr(filters) else [b"a", b"\0b", b""], dtype=object)
    store: dict[str, bytes] = {
        ".zarray": json.dumps(
            {"zarr_format": 2, "shape": [3], "chunks": [3], "dtype": "|O", "order": "C", "fill_value": "",
             "filters": [codec.get_config() for codec in filters], "compressor": numcodecs.Zlib().get_config()}
        ).encode(),
    }  # fmt: skip
    encoded: Any = words
    for codec in filters:
        encoded = codec.encode(encoded)
    store["0"] = bytes(numcodecs.Zlib().encode(encoded))
    source = _as_store(store)
    try:
        want = expected(zarr.open_array(source, mode="r"))
    except Exception as error:  # noqa: BLE001  # what zarr-python can't read is no oracle
        pytest.skip(f"zarr-python itself does not read this: {error}")
    same_bits(assemble(open_array(source)), want)


def _as_store(values: dict[str, bytes]) -> zarr.storage.MemoryStore:
    return zarr.storage.MemoryStore({key: cpu.Buffer.from_bytes(value) for key, value in values.items()})


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("dtype", [str, "U4"])
def test_text(zarr_format: Any, dtype: Any) -> None:
    array = zarr.create_array({}, shape=(7,), chunks=(3,), dtype=dtype, zarr_format=zarr_format)
    array[:5] = np.array(["", "a", "é∂", "x" * 4, "no"])
    check(array)


def test_variable_length_bytes() -> None:
    array = zarr.create_array({}, shape=(7,), chunks=(3,), dtype="variable_length_bytes")
    array[:4] = np.array([b"", b"\0\xff", b"abc", b"x" * 1000], dtype=object)
    check(array, compiled=False)


# -- version 3 codecs -----------------------------------------------------------------------------

V3_COMPRESSORS: list[Any] = [
    None,
    ZstdCodec(level=3),
    ZstdCodec(level=1, checksum=True),
    GzipCodec(level=1),
    *(BloscCodec(cname=c, shuffle=s) for c in ("lz4", "zstd") for s in ("noshuffle", "shuffle", "bitshuffle")),
    [Crc32cCodec()],
    [ZstdCodec(), Crc32cCodec()],
    [Crc32cCodec(), ZstdCodec()],
    [GzipCodec(), ZstdCodec()],
]
V3_NUMCODECS: list[dict[str, Any]] = [
    {"name": "numcodecs.lz4"},
    {"name": "numcodecs.bz2"},
    {"name": "numcodecs.lzma"},
    {"name": "numcodecs.zlib"},
    {"name": "numcodecs.gzip"},
    {"name": "numcodecs.zstd"},
    {"name": "numcodecs.blosc", "configuration": {"cname": "lz4"}},
    {"name": "numcodecs.shuffle"},
    {"name": "numcodecs.crc32"},
    {"name": "numcodecs.crc32c"},
    {"name": "numcodecs.adler32"},
    {"name": "numcodecs.fletcher32"},
]


@pytest.mark.parametrize("compressors", V3_COMPRESSORS, ids=repr)
@pytest.mark.parametrize("dtype", ["f4", "u1", "i8"])
def test_v3_compressors(compressors: Any, dtype: str) -> None:
    array = zarr.create_array({}, shape=SHAPE, chunks=CHUNKS, dtype=dtype, compressors=compressors)
    array[...] = smooth(dtype, SHAPE)
    check(array, compiled=True)


@pytest.mark.parametrize("codec", V3_NUMCODECS, ids=lambda codec: codec["name"])
def test_v3_numcodecs_compressors(codec: dict[str, Any]) -> None:
    codec = {"configuration": {}, **codec}
    for dtype in ("f4", "u1"):
        array = zarr.create_array({}, shape=SHAPE, chunks=CHUNKS, dtype=dtype, compressors=[codec])
        array[...] = smooth(dtype, SHAPE)
        check(array, compiled=True)


V3_FILTERS: list[tuple[str, list[dict[str, Any]], bool]] = [
    ("i4", [{"name": "numcodecs.delta", "configuration": {"dtype": "<i4"}}], True),
    ("i4", [{"name": "numcodecs.delta", "configuration": {"dtype": "<i4", "astype": "<i2"}}], True),
    ("f8", [{"name": "numcodecs.fixedscaleoffset",
             "configuration": {"offset": 0, "scale": 10, "astype": "<i4"}}], True),
    ("f8", [{"name": "numcodecs.fixedscaleoffset", "configuration": {"offset": 1, "scale": 2}}], True),
    ("f4", [{"name": "numcodecs.bitround", "configuration": {"keepbits": 5}}], True),
    ("f4", [{"name": "numcodecs.quantize", "configuration": {"digits": 2}}], True),
    ("bool", [{"name": "numcodecs.packbits", "configuration": {}}], True),
    ("f8", [{"name": "numcodecs.astype", "configuration": {"encode_dtype": "<f4", "decode_dtype": "<f8"}}], True),
    ("i4", [{"name": "transpose", "configuration": {"order": [1, 0]}},
            {"name": "numcodecs.delta", "configuration": {"dtype": "<i4"}}], False),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "filters", "compiled"), V3_FILTERS, ids=repr)
@pytest.mark.parametrize("endian", ["little", "big"])
def test_v3_filters(dtype: str, filters: list[Any], compiled: bool, endian: Any) -> None:
    array = zarr.create_array(
        {}, shape=SHAPE, chunks=CHUNKS, dtype=dtype, filters=filters, serializer=BytesCodec(endian=endian),
        compressors=ZstdCodec(),
    )  # fmt: skip
    array[...] = smooth(dtype, SHAPE)
    spec = open_array(array)
    try:
        want = expected(array)
    except Exception as error:  # noqa: BLE001  # what zarr-python can't read is no oracle
        pytest.skip(f"zarr-python itself does not read this back: {error}")
    same_bits(assemble(spec), want)
    if endian == "little":
        check(array, compiled=compiled)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("endian", ["little", "big"])
def test_transpose(order: tuple[int, ...], endian: Any) -> None:
    array = zarr.create_array(
        {}, shape=(4, 5, 6), chunks=(2, 3, 4), dtype="i4", filters=[TransposeCodec(order=order)],
        serializer=BytesCodec(endian=endian),
    )  # fmt: skip
    array[...] = smooth("i4", (4, 5, 6))
    check(array, compiled=True)


def test_two_transpositions_compose() -> None:
    filters = [TransposeCodec(order=(1, 2, 0)), TransposeCodec(order=(0, 2, 1))]
    array = zarr.create_array({}, shape=(4, 5, 6), chunks=(2, 3, 4), dtype="i4", filters=filters)
    array[...] = smooth("i4", (4, 5, 6))
    check(array, compiled=True)


# -- shards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("location", ["start", "end"])
@pytest.mark.parametrize(
    "index_codecs", [[BytesCodec(), Crc32cCodec()], [BytesCodec()], [BytesCodec(endian="big")]], ids=repr
)
@pytest.mark.parametrize("kind", ["memory", "local", "zip"])
def test_shards(tmp_path: Path, location: Any, index_codecs: Any, kind: str) -> None:
    codec = ShardingCodec(
        chunk_shape=(2, 5), codecs=[BytesCodec(), ZstdCodec(), Crc32cCodec()], index_location=location,
        index_codecs=index_codecs,
    )  # fmt: skip
    target: Any = {"memory": {}, "local": str(tmp_path / "a.zarr"), "zip": None}[kind]
    if kind == "zip":
        target = zarr.storage.ZipStore(tmp_path / "a.zip", mode="w")
    array = zarr.create(store=target, shape=(11, 23), chunks=(4, 10), dtype="f4", codecs=[codec], fill_value=np.nan)
    array[0:5, :] = sample("f4", (5, 23))
    array[6:8, 0:5] = 1
    if kind == "zip":
        want = expected(array)
        target.close()
        spec = open_array(tmp_path / "a.zip")
        same_bits(assemble(spec), want)
    else:
        spec = check(array, compiled=True)
    assert spec.shards == (4, 10)
    stored = set(stored_numbers(spec))
    for read in read_chunks(spec, range(len(spec.grid)), fill=False):
        assert read.missing or read.number in stored
        assert (read.data is None) == read.missing


@pytest.mark.parametrize("dtype", ["bool", ">f8", "U3", "M8[s]", str])
def test_shards_of_other_dtypes(dtype: Any) -> None:
    array = zarr.create_array({}, shape=(10, 9), chunks=(2, 3), shards=(4, 6), dtype=dtype)
    array[:7] = np.full((7, 9), "ab") if dtype is str else sample(dtype, (7, 9))
    check(array)


def test_transposed_inside_a_shard() -> None:
    array = zarr.create_array(
        {}, shape=(10, 9), chunks=(2, 3), shards=(4, 6), dtype="i4", filters=[TransposeCodec(order=(1, 0))]
    )
    array[...] = smooth("i4", (10, 9))
    check(array, compiled=True)


def test_shards_in_shards() -> None:
    inner = ShardingCodec(chunk_shape=(1, 2), codecs=[BytesCodec(), ZstdCodec()])
    array = zarr.create(
        store={}, shape=(9, 9), chunks=(4, 8), dtype="i4", codecs=[ShardingCodec(chunk_shape=(2, 4), codecs=[inner])]
    )
    array[:6] = smooth("i4", (6, 9))
    check(array, compiled=True)


def test_compressed_shards_are_read_as_whole_chunks() -> None:
    codecs: list[Any] = [ShardingCodec(chunk_shape=(2, 4), codecs=[BytesCodec()]), GzipCodec()]
    array = zarr.create(store={}, shape=(9, 9), chunks=(4, 8), dtype="i4", codecs=codecs)
    array[:6] = smooth("i4", (6, 9))
    spec = check(array)
    assert spec.shards is None


# -- shapes and places ----------------------------------------------------------------------------


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(
    ("shape", "chunks"),
    [((), ()), ((0,), (2,)), ((3, 0), (2, 2)), ((1,), (5,)), ((5,), (5,)), ((6,), (5,)), ((2, 2), (10, 10)),
     ((1, 1, 1, 1, 1), (1, 1, 1, 1, 1)), ((3, 4, 5), (2, 3, 2))],
)  # fmt: skip
def test_shapes(shape: tuple[int, ...], chunks: tuple[int, ...], zarr_format: Any) -> None:
    orders: list[Any] = ["C", "F"]
    for separator, order in itertools.product("./", orders):
        name = "v2" if zarr_format == 2 else "default"
        array = zarr.create_array(
            {}, shape=shape, chunks=chunks, dtype="f4", zarr_format=zarr_format, order=order,
            chunk_key_encoding={"name": name, "separator": separator},
        )  # fmt: skip
        spec = check(array)  # nothing stored yet
        assert list(stored_numbers(spec)) == []
        array[...] = sample("f4", shape)
        spec = check(array)
        assert list(stored_numbers(spec)) == list(range(len(spec.grid)))


@pytest.mark.parametrize("separator", [".", "/"])
def test_v3_with_keys_of_version_2(separator: Any) -> None:
    for shape in ((), (5, 6)):
        encoding: Any = {"name": "v2", "separator": separator}
        array = zarr.create_array({}, shape=shape, chunks=(2,) * len(shape), dtype="i4", chunk_key_encoding=encoding)
        array[...] = 3
        assert list(stored_numbers(check(array))) == list(range(len(open_array(array).grid)))


FILLS: list[tuple[Any, Any]] = [
    ("f4", 0), ("f4", float("nan")), ("f8", float("inf")), ("f8", float("-inf")), ("f8", -0.0), ("f2", 1.5),
    ("i8", -(2**63)), ("u8", 2**64 - 1), ("bool", True), ("c16", complex(1, float("nan"))),
    ("M8[s]", np.datetime64("NaT", "s")),
    ("M8[s]", np.datetime64("2020-01-01")), ("m8[ms]", np.timedelta64(5, "ms")), ("U3", "abc"), ("S3", b"ab"),
    (str, "none"),
]  # fmt: skip


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(("dtype", "fill"), FILLS, ids=repr)
def test_fill_values(dtype: Any, fill: Any, zarr_format: Any) -> None:
    array = zarr.create_array({}, shape=(5, 7), chunks=(2, 3), dtype=dtype, fill_value=fill, zarr_format=zarr_format)
    spec = check(array)
    assert all(read.missing for read in read_chunks(spec, range(len(spec.grid))))
    array[0:2, 0:3] = np.asarray(array[4:, 6:])[0, 0]  # a stored chunk of nothing but the fill value
    check(array)


@pytest.mark.parametrize("dtype", [*PLAIN, *TIMES, *FIXED_TEXT, ">f4", str])
def test_no_fill_value(dtype: Any) -> None:
    array = zarr.create_array({}, shape=(5,), chunks=(2,), dtype=dtype, fill_value=None, zarr_format=2)
    check(array)


def test_structured_fill_value() -> None:
    fill = np.array((3, 1.5, b"xy"), STRUCTURED)[()]
    array = zarr.create_array({}, shape=(5,), chunks=(2,), dtype=STRUCTURED, fill_value=fill, zarr_format=2)
    check(array)


@pytest.mark.parametrize(("dtype", "bits"), [("float32", "0x7fc01234"), ("float64", "0x7ff8000000abcdef")])
def test_nan_payload_of_the_fill_value(dtype: str, bits: str) -> None:
    store: dict[str, Any] = {}
    zarr.create_array(store, shape=(5,), chunks=(2,), dtype=dtype, fill_value=np.nan)
    document = json.loads(store["zarr.json"].to_bytes())
    document["fill_value"] = bits
    source = _as_store({"zarr.json": json.dumps(document).encode()})
    check(source)
    data = assemble(open_array(source))
    assert data.view(f"u{data.itemsize}")[0] == int(bits, 16)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("consolidated", [False, True])
def test_groups(tmp_path: Path, zarr_format: Any, consolidated: bool) -> None:
    root = zarr.create_group(tmp_path / "g.zarr", zarr_format=zarr_format)
    for path in ("a", "b/c", "b/d/e"):
        array = root.create_array(path, shape=SHAPE, chunks=CHUNKS, dtype="i4", attributes={"at": path})
        array[...] = sample("i4", SHAPE)
    if consolidated:
        zarr.consolidate_metadata(tmp_path / "g.zarr")
    for path in ("a", "b/c", "b/d/e"):
        assert check(str(tmp_path / "g.zarr"), path).attributes == {"at": path}
        check(str(tmp_path / "g.zarr" / path))
        same_bits(assemble(open_array(root[path])), expected(root[path]))
        same_bits(assemble(open_array(root, path=path)), expected(root[path]))


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_consolidated_only(tmp_path: Path, zarr_format: Any) -> None:
    root = zarr.create_group(tmp_path / "g.zarr", zarr_format=zarr_format)
    array = root.create_array("b/c", shape=SHAPE, chunks=CHUNKS, dtype="i4", attributes={"x": 1})
    array[...] = sample("i4", SHAPE)
    want = expected(array)
    zarr.consolidate_metadata(tmp_path / "g.zarr")
    for name in (".zarray", ".zattrs", "zarr.json"):
        (tmp_path / "g.zarr" / "b" / "c" / name).unlink(missing_ok=True)
    same_bits(assemble(open_array(tmp_path / "g.zarr", path="b/c")), want)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("compression", [0, 8])
def test_zip(tmp_path: Path, zarr_format: Any, compression: int) -> None:
    store = zarr.storage.ZipStore(tmp_path / "a.zip", mode="w", compression=compression)
    array = zarr.create_array(store, name="in/a", shape=SHAPE, chunks=CHUNKS, dtype="f8", zarr_format=zarr_format)
    array[:4] = sample("f8", (4, 10))
    want = expected(array)
    store.close()
    spec = open_array(tmp_path / "a.zip", path="in/a")
    same_bits(assemble(spec), want)
    assert list(stored_numbers(spec)) == [0, 1, 2, 3, 4, 5]


def test_memory_url() -> None:
    array = zarr.create_array("memory://conformance/a", shape=SHAPE, chunks=CHUNKS, dtype="f8", overwrite=True)
    array[...] = sample("f8", SHAPE)
    check(array)
    same_bits(assemble(open_array("memory://conformance/a")), expected(array))


def test_unicode_and_spaces_in_paths(tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "mé ss.zarr", name="gró/ a", shape=SHAPE, chunks=CHUNKS, dtype="i2")
    array[...] = 5
    check(str(tmp_path / "mé ss.zarr"), "gró/ a")


def test_large_chunks_decode_straight_into_the_array() -> None:
    for compressors in (ZstdCodec(), BloscCodec(), GzipCodec(level=1), None):
        array = zarr.create_array({}, shape=(700, 500), chunks=(600, 500), dtype="f8", compressors=compressors)
        array[...] = smooth("f8", (700, 500))
        check(array, compiled=True)


@pytest.mark.parametrize(
    "box",
    [(slice(2, 6), slice(3, 9)), (slice(0, 7), slice(0, 10)), (slice(3, 3), slice(0, 10)), (slice(6, 7), slice(9, 10))],
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_box(box: tuple[slice, ...], order: Any) -> None:
    array = zarr.create_array({}, shape=SHAPE, chunks=CHUNKS, dtype="i4", zarr_format=2, order=order, fill_value=-1)
    array[:5] = smooth("i4", (5, 10))
    spec = open_array(array)
    out = np.full(SHAPE, -9, "i4")
    for read in read_chunks(spec, range(len(spec.grid)), box=box):
        region = tuple(
            slice(min(max(r.start, b.start), max(b.stop, r.start)), max(min(r.stop, b.stop), r.start, b.start))
            for r, b in zip(spec.grid.region(read.number), box, strict=True)
        )
        assert read.data is not None
        assert read.data.shape == tuple(s.stop - s.start for s in region)
        out[region] = read.data
    want = np.full(SHAPE, -9, "i4")
    want[box] = expected(array)[box]
    same_bits(out, want)


def test_oracle_compares_bits() -> None:
    with pytest.raises(AssertionError):
        same_bits(np.array([0.0]), np.array([-0.0]))
    with warnings.catch_warnings():
        same_bits(np.array([np.nan]), np.array([np.nan]))
