"""Sums without loss: integers exactly, floats together with what their roundings have cost."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from zarr_dask_stream.stages.values import INT64_LIMIT, Axes, Values, reduced, valid_sum

__all__ = ["Average", "Total", "add_totals", "average", "total_value"]

_HALF = 1 << 32


class Total(NamedTuple):
    """A sum: exact integers, or a float and what its roundings have cost so far.

    `high` is an int, or an array of int64 or of Python's integers, while `low` is None; it is a float
    (or an array of them) otherwise, and the sum is ``high + low``.
    """

    high: Any
    low: Any


class Average(NamedTuple):
    """How many values, and their sum."""

    count: Any
    total: Total


def average(values: Values, axes: Axes, *, skipna: bool) -> Average:
    """Count and sum a block of values."""
    if values.dtype.kind in "biu":
        return Average(reduced(values, axes), Total(_exact_sum(values, axes), None))
    n, high, _ = valid_sum(values, axes, skipna=skipna)
    return Average(n, Total(high, high * 0))


def _exact_sum(values: Values, axes: Axes) -> Any:
    """Sum integers without overflow: in int64 where the bounds of the values allow it, else in halves."""
    if values.size == 0 or (values.dtype.itemsize <= 4 and values.size < 1 << 31):
        total = values.sum(axis=axes, dtype=np.int64)
    else:
        largest = max(-int(values.min()), int(values.max()))
        if largest * reduced(values, axes) < INT64_LIMIT:
            total = values.sum(axis=axes, dtype=np.int64)
        else:
            # Each half has 32 bits, so neither sum can overflow for any chunk that fits into memory.
            upper = np.asarray((values >> 32).sum(axis=axes, dtype=np.int64)).astype(object)
            lower = np.asarray((values & (_HALF - 1)).sum(axis=axes, dtype=np.int64)).astype(object)
            total = upper * _HALF + lower
    return int(total) if np.ndim(total) == 0 else total


def _add_exact(left: Any, right: Any) -> Any:
    if isinstance(left, int):
        return left + right
    if left.dtype == np.int64 == right.dtype:
        total = left + right
        wrapped = (left ^ total) & (right ^ total)  # negative where the sign is not that of the true sum
        if not (wrapped < 0).any():
            return total
        left = left.astype(object)
    return left + right


def add_totals(left: Total, right: Total) -> Total:
    """Join sums; floats with Knuth's TwoSum, so that the order of many chunks hardly matters.

    D. E. Knuth, The Art of Computer Programming, vol. 2, 4.2.2, theorem B.
    """
    if left.low is None and right.low is None:
        return Total(_add_exact(left.high, right.high), None)
    left, right = _rounded(left), _rounded(right)
    high = left.high + right.high
    part = high - left.high
    lost = (left.high - (high - part)) + (right.high - part)
    return Total(high, left.low + right.low + lost)


def _rounded(total: Total) -> Total:
    if total.low is not None:
        return total
    high = np.asarray(total.high).astype(np.float64)[()]
    return Total(high, high * 0)


def total_value(total: Total) -> Any:
    """Return the sum as one number, or one array."""
    if total.low is None:
        return total.high
    # Where infinities took part the correction is NaN, and the plain sum is right.
    return np.where(np.isfinite(total.high), total.high + total.low, total.high)[()]
