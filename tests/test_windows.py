"""Windows as arithmetic: where they lie, which chunks and panes they consist of, all against brute force."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from windowing import alongs
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.chunk import Chunk, Variables
from zarr_dask_stream.source.grid import ChunkGrid, Region
from zarr_dask_stream.source.selection import ChunkPlan
from zarr_dask_stream.stages.windows import Along, Every, InWindow, parse_along, parse_every


def elements(region: Region) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(part.start, part.stop) for part in region)))


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 12))
def test_windows_begin_every_step_until_one_reaches_the_end(length: int, size: int, step: int) -> None:
    plan = ChunkPlan(ChunkGrid((100,), (7,)), (slice(50, 50 + length),))
    along = parse_along(plan, None, 0, min(size, length), step)
    spans = [along.region(k)[0] for k in range(len(along))]
    size = min(size, length)
    assert spans[0] == slice(50, 50 + size)
    assert [span.start for span in spans] == [50 + k * step for k in range(len(spans))]
    assert all(span.stop - span.start == size for span in spans[:-1])
    assert all(span.stop < 50 + length for span in spans[:-1]), "only the last reaches the end"
    assert spans[-1].stop == 50 + length or spans[-1].start + step >= 50 + length, "nothing is left out at the end"
    if step <= size:
        assert {i for span in spans for i in range(span.start, span.stop)} == set(range(50, 50 + length))


@given(alongs())
def test_panes_make_up_windows_without_overlap(case: tuple[ChunkPlan, Along]) -> None:
    plan, along = case
    data = np.arange(np.prod(plan.grid.shape)).reshape(plan.grid.shape)
    parts: dict[Any, list[Chunk]] = {}
    for number in plan:
        chunk = Chunk.planned(plan, number, data[plan.region(number)])
        for pane, part in along.cut(chunk):
            assert np.array_equal(part.data, data[part.region])
            parts.setdefault(pane, []).append(part)
    for window in range(len(along)):
        inside = [part for pane in along.panes(window) for part in parts.get(pane, [])]
        values = sorted(value for part in inside for value in part.data.ravel().tolist())
        assert values == sorted(data[along.region(window)].ravel().tolist())
    for pane, pieces in parts.items():
        windows = set(along.windows_of(pane))
        assert windows
        assert windows == {k for k in range(len(along)) if pane in set(along.panes(k))}
        for piece in pieces:
            assert windows == {k for k in range(len(along)) if elements(along.region(k)) & elements(piece.region)}


@given(alongs())
def test_chunks_and_windows_know_each_other(case: tuple[ChunkPlan, Along]) -> None:
    plan, along = case
    everything = list(plan)
    for number in everything:
        mine = set(along.windows_at(along.position(number)))
        assert mine == {k for k in range(len(along)) if elements(along.region(k)) & elements(plan.region(number))}
    for window in range(len(along)):
        inside = [n for n in everything if elements(along.region(window)) & elements(plan.region(n))]
        assert along.planned(plan, window) == len(inside)
        assert sorted(plan.grid.number(i) for i in itertools.product(*along.chunks(window))) == inside
    for some in (everything, everything[::3], everything[:1], []):
        counted = {
            window: sum(window in set(along.windows_at(along.position(number))) for number in some)
            for window in range(len(along))
        }
        assert along.counted(some) == {window: count for window, count in counted.items() if count}
    odd = ChunkPlan(plan.grid, plan.box, lambda index: sum(index) % 2 == 1)
    for window in range(len(along)):
        inside = [n for n in odd if elements(along.region(window)) & elements(plan.region(n))]
        assert along.planned(odd, window) == len(inside)
    wanted = InWindow(along)
    assert along.gaps or all(wanted(plan.grid.index(number)) for number in everything)


@given(alongs())
def test_a_window_is_behind_once_all_its_chunks_were_passed(case: tuple[ChunkPlan, Along]) -> None:
    plan, along = case
    walk = sorted(plan, key=along.position)
    for at, number in enumerate(walk):
        ahead = {along.position(n) for n in walk[at:]}
        for window in range(len(along)):
            chunks = {along.position(n) for n in plan if window in set(along.windows_at(along.position(n)))}
            if along.behind(window, along.position(number)):
                assert not chunks & ahead
            elif not any(c >= along.position(number) for c in chunks):
                pytest.fail("all its chunks were passed")
    assert all(along.behind(window, None) for window in range(len(along)))


def test_a_plan_that_takes_whole_shards_passes_windows_shard_by_shard() -> None:
    plan = ChunkPlan(ChunkGrid((12, 2), (1, 2), (4, 2)), (slice(0, 12), slice(0, 2)))
    along = parse_along(plan, None, 0, 2)
    assert [along.behind(0, (at,)) for at in (1, 3, 4)] == [False, False, True]


def test_windows_along_several_axes_are_numbered_in_c_order() -> None:
    plan = ChunkPlan(ChunkGrid((8, 4, 6), (2, 2, 2)), (slice(0, 8), slice(0, 4), slice(0, 6)))
    along = parse_along(plan, None, (1, -1), (2, 3))
    assert [along.index(k) for k in range(len(along))] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert along.region(1) == (slice(0, 8), slice(0, 2), slice(3, 6))
    assert parse_along(plan, None, 1, 2).index(1) == 1
    assert parse_along(plan, ("t", "y", "x"), ("y",), 2).index(1) == (1,)


def test_what_lies_between_windows_is_left_out() -> None:
    plan = ChunkPlan(ChunkGrid((20,), (2,)), (slice(0, 20),))
    along = parse_along(plan, None, 0, 3, 8)
    assert along.gaps
    wanted = InWindow(along, lambda index: index != (4,))
    assert [i for i in range(10) if wanted((i,))] == [0, 1, 5, 8, 9]
    cut = [part.region[0] for n in plan for _, part in along.cut(Chunk.planned(plan, n, np.zeros(2)))]
    assert [(part.start, part.stop) for part in cut] == [
        (0, 2),
        (2, 3),
        (8, 10),
        (10, 11),
        (16, 18),
        (18, 19),
    ]


def test_a_window_that_ends_inside_a_chunk_needs_data_of_its_shape() -> None:
    plan = ChunkPlan(ChunkGrid((4,), (4,)), (slice(0, 4),))
    along = parse_along(plan, None, 0, 2)
    with pytest.raises(UsageError, match=r"ends inside chunk \(0,\) of shape \(4,\).*have shape \(\)"):
        list(along.cut(Chunk.planned(plan, 0, 3.0)))
    several = Variables({"a": np.arange(4), "mask": np.zeros(())}, axes={"a": (0,), "mask": ()})
    with pytest.raises(UsageError, match="'mask' has not the dimension along which to cut it"):
        list(along.cut(Chunk.planned(plan, 0, several)))
    del several["mask"]
    assert [part.data["a"].tolist() for _, part in along.cut(Chunk.planned(plan, 0, several))] == [[0, 1], [2, 3]]
    [(pane, part)] = parse_along(plan, None, 0, 4).cut(Chunk.planned(plan, 0, 3.0))
    assert (pane, part.data) == ((0,), 3.0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"along": 2, "size": 1}, "along=2 is not an axis of an array with 2"),
        ({"along": "t", "size": 1}, "no dimension 't'; its dimension names: 'y', 'x'"),
        ({"along": 1.0, "size": 1}, "along is an axis"),
        ({"along": True, "size": 1}, "along is an axis"),
        ({"along": (), "size": 1}, "along names one axis or several"),
        ({"along": (0, -2), "size": 1}, "different ones"),
        ({"along": ("x", "y"), "size": 1}, "order of the array"),
        ({"along": 0, "size": None}, "size is a number of elements, at least 1, got None"),
        ({"along": 0, "size": 0}, "size is a number"),
        ({"along": 0, "size": 2, "step": 0}, "step is a number"),
        ({"along": 0, "size": (1, 2)}, "size is one number of elements, or one for each of 1"),
        ({"along": 0, "size": 9}, "size=9 is longer than the stream's region along axis 0, 8"),
    ],
)
def test_what_makes_no_window_is_refused(options: Any, says: str) -> None:
    plan = ChunkPlan(ChunkGrid((9, 6), (3, 3)), (slice(1, 9), slice(0, 6)))
    with pytest.raises(UsageError, match=says):
        parse_along(plan, ("y", "x"), **options)


def test_windows_travel_without_what_they_have_worked_out() -> None:
    plan = ChunkPlan(ChunkGrid((8,), (2,)), (slice(0, 8),))
    along = parse_along(plan, None, 0, 4)
    assert [pane for number in plan for pane, _ in along.cut(Chunk.planned(plan, number, None))] == [
        (0,),
        (0,),
        (1,),
        (1,),
    ]
    again = pickle.loads(pickle.dumps(along))
    assert again == along
    assert (along._seen, again._seen) == ({(at,): (((at // 2,),), True) for at in range(4)}, {})


def test_an_empty_region_has_no_windows() -> None:
    assert len(parse_along(ChunkPlan(ChunkGrid((9,), (3,)), (slice(0, 0),)), None, 0, 3)) == 0


def test_triggers_are_checked() -> None:
    assert parse_every(3, 2.5, True) == Every(3, 2.5, True)
    for every, seconds, reset, says in [
        (0, None, False, "every is a number of chunks"),
        (True, None, False, "every"),
        (None, 0, False, "seconds is a number greater than 0"),
        (None, float("inf"), False, "seconds"),
        (1, None, 1, "reset is True or False"),
    ]:
        with pytest.raises(UsageError, match=says):
            parse_every(every, seconds, reset)
