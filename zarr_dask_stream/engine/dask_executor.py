"""Batches as tasks on a Dask cluster.

The caller's thread only makes tasks and waits. All that is known of them lives on the client's event loop, so
that what the caller does and what happens to a worker come one after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import threading
import time
import uuid
from collections.abc import Callable, Collection, Coroutine, Iterable
from typing import Any, TypeVar

import dask
import distributed
from dask.delayed import delayed

from zarr_dask_stream.engine.cluster import close_cluster, has_given_up, in_dask_task
from zarr_dask_stream.engine.events import Batch, BatchLost, Blame, Input, Threads, Tick
from zarr_dask_stream.engine.feed import Cargo
from zarr_dask_stream.engine.gather import Arrived, Gatherer, soon, unpack_inputs
from zarr_dask_stream.engine.isolation import Isolation
from zarr_dask_stream.engine.obituaries import BEGINNINGS, Obituaries
from zarr_dask_stream.engine.payload import pack_work, package_version, remote_batch
from zarr_dask_stream.engine.task import Work
from zarr_dask_stream.errors import ClusterError, UsageError
from zarr_dask_stream.source.memory import Keeper

__all__ = ["DaskExecutor"]

T = TypeVar("T")

_POLL_S = 1.0  # how often the size of the cluster is asked for
_NO_WORKERS_S = 3.0  # how long a cluster may have no worker before we say so
_RECONNECT_S = 30.0  # how long a lost scheduler may take to come back
_SILENT_S = 120.0  # how long a scheduler may leave a question unanswered while the connection stands
_GOODBYE_S = 5.0  # how long the last message to a scheduler may take
_PREFIX = "zds-read-"
_INLINE_BYTES = 256 * 1024  # a larger description of the work travels once per worker, not per task


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
    cargo : callable, optional
        Returns the data that go with a batch, where no store has them. They go through the scheduler.
    """

    def __init__(
        self,
        client: distributed.Client,
        work: Work,
        *,
        own_cluster: bool = False,
        cargo: Callable[[Batch], Cargo] | None = None,
    ) -> None:
        self._client: Any = client
        self._cargo = cargo
        self._address = "?" if client.scheduler is None else client.scheduler.address
        self._own_cluster = own_cluster
        self._keeper = Keeper()
        self._process = os.getpid()
        self._payload = pack_work(work)
        self._shared: distributed.Future[Any] | None = None
        self._isolation = Isolation()
        self._binding: dict[int, Batch] = {}
        self._obituaries: Obituaries | None = None
        self._gatherer = Gatherer(client, self._cause)
        self._errands: set[asyncio.Task[None]] = set()
        self._run = uuid.uuid4().hex[:8]
        self._task = remote_batch()
        self._futures: dict[int, distributed.Future[Any]] = {}
        self._batch_of: dict[str, int] = {}
        self._unregistered: set[str] = set()
        self._lost_early: dict[str, str] = {}
        self._problem: ClusterError | None = None
        self._completed = distributed.as_completed(loop=client.loop)
        self._next: asyncio.Task[Any] | None = None
        self._gathers: set[asyncio.Task[list[Input | Arrived]]] = set()
        self._inputs: list[Input | Arrived] = []
        self._collecting: asyncio.Task[Any] | None = None
        self._polling: asyncio.Task[None] | None = None
        self._threads = Threads(0, 0)
        self._polled_at = 0.0
        self._empty_since: float | None = None
        self._lost_since: float | None = None
        self._seceded: int | None = None  # the thread that stepped aside
        self._bell: asyncio.Future[None]  # made where it rings: on the client's event loop

    # -- from either side ---------------------------------------------------------------------------

    @property
    def client(self) -> Any:
        """The client whose cluster this is on; None where the cluster is there for this run alone."""
        return None if self._own_cluster else self._client

    def start(self) -> Threads:
        """Ask for the size of the cluster."""
        if in_dask_task():
            distributed.secede()
            self._seceded = threading.get_ident()
        return self._sync(self._start)

    async def start_async(self) -> Threads:
        """Ask for the size of the cluster."""
        return await self._async(self._start())

    def submit(self, batches: tuple[Batch, ...]) -> None:
        """Make tasks of batches; suspects wait for a worker that has no other suspect."""
        ordinary = [batch for batch in batches if not batch.suspect]
        if ordinary:
            self._check_open()
            # A worker can die of a task before the client's loop has heard of it: see `_register`.
            self._unregistered.update(map(self._key, ordinary))
            place = self._isolation.outside
            self._on_loop(self._register, ordinary, self._compute(ordinary, place), place)
        suspects = [batch for batch in batches if batch.suspect]
        if suspects:
            self._on_loop(self._queue_suspects, suspects)

    def _key(self, batch: Batch) -> str:
        return f"{_PREFIX}{self._run}-{batch.id:09d}-a{batch.attempt}"

    def _compute(self, batches: list[Batch], workers: tuple[str, ...] | None) -> list[distributed.Future[Any]]:
        """Make one delayed task of each batch and compute them, on these workers or wherever Dask likes.

        Dask runs those first that were sent first, and of those sent together the first by name. No
        priority is given: numbers that grow along a stream would let each new one overtake all older ones.
        """
        version = package_version()
        place = {} if workers is None else {"workers": list(workers), "allow_other_workers": False}
        try:
            payload = self._work_to_send()
            tasks = [
                self._task(
                    *(payload, batch.ranges, version, *self._more(batch)),
                    dask_key_name=self._key(batch),
                )
                for batch in batches
            ]
            # What comes with a task has to travel, whatever Dask may think of its size.
            quiet = {} if self._cargo is None else {"distributed.admin.large-graph-warning-threshold": 2**60}
            with dask.config.set(quiet):
                futures: list[distributed.Future[Any]] = self._client.compute(
                    tasks, optimize_graph=False, fifo_timeout="0s", **place
                )
        except Exception as error:
            raise self._cluster_error(f"could not send tasks: {error}") from error
        return futures

    def _more(self, batch: Batch) -> list[Any]:
        topic = BEGINNINGS if batch.suspect else ""
        if self._cargo is None:
            return [topic] if topic else []
        return [topic, self._cargo(batch)]

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
        if self._alive:
            self._on_loop(self._cancel, batches)

    def restart(self, worker: str) -> None:
        """Have a worker's nanny restart it; its other tasks run again elsewhere."""
        if self._alive and not worker.startswith("inproc://"):
            self._client.loop.add_callback(self._restart, worker)

    def wait(self, seconds: float | None) -> list[Input]:
        """Wait for tasks, for so many seconds at most."""
        return unpack_inputs(self._sync(self._collect, seconds))

    async def wait_async(self, seconds: float | None) -> list[Input]:
        """Wait for tasks, for so many seconds at most."""
        return unpack_inputs(await self._async(self._collect(seconds)))

    def wake(self) -> None:
        """End the `wait` that goes on, else the next one."""
        if self._alive:
            self._client.loop.add_callback(self._ring)

    def _ring(self) -> None:
        bell: asyncio.Future[None] | None = getattr(self, "_bell", None)  # none before the start
        if bell is not None and not bell.done():
            bell.set_result(None)

    def close(self) -> None:
        """Call everything back; close what was started for this run."""
        try:
            if self._alive:
                self._sync(self._close)
        finally:
            if self._own_cluster and self._process == os.getpid():
                close_cluster(self._client)
            # Closed by another thread than began, as may happen to a shared run, it stays aside until its task ends.
            if self._seceded == threading.get_ident():
                self._seceded = None
                distributed.rejoin()

    async def close_async(self) -> None:
        """Call everything back; close what was started for this run."""
        try:
            if self._alive:
                await self._async(self._close())
        finally:
            if self._own_cluster:
                self._own_cluster = False
                await asyncio.to_thread(close_cluster, self._client)

    # -- two ways to the client's event loop ----------------------------------------------------------

    @property
    def _alive(self) -> bool:
        # A forked child has inherited what its parent was doing, and must leave it alone.
        return self._client.status not in ("closed", "closing") and self._process == os.getpid()

    def _check_open(self) -> None:
        if not self._alive:
            if self._process != os.getpid():
                what = "this process was forked from the one whose stream this is"
            elif has_given_up(self._client):
                what = "the client has tried in vain to reach its scheduler again, and is closed"
            else:
                what = "the client was closed while the stream ran"
            raise self._cluster_error(what)

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

    def _on_loop(self, function: Callable[..., None], *args: Any) -> None:
        """Call a function on the client's event loop: at once where this is it, else after those that wait there.

        All that is known of batches lives on that loop, so that what the caller does and what the cluster
        does to a batch come one after the other.
        """
        try:
            here = asyncio.get_running_loop() is self._client.loop.asyncio_loop
        except RuntimeError:
            here = False
        if here:
            function(*args)
        else:
            self._client.loop.add_callback(function, *args)

    # -- on the client's event loop -------------------------------------------------------------------

    def _register(
        self, batches: list[Batch], futures: list[distributed.Future[Any]], place: tuple[str, ...] | None
    ) -> None:
        """Follow tasks that were sent; some may have met their end already."""
        if place is not None:
            self._isolation.place((batch.id for batch in batches), place)
        for batch, future in zip(batches, futures, strict=True):
            key = self._key(batch)
            self._unregistered.discard(key)
            self._batch_of[key] = batch.id
            self._futures[batch.id] = future
            self._completed.add(future)
            worker = self._lost_early.pop(key, None)
            if worker is not None:
                self._lose({batch.id: key}, f"worker {worker} died", worker, deaths=1)
        if self._collecting is not None:
            self._ring()  # another thread waits, and not for these

    def _queue_suspects(self, suspects: list[Batch]) -> None:
        self._isolation.add(suspects)
        self._send_suspects()

    def _send_suspects(self) -> None:
        # A nanny starts its worker again within seconds, and can watch what comes of a suspect that waits for that.
        empty_s = 0.0 if self._empty_since is None else time.monotonic() - self._empty_since
        for worker, suspect in self._isolation.bind(anywhere=empty_s > _NO_WORKERS_S):
            self._binding[suspect.id] = suspect
            self._later(self._send_bound(suspect, worker))

    async def _send_bound(self, batch: Batch, worker: str) -> None:
        """Send a suspect to its worker, once somebody watches what becomes of that."""
        if worker and self._obituaries is not None:
            await self._obituaries.attend(self._client, worker)
        if self._binding.pop(batch.id, None) is None:
            return  # it was called back, or the worker is gone
        try:
            place = (worker,) if worker else None
            self._register([batch], self._compute([batch], place), place)
        except ClusterError as error:
            self._problem = error  # for who waits
            self._ring()

    def _cancel(self, batches: tuple[int, ...]) -> None:
        for batch in batches:
            self._binding.pop(batch, None)
        self._isolation.release(batches)
        futures = [self._futures.pop(batch) for batch in batches if batch in self._futures]
        if futures:
            self._later(self._call_back(futures))

    def _later(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Do something that nobody waits for before `close`."""
        errand = asyncio.ensure_future(coroutine)
        self._errands.add(errand)
        errand.add_done_callback(self._errands.discard)

    async def _cause(self, worker: str) -> str:
        return "" if self._obituaries is None else await self._obituaries.cause(worker)

    async def _start(self) -> Threads:
        if str(self._address).startswith("inproc://"):
            self._keeper.open()
        if not self._own_cluster:  # the worker inside this process does not die before it
            self._obituaries = Obituaries.tell(self._client, self)
        # In a task of its own: this may be the caller's task, and what is awaited in there (`wait_for` before
        # Python 3.12) can swallow its cancellation. `wait` does not.
        self._polling = asyncio.ensure_future(self._poll())
        await asyncio.wait({self._polling})
        polled, self._polling = self._polling, None
        polled.result()
        self._inputs.clear()
        self._bell = asyncio.get_running_loop().create_future()
        return self._threads

    async def _collect(self, seconds: float | None) -> list[Input | Arrived]:
        # Only while it waits here may `close` cancel this task: with an asynchronous client it is the caller's own.
        self._collecting = asyncio.current_task()
        try:
            await self._collect_until(None if seconds is None else time.monotonic() + seconds)
        finally:
            self._collecting = None
        if self._bell.done():
            self._bell = asyncio.get_running_loop().create_future()
        inputs, self._inputs = self._inputs, []
        return inputs or [Tick()]

    async def _collect_until(self, end: float | None) -> None:
        self._send_suspects()
        while not (self._inputs or self._bell.done()):
            if self._problem is not None:
                raise self._problem
            left = _POLL_S if end is None else min(end - time.monotonic(), _POLL_S)
            if left <= 0:
                return
            await self._wait_for_something(left)
            self._check_alive()
            due = time.monotonic() - self._polled_at > _POLL_S
            if due and self._polling is None and self._lost_since is None:
                self._polling = asyncio.ensure_future(self._poll())

    async def _wait_for_something(self, seconds: float) -> None:
        waiters: set[asyncio.Future[Any]] = {self._bell, *self._gathers}
        if self._next is None and not self._completed.is_empty():
            self._next = asyncio.ensure_future(self._completed.__anext__())
        waiters.update(task for task in (self._next, self._polling) if task is not None)
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

    async def _fetch(self, futures: dict[int, distributed.Future[Any]]) -> list[Input | Arrived]:
        inputs, rest = await self._gatherer.fetch(futures)
        inputs = [self._doubt(one) if isinstance(one, BatchLost) else one for one in inputs]
        if rest:  # on its own: what is here already should not wait for it
            self._gathers.add(asyncio.ensure_future(self._fetch_slowly(rest)))
        self._forget(batch for batch in futures if batch not in rest)
        return inputs

    def _doubt(self, lost: BatchLost) -> BatchLost:
        """Acquit a batch that had not begun on the worker that died: Dask blames all that it had in its queue."""
        return dataclasses.replace(lost, blame=self._isolation.blame(lost.batch, lost.worker, others=True))

    async def _fetch_slowly(self, futures: dict[int, distributed.Future[Any]]) -> list[Input | Arrived]:
        inputs = await self._gatherer.through_scheduler(futures)
        self._forget(futures)
        return inputs

    def _forget(self, batches: Iterable[int]) -> None:
        gone = set(batches)
        for batch in gone:
            self._futures.pop(batch, None)
        self._isolation.release(gone)

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
        stranded = set(self._isolation.update(ncores))
        if stranded:  # their workers left while they were on their way there
            where = "its worker left before it began"
            self._lose({batch: key for key, batch in self._batch_of.items() if batch in stranded}, where, deaths=0)
        self._send_suspects()
        if workers:
            self._empty_since = None
        elif self._empty_since is None:
            self._empty_since = now
        waiting = 0.0 if self._empty_since is None else now - self._empty_since
        current = Threads(threads, workers, waiting if waiting > _NO_WORKERS_S else 0.0)
        if current != self._threads:
            self._threads = current
            self._inputs.append(current)

    def suspect_begun(self, key: str, worker: str) -> None:
        """Hear that a suspect is at work."""
        batch = self._batch_of.get(key)
        if batch is not None:
            self._isolation.begun(batch, worker)

    def worker_added(self, worker: str) -> None:
        """Hear that a worker has joined; it may be about to get a suspect that is bound to none."""
        if self._isolation.unbound and self._obituaries is not None:
            self._later(self._obituaries.attend(self._client, worker))

    def worker_removed(self, worker: str, keys: Collection[Any], *, expected: bool) -> None:
        """Hear that a worker is gone, and take its batches back before Dask lets them meet another one.

        Dask would run them again by itself, at once and under the same name, three more times: a chunk that
        kills its worker would cost four. A worker that was told to leave is left to Dask.
        """
        bound = self._isolation.remove(worker)
        if bound in self._binding:
            self._isolation.put_back(self._binding.pop(bound))
        if not expected:
            self._lost_early.update((key, worker) for key in list(self._unregistered) if key in keys)
        ours = list(self._batch_of.items())
        lost = {batch: key for key, batch in ours if batch == bound or (key in keys and not expected)}
        self._gatherer.interrupt()
        # Tasks of other streams count, and those that Dask has started a second time before they were called back.
        others = sum(key.startswith(_PREFIX) for key in keys if isinstance(key, str)) > 1
        self._lose(lost, f"worker {worker} died", worker, deaths=0 if expected else 1, others=others)

    def _lose(self, lost: dict[int, str], reason: str, worker: str = "", *, deaths: int, others: bool = False) -> None:
        """Give up tasks that went with their worker."""
        futures = []
        for batch, key in lost.items():
            self._batch_of.pop(key, None)
            future = self._futures.pop(batch, None)
            if future is None:
                continue
            futures.append(future)
            event = BatchLost(batch, reason, None, deaths, worker, Blame.NONE)
            if deaths and self._isolation.is_suspect(batch):
                if future.status != "finished":
                    event = dataclasses.replace(event, blame=self._isolation.blame(batch, worker, others=others))
                self._gathers.add(asyncio.ensure_future(self._inquire(event)))
            else:
                self._inputs.append(event)
        self._isolation.release(lost)
        if futures:
            # Cancelling also wakes whoever waits for these futures.
            self._later(self._call_back(futures))

    async def _inquire(self, lost: BatchLost) -> list[Input | Arrived]:
        """Report a suspect's death with its cause."""
        cause = await self._cause(lost.worker)
        return [dataclasses.replace(lost, reason=f"{lost.reason}: {cause}") if cause else lost]

    def _check_alive(self) -> None:
        status = self._client.status
        if status == "running":
            self._lost_since = None
            if self._obituaries is not None:
                self._obituaries.renew(self._client)
            return
        now = time.monotonic()
        self._lost_since = self._lost_since or now
        self._check_open()
        if now - self._lost_since > _RECONNECT_S:
            raise self._cluster_error("the connection to the scheduler is lost")

    def _cluster_error(self, what: str) -> ClusterError:
        return ClusterError(
            f"{what} (scheduler {self._address}); start the stream again with a client of a cluster that runs: "
            "with checkpoint=... it goes on where it stopped"
        )

    async def _call_back(self, futures: list[distributed.Future[Any]]) -> None:
        # Where the scheduler can't hear it, there is nothing left to call back.
        with contextlib.suppress(OSError, TimeoutError):
            await asyncio.wait_for(soon(self._client.cancel(futures, force=True, asynchronous=True)), _GOODBYE_S)

    async def _restart(self, worker: str) -> None:
        # A worker without a nanny can't be restarted: it stays, with the threads that are left.
        with contextlib.suppress(Exception):
            await soon(self._client.restart_workers([worker], timeout=30, raise_for_error=False))

    async def _close(self) -> None:
        Obituaries.forget(self._client, self)
        self._keeper.close()
        await asyncio.gather(*self._errands, return_exceptions=True)
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
