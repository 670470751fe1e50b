"""Who turns the loop of a run for one consumer: a blocking generator, or an asynchronous one.

The loop waits for nothing and calls no sinks; it yields what it wants done, and is sent what came of it.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.run import Call, Run, Wait

__all__ = ["drive", "drive_async"]


def drive(start: Callable[[], Run]) -> Generator[Any, None, None]:
    """Make a run and yield its items, from a blocking executor."""
    run = start()
    try:
        _check_sinks(run)
        steps = run.steps(run.executor.start())
        reply: Any = None
        while True:
            try:
                step = steps.send(reply)
            except StopIteration:
                break
            if isinstance(step, Wait):
                reply = run.executor.wait(step.seconds)
            elif isinstance(step, Call):
                reply = _call(step)
            else:
                reply = None
                yield step
    except BaseException as error:
        run.failed(error)
        raise
    finally:
        try:
            run.end()
        finally:
            run.executor.close()


async def drive_async(start: Callable[[], Run]) -> AsyncGenerator[Any, None]:
    """Make a run and yield its items, from an event loop that goes on meanwhile."""
    run = start()
    try:
        steps = run.steps(await run.executor.start_async())
        reply: Any = None
        while True:
            try:
                step = steps.send(reply)
            except StopIteration:
                break
            if isinstance(step, Wait):
                reply = await run.executor.wait_async(step.seconds)
            elif isinstance(step, Call):
                reply = await _call_async(step)
            else:
                reply = None
                yield step
    except BaseException as error:
        run.failed(error)
        raise
    finally:
        try:
            run.end()
        finally:
            await run.executor.close_async()


def _check_sinks(run: Run) -> None:
    for name, sink in run.sinks.items():
        if inspect.iscoroutinefunction(sink):
            raise UsageError(f"the sink {name!r} is a coroutine function: iterate the stream with async for")


def _call(call: Call) -> BaseException | None:
    """Call a sink; return what it raised."""
    try:
        call.sink(call.item)
    except Exception as error:  # noqa: BLE001  # whatever it is, it is the outcome of these items
        return error
    return None


async def _call_async(call: Call) -> BaseException | None:
    """Call a sink where the event loop goes on meanwhile; return what it raised."""
    try:
        if inspect.iscoroutinefunction(call.sink):
            await call.sink(call.item)
        else:
            answer = await asyncio.to_thread(call.sink, call.item)
            if inspect.isawaitable(answer):
                await answer
    except Exception as error:  # noqa: BLE001  # as above
        return error
    return None
