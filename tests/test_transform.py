"""Map and filter: their order, and functions that can't be called found before anything is read."""

from __future__ import annotations

import functools
import operator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.source.grid import ChunkGrid
from zarr_dask_stream.source.selection import ChunkPlan
from zarr_dask_stream.stages.batch import BatchRule, MapBatch
from zarr_dask_stream.stages.transform import Filter, Map, Pipeline, Stage, check_function, compile_stages


def chunk_of(data: Any) -> Chunk:
    return Chunk((4,), (slice(8, 10),), data, missing=True)


def test_no_stage_changes_nothing() -> None:
    chunk = chunk_of(1)
    assert compile_stages([])(chunk) is chunk


def test_stages_run_in_order_and_keep_the_place() -> None:
    stages: list[Map | Filter] = [Map(lambda c: c.data + 1), Filter(lambda c: c.data > 1), Map(lambda c: c.data * 10)]
    out = compile_stages(stages)(chunk_of(2))
    assert out is not None
    assert (out.data, out.index, out.region, out.missing) == (30, (4,), (slice(8, 10),), True)


def test_nothing_runs_after_a_refusal() -> None:
    seen: list[Any] = []
    run = compile_stages([Filter(lambda c: c.data), Map(lambda c: seen.append(c.data))])
    assert run(chunk_of(0)) is None
    assert seen == []
    assert run(chunk_of(5)) is not None
    assert seen == [5]


def test_a_value_of_none_is_a_value() -> None:
    out = compile_stages([Map(lambda _: None), Map(lambda c: c.data is None)])(chunk_of(1))
    assert out is not None
    assert out.data is True


@pytest.mark.parametrize(
    ("answer", "kept"), [(np.True_, True), (np.False_, False), ("", False), (3, True), (None, False)]
)
def test_any_truth_counts(answer: Any, kept: bool) -> None:
    assert (compile_stages([Filter(lambda _: answer)])(chunk_of(1)) is not None) is kept


def test_a_truth_that_is_not_clear_is_an_error() -> None:
    with pytest.raises(ValueError, match="ambiguous"):
        compile_stages([Filter(lambda _: np.array([True, False]))])(chunk_of(1))


class Callable:
    def __call__(self, chunk: Chunk, scale: int = 2) -> Any:
        return chunk.data * scale


def two(a: Any, b: Any) -> Any:
    return a, b


@pytest.mark.parametrize(
    "fn",
    [len, np.sum, np.sqrt, Callable(), functools.partial(two, b=1), operator.attrgetter("data"), lambda *a: a, str],
)
def test_what_takes_one_argument_is_taken(fn: Any) -> None:
    check_function(fn, "map", "the chunk")


@pytest.mark.parametrize(
    ("fn", "says"),
    [
        (3, "map needs a function of the chunk, got int: 3"),
        (None, "got NoneType"),
        (lambda: 1, r"map calls <lambda>\(\) with one argument, the chunk"),
        (two, r"two\(a: .*missing a required argument: 'b'"),
        (functools.partial(two, 1, 2), "too many positional"),
        (lambda *, chunk: chunk, "too many positional"),
    ],
)
def test_what_can_not_be_called_so_is_refused(fn: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        check_function(fn, "map", "the chunk")


# -- chains with functions of many ----------------------------------------------------------------------

PLAN = ChunkPlan(ChunkGrid((40,), (1,)), (slice(0, 40),))


def indivisible(by: int, chunk: Chunk) -> bool:
    return bool(chunk.data % by)


@given(
    st.integers(0, 40),
    st.lists(
        st.one_of(
            st.tuples(st.just("many"), st.integers(1, 7)),
            st.tuples(st.just("filter"), st.integers(2, 5)),
            st.tuples(st.just("map"), st.just(0)),
        ),
        max_size=5,
    ),
    st.sets(st.integers(0, 39), max_size=4),
)
def test_each_chunk_comes_out_once_as_if_it_were_alone(count: int, kinds: list[tuple[str, int]], bad: set[int]) -> None:
    def alone(chunk: Chunk) -> Any:
        if chunk.number in bad:
            raise ArithmeticError(chunk.number)
        return 3 * chunk.data + 1

    stages: list[Stage] = []
    for kind, n in kinds:
        if kind == "many":
            stages.append(MapBatch(lambda batch: [alone(chunk) for chunk in batch], BatchRule(size=n)))
        elif kind == "map":
            stages.append(Map(alone))
        else:
            stages.append(Filter(functools.partial(indivisible, n)))
    singles = [Map(alone) if isinstance(stage, MapBatch) else stage for stage in stages]
    expected: dict[int, Any] = {}
    for number in range(count):
        try:
            alike = compile_stages(singles)(Chunk.planned(PLAN, number, number))
            expected[number] = None if alike is None else alike.data
        except ArithmeticError:
            expected[number] = ArithmeticError
    calls: list[tuple[int | None, ...]] = []
    pipeline = Pipeline(stages, lambda chunks: calls.append(tuple(chunk.number for chunk in chunks)))
    outcomes = [out for n in range(count) for out in pipeline.push(Chunk.planned(PLAN, n, n))]
    outcomes += pipeline.flush()
    came = {}
    for out in outcomes:
        assert out.number not in came
        came[out.number] = type(out.error) if out.error is not None else None if out.chunk is None else out.chunk.data
    assert came == expected
    assert not calls or calls[-1] == (), "in the end nothing is being called"


def test_a_chunk_waits_for_others_or_for_the_end() -> None:
    pipeline = Pipeline([MapBatch(lambda batch: [len(batch)] * len(batch), BatchRule(size=3))])
    out = [[o.chunk.data for o in pipeline.push(chunk_of(n)) if o.chunk is not None] for n in range(4)]
    assert out == [[], [], [3, 3, 3], []]
    assert [o.chunk.data for o in pipeline.flush() if o.chunk is not None] == [1]
    assert list(pipeline.flush()) == []
