"""Where an item belongs in a target, and what it has to look like."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.array import open_array
from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.stages.sink import Placement, Sink


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))
def test_what_items_become_lies_side_by_side(length: int, step: int, becomes: int) -> None:
    placement = Placement((0,), (step,), (becomes,))
    parts = [placement.region((slice(a, min(a + step, length)),))[0] for a in range(0, length, step)]
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert placement.shape((slice(0, length),)) == (parts[-1].stop,)


def _sink(dtype: str = "f4", expected: Any = None) -> Sink:
    spec = open_array(zarr.create_array({}, shape=(4,), chunks=(2,), dtype=dtype))
    return Sink(spec=spec, placement=Placement((10,), (2,), (2,)), expected=expected)


def test_an_item_that_fits_is_cast() -> None:
    region, data = _sink().fit(Chunk((1,), (slice(12, 14),), [1, 2]))
    assert (region, data.dtype, np.asarray(data).tolist()) == ((slice(2, 4),), np.dtype("f4"), [1.0, 2.0])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([1, 2, 3], r"has shape \(3,\), and \(2,\) belongs there"),
        (np.array([1e300, 1]), "has values that float32 can't hold"),
        (["a", "b"], "holds <U1, and the target float32"),
        (np.array([1, 2], "M8[s]"), r"holds datetime64\[s\], and the target float32"),
    ],
)
def test_an_item_that_does_not_fit(data: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        _sink().fit(Chunk((1,), (slice(12, 14),), data))


def test_what_was_declared_is_held_to() -> None:
    chunk = Chunk((0,), (slice(10, 12),), np.array([1, 2], "i8"))
    with pytest.raises(UsageError, match=r"holds int64, and float32 was expected: .*dtype='int64'"):
        _sink(expected=np.dtype("f4")).fit(chunk)
    assert _sink(expected=np.dtype("i8")).fit(chunk)[1].dtype == np.dtype("f4")
    swapped = Chunk((0,), (slice(10, 12),), np.array([1, 2], ">f4"))
    assert _sink(expected=np.dtype("f4")).fit(swapped)[1].dtype == np.dtype("f4")
