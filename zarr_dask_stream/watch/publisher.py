"""A run made known to the scheduler, for its dashboard: twice a second at most, and only where somebody listens.

Whether a scheduler listens is written in its metadata by the plugin in `dashboard`. News go there as JSON through the
connection that the client has already, from its event loop: the stream itself never waits for them, but for a moment
at its end, so that a program that ends at once is not shown as one that died.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import logging
import os
import socket
import uuid
from collections.abc import Callable
from typing import Any

from zarr_dask_stream.engine.events import Notice, RunFinished, RunStarted
from zarr_dask_stream.watch.figures import Figures

__all__ = ["METADATA", "OPERATION", "Publisher"]

METADATA = "zarr-dask-stream"
OPERATION = "zds_stream"

logger = logging.getLogger("zarr_dask_stream")

_EVERY_S = 0.5
_ASK_EVERY_S = 5.0  # whether there is a dashboard by now
_GOODBYE_S = 1.0


class Publisher(Figures):
    """Tells a scheduler of a run; an observer of its notices.

    Parameters
    ----------
    client : distributed.Client
        Whose scheduler to tell.
    look : callable
        Returns what there is to see of the run, as plain data for JSON; called on the client's event loop.
    """

    def __init__(self, client: Any, look: Callable[[], dict[str, Any]]) -> None:
        super().__init__()
        self._client = client
        self._look = look
        self._run = uuid.uuid4().hex
        self._whose = f"{socket.gethostname()}:{os.getpid()}"
        self._outcome = "running"
        self._heard = 0
        self._told = -1
        self._listens = False
        self._over: asyncio.Event | None = None
        self._work: concurrent.futures.Future[None] | None = None

    def on_notice(self, notice: Notice) -> None:  # noqa: ARG002  # that there is something new is enough
        """Note that there is something new."""
        self._heard += 1

    def on_run_started(self, notice: RunStarted) -> None:
        """Begin to tell."""
        super().on_run_started(notice)
        self._work = asyncio.run_coroutine_threadsafe(self._tell(), self._client.loop.asyncio_loop)

    def on_run_finished(self, notice: RunFinished) -> None:
        """Tell how it ended; wait a moment for that where there is somebody to tell it to."""
        super().on_run_finished(notice)
        self._outcome = notice.outcome
        self._heard += 1
        if self._work is None or self._work.done():
            return
        loop = self._client.loop.asyncio_loop
        with contextlib.suppress(RuntimeError):  # the loop is closed, and with it the work is over
            loop.call_soon_threadsafe(self._finish)
            if self._listens and not _in_event_loop():
                with contextlib.suppress(TimeoutError, concurrent.futures.CancelledError):
                    self._work.result(_GOODBYE_S)

    def _finish(self) -> None:
        if self._over is not None:
            self._over.set()

    # -- on the client's event loop -------------------------------------------------------------------

    async def _tell(self) -> None:
        self._over = over = asyncio.Event()
        while self._client.status != "closed":
            last = self._outcome != "running"
            if self._client.status == "closing" and not last:
                return
            try:
                if not self._listens:
                    self._listens = bool(await self._client.scheduler.get_metadata(keys=[METADATA], default=None))
                if self._listens and self._told != self._heard:
                    self._told = self._heard
                    await getattr(self._client.scheduler, OPERATION)(client=self._client.id, news=self._news())
            except Exception:  # nothing here may trouble the stream
                logger.debug("the scheduler could not be told of a stream", exc_info=True)
                self._listens = False  # it may be another one by now
            if last:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), _EVERY_S if self._listens else _ASK_EVERY_S)

    def _news(self) -> dict[str, Any]:
        return {
            "v": 1,
            "run": self._run,
            "name": self.name,
            "whose": self._whose,
            "outcome": self._outcome,
            "counts": self.copy(),
            "planned": self.planned,
            "in_flight": self.in_flight,
            "in_flight_bytes": self.in_flight_bytes,
            "snapshot": json.dumps(self._look(), allow_nan=False, separators=(",", ":")),
        }


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
