"""All there is to see of a run, as plain data of bounded size."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest

import zarr_dask_stream as zds
from zarr_dask_stream.engine.events import (
    Batch,
    BatchFinished,
    BatchStats,
    BatchSubmitted,
    ChunkDeadLettered,
    ChunksEmitted,
    DeadLetter,
    Notice,
    RunFinished,
    RunStarted,
)
from zarr_dask_stream.watch.chunkmap import OUTSIDE, STATES, ChunkMap
from zarr_dask_stream.watch.history import History
from zarr_dask_stream.watch.snapshot import snapshot


class Watched:
    """Report, map and history of the same notices."""

    def __init__(self, *notices: Notice, **options: Any) -> None:
        self.report, self.chunkmap, self.history = zds.Report(), ChunkMap(**options), History()
        for notice in notices:
            for observer in (self.report, self.chunkmap, self.history):
                observer.handle(notice)

    def shot(self) -> dict[str, Any]:
        shown = snapshot(self.report, self.chunkmap, self.history)
        text = json.dumps(shown, allow_nan=False)
        assert len(text) < 100_000
        assert json.loads(text) == shown
        return shown


def finished(outcome: str = "done") -> RunFinished:
    return RunFinished(10.0, outcome, 6, 1.0, 4, 32)


def test_a_run_in_the_middle() -> None:
    shown = Watched(
        RunStarted(0.0, 6, 8, (2, 3), "memory://", box_stop=(2, 2)),
        BatchSubmitted(0.1, Batch(1, (range(2), range(3, 5)), 4, 32, fresh=True), 4, 32),
        ChunksEmitted(2.0, (0, 1)),
    ).shot()
    assert (shown["v"], shown["outcome"], shown["at"]) == (1, "running", 2.0)
    assert (shown["counts"]["settled"], shown["counts"]["in_flight"], shown["counts"]["total"]) == (2, 2, 6)
    assert shown["bytes"]["in_flight"] == 16
    states = np.frombuffer(base64.b64decode(shown["map"]["states"]), np.uint8).reshape(shown["map"]["layout"]["shape"])
    assert [[(*STATES, "outside")[code] for code in row] for row in states.tolist()] == [
        ["done", "done", "outside"],
        ["in flight", "in flight", "outside"],
    ]
    assert len(shown["map"]["names"]) == OUTSIDE
    assert base64.b64decode(shown["map"]["done"]) == bytes([255, 255, 0, 0, 0, 0])
    assert shown["rates"]["left_s"] == pytest.approx(4 / shown["rates"]["chunks_per_s"], rel=0.01)


def test_a_run_that_is_over_shows_its_mean_rate_and_no_time_left() -> None:
    shown = Watched(RunStarted(0.0, 6, 8, (6,), "m"), ChunksEmitted(2.0, tuple(range(6))), finished()).shot()
    assert shown["rates"] == {"chunks_per_s": 0.6, "decoded_per_s": 0.0, "left_s": None}


def test_before_it_began_and_without_a_known_total() -> None:
    shown = Watched().shot()
    assert shown["map"]["states"] == ""
    shown = Watched(RunStarted(0.0, None, 8, (6,), "m"), ChunksEmitted(1.0, (1,))).shot()
    assert shown["counts"]["total"] is shown["rates"]["left_s"] is None


def test_a_day_of_trouble_on_a_large_grid_is_small() -> None:
    watched = Watched(RunStarted(0.0, 10**9, 8, (1000, 1000, 1000), "s3://bucket/" + "x" * 5000))
    for n in range(3000):
        at = n * 30.0
        name, long = f"tcp://node-{n % 400}.cluster.local:34567", f"{chr(97 + n % 26) * 900}"
        letter = DeadLetter((n, 0, 0), (slice(0, 1),) * 3, 3, "corrupt", "ValueError", long, "final", name)
        stats = BatchStats(worker=name, wall_s=1.0, fetch_s=2.0 ** (n % 60 - 30), decode_s=0.1, compute_s=0.2)
        notices: list[Notice] = [
            BatchFinished(at, Batch(n, (range(4),), 4, 32), stats, 2.0, 0.1),
            ChunkDeadLettered(at, n, letter),
        ]
        for notice in notices:
            for observer in (watched.report, watched.chunkmap, watched.history):
                observer.handle(notice)
    shown = watched.shot()
    assert shown["rows"] == {"workers": 400, "causes": 26, "letters": 3000}
    assert shown["letters"][-1]["index"] == [2999, 0, 0]
    assert all(set(one) == {"kind", "title", "text"} for one in shown["advice"])
    assert all(len(series["t"]) == len(series["y"]) <= 120 for series in shown["series"].values())
    assert sum(shown["latency"]["fetch"]["counts"]) == 12_000
    assert len(shown["latency"]["fetch"]["edges"]) == len(shown["latency"]["fetch"]["counts"]) + 1


def test_a_map_that_is_too_large_to_send_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 16384 cells"):
        Watched(RunStarted(0.0, 10**6, 8, (1000, 1000), "m"), cells=10**6).shot()
