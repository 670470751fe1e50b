"""Elements around a box: how far they reach, and what stands in for them beyond the array's edge. Arithmetic.

The words for the edge are those of ``dask.array.overlap``: "periodic", "reflect" (the element at the edge is
repeated), "nearest", a constant, or None for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.scalars import as_whole
from zarr_dask_stream.source.grid import Region

__all__ = ["Boundary", "Halo", "Segment", "no_halo", "parse_halo"]

Boundary = str | int | float | complex | None
_WORDS = ("periodic", "reflect", "nearest")


class Segment(NamedTuple):
    """A run of elements along one axis: where it goes, and where it comes from.

    Attributes
    ----------
    place : int
        First element in what is put together.
    source : int
        First element in array coordinates; the last one where it is read backwards.
    size : int
        Elements to fill.
    step : int
        1 forwards, -1 backwards (`source` is then the highest element), 0 for one element many times.
    """

    place: int
    source: int
    size: int
    step: int


@dataclass(frozen=True)
class Halo:
    """How many elements around each box are read with it.

    Parameters
    ----------
    depth : tuple of (int, int)
        Elements before and after, along each axis.
    boundary : tuple of Boundary
        What stands beyond the edge of the array, along each axis.

    Examples
    --------
    >>> halo = Halo(((1, 1),), ("periodic",))
    >>> halo.segments(0, 0, 3, 9)
    [Segment(place=0, source=8, size=1, step=1), Segment(place=1, source=0, size=4, step=1)]
    >>> Halo(((1, 1),), (None,)).shape((slice(0, 3),), (9,))
    (4,)
    """

    depth: tuple[tuple[int, int], ...]
    boundary: tuple[Boundary, ...]

    def __bool__(self) -> bool:
        return any(before or after for before, after in self.depth)

    def reach(self, axis: int, start: int, stop: int, length: int) -> tuple[int, int]:
        """Return how many elements come before and after ``start:stop`` along `axis`."""
        before, after = self.depth[axis]
        if self.boundary[axis] is None:
            return min(before, start), min(after, length - stop)
        return before, after

    def shape(self, region: Region, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of a box with what is around it."""
        return tuple(
            sum(self.reach(axis, part.start, part.stop, length)) + part.stop - part.start
            for axis, (part, length) in enumerate(zip(region, shape, strict=True))
        )

    def core(self, region: Region, shape: Sequence[int]) -> Region:
        """Where the box itself lies in what is put together."""
        starts = (
            self.reach(axis, p.start, p.stop, n)[0] for axis, (p, n) in enumerate(zip(region, shape, strict=True))
        )
        return tuple(slice(a, a + part.stop - part.start) for a, part in zip(starts, region, strict=True))

    def segments(self, axis: int, start: int, stop: int, length: int) -> list[Segment]:
        """Return where the elements around and in ``start:stop`` come from, as runs along `axis`."""
        before, after = self.reach(axis, start, stop, length)
        inside = Segment(max(before - start, 0), max(start - before, 0), 0, 1)
        inside = inside._replace(size=min(stop + after, length) - inside.source)
        low, high = inside.place, max(stop + after - length, 0)
        boundary = self.boundary[axis]
        end = inside.place + inside.size
        around: list[Segment] = []
        if boundary == "periodic":
            around = [Segment(0, length - low, low, 1), Segment(end, 0, high, 1)]
        elif boundary == "reflect":
            around = [Segment(0, low - 1, low, -1), Segment(end, length - 1, high, -1)]
        elif boundary == "nearest":
            around = [Segment(0, 0, low, 0), Segment(end, length - 1, high, 0)]
        return sorted(segment for segment in [inside, *around] if segment.size)


def no_halo(ndim: int) -> Halo:
    """Return the halo of nothing around nothing."""
    return Halo(((0, 0),) * ndim, (None,) * ndim)


def parse_halo(depth: Any, boundary: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Halo:
    """Turn what a caller writes into a `Halo`.

    Parameters
    ----------
    depth : int, (int, int), sequence of these, or mapping of axis to these
        Elements around each box: for all axes, for each, or for those named.
    boundary : str, number, None, sequence or mapping of axis to these
        What stands beyond the array's edge.
    shape : tuple of int
        Shape of the array, elements.
    dtype : numpy.dtype
        Of the array: a constant has to fit into it.

    Raises
    ------
    UsageError
        If an axis does not exist, a depth is negative or larger than the array, or a word is not known.

    Examples
    --------
    >>> parse_halo({-1: 2}, "nearest", (4, 6), np.dtype("f4"))
    Halo(depth=((0, 0), (2, 2)), boundary=('nearest', 'nearest'))
    """
    depths = tuple(_pair(one, axis) for axis, one in enumerate(_by_axis(depth, 0, len(shape), "depth")))
    boundaries = tuple(_boundary(one, dtype) for one in _by_axis(boundary, None, len(shape), "boundary"))
    for axis, (pair, length) in enumerate(zip(depths, shape, strict=True)):
        if max(pair) > length:
            raise UsageError(
                f"halo: depth {max(pair)} along axis {axis} is more than the array's {length} elements; "
                "at most the array's length can be put around a box"
            )
    return Halo(depths, boundaries)


def _by_axis(given: Any, default: Any, ndim: int, what: str) -> list[Any]:
    if isinstance(given, Mapping):
        full = [default] * ndim
        for axis, one in given.items():
            number = as_whole(axis)
            if number is None or not -ndim <= number < ndim:
                raise UsageError(f"halo: {what} names axis {axis!r}, and the array has axes 0 to {ndim - 1}")
            full[number] = one
        return full
    if isinstance(given, (tuple, list)):
        if len(given) != ndim:
            raise UsageError(
                f"halo: {what} has {len(given)} entries for {ndim} axes; give one for each axis, one for all, or a "
                "dict by axis"
            )
        return list(given)
    return [given] * ndim


def _pair(depth: Any, axis: int) -> tuple[int, int]:
    pair = [as_whole(one) for one in (depth if isinstance(depth, (tuple, list)) else (depth, depth))]
    if len(pair) != 2 or pair[0] is None or pair[1] is None or min(pair[0], pair[1]) < 0:
        raise UsageError(f"halo: depth along axis {axis} is a number of elements >= 0, or two, got {depth!r}")
    return pair[0], pair[1]


def _boundary(boundary: Any, dtype: np.dtype[Any]) -> Boundary:
    if boundary is None:
        return None
    if isinstance(boundary, str):
        if boundary == "none":
            return None
        if boundary not in _WORDS:
            raise UsageError(f"halo: boundary is {', '.join(map(repr, _WORDS))}, a constant or None, got {boundary!r}")
        return boundary
    if not _fits(boundary, dtype):
        raise UsageError(f"halo: a constant boundary has to fit the array's dtype {dtype}, got {boundary!r}")
    return boundary  # type: ignore[no-any-return]  # a number


def _fits(value: Any, dtype: np.dtype[Any]) -> bool:
    try:
        given = np.asarray(value)
        if given.ndim or given.dtype.kind not in "biufc":
            return False
        if given != given:  # noqa: PLR0124  # only NaN differs from itself
            return dtype.kind in "fc"
        with np.errstate(all="ignore"):
            return bool(given.astype(dtype) == given) or dtype.kind in "fc"  # 0.1 is never quite a float32
    except (TypeError, ValueError, OverflowError):
        return False
