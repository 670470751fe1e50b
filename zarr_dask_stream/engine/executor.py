"""Where batches run: in the calling thread, or on a Dask cluster. Only this module knows Dask.

An executor takes batches and gives back inputs for the supervisor. It decides nothing: a worker that
died is a `BatchLost`, and what follows from that is decided in ``supervisor.py``. It raises
`ClusterError` for what no decision can mend: a scheduler that is gone, a package that is not there.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import operator
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Container, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import cloudpickle
import dask
import distributed
from dask.delayed import delayed
from dask.utils import parse_bytes
from distributed.comm.core import connect
from distributed.deploy.spec import close_clusters
from distributed.system import MEMORY_LIMIT
from distributed.utils_comm import gather_from_workers
from distributed.worker import thread_state  # type: ignore[attr-defined]  # it has no public name

from zarr_dask_stream.engine.events import (
    Batch,
    BatchDone,
    BatchLost,
    Input,
    Threads,
    Tick,
)
from zarr_dask_stream.engine.parcel import Parcel, pack_result, unpack_result
from zarr_dask_stream.engine.task import Work, run_batch, run_guarded
from zarr_dask_stream.errors import ClusterError, UsageError, ZdsError
from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.source.selection import ChunkPlan

__all__ = [
    "DaskExecutor",
    "Executor",
    "SerialExecutor",
    "check_client",
    "choose_executor",
    "connected",
    "delayed_chunks",
    "embedded_cluster",
    "in_dask_task",
    "leave_cluster_alone",
    "memory_budget",
]

T = TypeVar("T")

_POLL_S = 1.0  # how often the size of the cluster is asked for
_NO_WORKERS_S = 3.0  # how long a cluster may have no worker before we say so
_CONNECT_S = 10.0  # how long a scheduler may take to answer for the first time
_RECONNECT_S = 30.0  # how long a lost scheduler may take to come back
_SILENT_S = 120.0  # how long a scheduler may leave a question unanswered while the connection stands
_GOODBYE_S = 5.0  # how long the last message to a scheduler may take
_QUESTIONS = 5  # so often workers are asked for results, when each time one of them dies meanwhile
_NOWHERE = ""  # what a suspect is bound to while there is no worker
_INLINE_BYTES = 256 * 1024  # a larger description of the work travels once per worker, not per task


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

    def __init__(self, work: Work) -> None:
        self._work = work
        self._queue: deque[Batch] = deque()

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
            time.sleep(seconds or 0.0)
            return [Tick()]
        batch = self._queue.popleft()
        return [BatchDone(batch.id, run_batch(self._work, batch.ranges, worker="this process"))]

    async def wait_async(self, seconds: float | None) -> list[Input]:
        """Run one batch in another thread, so that the event loop goes on."""
        if not self._queue:
            await asyncio.sleep(seconds or 0.0)
            return [Tick()]
        return await asyncio.to_thread(self.wait, seconds)

    def close(self) -> None:
        """Forget what is queued."""
        self._queue.clear()

    async def close_async(self) -> None:
        """Forget what is queued."""
        self.close()


def memory_budget(amount: int | str) -> int:
    """Turn bytes, a size such as "512 MiB" or a share such as "10%" of this host's memory into bytes.

    The host's memory is what the container or the kernel allows this process, whichever is less.

    Raises
    ------
    UsageError
        If it is none of these, or not positive.

    Examples
    --------
    >>> memory_budget("512 MiB") == memory_budget(512 * 2**20) == 536870912
    True
    """
    expected = f'max_bytes is bytes, a size such as "512 MiB" or a share such as "10%", got {amount!r}'
    try:
        if isinstance(amount, str) and amount.strip().endswith("%"):
            nbytes = int(float(amount.strip()[:-1]) / 100 * MEMORY_LIMIT)
        elif isinstance(amount, str):
            nbytes = int(parse_bytes(amount))
        elif isinstance(amount, bool):
            raise UsageError(expected)
        else:
            nbytes = operator.index(amount)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(expected) from None
    if nbytes < 1:
        raise UsageError(f"{expected}: it must be at least one byte")
    return nbytes


# -- on the worker ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def _unpack(payload: bytes) -> Work:
    work = cloudpickle.loads(payload)
    assert isinstance(work, Work)
    return work


def _by_name(function: str) -> Callable[..., Any]:
    """Return a function that finds one of this module only when it is called.

    It travels by value: a worker that can't unpack a task for want of a package dies of it, and the next
    one too. This one can be unpacked everywhere, on the scheduler as well, and fails politely.
    """
    module = __name__

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*args)

    return call


def _run_on_worker(payload: bytes, ranges: tuple[range, ...], version: str) -> Any:
    """Run one batch as a Dask task; the only thing of ours that Dask ever calls."""
    here = _version()
    worker = distributed.get_worker()
    if version != here:
        raise ClusterError(
            f"worker {worker.address} has zarr_dask_stream {here}, the client has {version}: "
            "install the same version on both"
        )
    key: Any = getattr(thread_state, "key", None)
    tasks = worker.state.tasks

    def cancelled() -> bool:
        task = tasks.get(key)
        return task is None or task.state not in ("executing", "long-running")

    result = run_guarded(_unpack(payload), ranges, worker=worker.address, cancelled=cancelled)
    return result if worker.address.startswith("inproc://") else pack_result(result)


@dataclass(frozen=True, slots=True)
class _Arrived:
    """A `BatchDone` with its result still packed."""

    batch: int
    parcel: Parcel
    transfer_s: float


def _unpack_inputs(inputs: list[Input | _Arrived]) -> list[Input]:
    """Unpack results in the caller's thread.

    Not on the event loop, where it would hold up messages. And not below a frame that knows futures: an
    exception among the results is given the frames it is unpacked in, and would keep them alive.
    """
    inputs.reverse()
    unpacked: list[Input] = []
    while inputs:
        event = inputs.pop()
        if isinstance(event, _Arrived):
            event = BatchDone(event.batch, unpack_result(event.parcel), event.transfer_s)
        unpacked.append(event)
    return unpacked


@functools.cache
def _version() -> str:
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


def delayed_chunks(work: Work, plan: ChunkPlan) -> Iterable[Any]:
    """Yield one ``dask.delayed`` for each planned chunk, for people who compose their own graphs."""
    payload = _pack_work(work)
    token = hashlib.blake2b(payload, digest_size=8).hexdigest()
    read = delayed(_by_name("_read_one"), pure=False)
    for number in plan:
        index = "-".join(map(str, plan.grid.index(number))) or "0"
        yield read(payload, number, dask_key_name=f"zds-chunk-{token}-{index}")


def _pack_work(work: Work) -> bytes:
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


# -- clusters and clients -----------------------------------------------------------------------------


def in_dask_task() -> bool:
    """Whether the calling thread is running a Dask task."""
    return getattr(thread_state, "key", None) is not None


def _active_client() -> distributed.Client | None:
    """Return the client that a plain ``dask.compute`` would use here, or None."""
    if in_dask_task():
        client: distributed.Client = distributed.get_client()
        return client
    try:
        client = distributed.default_client()
    except ValueError:
        return None
    return client


def check_client(client: Any) -> None:
    """Raise UsageError unless `client` is a running ``distributed.Client`` or None."""
    if client is None:
        return
    if not isinstance(client, distributed.Client):
        raise UsageError(
            f"client must be a distributed.Client, got {type(client).__name__}; "
            "for an address use distributed.Client(address)"
        )
    if client.status in ("closed", "closing"):
        raise UsageError("the client is closed: make a new distributed.Client")


def choose_executor(work: Work, client: distributed.Client | None, *, serial: bool) -> Executor:
    """Choose where a run takes place.

    The client given; else the active one; else this thread where `serial` allows it; else a cluster
    inside this process, for this run only.
    """
    check_client(client)
    client = client or _active_client()
    if client is not None:
        return DaskExecutor(client, work)
    if serial:
        return SerialExecutor(work)
    return DaskExecutor(embedded_cluster(), work, own_cluster=True)


def embedded_cluster(threads: int | None = None, processes: int = 0) -> distributed.Client:
    """Start a cluster on this host; whoever asked for it closes the client and its ``.cluster``.

    Parameters
    ----------
    threads : int, optional
        Task threads; as many as there are processors by default.
    processes : int
        0: one worker inside this process. Otherwise so many worker processes.
    """
    threads = threads or dask.system.CPU_COUNT
    cluster = distributed.LocalCluster(
        n_workers=processes or 1,
        threads_per_worker=max(threads // processes, 1) if processes else threads,
        processes=bool(processes),
        dashboard_address="127.0.0.1:0",
        scheduler_kwargs={"dashboard": False},
        # A worker inside this process would count all of this process's memory as its own and pause.
        memory_limit="auto" if processes else None,
    )
    return distributed.Client(cluster, set_as_default=False)


@contextmanager
def connected(address: str | None = None, processes: int = 0) -> Iterator[distributed.Client | None]:
    """Lend a client of the scheduler at `address`, or of a cluster of so many processes on this host.

    With neither, lend None: a stream then finds or starts a cluster by itself. What was started here is
    ended with the block.

    Raises
    ------
    ClusterError
        If no scheduler answers at `address` within ten seconds.
    """
    if address:
        try:
            asyncio.run(_knock(address))
        except (OSError, ValueError, TypeError) as error:
            raise ClusterError(
                f"no Dask scheduler answers at {address} ({error}); expected an address such as tcp://host:8786"
            ) from error
        with distributed.Client(address, timeout=_CONNECT_S, set_as_default=False) as client:
            yield client
    elif processes:
        client = embedded_cluster(processes=processes)
        try:
            yield client
        finally:
            _close_cluster(client)
    else:
        yield None


def leave_cluster_alone() -> None:
    """Let Dask not close clusters when Python ends: one that was interrupted while it started can't be."""
    atexit.unregister(close_clusters)


async def _knock(address: str) -> None:
    """Connect and leave again: a Client that finds nobody takes half a minute to be rid of."""
    security = distributed.Security().get_connection_args("client")
    comm = await connect(address, timeout=_CONNECT_S, **security)
    await comm.close()


class _Obituaries:
    """Hears of workers that died, through one subscription for each client, and tells its streams.

    A client has one handler for each topic: an earlier one of the user's is still called.
    """

    _known: ClassVar[WeakKeyDictionary[Any, _Obituaries]] = WeakKeyDictionary()

    def __init__(self, client: Any) -> None:
        self.listeners: WeakSet[DaskExecutor] = WeakSet()
        self.earlier = client._event_handlers.get("all")  # noqa: SLF001  # there is no public way to ask
        client.subscribe_topic("all", self._hear)

    @classmethod
    def tell(cls, client: Any, listener: DaskExecutor) -> None:
        """Begin to tell a stream; to be called on the client's event loop."""
        known = cls._known.get(client)
        if known is None:
            known = cls._known[client] = cls(client)
        known.listeners.add(listener)

    @classmethod
    def forget(cls, client: Any, listener: DaskExecutor) -> None:
        """Tell a stream no longer; with the last one the subscription ends, as it would outlive the client."""
        known = cls._known.get(client)
        if known is None:
            return
        known.listeners.discard(listener)
        if not known.listeners:
            del cls._known[client]
            if known.earlier is not None:
                client.subscribe_topic("all", known.earlier)
            else:
                client.unsubscribe_topic("all")
                # Dask leaves the handler in place, and the next one would take it for the user's.
                client._event_handlers.pop("all", None)  # noqa: SLF001  # there is no public way

    def _hear(self, event: tuple[float, Any]) -> Any:
        message = event[1]
        if isinstance(message, dict) and message.get("action") == "remove-worker":
            keys = frozenset(message.get("processing-tasks") or ())
            for listener in list(self.listeners):
                listener.worker_removed(message["worker"], keys, expected=bool(message.get("expected")))
        return self.earlier(event) if self.earlier is not None else None


class DaskExecutor:
    """Runs batches as ``dask.delayed`` tasks and collects them through ``as_completed``.

    Parameters
    ----------
    client : distributed.Client
        Whose cluster to use.
    work : Work
        The stream; pickled once.
    own_cluster : bool
        Close the client and its cluster at the end.
    """

    def __init__(self, client: distributed.Client, work: Work, *, own_cluster: bool = False) -> None:
        self._client: Any = client
        self._address = "?" if client.scheduler is None else client.scheduler.address
        self._own_cluster = own_cluster
        self._payload = _pack_work(work)
        self._shared: distributed.Future[Any] | None = None
        self._workers: tuple[str, ...] = ()
        self._suspects: deque[Batch] = deque()
        self._bound: dict[str, int] = {}
        self._questions: set[asyncio.Task[dict[Any, Any]]] = set()
        self._interrupted: set[asyncio.Task[dict[Any, Any]]] = set()
        self._farewells: deque[asyncio.Task[None]] = deque(maxlen=64)
        self._run = uuid.uuid4().hex[:8]
        self._task = delayed(_by_name("_run_on_worker"), pure=False)
        self._futures: dict[int, distributed.Future[Any]] = {}
        self._batch_of: dict[str, int] = {}
        self._completed = distributed.as_completed(loop=client.loop)
        self._next: asyncio.Task[Any] | None = None
        self._gathers: set[asyncio.Task[list[Input | _Arrived]]] = set()
        self._inputs: list[Input | _Arrived] = []
        self._collecting: asyncio.Task[Any] | None = None
        self._polling: asyncio.Task[None] | None = None
        self._direct: bool | None = None
        self._threads = Threads(0, 0)
        self._polled_at = 0.0
        self._empty_since: float | None = None
        self._lost_since: float | None = None
        self._seceded = False

    # -- from either side ---------------------------------------------------------------------------

    def start(self) -> Threads:
        """Ask for the size of the cluster."""
        if in_dask_task():
            distributed.secede()
            self._seceded = True
        return self._sync(self._start)

    async def start_async(self) -> Threads:
        """Ask for the size of the cluster."""
        return await self._async(self._start())

    def submit(self, batches: tuple[Batch, ...]) -> None:
        """Make tasks of batches; suspects wait for a worker that has no other suspect."""
        self._suspects.extend(batch for batch in batches if batch.suspect)
        self._send([batch for batch in batches if not batch.suspect])
        self._send_suspects()

    def _send_suspects(self) -> None:
        """Bind each waiting suspect to a worker of its own: if that dies, it was this batch or bad luck."""
        # Where there is no worker at all, one suspect goes out unbound: an adaptive cluster starts workers for
        # tasks it can see.
        for worker in self._workers or (_NOWHERE,):
            if not self._suspects:
                return
            if worker not in self._bound:
                batch = self._suspects.popleft()
                self._bound[worker] = batch.id
                self._send([batch], worker or None)

    def _send(self, batches: list[Batch], worker: str | None = None) -> None:
        """Make one delayed task of each batch and compute them, on one worker or wherever Dask likes.

        Dask runs those first that were sent first, and of those sent together the first by name. No
        priority is given: numbers that grow along a stream would let each new one overtake all older ones.
        """
        if not batches:
            return
        self._check_open()
        version = _version()
        place = {} if worker is None else {"workers": [worker], "allow_other_workers": False}
        try:
            payload = self._work_to_send()
            tasks = []
            for batch in batches:
                key = f"zds-read-{self._run}-{batch.id:09d}-a{batch.attempt}"
                tasks.append(self._task(payload, batch.ranges, version, dask_key_name=key))
                self._batch_of[key] = batch.id
            futures = self._client.compute(tasks, optimize_graph=False, fifo_timeout="0s", **place)
        except Exception as error:
            raise self._cluster_error(f"could not send tasks: {error}") from error
        for batch, future in zip(batches, futures, strict=True):
            self._futures[batch.id] = future
            self._completed.add(future)

    def _work_to_send(self) -> Any:
        """Return the packed work, or where it is large a future of it: then it travels once to each worker.

        The future is that of a task, not of scattered data, so that Dask can make it anew on the next
        worker when those that held it are gone. One that was cancelled from outside is replaced.
        """
        if len(self._payload) <= _INLINE_BYTES:
            return self._payload
        if self._shared is None or self._shared.status not in ("pending", "finished"):
            key = f"zds-work-{self._run}-{uuid.uuid4().hex[:8]}"
            held = delayed(bytes, pure=False)(self._payload, dask_key_name=key)
            # Dask would warn of its size and advise to do what is done here.
            with dask.config.set({"distributed.admin.large-graph-warning-threshold": 4 * len(self._payload)}):
                self._shared = self._client.compute(held, optimize_graph=False, fifo_timeout="0s")
        return self._shared

    def cancel(self, batches: tuple[int, ...]) -> None:
        """Call batches back; the workers stop between two chunks."""
        self._suspects = deque(batch for batch in self._suspects if batch.id not in batches)
        self._unbind(batches)
        futures = [self._futures.pop(batch) for batch in batches if batch in self._futures]
        if futures and self._alive:
            self._client.loop.add_callback(self._call_back, futures)

    def restart(self, worker: str) -> None:
        """Have a worker's nanny restart it; its other tasks run again elsewhere."""
        if self._alive and not worker.startswith("inproc://"):
            self._client.loop.add_callback(self._restart, worker)

    def wait(self, seconds: float | None) -> list[Input]:
        """Wait for tasks, for so many seconds at most."""
        self._send_suspects()
        return _unpack_inputs(self._sync(self._collect, seconds))

    async def wait_async(self, seconds: float | None) -> list[Input]:
        """Wait for tasks, for so many seconds at most."""
        self._send_suspects()
        return _unpack_inputs(await self._async(self._collect(seconds)))

    def close(self) -> None:
        """Call everything back; close what was started for this run."""
        try:
            if self._alive:
                self._sync(self._close)
        finally:
            if self._own_cluster:
                cluster = self._client.cluster
                self._client.close()
                cluster.close()
            if self._seceded:
                self._seceded = False
                distributed.rejoin()

    async def close_async(self) -> None:
        """Call everything back; close what was started for this run."""
        try:
            if self._alive:
                await self._async(self._close())
        finally:
            if self._own_cluster:
                self._own_cluster = False
                await asyncio.to_thread(_close_cluster, self._client)

    # -- two ways to the client's event loop ----------------------------------------------------------

    @property
    def _alive(self) -> bool:
        return self._client.status not in ("closed", "closing")

    def _check_open(self) -> None:
        if not self._alive:
            raise self._cluster_error("the client was closed while the stream ran, or gave its scheduler up")

    def _sync(self, coroutine: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        if self._client.asynchronous:
            raise UsageError(
                "the client is asynchronous: use `async for chunk in stream`, or give a client made with "
                "asynchronous=False"
            )
        self._check_open()
        result: T = self._client.sync(coroutine, *args)
        return result

    async def _async(self, coroutine: Coroutine[Any, Any, T]) -> T:
        loop = self._client.loop.asyncio_loop
        if loop is asyncio.get_running_loop():
            return await coroutine
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, loop))

    # -- on the client's event loop -------------------------------------------------------------------

    async def _start(self) -> Threads:
        if not self._own_cluster:  # the worker inside this process does not die before it
            _Obituaries.tell(self._client, self)
        # In a task of its own: this may be the caller's task, and what is awaited in there (`wait_for` before
        # Python 3.12) can swallow its cancellation. `wait` does not.
        self._polling = asyncio.ensure_future(self._poll())
        await asyncio.wait({self._polling})
        polled, self._polling = self._polling, None
        polled.result()
        self._inputs.clear()
        return self._threads

    async def _collect(self, seconds: float | None) -> list[Input | _Arrived]:
        # Only while it waits here may `close` cancel this task: with an asynchronous client it is the caller's own.
        self._collecting = asyncio.current_task()
        try:
            await self._collect_until(None if seconds is None else time.monotonic() + seconds)
        finally:
            self._collecting = None
        inputs, self._inputs = self._inputs, []
        return inputs or [Tick()]

    async def _collect_until(self, end: float | None) -> None:
        while not self._inputs:
            left = _POLL_S if end is None else min(end - time.monotonic(), _POLL_S)
            if left <= 0:
                return
            await self._wait_for_something(left)
            self._check_alive()
            due = time.monotonic() - self._polled_at > _POLL_S
            if due and self._polling is None and self._lost_since is None:
                self._polling = asyncio.ensure_future(self._poll())

    async def _wait_for_something(self, seconds: float) -> None:
        waiters: set[asyncio.Task[Any]] = set(self._gathers)
        if self._next is None and not self._completed.is_empty():
            self._next = asyncio.ensure_future(self._completed.__anext__())
        waiters.update(task for task in (self._next, self._polling) if task is not None)
        if not waiters:
            await asyncio.sleep(seconds)
            return
        done, _ = await asyncio.wait(waiters, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if self._polling in done:
            polled, self._polling = self._polling, None
            polled.result()
        if self._next in done:
            self._take_completed()
        for gather in self._gathers & done:
            self._gathers.discard(gather)
            self._inputs += gather.result()

    def _take_completed(self) -> None:
        assert self._next is not None
        finished, self._next = self._next, None
        if finished.cancelled() or finished.exception() is not None:
            return  # StopAsyncIteration: nothing is out at the moment
        futures = [finished.result(), *self._completed.next_batch(block=False)]
        # Those that are not known any more were called back.
        known = {future: self._batch_of.pop(future.key, None) for future in futures}
        mine = {batch: future for future, batch in known.items() if batch in self._futures and batch is not None}
        if mine:
            self._gathers.add(asyncio.ensure_future(self._fetch(mine)))

    async def _fetch(self, futures: dict[int, distributed.Future[Any]]) -> list[Input | _Arrived]:
        """Bring results home, directly from the workers where they can be reached."""
        if self._direct is None:
            self._direct = await self._can_reach_workers()
        inputs: list[Input | _Arrived] = []
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
        rest = {batch: future for batch, future in finished.items() if batch not in results}
        if rest:  # on its own: what is here already should not wait for it
            self._gathers.add(asyncio.ensure_future(self._through_scheduler(rest)))
        self._forget(batch for batch in futures if batch not in rest)
        return inputs

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

    async def _through_scheduler(self, futures: dict[int, distributed.Future[Any]]) -> list[Input | _Arrived]:
        """Have the scheduler bring results; one that was lost with its worker is made again first."""
        begin = time.monotonic()
        inputs: list[Input | _Arrived]
        try:
            results = await _soon(self._client.gather(list(futures.values()), direct=False, asynchronous=True))
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  # a result that was lost on its way is read again
            why = f"its result was lost on the way: {error}"
            inputs = [
                await self._judge(batch, future) if future.status == "error" else BatchLost(batch, why, None, 0)
                for batch, future in futures.items()
            ]
        else:
            spent = (time.monotonic() - begin) / len(futures)
            inputs = [_arrival(batch, result, spent) for batch, result in zip(futures, results, strict=True)]
        self._forget(futures)
        return inputs

    def _forget(self, batches: Iterable[int]) -> None:
        gone = set(batches)
        for batch in gone:
            self._futures.pop(batch, None)
        self._unbind(gone)

    async def _judge(self, batch: int, future: distributed.Future[Any]) -> Input:
        """Say why a task has no result."""
        if future.status != "error":
            return BatchLost(batch, "the task was called back from outside this stream", None, 0)
        error = await _soon(future.exception())
        if isinstance(error, distributed.KilledWorker):
            return BatchLost(batch, _killed_message(error), error)
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
            info = await asyncio.wait_for(self._client.scheduler.identity(), _NO_WORKERS_S)
            address = next(iter(info["workers"]))
            await asyncio.wait_for(self._client.rpc(address).identity(), _NO_WORKERS_S)
        except Exception:  # noqa: BLE001  # any trouble on the way is a no
            return False
        return True

    # -- the cluster --------------------------------------------------------------------------------

    async def _poll(self) -> None:
        self._polled_at = now = time.monotonic()
        try:
            ncores = await asyncio.wait_for(self._client.scheduler.ncores(), _SILENT_S)
        except TimeoutError as error:
            raise self._cluster_error(f"the scheduler has not answered for {_SILENT_S:.0f} s") from error
        except (OSError, AttributeError):
            return  # `_check_alive` has the say on a connection that is gone
        workers, threads = len(ncores), sum(ncores.values())
        self._workers = tuple(ncores)
        for worker in [worker for worker in self._bound if worker and worker not in ncores]:
            self.worker_removed(worker, frozenset(), expected=True)  # it was gone before its suspect began
        if workers:
            self._empty_since = None
        elif self._empty_since is None:
            self._empty_since = now
        waiting = 0.0 if self._empty_since is None else now - self._empty_since
        current = Threads(threads, workers, waiting if waiting > _NO_WORKERS_S else 0.0)
        if current != self._threads:
            self._threads = current
            self._inputs.append(current)

    def _unbind(self, batches: Iterable[int]) -> None:
        gone = set(batches)
        for worker in [worker for worker, batch in list(self._bound.items()) if batch in gone]:
            self._bound.pop(worker, None)

    def worker_removed(self, worker: str, keys: Container[str], *, expected: bool) -> None:
        """Hear that a worker is gone, and take its batches back before Dask lets them meet another one.

        Dask would run them again by itself, at once and under the same name, three more times: a chunk that
        kills its worker would cost four. A worker that was told to leave is left to Dask.
        """
        bound = self._bound.pop(worker, None)
        self._workers = tuple(known for known in self._workers if known != worker)
        ours = list(self._batch_of.items())
        lost = {batch: key for key, batch in ours if batch == bound or (key in keys and not expected)}
        self._unbind(lost)
        for question in list(self._questions):
            self._interrupted.add(question)
            question.cancel()
        futures = []
        for batch, key in lost.items():
            self._batch_of.pop(key, None)
            future = self._futures.pop(batch, None)
            if future is not None:
                futures.append(future)
                self._inputs.append(BatchLost(batch, f"worker {worker} died", None, 0 if expected else 1))
        if futures:
            # Cancelling also wakes whoever waits for these futures.
            self._farewells.append(asyncio.ensure_future(self._call_back(futures)))

    def _check_alive(self) -> None:
        status = self._client.status
        if status == "running":
            self._lost_since = None
            return
        now = time.monotonic()
        self._lost_since = self._lost_since or now
        self._check_open()
        if now - self._lost_since > _RECONNECT_S:
            raise self._cluster_error("the connection to the scheduler is lost")

    def _cluster_error(self, what: str) -> ClusterError:
        return ClusterError(
            f"{what} (scheduler {self._address}); start the stream again when the cluster is back: with "
            "checkpoint=... it goes on where it stopped"
        )

    async def _call_back(self, futures: list[distributed.Future[Any]]) -> None:
        # Where the scheduler can't hear it, there is nothing left to call back.
        with contextlib.suppress(OSError, TimeoutError):
            await asyncio.wait_for(_soon(self._client.cancel(futures, force=True, asynchronous=True)), _GOODBYE_S)

    async def _restart(self, worker: str) -> None:
        # A worker without a nanny can't be restarted: it stays, with the threads that are left.
        with contextlib.suppress(Exception):
            await _soon(self._client.restart_workers([worker], timeout=30, raise_for_error=False))

    async def _close(self) -> None:
        _Obituaries.forget(self._client, self)
        await asyncio.gather(*self._farewells, return_exceptions=True)
        own = (self._next, self._collecting, self._polling, *self._gathers)
        tasks = [t for t in own if t is not None]
        for task in tasks:
            if not task.done() and task is not asyncio.current_task():
                task.cancel()
        await asyncio.gather(*(t for t in tasks if t is not asyncio.current_task()), return_exceptions=True)
        self._completed.clear()
        futures = list(self._futures.values())
        if self._shared is not None:
            futures.append(self._shared)
            self._shared = None
        self._futures.clear()
        if futures and self._client.status == "running":
            await self._call_back(futures)


def _arrival(batch: int, result: Any, spent: float) -> Input | _Arrived:
    return (_Arrived if isinstance(result, Parcel) else BatchDone)(batch, result, spent)


def _close_cluster(client: Any) -> None:
    cluster = client.cluster
    client.close()
    cluster.close()


def _lacks_package(error: BaseException | None) -> bool:
    """Whether an error or one of its causes is that this package can't be imported."""
    while error is not None:
        if isinstance(error, ImportError) and (error.name or "").split(".")[0] == "zarr_dask_stream":
            return True
        error = error.__cause__ or error.__context__
    return False


def _killed_message(error: distributed.KilledWorker) -> str:
    last = getattr(error, "last_worker", None)
    where = f"; the last was {getattr(last, 'address', last)}" if last is not None else ""
    deaths = getattr(error, "allowed_failures", 0) + 1
    return f"{deaths} worker(s) died while they had it{where}"


async def _soon(value: Any) -> Any:
    """Await what a Dask method returns on its own event loop (a few return plain values there)."""
    return await value if isinstance(value, Awaitable) else value
