"""The smallest and the largest value, and where they are."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.stages.placed import Statistic
from zarr_dask_stream.stages.values import Axes, Values, can_be_nan, is_nan

__all__ = ["ArgMax", "ArgMin", "Max", "Min"]


class Min(Statistic):
    """The smallest value, of the data's own type; dates and durations too.

    Parameters
    ----------
    axis : int or sequence of int, optional
        Axes to reduce; None: all.
    skipna : bool
        Leave NaN and NaT out, or let them through.
    placed : bool
        Return the region of the answer with it.

    Raises
    ------
    UsageError
        At the end, if there were only empty arrays of a type that has no NaN.

    Examples
    --------
    >>> from zarr_dask_stream import Chunk, reducers
    >>> data = np.array([3, 1, 2], "u1")
    >>> reducer = reducers.min()
    >>> reducer.finish(reducer.add(reducer.create(), Chunk((0,), (slice(0, 3),), data)))
    np.uint8(1)
    """

    name = "min"
    _kinds = "biufmM"
    _strict: ClassVar[np.ufunc] = np.minimum
    _lenient: ClassVar[np.ufunc] = np.fmin

    # The state is the extreme so far, or an empty array of the data's type while there is none.

    def _block(self, values: Values, axes: Axes) -> Any:
        if values.size == 0:
            return np.empty(0, values.dtype)
        value = self._strict.reduce(values, axis=axes)
        if self.skipna and can_be_nan(values) and is_nan(np.asarray(value)).any():
            value = self._lenient.reduce(values, axis=axes)
        return value

    def _join(self, left: Any, right: Any) -> Any:
        if left.size == 0 or right.size == 0:
            return right if left.size == 0 else left
        join = self._lenient if self.skipna else self._strict
        return join(left, right)

    def _answer(self, state: Any) -> Any:
        if state.size:
            return state
        dtype = state.dtype
        if dtype.kind in "biu":
            raise UsageError(
                f"{self!r} of no values at all: {dtype} has no NaN to say so. A filter or map before it left nothing "
                f"over; return float64 from the map to get NaN instead"
            )
        return np.array("NaT", dtype)[()] if dtype.kind in "mM" else dtype.type(math.nan)


class Max(Min):
    """The largest value, of the data's own type; dates and durations too.

    Parameters
    ----------
    axis : int or sequence of int, optional
        Axes to reduce; None: all.
    skipna : bool
        Leave NaN and NaT out, or let them through.
    placed : bool
        Return the region of the answer with it.

    Raises
    ------
    UsageError
        At the end, if there were only empty arrays of a type that has no NaN.

    Examples
    --------
    >>> from zarr_dask_stream import Chunk, reducers
    >>> data = np.array(["2024-05-01", "NaT", "2023-01-01"], "M8[D]")
    >>> reducer = reducers.max()
    >>> reducer.finish(reducer.add(reducer.create(), Chunk((0,), (slice(0, 3),), data)))
    np.datetime64('2024-05-01')
    """

    name = "max"
    _strict = np.maximum
    _lenient = np.fmax


_Found = tuple[Any, tuple[int, ...]]  # the value, and where it is


class ArgMin(Statistic):
    """Where the smallest value is: a tuple of int in array coordinates; of equals, the first in C order.

    Parameters
    ----------
    skipna : bool
        Leave NaN and NaT out; or else the first of them is what is found, as in NumPy.

    Raises
    ------
    UsageError
        At the end, if there was no value at all, because nothing is nowhere.

    Examples
    --------
    >>> from zarr_dask_stream import Chunk, reducers
    >>> reducer = reducers.argmin()
    >>> chunk = Chunk((1, 0), (slice(10, 12), slice(0, 2)), np.array([[7, 5], [6, 9]]))
    >>> reducer.finish(reducer.add(reducer.create(), chunk))
    (10, 1)
    """

    name = "argmin"
    _kinds = "biufmM"
    _lenient: ClassVar[np.ufunc] = np.fmin
    _beats: ClassVar[np.ufunc] = np.less
    _first: ClassVar[Any] = staticmethod(np.argmin)

    def __init__(self, *, skipna: bool = True) -> None:
        super().__init__(skipna=skipna)

    def add(self, partial: Any, chunk: Chunk) -> Any:
        """Fold one chunk; its values have to have the shape of its region."""
        values = self._values(chunk.data)
        self._check_shape(values, chunk)
        with np.errstate(all="ignore"):
            found = self._find(values)
            if found is None:
                return partial
            corner = np.unravel_index(found[1], values.shape)
            place = tuple(int(i) + part.start for i, part in zip(corner, chunk.region, strict=True))
            state = (found[0], place)
            return state if partial is None else self._join(partial, state)

    def _find(self, values: Values) -> tuple[Any, int] | None:
        if values.size == 0:
            return None
        first = int(self._first(values))
        value = values.flat[first]
        if self.skipna and can_be_nan(values) and is_nan(value):
            value = self._lenient.reduce(values, axis=None)
            if is_nan(value):
                return None
            first = int(np.argmax(values == value))
        return value, first

    def _join(self, left: _Found, right: _Found) -> _Found:
        lost = [can_be_nan(value) and bool(is_nan(value)) for value, _ in (left, right)]
        if lost[0] != lost[1]:
            return left if lost[0] else right
        if not lost[0] and left[0] != right[0]:
            return left if self._beats(left[0], right[0]) else right
        return left if left[1] <= right[1] else right

    def _answer(self, state: _Found) -> tuple[int, ...]:
        return state[1]

    def _empty(self) -> Any:
        raise UsageError(f"{self!r} of no values at all: there is no place to name")


class ArgMax(ArgMin):
    """Where the largest value is: a tuple of int in array coordinates; of equals, the first in C order.

    Parameters
    ----------
    skipna : bool
        Leave NaN and NaT out; or else the first of them is what is found, as in NumPy.

    Raises
    ------
    UsageError
        At the end, if there was no value at all, because nothing is nowhere.

    Examples
    --------
    >>> from zarr_dask_stream import Chunk, reducers
    >>> reducer = reducers.argmax()
    >>> chunk = Chunk((1,), (slice(4, 7),), np.array([np.nan, 2.0, 3.0]))
    >>> reducer.finish(reducer.add(reducer.create(), chunk))
    (6,)
    """

    name = "argmax"
    _lenient = np.fmax
    _beats = np.greater
    _first = staticmethod(np.argmax)
