"""Runs in the middle and at the end of things, made of notices, for tests of what shows them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from zarr_dask_stream.engine.events import (
    Batch,
    BatchFinished,
    BatchStats,
    BatchSubmitted,
    Category,
    ChunkDeadLettered,
    ChunkRetried,
    ChunksEmitted,
    ChunksFiltered,
    ClusterChanged,
    DeadLetter,
    Failure,
    Notice,
    RunFinished,
    RunStarted,
)
from zarr_dask_stream.watch.chunkmap import ChunkMap
from zarr_dask_stream.watch.frame import Controls, Pace, make_frame
from zarr_dask_stream.watch.report import Report

MESSAGE = "HTTP 403 for https://store/t2m/c/<b>3</b>: access denied & no more"


def notices(grid: tuple[int, ...], *, done: float = 0.6, per_s: float = 200.0, dead: int = 2) -> list[Notice]:
    """Return a run that has come so far on two workers, with retries and dead letters on its way."""
    size = int(np.prod(grid))
    rng = random.Random(3)
    step = max(size // 300, 1)
    told: list[Notice] = [
        RunStarted(0.0, size, 80_000, grid, "s3://climate/era5.zarr/t2m", max_chunks=4 * step, max_nbytes=2**30),
        ClusterChanged(0.0, 2, 4),
    ]
    given_up = set(rng.sample(range(int(size * done)), min(dead, int(size * done))))
    at, ahead = 0.0, 2 * step
    for first in range(0, int(size * done), step):
        last = min(first + step, int(size * done))
        numbers = range(first, last)
        batch = Batch(first, (numbers,), len(numbers), 80_000 * len(numbers), fresh=True)
        at += len(numbers) / (per_s * rng.uniform(0.6, 1.4))
        told.append(BatchSubmitted(at, batch, ahead, ahead * 80_000))
        count = len(numbers)
        stats = BatchStats(
            fetch_s=0.011 * count,
            decode_s=0.004 * count,
            compute_s=0.002 * count,
            wall_s=0.018 * count,
            bytes_stored=40_000 * count,
            bytes_decoded=80_000 * count,
            worker=f"tcp://10.0.0.{first % 2}:4000",
        )
        told.append(BatchFinished(at, batch, stats, 0.019 * count, 0.001 * count))
        ended = tuple(n for n in numbers if n not in given_up and n % 17 != 16)
        told.append(ChunksEmitted(at, ended))
        told.append(ChunksFiltered(at, tuple(n for n in numbers if n not in given_up and n % 17 == 16)))
        for number in given_up.intersection(numbers):
            place = tuple(int(i) for i in np.unravel_index(number, grid))
            region = tuple(slice(i, i + 1) for i in place)
            letter = DeadLetter(place, region, 3, "store", "PermissionError", MESSAGE, "no more attempts")
            told.append(ChunkDeadLettered(at, number, letter))
    begun = min(int(size * done) + 2 * step, size)
    flying = range(int(size * done), begun)
    if flying:
        told.append(BatchSubmitted(at, Batch(10**9, (flying,), len(flying), 1, fresh=True), len(flying), 80_000))
        failure = Failure(flying[0], Category.TIMEOUT, "TimeoutError", "no answer within 60 s", retryable=True)
        told.append(ChunkRetried(at, failure, 1, 0.5))
    return told


def finished(grid: tuple[int, ...], *, at: float = 12.5, outcome: str = "done", error: str = "") -> Notice:
    """Return the end of a run."""
    return RunFinished(at, outcome, int(np.prod(grid)), 0.8, 40, 3_200_000, error)


def frame_of(told: list[Notice], *, axes: tuple[int, ...] | None = None, **options: Any) -> dict[str, Any]:
    """Return what the widget shows after these notices."""
    report, chunkmap = Report(outcome="running" if told else "not started"), ChunkMap(axes=axes)
    pace, workers = Pace(), None
    for notice in told:
        workers = notice.workers if isinstance(notice, ClusterChanged) else workers
        report.handle(notice)
        chunkmap.handle(notice)
        pace.look(report.wall_s, report.settled, report.bytes_decoded)
    options = {
        "pace": pace,
        "workers": workers,
        "controls": Controls(),
        "name": "ChunkStream(float32[24, 30])",
        **options,
    }
    return make_frame(report, chunkmap, **options)
