"""What the chaos tests share: arrays in which every element differs, streams put together again, the last look."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import zarr
from distributed import Client

import zarr_dask_stream as zds
from counted import balanced
from realparts.cluster import TcpCluster
from realparts.leaks import keys_left
from realparts.process import Process, wait_until

StartCluster = Callable[..., TcpCluster]

#: Stands where no chunk was put; stored nowhere.
NOTHING = -7


def connect(cluster: TcpCluster) -> Client:
    """Return a client that no other test takes for its own."""
    return Client(cluster.address, set_as_default=False)


def write_rows(target: Any, count: int, width: int = 64, **options: Any) -> np.ndarray:
    """Store `count` chunks of one row each and return the whole; the fill value occurs nowhere in it."""
    array = zarr.create_array(
        target, shape=(count, width), chunks=(1, width), dtype="i4", fill_value=-1, overwrite=True, **options
    )
    data = np.arange(count * width, dtype="i4").reshape(count, width)
    array[:] = data
    return data


def assemble_rows(stream: Iterable[zds.Chunk], like: np.ndarray, after_each: Callable[[int], Any] | None = None) -> Any:
    """Put chunks together; one that comes twice fails. `after_each` hears how many there were."""
    out = np.full_like(like, NOTHING)
    seen: set[tuple[int, ...]] = set()
    for count, chunk in enumerate(stream, 1):
        assert chunk.index not in seen, f"{chunk.index} came twice"
        assert not chunk.missing, f"{chunk.index} was read as fill values"
        seen.add(chunk.index)
        out[chunk.region] = chunk.data
        if after_each is not None:
            after_each(count)
    return out


def assert_all_there(report: zds.Report, out: np.ndarray, data: np.ndarray) -> None:
    """Require every row, bit for bit, and a report that says so."""
    np.testing.assert_array_equal(out, data)
    assert report.outcome == "done"
    assert report.emitted == report.total == len(data)
    assert not report.dead_letters
    assert balanced(report)


def assert_rest_there(report: zds.Report, out: np.ndarray, data: np.ndarray, bad: set[int]) -> None:
    """Require every row but those in `bad`, each of which is named in a dead letter."""
    assert {letter.index[0] for letter in report.dead_letters} == bad
    expected = data.copy()
    expected[sorted(bad)] = NOTHING
    np.testing.assert_array_equal(out, expected)
    assert report.outcome == "done"
    assert (report.total, report.emitted) == (len(data), len(data) - len(bad))
    assert balanced(report)


def assert_no_keys(client: Client, timeout_s: float = 10.0) -> None:
    """Require that the cluster forgets all that was asked of it."""
    left: list[str] = []

    def none_left() -> bool:
        left[:] = keys_left(client)
        return not left

    try:
        wait_until(none_left, what="the scheduler to forget its keys", timeout_s=timeout_s)
    except TimeoutError:
        raise AssertionError(f"keys are left: {left}") from None


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail where the block takes longer."""
    begin = time.monotonic()
    yield
    took = time.monotonic() - begin
    assert took < seconds, f"took {took:.1f} s, expected less than {seconds:g} s"


class Reaper:
    """Kills a worker that has joined, chosen by a seed, again and again; a new one is started for each.

    The next one has time until all are there again: on a busy machine none would live long enough to do anything.
    """

    def __init__(self, cluster: TcpCluster, client: Client, *, seed: int, every_s: float = 1.5) -> None:
        self._cluster = cluster
        self._client = client
        self._strength = len(cluster.worker_pids)
        self._rng = random.Random(seed)
        self._every_s = every_s
        self._end = threading.Event()
        self._problem: BaseException | None = None
        self.kills = 0

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._work, name="reaper")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        if self._problem is not None:
            raise self._problem

    def _work(self) -> None:
        try:
            while not self._end.wait(self._every_s * self._rng.uniform(0.7, 1.3)):
                self._kill_one()
        except BaseException as error:
            self._problem = error  # for the test's own thread
            raise

    def _kill_one(self) -> None:
        joined = self._joined()
        if len(joined) >= self._strength:
            self._rng.choice(joined).kill()
            self.kills += 1
            self._cluster.add_worker()

    def _joined(self) -> list[Process]:
        workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        names = {str(worker["name"]) for worker in workers}
        return [worker for worker in self._cluster.workers if worker.alive and worker.name in names]
