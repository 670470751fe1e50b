"""Where batches run: in the calling thread, or on a Dask cluster.

An executor takes batches and gives back inputs for the supervisor. It decides nothing: a worker that
died is a `BatchLost`, and what follows from that is decided in ``supervisor.py``. It raises
`ClusterError` for what no decision can mend: a scheduler that is gone, a package that is not there.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from zarr_dask_stream.engine.cluster import active_client, check_client, embedded_cluster, in_stage
from zarr_dask_stream.engine.dask_executor import DaskExecutor
from zarr_dask_stream.engine.events import Batch, BatchDone, Input, Threads, Tick
from zarr_dask_stream.engine.feed import Cargo
from zarr_dask_stream.engine.task import Work, run_batch
from zarr_dask_stream.errors import UsageError

__all__ = ["Executor", "SerialExecutor", "choose_executor"]


class Executor(Protocol):
    """What the loop needs of a place where batches run."""

    def start(self) -> Threads:
        """Get ready; return how many threads there are."""
        ...

    def submit(self, batches: tuple[Batch, ...]) -> None:
        """Send batches off; never waits for them."""
        ...

    def cancel(self, batches: tuple[int, ...]) -> None:
        """Call batches back."""
        ...

    def restart(self, worker: str) -> None:
        """Restart a worker whose threads hang, where that is possible; never waits for it."""
        ...

    def wait(self, seconds: float | None) -> list[Input]:
        """Wait until something happened, or for so many seconds; may return nothing."""
        ...

    async def wait_async(self, seconds: float | None) -> list[Input]:
        """Like `wait`, for an event loop."""
        ...

    def wake(self) -> None:
        """End the `wait` that goes on, else the next one; may be called from any thread."""
        ...

    def close(self) -> None:
        """Call everything back and let go."""
        ...

    async def start_async(self) -> Threads:
        """Like `start`, for an event loop."""
        ...

    async def close_async(self) -> None:
        """Like `close`, for an event loop."""
        ...


class SerialExecutor:
    """Runs each batch in the thread that waits for it: no cluster, no thread, easy to debug."""

    def __init__(self, work: Work, cargo: Callable[[Batch], Cargo] | None = None) -> None:
        self._work = work
        self._cargo = cargo
        self._queue: deque[Batch] = deque()
        self._bell = threading.Event()
        self._sleeper: asyncio.Future[None] | None = None

    def start(self) -> Threads:
        """Nothing to start."""
        return Threads(1, 1)

    async def start_async(self) -> Threads:
        """Nothing to start."""
        return self.start()

    def submit(self, batches: tuple[Batch, ...]) -> None:
        """Queue batches until somebody waits for them."""
        self._queue.extend(batches)

    def cancel(self, batches: tuple[int, ...]) -> None:
        """Forget queued batches."""
        self._queue = deque(batch for batch in self._queue if batch.id not in batches)

    def restart(self, worker: str) -> None:
        """Nothing to restart: this is the caller's own thread."""

    def wait(self, seconds: float | None) -> list[Input]:
        """Run one batch, or sleep where there is none."""
        if not self._queue:
            self._bell.wait(seconds or 0.0)
            self._bell.clear()
            return [Tick()]
        batch = self._queue.popleft()
        cargo = None if self._cargo is None else self._cargo(batch)
        return [BatchDone(batch.id, run_batch(self._work, batch.ranges, worker="this process", cargo=cargo))]

    async def wait_async(self, seconds: float | None) -> list[Input]:
        """Run one batch in another thread, so that the event loop goes on."""
        if not self._queue:
            self._sleeper = asyncio.get_running_loop().create_future()
            if not self._bell.is_set():
                await asyncio.wait({self._sleeper}, timeout=seconds or 0.0)
            self._bell.clear()
            return [Tick()]
        return await asyncio.to_thread(self.wait, seconds)

    def wake(self) -> None:
        """End a sleep; a batch that runs is not disturbed."""
        self._bell.set()
        if self._sleeper is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody sleeps on it
                self._sleeper.get_loop().call_soon_threadsafe(_end_sleep, self._sleeper)

    def close(self) -> None:
        """Forget what is queued."""
        self._queue.clear()

    async def close_async(self) -> None:
        """Forget what is queued."""
        self.close()


def _end_sleep(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done():
        sleeper.set_result(None)


def choose_executor(
    work: Work, client: Any, *, serial: bool, cargo: Callable[[Batch], Cargo] | None = None
) -> Executor:
    """Choose where a run takes place.

    The client given; else the active one; else this thread where `serial` allows it; else a cluster
    inside this process, for this run only. A function that a stream calls has its own thread and no
    other: tasks of an inner stream would wait for the thread that waits for them. `cargo` returns the
    data that go with a batch, where no store has them.
    """
    check_client(client)
    if in_stage.get():
        if client is None:
            return SerialExecutor(work, cargo)
        raise UsageError(
            "a stream inside a function of another stream can't have its tasks on a cluster: each would wait for a "
            "thread that waits for it. Leave client= out, then its chunks are read in the function's own thread"
        )
    client = client or active_client()
    if client is not None:
        return DaskExecutor(client, work, cargo=cargo)
    if serial:
        return SerialExecutor(work, cargo)
    return DaskExecutor(embedded_cluster(), work, own_cluster=True, cargo=cargo)
