"""Arithmetic of the grid, against NumPy and against counting."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.grid import ChunkGrid


@st.composite
def grids(draw: st.DrawFn, *, least: int = 0) -> ChunkGrid:
    ndim = draw(st.integers(0, 4))
    shape = tuple(draw(st.integers(least, 7)) for _ in range(ndim))
    chunks = tuple(draw(st.integers(1, 9)) for _ in range(ndim))
    shards = tuple(c * draw(st.integers(1, 3)) for c in chunks) if draw(st.booleans()) else None
    return ChunkGrid(shape, chunks, shards)


@given(grids())
def test_numbers_indices_and_regions_agree(grid: ChunkGrid) -> None:
    covered = np.zeros(grid.shape, int)
    indices = list(itertools.product(*map(range, grid.grid_shape))) if len(grid) else []
    assert len(indices) == len(grid)
    for number, index in enumerate(indices):
        assert grid.index(number) == index
        assert grid.number(index) == number
        region = grid.region(number)
        assert region == grid.region_of(index)
        assert all(s.stop - s.start <= c for s, c in zip(region, grid.chunks, strict=True))
        assert covered[region].size
        covered[region] += 1
    assert (covered == 1).all()


@given(grids(), st.data())
def test_what_is_outside_the_grid_is_refused(grid: ChunkGrid, data: st.DataObject) -> None:
    for number in (-1, len(grid), len(grid) + data.draw(st.integers(0, 10**9))):
        with pytest.raises(IndexError, match="outside"):
            grid.index(number)
    with pytest.raises(IndexError, match="outside"):
        grid.number((*grid.grid_shape, 0))
    for axis in range(grid.ndim):
        index = [0] * grid.ndim
        for wrong in (-1, grid.grid_shape[axis]):
            index[axis] = wrong
            with pytest.raises(IndexError, match="outside"):
                grid.number(index)


@given(grids())
def test_shards_partition_the_chunks(grid: ChunkGrid) -> None:
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for number in range(len(grid)):
        shard, inner = grid.shard_of(number)
        outer = grid.shard_grid.index(shard)
        per = grid.chunks_per_shard
        assert tuple(o * p + i for o, p, i in zip(outer, per, inner, strict=True)) == grid.index(number)
        assert all(0 <= i < p for i, p in zip(inner, per, strict=True))
        seen.add((shard, inner))
    assert len(seen) == len(grid)


@given(grids(), st.data())
def test_rows_cover_a_box_once_in_c_order(grid: ChunkGrid, data: st.DataObject) -> None:
    start = [data.draw(st.integers(0, n)) for n in grid.grid_shape]
    stop = [data.draw(st.integers(0, n)) for n in grid.grid_shape]
    rows = list(grid.rows(start, stop))
    inside = itertools.product(*(range(a, b) for a, b in zip(start, stop, strict=True)))
    assert [n for row in rows for n in row] == [grid.number(index) for index in inside]
    assert all(rows)
    # The fewest: no row goes on where the one before it ended.
    assert all(first.stop < second.start for first, second in itertools.pairwise(rows))


def test_a_scalar_has_one_chunk() -> None:
    grid = ChunkGrid((), ())
    assert len(grid) == 1
    assert (grid.index(0), grid.number(()), grid.region(0)) == ((), 0, ())
    assert list(grid.rows((), ())) == [range(1)]


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0, 3)])
def test_an_empty_array_has_none(shape: tuple[int, ...]) -> None:
    grid = ChunkGrid(shape, (2,) * len(shape))
    assert len(grid) == 0
    assert list(grid.rows((0,) * len(shape), grid.grid_shape)) == []


def test_a_chunk_larger_than_the_array_is_cropped() -> None:
    grid = ChunkGrid((3, 5), (10, 10))
    assert len(grid) == 1
    assert grid.region(0) == (slice(0, 3), slice(0, 5))


def test_a_huge_grid_costs_nothing() -> None:
    grid = ChunkGrid((10**9, 10**9), (10, 10))
    assert grid.index(10**16 - 1) == (10**8 - 1, 10**8 - 1)
    assert list(itertools.islice(grid.rows((0, 0), (10**8, 2)), 2)) == [range(2), range(10**8, 10**8 + 2)]
    assert math.prod(grid.grid_shape) == len(grid)


@pytest.mark.parametrize(
    ("shape", "chunks", "shards"),
    [
        ((4,), (2, 2), None),
        ((4,), (0,), None),
        ((-1,), (1,), None),
        ((4,), (2,), (3,)),
        ((4,), (2,), (0,)),
        ((4,), (2,), (4, 4)),
    ],
)
def test_impossible_grids_are_refused(
    shape: tuple[int, ...], chunks: tuple[int, ...], shards: tuple[int, ...] | None
) -> None:
    with pytest.raises(UsageError):
        ChunkGrid(shape, chunks, shards)


@given(st.integers(0, 30), st.integers(1, 9), st.integers(0, 30))
def test_a_grid_that_begins_elsewhere_covers_the_rest(length: int, chunk: int, origin: int) -> None:
    grid = ChunkGrid((origin + length,), (chunk,), origin=(origin,))
    parts = [grid.region(number)[0] for number in range(len(grid))]
    assert [part.start for part in parts] == list(range(origin, origin + length, chunk))
    assert [part.stop for part in parts] == [*range(origin + chunk, origin + length, chunk), origin + length][
        : len(parts)
    ]
