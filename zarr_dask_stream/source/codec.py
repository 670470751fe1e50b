"""Compile an array's codec chain to one plain function, ``decode(raw) -> ndarray``.

Known codecs are decoded with zstandard, numcodecs and the standard library directly: no event loop
and no objects per chunk. A chain with anything else in it goes through zarr-python's own pipeline,
with the outer compressors that are known taken off first, so that a bomb is still found in time.
"""

from __future__ import annotations

import json
import math
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numcodecs
import numpy as np
import numpy.typing as npt
from zarr.buffer import cpu

from zarr_dask_stream.errors import CorruptChunkError, MetadataError
from zarr_dask_stream.source.array import ArraySpec, zarr_array
from zarr_dask_stream.source.chain import VARYING, refuse_unbounded
from zarr_dask_stream.source.inflate import BYTES_CODECS, COMPRESSORS, Buffer, Size, Step, build_step, encoded_size
from zarr_dask_stream.source.locks import ForkedLock
from zarr_dask_stream.source.memory import lend_array
from zarr_dask_stream.source.metadata import brief, sharding

__all__ = [
    "Codec",
    "Decode",
    "UnknownCodec",
    "compile_chain",
    "compile_fallback",
    "compile_index",
    "makes_new_memory",
    "most_stored_nbytes",
    "need_plain",
    "numcodecs_name",
    "stored_order",
    "transposition",
]

Array = npt.NDArray[Any]
Decode = Callable[[Buffer], Array]

#: What the decoded bytes of elements of varying length may come to, before it counts as a bomb.
_LOOSE_LIMIT_BYTES = 1 << 28
#: What is stored of one chunk of such elements, encoded or not.
_LOOSE_STORED_BYTES = 1 << 29
#: The same for elements of one length, which codecs not known here may still have made a little longer.
_LEAST_LIMIT_BYTES = 1 << 16
_LOOSE_FACTOR = 16
_MAX_COMPILED = 64
#: How many times as long as the decoded chunk the stored one may be, and by how many bytes more. Where nothing can be
#: gained, compressors add a few per cent; twice as much is left for writers that flush after every few bytes.
_STORED_FACTOR = 2
_STORED_HEADER_BYTES = 64
_STORED_SLACK_BYTES = 1 << 20
#: The same where the chain has codecs that may widen elements, or are not known here: a shard within a shard has twenty
#: bytes of index for each element, and a compressor's header, at its worst.
_WIDENED_FACTOR = 64
_KEEP_WIDTH = frozenset({*BYTES_CODECS, "bytes", "transpose", "bitround", "packbits"})
_EMPTY = 2**64 - 1  # offset and length of a chunk that is not stored in a shard
#: What libraries raise for a configuration that is not as they expect it.
_NONSENSE = (ArithmeticError, AttributeError, LookupError, SyntaxError, TypeError, ValueError)


@dataclass(frozen=True)
class Codec:
    """One codec of a chain: numcodecs' name for it and its configuration."""

    name: str
    config: Mapping[str, Any]


class UnknownCodec(Exception):  # noqa: N818  # a signal between modules that compile chains, never seen outside
    """The chain has something in it that is not compiled."""


_compiled: OrderedDict[tuple[str, bool], Decode] = OrderedDict()
_compiled_lock = ForkedLock()


def compile_chain(spec: ArraySpec) -> Decode:
    """Compile the chain of `spec` (of its inner chunks, where it is sharded).

    Parameters
    ----------
    spec : ArraySpec
        The array.

    Returns
    -------
    callable
        ``decode(raw)`` takes the stored bytes of one chunk and returns a new, writable array of the full
        chunk shape in native byte order, which the caller owns. It may be called from many threads at
        once. It raises `CorruptChunkError`, with the library's error as its cause, for bytes that are not
        such a chunk.

    Examples
    --------
    >>> import zarr
    >>> from zarr_dask_stream.source.array import open_array
    >>> store = {}
    >>> array = zarr.create_array(store, shape=(4,), chunks=(2,), dtype="i2", compressors=None)
    >>> decode = compile_chain(open_array(store))
    >>> decode(bytes([1, 0, 2, 0]))
    array([1, 2], dtype=int16)
    """
    return _cached(spec, compiled=True)


def compile_fallback(spec: ArraySpec) -> Decode:
    """Return the decoder that always goes through zarr-python's pipeline, whatever the chain."""
    return _cached(spec, compiled=False)


def makes_new_memory(spec: ArraySpec) -> bool:
    """Whether no array that is decoded lies in the memory of its stored bytes, so that they may be overwritten.

    Examples
    --------
    >>> import zarr
    >>> from zarr_dask_stream.source.array import open_array
    >>> [
    ...     makes_new_memory(open_array(zarr.create_array({}, shape=(4,), dtype="i2", compressors=compressors)))
    ...     for compressors in ("auto", None)
    ... ]
    [True, False]
    """
    return any(str(name).removeprefix("numcodecs.") in COMPRESSORS for name in _names_of(spec))


def most_stored_nbytes(spec: ArraySpec, chunks: int = 1) -> int:
    """Return a bound on the stored length of so many chunks together, bytes: what is longer can't be what it should be.

    It is generous, because all that is asked of it is to end reads that would fill the memory: whatever a writer makes
    of data that can't be compressed stays below.

    Examples
    --------
    >>> import zarr
    >>> from zarr_dask_stream.source.array import open_array
    >>> array = zarr.create_array({}, shape=(200, 200), chunks=(100, 100), dtype="f4")
    >>> most_stored_nbytes(open_array(array))
    1128640
    """
    names = {str(name).removeprefix("numcodecs.") for name in _names_of(spec)}
    factor = _STORED_FACTOR if names <= _KEEP_WIDTH else _WIDENED_FACTOR
    nbytes = chunks * (factor * spec.chunk_nbytes + _STORED_HEADER_BYTES) + _STORED_SLACK_BYTES
    return max(nbytes, _LOOSE_STORED_BYTES) if spec.dtype.kind in "OT" else nbytes


def _names_of(spec: ArraySpec) -> list[Any]:
    return [codec["id"] for codec in spec.codecs] if spec.zarr_format == 2 else [c["name"] for c in _chain_of(spec)]


def _cached(spec: ArraySpec, *, compiled: bool) -> Decode:
    key = (spec.fingerprint, compiled)
    with _compiled_lock:
        decode = _compiled.get(key)
    if decode is None:
        try:
            decode = _guarded(_compile(spec) if compiled else _fallback(spec))
        except _NONSENSE as error:
            what = f"{type(error).__name__}: {brief(error, 200)}"
            raise MetadataError(f"{spec.url}: the codec chain can't be used: {what}") from error
        with _compiled_lock:
            _compiled[key] = decode
            if len(_compiled) > _MAX_COMPILED:
                _compiled.popitem(last=False)
    return decode


def _guarded(decode: Decode) -> Decode:
    """Turn whatever a codec raises into CorruptChunkError."""

    def guarded(raw: Buffer) -> Array:
        try:
            return decode(raw)
        except (CorruptChunkError, MemoryError):
            raise
        except Exception as error:
            raise CorruptChunkError(f"{type(error).__name__}: {error}") from error

    return guarded


def _compile(spec: ArraySpec) -> Decode:
    try:
        return _compile_v2(spec) if spec.zarr_format == 2 else _compile_v3(spec)
    except (UnknownCodec, *_NONSENSE):  # what makes no sense here zarr has understood, or will refuse
        return _fallback(spec)


# -- version 2 ------------------------------------------------------------------------------------


def _compile_v2(spec: ArraySpec) -> Decode:
    document = json.loads(spec.metadata)
    need_plain(spec.stored_dtype)
    chain = [Codec(c["id"], {k: v for k, v in c.items() if k != "id"}) for c in spec.codecs]
    step = _chain_step(chain, spec.stored_dtype, spec.chunks)
    if document.get("order") == "F" and len(spec.chunks) > 1:
        axes = tuple(range(len(spec.chunks)))[::-1]
        return _assemble(step, spec.stored_dtype, spec.chunks[::-1], axes, native=spec.dtype)
    return _assemble(step, spec.stored_dtype, spec.chunks, None, native=spec.dtype)


def need_plain(dtype: np.dtype[Any]) -> None:
    """Leave to zarr what has elements of varying length, or of none."""
    if dtype.hasobject or dtype.kind not in "biufcmMSUV" or dtype.itemsize == 0:
        raise UnknownCodec(str(dtype))


# -- version 3 ------------------------------------------------------------------------------------


def _chain_of(spec: ArraySpec) -> list[dict[str, Any]]:
    """Return the chain of one chunk: the inner one where the array is sharded."""
    document = json.loads(spec.metadata)
    inner = sharding(document) if spec.shards is not None else None
    codecs = document["codecs"] if inner is None else inner["codecs"]
    return [{"name": codec} if isinstance(codec, str) else codec for codec in codecs]


def _compile_v3(spec: ArraySpec) -> Decode:
    return _compile_codecs(_chain_of(spec), spec.dtype, spec.chunks, spec.fill)


def _compile_codecs(
    codecs: Sequence[Mapping[str, Any]], dtype: np.dtype[Any], shape: tuple[int, ...], fill: Array
) -> Decode:
    need_plain(dtype)
    names = [codec["name"] for codec in codecs]
    if "sharding_indexed" in names:
        return _compile_shard(codecs, dtype, shape, fill)
    if "bytes" not in names:
        raise UnknownCodec(str(names))
    split = names.index("bytes")
    stored = stored_order(dtype, (codecs[split].get("configuration") or {}).get("endian"))
    before = codecs[:split]
    after = [numcodecs_name(codec, dtype) for codec in codecs[split + 1 :]]
    if any(codec["name"] == "transpose" for codec in before):
        axes = transposition(before, len(shape))
        encoded = tuple(shape[axis] for axis in axes)
        step = _chain_step(after, stored, encoded)
        return _assemble(step, stored, encoded, tuple(np.argsort(axes).tolist()), native=dtype)
    filters = [numcodecs_name(codec, dtype) for codec in before]
    _check_filters(filters, after, stored == dtype)
    return _assemble(_chain_step([*filters, *after], stored, shape), stored, shape, None, native=dtype)


def _compile_shard(
    codecs: Sequence[Mapping[str, Any]], dtype: np.dtype[Any], shape: tuple[int, ...], fill: Array
) -> Decode:
    """Compile a chain that makes a shard of one chunk: its parts are held to their own lengths, which zarr does not."""
    split = [codec["name"] for codec in codecs].index("sharding_indexed")
    axes = transposition(codecs[:split], len(shape))
    after = [numcodecs_name(codec, dtype) for codec in codecs[split + 1 :]]
    if not all(codec.name in BYTES_CODECS for codec in after):
        raise UnknownCodec(str(codecs))
    limit = _WIDENED_FACTOR * math.prod(shape) * dtype.itemsize + _STORED_SLACK_BYTES
    step: Step = _outer_step(after, Size(limit, exact=False)) if after else bytes
    decode = _shard(codecs[split]["configuration"], dtype, tuple(shape[axis] for axis in axes), fill)
    back = tuple(np.argsort(axes).tolist())
    return lambda raw: decode(step(raw)).transpose(back)


def _shard(configuration: Mapping[str, Any], dtype: np.dtype[Any], shape: tuple[int, ...], fill: Array) -> Decode:
    inner = tuple(configuration["chunk_shape"])
    if len(inner) != len(shape) or any(n % c for n, c in zip(shape, inner, strict=True)):
        raise UnknownCodec(str(inner))
    per_shard = tuple(n // c for n, c in zip(shape, inner, strict=True))
    codecs = [{"name": codec} if isinstance(codec, str) else codec for codec in configuration["codecs"]]
    decode = _compile_codecs(codecs, dtype, inner, fill)
    index, index_nbytes = compile_index(configuration.get("index_codecs", ()), per_shard)
    at_start = configuration.get("index_location", "end") == "start"

    def decoded(raw: Buffer) -> Array:
        view = memoryview(raw)
        if len(view) < index_nbytes:
            raise CorruptChunkError(f"expected an index of {index_nbytes} bytes, got {len(view)} bytes in all")
        table = index(view[:index_nbytes] if at_start else view[-index_nbytes:]).reshape(-1, 2)
        out = lend_array(shape, dtype)
        out[...] = fill
        for place, (offset, length) in zip(np.ndindex(per_shard), table.tolist(), strict=True):
            if offset == length == _EMPTY:
                continue
            if offset + length > len(view):
                raise CorruptChunkError(f"the index gives {offset} and {length} of {len(view)} bytes")
            box = tuple(slice(i * c, (i + 1) * c) for i, c in zip(place, inner, strict=True))
            out[box] = decode(view[offset : offset + length])
        return out

    return decoded


def _check_filters(filters: Sequence[Codec], after: Sequence[Codec], native: bool) -> None:
    """Leave to zarr what hangs on the array, not the bytes, that it gives a filter in version 3."""
    if not filters:
        return
    types = [np.dtype(f.config[name]) for f in filters for name in ("astype", "encode_dtype") if f.config.get(name)]
    if not native or not all(dtype.isnative for dtype in types):
        raise UnknownCodec("filters on swapped bytes")
    if any(f.name == "quantize" and f.config.get("astype") for f in filters):
        raise UnknownCodec("quantize to another dtype")
    if types and any(codec.name == "shuffle" for codec in after):
        raise UnknownCodec("shuffle of another dtype than the array's")


def stored_order(dtype: np.dtype[Any], endian: str | None) -> np.dtype[Any]:
    """Return `dtype` in the byte order that the codec ``bytes`` of version 3 names."""
    if endian not in {None, "little", "big"} or (dtype.kind == "V" and endian == "big"):
        raise UnknownCodec(str(endian))
    if endian is None or endian == sys.byteorder:
        return dtype
    return dtype.newbyteorder("S")


def numcodecs_name(codec: Mapping[str, Any], dtype: np.dtype[Any]) -> Codec:
    """Give a codec of version 3 numcodecs' name, and what zarr takes from the array where nothing else is said."""
    name = str(codec["name"]).removeprefix("numcodecs.")
    config = dict(codec.get("configuration") or {})
    option, value = {
        "astype": ("decode_dtype", str(dtype)),
        "fixedscaleoffset": ("dtype", str(dtype)),
        "quantize": ("dtype", str(dtype)),
        "shuffle": ("elementsize", dtype.itemsize),
    }.get(name, ("", None))
    if option and config.get(option) is None:
        config[option] = value
    return Codec(name, config)


def transposition(before: Sequence[Mapping[str, Any]], ndim: int) -> tuple[int, ...]:
    """Compose the axis orders of a chain that consists of transpositions only; on encoding, axes go by it."""
    axes = tuple(range(ndim))
    for codec in before:
        if codec["name"] != "transpose":
            raise UnknownCodec("a filter beside a transposition")
        order = (codec.get("configuration") or {}).get("order")
        if order in ("C", "F"):  # as written before the codec took axes
            order = list(range(ndim))[:: 1 if order == "C" else -1]
        if not isinstance(order, list) or sorted(order) != list(range(ndim)):
            raise UnknownCodec(str(order))
        axes = tuple(axes[i] for i in order)
    return axes


# -- putting the steps together -------------------------------------------------------------------


def _chain_step(chain: Sequence[Codec], dtype: np.dtype[Any], shape: tuple[int, ...]) -> Step:
    """Compose the decoders of `chain` (in the order of encoding) to one function from bytes to bytes.

    `dtype` and `shape` are those of the data at its beginning; sizes are worked out forward, so that each
    decoder knows what it must give.
    """
    count = math.prod(shape)
    size, current = Size(count * dtype.itemsize, exact=True), dtype
    steps: list[Step] = []
    filtering = True
    for codec in chain:
        if filtering and codec.name in _FILTERS:
            steps.append(_filter_step(codec, current, size))
            current, count = _encoded_items(codec, current, count)
            size = Size(count * current.itemsize, exact=True)
            continue
        filtering = codec.name == "shuffle"
        if codec.name not in BYTES_CODECS:
            raise UnknownCodec(codec.name)
        steps.append(build_step(codec.name, codec.config, size))
        size = encoded_size(codec.name, size)
    return _compose(steps, size)


def _compose(steps: list[Step], size: Size) -> Step:
    if not steps:

        def check(raw: Buffer) -> Buffer:
            size.check(len(raw), "stored bytes")
            return raw

        return check
    if len(steps) == 1:
        return steps[0]
    backwards = tuple(reversed(steps))

    def run(raw: Buffer) -> Buffer:
        for step in backwards:
            raw = step(raw)
        return raw

    return run


def _assemble(
    step: Step,
    stored: np.dtype[Any],
    shape: tuple[int, ...],
    axes: tuple[int, ...] | None,
    *,
    native: np.dtype[Any],
) -> Decode:
    """Make an array of `shape` from the bytes that `step` gives; `axes` undoes a transposition."""
    swap = stored != native
    ndarray = np.ndarray

    def decode(raw: Buffer) -> Array:
        array: Array = ndarray(shape, stored, step(raw))
        if swap:
            return array.astype(native)
        return array if array.flags.writeable else array.copy()

    if axes is None:
        return decode

    def transposed(raw: Buffer) -> Array:
        return decode(raw).transpose(axes)

    return transposed


# -- filters --------------------------------------------------------------------------------------

# Filters of numcodecs whose output size follows from their configuration.
_FILTERS = frozenset({"delta", "fixedscaleoffset", "astype", "quantize", "bitround", "packbits"})


def _filter_step(codec: Codec, dtype: np.dtype[Any], size: Size) -> Step:
    name, config = codec.name, codec.config
    wanted = config.get("decode_dtype" if name == "astype" else "dtype")
    if wanted is not None and np.dtype(wanted) != dtype:
        raise UnknownCodec(f"{name} for {wanted} on {dtype}")
    if name == "packbits" and dtype != np.dtype(bool):
        raise UnknownCodec("packbits on other than bool")
    decoder = numcodecs.get_codec({"id": name, **config})
    encoded = _encoded_items(codec, dtype, size.limit // dtype.itemsize)[0]

    def decode(raw: Buffer) -> Buffer:
        out = np.asarray(decoder.decode(np.frombuffer(raw, encoded)))
        out = np.ascontiguousarray(out).reshape(-1)
        if out.dtype != dtype:
            raise CorruptChunkError(f"{name}: expected {dtype}, got {out.dtype}")
        size.check(out.nbytes, name)
        return out.view("u1")

    return decode


def _encoded_items(codec: Codec, dtype: np.dtype[Any], count: int) -> tuple[np.dtype[Any], int]:
    """Return dtype and number of the elements that a filter makes of `count` elements of `dtype`."""
    if codec.name == "packbits":
        return np.dtype("u1"), -(-count // 8) + 1
    if codec.name == "bitround":
        return dtype, count
    name = "encode_dtype" if codec.name == "astype" else "astype"
    return np.dtype(codec.config.get(name) or dtype), count


# -- anything else --------------------------------------------------------------------------------


def _fallback(spec: ArraySpec) -> Decode:
    """Decode through zarr: the bytes are the only chunk of an array in memory."""
    outer, document = _peel(spec)
    zeros = ["0"] * len(spec.chunks)
    key = ".".join(zeros or ["0"]) if spec.zarr_format == 2 else ".".join(["c", *zeros])
    shape, dtype, zarr_format = spec.chunks, spec.dtype, spec.zarr_format
    counted, count = _starts_with_count(document), math.prod(shape)
    local = threading.local()  # an array for each thread, because each holds the chunk at hand

    def decode(raw: Buffer) -> Array:
        value = bytes(outer(raw))
        if counted:
            _check_count(value, count)
        if not hasattr(local, "array"):
            local.array, local.values = zarr_array(document, zarr_format)
        local.values[key] = cpu.Buffer.from_bytes(value)
        try:
            out = lend_array(shape, dtype)
            out[...] = local.array[...]
        finally:
            del local.values[key]
        return out

    return decode


def _peel(spec: ArraySpec) -> tuple[Step, dict[str, Any]]:
    """Take the outer compressors that are known off the chain; return their decoder and the array's rest."""
    document = json.loads(spec.metadata)
    chain = [dict(codec) for codec in spec.codecs] if spec.zarr_format == 2 else _chain_of(spec)
    least = _LOOSE_LIMIT_BYTES if spec.dtype.kind in "OT" else _LEAST_LIMIT_BYTES
    size = Size(max(least, _LOOSE_FACTOR * spec.chunk_nbytes), exact=False)
    outer: list[Codec] = []
    if spec.zarr_format == 2:
        compressor = document.get("compressor")
        if compressor and compressor["id"] in BYTES_CODECS:
            outer.append(_v2_codec(compressor))
            document["compressor"] = compressor = None
        filters = list(document.get("filters") or ())
        # The last one is what makes bytes of elements that vary in length.
        while not compressor and len(filters) > (spec.dtype.kind in "OT") and _known({"name": filters[-1]["id"]}):
            outer.append(_v2_codec(filters.pop()))
        document["filters"] = filters or None
        document.update(shape=list(spec.chunks), chunks=list(spec.chunks), dimension_separator=".")
    else:
        while len(chain) > 1 and _known(chain[-1]):
            outer.append(numcodecs_name(chain.pop(), spec.dtype))
        grid = {"name": "regular", "configuration": {"chunk_shape": list(spec.chunks)}}
        keys = {"name": "default", "configuration": {"separator": "."}}
        document.update(shape=list(spec.chunks), codecs=chain, chunk_grid=grid, chunk_key_encoding=keys)
        document.pop("dimension_names", None)
    refuse_unbounded(document, max(spec.dtype.itemsize, 1), spec.url, counted=_starts_with_count(document))
    return _outer_step(outer[::-1], size), document


def _v2_codec(codec: Mapping[str, Any]) -> Codec:
    return Codec(codec["id"], {name: value for name, value in codec.items() if name != "id"})


def _starts_with_count(document: Mapping[str, Any]) -> bool:
    """Whether the innermost bytes begin with the number of elements (numcodecs' formats of varying length)."""
    codecs = document["codecs"] if document["zarr_format"] == 3 else (document.get("filters") or ())
    last = codecs[-1] if codecs and not document.get("compressor") else {}
    return (last.get("name") or last.get("id")) in VARYING


def _check_count(value: bytes, count: int) -> None:
    stated = int.from_bytes(value[:4], "little")
    if len(value) < 4 or stated != count:
        # The library makes room for what is stated before it looks at the data.
        raise CorruptChunkError(f"expected {count} elements of varying length, the data state {stated}")


def _known(codec: Mapping[str, Any]) -> bool:
    name = str(codec["name"]).removeprefix("numcodecs.")
    # What a shuffle without an element size means depends on the chain before it.
    return name in BYTES_CODECS and name != "shuffle"


def _outer_step(codecs: Sequence[Codec], size: Size) -> Step:
    steps = []
    for codec in codecs:
        steps.append(build_step(codec.name, codec.config, size))
        size = encoded_size(codec.name, size)
    return _compose(steps, size)


def compile_index(codecs: Sequence[Mapping[str, Any] | str], per_shard: tuple[int, ...]) -> tuple[Decode, int]:
    """Compile the chain of a shard's index.

    Returns
    -------
    tuple
        The decoder (to an array of uint64 of shape ``(*per_shard, 2)``: offset and length of each chunk) and
        the length of the stored index, bytes.

    Raises
    ------
    CorruptChunkError
        Never here; decoding raises it as for chunks.
    ValueError
        If the chain has no fixed length, which the sharding codec forbids.
    """
    shape = (*per_shard, 2)
    named = [{"name": codec} if isinstance(codec, str) else codec for codec in codecs]
    if [codec["name"] for codec in named] not in (["bytes"], ["bytes", "crc32c"]):
        raise ValueError(f"a shard index encoded with {[codec['name'] for codec in named]} is not supported")
    decode = _guarded(_compile_codecs(named, np.dtype("u8"), shape, np.zeros((), np.uint64)))
    return decode, math.prod(shape) * 8 + (4 if len(named) == 2 else 0)
