"""Streams on the dashboard of a Dask scheduler, and in the `/metrics` of the scheduler and its workers.

A plugin of the scheduler takes the news that clients send (see `publisher`), keeps them on a `Board`, and adds a page
to the Bokeh server that the scheduler runs already: to its port and no other. It gets there by `dashboard`, or with
the scheduler, by ``--preload zarr_dask_stream.watch.dashboard``.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Container
from importlib import import_module
from typing import Any

import distributed
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.protocol.pickle import dumps

from zarr_dask_stream.engine.cluster import active_client, check_client
from zarr_dask_stream.errors import ClusterError, UsageError
from zarr_dask_stream.watch.board import PAGE, Board, News
from zarr_dask_stream.watch.figures import Counts
from zarr_dask_stream.watch.metrics import Exporter, export_worker, exporter
from zarr_dask_stream.watch.publisher import METADATA, OPERATION

__all__ = ["StreamsPlugin", "dashboard", "dask_setup"]

logger = logging.getLogger("zarr_dask_stream")

_RUNS = 1000  # of a client, at the same time
_LAST_WORDS_S = 1.0


def dashboard(client: Any = None) -> str:
    """Add a page with the streams of all clients to the dashboard of a Dask scheduler.

    The page is there until the scheduler ends, for streams of other clients too, and for those that are under way.
    The scheduler's and the workers' ``/metrics`` show streams from then on, where ``prometheus_client`` is installed.
    To call it again changes nothing. Without a call, ``dask scheduler --preload zarr_dask_stream.watch.dashboard``
    does the same.

    Parameters
    ----------
    client : distributed.Client, optional
        Default: the active client.

    Returns
    -------
    str
        Address of the page, as in ``client.dashboard_link``.

    Raises
    ------
    UsageError
        If there is no client, or it is an asynchronous one: ``await client.register_plugin(StreamsPlugin())`` then.
    ClusterError
        If the scheduler has no dashboard, or this package is not installed where it runs.

    Examples
    --------
    >>> import zarr_dask_stream as zds
    >>> from distributed import Client, LocalCluster
    >>> cluster = LocalCluster(n_workers=1, processes=False, dashboard_address="127.0.0.1:0")
    >>> with cluster, Client(cluster) as client:
    ...     link = zds.dashboard(client)
    >>> link.rpartition("/")[2]
    'zarr-streams'
    """
    check_client(client)
    client = client or active_client()
    if client is None:
        raise UsageError("there is no active client: make one, zds.dashboard(distributed.Client(address))")
    if client.asynchronous:
        raise UsageError(
            "the client is asynchronous: await client.register_plugin(StreamsPlugin()), with "
            "from zarr_dask_stream.watch.dashboard import StreamsPlugin"
        )
    where = client.scheduler.address
    try:
        client.register_plugin(StreamsPlugin())
    except ImportError as error:
        raise ClusterError(
            f"the scheduler at {where} can't import zarr_dask_stream: install it where the scheduler runs, in the same "
            f"version ({error})"
        ) from error
    found = client.get_metadata([METADATA], {}) or {}
    if found.get("problem"):
        raise ClusterError(f"the scheduler at {where} shows no page: {found['problem']}. Streams run all the same")
    return str(client.dashboard_link).rpartition("/")[0] + f"/{PAGE}"


class StreamsPlugin(SchedulerPlugin):
    """Takes the news of streams on a scheduler, and shows them.

    Registered by ``client.register_plugin(StreamsPlugin())``, which `dashboard` does, or by a preload.
    """

    name = "zarr-dask-stream"
    idempotent = True

    def __init__(self) -> None:
        self._board = Board()
        self._exporter: Exporter | None = None
        self._known: dict[str, Any] = {}
        self._clients: Container[str] = ()
        self._counted: dict[str, dict[str, News]] = {}  # runs under way, by client

    async def start(self, scheduler: distributed.Scheduler) -> None:
        """Take part in a scheduler that runs."""
        self._clients = scheduler.clients
        scheduler.handlers[OPERATION] = self._take
        with contextlib.suppress(UsageError):  # no prometheus_client: then there is no /metrics either
            self._exporter = exporter()
        problem = _add_page(scheduler, self._board)
        if problem:
            logger.warning("streams are not shown on the dashboard: %s", problem)
        self._known = {"v": 1, "page": "" if problem else PAGE, "problem": problem}
        scheduler.set_metadata([METADATA], self._known)
        await _export_on_workers(scheduler)

    def restart(self, scheduler: distributed.Scheduler) -> None:
        """Put back what a restart of the cluster cleared."""
        scheduler.set_metadata([METADATA], self._known)

    def add_worker(self, scheduler: distributed.Scheduler, worker: str) -> None:
        """Let a worker that joined show its figures; it waits for an answer of the scheduler, so not at once."""
        scheduler.loop.add_callback(_export_on_workers, scheduler, [worker])

    def remove_client(self, scheduler: distributed.Scheduler, client: str) -> None:
        """Take the streams of a client that left as gone, unless it has said how they ended on its way out."""
        scheduler.loop.call_later(_LAST_WORDS_S, self._gone, client)

    def _gone(self, client: str) -> None:
        self._board.left(client)
        for news in self._counted.pop(client, {}).values():
            self._count(news, {**news.counts, "runs": {"gone": 1}}, over=True)

    async def _take(self, client: str, news: Any) -> None:
        """Take news of a stream: what clients call."""
        parsed = News.parse(news)
        if client not in self._clients and client not in self._counted:
            return  # nobody's, or of one that left some time ago
        self._board.post(client, parsed, time.time())
        runs = self._counted.setdefault(client, {})
        if parsed.run not in runs and len(runs) >= _RUNS:
            return
        over = parsed.outcome != "running"
        self._count(parsed, parsed.counts, over=over)
        runs[parsed.run] = parsed
        if over:
            del runs[parsed.run]

    def _count(self, news: News, counts: Counts, *, over: bool) -> None:
        if self._exporter is not None:
            gauges = {"planned": news.planned, "in_flight": news.in_flight, "in_flight_bytes": news.in_flight_bytes}
            self._exporter.update(news.run, news.name, counts, **gauges, over=over)


def _add_page(scheduler: Any, board: Board) -> str:
    """Add the page to the scheduler's Bokeh server; return why that is not possible, or ""."""
    try:  # Bokeh is imported here and in `streams_page` only, and not before somebody asks for the page
        server = import_module("bokeh.server.server")
        core = import_module("distributed.dashboard.core")
        pages = import_module("distributed.dashboard.scheduler")
    except ImportError as error:
        return f"it has no Bokeh ({error}): pip install 'zarr-dask-stream[dashboard]' where the scheduler runs"
    served = [app for app in scheduler.http_application.applications if isinstance(app, server.BokehTornado)]
    if not served:
        return "its dashboard is switched off (--no-dashboard, or dashboard=False)"
    variables = pages.template_variables(scheduler)
    style = import_module("distributed.dashboard.components.scheduler")
    page = import_module("zarr_dask_stream.watch.streams_page")
    shown = page.streams_page(board, template=style.env.get_template("simple.html"), theme=style.BOKEH_THEME)
    made = core.BokehApplication({f"/{PAGE}": shown}, scheduler, served[0].prefix, variables)
    scheduler.http_application.add_application(made)
    made.initialize(scheduler.loop)
    made.start()
    if PAGE not in variables["pages"]:
        variables["pages"].append(PAGE)  # the list that the bar on top of all pages is made from
    return ""


async def _export_on_workers(scheduler: Any, workers: list[str] | None = None) -> None:
    """Show the figures of workers in their `/metrics`; one that can't is left alone."""
    with contextlib.suppress(OSError):
        await scheduler.broadcast(
            msg={"op": "run", "function": dumps(_export_on_worker)}, workers=workers, on_error="ignore"
        )


def _export_on_worker() -> None:
    with contextlib.suppress(UsageError):  # no prometheus_client there
        export_worker()


async def dask_setup(server: Any) -> None:
    """Begin with a scheduler or a worker: ``--preload zarr_dask_stream.watch.dashboard``."""
    if isinstance(server, distributed.Scheduler):
        await server.register_scheduler_plugin(StreamsPlugin(), idempotent=True)
    else:
        _export_on_worker()
