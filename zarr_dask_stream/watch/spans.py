"""Runs as spans of OpenTelemetry: a run, some of its tasks below it, what went wrong as events.

Only the API of OpenTelemetry is used, and it is imported when spans are asked for. Where no SDK is set up, or the
run is not sampled, nothing is recorded and next to nothing is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

from zarr_dask_stream.engine.events import (
    BatchFinished,
    BatchHedged,
    Callback,
    ChunkDeadLettered,
    ChunkRetried,
    Notice,
    RunFinished,
    RunStarted,
    SlowedDown,
    WorkerRetired,
)
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.watch.figures import Figures

__all__ = ["Spans"]

_EVENTS = 100  # of a run; SDKs keep 128 by default, and drop the first ones, which say how it began
_ALL_UNTIL = 256  # tasks
_LOST = 1000


class Spans(Callback):
    """Record runs as spans of OpenTelemetry; give it to a stream with ``callbacks=[zds.Spans()]``.

    A run is a span ``zds.run`` below the span that is current when it begins. Its tasks are spans ``zds.batch``
    below that, with the time from submission to the end and what of it went where. Retries, dead letters and
    complaints of the store are events of the run, the first hundred of them; all of them are counted in its
    attributes.

    Parameters
    ----------
    name : str
        Attribute ``zds.stream``. By default the last two parts of the array's place.
    every : int, optional
        A span for one task in so many. By default each of the first 256, then ever fewer: 2,000 in a run of a
        million. Lost tasks have a span in any case.
    tracer_provider : opentelemetry.trace.TracerProvider, optional
        Default: the global one.

    Raises
    ------
    UsageError
        If the OpenTelemetry API is not installed (extra ``otel``).

    Examples
    --------
    >>> import zarr
    >>> import zarr_dask_stream as zds
    >>> from opentelemetry.sdk.trace import TracerProvider
    >>> from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    >>> from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    >>> exporter, provider = InMemorySpanExporter(), TracerProvider()
    >>> provider.add_span_processor(SimpleSpanProcessor(exporter))
    >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4")
    >>> spans = zds.Spans("example", tracer_provider=provider)
    >>> _ = zds.stream_chunks(array, concurrency=1, callbacks=[spans]).run()
    >>> run = exporter.get_finished_spans()[-1]
    >>> run.name, run.attributes["zds.stream"], run.attributes["zds.chunks.emitted"]
    ('zds.run', 'example', 3)
    """

    def __init__(self, name: str = "", *, every: int | None = None, tracer_provider: Any = None) -> None:
        if not isinstance(name, str):
            raise UsageError(f"name is text, the name of the stream, got {name!r}")
        given: Any = every
        if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
            raise UsageError(f"every is a number of tasks, at least one, or None, got {every!r}")
        try:
            trace = import_module("opentelemetry.trace")
        except ImportError as error:
            raise UsageError(
                f"spans need the OpenTelemetry API: pip install 'zarr-dask-stream[otel]' ({error})"
            ) from error
        self._name = name
        self._every = every
        self._trace = trace
        self._tracer = trace.get_tracer("zarr_dask_stream", tracer_provider=tracer_provider)

    def for_run(self) -> Callback:
        """Return the observer of one run."""
        return _RunSpans(self._trace, self._tracer, self._name, self._every)


class _RunSpans(Callback):
    """The spans of one run."""

    def __init__(
        self, trace: Any, tracer: Any, name: str, every: int | None, clock: Callable[[], int] = time.time_ns
    ) -> None:
        self._trace = trace
        self._tracer = tracer
        self._figures = Figures(name)
        self._every = every
        self._clock = clock
        self._began_ns = 0
        self._span: Any = None
        self._context: Any = None
        self._events = 0
        self._batches = 0
        self._lost = 0

    def handle(self, notice: Notice) -> None:
        if isinstance(notice, RunStarted) or self._span is not None:
            self._figures.handle(notice)
            super().handle(notice)

    def _at(self, seconds: float) -> int:
        return self._began_ns + round(seconds * 1e9)

    def on_run_started(self, notice: RunStarted) -> None:
        self._began_ns = self._clock() - round(notice.at * 1e9)
        attributes = {
            "zds.stream": self._figures.name,
            "zds.url": notice.url,
            "zds.grid_shape": notice.grid_shape,
            "zds.chunk_bytes": notice.chunk_nbytes,
            "zds.chunks.resumed": notice.resumed,
            **({} if notice.total is None else {"zds.chunks.planned": notice.total}),
        }
        span = self._tracer.start_span("zds.run", start_time=self._began_ns, attributes=attributes)
        if span.is_recording():
            self._span, self._context = span, self._trace.set_span_in_context(span)

    def on_batch_finished(self, notice: BatchFinished) -> None:
        number, self._batches = self._batches, self._batches + 1
        if notice.lost:
            self._lost += 1
            if self._lost > _LOST:
                return
        elif number % (self._every or _thinned(number)):
            return
        batch, stats = notice.batch, notice.stats
        attributes: dict[str, Any] = {
            "zds.batch.id": batch.id,
            "zds.batch.chunks": batch.count,
            "zds.batch.attempt": batch.attempt,
        }
        if stats is not None:
            attributes |= {
                "zds.worker": stats.worker,
                "zds.bytes.stored": stats.bytes_stored,
                "zds.bytes.decoded": stats.bytes_decoded,
                "zds.bytes.written": stats.bytes_written,
                "zds.seconds.fetch": stats.fetch_s,
                "zds.seconds.decode": stats.decode_s,
                "zds.seconds.compute": stats.compute_s,
                "zds.seconds.transfer": notice.transfer_s,
                "zds.seconds.queue": notice.queued_s,
                "zds.seconds.schedule": notice.schedule_s,
            }
        span = self._tracer.start_span(
            "zds.batch",
            context=self._context,
            start_time=self._at(notice.at - notice.elapsed_s),
            attributes=attributes,
        )
        if notice.lost:
            span.set_status(self._trace.StatusCode.ERROR, notice.lost)
        span.end(self._at(notice.at))

    def _event(self, name: str, notice: Notice, attributes: dict[str, Any]) -> None:
        self._events += 1
        if self._events <= _EVENTS:
            self._span.add_event(name, attributes, timestamp=self._at(notice.at))

    def on_chunk_retried(self, notice: ChunkRetried) -> None:
        failure = notice.failure
        self._event(
            "zds.retry",
            notice,
            {
                "zds.chunk": failure.number,
                "zds.attempt": notice.attempt,
                "zds.delay_s": notice.delay_s,
                "zds.failure": failure.category.value,
                "zds.worker": failure.worker,
                "exception.type": failure.error_type,
                "exception.message": failure.message,
            },
        )

    def on_chunk_dead_lettered(self, notice: ChunkDeadLettered) -> None:
        letter = notice.letter
        self._event(
            "zds.dead_letter",
            notice,
            {
                "zds.chunk": notice.number,
                "zds.index": letter.index,
                "zds.attempt": letter.attempts,
                "zds.failure": letter.category,
                "zds.reason": letter.reason,
                "zds.worker": letter.worker,
                "exception.type": letter.error_type,
                "exception.message": letter.message,
            },
        )

    def on_batch_hedged(self, notice: BatchHedged) -> None:
        self._event("zds.hedge", notice, {"zds.batch.id": notice.batch.id, "zds.batch.chunks": notice.batch.count})

    def on_slowed_down(self, notice: SlowedDown) -> None:
        self._event("zds.slowed_down", notice, {"zds.requests_per_s": notice.requests_per_s})

    def on_worker_retired(self, notice: WorkerRetired) -> None:
        self._event("zds.worker_retired", notice, {"zds.worker": notice.worker, "zds.zombies": notice.zombies})

    def on_run_finished(self, notice: RunFinished) -> None:
        span, counts = self._span, self._figures.counts
        span.set_attributes(
            {
                "zds.outcome": notice.outcome,
                "zds.chunks.planned": notice.total,
                "zds.events": self._events,
                "zds.batches": self._batches,
                **{
                    f"zds.{what}.{kind}": count
                    for what in ("chunks", "again", "bytes", "seconds")
                    for kind, count in counts.get(what, {}).items()
                },
            }
        )
        if notice.outcome == "failed":
            span.set_status(self._trace.StatusCode.ERROR, notice.error)
        span.end(self._at(notice.at))
        self._span = None


def _thinned(number: int) -> int:
    """Return of how many tasks one has a span, around this one: twice as many each time their number doubles.

    Examples
    --------
    >>> [_thinned(n) for n in (0, 255, 256, 511, 512, 1024)]
    [1, 1, 2, 2, 4, 8]
    """
    return 1 << max((number // (_ALL_UNTIL // 2)).bit_length() - 1, 0) if number >= _ALL_UNTIL else 1
