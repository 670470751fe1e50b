"""Arrays cut into chunks and folded in runs, as a stream would, for the tests of the ready-made reducers."""

from __future__ import annotations

import itertools
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import zarr_dask_stream as zds
from zarr_dask_stream.stages import reducers

Array = np.ndarray[Any, Any]
Make = Callable[..., zds.Reducer]

# Many of the properties are tried for every reducer: a few dozen histories of each are enough.
quick = settings(max_examples=30, deadline=None)

NAMES: dict[str, Make] = {
    name: getattr(reducers, name) for name in ("count", "sum", "mean", "min", "max", "var", "std", "nan_count")
}

ALL: dict[str, zds.Reducer] = {
    **{name: make() for name, make in NAMES.items()},
    "moments": reducers.moments(),
    "histogram": reducers.histogram(4, (-10, 10)),
    "quantile": reducers.quantile(0.5),
    "argmin": reducers.argmin(),
    "argmax": reducers.argmax(),
}


def cut(data: Array, chunks: tuple[int, ...], origin: tuple[int, ...] | None = None) -> list[zds.Chunk]:
    """Cut `data`, which lies at `origin` of its array, as a stream would."""
    origin = origin or (0,) * data.ndim
    out = []
    for corner in itertools.product(*(range(0, n, c) for n, c in zip(data.shape, chunks, strict=True))):
        local = tuple(slice(i, min(i + c, n)) for i, c, n in zip(corner, chunks, data.shape, strict=True))
        region = tuple(slice(s.start + o, s.stop + o) for s, o in zip(local, origin, strict=True))
        out.append(zds.Chunk(tuple(i // c for i, c in zip(corner, chunks, strict=True)), region, data[local]))
    return out


def fold(reducer: zds.Reducer, chunks: list[zds.Chunk], sizes: tuple[int, ...] = ()) -> Any:
    """Fold runs of so many chunks each into partials, send each by pickle, and merge them from both ends."""
    partials, rest = [], list(chunks)
    for size in sizes or (len(chunks),):
        partial = reducer.create()
        for chunk in rest[:size]:
            partial = reducer.add(partial, chunk)
        rest = rest[size:]
        partials.append(pickle.loads(pickle.dumps(partial)))
    partials += [reducer.add(reducer.create(), chunk) for chunk in rest]
    while len(partials) > 1:
        partials = [reducer.merge(partials.pop(), partials.pop(0)), *partials]
    return reducer.finish(partials[0])


def one(reducer: zds.Reducer, values: Any) -> Any:
    """Reduce an array as a single chunk, or a number as what a map returned."""
    shape = np.shape(values)
    return fold(reducer, [zds.Chunk((0,) * len(shape), tuple(slice(0, n) for n in shape), values)])


@st.composite
def axes_of(draw: st.DrawFn, ndim: int) -> Any:
    kept = draw(
        st.sampled_from([None, *(c for n in range(1, ndim + 1) for c in itertools.combinations(range(ndim), n))])
    )
    return kept if kept is None else tuple(draw(st.sampled_from([axis, axis - ndim])) for axis in kept)


@st.composite
def cuts(draw: st.DrawFn, elements: st.SearchStrategy[Any], dtype: Any) -> tuple[Array, list[zds.Chunk], Any, Any]:
    """Draw an array, its chunks (anywhere in a larger array, in any order), axes, and sizes of batches."""
    shape = draw(hnp.array_shapes(max_dims=3, max_side=6))
    data = draw(hnp.arrays(dtype, shape, elements=elements))
    chunks = tuple(draw(st.integers(1, n)) for n in shape)
    origin = tuple(draw(st.integers(0, 9)) for _ in shape)
    pieces = draw(st.permutations(cut(data, chunks, origin)))
    return data, pieces, draw(axes_of(len(shape))), tuple(draw(st.lists(st.integers(0, 4), max_size=5)))


NUMBERS = st.floats(-1e6, 1e6) | st.sampled_from([0.0, 1.0, -1.0, math.nan])


def xarrays(name: str, data: Array, axis: Any, **options: Any) -> Any:
    """What xarray says, of the data in double precision."""
    labelled = xr.DataArray(data)
    dims = None if axis is None else tuple(labelled.dims[i] for i in axis)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "nan_count":
            return np.asarray(labelled.isnull().sum(dims))
        return np.asarray(getattr(labelled, name)(dims, **({} if name == "count" else options)))
