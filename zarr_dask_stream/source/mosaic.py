"""A box of chunks that are not put together: who cuts out a place that one chunk covers gets that chunk itself.

For boxes whose only reader cuts them up again: into the chunks of a shard, say.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_dask_stream.source.array import ArraySpec
from zarr_dask_stream.source.assemble import Source
from zarr_dask_stream.source.blocks import Blocks
from zarr_dask_stream.source.finisher import ChunkRead
from zarr_dask_stream.source.grid import Index, Region
from zarr_dask_stream.source.memory import lend_array
from zarr_dask_stream.source.selection import ChunkPlan, Missing

__all__ = ["Mosaic", "read_mosaics"]


class Mosaic:
    """Part of an array, as the chunks that it was read in.

    Parameters
    ----------
    spec : ArraySpec
        The array.
    region : tuple of slice
        The part.
    pieces : mapping of tuple of int to numpy.ndarray
        Chunks by grid index, cropped to the array; one that is not among them is not stored.

    Examples
    --------
    >>> import zarr
    >>> from zarr_dask_stream.source.array import open_array
    >>> spec = open_array(zarr.create_array({}, shape=(4,), chunks=(2,), dtype="i2", fill_value=7))
    >>> whole = Mosaic(spec, (slice(0, 4),), {(1,): np.array([1, 2], "i2")})
    >>> whole.shape, whole[2:4], whole[1:3], np.asarray(whole)
    ((4,), array([1, 2], dtype=int16), array([7, 1], dtype=int16), array([7, 7, 1, 2], dtype=int16))
    """

    __slots__ = ("_pieces", "_region", "_spec")

    def __init__(self, spec: ArraySpec, region: Region, pieces: Mapping[Index, npt.NDArray[Any]]) -> None:
        self._spec, self._region, self._pieces = spec, region, pieces

    @property
    def shape(self) -> Index:
        """Its shape, elements."""
        return tuple(part.stop - part.start for part in self._region)

    @property
    def dtype(self) -> np.dtype[Any]:
        """What it holds."""
        return self._spec.dtype

    @property
    def nbytes(self) -> int:
        """Decoded bytes of its chunks."""
        return sum(piece.nbytes for piece in self._pieces.values())

    def within(self, cut: Sequence[slice]) -> Mosaic:
        """Return a part of it, which is still not put together."""
        return Mosaic(self._spec, self._absolute(cut), self._pieces)

    def __getitem__(self, cut: slice | tuple[slice, ...]) -> npt.NDArray[Any]:
        return self._put_together(self._absolute((cut,) if isinstance(cut, slice) else cut))

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        data = self._put_together(self._region)
        return data.astype(dtype or data.dtype, copy=bool(copy))

    def _absolute(self, cut: Sequence[slice]) -> Region:
        """Return what a part of it is in the array's coordinates, cropped to it as NumPy crops."""
        return tuple(
            slice(min(part.start + one.start, part.stop), min(part.start + one.stop, part.stop))
            for one, part in zip(cut, self._region, strict=True)
        )

    def _put_together(self, region: Region) -> npt.NDArray[Any]:
        chunks = self._spec.chunks
        spans = [range(part.start // c, -(-part.stop // c)) for part, c in zip(region, chunks, strict=True)]
        places = list(itertools.product(*spans))
        if len(places) == 1 and (piece := self._pieces.get(places[0])) is not None:
            starts = [i * c for i, c in zip(places[0], chunks, strict=True)]
            local = (slice(part.start - a, part.stop - a) for part, a in zip(region, starts, strict=True))
            only: npt.NDArray[Any] = piece[tuple(local)] if chunks else piece
            return only
        out = lend_array(tuple(part.stop - part.start for part in region), self._spec.dtype)
        if not all(place in self._pieces for place in places):
            out[...] = self._spec.fill
        for place in places:
            if place in self._pieces:
                _copy(out, region, self._pieces[place], [i * c for i, c in zip(place, chunks, strict=True)])
        return out


def _copy(out: npt.NDArray[Any], region: Region, piece: npt.NDArray[Any], starts: Sequence[int]) -> None:
    """Copy what a chunk that begins at `starts` has of a region."""
    to, source = [], []
    for part, start, length in zip(region, starts, piece.shape, strict=True):
        low, high = max(start, part.start), min(start + length, part.stop)
        to.append(slice(low - part.start, high - part.start))
        source.append(slice(low - start, high - start))
    out[tuple(to)] = piece[tuple(source)]


class _Open:
    """A box that some chunks are still missing from."""

    def __init__(self, number: int, region: Region, needs: set[int]) -> None:
        self.read = ChunkRead(number, None, False, None, 0, 0.0, 0.0)
        self.region, self.waits, self.count = region, needs, len(needs)
        self.pieces: dict[Index, npt.NDArray[Any]] = {}


def read_mosaics(
    blocks: Blocks,
    plan: ChunkPlan,
    numbers: Sequence[int],
    *,
    missing: Missing = "fill",
    on_read: Callable[[], None] | None = None,
    again: Callable[[Exception, int], bool] | None = None,
    **options: Any,
) -> Iterator[ChunkRead]:
    """Read boxes like `read_blocks`, of one array, and leave their chunks apart.

    The boxes have to be made of whole chunks, so that none is held for two of them.
    """
    spec = blocks.members[0][1].spec
    waiting: deque[_Open] = deque()
    owner: dict[int, _Open] = {}
    for number in numbers:
        region = plan.region(number)
        box = _Open(number, region, set(next(blocks.needs(region))))
        waiting.append(box)
        owner.update(dict.fromkeys(box.waits, box))
    order = [chunk for box in waiting for chunk in sorted(box.waits)]
    alone = all(box.count <= 1 for box in waiting)  # the stream tries such boxes again itself
    source = Source(spec, order, None if alone else again, options)
    try:
        while waiting:
            box = waiting[0]
            while box.waits:
                read = source.next()
                if read is None:
                    return  # the reading was stopped
                if on_read is not None:
                    on_read()
                _take(spec, owner.pop(read.number), read)
            yield _finish(spec, waiting.popleft(), missing)
    finally:
        source.close()


def _take(spec: ArraySpec, box: _Open, read: ChunkRead) -> None:
    box.waits.discard(read.number)
    whole = box.read
    whole.stored_bytes += read.stored_bytes
    whole.fetch_s += read.fetch_s
    whole.decode_s += read.decode_s
    whole.hedged |= read.hedged
    whole.error = whole.error or read.error
    if read.data is not None and whole.error is None:
        box.pieces[spec.grid.index(read.number)] = read.data


def _finish(spec: ArraySpec, box: _Open, missing: Missing) -> ChunkRead:
    read, absent = box.read, box.count - len(box.pieces)
    if read.error is None:
        read.missing = bool(absent) and (missing == "raise" or absent == box.count)
        if not read.missing or missing == "fill":
            read.data = Mosaic(spec, box.region, box.pieces)  # type: ignore[assignment]  # it can be made an array
    return read
