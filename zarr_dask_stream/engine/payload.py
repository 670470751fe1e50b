"""A stream's work on its way out: packed once, unpacked once in each worker process, run there as a Dask task."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
from collections.abc import Iterable
from typing import Any

import cloudpickle
import distributed
from dask.delayed import delayed
from distributed.worker import thread_state  # type: ignore[attr-defined]  # it has no public name

from zarr_dask_stream.engine.cluster import in_stage
from zarr_dask_stream.engine.feed import Cargo
from zarr_dask_stream.engine.parcel import pack_result
from zarr_dask_stream.engine.tally import PROCESS
from zarr_dask_stream.engine.task import Work, run_batch, run_guarded
from zarr_dask_stream.errors import ClusterError, UsageError
from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.source.memory import settle_allocator
from zarr_dask_stream.source.selection import ChunkPlan

__all__ = ["delayed_chunks", "pack_work", "package_version", "remote_batch"]

_ANNOUNCE_S = 5.0  # how long a scheduler may take to hear that a suspect begins


_settle_allocator = functools.cache(settle_allocator)  # once in each worker process


@functools.lru_cache(maxsize=32)
def _unpack(payload: bytes) -> Work:
    work = cloudpickle.loads(payload)
    assert isinstance(work, Work)
    return work


class _ByName:
    """A function of this module that is found only when it is called.

    It travels by value: a worker that can't unpack a task for want of a package dies of it, and the next
    one too. This one can be unpacked everywhere, on the scheduler as well, and fails politely. It is pickled
    once, not for each task: cloudpickle looks through all modules that are loaded.
    """

    def __init__(self, function: str) -> None:
        module = __name__

        def call(*args: Any) -> Any:
            return getattr(importlib.import_module(module), function)(*args)

        self.__name__ = function
        self._call = call
        self._packed: bytes = cloudpickle.dumps(call)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return cloudpickle.loads, (self._packed,)

    def __dask_tokenize__(self) -> tuple[str, str]:
        return __name__, self.__name__


@functools.cache
def _by_name(function: str) -> _ByName:
    return _ByName(function)


def remote_batch() -> Any:
    """Return the delayed function ``(payload, ranges, version, topic="", cargo=None)`` that runs one batch on a worker.

    Where there is a `topic`, it says there that it begins, before it does. `cargo` are data that no store has.
    """
    return delayed(_by_name("_run_on_worker"), pure=False)


def _run_on_worker(
    payload: bytes, ranges: tuple[range, ...], version: str, topic: str = "", cargo: Cargo | None = None
) -> Any:
    """Run one batch as a Dask task; the only thing of ours that Dask ever calls."""
    here = package_version()
    worker = distributed.get_worker()
    if version != here:
        raise ClusterError(
            f"worker {worker.address} has zarr_dask_stream {here}, the client has {version}: "
            "install the same version on both"
        )
    key: Any = getattr(thread_state, "key", None)
    tasks = worker.state.tasks
    if topic:
        _announce(worker, topic, key)
    inside = worker.address.startswith("inproc://")
    if not inside:
        _settle_allocator()

    def cancelled() -> bool:
        task = tasks.get(key)
        return task is None or task.state not in ("executing", "long-running")

    in_stage.set(True)
    try:
        result = run_guarded(_unpack(payload), ranges, worker=worker.address, cancelled=cancelled, cargo=cargo)
    finally:
        in_stage.set(False)
    PROCESS.add(result)
    return result if inside else pack_result(result)


def _announce(worker: Any, topic: str, key: Any) -> None:
    """Say that a task begins, and wait until the scheduler knows: this process may be about to die."""
    word = worker.scheduler.log_event(topic=topic, msg={"key": key, "worker": worker.address})
    with contextlib.suppress(Exception):  # then nobody is blamed for a death
        asyncio.run_coroutine_threadsafe(word, worker.loop.asyncio_loop).result(_ANNOUNCE_S)


@functools.cache
def package_version() -> str:
    """Version of this package in this process."""
    try:
        return importlib.metadata.version("zarr-dask-stream")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _read_one(payload: bytes, number: int) -> Chunk:
    """Read one chunk for `delayed_chunks`; failures are raised."""
    work = _unpack(payload)
    result = run_batch(work, (range(number, number + 1),))
    if result.failures:
        failure = result.failures[0]
        raise failure.error or RuntimeError(f"{failure.error_type}: {failure.message}")
    if not result.numbers:
        return Chunk.planned(work.plan(), number, None, missing=bool(result.skipped))
    return Chunk.planned(work.plan(), number, result.values[0], missing=bool(result.missing))


class _Held(bytes):
    """Pickled work of tasks that may outlive their stream: in this process they hold the store that it names."""

    work: Work

    def __reduce__(self) -> tuple[Any, ...]:
        return bytes, (bytes(self),)


def delayed_chunks(work: Work, plan: ChunkPlan) -> Iterable[Any]:
    """Yield one ``dask.delayed`` for each planned chunk, for people who compose their own graphs."""
    payload = _Held(pack_work(work))
    payload.work = work
    token = hashlib.blake2b(payload, digest_size=8).hexdigest()
    read = delayed(_by_name("_read_one"), pure=False)
    for number in plan:
        index = "-".join(map(str, plan.grid.index(number))) or "0"
        yield read(payload, number, dask_key_name=f"zds-chunk-{token}-{index}")


def pack_work(work: Work) -> bytes:
    """Pickle the work, or say which of the user's functions refuses."""
    try:
        return bytes(cloudpickle.dumps(work))
    except Exception as error:
        parts = [*work.stages, *([work.fold] if work.fold else []), work.retry]
        for part in parts:
            try:
                cloudpickle.dumps(part)
            except Exception as cause:
                raise UsageError(
                    f"{type(part).__name__.lower()}: its function can't be sent to the workers "
                    f"({type(cause).__name__}: {cause}). Functions travel by pickle: create locks, files "
                    "and connections inside the function instead of closing over them"
                ) from cause
        raise UsageError(f"the stream can't be sent to the workers: {error}") from error
