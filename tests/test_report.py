"""The account of a run: a fold whose sums hold, shown in ways that break nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

import zarr_dask_stream as zds
from benchmarks import watch_cost
from zarr_dask_stream.engine.events import (
    Batch,
    BatchFinished,
    BatchStats,
    BatchSubmitted,
    Category,
    ChunkDeadLettered,
    ChunkRetried,
    ChunksCancelled,
    ChunksEmitted,
    ChunksFiltered,
    ChunksSkipped,
    DeadLetter,
    Failure,
    Notice,
    RunFinished,
    RunStarted,
)
from zarr_dask_stream.engine.task import latency_histogram
from zarr_dask_stream.watch.report import Report, human_bytes, human_seconds

numbers = st.lists(st.integers(0, 10**6), max_size=9).map(tuple)
times = st.floats(0, 1e6)


def latency_bucket(seconds: float) -> int:
    """Bucket of one duration."""
    return next(iter(latency_histogram([seconds])))


def letter(number: int = 0, message: str = "bad") -> DeadLetter:
    return DeadLetter((number,), (slice(number, number + 1),), 2, "corrupt", "ValueError", message, "it is final")


notices: st.SearchStrategy[list[Notice]] = st.lists(
    st.one_of(
        st.builds(ChunksEmitted, times, numbers),
        st.builds(ChunksFiltered, times, numbers),
        st.builds(ChunksSkipped, times, st.just(()), st.integers(0, 10**9)),
        st.builds(ChunkDeadLettered, times, st.integers(0, 9), st.integers(0, 9).map(letter)),
        st.builds(ChunksCancelled, times, st.integers(0, 10**9)),
        st.builds(ChunkRetried, times, st.just(Failure(0, Category.TRANSIENT, "OSError", "no")), st.just(1), times),
        st.builds(
            BatchFinished,
            times,
            st.just(Batch(1, (range(3),), 3, 30)),
            st.none() | st.builds(BatchStats, wall_s=times, fetch_s=times, bytes_stored=st.integers(0, 10**12)),
            times,
            times,
        ),
    ),
    max_size=30,
)


def folded(history: list[Notice]) -> Report:
    report = Report()
    for notice in history:
        report.handle(notice)
    return report


@given(notices, st.data())
def test_a_fold_is_the_sum_of_its_parts(history: list[Notice], data: st.DataObject) -> None:
    """In whatever order notices come, counts are the same."""
    names = (
        "emitted",
        "filtered",
        "skipped_missing",
        "dead_lettered",
        "cancelled",
        "retries",
        "batches",
        "batches_lost",
    )
    report, shuffled = folded(history), folded(data.draw(st.permutations(history)))
    assert [getattr(report, name) for name in names] == [getattr(shuffled, name) for name in names]
    assert report.wall_s == shuffled.wall_s == max((notice.at for notice in history), default=0.0)
    assert report.bytes_stored == shuffled.bytes_stored
    assert len(report.dead_letters) == report.dead_lettered
    assert report.settled == sum(getattr(report, name) for name in names[:5])


@given(notices)
def test_the_account_is_plain_data(history: list[Notice]) -> None:
    report = folded(history)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False)) == report.to_dict()
    assert str(report)
    assert "\n" not in repr(report)


@given(st.lists(st.floats(1e-8, 1e4), min_size=1, max_size=200), st.floats(0.01, 1))
def test_quantiles_are_near_the_true_ones(seconds: list[float], q: float) -> None:
    stats = BatchStats()
    for one in seconds:
        bucket = latency_bucket(one)
        stats.latency[bucket] = stats.latency.get(bucket, 0) + 1
    report = folded([BatchFinished(1.0, Batch(1, (range(3),), 3, 30), stats, 1.0, 0.0)])
    true = sorted(seconds)[max(math.ceil(q * len(seconds) - 1e-9), 1) - 1]
    assert true <= report.quantile(q) * (1 + 1e-9)
    assert report.quantile(q) <= max(true, 2.0**-30) * 2 ** (1 / 8) * (1 + 1e-9)


def test_quantiles_of_batches_add_up() -> None:
    finished = [
        BatchFinished(1.0, Batch(n, (range(1),), 1, 8), BatchStats(latency={latency_bucket(s): count}), 1.0, 0.0)
        for n, (s, count) in enumerate([(0.001, 90), (1.0, 9), (60.0, 1)])
    ]
    report = folded(list(finished))
    assert [report.quantile(q) for q in (0.5, 0.9, 0.99, 1.0)] == pytest.approx([0.001, 0.001, 1.0, 60.0], rel=0.1)


def test_the_time_is_split() -> None:
    stats = BatchStats(wall_s=2.0, fetch_s=0.5, decode_s=0.25, compute_s=1.0, bytes_decoded=7, worker="w1")
    report = folded(
        [
            BatchFinished(1.0, Batch(1, (range(3),), 3, 30), stats, 5.75, 0.5, queued_s=3.0),
            BatchFinished(1.0, Batch(2, (range(3),), 3, 30), stats, 1.0, 0.0),
            RunFinished(9.0, "done", 6, 4.0, 5, 50),
        ]
    )
    assert report.time == {
        "queue": 3.0, "schedule": 0.25, "fetch": 1.0, "decode": 0.5, "compute": 2.0, "transfer": 0.5, "consumer": 4.0
    }  # fmt: skip
    assert dict(report.rows())["spent on"].startswith("schedule 3%, fetch 12%"), "of what the queue has no part"
    assert (report.workers["w1"].chunks, report.workers["w1"].batches, report.workers["w1"].wall_s) == (6, 2, 4.0)
    assert (report.wall_s, report.peak_chunks_in_flight, report.peak_bytes_in_flight) == (9.0, 5, 50)


def test_an_empty_report_can_be_shown(tmp_path: Path) -> None:
    report = Report()
    assert report.chunks_per_s == 0
    assert math.isnan(report.quantile(0.5))
    assert report.to_dict()["latency_s"] == {"p50": None, "p90": None, "p99": None}
    assert repr(report).startswith("Report(running: 0/? emitted")
    assert "0 emitted" in str(report)
    assert report.to_html(tmp_path / "r.html").read_text().startswith("<!doctype html>")


def test_a_report_grows_while_the_run_goes_on() -> None:
    report = folded([RunStarted(0.0, 10, 8, (10,), "mem"), BatchSubmitted(0.5, Batch(1, (range(4),), 4, 32), 4, 32)])
    report.handle(ChunksEmitted(2.0, (0, 1, 2, 3)))
    assert (report.url, report.total, report.emitted, report.peak_chunks_in_flight) == ("mem", 10, 4, 4)
    assert report.chunks_per_s == 2.0
    assert report.outcome == "running"


def test_nothing_gets_into_the_page_unescaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>&"
    report = folded([RunStarted(0.0, 1, 8, (1,), evil), ChunkDeadLettered(0.0, 0, letter(0, evil))])
    report.handle(RunFinished(1.0, "failed", 1, 0.0, 1, 8, evil))
    for page in (report.to_html(str(tmp_path / "r.html")).read_text(encoding="utf-8"), report._repr_html_()):
        assert "<script" not in page
        assert page.count("&lt;script&gt;") >= 3


def test_many_dead_letters_are_shown_in_part_and_counted_whole() -> None:
    report = folded([ChunkDeadLettered(0.0, n, letter(n, f"message {n}")) for n in range(200)])
    assert "190 more" in str(report)
    assert "180 more in .dead_letters" in report._repr_html_()
    assert len(report.to_dict()["dead_letters"]) == 200


def test_a_dead_letter_is_plain_data() -> None:
    assert json.loads(json.dumps(letter(3).to_dict())) == {
        "index": [3],
        "region": [[3, 4]],
        "attempts": 2,
        "category": "corrupt",
        "error_type": "ValueError",
        "message": "bad",
        "reason": "it is final",
        "worker": "",
    }


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (2**40, "1.0 TiB"), (2**60, "1048576.0 TiB")],
)
def test_bytes_for_people(count: Any, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.9994, "999 ms"),
        (0.9999, "1.0 s"),
        (59.94, "59.9 s"),
        (59.99, "1 min 00 s"),
        (3599.7, "1 h 00 min"),
    ],
)
def test_seconds_for_people(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


@given(st.floats(1e-9, 1e9))
def test_a_bucket_holds_its_duration(seconds: float) -> None:
    bucket = latency_bucket(seconds)
    assert 2.0 ** (bucket / 8) <= seconds * (1 + 1e-9) or bucket == -240
    assert seconds <= 2.0 ** ((bucket + 1) / 8) * (1 + 1e-9)


def test_the_smallest_bucket_takes_what_no_clock_can_see() -> None:
    assert latency_bucket(0.0) == latency_bucket(-1.0) == latency_bucket(1e-30)
    assert np.isfinite(2.0 ** (latency_bucket(0.0) / 8))


@pytest.mark.slow
def test_to_watch_a_run_costs_little_of_it() -> None:
    """A share of the processor time of the same run: 0.01 where it was measured, with 20,000 chunks."""
    array = zarr.create_array({}, shape=(7000, 7000), chunks=(100, 100), dtype="f4")
    array[:] = 1.0
    found = watch_cost.measure(array, how="loop")
    assert found["chunks"] == 4900
    assert found["share"] < 0.03


def test_what_take_left_is_not_called_cancelled() -> None:
    array = zarr.create_array({}, shape=(20,), chunks=(1,), dtype="i4")
    stream = zds.stream_chunks(array, concurrency=1)
    taken = stream.take(3)
    assert len(list(taken)) == 3
    assert "17 not asked for" in str(taken.report)
    assert taken.report.cancelled == 17
    for _ in stream:
        break
    assert "19 cancelled" in str(stream.report)
