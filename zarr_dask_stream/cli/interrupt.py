"""Ctrl-C and SIGTERM: one way out for both, which ends what was started."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any, NoReturn

from zarr_dask_stream.engine.executor import connected, leave_cluster_alone

__all__ = ["Terminated", "cluster", "heed_termination"]


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
