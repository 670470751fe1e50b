"""The ready-made reducers against NumPy and xarray on the same data, however it is cut and joined."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import zarr_dask_stream as zds
from zarr_dask_stream.stages import reducers

Array = np.ndarray[Any, Any]


def cut(data: Array, chunks: tuple[int, ...], origin: tuple[int, ...] | None = None) -> list[zds.Chunk]:
    """Cut `data`, which lies at `origin` of its array, as a stream would."""
    origin = origin or (0,) * data.ndim
    starts = [range(0, n, c) for n, c in zip(data.shape, chunks, strict=True)]
    out = []
    for corner in itertools.product(*starts):
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
    for chunk in rest:
        partials.append(reducer.add(reducer.create(), chunk))
    while len(partials) > 1:
        partials = [reducer.merge(partials.pop(), partials.pop(0)), *partials]
    return reducer.finish(partials[0])


FLOATS = {
    "sum": (reducers.sum, np.nansum),
    "mean": (reducers.mean, np.nanmean),
    "min": (reducers.min, np.nanmin),
    "max": (reducers.max, np.nanmax),
    "var": (reducers.var, np.nanvar),
    "std": (reducers.std, np.nanstd),
}


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 1), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i2", "u8", "?"])
def test_like_numpy(name: str, axis: Any, dtype: str) -> None:
    ours, numpys = FLOATS[name]
    data = np.random.default_rng(3).normal(3, 4, (7, 5, 6)).astype("f4")
    if dtype[0] == "f":
        data[np.random.default_rng(4).random(data.shape) < 0.1] = np.nan
    typed = np.abs(data).astype(dtype) if dtype[0] != "f" else data.astype(dtype)
    exact = typed if name in ("min", "max") else typed.astype("f8")
    got = fold(ours(axis), cut(typed, (3, 2, 4)), (3, 0, 4))
    np.testing.assert_allclose(got, numpys(exact, axis=axis), rtol=1e-13)
    assert np.shape(got) == np.shape(numpys(exact, axis=axis))
