"""Boxes put together from stored chunks, each chunk read once for all boxes of a batch that need it."""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_dask_stream.errors import MissingChunkError
from zarr_dask_stream.source.array import ArraySpec
from zarr_dask_stream.source.blocks import Blocks, Member
from zarr_dask_stream.source.chunk import Variables
from zarr_dask_stream.source.finisher import ChunkRead
from zarr_dask_stream.source.halo import Segment
from zarr_dask_stream.source.memory import lend_array
from zarr_dask_stream.source.reader import read_chunks, stored_numbers
from zarr_dask_stream.source.selection import ChunkPlan, Missing

__all__ = ["Source", "read_blocks", "stored_blocks"]


class _Open:
    """A box that some chunks are still missing from."""

    def __init__(self, blocks: Blocks, number: int, region: tuple[slice, ...]) -> None:
        needs = [set(one) for one in blocks.needs(region)]
        self.number = number
        self.region = region
        self.waits = needs
        self.whole: list[bool] = [False] * len(needs)
        self.out: list[npt.NDArray[Any] | None] = [None] * len(needs)
        self.segments: list[list[list[Segment]] | None] = [None] * len(needs)
        self.read = ChunkRead(number, None, False, None, 0, 0.0, 0.0)
        self.chunks = sum(map(len, needs))
        self.counted = sum(len(one) for one, (_, member) in zip(needs, blocks.members, strict=True) if not member.coord)
        self.absent: list[tuple[Member, int]] = []


def read_blocks(
    blocks: Blocks,
    plan: ChunkPlan,
    numbers: Sequence[int],
    *,
    missing: Missing = "fill",
    on_read: Callable[[], None] | None = None,
    again: Callable[[Exception, int], bool] | None = None,
    **options: Any,
) -> Iterator[ChunkRead]:
    """Read boxes.

    Parameters
    ----------
    blocks : Blocks
        How the arrays are cut.
    plan : ChunkPlan
        Where the boxes lie: its grid is that of `blocks`, and its region crops them.
    numbers : sequence of int
        Numbers of boxes.
    missing : {"fill", "skip", "raise"}
        When a box counts as missing: where none of its chunks is stored, or for "raise" where one is not (which
        is then its error). Coordinates don't count. What is not stored of a box is the fill value.
    on_read : callable, optional
        Called after each chunk: a box of many chunks is no hung one.
    again : callable, optional
        Asked with an error and how often a chunk was tried: whether to read it again, after the others. A box
        that can only be read again as a whole hardly ever succeeds, where each of its many chunks may fail.
    **options
        As `read_chunks` takes them: timeout, concurrency, hedge, stopped.

    Yields
    ------
    ChunkRead
        One for each box, in the given order. Its data are an array, or a dict of arrays by name. A box with
        a chunk that can't be read has the error of that chunk.

    Examples
    --------
    >>> import numpy as np, zarr
    >>> from zarr_dask_stream.source.array import open_array
    >>> array = zarr.create_array({}, shape=(4, 4), chunks=(2, 2), dtype="i2")
    >>> array[:] = np.arange(16).reshape(4, 4)
    >>> blocks = Blocks.of(open_array(array), (1, 4))
    >>> plan = ChunkPlan(blocks.grid, (slice(0, 4), slice(0, 4)))
    >>> [read.data.tolist() for read in read_blocks(blocks, plan, [0, 3])]
    [[[0, 1, 2, 3]], [[12, 13, 14, 15]]]
    """
    waiting: deque[_Open] = deque()
    needed: list[dict[int, list[_Open]]] = [defaultdict(list) for _ in blocks.members]
    for number in numbers:
        region = plan.region(number)
        box = _Open(blocks, number, region)
        waiting.append(box)
        for by_chunk, needs in zip(needed, box.waits, strict=True):
            for chunk in needs:
                by_chunk[chunk].append(box)
    with contextlib.ExitStack() as stack:
        sources = []
        for at, (_, member) in enumerate(blocks.members):
            # In the order in which boxes need them: the first box is complete first.
            order = [c for box in waiting for c in sorted(box.waits[at]) if needed[at][c][0] is box]
            alone = all(box.chunks <= 1 for box in waiting)  # the stream tries such boxes again itself
            source = Source(member.spec, order, None if alone else again, options)
            stack.callback(source.close)
            sources.append(source)
        while waiting:
            box = waiting[0]
            for at, source in enumerate(sources):
                while box.waits[at]:
                    read = source.next()
                    if read is None:
                        return  # the reading was stopped
                    if on_read is not None:
                        on_read()
                    _spread(blocks, at, read, needed[at].pop(read.number))
            yield _finish(blocks, waiting.popleft(), missing)


class Source:
    """The chunks of one array, those that failed read again after the others; as `read_blocks` takes `again`."""

    def __init__(
        self,
        spec: ArraySpec,
        order: list[int],
        again: Callable[[Exception, int], bool] | None,
        options: dict[str, Any],
    ) -> None:
        self._spec, self._again, self._options = spec, again, options
        self._reads = read_chunks(spec, order, fill=False, **options)
        self._failed: list[int] = []
        self._tried: dict[int, int] = defaultdict(int)

    def next(self) -> ChunkRead | None:
        """Return the next chunk; None where the reading was stopped."""
        while True:
            read = next(self._reads, None)
            if read is None:
                stopped = self._options.get("stopped")
                if not self._failed or (stopped is not None and stopped()):
                    return None
                self._reads = read_chunks(self._spec, self._failed, fill=False, **self._options)
                self._failed = []
                continue
            self._tried[read.number] += 1
            if read.error is None or self._again is None or not self._again(read.error, self._tried[read.number]):
                return read
            self._failed.append(read.number)

    def close(self) -> None:
        """Let go of what is under way."""
        self._reads.close()


def _spread(blocks: Blocks, at: int, read: ChunkRead, boxes: list[_Open]) -> None:
    """Copy one chunk into every box that needs it."""
    member = blocks.members[at][1]
    own = len(boxes) == 1
    first = boxes[0].read
    first.stored_bytes += read.stored_bytes
    first.fetch_s += read.fetch_s
    first.decode_s += read.decode_s
    first.hedged |= read.hedged
    for box in boxes:
        box.waits[at].discard(read.number)
        if read.error is not None:
            box.read.error = box.read.error or read.error
        elif read.data is None:
            box.absent.append((member, read.number))
        elif box.read.error is None:
            _place(blocks, member, box, at, read, own=own)


def _place(blocks: Blocks, member: Member, box: _Open, at: int, read: ChunkRead, *, own: bool) -> None:
    assert read.data is not None
    region = member.spec.grid.region(read.number)
    wanted = tuple(box.region[a] for a in member.axes)
    if not box.waits[at] and box.out[at] is None and region == wanted == _with_halo(blocks, member, box):
        box.out[at] = read.data if own else read.data.copy()  # the box is this chunk
        return
    out = _out(blocks, member, box, at)
    segments = box.segments[at]
    if segments is None:
        segments = box.segments[at] = blocks.segments(member, box.region)
    for parts in itertools.product(*map(_cuts, segments, region)):
        out[tuple(place for place, _ in parts)] = read.data[tuple(source for _, source in parts)]


def _with_halo(blocks: Blocks, member: Member, box: _Open) -> tuple[slice, ...] | None:
    wanted = tuple(box.region[a] for a in member.axes)
    plain = blocks.shape(member, box.region) == tuple(part.stop - part.start for part in wanted)
    return wanted if plain else None


def _cuts(segments: Sequence[Segment], part: slice) -> list[tuple[slice, slice]]:
    """Along one axis: the slices of the box and of the chunk that belong to one another."""
    cuts = []
    for place, source, count, step in segments:
        if step == 0:
            if part.start <= source < part.stop:
                cuts.append((slice(place, place + count), slice(source - part.start, source - part.start + 1)))
            continue
        low = source if step > 0 else source - count + 1
        a, b = max(low, part.start), min(low + count, part.stop)
        if a >= b:
            continue
        if step > 0:
            cuts.append((slice(place + a - low, place + b - low), slice(a - part.start, b - part.start)))
        else:
            begin = place + source - (b - 1)
            stop = a - part.start - 1
            cuts.append((slice(begin, begin + b - a), slice(b - 1 - part.start, None if stop < 0 else stop, -1)))
    return cuts


def _out(blocks: Blocks, member: Member, box: _Open, at: int) -> npt.NDArray[Any]:
    out = box.out[at]
    if out is None:
        out = box.out[at] = lend_array(blocks.shape(member, box.region), member.spec.dtype)
        if box.chunks > 1 or blocks.halo is not None:
            out[...] = member.spec.fill
            _paint_edges(blocks, member, box, out)
    return out


def _paint_edges(blocks: Blocks, member: Member, box: _Open, out: npt.NDArray[Any]) -> None:
    """Put constants where a box reaches beyond the array."""
    if blocks.halo is None:
        return
    for axis, (along, n) in enumerate(zip(member.axes, member.spec.shape, strict=True)):
        boundary = blocks.halo.boundary[along]
        if boundary is None or isinstance(boundary, str):
            continue
        part, (before, after) = box.region[along], blocks.halo.depth[along]
        low, high = max(before - part.start, 0), max(part.stop + after - n, 0)
        length = out.shape[axis]
        for edge in (slice(0, low), slice(length - high, length)):
            out[(*[slice(None)] * axis, edge)] = boundary


def _finish(blocks: Blocks, box: _Open, missing: Missing) -> ChunkRead:
    read = box.read
    absent = [(member, number) for member, number in box.absent if not member.coord]
    read.missing = bool(absent) and (missing == "raise" or len(absent) == box.counted)
    if read.error is not None:
        return read
    if read.missing and missing == "raise" and blocks.named:
        read.error = _not_stored(*absent[0])
    if read.missing and missing != "fill":
        return read
    arrays: dict[str, npt.NDArray[Any]] = {}
    coords: dict[str, npt.NDArray[Any]] = {}
    for at, (name, member) in enumerate(blocks.members):
        out = box.out[at]
        values = _out(blocks, member, box, at) if out is None else out
        if out is None and box.chunks == 1:
            values[...] = member.spec.fill
        (coords if member.coord else arrays)[name] = values
    read.data = arrays[blocks.members[0][0]]
    if blocks.named:
        read.data = Variables(arrays, axes=blocks.axes, coords=coords)  # type: ignore[assignment]  # arrays by name
    return read


def _not_stored(member: Member, number: int) -> MissingChunkError:
    index = member.spec.grid.index(number)
    return MissingChunkError(f'chunk {index} of {member.spec.url} is not stored, and missing="raise"')


def stored_blocks(blocks: Blocks) -> npt.NDArray[np.int64]:
    """Numbers of the boxes of which something is stored, ascending, found by listing the stores."""
    found: set[int] = set()
    for _, member in blocks.members:
        for chunk in () if member.coord else stored_numbers(member.spec):
            found.update(blocks.touching(member, chunk))
    return np.fromiter(sorted(found), np.int64, len(found))
