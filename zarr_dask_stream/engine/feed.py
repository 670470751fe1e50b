"""Data that come from the caller instead of a store: asked for one by one, held until they are written.

The plan of such a run counts the stored objects of the target (its shards, or else its chunks). What is held is
bounded by the credit of the run: an item is asked for when there is credit for it, and one more beyond that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_dask_stream.engine.completed import Completed
from zarr_dask_stream.engine.events import Batch, ChunkDeadLettered, ChunksEmitted, ChunksFiltered, Notice
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.scalars import as_whole
from zarr_dask_stream.source.array import ArraySpec
from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.source.grid import Region
from zarr_dask_stream.source.selection import decode_numbers
from zarr_dask_stream.source.writer import is_castable

__all__ = ["Cargo", "Feed"]


class Cargo:
    """The data of one batch on its way to a worker: arrays by number, which Dask does not look into."""

    __slots__ = ("arrays",)

    def __init__(self, arrays: Mapping[int, npt.NDArray[Any]]) -> None:
        self.arrays = arrays

    def __reduce__(self) -> tuple[Any, ...]:
        return Cargo, (self.arrays,)


class Feed:
    """Takes items from an iterable, says which objects of the target they are, and holds their data.

    Parameters
    ----------
    spec : ArraySpec
        The target.
    items : iterable
        Arrays in grid order; or pairs of a grid index or a region, and an array; or chunks.

    Attributes
    ----------
    error : Exception or None
        Why nothing more was taken before the end: what the iterable raised, or an item that is none.

    Examples
    --------
    >>> import zarr
    >>> from zarr_dask_stream.source.array import open_array
    >>> spec = open_array(zarr.create_array({}, shape=(5,), chunks=(2,), dtype="i4"))
    >>> feed = Feed(spec, [((1,), np.array([3, 4])), (slice(0, 2), np.array([1, 2])), ((2,), np.array([5]))])
    >>> list(feed.runs()), feed.held
    ([range(1, 2), range(0, 1), range(2, 3)], {1: array([3, 4]), 0: array([1, 2]), 2: array([5])})
    """

    def __init__(self, spec: ArraySpec, items: Iterable[Any]) -> None:
        self._spec, self._grid = spec, spec.grid.shard_grid
        self._items = iter(items)
        self._given = np.zeros(len(self._grid), np.bool_)
        self._next = 0
        self.held: dict[int, npt.NDArray[Any]] = {}
        self.error: BaseException | None = None

    # -- items --------------------------------------------------------------------------------------

    def runs(self, done: Completed | None = None) -> Iterator[range]:
        """Walk the objects that items are for, one run for each item; those that are done are passed over."""
        while True:
            try:
                item = next(self._items)
                region, data = self._place(item)
                objects = list(self._objects(region))
                self._claim(objects, region)
            except StopIteration:
                return
            except Exception as error:  # noqa: BLE001  # whatever a user's iterable raises; what it gave before stands
                self.error = error
                return
            for number in objects:
                if done is None or number not in done:
                    places = zip(self._grid.region(number), region, strict=True)
                    cut = tuple(slice(one.start - all_.start, one.stop - all_.start) for one, all_ in places)
                    # A copy: whoever gives an array may go on using it.
                    self.held[number] = np.array(data[cut], data.dtype, order="C", ndmin=data.ndim)
                    yield range(number, number + 1)

    def _place(self, item: Any) -> tuple[Region, npt.NDArray[Any]]:
        """Return where an item belongs, and its data."""
        if isinstance(item, Chunk):
            return self._checked(item.region, item.data)
        if isinstance(item, tuple) and len(item) == 2:
            return self._checked(self._region(item[0]), item[1])
        if not hasattr(item, "shape") or not hasattr(item, "dtype"):
            raise UsageError(
                f"items are arrays in grid order, pairs of a grid index or a region and an array, or chunks; got "
                f"{type(item).__name__}"
            )
        if self._next >= len(self._grid):
            raise UsageError(f"{self._what} has {len(self._grid):,} {self._objects_word}, and there is one more array")
        self._next += 1
        return self._checked(self._grid.region(self._next - 1), item)

    def _region(self, where: Any) -> Region:
        """Return the region that a grid index or a region names."""
        parts = where if isinstance(where, (tuple, list)) else (where,)
        if len(parts) != self._grid.ndim:
            raise UsageError(f"{where!r} names {len(parts)} axes, and {self._what} has {self._grid.ndim}")
        if all(isinstance(part, slice) for part in parts) and parts:
            return tuple(self._axis(part, axis) for axis, part in enumerate(parts))
        index = tuple(number for number in map(as_whole, parts) if number is not None)
        if len(index) < len(parts):
            raise UsageError(f"a place is a grid index (whole numbers) or a region (slices), got {where!r}")
        try:
            self._grid.number(index)
        except IndexError:
            raise UsageError(
                f"{index} is outside the grid of {self._what}, which has {self._grid.grid_shape} {self._objects_word}"
            ) from None
        return self._grid.region_of(index)

    def _axis(self, part: slice, axis: int) -> slice:
        n, length = self._grid.shape[axis], self._grid.chunks[axis]
        start = 0 if part.start is None else part.start
        stop = n if part.stop is None else part.stop
        if part.step not in (None, 1) or not 0 <= start < stop <= n:
            raise UsageError(f"a region is start:stop within the array, got {part} for axis {axis} of length {n}")
        if start % length or (stop % length and stop != n):
            raise UsageError(
                f"{start}:{stop} of axis {axis} holds parts of stored {self._objects_word}, which are {length} long: "
                "they would have to be read to be written. Give whole ones (a stream does with .rechunk(...))"
            )
        return slice(start, stop)

    def _checked(self, region: Region, data: Any) -> tuple[Region, npt.NDArray[Any]]:
        array = np.asarray(data)
        region = tuple(self._axis(part, axis) for axis, part in enumerate(region))
        shape = tuple(part.stop - part.start for part in region)
        where = ", ".join(f"{part.start}:{part.stop}" for part in region)
        if array.shape != shape:
            raise UsageError(f"the array for [{where}] has shape {array.shape}, and {shape} belongs there")
        if not is_castable(array.dtype, self._spec.dtype):
            raise UsageError(
                f"the array for [{where}] holds {array.dtype}, which is no {self._spec.dtype}, as {self._what} holds: "
                f"cast it, .astype({str(self._spec.dtype)!r})"
            )
        return region, array

    def _objects(self, region: Region) -> Iterator[int]:
        start = [part.start // c for part, c in zip(region, self._grid.chunks, strict=True)]
        stop = [-(-part.stop // c) for part, c in zip(region, self._grid.chunks, strict=True)]
        return decode_numbers(self._grid.rows(start, stop))

    def _claim(self, numbers: Sequence[int], region: Region) -> None:
        if self._given[list(numbers)].any():
            where = ", ".join(f"{part.start}:{part.stop}" for part in region)
            raise UsageError(f"[{where}], or a part of it, is given twice: which of the two would stay is not known")
        self._given[list(numbers)] = True

    @property
    def _what(self) -> str:
        return self._spec.url

    @property
    def _objects_word(self) -> str:
        return "shards" if self._spec.shards is not None else "chunks"

    # -- data -----------------------------------------------------------------------------------------

    def cargo(self, batch: Batch) -> Cargo:
        """Return the data of a batch."""
        return Cargo({number: self.held[number] for number in decode_numbers(batch.ranges)})

    def hear(self, notice: Notice) -> None:
        """Let go of what is written, or given up."""
        if isinstance(notice, (ChunksEmitted, ChunksFiltered)):
            for number in notice.numbers:
                self.held.pop(number, None)
        elif isinstance(notice, ChunkDeadLettered):
            self.held.pop(notice.number, None)
