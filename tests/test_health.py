"""What results say about the store and the workers."""

from __future__ import annotations

import pytest

from zarr_dask_stream.engine.events import (
    BatchResult,
    BatchStats,
    Category,
    Failure,
    Notice,
    SlowedDown,
    WorkerRetired,
)
from zarr_dask_stream.engine.health import Health
from zarr_dask_stream.engine.instructions import Notify, Restart
from zarr_dask_stream.engine.retry import Breaker
from zarr_dask_stream.engine.throttle import Throttle


def health_of(share: float | None = 0.9) -> Health:
    return Health(Breaker(share, memory=20, patience_s=5.0), Throttle(None, 8))


def failed(category: Category, count: int = 10) -> BatchResult:
    return BatchResult(failures=[Failure(n, category, "OSError", f"chunk {n} said no") for n in range(count)])


def heard(health: Health, result: BatchResult, now: float) -> list[Notice]:
    return [one.notice for one in health.hear(result, now) if isinstance(one, Notify)]


def test_a_store_that_complains_is_asked_for_less_once_for_a_wave() -> None:
    health = health_of()
    first = heard(health, failed(Category.THROTTLED), 1.0)
    assert [type(notice) for notice in first] == [SlowedDown]
    assert heard(health, failed(Category.THROTTLED), 1.001) == [], "what was on its way when it complained"
    assert heard(health, failed(Category.TRANSIENT), 9.0) == []


def test_a_worker_with_hanging_threads_is_restarted_once() -> None:
    health = health_of()
    assert health.hear(BatchResult(stats=BatchStats(worker="a", zombies=3)), 1.0) == []
    answer = health.hear(BatchResult(stats=BatchStats(worker="a", zombies=4)), 2.0)
    assert answer == [Restart("a"), Notify(WorkerRetired(2.0, "a", 4))]
    assert health.hear(BatchResult(stats=BatchStats(worker="a", zombies=9)), 3.0) == []
    assert health.hear(BatchResult(stats=BatchStats(worker="b", zombies=4)), 3.0)[0] == Restart("b")


def test_it_is_over_when_nearly_everything_fails_for_a_while() -> None:
    health = health_of()
    for now in range(4):
        health.hear(failed(Category.TRANSIENT), float(now))
    assert health.diagnosis(4.0) is None, "a burst is what backoff is for"
    for now in range(4, 9):
        health.hear(failed(Category.TRANSIENT), float(now))
    error = health.diagnosis(9.0)
    assert "chunk 9 said no" in str(error)
    assert "RetryPolicy(breaker=None)" in str(error)


@pytest.mark.parametrize("category", [Category.FUNCTION, Category.CORRUPT, Category.MISSING, Category.PERMANENT])
def test_chunks_that_are_bad_themselves_say_nothing_about_the_store(category: Category) -> None:
    health = health_of()
    for now in range(30):
        health.hear(failed(category), float(now))
    assert health.diagnosis(99.0) is None


def test_what_works_now_and_then_goes_on() -> None:
    health = health_of()
    for now in range(30):
        health.hear(failed(Category.TRANSIENT, 8), float(now))
        health.hear(BatchResult(numbers=[1, 2]), float(now))
    assert health.diagnosis(99.0) is None
    assert health_of(None).diagnosis(9.0) is None
