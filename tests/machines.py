"""Supervisors, results for them, and whole runs of them, for the tests of what they decide."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from zarr_dask_stream.engine.batching import Batcher, BatchLimits, Cutter
from zarr_dask_stream.engine.events import (
    Batch,
    BatchDone,
    BatchResult,
    Category,
    Failure,
    Notice,
)
from zarr_dask_stream.engine.instructions import Instruction, Notify, Submit
from zarr_dask_stream.engine.retry import RetryPolicy
from zarr_dask_stream.engine.supervisor import Supervisor
from zarr_dask_stream.engine.window import Item, Window, WindowLimits
from zarr_dask_stream.source.grid import ChunkGrid
from zarr_dask_stream.source.selection import ChunkPlan, parse_region
from zarr_dask_stream.testing import Rehearsal, ScriptedExecutor

NBYTES = 10
PLAIN = RetryPolicy(wait_initial=1.0, wait_jitter=0.0)


def plan_of(chunks: int, where: Callable[[tuple[int, ...]], Any] | None = None) -> ChunkPlan:
    grid = ChunkGrid((chunks,), (1,))
    return ChunkPlan(grid, parse_region(None, grid.shape), where)


def machine_of(
    chunks: int = 10,
    *,
    window: int | None = 100,
    nbytes: int = 10**9,
    policy: RetryPolicy = PLAIN,
    batch: int = 8192,
    where: Callable[[tuple[int, ...]], Any] | None = None,
    seed: int = 0,
    **options: Any,
) -> Supervisor:
    plan = plan_of(chunks, where)
    return Supervisor(
        plan,
        Cutter(plan.runs()),
        Window(WindowLimits(chunks=window, nbytes=nbytes)),
        Batcher(BatchLimits(chunks=batch)),
        policy,
        chunk_nbytes=NBYTES,
        total=chunks if where is None else None,
        rng=random.Random(seed),
        **options,
    )


def notices(instructions: list[Instruction]) -> list[Notice]:
    return [i.notice for i in instructions if isinstance(i, Notify)]


def submitted(instructions: list[Instruction]) -> list[Batch]:
    return [batch for i in instructions if isinstance(i, Submit) for batch in i.batches]


def done(batch: Batch, *, failures: list[Failure] | None = None, **outcomes: Any) -> BatchDone:
    """Make a result of a batch in which what is not named otherwise succeeded."""
    numbers = [n for run in batch.ranges for n in run]
    other = {f.number for f in failures or []}
    for kind in ("filtered", "skipped", "unattempted"):
        other |= set(outcomes.get(kind, ()))
    good = [n for n in numbers if n not in other]
    result = BatchResult(numbers=good, values=[n * 100 for n in good], failures=failures or [], **outcomes)
    return BatchDone(batch.id, result)


def reset(number: int) -> Failure:
    return Failure(number, Category.TRANSIENT, "ConnectionResetError", "reset")


def take_all(machine: Supervisor) -> list[int]:
    taken = []
    while (item := machine.take()) is not None:
        taken.append(item.number)
    return taken


def rehearse(machine: Supervisor, **script: Any) -> tuple[list[Item], Rehearsal]:
    run = Rehearsal(machine, ScriptedExecutor(**script))
    return list(run.items()), run


def balanced(run: Rehearsal) -> bool:
    report, counts = run.report, run.machine.counts
    ends = [report.emitted, report.filtered, report.skipped_missing, report.dead_lettered, report.cancelled]
    assert ends == [counts.emitted, counts.filtered, counts.skipped, counts.dead, counts.cancelled]
    return report.total == sum(ends) == counts.settled and len(report.dead_letters) == counts.dead
