"""Reducers that keep axes: each place has a state of its own, and at the end they make up one box."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.source.grid import Region
from zarr_dask_stream.stages.combine import Reducer
from zarr_dask_stream.stages.values import Axes, Axis, Values, is_int, narrowed

__all__ = ["Placed", "Statistic"]

Bounds = tuple[tuple[int, int], ...]

_KINDS = {
    "b": "booleans",
    "i": "integers",
    "u": "unsigned integers",
    "f": "floating-point numbers",
    "c": "complex numbers",
    "m": "timedelta64",
    "M": "datetime64",
}


class Placed(NamedTuple):
    """An answer that keeps axes, and where it lies.

    Attributes
    ----------
    region : tuple of slice
        The box of the kept axes, in array coordinates.
    data : numpy.ndarray or Any
        The answer, of the box's shape.

    Examples
    --------
    >>> import numpy as np, zarr, zarr_dask_stream as zds
    >>> array = zarr.create_array({}, shape=(2, 6), chunks=(1, 2), dtype="i4")
    >>> array[:] = np.arange(12).reshape(2, 6)
    >>> stream = zds.stream_chunks(array, concurrency=1, region=(slice(None), slice(2, 5)))
    >>> stream.reduce(zds.reducers.max(axis=0, placed=True)).compute()
    Placed(region=(slice(2, 5, None),), data=array([ 8,  9, 10], dtype=int32))
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
    place join (`_join`, element by element), and what the answer is (`_answer`). A state consists of
    plain values (numbers, tuples, lists, dicts, NumPy arrays), so that a checkpoint can keep it.

    Examples
    --------
    >>> from zarr_dask_stream import reducers
    >>> isinstance(reducers.mean(axis=0), Statistic), reducers.mean(axis=0)
    (True, mean(axis=0))
    """

    name: ClassVar[str] = ""
    _kinds: ClassVar[str] = "biuf"
    _nothing: ClassVar[Any] = np.float64(math.nan)

    def __init__(self, axis: Axis = None, *, skipna: bool = True, placed: bool = False) -> None:
        self.axis = _checked_axis(self.name, axis)
        self.skipna = _checked_switch(self.name, "skipna", skipna)
        self.placed = _checked_switch(self.name, "placed", placed)
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
        >>> from zarr_dask_stream import reducers
        >>> reducers.mean(axis=2).check("f4", 2)
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
            slice(min(start for start, _ in parts), max(stop for _, stop in parts))
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
        if sum(array.size for array in arrays) < out.size:
            if dtype.kind in "biu" and gap != gap:  # noqa: PLR0124  # only NaN differs from itself
                dtype = np.dtype(np.float64)
            out = np.full(shape, np.array("NaT", dtype) if dtype.kind in "mM" else gap, dtype)
        for place, array in zip(places, arrays, strict=True):
            out[place] = array
        return narrowed(out) if dtype.kind == "O" else out


def _checked_switch(name: str, what: str, given: object) -> bool:
    if not isinstance(given, (bool, np.bool_)):
        raise UsageError(f"{name}: {what} is True or False, got {given!r}")
    return bool(given)


def _checked_axis(name: str, axis: Axis) -> Axes:
    if axis is None:
        return None
    axes = axis if isinstance(axis, (tuple, list)) else (axis,)
    if not all(is_int(one) for one in axes):
        raise UsageError(f"{name}: axis must be an int, a tuple of int or None, got {axis!r}")
    if len(set(axes)) < len(axes):
        raise UsageError(f"{name}: axis={axis!r} names an axis twice")
    return tuple(int(one) for one in axes)
