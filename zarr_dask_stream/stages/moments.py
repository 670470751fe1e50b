"""Variance, standard deviation and the moments that say what shape a distribution has."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import numpy as np

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.stages.central import Central, central, central_along, joined
from zarr_dask_stream.stages.placed import Statistic
from zarr_dask_stream.stages.values import Axes, Axis, Values, is_int

__all__ = ["Moments", "MomentsReducer", "Std", "Var"]


class _Centred(Statistic):
    """What variance and moments share."""

    _order: ClassVar[int] = 2

    def _block(self, values: Values, axes: Axes) -> Central:
        if axes is not None:
            return central_along(values, axes, self._order, skipna=self.skipna)
        flat = values.reshape(-1)
        state = central(flat, self._order)
        if self.skipna and flat.dtype.kind == "f" and math.isnan(state[1]):
            state = central(flat[~np.isnan(flat)], self._order)
        return state

    def _join(self, left: Central, right: Central) -> Central:
        return joined(left, right)


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
    >>> from zarr_dask_stream import Chunk, reducers
    >>> data = 1e9 + np.array([4.0, 7.0, 13.0, 16.0])
    >>> reducer = reducers.var(ddof=1)
    >>> reducer.finish(reducer.add(reducer.create(), Chunk((0,), (slice(0, 4),), data)))
    np.float64(30.0)
    """

    name = "var"

    def __init__(self, axis: Axis = None, *, ddof: int = 0, skipna: bool = True, placed: bool = False) -> None:
        super().__init__(axis, skipna=skipna, placed=placed)
        if not is_int(ddof) or ddof < 0:
            raise UsageError(f"{self.name}: ddof must be an int of at least 0, got {ddof!r}")
        self.ddof = int(ddof)

    def _answer(self, state: Central) -> Any:
        count, _, (m2,) = state
        divisor = np.asarray(count - self.ddof, np.float64)
        return np.where(divisor > 0, m2 / divisor, math.nan)[()]

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
    >>> from zarr_dask_stream import Chunk, reducers
    >>> reducer = reducers.std()
    >>> reducer.finish(reducer.add(reducer.create(), Chunk((0,), (slice(0, 2),), np.array([1, 5]))))
    np.float64(2.0)
    """

    name = "std"

    def _answer(self, state: Central) -> Any:
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

    Examples
    --------
    >>> import zarr, zarr_dask_stream as zds
    >>> array = zarr.create_array({}, shape=(4,), chunks=(2,), dtype="f8")
    >>> array[:] = [1, 2, 3, 4]
    >>> found = zds.stream_chunks(array, concurrency=1).reduce(zds.reducers.moments()).compute()
    >>> int(found.count), float(found.mean), float(found.variance), float(found.skewness)
    (4, 2.5, 1.25, 0.0)
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
    >>> from zarr_dask_stream import Chunk, reducers
    >>> reducer = reducers.moments()
    >>> chunk = Chunk((0,), (slice(0, 4),), np.array([0.0, 0.0, 0.0, 4.0]))
    >>> answer = reducer.finish(reducer.add(reducer.create(), chunk))
    >>> answer.count, float(answer.mean), float(answer.variance), round(float(answer.skewness), 6)
    (4, 1.0, 3.0, 1.154701)
    """

    name = "moments"
    _order = 4

    def _answer(self, state: Central) -> Moments:
        count, mean, (m2, m3, m4) = state
        n = np.asarray(count, np.float64)
        variance = m2 / n
        # As small as that it is only what rounding left of 0, which says nothing of a shape.
        flat = variance <= (np.finfo(np.float64).eps * np.abs(mean)) ** 2
        spread = np.where(flat, math.nan, variance)[()]
        return Moments(
            int(count) if np.ndim(m2) == 0 else np.broadcast_to(count, m2.shape).astype(np.int64),
            np.where(n > 0, mean, math.nan)[()],
            variance,
            m3 / n / spread**1.5,
            m4 / n / (spread * spread) - 3,
        )

    def _empty(self) -> Moments:
        nan = np.float64(math.nan)
        return Moments(0, nan, nan, nan, nan)
