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

from zarr_dask_stream.stages.extremes import ArgMax, ArgMin, Max, Min
from zarr_dask_stream.stages.histogram import Histogram, HistogramReducer
from zarr_dask_stream.stages.moments import Moments, MomentsReducer, Std, Var
from zarr_dask_stream.stages.placed import Placed, Statistic
from zarr_dask_stream.stages.sketch import Quantile, Quantiles
from zarr_dask_stream.stages.statistics import Count, Mean, NanCount, Sum

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

# The names of the public contract; nothing in this module needs the builtins they hide.
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
