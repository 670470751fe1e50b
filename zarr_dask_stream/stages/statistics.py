"""Counts, sums and means."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from zarr_dask_stream.stages.placed import Statistic
from zarr_dask_stream.stages.sums import Average, Total, add_totals, average, total_value
from zarr_dask_stream.stages.values import Axes, Axis, Values, can_be_nan, is_nan, reduced

__all__ = ["Count", "Mean", "NanCount", "Sum"]


class Count(Statistic):
    """How many values are not NaN (or NaT).

    Parameters
    ----------
    axis : int or sequence of int, optional
        Axes to reduce; None: all.
    placed : bool
        Return the region of the answer with it.

    Examples
    --------
    >>> from zarr_dask_stream import Chunk, reducers
    >>> data = np.array([1.0, np.nan, 3.0])
    >>> reducer = reducers.count()
    >>> reducer.finish(reducer.add(reducer.create(), Chunk((0,), (slice(0, 3),), data)))
    2
    """

    name = "count"
    _kinds = "biufcmM"
    _nothing = 0

    def __init__(self, axis: Axis = None, *, placed: bool = False) -> None:
        super().__init__(axis, placed=placed)

    def _block(self, values: Values, axes: Axes) -> Any:
        n = reduced(values, axes)
        if axes is None:
            return n - int(np.count_nonzero(is_nan(values))) if can_be_nan(values) else n
        if can_be_nan(values):
            return n - np.count_nonzero(is_nan(values), axis=axes)
        return np.full([length for axis, length in enumerate(values.shape) if axis not in axes], n, np.int64)

    def _join(self, left: Any, right: Any) -> Any:
        return left + right

    def _answer(self, state: Any) -> Any:
        return int(state) if np.ndim(state) == 0 else state


class NanCount(Count):
    """How many values are NaN (or NaT); 0 for types that have no NaN.

    Parameters
    ----------
    axis : int or sequence of int, optional
        Axes to reduce; None: all.
    placed : bool
        Return the region of the answer with it.

    Examples
    --------
    >>> from zarr_dask_stream import Chunk, reducers
    >>> data = np.array([[1.0, np.nan], [3.0, np.nan]])
    >>> reducer = reducers.nan_count(axis=0)
    >>> reducer.finish(reducer.add(reducer.create(), Chunk((0, 0), (slice(0, 2), slice(0, 2)), data)))
    array([0, 2])
    """

    name = "nan_count"

    def _block(self, values: Values, axes: Axes) -> Any:
        return reduced(values, axes) - super()._block(values, axes)


class Sum(Statistic):
    """The sum: exact for integers and booleans, else in double precision with its roundings made good.

    Parameters
    ----------
    axis : int or sequence of int, optional
        Axes to reduce; None: all.
    skipna : bool
        Leave NaN out, or let it through.
    placed : bool
        Return the region of the answer with it.

    Notes
    -----
    The sum of integers is a Python int, or an array of int64, of uint64 or, where those are too small,
    of Python ints. Floats and complex numbers give double precision (or longdouble, of longdouble).

    Examples
    --------
    >>> from zarr_dask_stream import Chunk, reducers
    >>> data = np.array([2**63 - 1, 2**63 - 1])
    >>> reducer = reducers.sum()
    >>> reducer.finish(reducer.add(reducer.create(), Chunk((0,), (slice(0, 2),), data)))
    18446744073709551614
    """

    name = "sum"
    _kinds = "biufc"
    _nothing = 0

    def _block(self, values: Values, axes: Axes) -> Total:
        return average(values, axes, skipna=self.skipna)[1]

    def _join(self, left: Total, right: Total) -> Total:
        return add_totals(left, right)

    def _answer(self, state: Total) -> Any:
        return total_value(state)


class Mean(Statistic):
    """The arithmetic mean, in double precision.

    Parameters
    ----------
    axis : int or sequence of int, optional
        Axes to reduce; None: all.
    skipna : bool
        Leave NaN out, or let it through.
    placed : bool
        Return the region of the answer with it.

    Notes
    -----
    The sum divided by the count, the sum as in `Sum`: exact for integers.

    Examples
    --------
    >>> from zarr_dask_stream import Chunk, reducers
    >>> data = np.array([[1, 2], [3, 6]], "i2")
    >>> chunk = Chunk((0, 0), (slice(0, 2), slice(0, 2)), data)
    >>> reducers.mean().finish(reducers.mean().add(reducers.mean().create(), chunk))
    np.float64(3.0)
    >>> over_rows = reducers.mean(axis=0)
    >>> over_rows.finish(over_rows.add(over_rows.create(), chunk))
    array([2., 4.])
    """

    name = "mean"
    _kinds = "biufc"

    def _block(self, values: Values, axes: Axes) -> Average:
        return average(values, axes, skipna=self.skipna)

    def _join(self, left: Average, right: Average) -> Average:
        return left[0] + right[0], add_totals(left[1], right[1])

    def _answer(self, state: Average) -> Any:
        count, total = state[0], total_value(state[1])
        if isinstance(total, int):
            return np.float64(total / count if count else math.nan)
        mean = total / count
        return mean.astype(np.float64) if mean.dtype == object else mean
