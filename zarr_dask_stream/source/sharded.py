"""Chunks out of shards: the index read once, close ranges joined, no shard fetched twice."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from zarr_dask_stream.errors import CorruptChunkError
from zarr_dask_stream.source.array import ArraySpec
from zarr_dask_stream.source.backend import ByteStore, TooLongError
from zarr_dask_stream.source.codec import makes_new_memory
from zarr_dask_stream.source.fetch import Answer, Request, coalesce
from zarr_dask_stream.source.finisher import ChunkRead, Finisher
from zarr_dask_stream.source.shard import Entries, IndexCache, ShardLayout

__all__ = ["LocalShards", "ShardPlan"]

#: A shard of at most this many decoded bytes is fetched whole where half of its chunks are wanted.
_WHOLE_SHARD_BYTES = 1 << 26
#: Longest joined range, and the most that is read for nothing between two of its parts.
_RANGE_BYTES = 1 << 24
_GAP_BYTES = 1 << 15

_indexes = IndexCache()

Place = tuple[int, int]  # number of a chunk, and its place in its shard's index


class LocalShards:
    """Reads the bytes of single chunks out of local shards."""

    def __init__(self, store: ByteStore, spec: ArraySpec) -> None:
        self._store, self._spec, self._grid = store, spec, spec.grid
        self._layout = ShardLayout(spec)
        self._get = store.borrow_range() if makes_new_memory(spec) else store.get_range
        self._shard, self._key = -1, ""
        self._entries: Entries | None = None

    def read(self, number: int) -> bytes | memoryview | None:
        """Return the bytes of chunk `number`, good until the next call; None where it is not stored."""
        shard, inner = self._grid.shard_of(number)
        if shard != self._shard:
            self._key = self._spec.chunk_key(self._grid.shard_grid.index(shard))
            self._entries = self._load(self._key)
            self._shard = shard
        if self._entries is None:
            return None
        span = self._entries.span(self._layout.place(inner), self._layout.most_bytes)
        if span is None:
            return None
        raw = self._get(self._key, *span)
        if raw is None or len(raw) != span[1] - span[0]:
            self._shard = -1
            _indexes.drop((self._spec.store.token, self._key))
            raise _short(*span, 0 if raw is None else len(raw))
        return raw

    def _load(self, key: str) -> Entries | None:
        version = self._store.version(key)
        name = (self._spec.store.token, key)
        entries = _indexes.get(name, version)
        if entries is None:
            start, stop = self._layout.index_range()
            raw = self._store.get_suffix(key, -start) if stop is None else self._store.get_range(key, start, stop)
            if raw is None:
                return None
            entries = self._layout.parse(raw)
            _indexes.put(name, entries, version)
        return entries


def _short(start: int, stop: int, got: int) -> CorruptChunkError:
    return CorruptChunkError(
        f"the shard's index gives bytes {start} to {stop}, and only {got} of them are there; the shard is truncated"
    )


@dataclass(frozen=True, slots=True)
class _Whole:
    """A shard was asked for whole."""

    places: list[Place]


@dataclass(frozen=True, slots=True)
class _Index:
    """The index was asked for, to learn which ranges to ask for next."""

    places: list[Place]


@dataclass(frozen=True, slots=True)
class _Range:
    """A range with some chunks in it: (start, stop, number)."""

    spans: list[tuple[int, int, int]]


class ShardPlan:
    """Which requests to send for the chunks wanted of remote shards; answers add to it.

    Attributes
    ----------
    requests : deque of Request
        What to send next.
    """

    def __init__(self, finish: Finisher, numbers: Iterable[int]) -> None:
        self._finish, self._spec = finish, finish.spec
        self._layout = ShardLayout(finish.spec)
        self.requests: deque[Request] = deque()
        self._settled: deque[tuple[int, Exception | None, float]] = deque()
        shards: dict[int, list[Place]] = {}
        for number in numbers:
            shard, inner = finish.grid.shard_of(number)
            shards.setdefault(shard, []).append((number, self._layout.place(inner)))
        for shard, places in shards.items():
            self._ask(self._spec.chunk_key(finish.grid.shard_grid.index(shard)), places)

    def settled(self) -> Iterator[ChunkRead]:
        """Give the chunks that need no further request: not stored, or failed."""
        while self._settled:
            number, error, seconds = self._settled.popleft()
            index = self._finish.grid.index(number)
            if isinstance(error, CorruptChunkError):
                error = self._finish.corrupt(index, error)
            if error is None:
                yield self._finish.read(number, index, None, seconds)
            else:
                yield self._finish.failed(number, error, seconds)

    def take(self, answer: Answer) -> Iterator[ChunkRead]:
        """Turn an answer into finished chunks, settled ones and further requests."""
        tag = answer.request.tag
        if isinstance(tag, _Range):
            yield from self._take_range(tag, answer)
        elif isinstance(answer.error, TooLongError):  # a whole shard: what is wanted of it may be of a usual size
            self._ask_index(answer.request.key, tag.places)
        elif answer.error is not None or answer.data is None:
            self._settle(tag.places, answer.error, answer.seconds)
        else:
            try:
                entries = self._parse(answer.request.key, answer.data, whole=isinstance(tag, _Whole))
            except CorruptChunkError as error:
                self._settle(tag.places, error, answer.seconds)
                return
            if isinstance(tag, _Whole):
                yield from self._take_whole(tag, entries, answer.data, answer.seconds)
            else:
                self._plan(answer.request.key, entries, tag.places, answer.seconds)

    def _ask(self, key: str, places: list[Place]) -> None:
        whole_bytes = len(self._layout) * self._spec.chunk_nbytes
        if len(places) * 2 >= len(self._layout) and whole_bytes <= _WHOLE_SHARD_BYTES:
            most = self._layout.most_whole_bytes
            self.requests.append(Request(_Whole(places), key, cost_bytes=whole_bytes, most=most))
            return
        entries = _indexes.get(self._name(key))
        if entries is None:
            self._ask_index(key, places)
        else:
            self._plan(key, entries, places, 0.0)

    def _ask_index(self, key: str, places: list[Place]) -> None:
        start, stop = self._layout.index_range()
        self.requests.append(Request(_Index(places), key, start, stop, cost_bytes=self._layout.index_nbytes))

    def _plan(self, key: str, entries: Entries, places: list[Place], seconds: float) -> None:
        """Ask for the ranges in which the chunks lie."""
        spans = []
        for number, place in places:
            try:
                span = entries.span(place, self._layout.most_bytes)
            except CorruptChunkError as error:
                self._settle([(number, place)], error, seconds)
                continue
            if span is None:
                self._settle([(number, place)], None, seconds)
            else:
                spans.append((*span, number))
        joined = coalesce(spans, max_gap=_GAP_BYTES, max_bytes=_RANGE_BYTES)
        # Before other shards' requests: their indexes would only wait in memory.
        self.requests.extendleft(
            Request(_Range(members), key, start, stop, cost_bytes=stop - start)
            for start, stop, members in reversed(joined)
        )

    def _parse(self, key: str, data: bytes, *, whole: bool) -> Entries:
        entries = self._layout.parse_whole(data) if whole else self._layout.parse(data)
        _indexes.put(self._name(key), entries)
        return entries

    def _take_whole(self, tag: _Whole, entries: Entries, data: bytes, seconds: float) -> Iterator[ChunkRead]:
        share_s = seconds / len(tag.places)
        view = memoryview(data)
        for number, place in tag.places:
            try:
                span = entries.span(place, self._layout.most_bytes)
                raw = None if span is None else self._cut(view, *span)
            except CorruptChunkError as error:
                self._settle([(number, place)], error, share_s)
                continue
            yield self._finish.read(number, self._finish.grid.index(number), raw, share_s)

    def _take_range(self, tag: _Range, answer: Answer) -> Iterator[ChunkRead]:
        share_s = answer.seconds / len(tag.spans)
        base = answer.request.start or 0
        view = memoryview(answer.data or b"")
        for start, stop, number in tag.spans:
            error = answer.error
            if isinstance(error, OSError) and error.errno == errno.EINVAL:  # how stores refuse such a range
                error = CorruptChunkError(f"the shard's index points outside the shard: {error}")
                _indexes.drop(self._name(answer.request.key))
            if error is None:
                try:
                    raw = self._cut(view, start - base, stop - base)
                except CorruptChunkError as problem:
                    # The shard may have been rewritten since its index was read: look again next time.
                    _indexes.drop(self._name(answer.request.key))
                    error = problem
                else:
                    yield self._finish.read(number, self._finish.grid.index(number), raw, share_s)
                    continue
            self._settle([(number, 0)], error, share_s)

    def _cut(self, view: memoryview, start: int, stop: int) -> bytes:
        if stop > len(view):
            raise _short(start, stop, max(0, len(view) - start))
        return bytes(view[start:stop])

    def _settle(self, places: list[Place], error: Exception | None, seconds: float) -> None:
        share_s = seconds / max(1, len(places))
        self._settled.extend((number, error, share_s) for number, _ in places)

    def _name(self, key: str) -> tuple[str, str]:
        return self._spec.store.token, key
