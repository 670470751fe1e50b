"""Regions against NumPy's own indexing, plans against brute force, and both without counting to 10^12."""

from __future__ import annotations

import contextlib
import itertools
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.grid import ChunkGrid
from zarr_dask_stream.source.selection import ChunkPlan, decode_numbers, encode_numbers, parse_region

shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)
bounds = st.none() | st.integers(-9, 9)


@st.composite
def entries(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Draw a region of basic indexing for an array of that shape: it may lie outside."""
    given = draw(st.integers(0, len(shape)))
    parts: list[Any] = [
        draw(st.one_of(st.builds(slice, bounds, bounds, st.none() | st.just(1)), st.integers(-7, 7)))
        for _ in range(given)
    ]
    if draw(st.booleans()):
        parts.insert(draw(st.integers(0, given)), ...)
    return tuple(parts)


@given(st.data())
def test_a_region_is_what_numpy_would_take(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    region = data.draw(entries(shape))
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    try:
        parsed = parse_region(region, shape)
    except UsageError:
        # Refused: NumPy refuses too, or finds nothing there.
        with contextlib.suppress(IndexError):
            assert array[region].size == 0
        return
    assert len(parsed) == len(shape)
    for part, length in zip(parsed, shape, strict=True):
        assert part.step is None
        assert 0 <= part.start <= part.stop <= length
    np.testing.assert_array_equal(array[parsed].ravel(), array[region].ravel())


@pytest.mark.parametrize(
    ("region", "expected"),
    [
        (None, (slice(0, 4), slice(0, 6))),
        (..., (slice(0, 4), slice(0, 6))),
        ((), (slice(0, 4), slice(0, 6))),
        (-1, (slice(3, 4), slice(0, 6))),
        ((..., -1), (slice(0, 4), slice(5, 6))),
        ((slice(1, 2), ..., slice(2, None)), (slice(1, 2), slice(2, 6))),
        ((1, slice(2, 99)), (slice(1, 2), slice(2, 6))),
        (np.int64(2), (slice(2, 3), slice(0, 6))),
        (slice(np.int16(1), np.uint8(3)), (slice(1, 3), slice(0, 6))),
        (slice(3, 1), (slice(3, 3), slice(0, 6))),
    ],
)
def test_regions_by_example(region: Any, expected: tuple[slice, ...]) -> None:
    parsed = parse_region(region, (4, 6))
    assert parsed == expected
    assert all(type(bound) is int for part in parsed for bound in (part.start, part.stop))


@pytest.mark.parametrize(
    ("region", "says"),
    [
        ((..., 1, ...), "at most one Ellipsis"),
        ((1, 1, 1), "3 axes"),
        (4, "index 4 is outside"),
        (-5, "outside"),
        (slice(4, 9), "outside"),
        (slice(-9, -5), "outside"),
        (slice(None, None, 2), "step"),
        (slice(None, None, -1), "step"),
        ("a", "must be an integer"),
        (True, "must be an integer"),
        (1.0, "must be an integer"),
        (np.array([0, 1]), "must be an integer"),
        (slice("a", None), "bounds must be integers"),
        (slice(0.5, 2), "bounds must be integers"),
    ],
)
def test_bad_regions_are_named(region: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_region(region, (4, 6))


# -- plans ------------------------------------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn) -> tuple[ChunkPlan, list[int]]:
    """Draw a plan and, by brute force, the numbers it has to give."""
    ndim = draw(st.integers(0, 3))
    shape = tuple(draw(st.integers(0, 12)) for _ in range(ndim))
    chunks = tuple(draw(st.integers(1, 5)) for _ in range(ndim))
    shards = tuple(c * draw(st.integers(1, 3)) for c in chunks) if draw(st.booleans()) else None
    grid = ChunkGrid(shape, chunks, shards)
    box = []
    for length in shape:
        start, stop = sorted((draw(st.integers(0, length)), draw(st.integers(0, length))))
        box.append(slice(start, stop))
    refused = draw(st.sets(st.integers(0, max(len(grid) - 1, 0)))) if draw(st.booleans()) else None
    where = None if refused is None else lambda index: grid.number(index) not in refused
    inside = np.zeros(shape, bool)
    inside[tuple(box)] = True
    numbers = [n for n in range(len(grid)) if inside[grid.region(n)].any() and n not in (refused or ())]
    return ChunkPlan(grid, tuple(box), where), numbers


@given(plans())
def test_a_plan_walks_what_brute_force_finds(drawn: tuple[ChunkPlan, list[int]]) -> None:
    plan, numbers = drawn
    assert list(plan) == numbers
    assert list(plan) == numbers, "a plan can be walked again"
    assert len(plan) == len(numbers)
    assert plan.where is not None or all(plan.runs()), "only a predicate makes empty runs"


@given(plans())
def test_by_shard_is_a_permutation_one_shard_after_the_other(drawn: tuple[ChunkPlan, list[int]]) -> None:
    plan, numbers = drawn
    walk = list(decode_numbers(plan.runs(by_shard=True)))
    assert sorted(walk) == numbers
    shards = [plan.grid.shard_of(number)[0] for number in walk]
    assert [shard for shard, _ in itertools.groupby(shards)] == sorted(set(shards))


@given(plans(), st.data())
def test_along_axes_is_a_permutation_one_place_after_the_other(
    drawn: tuple[ChunkPlan, list[int]], data: st.DataObject
) -> None:
    plan, numbers = drawn
    axes = sorted(data.draw(st.sets(st.integers(0, max(plan.grid.ndim - 1, 0))))) if plan.grid.ndim else []
    walk = list(decode_numbers(plan.runs_along(axes)))
    assert sorted(walk) == numbers
    per = plan.grid.chunks_per_shard
    places = [tuple(plan.grid.index(number)[axis] // per[axis] for axis in axes) for number in walk]
    assert places == sorted(places)
    shards = [plan.grid.shard_of(number)[0] for number in walk]
    assert len([shard for shard, _ in itertools.groupby(shards)]) == len(set(shards)), "each shard in one go"


@given(plans())
def test_regions_of_a_plan_tile_its_box(drawn: tuple[ChunkPlan, list[int]]) -> None:
    plan, numbers = drawn
    covered = np.zeros(plan.grid.shape, int)
    for number in numbers:
        covered[plan.region(number)] += 1
    assert covered.max(initial=0) <= 1
    outside = np.ones(plan.grid.shape, bool)
    outside[plan.box] = False
    assert not covered[outside].any()
    if plan.where is None:
        assert covered[plan.box].all()


@given(st.lists(st.integers(0, 60), max_size=40))
def test_packed_numbers_come_back_in_order(numbers: list[int]) -> None:
    ranges = encode_numbers(numbers)
    assert list(decode_numbers(ranges)) == numbers
    assert all(ranges)
    assert len(ranges) <= len(numbers)


@given(st.integers(0, 99), st.integers(1, 9), st.integers(1, 50))
def test_an_arithmetic_run_is_one_range(start: int, step: int, length: int) -> None:
    run = range(start, start + step * length, step)
    assert len(encode_numbers(run)) == 1


def test_packing_goes_deep_neither_in_calls_nor_in_time() -> None:
    """Gaps that grow all the time look like a new run at each number."""
    numbers = list(itertools.accumulate(range(100_000)))
    began = time.process_time()
    assert list(decode_numbers(encode_numbers(numbers))) == numbers
    assert time.process_time() - began < 2


def test_a_where_that_raises_is_named() -> None:
    def where(index: tuple[int, ...]) -> bool:
        if index == (2,):
            raise KeyError("month")
        return True

    grid = ChunkGrid((8,), (2,))
    plan = ChunkPlan(grid, parse_region(None, grid.shape), where)
    with pytest.raises(UsageError, match=r"where\(\(2,\)\) raised KeyError") as caught:
        list(plan)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_where_that_raises_stop_iteration_does_not_end_the_plan() -> None:
    def where(index: tuple[int, ...]) -> bool:
        raise StopIteration

    grid = ChunkGrid((8,), (2,))
    with pytest.raises(UsageError, match="StopIteration"):
        list(ChunkPlan(grid, parse_region(None, grid.shape), where))


def test_where_gets_plain_integers_and_any_truth_counts() -> None:
    seen: list[Any] = []
    grid = ChunkGrid((6, 6), (2, 2))

    def where(index: tuple[int, ...]) -> Any:
        seen.append(index)
        return np.bool_(index[0] == 1)

    assert list(ChunkPlan(grid, parse_region(None, grid.shape), where)) == [3, 4, 5]
    assert all(type(i) is int for index in seen for i in index)


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("where", [None, lambda index: index[1] % 2 == 1])
def test_a_trillion_chunks_begin_at_once_along_any_axis(axes: tuple[int, ...], where: Any) -> None:
    plan = ChunkPlan(ChunkGrid((10**6, 10**6), (1, 1)), (slice(0, 10**6), slice(0, 10**6)), where)
    runs = plan.runs_along(axes)
    assert len(next(run for run in runs if run)) >= 1


@pytest.mark.parametrize("by_shard", [False, True])
@pytest.mark.parametrize("where", [None, lambda _: True], ids=["all", "where"])
def test_a_trillion_chunks_begin_at_once(by_shard: bool, where: Any) -> None:
    asked = itertools.count()

    def counted(index: tuple[int, ...]) -> Any:
        next(asked)
        return where(index)

    grid = ChunkGrid((10**9, 10**9), (1000, 1000), (10_000, 10_000))
    plan = ChunkPlan(grid, parse_region((slice(5, None), ...), grid.shape), counted if where else None)
    began = time.process_time()
    first = next(plan.runs(by_shard=by_shard))
    assert first.start == 0
    assert time.process_time() - began < 0.2
    assert next(asked) <= 1000
    if where is None:
        assert len(plan) == 10**12


@pytest.mark.parametrize("region", [[1, 2], [slice(0, 2)], []])
def test_a_list_is_refused_because_it_means_something_else_to_numpy(region: Any) -> None:
    with pytest.raises(UsageError, match=r"is a list.*write a tuple.*where="):
        parse_region(region, (4, 5))
