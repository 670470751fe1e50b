"""What the engine itself costs: a million chunks in virtual time, no store, no cluster.

``cost``: processor time in the supervisor and in the fold of its notices, per chunk. ``busy``: the share of the time in
which the threads of a simulated cluster have work. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import pstats
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from zarr_dask_stream.engine.batching import Batcher, BatchLimits, Cutter
from zarr_dask_stream.engine.events import Input, Tick
from zarr_dask_stream.engine.instructions import Cancel, Instruction, Notify, Submit
from zarr_dask_stream.engine.retry import RetryPolicy
from zarr_dask_stream.engine.supervisor import Supervisor
from zarr_dask_stream.engine.window import Window, WindowLimits
from zarr_dask_stream.source.grid import ChunkGrid
from zarr_dask_stream.source.hedging import Hedge
from zarr_dask_stream.source.selection import ChunkPlan, parse_region
from zarr_dask_stream.testing import ScriptedExecutor
from zarr_dask_stream.watch.report import Report

T = TypeVar("T")
CHUNK_NBYTES = 40_000


def machine_of(chunks: int, *, window_chunks: int, ordered: bool, deliver: bool, hedge: bool) -> Supervisor:
    side = round(chunks**0.5)
    grid = ChunkGrid((side, -(-chunks // side)), (1, 1))
    plan = ChunkPlan(grid, parse_region(None, grid.shape))
    return Supervisor(
        plan,
        Cutter(plan.runs()),
        Window(WindowLimits(chunks=None, nbytes=window_chunks * CHUNK_NBYTES)),
        Batcher(BatchLimits()),
        RetryPolicy(),
        chunk_nbytes=CHUNK_NBYTES,
        total=len(plan),
        ordered=ordered,
        deliver=deliver,
        hedge=Hedge() if hedge else None,
        rng=random.Random(0),
    )


class Meter:
    """Adds up the processor time of the calls that pass through it."""

    def __init__(self) -> None:
        self.ns = 0

    def __call__(self, fn: Callable[..., T], *args: Any) -> T:
        begin = time.process_time_ns()
        answer = fn(*args)
        self.ns += time.process_time_ns() - begin
        return answer


class Loop:
    """Runs a machine to its end as the stream's loop does, timing only what is the engine's."""

    def __init__(self, machine: Supervisor, executor: ScriptedExecutor) -> None:
        self.machine = machine
        self.executor = executor
        self.engine = Meter()
        self.observers = Meter()
        self.report = Report()

    def run(self) -> None:
        machine, executor = self.machine, self.executor
        self.handle(executor.start())
        while True:
            if self.engine(self.take_what_is_ready):
                self.handle(Tick())
            elif machine.done:
                break
            else:
                due = self.engine(machine.next_timer)
                for event in executor.wait(1.0 if due is None else max(due - executor.clock(), 0.0)):
                    self.handle(event)
        self.carry_out(self.engine(machine.finish, "done", executor.clock()))

    def take_what_is_ready(self) -> bool:
        """Take items until there are none or the machine wants to submit; say whether it does."""
        while self.machine.take() is not None:
            if self.machine.hungry:
                return True
        return False

    def handle(self, event: Input) -> None:
        self.carry_out(self.engine(self.machine.handle, event, self.executor.clock()))

    def carry_out(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, Notify):
                self.observers(self.report.handle, instruction.notice)
            elif isinstance(instruction, Submit):
                self.executor.submit(instruction.batches)
            elif isinstance(instruction, Cancel):
                self.executor.cancel(instruction.batches)


def measure(
    chunks: int,
    *,
    threads: int,
    chunk_s: float,
    window_chunks: int,
    ordered: bool = True,
    deliver: bool = True,
    hedge: bool = False,
) -> dict[str, Any]:
    machine = machine_of(chunks, window_chunks=window_chunks, ordered=ordered, deliver=deliver, hedge=hedge)
    executor = ScriptedExecutor(
        threads=threads, workers=threads, duration=lambda batch: batch.count * chunk_s, jitter=0.2, seed=1
    )
    loop = Loop(machine, executor)
    gc.collect()
    loop.run()
    report, engine, observers = loop.report, loop.engine, loop.observers
    assert report.emitted == report.total
    assert report.total is not None
    return {
        "chunks": report.total,
        "threads": threads,
        "ordered": ordered,
        "deliver": deliver,
        "hedge": hedge,
        "chunk_s": chunk_s,
        "window_chunks": window_chunks,
        "tasks": report.batches,
        "engine_us_per_chunk": round(engine.ns / 1000 / report.total, 3),
        "observers_us_per_chunk": round(observers.ns / 1000 / report.total, 3),
        "engine_us_per_task": round(engine.ns / 1000 / report.batches, 1),
        "virtual_s": round(executor.clock(), 3),
        "busy_share": round(executor.busy_share, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--profile", action="store_true", help="show where the time goes instead")
    options = parser.parse_args()
    small = {"threads": 8, "chunk_s": 50e-6, "window_chunks": 65_536}
    large = {"threads": 1000, "chunk_s": 0.05, "window_chunks": 400_000}
    runs: list[dict[str, Any]] = [
        {**size, "ordered": ordered, "deliver": deliver}
        for size in (small, large)
        for ordered, deliver in ((True, True), (False, True), (False, False))
    ]
    runs += [{**size, "hedge": True} for size in (small, large)]
    if options.profile:
        with cProfile.Profile() as profile:
            measure(options.chunks, **runs[0])
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        return
    print(json.dumps([measure(options.chunks, **run) for run in runs], indent=1))


if __name__ == "__main__":
    main()
