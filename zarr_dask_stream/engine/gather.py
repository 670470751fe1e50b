"""Results on their way to the client: asked of the workers that hold them, or else of the scheduler."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import distributed
from distributed.utils_comm import gather_from_workers

from zarr_dask_stream.engine.events import BatchDone, BatchLost, Input
from zarr_dask_stream.engine.parcel import Parcel, unpack_result
from zarr_dask_stream.errors import ClusterError, ZdsError

__all__ = ["Arrived", "Gatherer", "soon", "unpack_inputs"]

_QUESTIONS = 5  # so often workers are asked for results, when each time one of them dies meanwhile
_REACH_S = 3.0  # how long a worker may take to answer a client that asks whether it can be reached


@dataclass(frozen=True, slots=True)
class Arrived:
    """A `BatchDone` with its result still packed."""

    batch: int
    parcel: Parcel
    transfer_s: float


def unpack_inputs(inputs: list[Input | Arrived]) -> list[Input]:
    """Unpack results in the caller's thread.

    Not on the event loop, where it would hold up messages. And not below a frame that knows futures: an
    exception among the results is given the frames it is unpacked in, and would keep them alive.
    """
    inputs.reverse()
    unpacked: list[Input] = []
    while inputs:
        event = inputs.pop()
        if isinstance(event, Arrived):
            event = BatchDone(event.batch, unpack_result(event.parcel), event.transfer_s)
        unpacked.append(event)
    return unpacked


class Gatherer:
    """Brings the results of finished tasks home. All of it runs on the client's event loop.

    Parameters
    ----------
    client : distributed.Client
        Whose tasks they are.
    cause : callable
        ``await cause(worker)``: of what a worker died, "" where nobody knows.
    """

    def __init__(self, client: distributed.Client, cause: Callable[[str], Awaitable[str]]) -> None:
        self._client: Any = client
        self._cause = cause
        self._direct: bool | None = None
        self._questions: set[asyncio.Task[dict[Any, Any]]] = set()
        self._interrupted: set[asyncio.Task[dict[Any, Any]]] = set()

    def interrupt(self) -> None:
        """Ask again what is being asked: a worker that may have been asked has died."""
        for question in list(self._questions):
            self._interrupted.add(question)
            question.cancel()

    async def fetch(
        self, futures: dict[int, distributed.Future[Any]]
    ) -> tuple[list[Input | Arrived], dict[int, distributed.Future[Any]]]:
        """Ask the workers, where they can be reached; return what came, and what is left for the scheduler."""
        if self._direct is None:
            self._direct = await self._can_reach_workers()
        inputs: list[Input | Arrived] = []
        finished = {}
        for batch, future in futures.items():
            if future.status == "finished":
                finished[batch] = future
            else:
                inputs.append(await self._judge(batch, future))
        begin = time.monotonic()
        results = await self._from_workers(finished) if finished and self._direct else {}
        spent = (time.monotonic() - begin) / max(len(results), 1)
        inputs += [_arrival(batch, result, spent) for batch, result in results.items()]
        return inputs, {batch: future for batch, future in finished.items() if batch not in results}

    async def _from_workers(self, futures: dict[int, distributed.Future[Any]]) -> dict[int, Any]:
        """Ask the workers that hold results; what is not there any more is left out.

        A worker that dies in the middle would be waited for until its connection times out, half a minute
        later. Its death interrupts the question instead, and the others are asked again.
        """
        batches: dict[Any, int] = {future.key: batch for batch, future in futures.items()}
        for _ in range(_QUESTIONS):
            question = asyncio.ensure_future(self._ask(list(batches)))
            self._questions.add(question)
            try:
                return {batches[key]: result for key, result in (await question).items()}
            except asyncio.CancelledError:
                if question not in self._interrupted:
                    raise
            except Exception:  # noqa: BLE001  # whatever it was, there is a second way
                break
            finally:
                self._questions.discard(question)
                self._interrupted.discard(question)
        return {}

    async def _ask(self, keys: list[Any]) -> dict[Any, Any]:
        who_has = await self._client.scheduler.who_has(keys=keys)
        held = {key: workers for key, workers in who_has.items() if workers}
        data: dict[Any, Any] = {}
        if held:
            data, *_ = await gather_from_workers(held, rpc=self._client.rpc)
        return data

    async def through_scheduler(self, futures: dict[int, distributed.Future[Any]]) -> list[Input | Arrived]:
        """Have the scheduler bring results; one that was lost with its worker is made again first."""
        begin = time.monotonic()
        try:
            results = await soon(self._client.gather(list(futures.values()), direct=False, asynchronous=True))
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  # a result that was lost on its way is read again
            why = f"its result was lost on the way: {error}"
            return [
                await self._judge(batch, future) if future.status == "error" else BatchLost(batch, why, None, 0)
                for batch, future in futures.items()
            ]
        spent = (time.monotonic() - begin) / len(futures)
        return [_arrival(batch, result, spent) for batch, result in zip(futures, results, strict=True)]

    async def _judge(self, batch: int, future: distributed.Future[Any]) -> Input:
        """Say why a task has no result."""
        if future.status != "error":
            return BatchLost(batch, "the task was called back from outside this stream", None, 0)
        error = await soon(future.exception())
        if isinstance(error, distributed.KilledWorker):
            worker = str(getattr(error.last_worker, "address", error.last_worker))
            return BatchLost(batch, _killed_message(error, worker, await self._cause(worker)), error, worker=worker)
        if isinstance(error, ZdsError):
            raise error
        if _lacks_package(error):
            raise ClusterError(
                "zarr_dask_stream is not installed on the workers. Install it in their environment (pip install "
                "zarr-dask-stream on each host or in the image), or let Dask do it: "
                "client.register_plugin(distributed.PipInstall(['zarr-dask-stream']))"
            ) from error
        raise ClusterError(
            f"a worker could not run a batch ({type(error).__name__}: {error}). Client and workers need the "
            "same versions of Python, dask and zarr_dask_stream, and the modules your functions come from"
        ) from error

    async def _can_reach_workers(self) -> bool:
        try:
            info = await asyncio.wait_for(self._client.scheduler.identity(), _REACH_S)
            address = next(iter(info["workers"]))
            await asyncio.wait_for(self._client.rpc(address).identity(), _REACH_S)
        except Exception:  # noqa: BLE001  # any trouble on the way is a no
            return False
        return True


def _arrival(batch: int, result: Any, spent: float) -> Input | Arrived:
    return (Arrived if isinstance(result, Parcel) else BatchDone)(batch, result, spent)


def _lacks_package(error: BaseException | None) -> bool:
    """Whether an error or one of its causes is that this package can't be imported."""
    while error is not None:
        if isinstance(error, ImportError) and (error.name or "").split(".")[0] == "zarr_dask_stream":
            return True
        error = error.__cause__ or error.__context__
    return False


def _killed_message(error: distributed.KilledWorker, worker: str, cause: str) -> str:
    deaths = error.allowed_failures + 1
    who = f"worker {worker} died" if deaths == 1 else f"{deaths} workers died while they had it, the last was {worker}"
    return f"{who}: {cause}" if cause else who


async def soon(value: Any) -> Any:
    """Await what a Dask method returns on its own event loop (a few return plain values there)."""
    return await value if isinstance(value, Awaitable) else value
