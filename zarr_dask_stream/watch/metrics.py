"""Figures for Prometheus: of the streams of a client, of a whole cluster, of one worker.

All of them are families in one registry of ``prometheus_client``, filled when somebody scrapes: a stream pays for
nothing but additions. On a scheduler and its workers that is the registry behind the `/metrics` that they serve
already. ``prometheus_client`` is imported when metrics are asked for, not before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

from zarr_dask_stream.engine.events import Callback, RunFinished, RunStarted
from zarr_dask_stream.engine.tally import PROCESS
from zarr_dask_stream.engine.task import zombies
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.watch.figures import Counts, Figures, Totals

__all__ = ["METRICS", "WORKER_METRICS", "Exporter", "Metric", "Metrics", "export_worker", "exporter"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One exported metric: its name without suffix, what it says, and which counts it shows.

    `label` names the kinds, all of which are shown from the start, so that a rate is right from the first chunk on.
    Without `label`, `kinds` has one member, and the metric shows that.
    """

    name: str
    help: str
    what: str
    label: str = ""
    kinds: tuple[str, ...] = ("",)
    type: str = "counter"

    @property
    def sample(self) -> str:
        """Name under which it is queried."""
        return f"{self.name}_total" if self.type == "counter" else self.name


_ENDS = ("emitted", "filtered", "skipped_missing", "dead_lettered", "cancelled")
_PHASES = ("queue", "schedule", "fetch", "decode", "compute", "transfer", "consumer")
_POWERS = tuple(range(-13, 8))  # bounds of the histogram: 122 microseconds to 128 s

#: Metrics of streams, each with the label ``stream``.
METRICS: tuple[Metric, ...] = (
    Metric("zds_runs", "Runs that ended, by outcome.", "runs", "outcome", ("done", "stopped_early", "failed")),
    Metric("zds_chunks", "Planned chunks that reached their one end, by which.", "chunks", "outcome", _ENDS),
    Metric("zds_retries", "Tries of chunks beyond their first.", "again", kinds=("retries",)),
    Metric("zds_hedges", "Chunks of which a second copy was started.", "again", kinds=("hedges",)),
    Metric("zds_batches", "Tasks that came back, and tasks that were lost.", "batches", "outcome", ("done", "lost")),
    Metric("zds_stored_bytes", "Bytes read from stores, as stored.", "bytes", kinds=("stored",)),
    Metric("zds_decoded_bytes", "Bytes of decoded data.", "bytes", kinds=("decoded",)),
    Metric("zds_written_bytes", "Bytes stored in targets.", "bytes", kinds=("written",)),
    Metric(
        "zds_phase_seconds",
        "Where the time went: work summed over threads, queue, schedule and transfer over tasks; consumer at the end.",
        "seconds",
        "phase",
        _PHASES,
    ),
    Metric("zds_store_slowdowns", "How often a store asked for less.", "slowdowns"),
    Metric("zds_chunk_read_seconds", "Time to fetch and decode a chunk.", "latency", type="histogram"),
    Metric("zds_active_runs", "Runs under way.", "", type="gauge"),
    Metric("zds_planned_chunks", "Chunks planned for the runs under way, where that is known.", "", type="gauge"),
    Metric("zds_in_flight_chunks", "Chunks submitted and not yet taken.", "", type="gauge"),
    Metric("zds_in_flight_bytes", "Most decoded bytes submitted and not yet taken.", "", type="gauge"),
)

#: Metrics of one worker process, all its streams together.
WORKER_METRICS: tuple[Metric, ...] = (
    Metric(
        "zds_worker_chunks",
        "Chunks that this worker was given, by what became of them here.",
        "chunks",
        "outcome",
        ("done", "filtered", "skipped_missing", "failed", "unattempted"),
    ),
    Metric("zds_worker_batches", "Tasks run.", "batches"),
    Metric("zds_worker_stored_bytes", "Bytes read from stores, as stored.", "bytes", kinds=("stored",)),
    Metric("zds_worker_decoded_bytes", "Bytes of decoded data.", "bytes", kinds=("decoded",)),
    Metric("zds_worker_written_bytes", "Bytes stored in targets.", "bytes", kinds=("written",)),
    Metric(
        "zds_worker_phase_seconds",
        "Where the time of this worker's threads went.",
        "seconds",
        "phase",
        ("fetch", "decode", "compute"),
    ),
    Metric("zds_worker_failures", "Failed attempts at chunks, by kind of failure.", "failures", "category", ()),
    Metric("zds_worker_chunk_read_seconds", "Time to fetch and decode a chunk.", "latency", type="histogram"),
    Metric("zds_worker_hung_threads", "Threads left behind in chunks that were given up.", "", type="gauge"),
)


def _client_library() -> Any:
    try:
        return import_module("prometheus_client")
    except ImportError as error:
        raise UsageError(
            f"metrics need prometheus_client: pip install 'zarr-dask-stream[metrics]' ({error})"
        ) from error


def _family(metric: Metric, labels: Iterable[str]) -> Any:
    core = import_module("prometheus_client.core")
    kind = {
        "counter": core.CounterMetricFamily,
        "gauge": core.GaugeMetricFamily,
        "histogram": core.HistogramMetricFamily,
    }[metric.type]
    return kind(metric.name, metric.help, labels=[*labels, *([metric.label] if metric.label else [])])


def _add_counts(family: Any, metric: Metric, labels: list[str], counts: Mapping[str, Mapping[str, float]]) -> None:
    kinds = counts.get(metric.what, {})
    if metric.type == "histogram":
        _add_histogram(family, labels, kinds, counts.get("seconds", {}))
    elif metric.label:
        for kind in dict.fromkeys((*metric.kinds, *kinds)):
            family.add_metric([*labels, kind], kinds.get(kind, 0))
    else:
        family.add_metric(labels, kinds.get(metric.kinds[0], 0))


def _add_histogram(family: Any, labels: list[str], powers: Mapping[str, float], seconds: Mapping[str, float]) -> None:
    counts = {int(power): count for power, count in powers.items()}
    bounds = [(f"{2.0**bound}", sum(n for power, n in counts.items() if power <= bound)) for bound in _POWERS]
    # A chunk's time is that to fetch and to decode it, so their sums are the sum of the histogram.
    total = seconds.get("fetch", 0.0) + seconds.get("decode", 0.0)
    family.add_metric(labels, buckets=[*bounds, ("+Inf", sum(counts.values()))], sum_value=total)


class Exporter:
    """All streams that one process tells Prometheus of; made by `exporter`, one for each registry."""

    def __init__(self) -> None:
        self._totals = Totals()
        self._active: dict[Any, tuple[str, Counts, tuple[float, float, float]]] = {}
        self._followed: dict[Any, Figures] = {}
        self._lock = threading.RLock()  # what is counted is looked at and added in one go, or it would count twice

    def follow(self, figures: Figures) -> None:
        """Show a run of this process from now on, as far as it is when somebody asks."""
        with self._lock:
            self._followed[id(figures)] = figures

    def update(
        self,
        run: Any,
        name: str,
        counts: Counts,
        *,
        planned: float = 0,
        in_flight: float = 0,
        in_flight_bytes: float = 0,
        over: bool = False,
    ) -> None:
        """Take what a run has counted since its beginning, and what it has in flight; `over`: for the last time."""
        with self._lock:
            before = self._active.pop(run, (name, {}, ()))[1]
            self._totals.add(name, counts, before)
            if not over:
                self._active[run] = (name, counts, (planned, in_flight, in_flight_bytes))

    def look(self) -> None:
        """Take what the runs of this process have counted by now."""
        with self._lock:
            for key, figures in list(self._followed.items()):
                counts = figures.copy()
                over = "runs" in counts
                gauges = {"planned": figures.planned, "in_flight": figures.in_flight}
                gauges["in_flight_bytes"] = figures.in_flight_bytes
                self.update(key, figures.name, counts, **gauges, over=over)
                if over:
                    del self._followed[key]

    def collect(self) -> Iterator[Any]:
        """Yield families of metrics; ``prometheus_client`` calls it for each scrape."""
        with self._lock:
            self.look()
            totals = [(name, {what: dict(kinds) for what, kinds in sums.items()}) for name, sums in self._totals]
            active = list(self._active.values())
        gauges = {name: [0.0] * 4 for name, _ in totals}
        for name, _, (planned, in_flight, nbytes) in active:
            sums = gauges.setdefault(self._totals.known_as(name), [0.0] * 4)
            for place, value in enumerate((1, planned, in_flight, nbytes)):
                sums[place] += value
        place = 0
        for metric in METRICS:
            family = _family(metric, ["stream"])
            if metric.type == "gauge":
                for name, values in gauges.items():
                    family.add_metric([name], values[place])
                place += 1
            else:
                for name, counts in totals:
                    _add_counts(family, metric, [name], counts)
            yield family

    def describe(self) -> Iterator[Any]:
        """Yield the names of all families, so that nobody takes them twice."""
        for metric in METRICS:
            yield _family(metric, ["stream"])


_exporters: WeakKeyDictionary[Any, Exporter] = WeakKeyDictionary()
_making = threading.Lock()


def exporter(registry: Any = None) -> Exporter:
    """Return the exporter of a registry, by default of the global one; made where there is none so far.

    Raises
    ------
    UsageError
        If ``prometheus_client`` is not installed.
    """
    library = _client_library()
    registry = library.REGISTRY if registry is None else registry
    if not callable(getattr(registry, "register", None)):
        raise UsageError(f"registry is a prometheus_client.CollectorRegistry, got {registry!r}")
    with _making:
        if registry not in _exporters:
            made = Exporter()
            registry.register(made)
            _exporters[registry] = made
        return _exporters[registry]


class Metrics(Callback):
    """Count what streams do for Prometheus; give it to a stream with ``callbacks=[zds.Metrics()]``.

    One object may watch any number of streams, at the same time too. All metrics have the label ``stream``.
    Whoever wants them served from this process calls ``prometheus_client.start_http_server(port)``; the schedulers
    and workers of a cluster serve theirs after ``zds.dashboard(client)``.

    Parameters
    ----------
    name : str
        Value of the label. By default the last two parts of the array's place: few, and without credentials.
    registry : prometheus_client.CollectorRegistry, optional
        Default: the global one.

    Raises
    ------
    UsageError
        If ``prometheus_client`` is not installed (extra ``metrics``).

    Examples
    --------
    >>> import prometheus_client, zarr
    >>> import zarr_dask_stream as zds
    >>> registry = prometheus_client.CollectorRegistry()
    >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4")
    >>> metrics = zds.Metrics("example", registry)
    >>> _ = zds.stream_chunks(array, concurrency=1, callbacks=[metrics]).run()
    >>> registry.get_sample_value("zds_chunks_total", {"stream": "example", "outcome": "emitted"})
    3
    """

    def __init__(self, name: str = "", registry: Any = None) -> None:
        if not isinstance(name, str):
            raise UsageError(f"name is text, the value of the label stream, got {name!r}")
        self._name = name
        self._exporter = exporter(registry)

    def for_run(self) -> Callback:
        """Return the observer of one run."""
        return _Followed(self._name, self._exporter)


class _Followed(Figures):
    """The figures of a run that an exporter shows while it goes on."""

    def __init__(self, name: str, shown_by: Exporter) -> None:
        super().__init__(name)
        self._shown_by = shown_by

    def on_run_started(self, notice: RunStarted) -> None:
        super().on_run_started(notice)
        self._shown_by.follow(self)

    def on_run_finished(self, notice: RunFinished) -> None:
        super().on_run_finished(notice)
        self._shown_by.look()


class _WorkerCollector:
    """What this process has done for all streams, as families of metrics."""

    def __init__(self, look: Callable[[], Counts] = PROCESS.copy) -> None:
        self._look = look

    def collect(self) -> Iterator[Any]:
        counts = self._look()
        for metric in WORKER_METRICS:
            family = _family(metric, [])
            if metric.type == "gauge":
                family.add_metric([], zombies())
            else:
                _add_counts(family, metric, [], counts)
            yield family

    def describe(self) -> Iterator[Any]:
        for metric in WORKER_METRICS:
            yield _family(metric, [])


_told: WeakKeyDictionary[Any, _WorkerCollector] = WeakKeyDictionary()


def export_worker(registry: Any = None) -> None:
    """Show what this process does as a worker in a registry, by default the global one; again does nothing."""
    registry = _client_library().REGISTRY if registry is None else registry
    with _making:
        if registry not in _told:
            _told[registry] = _WorkerCollector()
            registry.register(_told[registry])
