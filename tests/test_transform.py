"""Map and filter: their order, and functions that can't be called found before anything is read."""

from __future__ import annotations

import functools
import operator
from typing import Any

import numpy as np
import pytest

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.stages.transform import Filter, Map, Stage, check_function, compile_stages


def chunk_of(data: Any) -> Chunk:
    return Chunk((4,), (slice(8, 10),), data, missing=True)


def test_no_stage_changes_nothing() -> None:
    chunk = chunk_of(1)
    assert compile_stages([])(chunk) is chunk


def test_stages_run_in_order_and_keep_the_place() -> None:
    stages: list[Stage] = [Map(lambda c: c.data + 1), Filter(lambda c: c.data > 1), Map(lambda c: c.data * 10)]
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
