"""What Prometheus is told: names, units, sums over runs, and nothing that is secret."""

import sys
import threading
from typing import Any

import numpy as np
import prometheus_client
import pytest
import zarr
from prometheus_client.parser import text_string_to_metric_families

import zarr_dask_stream as zds
from zarr_dask_stream.engine.events import BatchResult, BatchStats, Category, Failure
from zarr_dask_stream.engine.tally import Tally
from zarr_dask_stream.watch.metrics import (
    METRICS,
    WORKER_METRICS,
    Exporter,
    Metric,
    _WorkerCollector,
    export_worker,
    exporter,
)


@pytest.fixture
def registry() -> prometheus_client.CollectorRegistry:
    return prometheus_client.CollectorRegistry()


def some_array(chunks: int = 6) -> Any:
    array = zarr.create_array({}, shape=(2 * chunks,), chunks=(2,), dtype="i4")
    array[:] = np.arange(2 * chunks)
    return array


def scrape(registry: prometheus_client.CollectorRegistry) -> dict[str, float]:
    """Return samples as a scraper reads them, by name and labels."""
    text = prometheus_client.generate_latest(registry).decode()
    return {
        sample.name + "".join(f" {label}={value}" for label, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_streams_count_under_their_names(registry: prometheus_client.CollectorRegistry) -> None:
    stream = zds.stream_chunks(some_array(), concurrency=1, callbacks=[zds.Metrics("one", registry)])
    report = stream.filter(lambda chunk: chunk.index[0] != 2).run()
    found = scrape(registry)
    assert found["zds_chunks_total outcome=emitted stream=one"] == 5
    assert found["zds_chunks_total outcome=filtered stream=one"] == 1
    assert found["zds_chunks_total outcome=dead_lettered stream=one"] == 0
    assert found["zds_runs_total outcome=done stream=one"] == 1
    assert found["zds_decoded_bytes_total stream=one"] == report.bytes_decoded == 48
    assert found["zds_stored_bytes_total stream=one"] == report.bytes_stored
    assert found["zds_phase_seconds_total phase=fetch stream=one"] == pytest.approx(report.time["fetch"])
    assert found["zds_chunk_read_seconds_count stream=one"] == 6
    assert found["zds_chunk_read_seconds_bucket le=+Inf stream=one"] == 6
    spent = report.time["fetch"] + report.time["decode"]
    assert found["zds_chunk_read_seconds_sum stream=one"] == pytest.approx(spent)
    assert found["zds_active_runs stream=one"] == 0
    assert found["zds_in_flight_chunks stream=one"] == 0


def test_a_run_is_seen_while_it_goes_on(registry: prometheus_client.CollectorRegistry) -> None:
    stream = zds.stream_chunks(some_array(), concurrency=1, callbacks=[zds.Metrics("one", registry)])
    items = iter(stream)
    next(items)
    next(items)
    found = scrape(registry)
    assert found["zds_active_runs stream=one"] == 1
    assert found["zds_planned_chunks stream=one"] == 6
    assert 1 <= found["zds_chunks_total outcome=emitted stream=one"] <= 2
    assert found["zds_runs_total outcome=done stream=one"] == 0
    assert len(list(items)) == 4
    found = scrape(registry)
    assert found["zds_active_runs stream=one"] == 0
    assert found["zds_chunks_total outcome=emitted stream=one"] == 6


def test_counters_never_fall_from_run_to_run(registry: prometheus_client.CollectorRegistry) -> None:
    metrics = zds.Metrics("one", registry)
    stream = zds.stream_chunks(some_array(), concurrency=1, callbacks=[metrics])
    last = 0.0
    for _ in range(3):
        for _ in stream:
            now = scrape(registry).get("zds_chunks_total outcome=emitted stream=one", 0.0)
            assert now >= last
            last = now
    assert scrape(registry)["zds_chunks_total outcome=emitted stream=one"] == 18


def test_streams_at_the_same_time_are_kept_apart_and_added_up(
    registry: prometheus_client.CollectorRegistry,
) -> None:
    metrics = zds.Metrics(registry=registry)
    one = zds.stream_chunks(some_array(), concurrency=1, callbacks=[metrics])
    items, others = iter(one), iter(one)
    next(items)
    next(others)
    found = scrape(registry)
    (name,) = {key for key in found if key.startswith("zds_active_runs")}
    assert found[name] == 2
    assert found[name.replace("zds_active_runs", "zds_planned_chunks")] == 12
    list(items)
    list(others)
    assert scrape(registry)[name.replace("zds_active_runs", "zds_chunks_total outcome=emitted")] == 12


def test_two_observers_share_a_registry(registry: prometheus_client.CollectorRegistry) -> None:
    for name in ("one", "two", "one"):
        zds.stream_chunks(some_array(), concurrency=1, callbacks=[zds.Metrics(name, registry)]).run()
    found = scrape(registry)
    assert found["zds_chunks_total outcome=emitted stream=one"] == 12
    assert found["zds_chunks_total outcome=emitted stream=two"] == 6
    assert exporter(registry) is exporter(registry)


def test_scrapes_in_mid_run_count_nothing_twice(registry: prometheus_client.CollectorRegistry) -> None:
    stream = zds.stream_chunks(some_array(300), concurrency=1, callbacks=[zds.Metrics("one", registry)])
    over = threading.Event()
    seen: list[float] = []

    def scraping() -> None:
        while not over.is_set():
            seen.append(scrape(registry).get("zds_chunks_total outcome=emitted stream=one", 0.0))

    scraper = threading.Thread(target=scraping)
    scraper.start()
    try:
        for _ in range(3):
            stream.run()
    finally:
        over.set()
        scraper.join()
    assert seen == sorted(seen)
    assert scrape(registry)["zds_chunks_total outcome=emitted stream=one"] == 900


def test_the_histogram_is_cumulative_and_exact_at_its_bounds(registry: prometheus_client.CollectorRegistry) -> None:
    exporter(registry).update(
        1, "one", {"latency": {"-3": 5, "0": 2, "40": 1}, "seconds": {"fetch": 2.0, "decode": 1.0}}, over=True
    )
    found = scrape(registry)
    at = {bound: found[f"zds_chunk_read_seconds_bucket le={bound} stream=one"] for bound in ("0.0625", "0.125", "1.0")}
    assert at == {"0.0625": 0, "0.125": 5, "1.0": 7}
    assert found["zds_chunk_read_seconds_bucket le=+Inf stream=one"] == 8
    assert found["zds_chunk_read_seconds_sum stream=one"] == 3.0
    bounds = [float(key.split("le=")[1].split()[0]) for key in found if "_bucket" in key]
    assert bounds == sorted(bounds)


def test_an_update_counts_what_is_new_in_it() -> None:
    told = Exporter()
    for emitted, over in ((2, False), (5, False), (5, True)):
        told.update("run", "one", {"chunks": {"emitted": emitted}}, planned=7, in_flight=2, over=over)
    families = {family.name: family for family in told.collect()}
    (sample,) = [one for one in families["zds_chunks"].samples if one.labels["outcome"] == "emitted"]
    assert sample.value == 5
    assert families["zds_active_runs"].samples[0].value == 0


@pytest.mark.parametrize("metric", [*METRICS, *WORKER_METRICS], ids=lambda metric: metric.name)
def test_names_follow_the_conventions(metric: Metric) -> None:
    assert metric.name.startswith("zds_")
    assert not metric.name.endswith(("_total", "_count", "_sum", "_bucket", "_info"))
    assert metric.help.endswith(".")
    assert metric.sample.endswith("_total") == (metric.type == "counter")
    for unit in ("_s", "_ms", "_milliseconds", "_kb", "_mib", "_mb"):
        assert not metric.name.endswith(unit), "metrics have base units: seconds and bytes"


def test_credentials_are_not_in_the_labels(registry: prometheus_client.CollectorRegistry, http_store: object) -> None:
    array = zarr.create_array(f"{http_store.directory}/a.zarr", shape=(4,), chunks=(2,), dtype="i4")  # type: ignore[attr-defined]  # a fixture
    array[:] = 1
    url = f"{http_store.url}/a.zarr".replace("http://", "http://anna:hunter2@")  # type: ignore[attr-defined]  # a fixture
    zds.stream_chunks(url, concurrency=1, callbacks=[zds.Metrics(registry=registry)]).run()
    text = prometheus_client.generate_latest(registry).decode()
    assert "a.zarr" in text
    assert "hunter2" not in text
    assert "anna" not in text


def test_a_worker_shows_what_it_did(registry: prometheus_client.CollectorRegistry) -> None:
    tally = Tally()
    failures = [Failure(3, Category.NOT_VISIBLE, "OSError", "no")]
    tally.add(BatchResult(numbers=[0, 1], failures=failures, stats=BatchStats(fetch_s=0.5, latency={-8: 2})))
    registry.register(_WorkerCollector(tally.copy))
    found = scrape(registry)
    assert found["zds_worker_chunks_total outcome=done"] == 2
    assert found["zds_worker_chunks_total outcome=failed"] == 1
    assert found["zds_worker_failures_total category=not visible"] == 1
    assert found["zds_worker_phase_seconds_total phase=fetch"] == 0.5
    assert found["zds_worker_batches_total"] == 1
    assert found["zds_worker_chunk_read_seconds_bucket le=1.0"] == 2
    assert found["zds_worker_hung_threads"] == 0


def test_a_worker_is_registered_once(registry: prometheus_client.CollectorRegistry) -> None:
    export_worker(registry)
    export_worker(registry)
    assert len([key for key in scrape(registry) if key == "zds_worker_batches_total"]) == 1


def test_without_prometheus_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(zds.UsageError, match=r"zarr-dask-stream\[metrics\]"):
        zds.Metrics()


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(zds.UsageError, match="name is text"):
        zds.Metrics(7)  # type: ignore[arg-type]  # the mistake that is tested
    with pytest.raises(zds.UsageError, match="CollectorRegistry"):
        zds.Metrics("one", registry="default")
