"""Pausing, resuming, draining and changing the rate while a real cluster is at work."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client

import zarr_dask_stream as zds
from chaos.scene import NOTHING, assemble_rows, assert_all_there, within, write_rows
from counted import balanced
from realparts.http_files import HttpStore
from realparts.leaks import LeakCheck
from realparts.process import wait_until
from zarr_dask_stream.engine.events import BatchFinished, BatchSubmitted, Notice

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]


def chunk_requests(store: HttpStore) -> int:
    """Count how often chunks were asked for."""
    return sum("/c/" in path for method, path, _ in list(store.requests) if method == "GET")


class Watch:
    """Knows how many chunks were submitted, and how many of those batches are back."""

    def __init__(self) -> None:
        self.submitted = 0
        self.out = 0

    def __call__(self, notice: Notice) -> None:
        if isinstance(notice, BatchSubmitted):
            self.submitted += notice.batch.count
            self.out += 1
        elif isinstance(notice, BatchFinished):
            self.out -= 1


class Taker(threading.Thread):
    """Takes a stream to its end in the background."""

    def __init__(self, stream: zds.ChunkStream, like: np.ndarray) -> None:
        super().__init__(name="taker")
        self.stream = stream
        self.taken = 0
        self.out: Any = None
        self.error: BaseException | None = None
        self._like = like

    def run(self) -> None:
        try:
            self.out = assemble_rows(self.stream, self._like, self._count)
        except BaseException as error:  # noqa: BLE001  # judged in the test's own thread
            self.error = error

    def _count(self, count: int) -> None:
        self.taken = count

    def wait_for(self, count: int) -> None:
        wait_until(lambda: self.taken >= count or not self.is_alive(), what=f"{count} chunks", timeout_s=60)
        assert self.error is None
        assert self.is_alive(), "the stream ended too early for this test"

    def finish(self) -> None:
        self.join(60)
        assert not self.is_alive(), "the stream does not come to its end"
        assert self.error is None


@pytest.mark.slow
@pytest.mark.parametrize("ordered", [pytest.param(True, marks=pytest.mark.sample), False])
def test_a_paused_stream_asks_for_nothing(
    client: Client, leak_check: LeakCheck, http_store: HttpStore, ordered: bool
) -> None:
    data = write_rows(str(http_store.directory / "rows.zarr"), 600)
    watch = Watch()
    stream = zds.stream_chunks(
        f"{http_store.url}/rows.zarr", client=client, ordered=ordered, concurrency=16, callbacks=[watch]
    )
    taker = Taker(stream, data)
    with within(60):
        taker.start()
        for after in (50, 250):
            taker.wait_for(after)
            stream.pause()
            wait_until(lambda: watch.out == 0, what="what was in flight", timeout_s=20)
            time.sleep(0.1)  # an instruction may have been on its way while we looked
            wait_until(lambda: watch.out == 0, what="what was in flight", timeout_s=20)
            submitted, asked = watch.submitted, chunk_requests(http_store)
            time.sleep(1.0)
            assert (watch.submitted, chunk_requests(http_store)) == (submitted, asked)
            assert taker.taken == submitted < 600, "all that came back is handed out while paused"
            stream.resume()
        taker.finish()
    assert_all_there(stream.report, taker.out, data)
    assert chunk_requests(http_store) == 600


@pytest.mark.parametrize("concurrency", [1, None])
def test_a_stream_that_is_paused_before_it_is_iterated_begins_when_it_is_resumed(
    tmp_path: Path, leak_check: LeakCheck, caplog: pytest.LogCaptureFixture, concurrency: int | None
) -> None:
    data = write_rows(str(tmp_path / "rows.zarr"), 20)
    watch = Watch()
    stream = zds.stream_chunks(str(tmp_path / "rows.zarr"), concurrency=concurrency, callbacks=[watch])
    stream.pause()
    taker = Taker(stream, data)
    with within(30):
        taker.start()
        wait_until(lambda: "resume()" in caplog.text, what="the stream to say that it is paused", timeout_s=20)
        time.sleep(0.2)
        assert watch.submitted == 0
        stream.resume()
        taker.finish()
    assert_all_there(stream.report, taker.out, data)
    assert len(list(stream)) == 20, "and a later run is not paused"


@pytest.mark.slow
@pytest.mark.parametrize("ordered", [pytest.param(True, marks=pytest.mark.sample), False])
def test_a_drained_stream_keeps_what_was_in_flight(
    *, client: Client, leak_check: LeakCheck, http_store: HttpStore, tmp_path: Path, ordered: bool
) -> None:
    data = write_rows(str(http_store.directory / "rows.zarr"), 600)
    ledger = tmp_path / "ledger.json"
    parts: list[np.ndarray] = []
    asked: list[int] = []
    with within(60):
        for stop_after in (30, 120, None):
            watch = Watch()
            stream = zds.stream_chunks(
                f"{http_store.url}/rows.zarr",
                client=client,
                ordered=ordered,
                concurrency=16,
                checkpoint=ledger,
                callbacks=[watch],
            )
            at_drain = 0

            def drain_when_due(
                count: int, stream: zds.ChunkStream = stream, watch: Watch = watch, due: int | None = stop_after
            ) -> None:
                nonlocal at_drain
                if count == due:
                    stream.drain()
                    at_drain = watch.submitted

            before = chunk_requests(http_store)
            parts.append(assemble_rows(stream, data, drain_when_due))
            asked.append(chunk_requests(http_store) - before)
            assert balanced(stream.report)
            assert asked[-1] == stream.report.emitted == watch.submitted
            if stop_after is not None:
                assert stream.report.emitted == at_drain > stop_after, "what was in flight is handed out, no more"
                assert stream.report.outcome == "stopped early"
    assert stream.report.outcome == "done"
    assert sum(asked) == 600
    assert ((np.stack(parts) != NOTHING).all(axis=2).sum(axis=0) == 1).all()
    np.testing.assert_array_equal(np.max(parts, axis=0), data)


@pytest.mark.slow
@pytest.mark.sample
def test_a_rate_that_changes_on_the_way_bounds_the_requests(
    client: Client, leak_check: LeakCheck, http_store: HttpStore
) -> None:
    data = write_rows(str(http_store.directory / "rows.zarr"), 600)
    stream = zds.stream_chunks(f"{http_store.url}/rows.zarr", client=client, concurrency=32)
    stream.rate_limit = zds.RateLimit(requests=100)
    taker = Taker(stream, data)
    with within(60):
        taker.start()
        taker.wait_for(5)
        for rate in (40, 10):
            stream.rate_limit = zds.RateLimit(requests=rate)
            time.sleep(1.0)  # what was under way at another rate comes in
            begin, asked = time.monotonic(), chunk_requests(http_store)
            time.sleep(2.5)
            asked = chunk_requests(http_store) - asked
            took = time.monotonic() - begin
            # The bucket holds a quarter of a second's worth.
            assert 0.6 * rate * took <= asked <= rate * (took + 0.25) + 2, f"at {rate}/s: {asked} in {took:.2f} s"
        stream.rate_limit = None
        begin = time.monotonic()
        taker.finish()
        assert time.monotonic() - begin < 15
    assert_all_there(stream.report, taker.out, data)
    assert chunk_requests(http_store) == 600
