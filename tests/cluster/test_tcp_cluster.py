"""The stream on a scheduler and workers that are processes of their own, and that die, hang, come and go."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client, Future

import zarr_dask_stream as zds
from cluster.streaming import CHUNK_COUNT, Total, assemble, slowly, write_array
from counted import balanced
from realparts.cluster import TcpCluster, run_cluster
from realparts.process import wait_until
from zarr_dask_stream.engine import dask_executor
from zarr_dask_stream.engine.events import ClusterChanged, Notice

pytestmark = pytest.mark.cluster

StartCluster = Callable[..., TcpCluster]

#: Nobody waits longer than this for anything here; a stream that hangs fails by it.
BOUND_S = 60.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, np.ndarray]:
    url = str(tmp_path_factory.mktemp("tcp") / "array.zarr")
    return url, write_array(url)


@pytest.fixture
def url(place: tuple[str, np.ndarray]) -> str:
    return place[0]


@pytest.fixture
def data(place: tuple[str, np.ndarray]) -> np.ndarray:
    return place[1]


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A cluster for tests that leave it as they found it; its workers have nannies, so that they come back."""
    with run_cluster(tmp_path_factory.mktemp("steady"), worker_arguments=["--nanny"]) as cluster, connect(cluster) as c:
        yield c


def connect(cluster: TcpCluster) -> Client:
    return Client(cluster.address, set_as_default=False)


def pid_after(seconds: float) -> Any:
    """Return a slow function that says which process ran it."""

    def whose(_: zds.Chunk) -> int:
        time.sleep(seconds)
        return os.getpid()

    return whose


def heavy_pid(seconds: float) -> Any:
    """Return the same with two megabytes to carry."""
    carry = heavy(seconds)

    def whose(chunk: zds.Chunk) -> int:
        carry(chunk)
        return os.getpid()

    return whose


def heavy(seconds: float) -> Any:
    """Return a slow function that carries two megabytes with it."""
    ballast = np.random.default_rng(1).integers(0, 255, 2_000_000, dtype="u1")

    def carry(chunk: zds.Chunk) -> Any:
        assert ballast.size == 2_000_000
        time.sleep(seconds)
        return chunk.data

    return carry


# -- the main path ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [True, False])
def test_streams_whole_array(steady: Client, url: str, data: np.ndarray, ordered: bool) -> None:
    stream = zds.stream_chunks(url, client=steady, ordered=ordered)
    np.testing.assert_array_equal(assemble(stream), data)
    assert stream.report.emitted == CHUNK_COUNT
    assert stream.reduce(Total()).compute() == int(data.sum())
    assert balanced(stream.report)


# -- workers that die, join and are not there -----------------------------------------------------------


@pytest.mark.parametrize("function", [slowly, pytest.param(heavy, marks=pytest.mark.slow)])
def test_a_killed_worker_costs_no_chunk(tcp_cluster: TcpCluster, url: str, data: np.ndarray, function: Any) -> None:
    begin = time.monotonic()
    with connect(tcp_cluster) as client:
        stream = zds.stream_chunks(url, client=client).map(function(0.03))
        out = np.zeros_like(data)
        for count, chunk in enumerate(stream):
            out[chunk.region] = chunk.data
            if count == 10:
                tcp_cluster.kill(tcp_cluster.worker_pids[0])
    np.testing.assert_array_equal(out, data)
    assert stream.report.emitted == CHUNK_COUNT
    assert balanced(stream.report)
    assert time.monotonic() - begin < BOUND_S


@pytest.mark.parametrize("function", [pytest.param(slowly, marks=pytest.mark.slow), heavy])
def test_when_all_workers_die_the_stream_waits_for_new_ones(
    start_tcp_cluster: StartCluster, url: str, data: np.ndarray, function: Any, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = start_tcp_cluster(workers=1)
    with connect(cluster) as client:
        stream = zds.stream_chunks(url, client=client).map(function(0.01))
        out = np.zeros_like(data)
        for count, chunk in enumerate(stream):
            out[chunk.region] = chunk.data
            if count == 10:
                cluster.kill(cluster.worker_pids[0])
                cluster.add_worker()
    np.testing.assert_array_equal(out, data)
    assert balanced(stream.report)


@pytest.mark.parametrize("function", [pid_after, pytest.param(heavy_pid, marks=pytest.mark.slow)])
def test_a_worker_that_joins_gets_work(start_tcp_cluster: StartCluster, url: str, function: Any) -> None:
    cluster = start_tcp_cluster(workers=1)
    with connect(cluster) as client:
        ran_in: set[int] = set()
        # A window of eight keeps batches at one chunk: there is always a next one for whoever joins.
        for count, chunk in enumerate(zds.stream_chunks(url, client=client, concurrency=8).map(function(0.05))):
            ran_in.add(chunk.data)
            if count == 3:
                cluster.add_worker()
                cluster.wait(2)
        assert ran_in == set(client.run(os.getpid).values())
        assert len(ran_in) == 2


@pytest.mark.parametrize("function", [slowly, pytest.param(heavy, marks=pytest.mark.slow)])
def test_a_cluster_without_workers_is_named_and_waited_for(
    start_tcp_cluster: StartCluster, url: str, data: np.ndarray, caplog: pytest.LogCaptureFixture, function: Any
) -> None:
    cluster = start_tcp_cluster(workers=0)
    waits: list[float] = []

    def listen(notice: Notice) -> None:
        if isinstance(notice, ClusterChanged) and notice.waiting_s:
            waits.append(notice.waiting_s)

    def warned() -> bool:
        return any("no Dask worker" in record.message for record in caplog.records)

    def join_when_warned() -> None:
        wait_until(warned, what="the warning", timeout_s=20)
        cluster.add_worker()

    joiner = threading.Thread(target=join_when_warned)
    with connect(cluster) as client, caplog.at_level(logging.WARNING, "zarr_dask_stream"):
        joiner.start()
        stream = zds.stream_chunks(url, client=client, callbacks=[listen]).map(function(0))
        np.testing.assert_array_equal(assemble(stream), data)
        joiner.join()
    assert warned()
    assert 1 < waits[0] < 15


# -- a scheduler that is gone -----------------------------------------------------------------------------


def expect_cluster_error(stream: zds.ChunkStream, when: int, what: Callable[[], Any]) -> float:
    """Do something in mid-stream; return how long it then took until the ClusterError."""
    begin = 0.0

    def consume() -> None:
        nonlocal begin
        for count, _ in enumerate(stream):
            if count == when:
                begin = time.monotonic()
                what()

    with pytest.raises(zds.ClusterError) as caught:
        consume()
    assert begin, "the stream failed before anything was done to it"
    assert stream.report.outcome == "failed"
    assert balanced(stream.report)
    assert "scheduler tcp://" in str(caught.value)
    return time.monotonic() - begin


def test_a_killed_scheduler_is_an_error(tcp_cluster: TcpCluster, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_executor, "_RECONNECT_S", 2.0)
    with connect(tcp_cluster) as client:
        stream = zds.stream_chunks(url, client=client).map(slowly(0.05))
        took = expect_cluster_error(stream, 10, lambda: tcp_cluster.kill(tcp_cluster.scheduler.pid))
    assert took < 20


def test_a_frozen_scheduler_is_an_error(tcp_cluster: TcpCluster, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_executor, "_SILENT_S", 2.0)
    monkeypatch.setattr(dask_executor, "_GOODBYE_S", 1.0)
    scheduler = tcp_cluster.scheduler.pid
    with connect(tcp_cluster) as client:
        stream = zds.stream_chunks(url, client=client).map(slowly(0.05))
        try:
            took = expect_cluster_error(stream, 10, lambda: os.kill(scheduler, signal.SIGSTOP))
        finally:
            os.kill(scheduler, signal.SIGCONT)
    assert took < 20


@pytest.mark.parametrize("waiting", [True, False], ids=["while it waits", "between two chunks"])
def test_a_client_that_is_closed_in_mid_stream_is_an_error(
    start_tcp_cluster: StartCluster, steady: Client, url: str, waiting: bool
) -> None:
    assert steady.scheduler is not None
    client = Client(steady.scheduler.address, set_as_default=False)
    stream = zds.stream_chunks(url, client=client, concurrency=2).map(slowly(0.3))

    def close() -> None:
        if waiting:
            threading.Timer(0.15, client.close).start()
        else:
            client.close()

    assert expect_cluster_error(stream, 5, close) < 20


@pytest.mark.timeout(90)
def test_a_scheduler_that_comes_back_finds_its_stream_waiting(
    start_tcp_cluster: StartCluster, url: str, data: np.ndarray
) -> None:
    cluster = start_tcp_cluster(workers=1)

    def restart() -> None:
        cluster.kill(cluster.scheduler.pid)
        cluster.restart_scheduler()
        for _ in range(2):
            cluster.add_worker()
        cluster.wait(2)

    with connect(cluster) as client:
        stream = zds.stream_chunks(url, client=client, concurrency=16).map(slowly(0.02))
        out = np.zeros_like(data)
        for count, chunk in enumerate(stream):
            out[chunk.region] = chunk.data
            if count == 20:
                restart()
            if count == 60:  # the new scheduler has to tell of deaths too
                cluster.kill(cluster.worker_pids[-1])
        np.testing.assert_array_equal(out, data)
        assert stream.report.batches_lost > 0
        assert balanced(stream.report)
        assert sum(1 for _ in zds.stream_chunks(url, client=client)) == CHUNK_COUNT, "a new stream on the same client"


@pytest.mark.timeout(90)
def test_a_scheduler_that_stays_away_ends_the_stream_and_another_goes_on_with_it(
    start_tcp_cluster: StartCluster, url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = start_tcp_cluster(workers=2)
    ledger = tmp_path / "ledger"
    first: list[tuple[int, ...]] = []

    def take_all(stream: zds.ChunkStream, into: list[tuple[int, ...]]) -> None:
        for chunk in stream:
            into.append(chunk.index)
            if len(into) == 20 and cluster.scheduler.alive:
                cluster.kill(cluster.scheduler.pid)

    client = Client(cluster.address, timeout=2)  # so long it looks for its scheduler before it gives up
    stream = zds.stream_chunks(url, checkpoint=ledger).map(slowly(0.02))
    with pytest.raises(
        zds.ClusterError, match=r"in vain.*scheduler tcp://.*a client of a cluster that runs.*checkpoint"
    ):
        take_all(stream, first)
    assert stream.report.outcome == "failed"
    assert balanced(stream.report)
    with pytest.raises(zds.UsageError, match=r"closed: make a new distributed\.Client"):
        zds.stream_chunks(url, client=client)
    again = start_tcp_cluster(workers=1)
    second: list[tuple[int, ...]] = []
    with connect(again) as other:
        resumed = zds.stream_chunks(url, client=other, checkpoint=ledger).map(slowly(0.02))
        take_all(resumed, second)
    assert resumed.report.outcome == "done"
    assert {*first, *second} == {(i, j) for i in range(10) for j in range(10)}
    assert len(first) + len(second) <= CHUNK_COUNT + 1, "the chunk that was in hand may come twice"
    # Without client=, a stream goes on inside this process, but not in silence.
    with caplog.at_level(logging.WARNING, "zarr_dask_stream"):
        for _ in range(2):
            assert sum(1 for _ in zds.stream_chunks(url, region=slice(0, 6))) == 10
    lost = [record.message for record in caplog.records if "has lost its scheduler" in record.message]
    assert len(lost) == 1
    assert "make a new distributed.Client" in lost[0]
    assert client.status == "closed"


def test_a_closed_client_is_no_lost_one(start_tcp_cluster: StartCluster, url: str, steady: Client, caplog: Any) -> None:
    assert steady.scheduler is not None
    with Client(steady.scheduler.address):
        assert sum(1 for _ in zds.stream_chunks(url, region=slice(0, 6))) == 10
    with caplog.at_level(logging.WARNING, "zarr_dask_stream"):
        assert sum(1 for _ in zds.stream_chunks(url, region=slice(0, 6), concurrency=1)) == 10
    assert not caplog.records


# -- futures that are taken away ----------------------------------------------------------------------------


@pytest.mark.parametrize("function", [pytest.param(slowly, marks=pytest.mark.slow), heavy])
@pytest.mark.parametrize("how", ["cancel", "restart"])
def test_futures_taken_away_from_outside_are_read_again(
    steady: Client, url: str, data: np.ndarray, how: str, function: Any
) -> None:
    stream = zds.stream_chunks(url, client=steady, ordered=False).map(function(0.02))
    out = np.zeros_like(data)
    for count, chunk in enumerate(stream):
        out[chunk.region] = chunk.data
        if count == 10:
            if how == "cancel":
                steady.cancel([Future(key, steady) for key in list(steady.futures)], force=True)
            else:
                steady.restart(timeout=30)
    np.testing.assert_array_equal(out, data)
    assert stream.report.emitted == CHUNK_COUNT
    assert balanced(stream.report)


# -- chunks that kill their worker ----------------------------------------------------------------------------


def deadly(chunk: zds.Chunk) -> Any:
    if chunk.index == (3, 3):
        os._exit(1)
    return chunk.data


def assert_only_the_guilty_dies(cluster: TcpCluster, url: str, data: np.ndarray) -> zds.Report:
    with connect(cluster) as client:
        stream = zds.stream_chunks(url, client=client, on_error="skip").map(deadly)
        out = assemble(stream)
    expected = data.copy()
    expected[18:24, 15:20] = -7
    np.testing.assert_array_equal(out, expected)
    (letter,) = stream.report.dead_letters
    assert letter.index == (3, 3)
    assert "worker" in letter.message + letter.reason
    assert "died" in letter.message
    assert stream.report.emitted == CHUNK_COUNT - 1
    assert balanced(stream.report)
    return stream.report


def test_a_chunk_that_kills_its_worker_is_given_up_alone(
    start_tcp_cluster: StartCluster, url: str, data: np.ndarray
) -> None:
    cluster = start_tcp_cluster(
        workers=2, worker_arguments=["--nanny"], env={"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"}
    )
    assert_only_the_guilty_dies(cluster, url, data)


def deadly_first(chunk: zds.Chunk) -> Any:
    if chunk.index == (0, 0):
        os._exit(1)
    return chunk.data


@pytest.mark.timeout(60)
def test_a_worker_may_die_before_the_client_has_finished_sending(
    start_tcp_cluster: StartCluster, url: str, data: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = start_tcp_cluster(workers=2, worker_arguments=["--nanny"])
    with connect(cluster) as client:
        compute = client.compute
        sent = 0

        def deaths() -> int:
            return sum(message.get("action") == "remove-worker" for _, message in client.get_events("all"))

        def compute_slowly(*tasks: Any, **options: Any) -> Any:
            nonlocal sent
            futures = compute(*tasks, **options)
            sent += 1
            if sent == 1:  # as where the machine is busy: the tasks are out, and the sender does not come back to life
                wait_until(lambda: deaths() > 0, what="a worker to die", timeout_s=20)
                time.sleep(0.2)
            return futures

        monkeypatch.setattr(client, "compute", compute_slowly)
        stream = zds.stream_chunks(url, client=client, on_error="skip").map(deadly_first)
        out = assemble(stream)
    expected = data.copy()
    expected[:6, :5] = -7
    np.testing.assert_array_equal(out, expected)
    assert [letter.index for letter in stream.report.dead_letters] == [(0, 0)]
    assert balanced(stream.report)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_chunk_that_kills_its_worker_is_given_up_alone_as_dask_comes(
    start_tcp_cluster: StartCluster, url: str, data: np.ndarray
) -> None:
    assert_only_the_guilty_dies(start_tcp_cluster(workers=2, worker_arguments=["--nanny"]), url, data)
