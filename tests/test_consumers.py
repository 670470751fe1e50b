"""Consumers that are fed: their demand, their failures, their ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import zarr_dask_stream as zds
from asking import CHUNKS, Choking, Collector, counting, flat, interrupt_soon, ledger, numbers
from counted import balanced
from realparts.leaks import LeakCheck
from zarr_dask_stream.testing import LatencyStore

pytestmark = pytest.mark.usefixtures("no_default_client")


@pytest.fixture
def store() -> Any:
    return counting()


@settings(deadline=None, max_examples=10)
@given(high=st.integers(1, 12), low=st.integers(0, 11))
def test_demand_stays_between_its_bounds(high: int, low: int) -> None:
    store = counting()
    collector = Collector(store)
    collector.max_demand, collector.min_demand = high, min(low, high - 1)
    report = zds.stream_chunks(store, concurrency=1).feed(collector)
    assert collector.numbers == list(range(CHUNKS))
    assert max(map(len, collector.batches)) <= high - collector.min_demand
    assert max(collector.ahead) <= high
    assert report.peak_chunks_in_flight <= high
    assert report.outcome == "done"


def test_more_is_asked_for_before_all_is_handled(store: Any) -> None:
    collector = Collector(store)
    collector.max_demand, collector.min_demand = 8, 4
    report = zds.stream_chunks(store).feed(collector)
    assert max(collector.ahead) > 4, "while a batch of at most four is handled, others are read"
    assert max(collector.ahead) <= 8
    assert report.peak_chunks_in_flight <= 8


@pytest.mark.parametrize("how", ["demand", "partition", "broadcast"])
def test_several_consumers(store: Any, concurrency: int | None, how: Any, leak_check: LeakCheck) -> None:
    collectors = [Collector() for _ in range(3)]
    for collector in collectors:
        collector.max_demand = 4
    key = (lambda index: index[0] % 3) if how == "partition" else None
    stream = zds.stream_chunks(store, concurrency=concurrency)
    report = stream.feed(*collectors, how=how, key=key)
    assert report is stream.report
    parts = [collector.numbers for collector in collectors]
    if how == "broadcast":
        assert parts == [list(range(CHUNKS))] * 3
        assert report.peak_chunks_in_flight <= 4
    elif how == "partition":
        assert parts == [list(range(first, CHUNKS, 3)) for first in range(3)]
        assert report.peak_chunks_in_flight <= 12
    else:
        assert sorted(flat(parts)) == list(range(CHUNKS))
        assert report.peak_chunks_in_flight <= 12
    assert (report.outcome, report.emitted) == ("done", CHUNKS)


@pytest.mark.parametrize("count", [1, 3])
def test_what_a_consumer_raises_stops_the_stream(store: Any, count: int, leak_check: LeakCheck) -> None:
    stream = zds.stream_chunks(store)
    consumers = [Choking() for _ in range(count)]
    with pytest.raises(ZeroDivisionError, match="seven") as caught:
        stream.feed(*consumers)
    [note] = caught.value.__notes__
    assert note.startswith("raised by Choking.handle_items on chunks (")
    assert "(7,)" in note
    assert 'on_error = "skip" on the consumer' in note
    assert stream.report.outcome == "stopped early"
    assert len(flat(consumer.numbers for consumer in consumers)) < CHUNKS - 1
    assert balanced(stream.report)


def test_skip_goes_on_without_what_failed(
    store: Any, tmp_path: Path, concurrency: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    consumer = Choking()
    consumer.on_error = "skip"
    stream = zds.stream_chunks(store, concurrency=concurrency, checkpoint=ledger(tmp_path))
    report = stream.feed(consumer)
    assert consumer.numbers == [n for n in range(CHUNKS) if n != 7]
    assert "Choking failed on chunks (7,): ZeroDivisionError('seven')" in caplog.text
    assert report.emitted == CHUNKS
    again = Collector()
    stream.feed(again)
    assert again.numbers == [7], "it was not done"


def test_a_consumer_hears_of_its_failures(store: Any) -> None:
    class Hearing(Choking):
        on_error = "skip"
        heard: Any = None

        def handle_error(self, items: list[zds.Chunk], error: Exception) -> None:
            self.heard = (numbers(items), error)

    consumer = Hearing()
    zds.stream_chunks(store, concurrency=1).feed(consumer)
    assert consumer.heard[0] == [7]
    assert isinstance(consumer.heard[1], ZeroDivisionError)


def test_chunk_errors_end_all_consumers(store: Any) -> None:
    store.break_reads({"c/9": PermissionError("not yours")})
    with pytest.raises(zds.ChunkError, match="not yours"):
        zds.stream_chunks(store).feed(Collector(), Collector())


def test_ctrl_c_while_consumers_are_fed(leak_check: LeakCheck) -> None:
    store = counting(LatencyStore({}, delay_s=0.2))
    stream = zds.stream_chunks(store)
    interrupt_soon()
    with pytest.raises(KeyboardInterrupt):
        stream.feed(Collector(), Collector())
    assert stream.report.outcome == "stopped early"
    assert balanced(stream.report)


def bad(**attributes: Any) -> zds.Consumer:
    consumer = Collector()
    consumer.__dict__.update(attributes)
    return consumer


@pytest.mark.parametrize(
    ("consumer", "match"),
    [
        (print, "derived from zds.Consumer"),
        (Collector, "derived from zds.Consumer"),
        (zds.Consumer(), "has no handle_items"),
        (bad(max_demand=0), "max_demand of Collector"),
        (bad(max_demand=2.5), "max_demand of Collector"),
        (bad(max_demand=4, min_demand=4), "min_demand of Collector"),
        (bad(min_demand=-1), "min_demand of Collector"),
        (bad(on_error="ignore"), "on_error of Collector"),
    ],
)
def test_bad_consumers(store: Any, consumer: Any, match: str) -> None:
    stream = zds.stream_chunks(store, concurrency=1)
    with pytest.raises(zds.UsageError, match=match):
        stream.feed(consumer)
    with pytest.raises(zds.UsageError, match="at least one"):
        stream.feed()
