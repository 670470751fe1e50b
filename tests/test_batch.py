"""Batches: within their bounds, in order, closed for the reason they name; functions of many chunks at once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.stages.batch import Batch, Batches, BatchRule, MapBatch, nbytes_of
from zarr_dask_stream.testing import ManualClock


def chunk_of(data: Any, at: int = 0) -> Chunk:
    return Chunk((at,), (slice(at, at + 1),), data)


def batch_of(count: int) -> Batch:
    return Batch([chunk_of(at, at) for at in range(count)], "size")


def data_of(batch: Sequence[Chunk]) -> list[Any]:
    return [chunk.data for chunk in batch]


# -- the machine ------------------------------------------------------------------------------------

rules = (
    st.builds(
        BatchRule,
        size=st.none() | st.integers(1, 5),
        nbytes=st.none() | st.integers(1, 60),
        seconds=st.floats(0.5, 5),
    )
    | st.builds(BatchRule, size=st.integers(1, 5))
    | st.builds(BatchRule, nbytes=st.integers(1, 60))
)
arrivals = st.lists(st.tuples(st.floats(0, 3), st.integers(0, 40), st.sampled_from([None, "a", "b"])), max_size=30)


@given(rules, arrivals)
def test_nothing_is_lost_and_each_batch_says_why_it_closed(
    rule: BatchRule, arriving: list[tuple[float, int, Any]]
) -> None:
    clock, batches = ManualClock(), Batches(rule)
    out: list[tuple[float, Batch]] = []
    came: dict[int, float] = {}

    def collect() -> None:
        while (batch := batches.take(clock())) is not None:
            out.append((clock(), batch))

    for at, (pause, nbytes, key) in enumerate(arriving):
        until = clock() + pause
        while (due := batches.deadline) is not None and due <= until:
            clock.advance_to(due)
            collect()
        clock.advance_to(until)
        came[at] = clock()
        batches.add(chunk_of(np.zeros(nbytes, "u1"), at), clock(), key)
        collect()
        held = [nbytes_of(chunk.data) for chunk in batches]
        assert len(batches) == len(held)
    batches.end()
    collect()
    assert len(batches) == 0
    assert batches.deadline is None
    for key in (None, "a", "b"):
        items = [chunk.index[0] for _, batch in out if batch.key == key for chunk in batch]
        assert items == [at for at, (_, _, to) in enumerate(arriving) if to == key]
    for when, batch in out:
        assert 1 <= len(batch) <= (rule.size or 30)
        assert batch.nbytes == sum(chunk.data.nbytes for chunk in batch)
        assert rule.nbytes is None or batch.nbytes <= rule.nbytes or len(batch) == 1
        oldest = when - came[batch[0].index[0]]
        if batch.trigger == "size":
            assert len(batch) == rule.size
        elif batch.trigger == "seconds":
            assert rule.seconds is not None
            assert oldest == pytest.approx(rule.seconds)
        elif batch.trigger == "bytes":
            assert rule.nbytes is not None
        if rule.seconds is not None:
            assert oldest <= rule.seconds + 1e-6


def test_an_item_that_does_not_fit_closes_the_batch_before_it() -> None:
    batches = Batches(BatchRule(nbytes=10))
    for at, nbytes in enumerate([6, 6, 99, 4, 6]):
        batches.add(chunk_of(bytes(nbytes), at), 0.0)
    assert [(len(b), b.nbytes, b.trigger) for b in iter(lambda: batches.take(0.0), None)] == [
        (1, 6, "bytes"),
        (1, 6, "bytes"),
        (1, 99, "bytes"),
        (2, 10, "bytes"),
    ]


def test_the_time_of_a_batch_begins_with_its_first_item() -> None:
    clock, batches = ManualClock(100.0), Batches(BatchRule(seconds=2))
    deadlines = [batches.deadline]
    assert batches.take(clock()) is None
    batches.add(chunk_of(1), clock())
    clock.advance(1.5)
    batches.add(chunk_of(2), clock())
    deadlines.append(batches.deadline)
    assert batches.take(clock()) is None
    clock.advance(0.5)
    batch = batches.take(clock())
    assert batch is not None
    assert (data_of(batch), batch.trigger) == ([1, 2], "seconds")
    assert [*deadlines, batches.deadline] == [None, 102.0, None]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "needs a bound"),
        ({"size": 0}, "size of a batch is a whole number, at least 1, got 0"),
        ({"size": True}, "size"),
        ({"size": 2.5}, "size"),
        ({"nbytes": -1}, "bytes of a batch"),
        ({"seconds": 0}, "seconds of a batch is a number greater than 0"),
        ({"seconds": float("nan")}, "seconds"),
        ({"seconds": "1"}, "seconds"),
    ],
)
def test_rules_are_checked(options: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        BatchRule(**options)


def test_a_batch_is_a_sequence() -> None:
    batch = batch_of(5)
    assert data_of(batch) == [0, 1, 2, 3, 4]
    assert data_of(batch[1:3]) == [1, 2]
    assert batch[-1].data == 4
    assert repr(batch) == "Batch(5 items, closed by size)"
    assert repr(Batch([chunk_of(1)], "end", key="wet")) == "Batch(1 item, closed by end, for 'wet')"


# -- functions of many chunks -------------------------------------------------------------------------


@given(st.integers(1, 20), st.sets(st.integers(0, 19)))
def test_a_failing_call_is_narrowed_down_to_the_chunks_to_blame(count: int, bad: set[int]) -> None:
    calls: list[tuple[int, str]] = []

    def fn(batch: Batch) -> list[int]:
        calls.append((len(batch), batch.trigger))
        if bad & set(data_of(batch)):
            raise ArithmeticError(f"one of {data_of(batch)}")
        return [10 * value for value in data_of(batch)]

    outcomes = list(MapBatch(fn, BatchRule(size=count)).apply(batch_of(count)))
    assert [chunk.index for chunk, _ in outcomes] == [(at,) for at in range(count)], "in order, each once"
    for at, (chunk, error) in enumerate(outcomes):
        if at in bad:
            assert isinstance(error, ArithmeticError)
            assert str(error) == f"one of [{at}]"
        else:
            assert error is None
            assert chunk.data == 10 * at
    assert calls[0] == (count, "size")
    assert all(trigger == "error" for _, trigger in calls[1:])
    blamed = len(bad & set(range(count)))
    assert len(calls) <= 1 + 2 * blamed * max(count.bit_length(), 1)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (None, "given 3 chunks and returned NoneType"),
        (7, "returned int"),
        ("abc", "returned str"),
        ({0: 1, 1: 2, 2: 3}, "returned dict"),
        ({1, 2, 3}, "returned set"),
        (np.float64(1), "returned float64"),
        (np.array(1), "returned ndarray"),
        (iter([1, 2, 3]), "returned list_iterator: return a list of values"),
        ([1, 2], "returned 2 values: return one for each chunk"),
        (np.zeros((4, 3)), "returned 4 values"),
    ],
)
def test_an_answer_that_is_not_one_value_a_chunk_is_refused_at_once(answer: Any, says: str) -> None:
    calls = itertools.count()

    def fn(batch: Batch) -> Any:
        next(calls)
        return answer

    outcomes = list(MapBatch(fn, BatchRule(size=3)).apply(batch_of(3)))
    assert next(calls) == 1
    for chunk, error in outcomes:
        assert isinstance(error, UsageError)
        assert says in str(error)
        assert chunk.data in (0, 1, 2)


@pytest.mark.parametrize("answer", [[1, 2, 3], (1, 2, 3), np.array([1, 2, 3]), range(1, 4), np.arange(1, 4).tolist()])
def test_any_sequence_of_values_will_do(answer: Any) -> None:
    outcomes = list(MapBatch(lambda _: answer, BatchRule(size=3)).apply(batch_of(3)))
    assert [chunk.data for chunk, _ in outcomes] == [1, 2, 3]


def test_a_person_who_presses_ctrl_c_is_obeyed() -> None:
    def fn(batch: Batch) -> list[int]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(MapBatch(fn, BatchRule(size=2)).apply(batch_of(2)))


def test_each_call_is_announced() -> None:
    def fn(batch: Batch) -> list[int]:
        return [1 // chunk.data for chunk in batch]

    heard: list[int] = []
    list(MapBatch(fn, BatchRule(size=3)).apply(batch_of(3), lambda batch: heard.append(len(batch))))
    assert heard == [3, 1, 2]
