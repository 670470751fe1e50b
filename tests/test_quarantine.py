"""Blame for dead workers: the guilty chunk is found, the innocent are not lost, and the price is bounded."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zarr_dask_stream.engine.events import Batch, BatchLost, Blame
from zarr_dask_stream.engine.quarantine import Bury, Quarantine, Retry, Sentence, Stop
from zarr_dask_stream.engine.retry import RetryPolicy
from zarr_dask_stream.engine.waiting import Again

serial = itertools.count(1)


def batch_of(*numbers: int, suspect: bool = False) -> Batch:
    ranges = tuple(range(number, number + 1) for number in numbers)
    return Batch(next(serial), ranges, len(numbers), len(numbers), suspect=suspect)


def quarantine_of(worker_budget: int = 32) -> Quarantine:
    policy = RetryPolicy(wait_initial=1.0, wait_jitter=0.0, worker_budget=worker_budget)
    return Quarantine(policy, random.Random(0), lambda number: (number,))


def died(batch: Batch, reason: str = "its worker died") -> BatchLost:
    return BatchLost(batch.id, reason)


def test_one_chunk_alone_is_tried_once_more_and_then_buried() -> None:
    quarantine = quarantine_of()
    first = batch_of(5)
    assert quarantine.lost(first, died(first), 0.0) == [Again((5,), 0.0, alone=True, suspect=True)]
    second = batch_of(5, suspect=True)
    [retry, again] = quarantine.lost(second, died(second), 1.0)
    assert isinstance(retry, Retry)
    assert retry.failure.message == "its worker died"
    assert again == Again((5,), 1.0, alone=True, suspect=True)
    third = batch_of(5, suspect=True)
    [bury] = quarantine.lost(third, died(third, "killed by SIGKILL"), 2.0)
    assert isinstance(bury, Bury)
    assert (bury.failure.number, bury.failure.message) == (5, "killed by SIGKILL")
    assert "2 times" in bury.why
    assert quarantine.forget(5) == 2
    assert not quarantine


@settings(deadline=None)
@given(count=st.integers(1, 3000), at=st.integers(0, 2999))
def test_the_guilty_is_found_and_the_innocent_come_back(count: int, at: int) -> None:
    guilty = at % count
    quarantine = quarantine_of()
    queue: list[tuple[int, ...]] = [tuple(range(count))]
    good: set[int] = set()
    buried: list[int] = []
    deaths = 0
    suspect = False
    while queue:
        numbers = queue.pop()
        batch = batch_of(*numbers, suspect=suspect)
        if guilty not in numbers:
            assert not good & set(numbers)
            good |= set(numbers)
            continue
        deaths += 1
        for sentence in quarantine.lost(batch, died(batch), 0.0):
            if isinstance(sentence, Again):
                queue.append(sentence.numbers)
            elif isinstance(sentence, Bury):
                buried.append(sentence.failure.number)
        suspect = True
    assert buried == [guilty]
    assert good == set(range(count)) - {guilty}
    assert deaths <= 6, "3000 chunks: at once, again, three times in pieces, and alone once more"


def test_the_price_is_bounded() -> None:
    quarantine = quarantine_of(worker_budget=3)
    for number in range(3):
        batch = batch_of(number, suspect=True)
        assert not any(isinstance(s, Stop) for s in quarantine.lost(batch, died(batch), 0.0))
    batch = batch_of(9, suspect=True)
    stop, again = quarantine.lost(batch, died(batch, "out of memory"), 0.0)
    assert isinstance(stop, Stop)
    assert "4 workers" in str(stop.error)
    assert "(9,): out of memory" in str(stop.error)
    assert again == Again((9,), 0.0, alone=True, suspect=True), "it is not lost either"


def test_doubt_has_an_end() -> None:
    quarantine = quarantine_of()
    deaths = 0
    sentences: list[Sentence] = []
    while not any(isinstance(sentence, Bury) for sentence in sentences):
        batch = batch_of(7, suspect=True)
        sentences = quarantine.lost(batch, BatchLost(batch.id, "its worker died", blame=Blame.SHARED), 0.0)
        deaths += 1
    assert deaths == 5, "three in doubt, and two as always"


@pytest.mark.parametrize("count", [1, 20])
def test_a_death_that_proves_nothing_is_no_blame_but_has_its_price(count: int) -> None:
    quarantine = quarantine_of(worker_budget=5)
    numbers = tuple(range(count))
    for turn in range(6):
        batch = batch_of(*numbers, suspect=True)
        sentences = quarantine.lost(batch, BatchLost(batch.id, "its worker died", blame=Blame.NONE), 0.0)
        assert sentences[-1] == Again(numbers, 0.0, alone=True, suspect=True)
        assert isinstance(sentences[0], Stop) == (turn == 5)


@pytest.mark.parametrize("count", [1, 20])
def test_what_vanishes_without_a_death_comes_back_in_pieces_and_not_for_ever(count: int) -> None:
    quarantine = quarantine_of()
    queue = [tuple(range(count))]
    buried = 0
    for turn in itertools.count():
        if not queue:
            break
        assert turn < 500
        batch = batch_of(*queue.pop())
        for sentence in quarantine.lost(batch, BatchLost(batch.id, "called back", None, 0), 0.0):
            if isinstance(sentence, Again):
                queue.append(sentence.numbers)
            else:
                buried += isinstance(sentence, Bury)
    assert buried == count
