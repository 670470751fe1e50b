"""What lies around a box, beside ``numpy.pad``."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

import zarr_dask_stream as zds
from zarr_dask_stream.source.halo import Halo, parse_halo

PAD: dict[str, Any] = {"periodic": "wrap", "reflect": "symmetric", "nearest": "edge"}


def padded(data: npt.NDArray[Any], halo: Halo) -> npt.NDArray[Any]:
    """The array with its edges, axis by axis: nothing where the boundary is None."""
    for axis, (pair, boundary) in enumerate(zip(halo.depth, halo.boundary, strict=True)):
        width = [(0, 0)] * data.ndim
        width[axis] = pair
        if isinstance(boundary, str):
            data = np.pad(data, width, mode=PAD[boundary])
        elif boundary is not None:
            data = np.pad(data, width, constant_values=boundary)
    return data


@given(st.data())
def test_blocks_with_neighbours_are_cut_from_the_padded_array(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=3)))
    chunks, size = (tuple(data.draw(st.integers(1, n)) for n in shape) for _ in range(2))
    depth = tuple((data.draw(st.integers(0, n)), data.draw(st.integers(0, n))) for n in shape)
    boundary = tuple(data.draw(st.sampled_from([None, -7, "periodic", "reflect", "nearest"])) for _ in shape)
    low = [data.draw(st.integers(0, n - 1)) for n in shape]
    region = tuple(slice(a, data.draw(st.integers(a + 1, n))) for a, n in zip(low, shape, strict=True))
    values = np.arange(1, 1 + int(np.prod(shape)), dtype="i4").reshape(shape)
    array = zarr.create_array({}, shape=shape, chunks=chunks, dtype="i4", fill_value=-1)
    array[...] = values
    whole = padded(values, Halo(depth, boundary))
    stream = zds.stream_chunks(array, region=region, concurrency=1).rechunk(size).halo(depth, boundary)
    seen = np.zeros(shape, bool)
    for chunk in stream:
        around = []
        for part, (before, after), edge, n in zip(chunk.region, depth, boundary, shape, strict=True):
            clipped = slice(max(part.start - before, 0), min(part.stop + after, n))
            around.append(clipped if edge is None else slice(part.start, part.stop + before + after))
        np.testing.assert_array_equal(chunk.data, whole[tuple(around)])
        np.testing.assert_array_equal(chunk.data[chunk.core], values[chunk.region])
        assert not seen[chunk.region].any()
        seen[chunk.region] = True
    assert seen[region].all()
    assert seen.sum() == seen[region].size


@pytest.mark.parametrize(
    ("depth", "boundary", "words"),
    [
        (-1, None, "elements >= 0"),
        (5, None, "depth 5 along axis 0 is more than the array's 4"),
        ((1,), None, "1 entries for 2 axes"),
        ({2: 1}, None, "names axis 2"),
        (True, None, "elements >= 0"),
        (1.5, None, "elements >= 0"),
        (1, "mirror", "'periodic', 'reflect', 'nearest'"),
        (1, 0.5, "fit the array's dtype int16"),
        (1, 70000, "fit the array's dtype int16"),
        (1, float("nan"), "fit the array's dtype int16"),
    ],
)
def test_bad_halos(depth: Any, boundary: Any, words: str) -> None:
    with pytest.raises(zds.UsageError, match=words):
        parse_halo(depth, boundary, (4, 6), np.dtype("i2"))


def test_ways_to_write_a_halo() -> None:
    assert parse_halo({-1: (1, 2)}, {1: "reflect"}, (4, 6), np.dtype("f4")) == Halo(((0, 0), (1, 2)), (None, "reflect"))
    assert parse_halo(1, np.nan, (4,), np.dtype("f4")).depth == ((1, 1),)
    assert parse_halo(1, "none", (4,), np.dtype("f4")) == Halo(((1, 1),), (None,))
    assert not parse_halo(0, "nearest", (4,), np.dtype("f4"))


def test_a_stencil_over_the_whole_array_is_the_same_as_in_one_piece() -> None:
    values = np.random.default_rng(3).normal(size=(40, 30))
    array = zarr.create_array({}, shape=values.shape, chunks=(7, 8), dtype="f8")
    array[:] = values

    def laplace(data: npt.NDArray[Any]) -> npt.NDArray[Any]:
        around = data[:-2, 1:-1] + data[2:, 1:-1] + data[1:-1, :-2] + data[1:-1, 2:]
        return np.asarray(around - 4 * data[1:-1, 1:-1])

    expected = laplace(np.pad(values, 1, mode="wrap"))
    stream = zds.stream_chunks(array, ordered=False).halo(1, "periodic").map(lambda chunk: laplace(chunk.data))
    out = np.full(values.shape, np.nan)
    for chunk in stream:
        out[chunk.region] = chunk.data
    np.testing.assert_array_equal(out, expected)
