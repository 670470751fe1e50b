"""Folding: keys apart, partials that merge in any order, and reducers that are none found at once."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.stages import reducers
from zarr_dask_stream.stages.combine import Fold, Partials, Reducer, Together, as_reducer, merge_partials


class Collect(Reducer):
    """Keeps everything, so that nothing lost or doubled goes unseen; changes partials in place."""

    def create(self) -> list[Any]:
        return []

    def add(self, partial: list[Any], chunk: Chunk) -> list[Any]:
        partial.append(chunk.data)
        return partial

    def merge(self, left: list[Any], right: list[Any]) -> list[Any]:
        left.extend(right)
        return left

    def finish(self, partial: list[Any]) -> list[Any]:
        return sorted(partial)


class Total(Reducer):
    """Immutable partials."""

    def create(self) -> int:
        return 0

    def add(self, partial: int, chunk: Chunk) -> int:
        return partial + int(chunk.data)

    def merge(self, left: int, right: int) -> int:
        return left + right


def chunk_of(number: int) -> Chunk:
    return Chunk((number,), (slice(number, number + 1),), number)


@given(st.lists(st.integers(0, 99), max_size=40), st.integers(1, 5), st.integers(1, 6), st.randoms())
def test_batches_merge_to_the_same_in_any_order(
    values: list[int], groups: int, batches: int, rng: random.Random
) -> None:
    reducer = Together({"all": Collect(), "sum": Total()})
    fold = Fold(reducer, key=lambda index: index[0] % groups)
    parts: list[Partials] = [{} for _ in range(batches)]
    for value in values:
        fold.add(parts[rng.randrange(batches)], chunk_of(value))
    rng.shuffle(parts)
    merged: Partials = {}
    for part in parts:
        merge_partials(reducer, merged, part)
    for key in {value % groups for value in values}:
        own = [value for value in values if value % groups == key]
        assert reducer.finish(merged.pop(key)) == {"all": sorted(own), "sum": sum(own)}
    assert merged == {}


def test_without_a_key_there_is_one() -> None:
    partials: Partials = {}
    Fold(Total()).add(partials, chunk_of(3))
    Fold(Total()).add(partials, chunk_of(4))
    assert partials == {(): 7}


def test_partials_of_two_keys_are_apart() -> None:
    partials: Partials = {}
    fold = Fold(Collect(), key=lambda index: index[0] < 2)
    for number in range(4):
        fold.add(partials, chunk_of(number))
    assert partials == {True: [0, 1], False: [2, 3]}


def test_an_empty_partial_changes_nothing() -> None:
    reducers: list[Any] = [Collect(), Total(), Together({"a": Collect(), "b": Total()})]
    for reducer in reducers:
        full: Partials = {}
        Fold(reducer).add(full, chunk_of(5))
        assert reducer.finish(reducer.merge(reducer.create(), full[()])) == reducer.finish(full[()])


@pytest.mark.parametrize("method", ["create", "add", "merge"])
def test_what_was_not_overridden_is_named(method: str) -> None:
    class Bare(Reducer):
        pass

    with pytest.raises(NotImplementedError, match=rf"Bare must define {method}\("):
        getattr(Bare(), method)(*{"create": (), "add": (0, None), "merge": (0, 0)}[method])
    assert Bare().finish(5) == 5


def test_several_reducers_are_one() -> None:
    both = as_reducer({"a": Total(), 2: Total()})
    assert isinstance(both, Together)
    assert list(both.reducers) == ["a", "2"]
    nested = as_reducer([Total(), Collect()])
    assert repr(nested) == "Together(total, collect)"
    assert as_reducer(both) is both


class Duck:
    """Has the four methods and no base class."""

    def create(self, *given: Any) -> int:
        return len(given)

    add = merge = finish = create


def test_anything_with_the_four_methods_will_do() -> None:
    duck: Any = Duck()
    assert as_reducer(duck) is duck


@pytest.mark.parametrize(
    ("reducer", "says"),
    [
        (Total, r"call it, Total\(\)"),
        (sum, "without create, add, merge, finish"),
        ("sum", "got str"),
        (None, "got NoneType"),
        ([Total(), Total()], "same name"),
        ({"a": 3}, "got int"),
        ({"1": Total(), 1: Total()}, "same name"),
        ([], "at least one"),
        ({}, "at least one"),
    ],
)
def test_what_is_no_reducer_is_refused(reducer: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        as_reducer(reducer)


@pytest.mark.parametrize("key", [float("nan"), np.float32("nan"), np.datetime64("NaT", "s"), ("north", float("nan"))])
def test_a_key_that_equals_nothing_is_refused(key: Any) -> None:
    fold = Fold(reducers.count(), lambda _: key)
    with pytest.raises(UsageError, match=r"the key of chunk \(0, 1\) is .*not equal to itself"):
        fold.add({}, Chunk((0, 1), (slice(0, 1), slice(1, 2)), np.zeros((1, 1))))


@pytest.mark.parametrize("key", [0, "a", None, (), ("north", 1), np.int8(3), np.datetime64("2020-01-01")])
def test_usual_keys_are_taken(key: Any) -> None:
    partials: dict[Any, Any] = {}
    Fold(reducers.count(), lambda _: key).add(partials, Chunk((0, 1), (slice(0, 1), slice(1, 2)), np.zeros((1, 1))))
    assert list(partials) == [key]
