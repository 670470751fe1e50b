"""Ctrl-C and SIGTERM: the first lets a run finish what is in flight, the second ends what was started."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any, NoReturn

import click

from zarr_dask_stream.engine.cluster import connected, leave_cluster_alone
from zarr_dask_stream.engine.events import BatchFinished, BatchSubmitted, Callback
from zarr_dask_stream.stream import ChunkStream

__all__ = ["Drain", "Terminated", "cluster", "heed_termination"]


class Terminated(BaseException):
    """SIGTERM or SIGHUP as an exception, so that a cluster started here is ended and temporary files go."""


def heed_termination() -> None:
    """Raise `Terminated` in the main thread when the process is asked to end, or its terminal is closed."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as it is under nohup
            signal.signal(number, _terminate)


def _terminate(number: int, _frame: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # once is enough, and the way out must not be cut short
    raise Terminated


@contextlib.contextmanager
def cluster(scheduler: str | None = None, workers: int | None = None) -> Iterator[Any]:
    """Lend a client of the scheduler at this address or of so many worker processes, or None."""
    lent = connected(scheduler, workers or 0)
    with contextlib.ExitStack() as stack:
        if workers:
            client = _started_apart(lent.__enter__)
            stack.push(lent.__exit__)
        else:
            client = stack.enter_context(lent)
        yield client


def _started_apart(start: Callable[[], Any]) -> Any:
    """Start worker processes in a thread that is deaf to Ctrl-C, and wait for it in this one, which is not.

    A terminal sends Ctrl-C to every process of a command. Processes inherit what their parent's thread
    has blocked, so workers never see it: this process ends them, in good order.
    """
    resource_tracker.ensure_running()  # it unblocks Ctrl-C in the thread that starts it
    started: Future[Any] = Future()

    def run() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            started.set_result(start())
        except BaseException as error:  # noqa: BLE001  # raised where the result is asked for
            started.set_exception(error)

    threading.Thread(target=run, name="zds-start-workers", daemon=True).start()
    try:
        return started.result()
    except (KeyboardInterrupt, Terminated):
        _abandon()
        raise


def _abandon() -> None:
    """Give up a cluster that is half started: it can't be closed, and Dask must not try to when Python ends."""
    leave_cluster_alone()
    for child in multiprocessing.active_children():
        child.kill()


class Drain(Callback):
    """Lets the first Ctrl-C or SIGTERM end a run in good order, and leaves the second one as it was.

    An observer too, which is how it knows what is in flight. `patience_s` bounds how long that may take:
    a store that never answers must not keep anybody.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._batches: dict[int, int] = {}
        self._over = threading.Event()
        self._before: dict[int, Any] = {}
        self.asked = False

    def on_batch_submitted(self, notice: BatchSubmitted) -> None:
        """Count chunks that go out."""
        self._batches[notice.batch.id] = notice.batch.count

    def on_batch_finished(self, notice: BatchFinished) -> None:
        """Count chunks that come back."""
        self._batches.pop(notice.batch.id, None)

    @contextlib.contextmanager
    def over(self, stream: ChunkStream) -> Iterator[None]:
        """Watch over a run of this stream; only what is inside the block can be drained."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals come to the main thread alone
            return

        drain = functools.partial(self._drain, stream)
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, drain)
        try:
            yield
        finally:
            self._over.set()
            self._restore()

    def _drain(self, stream: ChunkStream, number: int, _frame: FrameType | None) -> None:
        self._restore()
        if stream.report.outcome != "running":  # nothing is under way that could be finished
            signal.raise_signal(number)
            return
        self.asked = True
        stream.drain()
        # A signal may come while a line is being printed: another thread can wait for that.
        threading.Thread(target=self._see_out, args=(stream,), name="zds-drain", daemon=True).start()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _see_out(self, stream: ChunkStream) -> None:
        count = sum(self._batches.values())
        chunks = "1 chunk" if count == 1 else f"{count:,} chunks"
        if count:
            _say(f"finishing {chunks} in flight; press Ctrl-C again to stop at once")
        if not self._over.wait(self._patience_s):
            _say(f"what is in flight was not finished within {self._patience_s:g} s and is given up")
            stream.close()


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # standard error may be closed
        click.echo(text, err=True)
