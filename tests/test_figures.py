"""Counts of runs as flat data: what they add up to, whatever runs come and go."""

from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

import zarr_dask_stream as zds
from zarr_dask_stream.engine.events import (
    Batch,
    BatchFinished,
    BatchHedged,
    BatchStats,
    BatchSubmitted,
    ChunksCancelled,
    ChunksEmitted,
    ChunksSkipped,
    RunFinished,
    RunStarted,
    SlowedDown,
)
from zarr_dask_stream.watch.figures import OTHER, Counts, Figures, Totals, stream_name

BATCH = Batch(1, (range(4),), 4, 400)


def a_run(*notices: Any, name: str = "") -> Figures:
    figures = Figures(name)
    for notice in (RunStarted(0.0, 10, 100, (10,), "s3://bucket/a.zarr"), *notices):
        figures.handle(notice)
    return figures


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("s3://bucket/a.zarr", "bucket/a.zarr"),
        ("https://user:secret@host/deep/down/a.zarr?token=secret", "down/a.zarr"),
        ("https://user:secret@host/a.zarr?token=secret", "host/a.zarr"),
        ("zip::/data/a.zip", "data/a.zip"),
        ("memory://a", "a"),
        ("file:///tmp/x/a.zarr", "x/a.zarr"),
        ("/" + "x" * 500, "x" * 80),
        ("", "stream"),
    ],
)
def test_streams_are_named_after_their_array_and_not_after_its_credentials(url: str, name: str) -> None:
    assert stream_name(url) == name


def test_a_name_that_was_given_is_kept() -> None:
    assert a_run(name="daily").name == "daily"
    assert a_run().name == "bucket/a.zarr"


def test_what_is_in_flight_falls_as_chunks_end() -> None:
    figures = a_run(BatchSubmitted(0.1, BATCH, 4, 400))
    assert (figures.in_flight, figures.in_flight_bytes) == (4, 400)
    figures.handle(ChunksEmitted(0.2, (0, 1, 2)))
    assert (figures.in_flight, figures.in_flight_bytes) == (1, 100)
    figures.handle(ChunksSkipped(0.2, (), 1000))  # a listing told; none of them was in flight
    assert (figures.in_flight, figures.in_flight_bytes) == (1, 100)
    figures.handle(ChunksCancelled(0.3, 1))
    figures.handle(RunFinished(0.3, "stopped early", 10, 0.5, 4, 400))
    assert (figures.in_flight, figures.in_flight_bytes) == (0, 0)
    assert figures.counts["chunks"] == {"emitted": 3, "skipped_missing": 1000, "cancelled": 1}
    assert figures.counts["runs"] == {"stopped_early": 1}
    assert figures.counts["seconds"] == {"consumer": 0.5}


def test_tasks_are_counted_with_where_their_time_went() -> None:
    stats = BatchStats(
        fetch_s=1.0, decode_s=0.5, compute_s=0.25, wall_s=1.75, bytes_stored=10, bytes_decoded=40, again=2,
        latency={-1: 3, 0: 1, 7: 2, 8: 1},
    )  # fmt: skip
    figures = a_run(
        BatchFinished(2.5, BATCH, stats, 3.5, 0.5, queued_s=1.0),
        BatchFinished(2.6, BATCH, None, 0.1, 0.0, lost="died"),
        BatchHedged(2.7, BATCH, BATCH),
        SlowedDown(2.8, 10.0),
    )
    assert figures.counts["batches"] == {"done": 1, "lost": 1}
    assert figures.counts["again"] == {"retries": 2, "hedges": 4}
    assert figures.counts["bytes"] == {"stored": 10, "decoded": 40, "written": 0}
    assert figures.counts["seconds"] == {
        "fetch": 1.0, "decode": 0.5, "compute": 0.25, "transfer": 0.5, "queue": 1.0, "schedule": 0.25,
    }  # fmt: skip
    assert figures.counts["slowdowns"] == {"": 1}
    # Bucket b holds what took from 2**(b/8) to 2**((b+1)/8) seconds.
    assert figures.counts["latency"] == {"0": 3, "1": 3, "2": 1}


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 50)), max_size=30))
def test_totals_are_the_sums_of_runs_however_often_they_are_looked_at(steps: list[tuple[int, int]]) -> None:
    totals, runs = Totals(), [0, 0, 0]
    for run, more in steps:
        before: Counts = {"chunks": {"emitted": runs[run]}}
        runs[run] += more
        totals.add("a" if run < 2 else "b", {"chunks": {"emitted": runs[run]}}, before)
    sums = {name: counts["chunks"]["emitted"] for name, counts in totals}
    assert sums.get("a", 0) == runs[0] + runs[1]
    assert sums.get("b", 0) == runs[2]


def test_there_are_never_more_names_than_can_be_borne() -> None:
    totals = Totals(names=3)
    for number in range(50):
        totals.add(f"stream-{number}", {"chunks": {"emitted": 1}})
    totals.add("stream-0", {"chunks": {"emitted": 1}})
    assert {name: counts["chunks"]["emitted"] for name, counts in totals} == {
        "stream-0": 2, "stream-1": 1, "stream-2": 1, OTHER: 47,
    }  # fmt: skip


def test_figures_agree_with_the_report_of_a_run() -> None:
    array = zarr.create_array({}, shape=(40,), chunks=(2,), dtype="i4")
    array[:20] = np.arange(20)
    figures = Figures()
    stream = zds.stream_chunks(array, concurrency=1, missing="skip", callbacks=[figures])
    report = stream.filter(lambda chunk: chunk.index[0] % 2 == 0).run()
    assert figures.counts["chunks"] == {"emitted": 5, "filtered": 5, "skipped_missing": 10}
    assert figures.counts["bytes"]["stored"] == report.bytes_stored
    assert figures.counts["bytes"]["decoded"] == report.bytes_decoded
    for phase, seconds in figures.counts["seconds"].items():
        assert seconds == pytest.approx(report.time[phase])
    assert sum(figures.counts["latency"].values()) == 10


def test_an_observer_may_keep_runs_apart() -> None:
    class Apart(zds.Callback):
        def __init__(self) -> None:
            self.runs: list[Figures] = []

        def for_run(self) -> zds.Callback:
            self.runs.append(Figures())
            return self.runs[-1]

    apart = Apart()
    array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4")
    stream = zds.stream_chunks(array, concurrency=1, callbacks=[apart])
    stream.run()
    stream.run()
    assert [figures.counts["chunks"] for figures in apart.runs] == [{"emitted": 3}] * 2
