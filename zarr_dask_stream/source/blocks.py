"""Items that are no stored chunks: boxes of another shape, with neighbours around them, of several arrays at once.

A `Blocks` says how the boxes lie and which arrays they are cut from. Its grid takes the place of the chunk
grid in a plan; everything above counts boxes as it counts chunks. `assemble` reads them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.scalars import as_whole
from zarr_dask_stream.source.array import ArraySpec
from zarr_dask_stream.source.grid import ChunkGrid, Index, Region
from zarr_dask_stream.source.halo import Halo, Segment, no_halo

__all__ = ["Blocks", "Member", "axis_number", "common_chunks", "parse_chunks"]

_MOST_ALIGNED = 2**28  # bytes of a box that is grown until it holds whole chunks of every array


@dataclass(frozen=True)
class Member:
    """One array that boxes are cut from.

    Parameters
    ----------
    spec : ArraySpec
        The array.
    axes : tuple of int
        For each axis of the array, the axis of the boxes' grid along which it lies.
    coord : bool
        Whether it is read only to label the others.
    """

    spec: ArraySpec
    axes: tuple[int, ...]
    coord: bool = False


@dataclass(frozen=True)
class Blocks:
    """How one or several arrays are cut into boxes.

    Parameters
    ----------
    grid : ChunkGrid
        The boxes.
    members : tuple of (str, Member)
        The arrays by name.
    halo : Halo, optional
        What is read around each box.
    named : bool
        Whether an item's data are a dict by name, or the array of the only member.
    dims : tuple of str, optional
        Names of the axes of the grid.

    Examples
    --------
    >>> import zarr
    >>> from zarr_dask_stream.source.array import open_array
    >>> spec = open_array(zarr.create_array({}, shape=(6, 4), chunks=(2, 2), dtype="i2"))
    >>> blocks = Blocks.of(spec, (3, 4))
    >>> blocks.nbytes, [list(needs) for needs in blocks.needs((slice(0, 3), slice(0, 4)))]
    (24, [[0, 1, 2, 3]])
    """

    grid: ChunkGrid
    members: tuple[tuple[str, Member], ...]
    halo: Halo | None = None
    named: bool = False
    dims: tuple[str, ...] | None = None
    _halo: Halo = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_halo", self.halo or no_halo(self.grid.ndim))

    @classmethod
    def of(
        cls, spec: ArraySpec, chunks: Sequence[int], halo: Halo | None = None, origin: Index | None = None
    ) -> Blocks:
        """Cut one array into boxes of shape `chunks`, the first of which begins at `origin`."""
        grid = ChunkGrid(spec.shape, tuple(chunks), origin=origin)
        return cls(grid, (("", Member(spec, tuple(range(len(spec.shape))))),), halo)

    @cached_property
    def axes(self) -> dict[str, tuple[int, ...]]:
        """Along which axes of the grid each array lies; without those that only label others."""
        return {name: member.axes for name, member in self.members if not member.coord}

    @property
    def nbytes(self) -> int:
        """Decoded bytes of a full box with what is around it, all arrays together."""
        shape = [c + sum(pair) for c, pair in zip(self.grid.chunks, self._halo.depth, strict=True)]
        return sum(math.prod(shape[a] for a in m.axes) * m.spec.item_nbytes for _, m in self.members)

    @property
    def fingerprints(self) -> list[list[Any]]:
        """What makes these boxes these and no others, as plain values."""
        return [[name, m.spec.fingerprint, m.spec.url, list(m.axes)] for name, m in self.members]

    @property
    def whole(self) -> bool:
        """Whether every box is made of whole chunks, so that no chunk is read for two of them."""
        return not self._halo and all(
            (self.grid.chunks[a] % c == 0 and self.grid.begin[a] % c == 0) or self.grid.chunks[a] >= n
            for _, m in self.members
            for a, c, n in zip(m.axes, m.spec.chunks, m.spec.shape, strict=True)
        )

    def shape(self, member: Member, region: Region) -> Index:
        """Shape of what is put together for one array, elements."""
        full = self._halo.shape(region, self.grid.shape)
        return tuple(full[a] for a in member.axes)

    def segments(self, member: Member, region: Region) -> list[list[Segment]]:
        """Return where each element comes from: runs for each axis of the array."""
        return [
            self._halo.segments(a, region[a].start, region[a].stop, n)
            for a, n in zip(member.axes, member.spec.shape, strict=True)
        ]

    def needs(self, region: Region) -> Iterator[Iterator[int]]:
        """For each array, the numbers of the chunks that a box needs, in C order."""
        for _, member in self.members:
            runs = zip(self.segments(member, region), member.spec.chunks, strict=True)
            spans = [_touched(segments, length) for segments, length in runs]
            yield (member.spec.grid.number(place) for place in itertools.product(*spans))

    def touching(self, member: Member, number: int) -> Iterator[int]:
        """Numbers of the boxes that need a stored chunk, neighbours and wrapped edges included."""
        spans: list[Iterable[int]] = [range(n) for n in self.grid.grid_shape]
        for axis, part in zip(member.axes, member.spec.grid.region(number), strict=True):
            length, size, begin = self.grid.shape[axis], self.grid.chunks[axis], self.grid.begin[axis]
            before, after = self._halo.depth[axis]
            low, high = max(part.start - after, begin), min(part.stop + before, length)
            places = {*range((low - begin) // size, -((begin - high) // size))}
            # At the edge, elements are read again or from the other end.
            edge = max(before, after) if isinstance(self._halo.boundary[axis], str) else 0
            if part.start < edge or part.stop > length - edge:
                places |= {*range(-(-edge // size)), *range(max(length - edge, 0) // size, -(-length // size))}
            spans[axis] = sorted(n for n in places if n < self.grid.grid_shape[axis])
        return (self.grid.number(place) for place in itertools.product(*spans))


def _touched(segments: Iterable[Segment], length: int) -> list[int]:
    """Positions, along one axis, of the chunks that runs touch."""
    found: set[int] = set()
    for _, source, count, step in segments:
        low = source - count + 1 if step < 0 else source
        high = source if step <= 0 else source + count - 1
        found.update(range(low // length, high // length + 1))
    return sorted(found)


def parse_chunks(chunks: Any, spec: ArraySpec) -> Index:
    """Turn what a caller writes for the shape of boxes into lengths, in the words of Dask.

    Parameters
    ----------
    chunks : int, sequence or mapping of axis to int
        Elements along each axis; -1 for the whole axis, None to keep the length of the stored chunks.

    Raises
    ------
    UsageError
        If the number of axes differs, or a length is neither positive, -1 nor None.

    Examples
    --------
    >>> import zarr
    >>> from zarr_dask_stream.source.array import open_array
    >>> spec = open_array(zarr.create_array({}, shape=(6, 4), chunks=(2, 2), dtype="i2"))
    >>> parse_chunks((-1, None), spec), parse_chunks({0: 4}, spec)
    ((6, 2), (4, 2))
    >>> parse_chunks({"y": 3}, spec)
    Traceback (most recent call last):
        ...
    zarr_dask_stream.errors.UsageError: chunks names axis 'y', and the array has axes 0 to 1 without names
    """
    ndim = len(spec.shape)
    if isinstance(chunks, Mapping):
        given: list[Any] = [None] * ndim
        for axis, length in chunks.items():
            given[axis_number(axis, spec, "chunks")] = length
    elif isinstance(chunks, (tuple, list)):
        given = list(chunks)
    else:
        given = [chunks] * ndim
    if len(given) != ndim:
        raise UsageError(f"chunks has {len(given)} lengths, and the array has {ndim} axes: {chunks!r}")
    lengths = []
    for axis, (length, stored, n) in enumerate(zip(given, spec.chunks, spec.shape, strict=True)):
        lengths.append(stored if length is None else _length(length, n, axis))
    return tuple(lengths)


def _length(length: Any, n: int, axis: int) -> int:
    number = as_whole(length)
    if number is None or not (number >= 1 or number == -1):
        raise UsageError(
            f"chunks along axis {axis} is a number of elements, -1 for the whole axis or None to keep the stored "
            f"length, got {length!r}"
        )
    return max(n, 1) if number == -1 else min(number, max(n, 1))


def axis_number(axis: Any, spec: ArraySpec, what: str) -> int:
    """Return the number of an axis that is given by number or by dimension name.

    Raises
    ------
    UsageError
        If there is no such axis.
    """
    ndim, names = len(spec.shape), spec.dimension_names
    if isinstance(axis, str) and names is not None and axis in names:
        return names.index(axis)
    number = as_whole(axis)
    if number is not None and -ndim <= number < ndim:
        return number % ndim
    called = "without names" if names is None or not any(names) else f"called {', '.join(map(repr, names))}"
    raise UsageError(f"{what} names axis {axis!r}, and the array has axes 0 to {ndim - 1} {called}")


def common_chunks(lengths: Sequence[Sequence[int]], shape: Sequence[int], item_nbytes: int) -> Index:
    """Return the shape of the smallest boxes that hold whole chunks of several arrays.

    Parameters
    ----------
    lengths : sequence of sequence of int
        For each axis, the chunk lengths of the arrays that lie along it.
    shape : sequence of int
        Lengths of the axes.
    item_nbytes : int
        Bytes of one place, all arrays together: boxes that would pass 256 MiB are refused.

    Raises
    ------
    UsageError
        If such boxes would be too large.

    Examples
    --------
    >>> common_chunks([[2, 3], [5]], [100, 9], 4)
    (6, 5)
    """
    chunks = tuple(
        min(math.lcm(*along), max(n, 1)) if along else max(n, 1) for along, n in zip(lengths, shape, strict=True)
    )
    nbytes = math.prod(chunks) * item_nbytes
    if nbytes > _MOST_ALIGNED:
        raise UsageError(
            f"the arrays' chunks {[list(along) for along in lengths]} (by axis) only meet in boxes of {list(chunks)}, "
            f"{nbytes / 2**20:,.0f} MiB each; give chunks= for smaller boxes (some chunks are then read more than once)"
        )
    return chunks
