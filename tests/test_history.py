"""How a run went over time: sums that hold at any resolution, in bounded memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

import zarr_dask_stream as zds
from watched import came_back, given_up, lost, sent, tried_again
from zarr_dask_stream.engine.events import (
    ChunksCancelled,
    ChunksEmitted,
    ChunksFiltered,
    ChunksSkipped,
    ClusterChanged,
    Notice,
    RunFinished,
    RunStarted,
    SlowedDown,
    WorkerRetired,
)
from zarr_dask_stream.engine.task import latency_histogram
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.watch.history import LATENCIES, LEVELS, RATES, History, bucket_of


def folded(*notices: Notice, **options: Any) -> History:
    history = History(**options)
    for notice in notices:
        history.handle(notice)
    return history


# -- series -----------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0, 1e5), st.integers(1, 9)), min_size=1, max_size=60), st.integers(2, 40))
def test_a_rate_times_its_time_is_the_sum_at_any_resolution(moments: list[tuple[float, int]], bins: int) -> None:
    history = folded(*(ChunksEmitted(at, tuple(range(n))) for at, n in sorted(moments)), bins=bins)
    times, values = history.series("chunks")
    assert len(times) == len(values) <= bins
    width, end = history.bin_s, history.duration_s
    covered = np.full(len(values), width)
    covered[-1] = min(max(end - (len(values) - 1) * width, width / 2), width)
    assert float((values * covered).sum()) == pytest.approx(sum(n for _, n in moments))
    assert width <= 0.25 or width * bins <= 4 * end + 1


def test_a_long_run_takes_no_more_memory_than_a_short_one() -> None:
    history = folded(*(came_back(at, range(4), bytes_stored=10) for at in np.geomspace(0.1, 1e6, 2000).tolist()))
    for name in RATES:
        assert len(history.series(name)[0]) <= 240
    assert all(len(values) <= 240 for values in history._bins.sums.values())
    assert history.bin_s * 240 >= 1e6


def test_levels_are_carried_on_until_they_change() -> None:
    history = folded(
        RunStarted(0.0, 100, 8, (100,), "m"),
        ClusterChanged(0.0, 2, 4),
        sent(0.1, range(4), 10),
        ChunksEmitted(1.1, tuple(range(6))),
        ClusterChanged(1.6, 1, 2),
        RunFinished(2.1, "done", 100, 0.0, 10, 80),
    )
    assert history.series("in_flight")[1].tolist() == [10, 10, 10, 10, 10, 4, 4, 4, 4]
    assert history.series("in_flight_bytes")[1].tolist() == [80, 80, 80, 80, 80, 32, 32, 32, 32]
    assert history.series("workers")[1].tolist() == [2, 2, 2, 2, 2, 2, 2, 1, 1]
    assert history.threads == 4
    assert history.ended


@given(
    st.lists(st.tuples(st.floats(0, 1e4), st.integers(0, 50)), min_size=1, max_size=40),
    st.sampled_from([2, 3, 16, 240]),
)
def test_the_most_in_flight_is_never_lost(moments: list[tuple[float, int]], bins: int) -> None:
    history = folded(*(sent(at, range(4), n) for at, n in sorted(moments)), bins=bins)
    assert history.series("in_flight")[1].max() == max(n for _, n in moments)


def test_stretches_that_were_never_in_flight_free_nothing() -> None:
    history = folded(
        sent(0.1, range(4), 5),
        ChunksSkipped(0.2, (), 1000),
        ChunksSkipped(0.2, (range(2),), 2),
        ChunksFiltered(0.3, (1,)),
    )
    assert history.series("in_flight")[1].tolist() == [5, 3]
    assert history._in_flight == 2


def test_a_series_that_there_is_not_is_named() -> None:
    for call in (History().series, History().latency):
        with pytest.raises(UsageError, match=r"a history has the .*, got 'speed'"):
            call("speed")
    with pytest.raises(UsageError, match="at least two bins"):
        History(bins=1)


def test_an_empty_history_can_be_read() -> None:
    history = History()
    for name in (*RATES, *LEVELS):
        times, values = history.series(name)
        assert times.tolist() == [0.125]
        assert values.tolist() == [0.0]
    for name in LATENCIES:
        assert history.latency(name)[1].size == 0
        assert math.isnan(history.quantile(name, 0.5))
    assert history.causes == []
    assert history.steady == (0.0, 0.0)


def test_the_steady_part_leaves_out_start_and_tail() -> None:
    notices = [ChunksEmitted(10 + n / 10, (n,)) for n in range(100)]
    start, stop = folded(*notices, RunFinished(40.0, "done", 100, 0.0, 1, 1)).steady
    assert 10 <= start <= 11
    assert 19 <= stop <= 20.5


# -- histograms -------------------------------------------------------------------------------------


def test_phases_are_counted_for_each_chunk_and_tasks_once() -> None:
    history = folded(
        came_back(1.0, range(4), fetch_s=4.0, decode_s=0.4, latency=latency_histogram([1.0] * 3 + [8.0])),
        came_back(2.0, range(2), fetch_s=16.0),
    )
    edges, counts = history.latency("fetch")
    assert edges[0] == 1.0
    assert (counts[0], counts[-1], counts.sum()) == (4, 2, 6)
    assert history.quantile("fetch", 0.5) == pytest.approx(1.0, rel=0.1)
    assert history.quantile("fetch", 1.0) == pytest.approx(8.0, rel=0.1)
    assert history.latency("chunk")[1].tolist() == [3, *[0] * 23, 1]
    assert history.latency("decode")[1].sum() == 4
    assert history.latency("compute")[1].size == 0
    assert history.latency("task")[1].sum() == 2


@given(st.floats(1e-12, 1e9))
def test_buckets_are_those_of_the_workers(seconds: float) -> None:
    (theirs,) = latency_histogram([seconds])
    assert abs(bucket_of(seconds) - theirs) <= (1 if seconds < 2e-9 else 0)


# -- workers ----------------------------------------------------------------------------------------


def test_what_each_worker_did() -> None:
    history = folded(
        came_back(1.0, range(4), "a", fetch_s=0.5, bytes_stored=7),
        came_back(3.0, range(6), "a", decode_s=0.25),
        tried_again(3.5, 1, "reset", "b"),
        WorkerRetired(4.0, "b", 2),
    )
    a, b = history.workers["a"], history.workers["b"]
    assert (a.chunks, a.batches, a.wall_s, a.fetch_s, a.decode_s, a.bytes_stored) == (10, 2, 2.0, 0.5, 0.25, 7)
    assert (a.first_s, a.last_s, a.chunks_per_busy_s) == (1.0, 3.0, 5.0)
    assert (b.failures, b.retired, b.chunks) == (1, 1, 0)


def test_a_cluster_that_comes_and_goes_takes_bounded_memory() -> None:
    history = folded(*(came_back(1.0, range(1), f"tcp://10.0.0.1:{n}") for n in range(2000)))
    assert len(history.workers) <= 513
    assert sum(past.chunks for past in history.workers.values()) == 2000


# -- causes -----------------------------------------------------------------------------------------


def test_failures_of_a_kind_are_one_cause() -> None:
    history = folded(
        RunStarted(0.0, 100, 8, (10, 10), "m"),
        *(tried_again(1.0 + n, n, f"chunk (0, {n}): connection to '10.0.0.{n}' reset", f"w{n % 2}") for n in range(9)),
        given_up(20.0, 3, "got 12 bytes, expected 400"),
        given_up(21.0, 4, "got 13 bytes, expected 400"),
    )
    often, seldom = history.causes
    assert (often.error_type, often.message) == ("OSError", "chunk (#): connection to '...' reset")
    assert (often.count, often.tries, often.dead, often.first_s, often.last_s) == (9, 9, 0, 1.0, 9.0)
    assert often.sample == (0, 0)
    assert often.sample_message == "chunk (0, 0): connection to '10.0.0.0' reset"
    assert often.workers == {"w0": 5, "w1": 4}
    assert (seldom.count, seldom.dead, seldom.sample, seldom.category) == (2, 2, (0, 3), "corrupt")


def test_as_many_kinds_of_errors_as_chunks_take_bounded_memory() -> None:
    words = ["".join(chr(97 + (n // 26**k) % 26) for k in range(4)) for n in range(1000)]
    history = folded(
        *(given_up(1.0, n, f"the word {word}", worker=f"w{n}", grid=(1000,)) for n, word in enumerate(words))
    )
    assert len(history.causes) == 65
    assert sum(cause.count for cause in history.causes) == 1000
    assert history.causes[0].error_type == "other errors"
    assert all(len(cause.workers) <= 32 for cause in history.causes)


def test_tasks_that_were_lost_and_stores_that_complained_are_counted() -> None:
    died = lost(1.0, range(4), "worker tcp://1.2.3.4:567 died")
    history = folded(died, died, SlowedDown(1.0, 40.0), SlowedDown(2.0, 20.0), ChunksCancelled(3.0, 1))
    assert history.lost == {"worker ... died": 2}
    assert (history.slowed, history.requests_per_s) == (2, 20.0)


# -- on a real stream -------------------------------------------------------------------------------


def test_a_real_run_has_a_history() -> None:
    array = zarr.create_array({}, shape=(40, 100), chunks=(1, 100), dtype="f8")
    array[:] = 1.0
    history = History()
    stream = zds.stream_chunks(array, concurrency=1, callbacks=[history], max_bytes="1 MiB")
    report = stream.map(lambda chunk: chunk.data.sum()).run()
    _, chunks = history.series("chunks")
    assert chunks.max() > 0
    assert (history.chunk_nbytes, history.grid_shape) == (800, (40, 1))
    assert (history.max_chunks, history.max_nbytes) == (1, 2**20)
    assert sum(past.chunks for past in history.workers.values()) == report.emitted == 40
    assert history.latency("chunk")[1].sum() == 40
    assert history.latency("compute")[1].sum() == 40
