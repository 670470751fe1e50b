"""Which chunks of an array are wanted: a region, a predicate on the grid index, a missing rule.

A `ChunkPlan` is a description, not a list: walking it costs no memory, and it can be walked again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import EllipsisType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.scalars import as_whole
from zarr_dask_stream.source.grid import ChunkGrid, Index, Region
from zarr_dask_stream.source.halo import Halo
from zarr_dask_stream.source.labels import Labels

__all__ = ["ChunkPlan", "Missing", "RegionLike", "Sieve", "decode_numbers", "encode_numbers", "parse_region"]

Missing = Literal["fill", "skip", "raise"]
RegionLike = slice | int | EllipsisType | tuple[slice | int | EllipsisType, ...] | None
Predicate = Callable[[Index], Any]
_PIECE = 256
_SIFTED = 4096


def parse_region(region: RegionLike, shape: tuple[int, ...]) -> Region:
    """Turn slices, integers and an Ellipsis into one slice of step 1 for each axis.

    Parameters
    ----------
    region : slice, int, Ellipsis, tuple of these, or None
        In array coordinates; negative numbers count from the end, as in NumPy. An integer keeps its
        axis, with length 1. None is the whole array.
    shape : tuple of int
        Array shape, elements.

    Returns
    -------
    tuple of slice
        ``0 <= start <= stop <= length`` along every axis.

    Raises
    ------
    UsageError
        If there are too many axes, an integer or a slice lies outside the array, a slice has a step,
        or an entry is of another kind.

    Examples
    --------
    >>> parse_region((0, ..., slice(-3, None)), (4, 5, 6))
    (slice(0, 1, None), slice(0, 5, None), slice(3, 6, None))
    """
    if region is None:
        region = ...
    asked: Any = region
    if isinstance(asked, list):
        raise UsageError(
            f"region {asked!r} is a list, by which NumPy means single places along the first axis; write a tuple with "
            f"an entry for each axis, {tuple(asked)!r}, and choose scattered chunks with where="
        )
    entries = region if isinstance(region, tuple) else (region,)
    dots = [at for at, entry in enumerate(entries) if entry is Ellipsis]
    if len(dots) > 1:
        raise UsageError(f"a region has at most one Ellipsis, got {region!r}")
    given = len(entries) - len(dots)
    if given > len(shape):
        raise UsageError(f"region {region!r} has {given} axes and the array has {len(shape)} (shape {shape})")
    at = dots[0] if dots else given
    whole = (slice(None),) * (len(shape) - given)
    full = entries[:at] + whole + entries[at + len(dots) :]
    return tuple(_parse_axis(entry, length, axis) for axis, (entry, length) in enumerate(zip(full, shape, strict=True)))


def _parse_axis(entry: object, length: int, axis: int) -> slice:
    where = f"axis {axis} of the region (length {length})"
    if isinstance(entry, slice):
        return _parse_slice(entry, length, where)
    position = as_whole(entry)
    if position is None:
        raise UsageError(f"{where} must be an integer, a slice or an Ellipsis, got {entry!r}")
    if not -length <= position < length:
        raise UsageError(f"{where}: index {position} is outside the array")
    position %= length
    return slice(position, position + 1)


def _parse_slice(entry: slice, length: int, where: str) -> slice:
    if entry.step not in (None, 1):
        raise UsageError(
            f"{where}: a region is contiguous, got step {entry.step}; take the step on the data of the chunks"
        )
    try:
        start, stop, _ = entry.indices(length)
    except TypeError:
        raise UsageError(f"{where}: slice bounds must be integers or None, got {entry!r}") from None
    beyond = entry.start is not None and start >= length and entry.start >= length
    before = entry.start is not None and entry.stop is not None and entry.start < -length and entry.stop <= -length
    if length and (beyond or before):
        raise UsageError(f"{where}: {entry.start}:{entry.stop} lies outside the array")
    return slice(start, max(start, stop))


def encode_numbers(numbers: Iterable[int]) -> tuple[range, ...]:
    """Pack numbers into the fewest ranges that keep their order (greedy, steps allowed).

    Examples
    --------
    >>> encode_numbers([4, 5, 6, 9, 12, 15, 2])
    (range(4, 7), range(9, 16, 3), range(2, 3))
    """
    return tuple(_pack(iter(numbers)))


def _pack(numbers: Iterator[int]) -> Iterator[range]:
    first, second = next(numbers, None), next(numbers, None)
    while first is not None:
        if second is None or second <= first:
            yield range(first, first + 1)
            first, second = second, next(numbers, None)
            continue
        step, last, length = second - first, second, 2
        following = next(numbers, None)
        while following is not None and following - last == step:
            last, length = following, length + 1
            following = next(numbers, None)
        if length == 2 and step > 1 and following is not None and following > last:
            # A pair with a gap only looks like a run: the second may begin a longer one.
            yield range(first, first + 1)
            first, second = last, following
            continue
        yield range(first, last + 1, step)
        first, second = following, next(numbers, None)


def decode_numbers(ranges: Iterable[range]) -> Iterator[int]:
    """Walk the numbers of `ranges`, in order."""
    for run in ranges:
        yield from run


class Sieve:
    """Runs of planned numbers, less those that a listing of the store has shown to be absent.

    Parameters
    ----------
    runs : iterable of range
        Planned numbers.
    stored : array of int
        Numbers that are stored, ascending.

    Notes
    -----
    The cost of a long run grows with what is stored of it, not with its length.

    Examples
    --------
    >>> sieve = Sieve([range(0, 10), range(20, 24)], np.array([3, 4, 5, 22, 99]))
    >>> list(sieve), sieve.take_absent(), sieve.take_absent()
    ([range(3, 6), range(22, 23)], 10, 0)
    """

    def __init__(self, runs: Iterable[range], stored: npt.NDArray[np.int64]) -> None:
        self._runs = runs
        self._stored = stored
        self._absent = 0

    def __iter__(self) -> Iterator[range]:
        for run in self._runs:
            if not run:
                yield run
                continue
            low, high = np.searchsorted(self._stored, (run.start, run[-1] + 1))
            present = self._stored[low:high]
            if run.step != 1:
                present = present[(present - run.start) % run.step == 0]
            self._absent += len(run) - len(present)
            for at in range(0, len(present), _SIFTED):
                yield from encode_numbers(present[at : at + _SIFTED].tolist())

    def take_absent(self) -> int:
        """Return how many numbers were left out since the last call."""
        absent, self._absent = self._absent, 0
        return absent


@dataclass(frozen=True)
class ChunkPlan:
    """The chunks a stream will read, in grid order.

    Parameters
    ----------
    grid : ChunkGrid
        Grid of the array.
    box : tuple of slice
        Region of interest in array coordinates; what `parse_region` returns.
    where : callable, optional
        ``where(index) -> bool`` on the grid index: what it refuses is never read.
    halo : Halo, optional
        What is read around each chunk.
    labels : Labels, optional
        Names, coordinates and attributes that go with what is read.

    Notes
    -----
    ``len(plan)`` is arithmetic without `where`; with it, the first call walks the grid once.

    Examples
    --------
    >>> grid = ChunkGrid((6, 6), (2, 2))
    >>> plan = ChunkPlan(grid, parse_region((slice(1, 3), slice(4, 6)), grid.shape))
    >>> len(plan), list(plan)
    (2, [2, 5])
    >>> plan.region(2)
    (slice(1, 2, None), slice(4, 6, None))
    """

    grid: ChunkGrid
    box: Region
    where: Predicate | None = None
    halo: Halo | None = None
    labels: Labels | None = field(default=None, compare=False, repr=False)

    @cached_property
    def start(self) -> Index:
        """Grid index of the first chunk that the box touches, along each axis."""
        return tuple((s.start - o) // c for s, c, o in zip(self.box, self.grid.chunks, self.grid.begin, strict=True))

    @cached_property
    def stop(self) -> Index:
        """One past the last grid index that the box touches, along each axis."""
        return tuple(
            -((o - s.stop) // c) if s.stop > s.start else (s.start - o) // c
            for s, c, o in zip(self.box, self.grid.chunks, self.grid.begin, strict=True)
        )

    @cached_property
    def whole(self) -> bool:
        """Whether the box is the whole array, so that no chunk is cropped by it."""
        return all(s.start == 0 and s.stop == n for s, n in zip(self.box, self.grid.shape, strict=True))

    @cached_property
    def box_size(self) -> int:
        """Number of chunks that the box touches, whatever `where` says."""
        return math.prod(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def variant(self) -> tuple[Any, ...]:
        """What tells this walk from that of other plans with the same chunks: nothing, for the usual one."""
        return ()

    @cached_property
    def _size(self) -> int:
        return self.box_size if self.where is None else sum(len(run) for run in self.runs())

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        return decode_numbers(self.runs())

    def runs(self, *, by_shard: bool = False) -> Iterator[range]:
        """Walk the planned numbers as ranges, lazily; under a predicate some of them are empty.

        Parameters
        ----------
        by_shard : bool
            Walk one stored object after the other instead of in grid order, so that each is read
            in one go. The same where nothing is sharded.

        Raises
        ------
        UsageError
            If `where` raises; the message names the grid index.
        """
        boxes = self._shard_boxes() if by_shard else iter([(self.start, self.stop)])
        for start, stop in boxes:
            rows = self.grid.rows(start, stop)
            if self.where is None:
                yield from rows
            else:
                for row in rows:
                    # In short pieces: the first item of a long row must not wait for its last.
                    for at in range(0, len(row), _PIECE):
                        yield range(0)  # each piece begins with an empty run: who walks can count and stop
                        yield from _pack(n for n in row[at : at + _PIECE] if self._wants(n))

    def runs_along(self, axes: Sequence[int]) -> Iterator[range]:
        """Walk all that lies at one place along some axes, then all at the next.

        Places are whole stored objects: a shard is read in one go.

        Parameters
        ----------
        axes : sequence of int
            In ascending order.

        Examples
        --------
        >>> plan = ChunkPlan(ChunkGrid((3, 2), (1, 1)), (slice(0, 3), slice(0, 2)))
        >>> list(plan.runs_along((1,)))
        [range(0, 5, 2), range(1, 6, 2)]
        """
        if tuple(axes) == tuple(range(len(axes))):
            yield from self.runs(by_shard=True)  # grid order does the same
            return
        numbers = decode_numbers(row for start, stop in self._shard_boxes(axes) for row in self.grid.rows(start, stop))
        while piece := list(itertools.islice(numbers, _PIECE)):
            if self.where is not None:
                yield range(0)
                piece = [number for number in piece if self._wants(number)]
            yield from _pack(iter(piece))

    def _shard_boxes(self, first_axes: Sequence[int] = ()) -> Iterator[tuple[Index, Index]]:
        if (self.grid.shards is None and not first_axes) or not self.box_size:
            yield self.start, self.stop
            return
        per = self.grid.chunks_per_shard
        first = tuple(a // p for a, p in zip(self.start, per, strict=True))
        last = tuple(-(-b // p) for b, p in zip(self.stop, per, strict=True))
        # The axes in the order in which they are walked, the slowest first.
        order = [*first_axes, *(axis for axis in range(self.grid.ndim) if axis not in first_axes)]
        back = [order.index(axis) for axis in range(self.grid.ndim)]
        shards = self.grid.shard_grid
        walked = ChunkGrid(tuple(shards.shape[a] for a in order), tuple(shards.chunks[a] for a in order))
        for row in walked.rows([first[a] for a in order], [last[a] for a in order]):
            for shard in row:
                place = walked.index(shard)
                index = [place[i] for i in back]
                yield (
                    tuple(max(i * p, a) for i, p, a in zip(index, per, self.start, strict=True)),
                    tuple(min((i + 1) * p, b) for i, p, b in zip(index, per, self.stop, strict=True)),
                )

    def _wants(self, number: int) -> bool:
        assert self.where is not None
        index = self.grid.index(number)
        try:
            return bool(self.where(index))
        except Exception as error:
            raise UsageError(
                f"where({index}) raised {type(error).__name__}: {error}; "
                "it is called with the grid index, a tuple of int"
            ) from error

    def region(self, number: int) -> Region:
        """Region of chunk `number` in array coordinates, cropped to the array and to the box."""
        region = self.grid.region(number)
        if self.whole:
            return region
        return tuple(slice(max(r.start, b.start), min(r.stop, b.stop)) for r, b in zip(region, self.box, strict=True))
