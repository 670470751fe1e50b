"""Runs as spans: what is below what, how many there are, and that nothing is recorded where nobody listens."""

import sys
from typing import Any

import numpy as np
import pytest
import zarr
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

import zarr_dask_stream as zds
from zarr_dask_stream.engine.events import (
    Batch,
    BatchFinished,
    BatchStats,
    Category,
    ChunkRetried,
    Failure,
    RunFinished,
    RunStarted,
)


class Recorded:
    """A provider of tracers that keeps what was recorded."""

    def __init__(self, **options: Any) -> None:
        self.provider = TracerProvider(**options)
        self._exporter = InMemorySpanExporter()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    def spans(self, name: str) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.name == name]

    @property
    def run(self) -> ReadableSpan:
        (run,) = self.spans("zds.run")
        return run


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


def attributes(span: ReadableSpan) -> dict[str, Any]:
    assert span.attributes is not None
    return dict(span.attributes)


def some_array() -> Any:
    array = zarr.create_array({}, shape=(12,), chunks=(2,), dtype="i4")
    array[:] = np.arange(12)
    return array


def divide_by_zero(chunk: zds.Chunk) -> float:
    return 1 / 0


def a_failure(number: int) -> Failure:
    return Failure(number, Category.TRANSIENT, "OSError", "no", worker="tcp://here")


def test_a_run_is_a_span_with_its_tasks_below_it(recorded: Recorded) -> None:
    tracer = recorded.provider.get_tracer("test")
    with tracer.start_as_current_span("job") as job:
        report = zds.stream_chunks(
            some_array(), concurrency=1, callbacks=[zds.Spans("one", tracer_provider=recorded.provider)]
        ).run()
    run, batches = recorded.run, recorded.spans("zds.batch")
    assert run.parent is not None
    assert run.parent.span_id == job.get_span_context().span_id
    assert len(batches) == report.batches >= 1
    assert all(batch.parent is not None and batch.parent.span_id == run.context.span_id for batch in batches)
    found = attributes(run)
    assert found["zds.stream"] == "one"
    assert found["zds.outcome"] == "done"
    assert found["zds.chunks.planned"] == found["zds.chunks.emitted"] == 6
    assert found["zds.bytes.decoded"] == report.bytes_decoded
    assert found["zds.batches"] == report.batches
    assert run.status.status_code is trace.StatusCode.UNSET
    assert sum(attributes(batch)["zds.batch.chunks"] for batch in batches) == 6
    for batch in batches:
        assert batch.start_time is not None
        assert batch.end_time is not None
        assert run.start_time is not None
        assert run.start_time <= batch.start_time <= batch.end_time


def test_what_went_wrong_are_events(recorded: Recorded) -> None:
    def fail(chunk: zds.Chunk) -> zds.Chunk:
        if chunk.index == (3,):
            raise ValueError("three is bad")
        return chunk

    spans = zds.Spans(tracer_provider=recorded.provider)
    zds.stream_chunks(some_array(), concurrency=1, on_error="skip", callbacks=[spans]).map(fail).run()
    (letter,) = [event for event in recorded.run.events if event.name == "zds.dead_letter"]
    assert letter.attributes is not None
    assert letter.attributes["zds.index"] == (3,)
    assert letter.attributes["exception.type"] == "ValueError"
    assert letter.attributes["exception.message"] == "three is bad"
    assert attributes(recorded.run)["zds.chunks.dead_lettered"] == 1


def test_a_run_that_fails_is_an_error(recorded: Recorded) -> None:
    spans = zds.Spans(tracer_provider=recorded.provider)
    with pytest.raises(zds.ChunkError):
        zds.stream_chunks(some_array(), concurrency=1, callbacks=[spans]).map(divide_by_zero).run()
    assert recorded.run.status.status_code is trace.StatusCode.ERROR
    assert "ChunkError" in (recorded.run.status.description or "")


def test_runs_at_the_same_time_are_kept_apart(recorded: Recorded) -> None:
    spans = zds.Spans(tracer_provider=recorded.provider)
    stream = zds.stream_chunks(some_array(), concurrency=1, callbacks=[spans])
    one, two = iter(stream), iter(stream)
    next(one), next(two)
    list(one), list(two)
    runs = recorded.spans("zds.run")
    assert len(runs) == 2
    assert [attributes(run)["zds.chunks.emitted"] for run in runs] == [6, 6]
    parents = {batch.parent.span_id for batch in recorded.spans("zds.batch") if batch.parent is not None}
    assert parents == {run.context.span_id for run in runs}


def batches_of_a_run(spans: zds.Spans, count: int, *, lost: range = range(0)) -> None:
    """Tell of a run of so many tasks, as `run.py` would."""
    run = spans.for_run()
    run.handle(RunStarted(0.0, count, 8, (count,), "/data/a.zarr"))
    for number in range(count):
        batch = Batch(number, (range(number, number + 1),), 1, 8)
        gone = "died" if number in lost else ""
        run.handle(BatchFinished(number / 10, batch, None if gone else BatchStats(), 0.1, 0.0, lost=gone))
    run.handle(RunFinished(count / 10, "done", count, 0.0, 1, 8))


def test_a_long_run_has_few_spans(recorded: Recorded) -> None:
    batches_of_a_run(zds.Spans(tracer_provider=recorded.provider), 20_000)
    shown = [attributes(batch)["zds.batch.id"] for batch in recorded.spans("zds.batch")]
    assert shown[:256] == list(range(256))
    assert len(shown) < 1200
    assert max(shown) > 19_800, "the end of a run is seen too"
    assert attributes(recorded.run)["zds.batches"] == 20_000


def test_every_nth_task_and_every_lost_one(recorded: Recorded) -> None:
    batches_of_a_run(zds.Spans(every=100, tracer_provider=recorded.provider), 1000, lost=range(501, 504))
    shown = recorded.spans("zds.batch")
    ids = [attributes(batch)["zds.batch.id"] for batch in shown]
    assert ids == [0, 100, 200, 300, 400, 500, 501, 502, 503, 600, 700, 800, 900]
    lost = [batch for batch in shown if batch.status.status_code is trace.StatusCode.ERROR]
    assert [batch.status.description for batch in lost] == ["died"] * 3


def test_times_are_those_of_the_run(recorded: Recorded) -> None:
    batches_of_a_run(zds.Spans(tracer_provider=recorded.provider), 3)
    run, last = recorded.run, recorded.spans("zds.batch")[-1]
    assert run.start_time is not None
    assert run.end_time is not None
    assert run.end_time - run.start_time == pytest.approx(0.3e9, abs=2)
    assert last.start_time == pytest.approx(run.start_time + 0.1e9, abs=2)
    assert last.end_time == pytest.approx(run.start_time + 0.2e9, abs=2)


def test_ten_thousand_retries_are_counted_and_few_are_told(recorded: Recorded) -> None:
    run = zds.Spans(tracer_provider=recorded.provider).for_run()
    run.handle(RunStarted(0.0, None, 8, (9,), "/data/a.zarr"))
    for number in range(10_000):
        run.handle(ChunkRetried(1.0, a_failure(number), 1, 0.5))
    run.handle(RunFinished(2.0, "done", 9, 0.0, 1, 8))
    events = recorded.run.events
    assert len(events) == 100
    assert events[0].attributes is not None
    assert events[0].attributes["zds.chunk"] == 0
    assert attributes(recorded.run)["zds.again.retries"] == 10_000
    assert attributes(recorded.run)["zds.events"] == 10_000


def test_a_run_that_is_not_sampled_records_nothing() -> None:
    silent = Recorded(sampler=ALWAYS_OFF)
    batches_of_a_run(zds.Spans(tracer_provider=silent.provider), 10)
    assert not silent.spans("zds.run")
    assert not silent.spans("zds.batch")


def test_without_an_sdk_a_stream_goes_on() -> None:
    report = zds.stream_chunks(some_array(), concurrency=1, callbacks=[zds.Spans()]).run()
    assert report.emitted == 6


def test_without_the_api_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", None)
    with pytest.raises(zds.UsageError, match=r"zarr-dask-stream\[otel\]"):
        zds.Spans()


@pytest.mark.parametrize("every", [0, -1, True, "all"])
def test_wrong_arguments_are_refused(every: Any) -> None:
    with pytest.raises(zds.UsageError, match="every is a number of tasks"):
        zds.Spans(every=every)
    with pytest.raises(zds.UsageError, match="name is text"):
        zds.Spans(7)  # type: ignore[arg-type]  # the mistake that is tested
