"""One run for several consumers, in threads or on an event loop.

Nobody turns the loop of such a run for the others' sake. In threads, one of those that wait for an item turns
it until it has its own, and what comes for the others meanwhile is kept for them; then the next one takes
over. On an event loop a task does it, for as long as somebody waits. While nobody waits, nothing moves.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Generator, Sequence
from types import TracebackType
from typing import Any

from zarr_dask_stream.engine.dispatch import Dispatch, Receipts
from zarr_dask_stream.engine.events import Input, Threads, Tick
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.run import Run, Step, Wait
from zarr_dask_stream.source.chunk import Chunk

__all__ = ["AsyncTurns", "ThreadTurns", "Turns"]

logger = logging.getLogger("zarr_dask_stream")

_BLOCKED_S = 10.0  # how long one consumer may hold up another before we say so
_RING_S = 0.5  # a closing thread rings again after so long: the one that turns may just have begun to wait


class Turns:
    """What both kinds have in common: the state of a shared run, and what needs no waiting.

    Parameters
    ----------
    start : callable
        Makes the run; called when the first consumer waits.
    dispatch : Dispatch
        Who gets which item.
    counted : bool
        Read no more than the consumers ask for. False: as much as the window holds.
    """

    def __init__(self, start: Callable[[], Run], dispatch: Dispatch, *, counted: bool) -> None:
        self.dispatch = dispatch
        self.error: BaseException | None = None
        self._start = start
        self._counted = counted
        self._receipts = Receipts(len(dispatch.present) if dispatch.copies else 1)
        self._unconfirmed = 0
        self._run: Run | None = None
        self._steps: Generator[Step, Any, None] | None = None
        self._reply: list[Input] | None = None
        self._over = False
        self._ended = False
        self._traceback: TracebackType | None = None

    @property
    def over(self) -> bool:
        """Whether nothing more will come for anybody, now or later."""
        if self._ended or self.error is not None:
            return True
        if len(self.dispatch):
            return False
        return self._over or (self._run is not None and self._run.done)

    # -- moving items -------------------------------------------------------------------------------

    def _advance(self) -> Wait | None:
        """Move all that is ready to the consumers' queues; return for what to wait, if nothing was."""
        assert self._steps is not None
        moved = False
        while True:
            try:
                step = self._steps.send(self._reply)
            except StopIteration:
                self._over = True
                return None
            if isinstance(step, Wait):
                self._reply = [Tick()]
                return None if moved else step
            self._reply = None
            assert isinstance(step, Chunk)  # batches and sinks are for a single consumer
            self.dispatch.put(step)
            moved = True

    def _begin(self, run: Run, threads: Threads) -> None:
        self._steps = run.steps(threads)
        self._tell()

    def _tell(self) -> None:
        """Let the run know what has left and what is asked for."""
        left = self.dispatch.left()
        if self._run is None or self._ended:
            return
        if left:
            self._run.hand_out(left)
        if self._counted:
            self._run.demand(self.dispatch.demand)
        if not len(self.dispatch) and self._run.done:
            self._over = True

    def _take(self, who: int, most: int | None) -> list[Chunk]:
        if self._ended:
            return []
        chunks = self.dispatch.take(who, most)
        if chunks and self._run is not None and self._run.keeps_ledger:
            self._unconfirmed += len(chunks)
        return chunks

    def _confirm(self, numbers: Sequence[int]) -> None:
        if self._run is None or self._ended or not self._run.keeps_ledger:
            return
        self._unconfirmed -= len(numbers)
        self._run.acknowledge(self._receipts.confirm(numbers))

    @property
    def _complete(self) -> bool:
        """Whether the run can be closed: nothing will come, and nothing more can be confirmed."""
        return self._over and not len(self.dispatch) and self._unconfirmed <= 0

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error.with_traceback(self._traceback)

    def _note(self, error: BaseException) -> None:
        self._over = True
        if isinstance(error, Exception):
            self.error, self._traceback = error, error.__traceback__
            if self._run is not None:
                self._run.failed(error)

    def _complain(self, who: int, waited_s: float, said_s: float) -> float:
        """Say who holds up whom, where nothing moves for that reason; return when it was said."""
        stuck = self._run is not None and not self._run.running and not self.dispatch.waiting(who)
        if waited_s < max(_BLOCKED_S, 2 * said_s) or not stuck or not len(self.dispatch):
            return said_s
        slow = max(self.dispatch.present, key=self.dispatch.waiting)
        logger.warning(
            "consumer %d has waited for %.0f s, because consumer %d has not taken the %d items that are there for it: "
            "what is in flight is bounded for all together. Each consumer needs a thread or task of its own; "
            "close() those that are not used",
            who, waited_s, slow, self.dispatch.waiting(slow),
        )  # fmt: skip
        return waited_s


class ThreadTurns(Turns):
    """A run shared by threads."""

    def __init__(self, start: Callable[[], Run], dispatch: Dispatch, *, counted: bool) -> None:
        super().__init__(start, dispatch, counted=counted)
        self._news = threading.Condition()
        self._turner: int | None = None  # the thread that turns the loop
        self._waits = False  # whether it waits for the cluster, and can be woken

    @property
    def over(self) -> bool:
        """Whether nothing more will come for anybody, now or later."""
        with self._news:
            return super().over

    def begin(self) -> None:
        """Start the run in this thread, before others take part."""
        with self._news:
            self._turn(0.0)

    def take(self, who: int, most: int | None = None, deadline: float | None = None) -> list[Chunk]:
        """Return what is there for a consumer, once there is something; nothing where the run is over.

        Parameters
        ----------
        who, most : int
            The consumer, and how many items at most.
        deadline : float, optional
            By ``time.monotonic()``: return empty-handed then.

        Raises
        ------
        ZdsError
            What the run ended with; to each consumer, each time.
        """
        began = time.monotonic()
        said_s = 0.0
        with self._news:
            if self._turner == threading.get_ident():
                raise UsageError("this thread is at work for the stream: a callback of a stream can't ask it for items")
            looked = False
            while True:
                if self._turner is None and self._run is not None and not self._over and self._run.restless:
                    self._turn(0.0)  # as a loop does when it comes back for more: keep the cluster busy
                self._raise()
                chunks = self._take(who, most)
                if chunks or self._over or who not in self.dispatch.present:
                    self._notice()
                    return chunks
                now = time.monotonic()
                left = 2 * _BLOCKED_S if deadline is None else deadline - now
                if left <= 0 and looked:
                    self._rest()
                    return chunks
                said_s = self._complain(who, now - began, said_s)
                looked = True
                if self._turner is None:
                    self._turn(max(left, 0.0))
                elif left > 0:
                    self._news.wait(min(left, _BLOCKED_S))

    def ask(self, who: int, count: int) -> None:
        """Ask for so many more items; a negative number takes that back."""
        with self._news:
            self.dispatch.ask(who, count)
            self._notice()

    def give_back(self, who: int, chunks: list[Chunk]) -> None:
        """Put items back that nobody has got after all."""
        with self._news:
            self._unconfirmed -= len(chunks) if self._run is not None and self._run.keeps_ledger else 0
            self.dispatch.give_back(who, chunks)
            self._notice()
            self._news.notify_all()

    def confirm(self, numbers: Sequence[int]) -> None:
        """Say that a consumer is through with chunks."""
        with self._news:
            self._confirm(numbers)
            if self._complete and self._turner is None:
                self._end()

    def leave(self, who: int, *, finished: bool) -> None:
        """Let a consumer go; the last one ends the run."""
        with self._news:
            if who not in self.dispatch.present:
                return
            if not finished:
                self._receipts.forfeit()
            self.dispatch.leave(who)
            if self.dispatch.present:
                self._notice()
                self._news.notify_all()
                return
        self.close()

    def close(self) -> None:
        """End the run; those that wait get nothing more. Closing twice does no harm."""
        with self._news:
            if self._run is not None and not self._over:
                self._run.stop()
            self._over = True
            if self._turner == threading.get_ident():
                return  # the end of this turn is the end of the run
            while self._turner is not None:
                self._wake()
                self._news.wait(_RING_S)
            self._end()
            self._news.notify_all()

    # -- all of these with the lock held --------------------------------------------------------------

    def _turn(self, seconds: float) -> None:
        """Turn the loop until something has moved, or wait for so many seconds."""
        self._turner = threading.get_ident()
        try:
            if self._run is None:
                self._start_run()
            wait = self._advance()
            if wait is not None and seconds > 0:
                self._wait(min(wait.seconds, seconds))
        except BaseException as error:
            self._note(error)
            self._end()
            raise
        finally:
            self._turner = None
            self._news.notify_all()
            if self._complete or (self._run is not None and self._run.stopped):
                self._over = True
                self._end()

    def _start_run(self) -> None:
        self._news.release()
        try:
            run = self._start()
        finally:
            self._news.acquire()
        self._run = run
        self._news.release()
        try:
            threads = run.executor.start()
        finally:
            self._news.acquire()
        self._begin(run, threads)

    def _wait(self, seconds: float) -> None:
        assert self._run is not None
        self._waits = True
        self._news.release()
        try:
            reply = self._run.executor.wait(seconds)
        finally:
            self._news.acquire()
            self._waits = False
        self._reply = reply

    def _notice(self) -> None:
        """Pass on what consumers took or asked for."""
        self._tell()
        if self._waits and self._run is not None and self._run.restless:
            self._wake()
        if self._complete and self._turner is None:
            self._end()
        self._rest()

    def _rest(self) -> None:
        if self._turner is None and self._run is not None:
            self._run.rest()

    def _wake(self) -> None:
        if self._waits and self._run is not None:
            self._run.executor.wake()

    def _end(self) -> None:
        if self._run is None or self._ended:
            return
        self._ended = True
        try:
            self._run.end()
        finally:
            self._run.executor.close()


class AsyncTurns(Turns):
    """A run shared by tasks of one event loop."""

    def __init__(self, start: Callable[[], Run], dispatch: Dispatch, *, counted: bool) -> None:
        super().__init__(start, dispatch, counted=counted)
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Future[None] = self._loop.create_future()
        self._turner: asyncio.Task[None] | None = None
        self._waiting = 0
        self._farewells: set[asyncio.Task[None]] = set()

    async def take(self, who: int, most: int | None = None, deadline: float | None = None) -> list[Chunk]:
        """Return what is there for a consumer, once there is something; see `ThreadTurns.take`."""
        self._check_loop()
        began = time.monotonic()
        said_s = 0.0
        await asyncio.sleep(0)  # others may have waited for longer
        while True:
            if self._turner is None and self._run is not None and not self._over and self._run.restless:
                self._keep_turning()  # as a loop does when it comes back for more: keep the cluster busy
            self._raise()
            chunks = self._take(who, most)
            if chunks or self._over or who not in self.dispatch.present:
                self._notice()
                return chunks
            now = time.monotonic()
            left = 2 * _BLOCKED_S if deadline is None else deadline - now
            if left <= 0:
                self._rest()
                return chunks
            said_s = self._complain(who, now - began, said_s)
            await self._wait_for_news(min(left, _BLOCKED_S))

    def ask(self, who: int, count: int) -> None:
        """Ask for so many more items; a negative number takes that back."""
        self.dispatch.ask(who, count)
        self._notice()

    def give_back(self, who: int, chunks: list[Chunk]) -> None:
        """Put items back that nobody has got after all."""
        self._unconfirmed -= len(chunks) if self._run is not None and self._run.keeps_ledger else 0
        self.dispatch.give_back(who, chunks)
        self._notice()
        self._announce()

    def confirm(self, numbers: Sequence[int]) -> None:
        """Say that a consumer is through with chunks."""
        self._confirm(numbers)
        self._notice()

    async def leave(self, who: int, *, finished: bool) -> None:
        """Let a consumer go; the last one ends the run."""
        if who not in self.dispatch.present:
            return
        if not finished:
            self._receipts.forfeit()
        self.dispatch.leave(who)
        if self.dispatch.present:
            self._notice()
            self._announce()
        else:
            await self.close()

    async def close(self) -> None:
        """End the run; those that wait get nothing more. Closing twice does no harm."""
        self._check_loop()
        if self._run is not None and not self._over:
            self._run.stop()
            self._wake()
        self._over = True
        turner = self._turner
        if turner is not None and turner is not asyncio.current_task():
            await asyncio.wait({turner})
        await self._end()
        self._announce()

    def leave_soon(self, who: int | None) -> None:
        """Let a consumer go whose object nobody holds any more, or all of them; from any thread."""

        def leave() -> None:
            task = asyncio.ensure_future(self.close() if who is None else self.leave(who, finished=False))
            self._farewells.add(task)
            task.add_done_callback(self._farewells.discard)

        with contextlib.suppress(RuntimeError):  # the loop is closed, and with it all that ran on it
            self._loop.call_soon_threadsafe(leave)

    # -- on the loop ----------------------------------------------------------------------------------

    def _check_loop(self) -> None:
        if asyncio.get_running_loop() is not self._loop:
            raise UsageError("this stream is shared on another event loop: make a new producer or share on this one")

    async def _wait_for_news(self, seconds: float) -> None:
        self._waiting += 1
        try:
            self._keep_turning()
            await asyncio.wait({self._news}, timeout=seconds)
        finally:
            self._waiting -= 1

    def _keep_turning(self) -> None:
        if self._turner is None:
            self._turner = asyncio.ensure_future(self._turn())

    async def _turn(self) -> None:
        """Turn the loop for as long as somebody waits."""
        try:
            if self._run is None:
                self._run = self._start()
                self._begin(self._run, await self._run.executor.start_async())
            while not self._over:
                wait = self._advance()
                if wait is None:
                    self._announce()
                    await asyncio.sleep(0)  # let those go that were waiting
                elif self._waiting:
                    self._reply = await self._run.executor.wait_async(wait.seconds)
                if not self._waiting:
                    break
            if self._complete or self._run.stopped:
                self._over = True
                await self._end()
        except BaseException as error:  # noqa: BLE001  # it is raised where somebody waits
            self._note(error)
            await self._end()
        finally:
            self._turner = None
            self._announce()

    def _notice(self) -> None:
        """Pass on what consumers took or asked for."""
        self._tell()
        if self._turner is not None and self._run is not None and self._run.restless:
            self._wake()
        if self._complete and self._run is not None and not self._ended:
            self._keep_turning()  # it ends the run: not here, where to be cancelled would lose items
        self._rest()

    def _rest(self) -> None:
        if self._turner is None and self._run is not None:
            self._run.rest()

    def _announce(self) -> None:
        if not self._news.done():
            self._news.set_result(None)
        self._news = self._loop.create_future()

    def _wake(self) -> None:
        if self._turner is not None and self._steps is not None and self._run is not None:
            self._run.executor.wake()

    async def _end(self) -> None:
        if self._run is None or self._ended:
            return
        self._ended = True
        try:
            self._run.end()
        finally:
            await self._run.executor.close_async()
