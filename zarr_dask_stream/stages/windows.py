"""Windows of a reduction: boxes that slide along axes, and triggers that show what was folded so far.

Windows that overlap share their work: the axes are cut into *panes* wherever a window begins or ends, each
chunk is folded once, into its panes, and a window is the merge of the panes it consists of. Arithmetic,
nothing else: which windows are complete is decided in `answers`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.scalars import as_real, as_whole
from zarr_dask_stream.source.chunk import Chunk, Variables
from zarr_dask_stream.source.grid import ChunkGrid, Index, Region
from zarr_dask_stream.source.selection import ChunkPlan

__all__ = ["Along", "Every", "InWindow", "Pane", "parse_along", "parse_every"]

Pane = tuple[int, ...]

_MANY = 8  # chunks from which on arrays are faster
_SPARSE = 64  # windows to look at for each chunk, at most
_REMEMBERED = 4096  # positions whose panes are kept


@dataclass(frozen=True)
class _Line:
    """Windows along one axis, in elements from the beginning of the region."""

    length: int
    size: int
    step: int

    @cached_property
    def count(self) -> int:
        """Number of windows: one begins every `step` elements, until one reaches the end."""
        beyond = max(self.length - self.size, 0)
        return min(-(-beyond // self.step) + 1, -(-self.length // self.step))

    @cached_property
    def _rest(self) -> int:
        return self.size % self.step

    def span(self, window: int) -> tuple[int, int]:
        start = window * self.step
        return start, min(start + self.size, self.length)

    def over(self, start: int, stop: int) -> range:
        """Return the windows that share elements with ``start:stop``."""
        first = max((start - self.size) // self.step + 1, 0)
        return range(first, min(-(-stop // self.step), self.count))

    def pane(self, at: int) -> int:
        """Return the pane that element `at` lies in."""
        whole, part = divmod(at, self.step)
        return 2 * whole + (part >= self._rest) if self._rest else whole

    def pane_span(self, pane: int) -> tuple[int, int]:
        if not self._rest:
            return pane * self.step, min((pane + 1) * self.step, self.length)
        whole, second = divmod(pane, 2)
        start = whole * self.step
        if second:
            return start + self._rest, min(start + self.step, self.length)
        return start, min(start + self._rest, self.length)

    def panes(self, window: int) -> range:
        """Return the panes that a window consists of."""
        start, stop = self.span(window)
        return range(self.pane(start), self.pane(stop - 1) + 1)


@dataclass(frozen=True)
class Along:
    """Windows of `size` elements along some axes of a region, one every `step` elements.

    Parameters
    ----------
    grid : ChunkGrid
        The items that are folded.
    box : tuple of slice
        Region of the stream; windows are counted from its beginning.
    axes : tuple of int
        Axes along which windows lie; along the others they are as long as the region.
    size, step : tuple of int
        Elements, for each of `axes`.
    plain : bool
        Whether a window's index is shown as one number.

    Examples
    --------
    >>> along = Along(ChunkGrid((10, 4), (2, 4)), (slice(0, 10), slice(0, 4)), (0,), (4,), (3,))
    >>> [along.region(number)[0] for number in range(len(along))]
    [slice(0, 4, None), slice(3, 7, None), slice(6, 10, None)]
    """

    grid: ChunkGrid
    box: Region
    axes: tuple[int, ...]
    size: tuple[int, ...]
    step: tuple[int, ...]
    plain: bool = True

    def __getstate__(self) -> dict[str, Any]:
        # What was worked out and kept stays here.
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @cached_property
    def _lines(self) -> tuple[_Line, ...]:
        lengths = (self.box[axis].stop - self.box[axis].start for axis in self.axes)
        return tuple(_Line(*line) for line in zip(lengths, self.size, self.step, strict=True))

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Number of windows along each of the axes."""
        return tuple(line.count for line in self._lines)

    @cached_property
    def _size(self) -> int:
        return math.prod(self.counts)

    def __len__(self) -> int:
        return self._size

    @property
    def gaps(self) -> bool:
        """Whether some elements lie between windows."""
        return any(step > size for step, size in zip(self.step, self.size, strict=True))

    def index(self, number: int) -> Any:
        """Return what a user sees as the number of a window: an int, or one for each axis."""
        where = self._split(number)
        return where[0] if self.plain else where

    def _split(self, number: int) -> Index:
        return tuple(int(i) for i in np.unravel_index(number, self.counts))

    def _join(self, where: Sequence[int]) -> int:
        number = 0
        for i, count in zip(where, self.counts, strict=True):
            number = number * count + i
        return number

    def region(self, number: int) -> Region:
        """Box of a window in array coordinates."""
        box = list(self.box)
        for axis, line, window in zip(self.axes, self._lines, self._split(number), strict=True):
            start, stop = line.span(window)
            box[axis] = slice(self.box[axis].start + start, self.box[axis].start + stop)
        return tuple(box)

    # -- chunks -------------------------------------------------------------------------------------

    def position(self, number: int) -> Index:
        """Return where chunk `number` lies along the axes, in chunks."""
        where = self.grid.index(number)
        return tuple(where[axis] for axis in self.axes)

    def counted(self, numbers: Sequence[int]) -> dict[int, int]:
        """Count chunks by the windows that they share elements with.

        Examples
        --------
        >>> Along(ChunkGrid((10,), (2,)), (slice(0, 10),), (0,), (4,), (3,)).counted(range(5))
        {0: 2, 1: 3, 2: 2}
        """
        if len(numbers) >= _MANY:
            counted = self._counted_at_once(np.asarray(numbers, np.int64))
            if counted is not None:
                return counted
        counted = {}
        for number in numbers:
            for window in self.windows_at(self.position(number)):
                counted[window] = counted.get(window, 0) + 1
        return counted

    def _counted_at_once(self, numbers: npt.NDArray[np.int64]) -> dict[int, int] | None:
        """Do it with arrays; None where the chunks lie so far apart that one by one is better.

        Each chunk is in a box of windows: its corners are marked, and running sums fill the boxes.
        """
        places = np.unravel_index(numbers, self.grid.grid_shape)
        spans = [self._over(line, axis, places[axis]) for axis, line in zip(self.axes, self._lines, strict=True)]
        inside = np.logical_and.reduce([first < stop for first, stop in spans])
        spans = [(first[inside], stop[inside]) for first, stop in spans]
        if not inside.any():
            return {}
        base = [int(first.min()) for first, _ in spans]
        extent = [int(stop.max()) - low + 1 for (_, stop), low in zip(spans, base, strict=True)]
        if math.prod(extent) > _SPARSE * len(numbers):
            return None
        marks = np.zeros(extent, np.int64)
        for corner in itertools.product((0, 1), repeat=len(spans)):
            ends = tuple(span[end] - low for span, end, low in zip(spans, corner, base, strict=True))
            np.add.at(marks, ends, (-1) ** sum(corner))
        for axis in range(len(spans)):
            np.cumsum(marks, axis=axis, out=marks)
        found = np.nonzero(marks)
        windows = np.ravel_multi_index([at + low for at, low in zip(found, base, strict=True)], self.counts)
        return dict(zip(windows.tolist(), marks[found].tolist(), strict=True))

    def _over(self, line: _Line, axis: int, places: npt.NDArray[np.int64]) -> tuple[Any, Any]:
        """Return the first window and the one past the last of chunks at these places along one axis."""
        chunk, begin = self.grid.chunks[axis], self.grid.begin[axis] - self.box[axis].start
        starts = np.maximum(begin + places * chunk, 0)
        stops = np.minimum(begin + (places + 1) * chunk, line.length)
        first = np.maximum((starts - line.size) // line.step + 1, 0)
        return first, np.minimum(-(-stops // line.step), line.count)

    def windows_at(self, position: Index) -> Iterator[int]:
        """Walk the windows that share elements with the chunks at a position."""
        ranges = []
        for axis, line, at in zip(self.axes, self._lines, position, strict=True):
            ranges.append(line.over(*self._extent(line, axis, at)))
        return map(self._join, itertools.product(*ranges))

    def chunks(self, number: int) -> tuple[range, ...]:
        """Return the grid indices of the chunks that a window takes in, axis by axis."""
        return tuple(
            range((part.start - begin) // chunk, -((begin - part.stop) // chunk))
            for part, chunk, begin in zip(self.region(number), self.grid.chunks, self.grid.begin, strict=True)
        )

    def planned(self, plan: ChunkPlan, number: int) -> int:
        """Count the planned chunks of a window; a `where` predicate is asked about each."""
        ranges = self.chunks(number)
        if plan.where is None:
            return math.prod(map(len, ranges))
        return sum(bool(plan.where(where)) for where in itertools.product(*ranges))

    def behind(self, number: int, position: Index | None) -> bool:
        """Whether all chunks of a window come before those at `position` in a plan that walks along the axes."""
        if position is None:
            return True
        chunks = self.chunks(number)
        for axis, at in zip(self.axes, position, strict=True):
            per = self.grid.chunks_per_shard[axis]  # a plan takes whole shards at a time
            last = chunks[axis][-1] // per
            if last != at // per:
                return last < at // per
        return False

    # -- panes --------------------------------------------------------------------------------------

    def panes(self, number: int) -> Iterator[Pane]:
        """Walk the panes that a window consists of."""
        split = self._split(number)
        return itertools.product(*(line.panes(window) for line, window in zip(self._lines, split, strict=True)))

    def windows_of(self, pane: Pane) -> Iterator[int]:
        """Walk the windows that a pane belongs to."""
        spans = (line.pane_span(one) for line, one in zip(self._lines, pane, strict=True))
        ranges = (line.over(*span) for line, span in zip(self._lines, spans, strict=True))
        return map(self._join, itertools.product(*ranges))

    def cut(self, chunk: Chunk) -> Iterator[tuple[Pane, Chunk]]:
        """Yield what each pane has of a chunk; what lies between windows is left out.

        Raises
        ------
        UsageError
            If the chunk lies in several panes and its data have not its shape.
        """
        index = chunk.index
        position = tuple([index[axis] for axis in self.axes])
        panes, whole = self._seen.get(position) or self._panes_at(position)
        for pane in panes:
            yield pane, chunk if whole else self._part(chunk, pane)

    @cached_property
    def _seen(self) -> dict[Index, tuple[tuple[Pane, ...], bool]]:
        return {}

    def _panes_at(self, position: Index) -> tuple[tuple[Pane, ...], bool]:
        """Return the panes in which chunks at a position lie, and whether they lie in one."""
        ranges = []
        for axis, line, at in zip(self.axes, self._lines, position, strict=True):
            start, stop = self._extent(line, axis, at)
            ranges.append(range(line.pane(start), line.pane(stop - 1) + 1))
        panes = itertools.product(*ranges)
        inside = tuple(pane for pane in panes if not self.gaps or next(self.windows_of(pane), None) is not None)
        if len(self._seen) >= _REMEMBERED:
            self._seen.clear()
        self._seen[position] = found = inside, all(len(span) == 1 for span in ranges)
        return found

    def _extent(self, line: _Line, axis: int, at: int) -> tuple[int, int]:
        """Return from where to where chunks at a place lie along one axis, from the beginning of the region."""
        chunk, begin = self.grid.chunks[axis], self.grid.begin[axis] - self.box[axis].start
        return max(begin + at * chunk, 0), min(begin + (at + 1) * chunk, line.length)

    def _part(self, chunk: Chunk, pane: Pane) -> Chunk:
        region, inside = list(chunk.region), [slice(None)] * len(chunk.region)
        for axis, line, one in zip(self.axes, self._lines, pane, strict=True):
            first, part = self.box[axis].start, chunk.region[axis]
            start, stop = line.pane_span(one)
            start, stop = max(start + first, part.start), min(stop + first, part.stop)
            region[axis], inside[axis] = slice(start, stop), slice(start - part.start, stop - part.start)
        return Chunk(chunk.index, tuple(region), self._inside(chunk, inside), chunk.missing)

    def _inside(self, chunk: Chunk, inside: Sequence[slice]) -> Any:
        data = chunk.data
        ends = f"a window ends inside chunk {chunk.index} of shape {chunk.shape}, and"
        choose = "choose size and step of .window(...) in multiples of the chunk's length"
        if isinstance(data, Variables):
            absent = [name for name in data if not set(self.axes) <= set(data.axes[name])]
            if absent:
                raise UsageError(f"{ends} {absent[0]!r} has not the dimension along which to cut it: {choose}")
            parts = {name: array[tuple(inside[axis] for axis in data.axes[name])] for name, array in data.items()}
            return Variables(parts, axes=data.axes)
        if np.shape(data) != chunk.shape:
            raise UsageError(
                f"{ends} its data have shape {np.shape(data)} and can't be cut: {choose}, or let maps keep the shape"
            )
        return data[tuple(inside)]


@dataclass(frozen=True, slots=True)
class InWindow:
    """A predicate on grid indices: what lies between windows is not read.

    `where` is the user's own predicate, asked first.
    """

    along: Along
    where: Any = None

    def __call__(self, where: Index) -> bool:
        """Return whether the chunk is wanted, and in a window."""
        if self.where is not None and not self.where(where):
            return False
        at = tuple(where[axis] for axis in self.along.axes)
        return next(self.along.windows_at(at), None) is not None


@dataclass(frozen=True, slots=True)
class Every:
    """A trigger: show what was folded so far after so many chunks, so many seconds, or whichever comes first.

    `reset` begins anew after each.
    """

    chunks: int | None = None
    seconds: float | None = None
    reset: bool = False


# -- what users write -----------------------------------------------------------------------------------


def parse_along(plan: ChunkPlan, names: Sequence[str | None] | None, along: Any, size: Any, step: Any = None) -> Along:
    """Check what was asked for, and return the windows.

    Parameters
    ----------
    plan : ChunkPlan
        The stream's.
    names : sequence of str, optional
        Dimension names of the array.
    along, size, step
        As `ChunkStream.window` takes them.

    Raises
    ------
    UsageError
        If an axis does not exist, or a window is longer than the region.

    Examples
    --------
    >>> plan = ChunkPlan(ChunkGrid((9, 4), (3, 4)), (slice(0, 9), slice(0, 4)))
    >>> len(parse_along(plan, ("time", "x"), "time", 3))
    3
    """
    several = isinstance(along, (tuple, list))
    given = tuple(along) if several else (along,)
    axes = tuple(_axis(one, names, len(plan.box)) for one in given)
    if not axes or len(set(axes)) < len(axes):
        raise UsageError(f"window: along names one axis or several different ones, got {along!r}")
    sizes = _lengths("size", size, len(axes))
    steps = sizes if step is None else _lengths("step", step, len(axes))
    for axis, length in zip(axes, sizes, strict=True):
        there = plan.box[axis].stop - plan.box[axis].start
        if length > there > 0:
            raise UsageError(f"window: size={length} is longer than the stream's region along axis {axis}, {there}")
    if list(axes) != sorted(axes):
        raise UsageError(f"window: give the axes in the order of the array, got along={along!r}")
    return Along(plan.grid, plan.box, axes, sizes, steps, plain=not several)


def _axis(one: Any, names: Sequence[str | None] | None, ndim: int) -> int:
    if isinstance(one, str):
        if names is None or one not in names:
            known = "none" if not names else ", ".join(repr(name) for name in names if name is not None)
            raise UsageError(f"window: the array has no dimension {one!r}; its dimension names: {known}")
        return list(names).index(one)
    axis = as_whole(one)
    if axis is None:
        raise UsageError(f"window: along is an axis (a number or a dimension name) or several, got {one!r}")
    if not -ndim <= axis < ndim:
        raise UsageError(f"window: along={axis} is not an axis of an array with {ndim}")
    return axis % ndim


def _lengths(name: str, value: Any, count: int) -> tuple[int, ...]:
    given = tuple(value) if isinstance(value, (tuple, list)) else (value,) * count
    if len(given) != count:
        raise UsageError(f"window: {name} is one number of elements, or one for each of {count} axes, got {value!r}")
    lengths = []
    for one in given:
        length = as_whole(one)
        if length is None or length < 1:
            raise UsageError(f"window: {name} is a number of elements, at least 1, got {one!r}")
        lengths.append(length)
    return tuple(lengths)


def parse_every(every: Any, seconds: Any, reset: Any) -> Every:
    """Check what was asked for, and return the trigger; raises UsageError."""
    if every is not None and (as_whole(every) or 0) < 1:
        raise UsageError(f"window: every is a number of chunks, at least 1, got {every!r}")
    if seconds is not None and not 0 < (as_real(seconds) or 0.0) < math.inf:
        raise UsageError(f"window: seconds is a number greater than 0, got {seconds!r}")
    if not isinstance(reset, bool):
        raise UsageError(f"window: reset is True or False, got {reset!r}")
    return Every(as_whole(every), as_real(seconds), reset)
