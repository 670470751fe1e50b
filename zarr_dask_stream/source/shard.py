"""The index of a shard: where each of its chunks lies. Read once, checked, kept for a while."""

from __future__ import annotations

import json
import math
import threading
from collections import OrderedDict
from dataclasses import dataclass
from time import monotonic
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_dask_stream.errors import CorruptChunkError, MetadataError
from zarr_dask_stream.source.array import ArraySpec
from zarr_dask_stream.source.codec import Decode, compile_index, most_stored_nbytes
from zarr_dask_stream.source.grid import Index
from zarr_dask_stream.source.metadata import sharding

__all__ = ["Entries", "IndexCache", "ShardLayout"]

_EMPTY = 2**64 - 1
# Without anything that tells whether a shard was rewritten, its index is believed only this long.
_BELIEVED_S = 30.0
_CACHE_BYTES = 1 << 25


@dataclass(frozen=True)
class Entries:
    """A decoded index: offset and length of each chunk, bytes, by its place in the shard (C order)."""

    table: npt.NDArray[np.uint64]

    def span(self, place: int, most_bytes: int) -> tuple[int, int] | None:
        """Return (start, stop) of the chunk at `place`, or None where it is not stored.

        Raises
        ------
        CorruptChunkError
            If the chunk would be longer than `most_bytes`.
        """
        offset, length = self.table[place].tolist()
        if offset == _EMPTY and length == _EMPTY:
            return None
        if length > most_bytes or offset + length >= 2**63:
            raise CorruptChunkError(
                f"the shard's index gives offset {offset} and length {length}; expected at most {most_bytes} bytes"
            )
        return offset, offset + length


class ShardLayout:
    """How the shards of one array are laid out.

    Attributes
    ----------
    at_start : bool
        Whether the index stands before the chunks (else behind them).
    index_nbytes : int
        Length of the stored index.
    most_bytes, most_whole_bytes : int
        What one chunk in it, and a whole one, may take at most; a shard may also be longer, by chunks that its index
        does not name any more.
    """

    def __init__(self, spec: ArraySpec) -> None:
        configuration = sharding(json.loads(spec.metadata)) or {}
        self._per_shard = spec.grid.chunks_per_shard
        self._size = math.prod(self._per_shard)
        try:
            codecs = configuration.get("index_codecs", ())
            decode, self.index_nbytes = compile_index(codecs, self._per_shard)
        except ValueError as error:
            raise MetadataError(f"{spec.url}: {error}") from error
        self._decode: Decode = decode
        self.at_start = configuration.get("index_location", "end") == "start"
        self.most_bytes = most_stored_nbytes(spec)
        self.most_whole_bytes = self.index_nbytes + most_stored_nbytes(spec, self._size)

    def __len__(self) -> int:
        return self._size

    def place(self, inner: Index) -> int:
        """Return the place in the index of the chunk at `inner`."""
        place = 0
        for i, n in zip(inner, self._per_shard, strict=True):
            place = place * n + i
        return place

    def index_range(self) -> tuple[int, int | None]:
        """Return the byte range of the index; a negative start means the last bytes."""
        return (0, self.index_nbytes) if self.at_start else (-self.index_nbytes, None)

    def parse(self, raw: Any) -> Entries:
        """Decode and check the bytes of an index.

        Raises
        ------
        CorruptChunkError
            If they are too short, or their checksum is wrong.
        """
        if len(raw) != self.index_nbytes:
            raise CorruptChunkError(
                f"the shard's index: expected {self.index_nbytes} bytes, got {len(raw)}; the shard is truncated"
            )
        try:
            table = self._decode(raw)
        except CorruptChunkError as error:
            raise CorruptChunkError(f"the shard's index: {error}") from error
        return Entries(table.reshape(-1, 2))

    def parse_whole(self, shard: bytes) -> Entries:
        """Find the index in a whole shard and decode it."""
        return self.parse(shard[: self.index_nbytes] if self.at_start else shard[-self.index_nbytes :])


class IndexCache:
    """The indexes read last in this process, bounded by their bytes.

    Examples
    --------
    >>> cache = IndexCache()
    >>> entries = Entries(np.zeros((4, 2), "u8"))
    >>> cache.put(("store", "c/0"), entries, version=1)
    >>> cache.get(("store", "c/0"), version=1) is entries, cache.get(("store", "c/0"), version=2)
    (True, None)
    """

    def __init__(self, max_bytes: int = _CACHE_BYTES) -> None:
        self._kept: OrderedDict[tuple[str, str], tuple[Entries, Any, float]] = OrderedDict()
        self._lock = threading.Lock()
        self._bytes, self._max_bytes = 0, max_bytes

    def get(self, key: tuple[str, str], version: Any = None) -> Entries | None:
        """Return the index of the shard `key`, unless its `version` differs or it is too old to tell."""
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                return None
            entries, known, when = found
            if known != version or (version is None and monotonic() - when > _BELIEVED_S):
                self._remove(key)
                return None
            self._kept.move_to_end(key)
            return entries

    def put(self, key: tuple[str, str], entries: Entries, version: Any = None) -> None:
        """Keep the index of the shard `key`."""
        with self._lock:
            self._remove(key)
            self._kept[key] = entries, version, monotonic()
            self._bytes += entries.table.nbytes
            while self._bytes > self._max_bytes and len(self._kept) > 1:
                self._remove(next(iter(self._kept)))

    def drop(self, key: tuple[str, str]) -> None:
        """Forget the index of the shard `key`."""
        with self._lock:
            self._remove(key)

    def _remove(self, key: tuple[str, str]) -> None:
        found = self._kept.pop(key, None)
        if found is not None:
            self._bytes -= found[0].table.nbytes
