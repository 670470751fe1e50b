"""What it costs to watch every run: its sums, its history and its map, as a share of the run's processor time.

Real runs on the cluster inside this process, so that all of the work is counted. The time within the folds is taken by
the thread that runs them, so other work on the machine does not count. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import zarr

import zarr_dask_stream as zds
from zarr_dask_stream.engine.events import Notice
from zarr_dask_stream.watch.account import Account
from zarr_dask_stream.watch.report import Report


class Timed:
    """Adds up the processor time of the calls of a method, and counts them."""

    def __init__(self, owner: type, name: str) -> None:
        self.ns = 0
        self.calls = 0
        self._owner, self._name = owner, name
        self._method: Callable[..., Any] = getattr(owner, name)

    def __enter__(self) -> Self:
        method = self._method

        def timed(watcher: Any, notice: Notice) -> None:
            begin = time.thread_time_ns()
            method(watcher, notice)
            self.ns += time.thread_time_ns() - begin
            self.calls += 1

        setattr(self._owner, self._name, timed)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(self._owner, self._name, self._method)


def measure(array: Any, *, how: str) -> dict[str, Any]:
    """Run once; `how`: "run" (results are dropped), "reduce" or "loop"."""
    stream: Any = zds.stream_chunks(array, ordered=False)
    if how == "reduce":
        stream = stream.reduce(zds.reducers.mean())
    else:
        stream = stream.map(lambda chunk: float(chunk.data[0, 0]))
    with Timed(Report, "handle") as watched:
        began = time.process_time_ns()
        if how == "run":
            stream.run()
        else:
            for _ in stream:
                pass
        whole = time.process_time_ns() - began
    report = stream.report
    again = _folded_without(array)
    return {
        "how": how,
        "chunks": report.total,
        "tasks": report.batches,
        "notices": watched.calls,
        "share": round(watched.ns / whole, 5),
        "us_per_chunk": round(watched.ns / 1000 / report.total, 3),
        **again,
    }


def _folded_without(array: Any) -> dict[str, Any]:
    """Run once more with nothing but the sums: what history and map add to them."""
    handle = Report.handle
    try:
        Report.handle = Account.handle  # type: ignore[method-assign]  # measured without the rest
        with Timed(Report, "handle") as sums:
            stream = zds.stream_chunks(array, ordered=False).map(lambda chunk: float(chunk.data[0, 0]))
            stream.run()
    finally:
        Report.handle = handle  # type: ignore[method-assign]  # as it was
    return {"us_per_chunk_of_sums": round(sums.ns / 1000 / max(stream.report.total or 1, 1), 3)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--chunks", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    side = round(arguments.chunks**0.5)
    array = zarr.create_array({}, shape=(side * 100, side * 100), chunks=(100, 100), dtype="f4")
    pattern = np.random.default_rng(0).random((100, side * 100), "f4")
    for row in range(side):
        array[row * 100 : (row + 1) * 100] = pattern
    rows = [measure(array, how=how) for _ in range(arguments.rounds) for how in ("run", "reduce", "loop")]
    print(json.dumps({"chunk_nbytes": 40_000, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
