"""Workers that are killed again and again while one stream runs, or several."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

import zarr_dask_stream as zds
from chaos.scene import (
    Reaper,
    StartCluster,
    assemble_rows,
    assert_all_there,
    assert_no_keys,
    connect,
    within,
    write_rows,
)
from cluster.streaming import slowly
from counted import balanced
from realparts.leaks import LeakCheck

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)]

COUNT = 2000


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, np.ndarray]:
    url = str(tmp_path_factory.mktemp("chaos") / "rows.zarr")
    return url, write_rows(url, COUNT)


@pytest.mark.parametrize(
    ("ordered", "seed"), [pytest.param(True, 1, marks=pytest.mark.sample), (False, 2), (True, 3), (False, 4)]
)
def test_a_worker_killed_every_other_second_costs_no_chunk(
    leak_check: LeakCheck, start_tcp_cluster: StartCluster, place: tuple[str, np.ndarray], ordered: bool, seed: int
) -> None:
    url, data = place
    cluster = start_tcp_cluster(workers=3)
    with connect(cluster) as client, within(120):
        stream = zds.stream_chunks(url, client=client, ordered=ordered).map(slowly(0.008))
        with Reaper(cluster, client, seed=seed) as reaper:
            out = assemble_rows(stream, data)
        assert_all_there(stream.report, out, data)
        assert reaper.kills >= 3
        assert stream.report.batches_lost > 0
        assert_no_keys(client)


def test_a_reduction_counts_each_chunk_once_while_workers_die(
    leak_check: LeakCheck, start_tcp_cluster: StartCluster, place: tuple[str, np.ndarray]
) -> None:
    url, data = place
    cluster = start_tcp_cluster(workers=3)
    with connect(cluster) as client, within(120):
        stream = zds.stream_chunks(url, client=client).map(slowly(0.008))
        reduced = stream.reduce({"sum": zds.reducers.sum(), "count": zds.reducers.count()})
        with Reaper(cluster, client, seed=5) as reaper:
            answer = reduced.compute()
        assert int(answer["sum"]) == int(data.sum(dtype="i8"))
        assert int(answer["count"]) == data.size
        assert reaper.kills >= 3
        assert reduced.report.emitted == COUNT
        assert balanced(reduced.report)
        assert_no_keys(client)


class Consumer(threading.Thread):
    """Takes one stream to its end, in a thread of its own."""

    def __init__(self, stream: zds.ChunkStream, like: np.ndarray, stop_after: int | None = None) -> None:
        super().__init__(name="consumer")
        self.stream = stream
        self.out: Any = None
        self.error: BaseException | None = None
        self._like = like
        self._stop_after = stop_after

    def run(self) -> None:
        try:
            self.out = assemble_rows(self.stream, self._like, self._close_when_due)
        except BaseException as error:  # noqa: BLE001  # judged in the test's own thread
            self.error = error

    def _close_when_due(self, count: int) -> None:
        if count == self._stop_after:
            self.stream.close()


@pytest.mark.sample
def test_streams_side_by_side_outlive_workers_and_a_neighbour_that_is_closed(
    leak_check: LeakCheck, start_tcp_cluster: StartCluster, place: tuple[str, np.ndarray]
) -> None:
    url, data = place
    part = data[:500]
    cluster = start_tcp_cluster(workers=3)
    with connect(cluster) as client, within(120):
        consumers = [
            Consumer(
                zds.stream_chunks(url, client=client, region=slice(0, 500), ordered=ordered).map(
                    slowly(0.006 + n / 1e4)
                ),
                part,
                stop_after=60 if n == 1 else None,
            )
            for n, ordered in enumerate([True, False, False, True])
        ]
        with Reaper(cluster, client, seed=6) as reaper:
            for consumer in consumers:
                consumer.start()
            for consumer in consumers:
                consumer.join(100)
        assert not [consumer.error for consumer in consumers if consumer.error is not None]
        closed = consumers.pop(1)
        assert closed.stream.report.outcome == "stopped early"
        assert closed.stream.report.emitted == 60
        assert balanced(closed.stream.report)
        for consumer in consumers:
            assert consumer.out is not None, "a stream did not come to its end"
            assert_all_there(consumer.stream.report, consumer.out, part)
        assert reaper.kills >= 2
        assert_no_keys(client)
