"""Notices of single batches and chunks, and runs made of them, for tests of what shows runs."""

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


def _batch(numbers: range, nbytes: int) -> Batch:
    return Batch(numbers.start, (numbers,), len(numbers), nbytes * len(numbers), fresh=True)


def sent(at: float, numbers: range, in_flight: int, nbytes: int = 8) -> BatchSubmitted:
    """Return that a batch was submitted, and so many chunks of `nbytes` are in flight."""
    return BatchSubmitted(at, _batch(numbers, nbytes), in_flight, in_flight * nbytes)


def came_back(
    at: float,
    numbers: range,
    worker: str = "w1",
    *,
    elapsed_s: float = 1.5,
    transfer_s: float = 0.2,
    nbytes: int = 8,
    **stats: Any,
) -> BatchFinished:
    """Return that a batch is back from a worker, with what else is known of it."""
    given = BatchStats(worker=worker, **{"wall_s": 1.0, **stats})
    return BatchFinished(at, _batch(numbers, nbytes), given, elapsed_s, transfer_s)


def lost(at: float, numbers: range, why: str) -> BatchFinished:
    """Return that a batch will not come back."""
    return BatchFinished(at, _batch(numbers, 8), None, 1.0, 0.0, why)


def tried_again(at: float, number: int, message: str, worker: str = "w1", **failure: Any) -> ChunkRetried:
    """Return that a chunk has failed and gets another try."""
    given = {"category": Category.TRANSIENT, "error_type": "OSError", **failure}
    return ChunkRetried(at, Failure(number, message=message, worker=worker, **given), 1, 0.1)


def given_up(
    at: float, number: int, message: str, worker: str = "w1", *, grid: tuple[int, ...] = (10, 10), **letter: Any
) -> ChunkDeadLettered:
    """Return that a chunk of a grid was given up."""
    place = tuple(int(i) for i in np.unravel_index(number, grid))
    given = {"category": "corrupt", "error_type": "ValueError", "reason": "no more attempts", **letter}
    region = tuple(slice(i, i + 1) for i in place)
    return ChunkDeadLettered(at, number, DeadLetter(place, region, 3, message=message, worker=worker, **given))


def notices(grid: tuple[int, ...], *, done: float = 0.6, per_s: float = 200.0, dead: int = 2) -> list[Notice]:
    """Return a run that has come so far on two workers, with retries and dead letters on its way."""
    size = int(np.prod(grid))
    rng = random.Random(3)
    step = max(size // 300, 1)
    told: list[Notice] = [
        RunStarted(0.0, size, 80_000, grid, "s3://climate/era5.zarr/t2m", max_chunks=4 * step, max_nbytes=2**30),
        ClusterChanged(0.0, 2, 4),
    ]
    doomed = set(rng.sample(range(int(size * done)), min(dead, int(size * done))))
    at, ahead = 0.0, 2 * step
    for first in range(0, int(size * done), step):
        last = min(first + step, int(size * done))
        numbers = range(first, last)
        count = len(numbers)
        at += count / (per_s * rng.uniform(0.6, 1.4))
        told.append(sent(at, numbers, ahead, 80_000))
        told.append(
            came_back(
                at,
                numbers,
                f"tcp://10.0.0.{first % 2}:4000",
                elapsed_s=0.019 * count,
                transfer_s=0.001 * count,
                nbytes=80_000,
                fetch_s=0.011 * count,
                decode_s=0.004 * count,
                compute_s=0.002 * count,
                wall_s=0.018 * count,
                bytes_stored=40_000 * count,
                bytes_decoded=80_000 * count,
            )
        )
        ended = tuple(n for n in numbers if n not in doomed and n % 17 != 16)
        told.append(ChunksEmitted(at, ended))
        told.append(ChunksFiltered(at, tuple(n for n in numbers if n not in doomed and n % 17 == 16)))
        told += [
            given_up(at, number, MESSAGE, "", grid=grid, category="store", error_type="PermissionError")
            for number in doomed.intersection(numbers)
        ]
    begun = min(int(size * done) + 2 * step, size)
    flying = range(int(size * done), begun)
    if flying:
        told.append(BatchSubmitted(at, Batch(10**9, (flying,), len(flying), 1, fresh=True), len(flying), 80_000))
        timeout = {"category": Category.TIMEOUT, "error_type": "TimeoutError", "retryable": True}
        told.append(tried_again(at, flying[0], "no answer within 60 s", "", **timeout))
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
