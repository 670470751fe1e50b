"""Compile an array's codec chain to one plain function, ``encode(data) -> bytes``: `codec`'s way back.

The bytes are those that zarr-python would store, or (zstd) decode to the same: the same libraries are called with the
same settings, without an event loop and without objects for each chunk. A chain with anything else in it goes through
zarr-python itself.
"""

from __future__ import annotations

import json
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import numpy.typing as npt
import zarr
import zstandard
from numcodecs.compat import ensure_bytes, ensure_contiguous_ndarray

from zarr_dask_stream.source.array import ArraySpec, zarr_array
from zarr_dask_stream.source.codec import (
    UnknownCodec,
    need_plain,
    numcodecs_name,
    stored_order,
    transposition,
)
from zarr_dask_stream.source.inflate import BYTES_CODECS, Buffer
from zarr_dask_stream.source.locks import ForkedLock
from zarr_dask_stream.source.metadata import sharding

__all__ = ["Encode", "compile_encoder", "compile_encoder_fallback", "morton_order"]

Array = npt.NDArray[Any]
Step = Callable[[Any], Buffer]
#: Takes what one stored object is to hold, cropped to the array; None: nothing is to be stored.
Encode = Callable[[Array], Buffer | None]

_ABSENT = 2**64 - 1  # what a shard's index says of a chunk that it does not have
_MAX_COMPILED = 64
_FIRST_LOOK = 4096  # elements of a chunk that are compared before the rest is
_BLOSC_SHUFFLES = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}

_compiled: OrderedDict[tuple[str, bool, bool], Encode] = OrderedDict()
_compiled_lock = ForkedLock()


def compile_encoder(spec: ArraySpec, *, write_empty: bool = False) -> Encode:
    r"""Compile the chain of `spec`, with its shards where it has any.

    Parameters
    ----------
    spec : ArraySpec
        The array.
    write_empty : bool
        Whether a chunk that holds nothing but the fill value is stored all the same.

    Returns
    -------
    callable
        ``encode(data)`` takes what one stored object (a shard, or else a chunk) is to hold, of the array's
        dtype in native byte order; at the edges of the array it is smaller than a full one. It returns the
        bytes to store, or None where nothing is to be stored. It may be called from many threads at once.

    Examples
    --------
    >>> import zarr
    >>> from zarr_dask_stream.source.array import open_array
    >>> store = {}
    >>> array = zarr.create_array(store, shape=(3,), chunks=(2,), dtype="i2", compressors=None)
    >>> encode = compile_encoder(open_array(store))
    >>> [encode(np.array(data, "i2")) for data in ([1, 2], [3], [0, 0])]
    [b'\x01\x00\x02\x00', b'\x03\x00\x00\x00', None]
    """
    return _cached(spec, write_empty, compiled=True)


def compile_encoder_fallback(spec: ArraySpec, *, write_empty: bool = False) -> Encode:
    """Return the encoder that always goes through zarr-python, whatever the chain."""
    return _cached(spec, write_empty, compiled=False)


def _cached(spec: ArraySpec, write_empty: bool, *, compiled: bool) -> Encode:
    key = (spec.fingerprint, write_empty, compiled)
    with _compiled_lock:
        encode = _compiled.get(key)
    if encode is None:
        encode = _compile(spec, write_empty) if compiled else _fallback(spec, write_empty)
        with _compiled_lock:
            _compiled[key] = encode
            if len(_compiled) > _MAX_COMPILED:
                _compiled.popitem(last=False)
    return encode


def _compile(spec: ArraySpec, write_empty: bool) -> Encode:
    try:
        if spec.zarr_format == 2:
            return _one_chunk(spec, _compile_v2(spec), write_empty)
        document = json.loads(spec.metadata)
        if spec.shards is None:
            return _one_chunk(spec, _compile_v3(document["codecs"], spec.dtype, spec.chunks), write_empty)
        inner = sharding(document)
        if inner is None:
            raise UnknownCodec("sharding beside other codecs")  # noqa: TRY301  # one way out for all that is unknown
        return _shard(spec, inner, _compile_v3(inner["codecs"], spec.dtype, spec.chunks), write_empty)
    except UnknownCodec:
        return _fallback(spec, write_empty)


# -- one chunk ------------------------------------------------------------------------------------


def _one_chunk(spec: ArraySpec, step: Step, write_empty: bool) -> Encode:
    is_empty = _never if write_empty else _emptiness(spec)
    chunks, fill = spec.chunks, spec.fill

    def encode(data: Array) -> Buffer | None:
        data = np.asarray(data, order="C")
        if is_empty(data):
            return None
        return step(data if data.shape == chunks else _padded(data, chunks, fill))

    return encode


def _padded(data: Array, shape: tuple[int, ...], fill: Array) -> Array:
    """Return a full chunk: beyond the edge of the array it holds the fill value."""
    full = np.empty(shape, fill.dtype)
    full[...] = fill
    full[tuple(slice(0, n) for n in data.shape)] = data
    return full


def _never(_: Array) -> bool:
    return False


def _emptiness(spec: ArraySpec) -> Callable[[Array], bool]:
    """Return a function that tells whether a chunk in C order holds nothing but the fill value.

    To the bit: -0.0 is not 0.0, and one NaN is not another. A chunk is rather stored in vain than lost.
    """
    fill = spec.fill
    if spec.fill_value is None or not fill.dtype.itemsize or fill.dtype.hasobject or fill.dtype.kind == "T":
        return _never  # version 2 knows no value for what is not stored; zarr looks after the others itself
    word = np.dtype(f"u{math.gcd(fill.dtype.itemsize, 8)}")
    pattern = fill.reshape(1).view(word)
    first = pattern[0]

    def same(data: Array) -> bool:
        flat = data.reshape(-1).view(word)
        if flat[0] != first or flat[-pattern.size] != first:  # as a rule this decides
            return False
        words = flat.reshape(-1, pattern.size)
        return bool((words[:_FIRST_LOOK] == pattern).all() and (words[_FIRST_LOOK:] == pattern).all())

    return same


# -- chains ---------------------------------------------------------------------------------------


def _compile_v2(spec: ArraySpec) -> Step:
    document = json.loads(spec.metadata)
    need_plain(spec.stored_dtype)
    codecs = [_encoder(dict(codec)) for codec in spec.codecs]
    dtype, fortran = spec.stored_dtype, document.get("order") == "F"

    def encode(data: Array) -> Buffer:
        current: Any = np.asarray(data, dtype, order="F" if fortran else "C")
        for codec in codecs:
            current = codec(current)
        return ensure_bytes(current)

    return encode


def _compile_v3(codecs: Sequence[Mapping[str, Any] | str], dtype: np.dtype[Any], shape: tuple[int, ...]) -> Step:
    need_plain(dtype)
    named: list[Mapping[str, Any]] = [{"name": codec} if isinstance(codec, str) else codec for codec in codecs]
    names = [codec["name"] for codec in named]
    if "bytes" not in names:
        raise UnknownCodec(str(names))
    split = names.index("bytes")
    stored = stored_order(dtype, (named[split].get("configuration") or {}).get("endian"))
    axes = transposition(named[:split], len(shape)) if split else None
    steps = [_bytes_step(codec, dtype) for codec in named[split + 1 :]]

    def encode(data: Array) -> Buffer:
        if axes is not None:
            data = data.transpose(axes)
        current: Any = np.asarray(data, stored, order="C").reshape(-1).view("u1")
        for step in steps:
            current = step(current)
        return current if steps else current.tobytes()

    return encode


def _bytes_step(codec: Mapping[str, Any], dtype: np.dtype[Any]) -> Step:
    """Return the encoder of one codec from bytes to bytes, set as zarr-python sets it."""
    known = numcodecs_name(codec, dtype)
    if known.name not in BYTES_CODECS:
        raise UnknownCodec(known.name)
    config = dict(known.config)
    own = codec["name"] == known.name  # not numcodecs' own format of the same name
    if own and known.name == "crc32c":
        return _append_crc32c
    if own and known.name == "blosc":
        shuffle = config.get("shuffle") or ("bitshuffle" if dtype.itemsize == 1 else "shuffle")
        config["shuffle"] = _BLOSC_SHUFFLES[shuffle]
        config["typesize"] = config.get("typesize") or dtype.itemsize
    return _encoder({"id": known.name, **config})


def _encoder(config: Mapping[str, Any]) -> Step:
    encode: Step = numcodecs.get_codec(dict(config)).encode
    if config["id"] == "gzip":
        return lambda data: _timeless(encode(data))
    if config["id"] == "zstd":
        return _zstd(config)
    return encode


class _Contexts(threading.local):
    """Compressors of each thread: they can't be shared, and to make one costs as much as a small chunk."""

    def __init__(self) -> None:
        self.zstd: dict[tuple[int, bool], zstandard.ZstdCompressor] = {}


_contexts = _Contexts()


def _zstd(config: Mapping[str, Any]) -> Step:
    settings = int(config.get("level", 0)), bool(config.get("checksum", False))

    def encode(data: Buffer) -> Buffer:
        compressor = _contexts.zstd.get(settings)
        if compressor is None:
            level, checksum = settings
            compressor = _contexts.zstd[settings] = zstandard.ZstdCompressor(level=level, write_checksum=checksum)
        return compressor.compress(ensure_contiguous_ndarray(data).view("u1").data)

    return encode


def _timeless(data: Buffer) -> bytes:
    """Take the time of day out of the header of gzip: the same data give the same bytes."""
    return bytes(data[:4]) + bytes(4) + bytes(data[8:])


def _append_crc32c(data: Buffer) -> Buffer:
    view = np.frombuffer(data, "u1")
    return b"".join((view.data, google_crc32c.value(view).to_bytes(4, "little")))


# -- shards ---------------------------------------------------------------------------------------


def _shard(spec: ArraySpec, inner: Mapping[str, Any], step: Step, write_empty: bool) -> Encode:
    is_empty = _never if write_empty else _emptiness(spec)
    chunks, fill, per = spec.chunks, spec.fill, spec.grid.chunks_per_shard
    index_codecs = inner.get("index_codecs") or ["bytes", "crc32c"]
    if [c if isinstance(c, str) else c["name"] for c in index_codecs] not in (["bytes"], ["bytes", "crc32c"]):
        raise UnknownCodec("another index than that of zarr-python")
    encode_index = _compile_v3(index_codecs, np.dtype("u8"), (*per, 2))
    at_start = inner.get("index_location", "end") == "start"
    nothing = np.full((*per, 2), _ABSENT, "u8")
    index_nbytes = len(encode_index(nothing))
    places = [
        (place, tuple(slice(i * c, (i + 1) * c) for i, c in zip(place, chunks, strict=True)))
        for place in morton_order(per)
    ]

    def encode(data: Array) -> Buffer | None:
        index, parts = nothing.copy(), []
        at = index_nbytes if at_start else 0
        for place, slices in places:
            piece = np.asarray(data[slices], order="C")
            if not piece.size or is_empty(piece):
                continue
            parts.append(step(piece if piece.shape == chunks else _padded(piece, chunks, fill)))
            index[place] = at, len(parts[-1])
            at += len(parts[-1])
        if not parts:
            return None
        parts.insert(0 if at_start else len(parts), encode_index(index))
        return b"".join(parts)

    return encode


def morton_order(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the places of a grid in the order in which zarr-python lays the chunks of a shard.

    Neighbours along any axis lie near each other: the bits of the coordinates take turns, the lowest first.

    Examples
    --------
    >>> morton_order((2, 3))
    [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    """
    places = np.stack(np.unravel_index(np.arange(math.prod(shape)), shape or (1,)))
    codes, taken = np.zeros(places.shape[1], np.int64), 0
    widths = [(n - 1).bit_length() for n in shape]
    for bit in range(max(widths, default=0)):
        for axis, width in enumerate(widths):
            if bit < width:
                codes |= ((places[axis] >> bit) & 1) << taken
                taken += 1
    order = np.argsort(codes, kind="stable")
    return [tuple(place) for place in places[:, order].T.tolist()] if shape else [()]


# -- anything else --------------------------------------------------------------------------------


def _fallback(spec: ArraySpec, write_empty: bool) -> Encode:
    """Encode through zarr: the data become the only object of an array in memory."""
    shape = spec.shards or spec.chunks
    zeros = ["0"] * len(shape)
    key = ".".join(zeros or ["0"]) if spec.zarr_format == 2 else ".".join(["c", *zeros])
    document = json.loads(spec.metadata)
    if spec.zarr_format == 2:
        document.update(shape=list(shape), dimension_separator=".")
    else:
        document.update(shape=list(shape), chunk_key_encoding={"name": "default", "configuration": {"separator": "."}})
        document.pop("dimension_names", None)
    local = threading.local()  # an array for each thread, because each holds the data at hand

    def encode(data: Array) -> Buffer | None:
        if not hasattr(local, "array"):
            with zarr.config.set({"array.write_empty_chunks": write_empty}):
                local.array, local.values = zarr_array(document, spec.zarr_format, mode="r+")
        try:
            local.array[tuple(slice(0, n) for n in data.shape)] = data
            value = local.values.get(key)
            return None if value is None else bytes(value.to_bytes())
        finally:
            local.values.pop(key, None)

    return encode
