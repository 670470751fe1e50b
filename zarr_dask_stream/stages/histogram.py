"""Counts by bin, with edges that are fixed before anything is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.stages.placed import Statistic
from zarr_dask_stream.stages.values import Axes, Values, is_int, valid_length

__all__ = ["Histogram", "HistogramReducer"]

_SORTED = 65536  # elements: sorting so many at once stays in the cache


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

    Examples
    --------
    >>> import numpy as np, zarr, zarr_dask_stream as zds
    >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4")
    >>> array[:] = [0, 1, 1, 2, 5, 9]
    >>> found = zds.stream_chunks(array, concurrency=1).reduce(zds.reducers.histogram(bins=2, range=(0, 4))).compute()
    >>> found.counts.tolist(), found.edges.tolist(), found.above
    ([3, 1], [0.0, 2.0, 4.0], 2)
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
    >>> from zarr_dask_stream import Chunk, reducers
    >>> reducer = reducers.histogram(2, (0, 4))
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
        self.edges = _equal_bins(bins, range) if is_int(bins) else _given_edges(bins, range)

    def _block(self, values: Values, axes: Axes) -> Values:  # noqa: ARG002  # there is no histogram along axes
        flat = values.reshape(-1)
        tally = np.zeros(self.edges.size + 2, np.int64)
        for start in range(0, flat.size, _SORTED):
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


def _equal_bins(bins: Any, limits: Any) -> npt.NDArray[np.float64]:
    if bins < 1:
        raise UsageError(f"histogram: bins must be at least 1, got {bins}")
    if limits is None:
        raise UsageError(
            f"histogram: {bins} bins need range=(first, last), as nothing has been read yet: histogram({bins}, "
            "(0.0, 1.0)); or give the edges, histogram([0.0, 0.5, 1.0])"
        )
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
    valid = values.size
    if values.dtype.kind in "biu" and values.dtype.itemsize <= 2:
        low = int(values.min())
        each = np.bincount(values.astype(np.intp) - low)
        ends = np.concatenate(([0], np.cumsum(each)))
        steps: Values = np.arange(low, low + each.size)
    else:
        steps = np.sort(values.astype(np.float32) if values.dtype == np.float16 else values)
        valid = valid_length(steps)
        steps = steps[:valid]
    place = np.searchsorted(steps, edges)
    place[-1] = np.searchsorted(steps, edges[-1], side="right")
    under = place if ends is None else ends[place]
    return np.concatenate(([under[0]], np.diff(under), [valid - under[-1], values.size - valid]))
