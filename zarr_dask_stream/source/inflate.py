"""Bytes-to-bytes decoders with a known end: none of them gives more than it was told to.

Each builder takes the codec's configuration and the `Size` its output must have, and returns a plain
function. The size is checked in the frame header, or while streaming, before memory is spent on it.
"""

from __future__ import annotations

import bz2
import contextlib
import lzma
import threading
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import zstandard
from numcodecs import blosc, lz4

from zarr_dask_stream.errors import CorruptChunkError
from zarr_dask_stream.source.memory import lend

__all__ = ["BYTES_CODECS", "COMPRESSORS", "Buffer", "Size", "Step", "build_step"]

Buffer = Any
Step = Callable[[Buffer], Buffer]

_BLOSC_HEADER = 16
_LZ4_HEADER = 4
_MAX_INT32 = 2**31 - 1
# The strongest preset takes 65 MiB; a header may ask for gigabytes.
_LZMA_MEMORY_BYTES = 1 << 28


@dataclass(frozen=True)
class Size:
    """How many bytes a decoder may give: exactly `limit`, or at most."""

    limit: int
    exact: bool

    def check(self, got: int, where: str) -> None:
        """Raise CorruptChunkError unless `got` bytes are allowed."""
        if got != self.limit if self.exact else got > self.limit:
            raise CorruptChunkError(self.wrong(got, where))

    def wrong(self, got: int | str, where: str) -> str:
        """Say what was expected and what was got."""
        kind = "" if self.exact else "at most "
        return f"{where}: expected {kind}{self.limit} bytes of data, got {got}"


class _Contexts(threading.local):
    """A zstandard context for each thread: they can't be shared."""

    def __init__(self) -> None:
        self.zstd = zstandard.ZstdDecompressor()


_contexts = _Contexts()


def _zstd(_: Mapping[str, Any], size: Size) -> Step:
    content_size = zstandard.frame_content_size
    limit, exact = size.limit, size.exact

    def decode(raw: Buffer) -> Buffer:
        stated = content_size(raw)
        if exact and stated == limit:
            out = lend(limit)
            # The whole frame at once, on the thread's own context, into memory that is there already.
            frames = _contexts.zstd.stream_reader(raw, read_across_frames=True)
            got = frames.readinto(out)
            if got != limit or frames.read(1):
                raise CorruptChunkError(size.wrong(got if got != limit else f"more than {limit}", "zstd"))
            return out
        if stated > limit:
            raise CorruptChunkError(size.wrong(stated, "zstd"))
        if exact and stated < 0:
            with contextlib.suppress(zstandard.ZstdError):
                data = _contexts.zstd.decompress(raw, max_output_size=limit, allow_extra_data=False)
                if len(data) == limit:
                    return data
        return _zstd_frames(raw, size)

    return decode


def _zstd_frames(raw: Buffer, size: Size) -> bytes:
    """Decode frames whose sizes are not stated, or several in a row, up to the limit."""
    parts, left, data = [], size.limit + 1, bytes(raw)
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        stream = zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=False)
        part = stream.read(left)
        left -= len(part)
        parts.append(part)
        if left <= 0:
            raise CorruptChunkError(size.wrong(f"more than {size.limit}", "zstd"))
        # A second pass tells where the frame ends; it can't grow past what the first one measured.
        frame.decompress(data)
        if not frame.eof:
            raise CorruptChunkError("zstd: the data end in the middle of a frame")
        data = frame.unused_data
    out = b"".join(parts)
    size.check(len(out), "zstd")
    return out


def _blosc(_: Mapping[str, Any], size: Size) -> Step:
    def decode(raw: Buffer) -> Buffer:
        if len(raw) < _BLOSC_HEADER:
            raise CorruptChunkError(f"blosc: expected a header of {_BLOSC_HEADER} bytes, got {len(raw)} bytes")
        stated = int.from_bytes(raw[4:8], "little")
        stored = int.from_bytes(raw[12:16], "little")
        size.check(stated, "blosc")
        if stored != len(raw):
            raise CorruptChunkError(f"blosc: expected {stored} stored bytes, got {len(raw)}")
        out = lend(stated)
        blosc.decompress(raw, out)
        return out

    return decode


def _lz4(_: Mapping[str, Any], size: Size) -> Step:
    def decode(raw: Buffer) -> Buffer:
        stated = int.from_bytes(raw[:_LZ4_HEADER], "little") if len(raw) > _LZ4_HEADER else -1
        if not 0 < stated <= _MAX_INT32:
            raise CorruptChunkError(f"lz4: the header states {stated} bytes")
        size.check(stated, "lz4")
        out = lend(stated)
        lz4.decompress(raw, out)
        return out

    return decode


def _streamed(make: Callable[[], Any], name: str, size: Size, *, several: bool) -> Step:
    """Decode with a standard-library decompressor, never past the limit."""

    def decode(raw: Buffer) -> bytes:
        parts, left, data = [], size.limit + 1, raw
        while True:
            stream = make()
            part = stream.decompress(data, left)
            left -= len(part)
            parts.append(part)
            if left <= 0:
                raise CorruptChunkError(size.wrong(f"more than {size.limit}", name))
            if not stream.eof:
                raise CorruptChunkError(f"{name}: the data end in the middle of the stream")
            data = stream.unused_data
            if not several or not data.strip(b"\0"):
                break
        out = parts[0] if len(parts) == 1 else b"".join(parts)
        size.check(len(out), name)
        return out

    return decode


def _gzip(_: Mapping[str, Any], size: Size) -> Step:
    return _streamed(lambda: zlib.decompressobj(wbits=31), "gzip", size, several=True)


def _zlib(_: Mapping[str, Any], size: Size) -> Step:
    return _streamed(zlib.decompressobj, "zlib", size, several=False)


def _bz2(_: Mapping[str, Any], size: Size) -> Step:
    return _streamed(bz2.BZ2Decompressor, "bz2", size, several=True)


def _lzma(config: Mapping[str, Any], size: Size) -> Step:
    kind, filters = config.get("format", lzma.FORMAT_XZ), config.get("filters")
    # The data format decides; only raw streams need to be told their filters.
    raw_stream = kind == lzma.FORMAT_RAW
    options = {"filters": filters} if raw_stream else {"memlimit": _LZMA_MEMORY_BYTES}

    def make() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(format=kind, **options)

    return _streamed(make, "lzma", size, several=not raw_stream)


def _crc32c(config: Mapping[str, Any], size: Size) -> Step:
    at_start = config.get("location", "end") == "start"

    def decode(raw: Buffer) -> Buffer:
        if len(raw) < 4:
            raise CorruptChunkError(f"crc32c: expected a checksum of 4 bytes, got {len(raw)} bytes")
        view = memoryview(raw)
        stored, data = (view[:4], view[4:]) if at_start else (view[-4:], view[:-4])
        size.check(len(data), "crc32c")
        if google_crc32c.value(np.frombuffer(data, "u1")) != int.from_bytes(stored, "little"):
            raise CorruptChunkError("crc32c: the checksum stored with the data does not match them")
        return data

    return decode


def _numcodec(name: str) -> Callable[[Mapping[str, Any], Size], Step]:
    """Take a codec of numcodecs whose output is no larger than its input."""

    def build(config: Mapping[str, Any], size: Size) -> Step:
        codec = numcodecs.get_codec({"id": name, **config})

        def decode(raw: Buffer) -> Buffer:
            out = np.ascontiguousarray(np.asarray(codec.decode(bytes(raw)))).reshape(-1).view("u1")
            size.check(out.size, name)
            return out

        return decode

    return build


#: Builders by numcodecs' name of the codec.
_DECOMPRESSORS: dict[str, Callable[[Mapping[str, Any], Size], Step]] = {
    "zstd": _zstd,
    "blosc": _blosc,
    "lz4": _lz4,
    "gzip": _gzip,
    "zlib": _zlib,
    "bz2": _bz2,
    "lzma": _lzma,
}
_SAME_SIZE: dict[str, Callable[[Mapping[str, Any], Size], Step]] = {
    "crc32c": _crc32c,
    "crc32": _numcodec("crc32"),
    "adler32": _numcodec("adler32"),
    "fletcher32": _numcodec("fletcher32"),
    "shuffle": _numcodec("shuffle"),
    "base64": _numcodec("base64"),
}
_GROWTH = {"crc32c": 4, "crc32": 4, "adler32": 4, "fletcher32": 4, "shuffle": 0}
BYTES_CODECS = frozenset({*_DECOMPRESSORS, *_SAME_SIZE})
#: Those whose output never lies in the memory of their input.
COMPRESSORS = frozenset(_DECOMPRESSORS)


def build_step(name: str, config: Mapping[str, Any], size: Size) -> Step:
    """Build the decoder of one codec whose *output* must have `size`."""
    return ({**_DECOMPRESSORS, **_SAME_SIZE})[name](config, size)


def encoded_size(name: str, size: Size) -> Size:
    """Return what is known of the codec's *input* when decoding, from the size of its output."""
    if name in _GROWTH:
        return Size(size.limit + _GROWTH[name], size.exact)
    if name == "base64":
        return Size(-(-size.limit // 3) * 4, exact=False)
    # A compressor's output has no fixed size. Where nothing can be gained, bzip2 adds most: one percent.
    return Size(size.limit + size.limit // 32 + (1 << 16), exact=False)
