"""Many requests in flight on a remote store, while the calling thread decodes what has arrived.

The calling thread hands requests over in small lots and takes answers out; the loop's thread keeps as
many in flight as `Limit` allows. What has been handed over and not taken is bounded, by number and by
bytes, so that a slow consumer stops the fetching.
"""

from __future__ import annotations

import asyncio
import errno
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import Any, Self

from zarr_dask_stream.errors import StoreError
from zarr_dask_stream.source.backend import RemoteBytes
from zarr_dask_stream.source.hedging import Stragglers

__all__ = ["Answer", "Fetcher", "Limit", "Request", "coalesce"]

#: Encoded bytes that may be on their way or waiting, at most; one request always passes.
MAX_AHEAD_BYTES = 1 << 28
_CLOSE_S = 5.0
_POLL_S = 0.25
_LOOK_AGAIN_S = 0.1  # a request that may be sent twice is thought about so often
# Below this a longer answer says more about this host than about the store.
_SHORT_S = 0.005
# An answer this many times slower than the fastest still did not wait for others / surely did.
_UNDISTURBED = 2.0
_QUEUED = 6.0


@dataclass(frozen=True, slots=True)
class Request:
    """A key, or a part of one: ``start:stop``, or with a negative `start` and no `stop` its last bytes.

    A whole value of more than `most` bytes is not read to its end.
    """

    tag: Any
    key: str
    start: int | None = None
    stop: int | None = None
    cost_bytes: int = 0
    most: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a request: the bytes, None where the key is not there, or an error."""

    request: Request
    data: bytes | None
    error: Exception | None
    seconds: float
    hedged: bool = False


class Limit:
    """How many requests to keep in flight, adapted to the latency that is measured.

    While answers take about as long as the fastest did lately, requests don't wait for one another and
    more are sent; once they take longer, they only queue up at the server and fewer are sent. A refusal
    ("slow down") halves the number. The idea is that of delay-based congestion control (TCP Vegas).

    Examples
    --------
    >>> limit = Limit(8, least=1, most=64)
    >>> for _ in range(200):
    ...     limit.observe(0.030)
    >>> limit.current > 8
    True
    >>> fixed = Limit(4, least=4, most=4)
    >>> fixed.observe(0.5, refused=True)
    >>> fixed.current
    4
    """

    def __init__(self, start: int, *, least: int, most: int) -> None:
        self._value, self._least, self._most = float(start), least, most
        self._fastest_s = float("inf")

    @property
    def current(self) -> int:
        """Requests to keep in flight."""
        return int(self._value)

    def observe(self, seconds: float, *, refused: bool = False) -> None:
        """Take note of one answer."""
        if refused:
            self._value = max(self._least, self._value / 2)
            return
        # The yardstick ages slowly, so that a store that became slower for good is not strangled.
        self._fastest_s = max(_SHORT_S, min(self._fastest_s * 1.001, seconds))
        slowdown = seconds / self._fastest_s
        step = 2.0 if slowdown < _UNDISTURBED else -2.0 if slowdown > _QUEUED else 0.0
        self._value = min(self._most, max(self._least, self._value + step / self._value))


class Fetcher:
    """Requests in, answers out, in the order of arrival.

    Parameters
    ----------
    store : RemoteBytes
        Where to read.
    limit : Limit
        How many at once; shared by those who read the same store.
    timeout : float or None
        Seconds for one request.
    stragglers : Stragglers, optional
        When to send a request a second time; never by default.
    stopped : callable, optional
        Asked now and then while nothing arrives; True ends the wait.
    """

    def __init__(
        self,
        store: RemoteBytes,
        limit: Limit,
        *,
        timeout: float | None,
        stragglers: Stragglers | None = None,
        stopped: Callable[[], bool] | None = None,
    ) -> None:
        self._store, self._limit, self._timeout = store, limit, timeout
        self._stragglers = stragglers or Stragglers(None)
        self._stopped = stopped
        self._loop = store.loop
        self._pending: deque[Request] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._closed = False
        self._idle = threading.Event()
        self.outstanding = 0
        self.outstanding_bytes = 0

    @property
    def room(self) -> int:
        """How many more requests may be handed over now."""
        if self.outstanding and self.outstanding_bytes >= MAX_AHEAD_BYTES:
            return 0
        return max(0, 2 * self._limit.current - self.outstanding)

    def submit(self, requests: Iterable[Request]) -> None:
        """Hand requests over."""
        lot = list(requests)
        if lot:
            self.outstanding += len(lot)
            self.outstanding_bytes += sum(request.cost_bytes for request in lot)
            self._loop.call_soon_threadsafe(self._accept, lot)

    def next(self) -> Answer | None:
        """Wait for the next answer; None where the wait was ended instead."""
        while True:
            try:
                answer = self._answers.get(timeout=_POLL_S)
                break
            except queue.Empty:
                if self._stopped is not None and self._stopped():
                    return None
                if not self._loop.is_running():
                    raise StoreError(f"the thread that reads {self._store.url} has stopped") from None
        self.outstanding -= 1
        self.outstanding_bytes -= answer.request.cost_bytes
        return answer

    # -- on the loop's thread -----------------------------------------------------------------

    def _accept(self, lot: list[Request]) -> None:
        self._pending.extend(lot)
        self._pump()

    def _pump(self) -> None:
        while self._pending and not self._closed and len(self._tasks) < self._limit.current:
            task = self._loop.create_task(self._one(self._pending.popleft()))
            self._tasks.add(task)
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._closed and not self._tasks:
            self._idle.set()
        self._pump()

    async def _one(self, request: Request) -> None:
        begin = perf_counter()
        data: bytes | None = None
        error: Exception | None = None
        hedged = False
        try:
            async with asyncio.timeout(self._timeout):
                if self._stragglers.on:
                    data, hedged = await self._hedge(request)
                else:
                    data = await self._store.fetch(request.key, request.start, request.stop, request.most)
        except TimeoutError:
            text = f"reading {request.key} of {self._store.url} took longer than {self._timeout} s"
            error = TimeoutError(errno.ETIMEDOUT, text)
        except Exception as problem:  # noqa: BLE001  # every failure belongs to its request
            error = problem
        seconds = perf_counter() - begin
        refused = isinstance(error, OSError) and error.errno == errno.EBUSY
        if error is None or refused:
            self._limit.observe(seconds, refused=refused)
        self._answers.put(Answer(request, data, error, seconds, hedged))

    async def _hedge(self, request: Request) -> tuple[bytes | None, bool]:
        """Fetch, and once that takes unusually long, fetch again beside it; the first good answer wins."""
        begin = perf_counter()
        self._stragglers.started(1)
        copies = {self._copy(request)}
        hedged = False
        try:
            while not hedged and not next(iter(copies)).done():
                # What is usual may only show while this request is out: the first ones all start at once.
                left = self._stragglers.patience(chunks=1) - (perf_counter() - begin)
                if left <= 0 and self._stragglers.afford(1):
                    copies.add(self._copy(request))
                    hedged = True
                else:
                    await asyncio.wait(copies, timeout=min(left, _LOOK_AGAIN_S) if left > 0 else _LOOK_AGAIN_S)
            while True:
                done, running = await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
                good = [copy for copy in done if copy.exception() is None]
                if good or not running:
                    data = (good or list(done))[0].result()
                    self._stragglers.observe(elapsed_s=perf_counter() - begin, chunks=1)
                    return data, hedged
                copies = running
        finally:
            for copy in copies:
                copy.cancel()

    def _copy(self, request: Request) -> asyncio.Task[bytes | None]:
        copy = self._loop.create_task(self._store.fetch(request.key, request.start, request.stop, request.most))
        copy.add_done_callback(_forgive)
        return copy

    def _cancel(self) -> None:
        self._closed = True
        self._pending.clear()
        for task in self._tasks:
            task.cancel()
        if not self._tasks:
            self._idle.set()

    # -----------------------------------------------------------------------------------------

    def close(self) -> None:
        """Cancel what is in flight and wait until it is gone."""
        if self._loop.is_running():
            self._loop.call_soon_threadsafe(self._cancel)
            self._idle.wait(_CLOSE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _forgive(copy: asyncio.Task[Any]) -> None:
    """Look at the outcome of a copy that lost, or asyncio would log that nobody did."""
    if not copy.cancelled():
        copy.exception()


def coalesce(
    spans: Iterable[tuple[int, int, Any]], *, max_gap: int, max_bytes: int
) -> list[tuple[int, int, list[tuple[int, int, Any]]]]:
    """Join byte ranges that lie close to one another.

    Parameters
    ----------
    spans : iterable of (start, stop, tag)
        The ranges that are wanted.
    max_gap : int
        Bytes between two ranges that may be read for nothing.
    max_bytes : int
        Length that a joined range must not pass (a single longer one stays as it is).

    Returns
    -------
    list of (start, stop, members)
        In order of their places.

    Examples
    --------
    >>> coalesce([(0, 10, "a"), (50, 60, "c"), (12, 20, "b")], max_gap=4, max_bytes=100)
    [(0, 20, [(0, 10, 'a'), (12, 20, 'b')]), (50, 60, [(50, 60, 'c')])]
    """
    joined: list[tuple[int, int, list[tuple[int, int, Any]]]] = []
    for span in sorted(spans, key=lambda span: span[:2]):
        start, stop, _ = span
        if joined:
            first, last, members = joined[-1]
            if start - last <= max_gap and max(last, stop) - first <= max_bytes:
                members.append(span)
                joined[-1] = first, max(last, stop), members
                continue
        joined.append((start, stop, [span]))
    return joined
