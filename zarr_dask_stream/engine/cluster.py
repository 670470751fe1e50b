"""Clients and clusters: found, checked, started and ended; and how much memory this host has for a stream."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import operator
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import dask
import distributed
from dask.utils import parse_bytes
from distributed.comm.core import connect
from distributed.deploy.spec import close_clusters
from distributed.system import MEMORY_LIMIT
from distributed.worker import thread_state  # type: ignore[attr-defined]  # it has no public name

from zarr_dask_stream.errors import ClusterError, UsageError

__all__ = [
    "active_client",
    "check_client",
    "close_cluster",
    "connected",
    "embedded_cluster",
    "has_given_up",
    "in_dask_task",
    "in_stage",
    "leave_cluster_alone",
    "memory_budget",
]

logger = logging.getLogger("zarr_dask_stream")

#: Whether this is a function that a stream calls on a worker.
in_stage: ContextVar[bool] = ContextVar("in_stage", default=False)

_CONNECT_S = 10.0  # how long a scheduler may take to answer for the first time


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
            nbytes = int(parse_bytes(amount)) if amount.strip() else 0  # Dask takes no text for one byte
        elif isinstance(amount, bool):
            raise UsageError(expected)
        else:
            nbytes = operator.index(amount)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(expected) from None
    if nbytes < 1:
        raise UsageError(f"{expected}: it must be at least one byte")
    return nbytes


def in_dask_task() -> bool:
    """Whether the calling thread is running a Dask task."""
    return getattr(thread_state, "key", None) is not None


def active_client() -> distributed.Client | None:
    """Return the client that a plain ``dask.compute`` would use here, or None."""
    if in_dask_task():
        client: distributed.Client = distributed.get_client()
        return client
    try:
        client = distributed.default_client()
    except ValueError:
        _say_if_lost()
        return None
    if client.status in ("closed", "closing"):  # inside its `with` block it still counts as active
        lost = ": it has lost its scheduler" if has_given_up(client) else ""
        raise ClusterError(f"the active client is closed{lost}; make a new distributed.Client(address)")
    _check_own(client)
    _remember(client)
    return client


def _remember(client: distributed.Client) -> None:
    _last[:] = [(weakref.ref(client), _address_of(client))]


def _say_if_lost() -> None:
    """Warn, once, that a stream does not run where the last one did."""
    for reference, address in _last:
        client = reference()
        if client is not None and has_given_up(client):
            logger.warning(
                "the active client has lost its scheduler %s: streams run inside this process now; "
                "make a new distributed.Client(address) to run them on a cluster again",
                address,
            )
    _last.clear()


def has_given_up(client: distributed.Client) -> bool:
    """Whether a client was not closed by hand, but has lost its scheduler for good."""
    # Who is closed by hand keeps its last connection.
    return client.status == "closed" and client.scheduler_comm is None


def _address_of(client: distributed.Client) -> str:
    return "" if client.scheduler is None else str(client.scheduler.address)


def _check_own(client: distributed.Client) -> None:
    """Refuse a client that lives in the process from which this one was forked."""
    if client in _inherited:
        raise ClusterError(
            "this process was forked from the one that has the client, and can't use it: make a new "
            "distributed.Client(address) here, or start processes by spawning them"
        )


def _after_fork() -> None:
    """Let a forked child have clusters of its own."""
    _inherited.update(getattr(distributed.Client, "_instances", ()))
    # Dask hands work to this pool, whose one thread stayed with the parent: it would wait for ever.
    if hasattr(distributed.utils, "_offload_executor"):
        distributed.utils._offload_executor = ThreadPoolExecutor(1, "Dask-Offload")  # noqa: SLF001  # see above
    _renew_dask_locks()


def _renew_dask_locks() -> None:
    """Open the locks behind which Dask gives names to graphs: another thread of the parent may have held them."""
    naming: Any = sys.modules.get("dask.tokenize")
    if hasattr(naming, "tokenize_lock"):
        naming.tokenize_lock = threading.RLock()
        naming._SEEN = {}  # noqa: SLF001  # what that thread was about to name
    expressions: list[type] = [getattr(sys.modules.get("dask._expr"), "Expr", int)]
    for kind in expressions:
        expressions += kind.__subclasses__()
        for value in vars(kind).values():
            # Before Python 3.12 such a property has one lock for all objects.
            if isinstance(value, cached_property) and hasattr(value, "lock"):
                value.lock = threading.RLock()


_last: list[tuple[weakref.ref[Any], str]] = []  # the client that was active when a stream looked last
_inherited: weakref.WeakSet[Any] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def check_client(client: Any) -> None:
    """Raise UsageError unless `client` is a running ``distributed.Client`` or None."""
    if client is None:
        with contextlib.suppress(ValueError):
            _remember(distributed.default_client())
        return
    if not isinstance(client, distributed.Client):
        raise UsageError(
            f"client must be a distributed.Client, got {type(client).__name__}; "
            "for an address use distributed.Client(address)"
        )
    if client.status in ("closed", "closing"):
        raise UsageError("the client is closed: make a new distributed.Client")
    _check_own(client)


class _ThreadsOnLoopback(distributed.Worker):
    """A worker inside this process, which is nobody else's business."""

    def __init__(self, *args: Any, **options: Any) -> None:
        # Each worker serves its state over HTTP, and one without an address of its own does so to every network.
        super().__init__(*args, **{**options, "dashboard_address": "127.0.0.1:0"})


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
        worker_class=None if processes else _ThreadsOnLoopback,
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
        except (OSError, ValueError, TypeError, RuntimeError) as error:  # the last two where it is about certificates
            raise ClusterError(
                f"no Dask scheduler answers at {address} ({error}); expected an address such as tcp://host:8786, or "
                "tls://host:8786 where Dask is configured with certificates"
            ) from error
        with distributed.Client(address, timeout=_CONNECT_S, set_as_default=False) as client:
            yield client
    elif processes:
        client = embedded_cluster(processes=processes)
        try:
            yield client
        finally:
            close_cluster(client)
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


def close_cluster(client: Any) -> None:
    """Close a client and the cluster that was started with it."""
    cluster = client.cluster
    client.close()
    cluster.close()
