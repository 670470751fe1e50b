"""What the ready-made reducers ask of values: which can be NaN, how many take part, what to accumulate in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "INT64_LIMIT",
    "Axes",
    "Axis",
    "Values",
    "can_be_nan",
    "is_int",
    "is_nan",
    "narrowed",
    "reduced",
    "valid_length",
    "valid_sum",
    "wide",
]

Values = npt.NDArray[Any]
Axes = tuple[int, ...] | None
Axis = int | Sequence[int] | None

INT64_LIMIT = 1 << 63


def is_int(value: Any) -> bool:
    """Whether it is an integer, Python's or NumPy's; a bool is none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def reduced(values: Values, axes: Axes) -> int:
    """Count the elements that go into one element of the answer."""
    return values.size if axes is None else math.prod(values.shape[axis] for axis in axes)


def is_nan(values: Values) -> Values:
    """Tell NaN, or NaT, element by element."""
    return np.isnat(values) if values.dtype.kind in "mM" else np.isnan(values)


def can_be_nan(values: Values) -> bool:
    """Whether the type has a NaN or NaT at all."""
    return values.dtype.kind in "fcmM"


def wide(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type to accumulate in: double precision or better."""
    return np.promote_types(dtype, np.complex128 if dtype.kind == "c" else np.float64)


def narrowed(total: Values) -> Values:
    """Turn Python's integers into int64 or uint64, if one of them can hold all."""
    low, high = total.min(initial=0), total.max(initial=0)
    if not isinstance(low, int) or not isinstance(high, int):
        return total
    if low >= -INT64_LIMIT and high < INT64_LIMIT:
        return total.astype(np.int64)
    return total.astype(np.uint64) if low >= 0 and high < 2 * INT64_LIMIT else total


def valid_sum(
    values: Values, axes: Axes, *, skipna: bool, keepdims: bool = False
) -> tuple[Any, Any, npt.NDArray[np.bool_] | None]:
    """Sum what takes part; return the count, the sum and, where NaN was left out, its places."""
    dtype = wide(values.dtype)
    n = reduced(values, axes)
    total = values.sum(axis=axes, dtype=dtype, keepdims=keepdims)
    if not skipna or not np.isnan(total).any():  # the sum tells for nothing whether it is worth looking for NaN
        return n, total, None
    nans = np.isnan(values)
    total = np.where(nans, values.dtype.type(0), values).sum(axis=axes, dtype=dtype, keepdims=keepdims)
    return n - np.count_nonzero(nans, axis=axes, keepdims=keepdims), total, nans


def valid_length(ranked: Values) -> int:
    """Count what lies before the NaN in sorted values."""
    if ranked.size == 0 or ranked.dtype.kind != "f" or not np.isnan(ranked[-1]):
        return ranked.size
    return int(np.searchsorted(ranked, ranked.dtype.type(math.nan)))
