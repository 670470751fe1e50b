"""Sums without loss: integers exactly, floats together with what their roundings have cost."""

from __future__ import annotations

from typing import Any

import numpy as np

from zarr_dask_stream.stages.values import INT64_LIMIT, Axes, Values, reduced, valid_sum

__all__ = ["Average", "Total", "add_totals", "average", "total_value"]

_HALF = 1 << 32


# Partials are plain values throughout, because a checkpoint keeps them as JSON.
#
# A total is (high, low). Integers: low is None, and high an int, an array of int64 or, beyond 64 bits, nested lists of
# int. Otherwise both are floats (or arrays of them): the sum is high + low, where low is what roundings have cost.
Total = tuple[Any, Any]
Average = tuple[Any, Total]  # how many values, and their total


def average(values: Values, axes: Axes, *, skipna: bool) -> Average:
    """Count and sum a block of values."""
    if values.dtype.kind in "biu":
        return reduced(values, axes), (_exact_sum(values, axes), None)
    n, high, _ = valid_sum(values, axes, skipna=skipna)
    return n, (high, high * 0)


def _exact_sum(values: Values, axes: Axes) -> Any:
    """Sum integers without overflow: in int64 where the bounds of the values allow it, else in halves."""
    if _sums_fit(values, axes):
        total = values.sum(axis=axes, dtype=np.int64)
        return int(total) if np.ndim(total) == 0 else total
    # Each half has 32 bits, so neither sum can overflow for any chunk that fits into memory.
    upper = np.asarray((values >> 32).sum(axis=axes, dtype=np.int64)).astype(object)
    lower = np.asarray((values & (_HALF - 1)).sum(axis=axes, dtype=np.int64)).astype(object)
    return np.asarray(upper * _HALF + lower, object).tolist()


def _sums_fit(values: Values, axes: Axes) -> bool:
    """Whether no sum can leave int64, by the type or else by the bounds of the values."""
    if values.size == 0 or (values.dtype.itemsize <= 4 and values.size < 1 << 31):
        return True
    return max(-int(values.min()), int(values.max())) * reduced(values, axes) < INT64_LIMIT


def _add_exact(left: Any, right: Any) -> Any:
    if isinstance(left, int):
        return left + right
    if not isinstance(left, list) and not isinstance(right, list):
        total = left + right
        wrapped = (left ^ total) & (right ^ total)  # negative where the sign is not that of the true sum
        if not (wrapped < 0).any():
            return total
    return (np.array(left, object) + np.array(right, object)).tolist()


def add_totals(left: Total, right: Total) -> Total:
    """Join sums; floats with Knuth's TwoSum, so that the order of many chunks hardly matters.

    D. E. Knuth, The Art of Computer Programming, vol. 2, 4.2.2, theorem B.
    """
    if left[1] is None and right[1] is None:
        return _add_exact(left[0], right[0]), None
    (ours, our_low), (theirs, their_low) = _rounded(left), _rounded(right)
    high = ours + theirs
    part = high - ours
    lost = (ours - (high - part)) + (theirs - part)
    return high, our_low + their_low + lost


def _rounded(total: Total) -> Total:
    if total[1] is not None:
        return total
    high = np.asarray(total_value(total)).astype(np.float64)[()]
    return high, high * 0


def total_value(total: Total) -> Any:
    """Return the sum as one number, or one array."""
    high, low = total
    if low is None:
        return np.array(high, object) if isinstance(high, list) else high
    # Where infinities took part the correction is NaN, and the plain sum is right.
    return np.where(np.isfinite(high), high + low, high)[()]
