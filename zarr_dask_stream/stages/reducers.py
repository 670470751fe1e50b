"""Ready-made reducers: the usual statistics, exact where that is possible and sound where it is not.

All of them take the values of ``chunk.data``: an array, or a number after ``.map(...)``. Chunks that
are not stored and were filled take part like any other; ``missing="skip"`` leaves them out.

Rules they share
----------------
NaN
    ``skipna=True`` (the default, as in xarray) leaves NaN out; ``skipna=False`` lets it through to
    the answer. NaT is the NaN of dates and durations.
Precision
    Integers and booleans are summed exactly, however large the sum. Half and single precision are
    accumulated in double precision; nothing is accumulated in less.
Axes
    ``axis=None`` reduces everything to one number. With an axis, or a tuple of axes, the other axes
    are kept: the answer is an array over the smallest box of the kept axes that holds every chunk
    which took part, so under ``region=`` its first element belongs to the start of the region.
    ``placed=True`` returns the box together with the array. A place in the box that no chunk covers
    holds what the statistic is of nothing: 0 for counts and sums, NaN or NaT otherwise (integers become
    float64 for it). What is kept in memory, and travels, is at most the size of the answer for each
    running quantity.
Nothing
    With no value at all, counts and sums are 0 and the rest is NaN; the smallest or largest of no
    integers is a `UsageError`. A stream without chunks has no box: its answer is one number.

A name in this module is a class to be called: ``.reduce(mean(axis=0))``; several go together as a list
or as a dict: ``.reduce([min(), max(), mean()])``.
"""

from __future__ import annotations

import builtins
import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.source.grid import Region
from zarr_dask_stream.stages.combine import Reducer

__all__ = [
    "ArgMax",
    "ArgMin",
    "Count",
    "Histogram",
    "HistogramReducer",
    "Max",
    "Mean",
    "Min",
    "Moments",
    "MomentsReducer",
    "NanCount",
    "Placed",
    "Quantile",
    "Quantiles",
    "Statistic",
    "Std",
    "Sum",
    "Var",
    "argmax",
    "argmin",
    "count",
    "histogram",
    "max",
    "mean",
    "min",
    "moments",
    "nan_count",
    "quantile",
    "std",
    "sum",
    "var",
]

Values = npt.NDArray[Any]
Axes = tuple[int, ...] | None
Axis = int | Sequence[int] | None
Bounds = tuple[tuple[int, int], ...]

_BLOCK = 8192  # elements: a block in double precision (64 KiB) stays in the cache between its passes
_HALF = 1 << 32
_LIMIT = 1 << 63


class Placed(NamedTuple):
    """An answer that keeps axes, and where it lies.

    Attributes
    ----------
    region : tuple of slice
        The box of the kept axes, in array coordinates.
    data : numpy.ndarray or Any
        The answer, of the box's shape.
    """

    region: Region
    data: Any


class Statistic(Reducer):
    """What the ready-made reducers share: checking, placing by region, and joining region by region.

    Parameters
    ----------
    axis : int or sequence of int, optional
        Axes of the array to reduce, negative ones counted from the last; None: all.
    skipna : bool
        Leave NaN (and NaT) out, or let it through.
    placed : bool
        Return ``Placed(region, data)`` instead of the bare array. Needs `axis`.

    Notes
    -----
    A subclass says what it makes of one block of values (`_block`), how two such states of the same
    place join (`_join`, element by element), and what the answer is (`_answer`).
    """

    name: ClassVar[str] = ""
    _kinds: ClassVar[str] = "biuf"
    _nothing: ClassVar[Any] = math.nan

    def __init__(self, axis: Axis = None, *, skipna: bool = True, placed: bool = False) -> None:
        self.axis = _checked_axis(self.name, axis)
        self.skipna = bool(skipna)
        self.placed = bool(placed)
        if self.placed and self.axis is None:
            raise UsageError(f"{self.name}: placed=True needs axis=, because without it there is only one number")

    # -- what a subclass says ---------------------------------------------------------------------

    def _block(self, values: Values, axes: Axes) -> Any:
        raise NotImplementedError

    def _join(self, left: Any, right: Any) -> Any:
        raise NotImplementedError

    def _answer(self, state: Any) -> Any:
        raise NotImplementedError

    def _empty(self) -> Any:
        """Return the answer for a stream without chunks."""
        return self._nothing

    # -- the reducer ------------------------------------------------------------------------------

    def check(self, dtype: npt.DTypeLike, ndim: int | None = None) -> None:
        """Raise `UsageError` if data of `dtype` (with `ndim` axes) can't be reduced so.

        Examples
        --------
        >>> mean(axis=2).check("f4", 2)
        Traceback (most recent call last):
            ...
        zarr_dask_stream.errors.UsageError: mean(axis=2) needs axes from -2 to 1, because the data have 2 axes
        """
        self._check_dtype(np.dtype(dtype))
        if ndim is not None and self.axis is not None:
            self._axes(ndim)

    def create(self) -> Any:
        """Return the partial of nothing."""
        return None if self.axis is None else {}

    def add(self, partial: Any, chunk: Chunk) -> Any:
        """Fold one chunk; the first chunk of an unsuitable dtype or shape raises `UsageError`."""
        values = self._values(chunk.data)
        with np.errstate(all="ignore"):
            if self.axis is None:
                state = self._block(values, None)
                return state if partial is None else self._join(partial, state)
            bounds, axes = self._place(values, chunk)
            state = self._block(values, axes)
            partial[bounds] = self._join(partial[bounds], state) if bounds in partial else state
        return partial

    def merge(self, left: Any, right: Any) -> Any:
        """Join two partials, region by region."""
        with np.errstate(all="ignore"):
            if self.axis is None:
                if left is None or right is None:
                    return right if left is None else left
                return self._join(left, right)
            for bounds, state in right.items():
                left[bounds] = self._join(left[bounds], state) if bounds in left else state
        return left

    def finish(self, partial: Any) -> Any:
        """Return the answer."""
        if partial is None if self.axis is None else not partial:
            answer = self._empty()
            return Placed((), answer) if self.placed else answer
        with np.errstate(all="ignore"):
            if self.axis is None:
                return self._answer(partial)
            region, answer = self._assemble(partial)
        return Placed(region, answer) if self.placed else answer

    def __repr__(self) -> str:
        words = [] if self.axis is None else [f"axis={self.axis[0] if len(self.axis) == 1 else self.axis}"]
        words += [] if self.skipna else ["skipna=False"]
        words += ["placed=True"] if self.placed else []
        return f"{self.name}({', '.join(words)})"

    # -- values and places ------------------------------------------------------------------------

    def _values(self, data: Any) -> Values:
        if isinstance(data, np.ma.MaskedArray):
            raise UsageError(
                f"{self!r} would overlook the mask of a masked array: return .filled(np.nan) from the map before it"
            )
        values = np.asarray(data)
        self._check_dtype(values.dtype)
        return values

    def _check_dtype(self, dtype: np.dtype[Any]) -> None:
        if dtype.kind not in self._kinds:
            accepted = ", ".join(_KINDS[kind] for kind in self._kinds)
            raise UsageError(
                f"{self!r} works on {accepted}; the data have dtype {dtype}: put a .map(...) before the reduction "
                f"that returns such values"
            )

    def _axes(self, ndim: int) -> tuple[int, ...]:
        assert self.axis is not None
        axes = tuple(axis + ndim if axis < 0 else axis for axis in self.axis)
        if not all(0 <= axis < ndim for axis in axes):
            raise UsageError(f"{self!r} needs axes from {-ndim} to {ndim - 1}, because the data have {ndim} axes")
        if len(set(axes)) < len(axes):
            raise UsageError(f"{self!r} names an axis twice, because the data have {ndim} axes")
        return axes

    def _place(self, values: Values, chunk: Chunk) -> tuple[Bounds, tuple[int, ...]]:
        self._check_shape(values, chunk)
        axes = self._axes(values.ndim)
        return tuple((part.start, part.stop) for i, part in enumerate(chunk.region) if i not in axes), axes

    def _check_shape(self, values: Values, chunk: Chunk) -> None:
        if values.shape != chunk.shape:
            raise UsageError(
                f"{self!r} places the values by the chunk's region, of shape {chunk.shape}; they have shape "
                f"{values.shape}: a .map(...) before it has to keep the shape"
            )

    def _assemble(self, partial: dict[Bounds, Any]) -> tuple[Region, Any]:
        """Put the answers of all regions into one array over the box that holds them."""
        region = tuple(
            slice(builtins.min(start for start, _ in parts), builtins.max(stop for _, stop in parts))
            for parts in zip(*partial, strict=True)
        )
        places = [
            tuple(slice(lo - whole.start, hi - whole.start) for (lo, hi), whole in zip(bounds, region, strict=True))
            for bounds in partial
        ]
        answers = [self._answer(state) for state in partial.values()]
        first = answers[0]
        if isinstance(first, tuple):
            fields = zip(*answers, strict=True)
            nothing = self._empty()
            arrays = (self._array(region, places, f, gap) for f, gap in zip(fields, nothing, strict=True))
            return region, type(first)(*arrays)
        return region, self._array(region, places, answers, self._nothing)

    @staticmethod
    def _array(region: Region, places: list[Region], answers: Sequence[Any], gap: Any) -> Any:
        shape = tuple(part.stop - part.start for part in region)
        if not shape:
            return answers[0]
        arrays = [np.asarray(answer) for answer in answers]
        dtypes = {array.dtype for array in arrays}
        dtype = np.dtype(object) if np.dtype(object) in dtypes else np.result_type(*dtypes)
        out = np.empty(shape, dtype)
        if builtins.sum(array.size for array in arrays) < out.size:
            if dtype.kind in "biu" and gap != gap:  # noqa: PLR0124  # only NaN differs from itself
                dtype = np.dtype(np.float64)
            out = np.full(shape, np.array("NaT", dtype) if dtype.kind in "mM" else gap, dtype)
        for place, array in zip(places, arrays, strict=True):
            out[place] = array
        return _narrowed(out) if dtype.kind == "O" else out


_KINDS = {
    "b": "booleans",
    "i": "integers",
    "u": "unsigned integers",
    "f": "floating-point numbers",
    "c": "complex numbers",
    "m": "timedelta64",
    "M": "datetime64",
}


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _checked_axis(name: str, axis: Axis) -> Axes:
    if axis is None:
        return None
    axes = axis if isinstance(axis, (tuple, list)) else (axis,)
    if not all(_is_int(one) for one in axes):
        raise UsageError(f"{name}: axis must be an int, a tuple of int or None, got {axis!r}")
    if len(set(axes)) < len(axes):
        raise UsageError(f"{name}: axis={axis!r} names an axis twice")
    return tuple(int(one) for one in axes)


def _reduced(values: Values, axes: Axes) -> int:
    """Count the elements that go into one element of the answer."""
    return values.size if axes is None else math.prod(values.shape[axis] for axis in axes)


def _nans(values: Values) -> Values:
    return np.isnat(values) if values.dtype.kind in "mM" else np.isnan(values)


def _can_be_nan(values: Values) -> bool:
    return values.dtype.kind in "fcmM"


def _any_nan(numbers: Any) -> bool:
    return bool(np.isnan(numbers).any())


def _wide(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type to accumulate in: double precision or better."""
    return np.promote_types(dtype, np.complex128 if dtype.kind == "c" else np.float64)


# -- counts -----------------------------------------------------------------------------------------


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
    >>> data = np.array([1.0, np.nan, 3.0])
    >>> reducer = count()
    >>> reducer.finish(reducer.add(reducer.create(), Chunk((0,), (slice(0, 3),), data)))
    2
    """

    name = "count"
    _kinds = "biufcmM"
    _nothing = 0

    def __init__(self, axis: Axis = None, *, placed: bool = False) -> None:
        super().__init__(axis, placed=placed)

    def _block(self, values: Values, axes: Axes) -> Any:
        n = _reduced(values, axes)
        if axes is None:
            return n - int(np.count_nonzero(_nans(values))) if _can_be_nan(values) else n
        if _can_be_nan(values):
            return n - np.count_nonzero(_nans(values), axis=axes)
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
    >>> data = np.array([[1.0, np.nan], [3.0, np.nan]])
    >>> reducer = nan_count(axis=0)
    >>> reducer.finish(reducer.add(reducer.create(), Chunk((0, 0), (slice(0, 2), slice(0, 2)), data)))
    array([0, 2])
    """

    name = "nan_count"

    def _block(self, values: Values, axes: Axes) -> Any:
        return _reduced(values, axes) - super()._block(values, axes)


# -- sums and means ---------------------------------------------------------------------------------


class _Total(NamedTuple):
    """A sum: exact integers, or a float and what its roundings have cost so far.

    `high` is an int, or an array of int64 or of Python's integers, while `low` is None; it is a float
    (or an array of them) otherwise, and the sum is ``high + low``.
    """

    high: Any
    low: Any


class _Average(NamedTuple):
    count: Any
    total: _Total


def _average(values: Values, axes: Axes, *, skipna: bool) -> _Average:
    n: Any = _reduced(values, axes)
    if values.dtype.kind in "biu":
        return _Average(n, _Total(_exact_sum(values, axes), None))
    dtype = _wide(values.dtype)
    high = values.sum(axis=axes, dtype=dtype)
    if skipna and _any_nan(high):  # the sum tells for nothing whether it is worth looking for NaN
        nans = np.isnan(values)
        n = n - np.count_nonzero(nans, axis=axes)
        high = np.where(nans, values.dtype.type(0), values).sum(axis=axes, dtype=dtype)
    return _Average(n, _Total(high, high * 0))


def _exact_sum(values: Values, axes: Axes) -> Any:
    """Sum integers without overflow: in int64 where the bounds of the values allow it, else in halves."""
    if values.size == 0 or (values.dtype.itemsize <= 4 and values.size < 1 << 31):
        total = values.sum(axis=axes, dtype=np.int64)
    else:
        largest = builtins.max(-int(values.min()), int(values.max()))
        if largest * _reduced(values, axes) < _LIMIT:
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


def _add_totals(left: _Total, right: _Total) -> _Total:
    """Join sums; floats with Knuth's TwoSum, so that the order of many chunks hardly matters.

    D. E. Knuth, The Art of Computer Programming, vol. 2, 4.2.2, theorem B.
    """
    if left.low is None and right.low is None:
        return _Total(_add_exact(left.high, right.high), None)
    left, right = _rounded(left), _rounded(right)
    high = left.high + right.high
    part = high - left.high
    lost = (left.high - (high - part)) + (right.high - part)
    return _Total(high, left.low + right.low + lost)


def _rounded(total: _Total) -> _Total:
    if total.low is not None:
        return total
    high = np.asarray(total.high).astype(np.float64)[()]
    return _Total(high, high * 0)


def _value(total: _Total) -> Any:
    if total.low is None:
        return total.high
    # Where infinities took part the correction is NaN, and the plain sum is right.
    return np.where(np.isfinite(total.high), total.high + total.low, total.high)[()]


def _narrowed(total: Values) -> Values:
    """Turn Python's integers into int64 or uint64, if one of them can hold all."""
    low, high = total.min(initial=0), total.max(initial=0)
    if not isinstance(low, int) or not isinstance(high, int):
        return total
    if low >= -_LIMIT and high < _LIMIT:
        return total.astype(np.int64)
    return total.astype(np.uint64) if low >= 0 and high < 2 * _LIMIT else total


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
    >>> data = np.array([2**63 - 1, 2**63 - 1])
    >>> reducer = sum()
    >>> reducer.finish(reducer.add(reducer.create(), Chunk((0,), (slice(0, 2),), data)))
    18446744073709551614
    """

    name = "sum"
    _kinds = "biufc"
    _nothing = 0

    def _block(self, values: Values, axes: Axes) -> _Total:
        return _average(values, axes, skipna=self.skipna).total

    def _join(self, left: _Total, right: _Total) -> _Total:
        return _add_totals(left, right)

    def _answer(self, state: _Total) -> Any:
        return _value(state)


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
    >>> data = np.array([[1, 2], [3, 6]], "i2")
    >>> chunk = Chunk((0, 0), (slice(0, 2), slice(0, 2)), data)
    >>> mean().finish(mean().add(mean().create(), chunk))
    np.float64(3.0)
    >>> over_rows = mean(axis=0)
    >>> over_rows.finish(over_rows.add(over_rows.create(), chunk))
    array([2., 4.])
    """

    name = "mean"
    _kinds = "biufc"

    def _block(self, values: Values, axes: Axes) -> _Average:
        return _average(values, axes, skipna=self.skipna)

    def _join(self, left: _Average, right: _Average) -> _Average:
        return _Average(left.count + right.count, _add_totals(left.total, right.total))

    def _answer(self, state: _Average) -> Any:
        total = _value(state.total)
        if isinstance(total, int):
            return np.float64(total / state.count if state.count else math.nan)
        mean = total / state.count
        return mean.astype(np.float64) if mean.dtype == object else mean

    def _empty(self) -> Any:
        return np.float64(math.nan)


# -- smallest and largest ---------------------------------------------------------------------------


class _Extreme(NamedTuple):
    """The extreme so far, or None; and the type of what was looked at."""

    value: Any
    dtype: np.dtype[Any]


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
    >>> data = np.array([3, 1, 2], "u1")
    >>> reducer = min()
    >>> reducer.finish(reducer.add(reducer.create(), Chunk((0,), (slice(0, 3),), data)))
    np.uint8(1)
    """

    name = "min"
    _kinds = "biufmM"
    _strict: ClassVar[np.ufunc] = np.minimum
    _lenient: ClassVar[np.ufunc] = np.fmin

    def _block(self, values: Values, axes: Axes) -> _Extreme:
        if values.size == 0:
            return _Extreme(None, values.dtype)
        value = self._strict.reduce(values, axis=axes)
        if self.skipna and _can_be_nan(values) and _nans(np.asarray(value)).any():
            value = self._lenient.reduce(values, axis=axes)
        return _Extreme(value, values.dtype)

    def _join(self, left: _Extreme, right: _Extreme) -> _Extreme:
        if left.value is None or right.value is None:
            return right if left.value is None else left
        join = self._lenient if self.skipna else self._strict
        return _Extreme(join(left.value, right.value), left.dtype)

    def _answer(self, state: _Extreme) -> Any:
        if state.value is not None:
            return state.value
        if state.dtype.kind in "biu":
            raise UsageError(
                f"{self!r} of no values at all: {state.dtype} has no NaN to say so. A filter or map before it left "
                f"nothing over; return float64 from the map to get NaN instead"
            )
        return np.array("NaT", state.dtype)[()] if state.dtype.kind in "mM" else state.dtype.type(math.nan)

    def _empty(self) -> Any:
        return np.float64(math.nan)


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
    >>> data = np.array(["2024-05-01", "NaT", "2023-01-01"], "M8[D]")
    >>> reducer = max()
    >>> reducer.finish(reducer.add(reducer.create(), Chunk((0,), (slice(0, 3),), data)))
    np.datetime64('2024-05-01')
    """

    name = "max"
    _strict = np.maximum
    _lenient = np.fmax


# -- variance ---------------------------------------------------------------------------------------


class _Central(NamedTuple):
    """Count, mean and the sums of the powers of the deviations from it: the second, or the second to fourth."""

    count: Any
    mean: Any
    powers: tuple[Any, ...]


def _about(count: Any, powers: tuple[Any, ...], d: Any) -> tuple[Any, ...]:
    """Take sums of powers of deviations from a mean over to a centre that lies `d` below that mean."""
    square = d * d
    m2 = powers[0]
    if len(powers) == 1:
        return (m2 + count * square,)
    m3, m4 = powers[1:]
    return (
        m2 + count * square,
        m3 + d * (3 * m2 + count * square),
        m4 + d * (4 * m3 + d * (6 * m2 + count * square)),
    )


def _joined(left: _Central, right: _Central) -> _Central:
    n = left.count + right.count
    here, there = left.count / np.maximum(n, 1), right.count / np.maximum(n, 1)
    delta = right.mean - left.mean
    ours = _about(left.count, left.powers, -delta * there)
    theirs = _about(right.count, right.powers, delta * here)
    powers = tuple(a + b for a, b in zip(ours, theirs, strict=True))
    # Weighing is symmetrical, but rounds: a constant has to keep its mean, and with it a variance of 0.
    mean = np.where(delta == 0, left.mean, left.mean * here + right.mean * there)[()]
    return _Central(n, mean, powers)


def _central(flat: Values, order: int) -> _Central:
    """Centre block by block: each is read from memory once and stays in the cache."""
    dtype = _wide(flat.dtype)
    if flat.size == 0:
        return _Central(0, dtype.type(0), (dtype.type(0),) * (order - 1))
    scratch, squares = np.empty((2, builtins.min(flat.size, _BLOCK)), dtype)
    starts = range(0, flat.size, _BLOCK)
    mean = np.empty(len(starts), dtype)
    powers = np.empty((order - 1, len(starts)), dtype)
    for i, start in enumerate(starts):
        block = flat[start : start + _BLOCK]
        d = scratch[: block.size]
        np.copyto(d, block)
        mean[i] = middle = d.sum() / block.size
        d -= middle
        powers[0, i] = d @ d
        if order > 2:
            square = np.multiply(d, d, out=squares[: block.size])
            powers[1, i] = square @ d
            powers[2, i] = square @ square
    if len(starts) == 1:
        return _Central(flat.size, mean[0], tuple(powers[:, 0]))
    count = np.full(len(starts), _BLOCK, dtype)
    count[-1] = flat.size - starts[-1]
    middle = mean[0] + count @ (mean - mean[0]) / flat.size
    if not np.isfinite(middle):
        middle = count @ mean / flat.size
    return _Central(flat.size, middle, tuple(p.sum() for p in _about(count, tuple(powers), mean - middle)))


def _central_along(values: Values, axes: tuple[int, ...], order: int, *, skipna: bool) -> _Central:
    dtype = _wide(values.dtype)
    n: Any = _reduced(values, axes)
    total = values.sum(axis=axes, dtype=dtype, keepdims=True)
    nans = np.isnan(values) if skipna and values.dtype.kind == "f" and _any_nan(total) else None
    if nans is not None:
        n = n - np.count_nonzero(nans, axis=axes, keepdims=True)
        total = np.where(nans, values.dtype.type(0), values).sum(axis=axes, dtype=dtype, keepdims=True)
    mean = total / np.maximum(n, 1)
    d = np.subtract(values, mean, dtype=dtype)
    if nans is not None:
        d[nans] = 0
        n = np.squeeze(n, axes)
    if order == 2:
        d *= d
        powers = [d.sum(axis=axes)]
    else:
        square = d * d
        powers = [square.sum(axis=axes), (square * d).sum(axis=axes), (square * square).sum(axis=axes)]
    return _Central(n, np.squeeze(mean, axes), tuple(powers))


class _Centred(Statistic):
    """What variance and moments share."""

    _order: ClassVar[int] = 2

    def _block(self, values: Values, axes: Axes) -> _Central:
        if axes is not None:
            return _central_along(values, axes, self._order, skipna=self.skipna)
        flat = values.reshape(-1)
        state = _central(flat, self._order)
        if self.skipna and flat.dtype.kind == "f" and math.isnan(state.mean):
            state = _central(flat[~np.isnan(flat)], self._order)
        return state

    def _join(self, left: _Central, right: _Central) -> _Central:
        return _joined(left, right)


class Var(_Centred):
    """The variance, in double precision, stable however large the mean.

    Parameters
    ----------
    axis : int or sequence of int, optional
        Axes to reduce; None: all.
    ddof : int
        Divides by the count less this: 0 for the population, 1 for a sample.
    skipna : bool
        Leave NaN out, or let it through.
    placed : bool
        Return the region of the answer with it.

    Notes
    -----
    Each block of values is centred on its own mean before squaring, and groups (count n, mean m, sum of
    squared deviations M) are joined by M = sum(M_i + n_i (m_i - m)^2), which for two groups is the
    update of T. F. Chan, G. H. Golub and R. J. LeVeque, "Algorithms for computing the sample variance",
    The American Statistician 37 (1983) 242-247. The unit is that of the data, squared. Where the count
    is not above `ddof` the answer is NaN; infinities give NaN, as in NumPy.

    Examples
    --------
    >>> data = 1e9 + np.array([4.0, 7.0, 13.0, 16.0])
    >>> reducer = var(ddof=1)
    >>> reducer.finish(reducer.add(reducer.create(), Chunk((0,), (slice(0, 4),), data)))
    np.float64(30.0)
    """

    name = "var"

    def __init__(self, axis: Axis = None, *, ddof: int = 0, skipna: bool = True, placed: bool = False) -> None:
        super().__init__(axis, skipna=skipna, placed=placed)
        if not _is_int(ddof) or ddof < 0:
            raise UsageError(f"{self.name}: ddof must be an int of at least 0, got {ddof!r}")
        self.ddof = int(ddof)

    def _answer(self, state: _Central) -> Any:
        divisor = np.asarray(state.count - self.ddof, np.float64)
        return np.where(divisor > 0, state.powers[0] / divisor, math.nan)[()]

    def _empty(self) -> Any:
        return np.float64(math.nan)

    def __repr__(self) -> str:
        text = super().__repr__()
        return text if not self.ddof else f"{text[:-1]}{'' if text[-2] == '(' else ', '}ddof={self.ddof})"


class Std(Var):
    """The standard deviation: the root of `Var`, in the unit of the data.

    Parameters
    ----------
    axis : int or sequence of int, optional
        Axes to reduce; None: all.
    ddof : int
        Divides by the count less this: 0 for the population, 1 for a sample.
    skipna : bool
        Leave NaN out, or let it through.
    placed : bool
        Return the region of the answer with it.

    Examples
    --------
    >>> reducer = std()
    >>> reducer.finish(reducer.add(reducer.create(), Chunk((0,), (slice(0, 2),), np.array([1, 5]))))
    np.float64(2.0)
    """

    name = "std"

    def _answer(self, state: _Central) -> Any:
        return np.sqrt(super()._answer(state))


class Moments(NamedTuple):
    """What `moments` gives.

    Attributes
    ----------
    count : int or numpy.ndarray
        Values that took part.
    mean : float or numpy.ndarray
        In the unit of the data.
    variance : float or numpy.ndarray
        Of the population (ddof 0), in the unit of the data, squared.
    skewness : float or numpy.ndarray
        Third moment of the standardized values; 0 for a symmetrical distribution. No unit.
    kurtosis : float or numpy.ndarray
        Fourth moment of the standardized values less 3, so 0 for a normal distribution. No unit.
    """

    count: Any
    mean: Any
    variance: Any
    skewness: Any
    kurtosis: Any


class MomentsReducer(_Centred):
    """Count, mean, variance, skewness and kurtosis in one pass, as `Moments`.

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
    Groups are joined as in `Var`; for the third and fourth power see P. Pébay, "Formulas for robust,
    one-pass parallel computation of covariances and arbitrary-order statistical moments", Sandia
    report SAND2008-6212 (2008). Skewness and kurtosis are those of the population (no correction for
    the size of a sample) and NaN where the variance is 0.

    Examples
    --------
    >>> reducer = moments()
    >>> chunk = Chunk((0,), (slice(0, 4),), np.array([0.0, 0.0, 0.0, 4.0]))
    >>> answer = reducer.finish(reducer.add(reducer.create(), chunk))
    >>> answer.count, float(answer.mean), float(answer.variance), round(float(answer.skewness), 6)
    (4, 1.0, 3.0, 1.154701)
    """

    name = "moments"
    _order = 4

    def _answer(self, state: _Central) -> Moments:
        m2, m3, m4 = state.powers
        n = np.asarray(state.count, np.float64)
        variance = m2 / n
        # As small as that it is only what rounding left of 0, which says nothing of a shape.
        flat = variance <= (np.finfo(np.float64).eps * np.abs(state.mean)) ** 2
        spread = np.where(flat, math.nan, variance)[()]
        count = int(state.count) if np.ndim(m2) == 0 else np.broadcast_to(state.count, m2.shape).astype(np.int64)
        return Moments(
            count,
            np.where(n > 0, state.mean, math.nan)[()],
            variance,
            m3 / n / spread**1.5,
            m4 / n / (spread * spread) - 3,
        )

    def _empty(self) -> Moments:
        nan = np.float64(math.nan)
        return Moments(0, nan, nan, nan, nan)


# -- histogram --------------------------------------------------------------------------------------


class Histogram(NamedTuple):
    """What `histogram` gives.

    Attributes
    ----------
    counts : numpy.ndarray of int64
        Values in each bin. A bin holds its lower edge and not its upper one, but the last holds both.
    edges : numpy.ndarray of float64
        The edges, one more than there are bins, in the unit of the data.
    below, above : int
        Values below the first and above the last edge.
    nan : int
        Values that are NaN.
    """

    counts: npt.NDArray[np.int64]
    edges: npt.NDArray[np.float64]
    below: int
    above: int
    nan: int


class HistogramReducer(Statistic):
    """How many values fall into each bin, with fixed edges; what falls outside is counted too.

    Parameters
    ----------
    bins : int or sequence of float
        The number of bins of equal width over `range`, or the edges, increasing; the outer ones may be
        infinite.
    range : pair of float, optional
        First and last edge, in the unit of the data; needed where `bins` is a number, because the
        data have not been seen when counting begins.

    Notes
    -----
    Every value is compared with the edges themselves, in double precision, so that chunks of any
    type are counted alike.

    Examples
    --------
    >>> reducer = histogram(2, (0, 4))
    >>> chunk = Chunk((0,), (slice(0, 6),), np.array([0.0, 1.0, 2.0, 4.0, 4.5, np.nan]))
    >>> reducer.finish(reducer.add(reducer.create(), chunk))
    Histogram(counts=array([2, 2]), edges=array([0., 2., 4.]), below=0, above=1, nan=1)
    """

    name = "histogram"

    def __init__(
        self,
        bins: int | Sequence[float] | npt.NDArray[Any] = 10,
        range: tuple[float, float] | None = None,  # noqa: A002  # the name NumPy and dask.array have for it
    ) -> None:
        super().__init__()
        self.edges = _equal_bins(bins, range) if _is_int(bins) else _given_edges(bins, range)

    def _block(self, values: Values, axes: Axes) -> Values:  # noqa: ARG002  # there is no histogram along axes
        flat = values.reshape(-1)
        tally = np.zeros(self.edges.size + 2, np.int64)
        for start in builtins.range(0, flat.size, _SORTED):
            tally += _tally(flat[start : start + _SORTED], self.edges)
        return tally

    def _join(self, left: Values, right: Values) -> Values:
        return left + right

    def _answer(self, state: Values) -> Histogram:
        return Histogram(state[1:-2], self.edges.copy(), int(state[0]), int(state[-2]), int(state[-1]))

    def _empty(self) -> Histogram:
        return self._answer(np.zeros(self.edges.size + 2, np.int64))

    def __repr__(self) -> str:
        return f"histogram({self.edges.size - 1} bins from {self.edges[0]:g} to {self.edges[-1]:g})"


_SORTED = 65536  # elements: sorting so many at once stays in the cache


def _equal_bins(bins: Any, limits: Any) -> npt.NDArray[np.float64]:
    if bins < 1:
        raise UsageError(f"histogram: bins must be at least 1, got {bins}")
    if limits is None:
        raise UsageError("histogram: a number of bins needs range=(first, last), or give the edges as bins")
    try:
        low, high = (float(limit) for limit in limits)
    except (TypeError, ValueError):
        raise UsageError(f"histogram: range must be two numbers, got {limits!r}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UsageError(f"histogram: range must be two finite numbers, the first the smaller, got {limits!r}")
    edges = np.linspace(low, high, int(bins) + 1)
    if not (np.diff(edges) > 0).all():
        raise UsageError(f"histogram: {bins} bins between {low!r} and {high!r} are too fine for double precision")
    return edges


def _given_edges(bins: Any, limits: Any) -> npt.NDArray[np.float64]:
    if limits is not None:
        raise UsageError("histogram: range goes with a number of bins; the edges in bins say it already")
    try:
        edges = np.array(bins, np.float64)
    except (TypeError, ValueError):
        raise UsageError(f"histogram: bins must be an int or a sequence of edges, got {bins!r}") from None
    if edges.ndim != 1 or edges.size < 2 or not (edges[1:] > edges[:-1]).all():
        raise UsageError(f"histogram: the edges must be at least two numbers, each above the one before, got {bins!r}")
    return edges


def _tally(values: Values, edges: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Count what lies below, in each bin, above, and what is NaN."""
    ends: Any = None
    if values.dtype.kind in "biu" and values.dtype.itemsize <= 2:
        low = int(values.min())
        each = np.bincount(values.astype(np.intp) - low)
        ends = np.concatenate(([0], np.cumsum(each)))
        steps: Values = np.arange(low, low + each.size)
    else:
        steps = np.sort(values.astype(np.float32) if values.dtype == np.float16 else values)
    valid = values.size
    if values.dtype.kind == "f" and np.isnan(steps[-1]):  # NaN is sorted behind everything else
        valid = int(np.searchsorted(steps, steps.dtype.type(math.nan)))
        steps = steps[:valid]
    place = np.searchsorted(steps, edges)
    place[-1] = np.searchsorted(steps, edges[-1], side="right")
    under = place if ends is None else ends[place]
    return np.concatenate(([under[0]], np.diff(under), [valid - under[-1], values.size - valid]))


# -- quantiles --------------------------------------------------------------------------------------


class Quantiles(NamedTuple):
    """What `quantile` gives with ``bounds=True``.

    Attributes
    ----------
    value : float or numpy.ndarray
        The estimate.
    low, high : float or numpy.ndarray
        The true quantile lies between them, both included, for certain.
    rank_error : float
        Share of all values by which the rank of `value` is wrong at most; 0 where the answer is exact.
    """

    value: Any
    low: Any
    high: Any
    rank_error: float


class _Sketch(NamedTuple):
    """Sorted samples; each on level h stands for 2**h values."""

    n: int
    low: float
    high: float
    levels: tuple[Values, ...]
    error: int  # values by which any rank can be wrong
    flips: int  # bit h: which of a pair survives next on level h
    nan: bool


class Quantile(Statistic):
    """Quantiles of all values by a mergeable sketch of bounded size.

    Parameters
    ----------
    q : float or sequence of float
        From 0 (the smallest value) to 1 (the largest); 0.5 is the median.
    size : int
        Samples kept on each level, at least 16. Each is 8 bytes; there are about log2(n / size) levels
        for n values.
    skipna : bool
        Leave NaN out, or let it through.
    bounds : bool
        Return `Quantiles`: the value and what is known about its error.

    Notes
    -----
    Up to `size` values the answer is exact, by linear interpolation as in NumPy. Beyond that it is one
    of the values, and its rank is wrong by no more than (1 + log2(n / size)) / size of all n values,
    whatever the data and in whatever order partials are merged: 0.3 % for a million and 0.5 % for a
    thousand million values at the default size. The usual error is far smaller, and ``bounds=True`` tells the bound
    that holds for the data at hand. Another order of merging may give another value within the bound.

    A full level keeps every other of its sorted samples, alternating between even and odd, with twice the weight. This
    is the compactor of Z. Karnin, K. Lang and E. Liberty, "Optimal quantile approximation in streams",
    FOCS 2016, with equal levels and without chance, which makes it the summary of G. S. Manku,
    S. Rajagopalan and B. G. Lindsay, "Approximate medians and other quantiles in one pass and with
    limited memory", SIGMOD 1998. A large chunk goes to its level in one step, by taking the middle of
    each run of 2**h of its sorted values.

    Examples
    --------
    >>> reducer = quantile([0.25, 0.5])
    >>> chunk = Chunk((0,), (slice(0, 5),), np.array([5.0, 1.0, 2.0, 4.0, 3.0]))
    >>> reducer.finish(reducer.add(reducer.create(), chunk))
    array([2., 3.])
    """

    name = "quantile"

    def __init__(
        self,
        q: float | Sequence[float] | npt.NDArray[Any],
        *,
        size: int = 4096,
        skipna: bool = True,
        bounds: bool = False,
    ) -> None:
        super().__init__(skipna=skipna)
        try:
            self.q = np.array(q, np.float64)
        except (TypeError, ValueError):
            raise UsageError(f"quantile: q must be a number or a sequence of numbers, got {q!r}") from None
        if not ((self.q >= 0) & (self.q <= 1)).all():
            raise UsageError(f"quantile: q must be from 0 to 1 (not percent), got {q!r}")
        if not _is_int(size) or size < 16:
            raise UsageError(f"quantile: size must be an int of at least 16, got {size!r}")
        self.size = int(size)
        self.bounds = bool(bounds)

    def _block(self, values: Values, axes: Axes) -> _Sketch:  # noqa: ARG002  # there is no sketch along axes
        ranked = np.sort(values, axis=None)
        n = ranked.size
        nan = bool(n and values.dtype.kind == "f" and np.isnan(ranked[-1]))
        if nan:
            n = int(np.searchsorted(ranked, ranked.dtype.type(math.nan)))
        if not n:
            return _Sketch(0, math.inf, -math.inf, (), 0, 0, nan)
        top = builtins.max(0, math.ceil(math.log2(n / self.size)))
        levels: list[Values] = [np.empty(0)] * (top + 1)
        start = 0
        for h in range(top, -1, -1):
            stop = start + ((n - start) >> h << h)
            levels[h] = ranked[start + (1 << h) // 2 : stop : 1 << h].astype(np.float64)
            start = stop
        return _Sketch(n, float(ranked[0]), float(ranked[n - 1]), tuple(levels), (1 << top) // 2, 0, nan)

    def _join(self, left: _Sketch, right: _Sketch) -> _Sketch:
        levels = [
            np.sort(np.concatenate(pair), kind="stable")  # which merges sorted runs
            for pair in itertools.zip_longest(left.levels, right.levels, fillvalue=np.empty(0))
        ]
        error, flips = left.error + right.error, left.flips ^ right.flips
        h = 0
        while h < len(levels):
            level = levels[h]
            if level.size > self.size:
                if h + 1 == len(levels):
                    levels.append(np.empty(0))
                even = level.size // 2 * 2
                kept = level[flips >> h & 1 : even : 2]
                levels[h] = level[even:].copy()
                levels[h + 1] = np.sort(np.concatenate((levels[h + 1], kept)), kind="stable")
                flips ^= 1 << h
                error += 1 << h
            h += 1
        low, high = builtins.min(left.low, right.low), builtins.max(left.high, right.high)
        return _Sketch(left.n + right.n, low, high, tuple(levels), error, flips, left.nan or right.nan)

    def _answer(self, state: _Sketch) -> Any:
        if not state.n or (state.nan and not self.skipna):
            return self._empty()
        if not state.error:
            value = np.quantile(np.concatenate(state.levels), self.q)
            return Quantiles(value, value, value, 0.0) if self.bounds else value
        samples = np.concatenate(state.levels)
        weights = np.repeat([1 << h for h in range(len(state.levels))], [level.size for level in state.levels])
        order = np.argsort(samples, kind="stable")
        samples, rank = samples[order], np.cumsum(weights[order])
        position = self.q * (state.n - 1)
        value = self._at(state, samples, rank, np.rint(position) + 1)
        if not self.bounds:
            return value
        low = self._at(state, samples, rank, np.floor(position) + 1 - state.error)
        high = self._at(state, samples, rank, np.ceil(position) + 1 + state.error)
        return Quantiles(value, low, high, state.error / state.n)

    @staticmethod
    def _at(state: _Sketch, samples: Values, rank: Values, wanted: Values) -> Any:
        """Return the first sample of at least the wanted rank (counted from 1), the ends exactly."""
        place = np.minimum(np.searchsorted(rank, wanted), samples.size - 1)
        value = np.where(wanted <= 1, state.low, np.where(wanted >= state.n, state.high, samples[place]))
        return value[()]

    def _empty(self) -> Any:
        nan = np.full(self.q.shape, math.nan)[()]
        return Quantiles(nan, nan, nan, 0.0) if self.bounds else nan

    def __repr__(self) -> str:
        return f"quantile({self.q.tolist()})"


# -- where ------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    value: Any
    place: tuple[int, ...]


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
    >>> reducer = argmin()
    >>> chunk = Chunk((1, 0), (slice(10, 12), slice(0, 2)), np.array([[7, 5], [6, 9]]))
    >>> reducer.finish(reducer.add(reducer.create(), chunk))
    (10, 1)
    """

    name = "argmin"
    _kinds = "biufmM"
    _lenient: ClassVar[np.ufunc] = np.fmin

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
            state = _Found(found[0], place)
            return state if partial is None else self._join(partial, state)

    @staticmethod
    def _first(values: Values) -> int:
        return int(np.argmin(values))

    @staticmethod
    def _beats(value: Any, other: Any) -> bool:
        return bool(value < other)

    def _find(self, values: Values) -> tuple[Any, int] | None:
        if values.size == 0:
            return None
        first = self._first(values)
        value = values.flat[first]
        if self.skipna and _can_be_nan(values) and _nans(value):
            value = self._lenient.reduce(values, axis=None)
            if _nans(value):
                return None
            first = int(np.argmax(values == value))
        return value, first

    def _join(self, left: _Found, right: _Found) -> _Found:
        lost = [_can_be_nan(found.value) and bool(_nans(found.value)) for found in (left, right)]
        if lost[0] != lost[1]:
            return left if lost[0] else right
        if not lost[0] and left.value != right.value:
            return left if self._beats(left.value, right.value) else right
        return left if left.place <= right.place else right

    def _answer(self, state: _Found) -> tuple[int, ...]:
        return state.place

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
    >>> reducer = argmax()
    >>> chunk = Chunk((1,), (slice(4, 7),), np.array([np.nan, 2.0, 3.0]))
    >>> reducer.finish(reducer.add(reducer.create(), chunk))
    (6,)
    """

    name = "argmax"
    _lenient = np.fmax

    @staticmethod
    def _first(values: Values) -> int:
        return int(np.argmax(values))

    @staticmethod
    def _beats(value: Any, other: Any) -> bool:
        return bool(value > other)


# The names of the public contract. They hide builtins inside this module, where `builtins.min` and so on are used.
count = Count
nan_count = NanCount
sum = Sum  # noqa: A001  # the public name is reducers.sum
mean = Mean
min = Min  # noqa: A001  # the public name is reducers.min
max = Max  # noqa: A001  # the public name is reducers.max
var = Var
std = Std
moments = MomentsReducer
histogram = HistogramReducer
quantile = Quantile
argmin = ArgMin
argmax = ArgMax
