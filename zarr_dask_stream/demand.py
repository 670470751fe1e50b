"""Streams that are asked: producers, several consumers of one run, and consumers that are fed.

Three faces of one shared run (see ``turns.py``), each for threads and for tasks of an event loop:

- a `Producer` reads exactly what it is asked for;
- `Share` objects are loops over one run, which gives each item to one of them, or all items to each;
- a `Consumer` is handed items as they come, and its demand is renewed as it gets through them.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from zarr_dask_stream.engine.dispatch import Broadcast, Dispatch, OnDemand, Partition
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.run import Run
from zarr_dask_stream.scalars import as_real, as_whole
from zarr_dask_stream.source.chunk import Chunk, numbers_of
from zarr_dask_stream.stages.transform import check_function
from zarr_dask_stream.turns import AsyncTurns, ThreadTurns, Turns

__all__ = ["Consumer", "How", "Producer", "Share", "feed", "feed_async", "share"]

logger = logging.getLogger("zarr_dask_stream")

How = Literal["demand", "partition", "broadcast"]
Start = Callable[[], Run]
TurnsT = TypeVar("TurnsT", bound=Turns)


class _Hub:
    """A shared run that is not begun yet: whoever waits first decides whether threads or tasks share it."""

    def __init__(self, start: Start, dispatch: Dispatch, *, counted: bool) -> None:
        self.consumers, self.how = len(dispatch.present), dispatch.how
        self._start, self._dispatch, self._counted = start, dispatch, counted
        self._lock = threading.Lock()
        self.turns: Turns | None = None

    def threads(self) -> ThreadTurns:
        """Return the run for threads."""
        with self._lock:
            if self.turns is None:
                self.turns = ThreadTurns(self._start, self._dispatch, counted=self._counted)
        if not isinstance(self.turns, ThreadTurns):
            raise UsageError(
                "tasks of an event loop share this run, and threads can't take part: use `async for`, `async with` and "
                "the methods that end in _async, or make another one"
            )
        return self.turns

    def tasks(self) -> AsyncTurns:
        """Return the run for tasks of the running event loop."""
        with self._lock:
            if self.turns is None:
                self.turns = AsyncTurns(self._start, self._dispatch, counted=self._counted)
        if not isinstance(self.turns, AsyncTurns):
            raise UsageError(
                "threads share this run, and tasks of an event loop can't take part: use `for`, `with` and the methods "
                "that don't end in _async, or make another one"
            )
        return self.turns

    def let_go(self, who: int | None) -> None:
        """Let one consumer go whose object nobody holds any more, or all of them."""
        turns = self.turns
        if isinstance(turns, AsyncTurns):
            turns.leave_soon(who)
        elif isinstance(turns, ThreadTurns):
            if who is None:
                turns.close()
            else:
                turns.leave(who, finished=False)
        elif who is not None:
            self._dispatch.leave(who)


# -- asking -------------------------------------------------------------------------------------------


class Producer:
    """A stream that is asked for items; made by `ChunkStream.producer`.

    Nothing is read before it is asked for: at no time are more chunks under way than were asked for and have
    not been handed out. Any number of threads may ask at once, or of tasks with `ask_async`; each item goes to
    one of them.

    With a ``checkpoint``, an item is done when the thread or task that got it asks again. Give
    ``auto_ack=False`` where items are handed on to others, and say with `ack` when they are done. What is not
    done when the program ends comes again in the next run.

    Attributes
    ----------
    done : bool
        Whether the stream is over and nothing is left to ask for.

    Examples
    --------
    >>> import zarr
    >>> from zarr_dask_stream import stream_chunks
    >>> array = zarr.create_array({}, shape=(10,), chunks=(2,), dtype="i4", fill_value=7)
    >>> with stream_chunks(array, concurrency=1).producer() as producer:
    ...     while items := producer.ask(2):
    ...         print([chunk.index for chunk in items], producer.done)
    [(0,), (1,)] False
    [(2,), (3,)] False
    [(4,)] True
    """

    def __init__(self, start: Start, *, auto_ack: bool = True) -> None:
        self._hub = _Hub(start, OnDemand(), counted=True)
        self._auto_ack = auto_ack
        self._in_hand = threading.local()  # by thread; it is gone with the thread
        self._in_task: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()
        weakref.finalize(self, self._hub.let_go, None).atexit = False

    def ask(self, n: int = 1, timeout: float | None = None) -> list[Chunk]:
        """Return `n` items; fewer only where the stream is over or the time is up.

        Parameters
        ----------
        n : int
            Items, at least one.
        timeout : float, optional
            Seconds; what has come by then is returned. What was asked for beyond that is read no more, but for
            what is under way already.

        Returns
        -------
        list of Chunk
            Empty where the stream is over, or where nothing came in time: `done` tells.

        Raises
        ------
        ChunkError, StoreError, ClusterError
            As a loop over the stream would; to each that asks, each time.
        UsageError
            Under an asynchronous client: use `ask_async`.
        """
        n, deadline = _check_ask(n, timeout)
        turns = self._hub.threads()
        if self._auto_ack:
            turns.confirm(self._in_hand.__dict__.pop("numbers", ()))
        chunks: list[Chunk] = []
        turns.ask(0, n)
        try:
            while len(chunks) < n and (more := turns.take(0, n - len(chunks), deadline)):
                chunks += more
        except BaseException:
            turns.ask(0, len(chunks) - n)
            turns.give_back(0, chunks)
            raise
        if len(chunks) < n:
            turns.ask(0, len(chunks) - n)
        self._in_hand.numbers = numbers_of(chunks)
        return chunks

    async def ask_async(self, n: int = 1, timeout: float | None = None) -> list[Chunk]:  # noqa: ASYNC109  # like `ask`
        """Return `n` items, awaited; see `ask`. To be cancelled loses nothing: what had come goes to others."""
        n, deadline = _check_ask(n, timeout)
        turns, task = self._hub.tasks(), asyncio.current_task()
        if self._auto_ack:
            turns.confirm(self._in_task.pop(task, ()))
        chunks: list[Chunk] = []
        turns.ask(0, n)
        try:
            while len(chunks) < n and (more := await turns.take(0, n - len(chunks), deadline)):
                chunks += more
        except BaseException:
            turns.ask(0, len(chunks) - n)
            turns.give_back(0, chunks)
            raise
        if len(chunks) < n:
            turns.ask(0, len(chunks) - n)
        self._in_task[task] = numbers_of(chunks)
        return chunks

    def ack(self, items: Chunk | Iterable[Chunk]) -> None:
        """Say that items are done, for the ``checkpoint``."""
        if self._auto_ack:
            raise UsageError("items are done when whoever got them asks again: ack(...) goes with auto_ack=False")
        turns = self._hub.turns
        if isinstance(turns, (ThreadTurns, AsyncTurns)):
            turns.confirm(numbers_of([items] if isinstance(items, Chunk) else items))

    @property
    def done(self) -> bool:
        """Whether the stream is over and nothing is left to ask for."""
        return self._hub.turns is not None and self._hub.turns.over

    def close(self) -> None:
        """Cancel what is under way; those that wait get what they have, and nothing more comes."""
        self._hub.threads().close()

    async def close_async(self) -> None:
        """Cancel what is under way; see `close`."""
        await self._hub.tasks().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close_async()


def _check_ask(n: Any, timeout: Any) -> tuple[int, float | None]:
    count = as_whole(n)
    if count is None or count < 1:
        raise UsageError(f"ask needs a number of items, at least one, got {n!r}")
    if timeout is None:
        return count, None
    seconds = as_real(timeout)
    if seconds is None or seconds < 0:
        raise UsageError(f"timeout is seconds, at least 0, or None, got {timeout!r}")
    return count, time.monotonic() + seconds


# -- sharing ------------------------------------------------------------------------------------------


class Share:
    """One consumer's part of a run; made by `ChunkStream.share`.

    A loop over it, with ``for`` in a thread of its own or with ``async for`` in a task of its own. To leave the
    loop (`break`, an exception) or to `close` it lets the consumer go: the others get what would have been its,
    and the last one to go ends the run. An iterator that is kept is not left, be it kept by a variable or by the
    traceback of an exception in a generator expression: there, use ``with share:``.

    With a ``checkpoint``, an item is done when the consumer asks for the next one; a broadcast item when all
    have, and not at all if one has left before.

    Attributes
    ----------
    number : int
        Which of the consumers this is, from 0.

    Examples
    --------
    >>> import zarr, zarr_dask_stream as zds
    >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4")
    >>> mine, other = zds.stream_chunks(array, concurrency=1).share(2)
    >>> other.close()  # the first one gets all
    >>> mine.number, [chunk.index for chunk in mine]
    (0, [(0,), (1,), (2,)])
    """

    def __init__(self, hub: _Hub, number: int) -> None:
        self._hub = hub
        self.number = number
        self._left = False
        weakref.finalize(self, hub.let_go, number).atexit = False

    def __iter__(self) -> Iterator[Chunk]:
        turns = self._enter(self._hub.threads())
        finished = False
        try:
            while chunks := turns.take(self.number, 1):
                [chunk] = chunks
                numbers = numbers_of(chunks)
                del chunks
                yield chunk
                del chunk
                turns.confirm(numbers)
            finished = True
        finally:
            self._left = True
            turns.leave(self.number, finished=finished)

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        turns = self._enter(self._hub.tasks())
        finished = False
        try:
            while chunks := await turns.take(self.number, 1):
                [chunk] = chunks
                numbers = numbers_of(chunks)
                del chunks
                yield chunk
                del chunk
                turns.confirm(numbers)
            finished = True
        finally:
            self._left = True
            await turns.leave(self.number, finished=finished)

    def _enter(self, turns: TurnsT) -> TurnsT:
        if self._left:
            raise UsageError(f"consumer {self.number} has left the stream: share the stream anew")
        return turns

    def close(self) -> None:
        """Let this consumer go; closing twice does no harm."""
        self._left = True
        self._hub.threads().leave(self.number, finished=False)

    async def close_async(self) -> None:
        """Let this consumer go; see `close`."""
        self._left = True
        await self._hub.tasks().leave(self.number, finished=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close_async()

    def __repr__(self) -> str:
        return f"Share({self.number} of {self._hub.consumers}, {self._hub.how})"


def share(start: Start, n: Any, how: Any, key: Callable[[Any], Hashable] | None) -> tuple[Share, ...]:
    """Return `n` consumers of one run; see `ChunkStream.share`."""
    count = as_whole(n)
    if count is None or count < 1:
        raise UsageError(f"share needs a number of consumers, at least one, got {n!r}")
    hub = _Hub(start, _dispatch(count, how, key), counted=False)
    return tuple(Share(hub, number) for number in range(count))


def _dispatch(n: int, how: Any, key: Any) -> Dispatch:
    if not (isinstance(how, str) and how in ("demand", "partition", "broadcast")):
        raise UsageError(f'how must be "demand", "partition" or "broadcast", got {how!r}')
    if (key is not None) != (how == "partition"):
        raise UsageError(
            f'key= is a function of the grid index and goes with how="partition", got {key!r} with {how!r}'
        )
    if how == "partition":
        check_function(key, "key", "the grid index")
        return Partition(n, key)
    return Broadcast(n) if how == "broadcast" else OnDemand(n)


# -- feeding ------------------------------------------------------------------------------------------


class Consumer:
    """A consumer that items are handed to; derive from it, and give it to `ChunkStream.feed`.

    At the start it asks for `max_demand` items. They are handed over as they come, at most ``max_demand -
    min_demand`` at a time, and when no more than `min_demand` of what was asked for are still to be handled, it
    asks for more, up to `max_demand` again. So at no time are more than `max_demand` chunks under way for it or
    in its hands.

    Attributes
    ----------
    max_demand : int
        Most items asked for and not handled. Set it on the class or on the object.
    min_demand : int or None
        Ask for more when so many are left; None: half of `max_demand`.
    on_error : {"raise", "skip"}
        What follows when `handle_items` raises: the stream ends with that exception; or `handle_error` is
        called, and it goes on.

    Examples
    --------
    >>> import zarr
    >>> from zarr_dask_stream import stream_chunks
    >>> class Adder(Consumer):
    ...     max_demand = 4
    ...     total = 0
    ...
    ...     def handle_items(self, items):
    ...         self.total += sum(int(chunk.data.sum()) for chunk in items)
    >>> array = zarr.create_array({}, shape=(10,), chunks=(2,), dtype="i4", fill_value=7)
    >>> adder = Adder()
    >>> report = stream_chunks(array, concurrency=1).feed(adder)
    >>> adder.total, report.emitted
    (70, 5)
    """

    max_demand: int = 1000
    min_demand: int | None = None
    on_error: Literal["raise", "skip"] = "raise"

    def handle_items(self, items: list[Chunk]) -> Any:
        """Do what is to be done with items; they are done when this returns.

        A coroutine function will do with `ChunkStream.feed_async`: what it returns is awaited.
        """
        raise NotImplementedError

    def handle_error(self, items: list[Chunk], error: Exception) -> None:
        """Hear that `handle_items` raised, where `on_error` is "skip"; by default, log it.

        For a ``checkpoint`` these items are not done: they come again in the next run.
        """
        logger.warning("%s failed on chunks %s: %r", type(self).__name__, _named(items), error)


def _named(items: Sequence[Chunk]) -> str:
    first = ", ".join(str(chunk.index) for chunk in items[:3])
    return first if len(items) <= 3 else f"{first} and {len(items) - 3} more"


class _Feeding:
    """One consumer's demand, and what is handed to it; see `Consumer`."""

    def __init__(self, consumer: Any, who: int) -> None:
        self.high, self.low = _check_consumer(consumer)
        self.consumer: Consumer = consumer
        self.who = who
        self.outstanding = 0

    def renew(self) -> int:
        """Return how many items to ask for now: none, or as many as fill the demand up."""
        if self.outstanding > self.low:
            return 0
        count, self.outstanding = self.high - self.outstanding, self.high
        return count

    @property
    def most(self) -> int:
        """How many items to hand over at once."""
        return min(self.high - self.low, self.outstanding)

    def failed(self, chunks: list[Chunk], error: Exception) -> None:
        """Tell the consumer, where it wants to go on; else raise."""
        if self.consumer.on_error == "skip":
            self.consumer.handle_error(chunks, error)
            return
        error.add_note(
            f"raised by {type(self.consumer).__name__}.handle_items on chunks {_named(chunks)}; with "
            'on_error = "skip" on the consumer, the stream goes on without them'
        )
        raise error

    def feed(self, turns: ThreadTurns) -> None:
        """Hand items over until there are no more."""
        turns.ask(self.who, self.renew())
        while chunks := turns.take(self.who, self.most):
            try:
                self.consumer.handle_items(chunks)
            except Exception as error:  # noqa: BLE001  # the user's code
                self.failed(chunks, error)
            else:
                turns.confirm(numbers_of(chunks))
            self.outstanding -= len(chunks)
            if count := self.renew():
                turns.ask(self.who, count)
        turns.leave(self.who, finished=True)

    async def feed_async(self, turns: AsyncTurns) -> None:
        """Hand items over until there are no more."""
        turns.ask(self.who, self.renew())
        while chunks := await turns.take(self.who, self.most):
            try:
                answer = self.consumer.handle_items(chunks)
                if isinstance(answer, Awaitable):
                    await answer
            except Exception as error:  # noqa: BLE001  # the user's code
                self.failed(chunks, error)
            else:
                turns.confirm(numbers_of(chunks))
            self.outstanding -= len(chunks)
            if count := self.renew():
                turns.ask(self.who, count)
        await turns.leave(self.who, finished=True)


def _check_consumer(consumer: Any) -> tuple[int, int]:
    if isinstance(consumer, type) or not isinstance(consumer, Consumer):
        raise UsageError(f"feed needs objects of classes derived from zds.Consumer, got {consumer!r}")
    name = type(consumer).__name__
    if type(consumer).handle_items is Consumer.handle_items:
        raise UsageError(f"{name} has no handle_items(items): define what is to be done with items")
    high = as_whole(consumer.max_demand)
    if high is None or high < 1:
        raise UsageError(f"max_demand of {name} is a number of items, at least one, got {consumer.max_demand!r}")
    low = high // 2 if consumer.min_demand is None else as_whole(consumer.min_demand)
    if low is None or not 0 <= low < high:
        raise UsageError(
            f"min_demand of {name} is a number of items from 0 to below max_demand={high}, got {consumer.min_demand!r}"
        )
    if consumer.on_error not in ("raise", "skip"):
        raise UsageError(f'on_error of {name} is "raise" or "skip", got {consumer.on_error!r}')
    return high, low


def _feedings(consumers: Sequence[Any]) -> list[_Feeding]:
    if not consumers:
        raise UsageError("feed needs at least one zds.Consumer")
    return [_Feeding(consumer, who) for who, consumer in enumerate(consumers)]


def feed(start: Start, consumers: Sequence[Any], how: Any, key: Callable[[Any], Hashable] | None) -> None:
    """Feed consumers until the stream is over, the first in this thread; see `ChunkStream.feed`."""
    feedings = _feedings(consumers)
    for feeding in feedings:
        if inspect.iscoroutinefunction(feeding.consumer.handle_items):
            raise UsageError(f"{type(feeding.consumer).__name__}.handle_items is a coroutine function: use feed_async")
    turns = ThreadTurns(start, _dispatch(len(feedings), how, key), counted=True)
    errors: list[BaseException] = []

    def work(feeding: _Feeding) -> None:
        try:
            feeding.feed(turns)
        except BaseException as error:  # noqa: BLE001  # raised below, where the stream was started
            errors.append(error)
            turns.close()

    threads = [
        threading.Thread(target=work, args=(feeding,), name=f"zds-consumer-{feeding.who}", daemon=True)
        for feeding in feedings[1:]
    ]
    try:
        turns.begin()
        for thread in threads:
            thread.start()
        work(feedings[0])
        for thread in threads:
            thread.join()
    finally:
        turns.close()
    if errors:
        raise errors[0]


async def feed_async(start: Start, consumers: Sequence[Any], how: Any, key: Callable[[Any], Hashable] | None) -> None:
    """Feed consumers until the stream is over, each in a task; see `ChunkStream.feed_async`."""
    feedings = _feedings(consumers)
    turns = AsyncTurns(start, _dispatch(len(feedings), how, key), counted=True)
    tasks = [asyncio.ensure_future(feeding.feed_async(turns)) for feeding in feedings]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    except asyncio.CancelledError:
        for task in tasks:
            task.cancel()
        raise
    finally:
        if any(not task.done() or task.exception() for task in tasks if not task.cancelled()):
            await turns.close()  # what is being handled may be finished, and nothing more comes
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        await turns.close()
    for outcome in outcomes:
        if outcome is not None:
            raise outcome
