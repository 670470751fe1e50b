"""Of what a worker died: the dead letter of the chunk to blame says it, where anybody knows."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import zarr
from distributed import Client, LocalCluster

import zarr_dask_stream as zds
from counted import balanced
from realparts.cluster import run_cluster
from zarr_dask_stream.engine.events import Notice, WorkerRetired

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = str(tmp_path_factory.mktemp("deaths") / "array.zarr")
    zarr.create_array(place, shape=(4,), chunks=(1,), dtype="i4")[:] = [1, 2, 3, 4]
    return place


@pytest.fixture(scope="module")
def tended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Two workers with a nanny each."""
    folder = tmp_path_factory.mktemp("tended")
    limit = ["--memory-limit", "500MB"]
    with (
        run_cluster(folder, worker_arguments=["--nanny", *limit]) as cluster,
        Client(cluster.address, set_as_default=False) as client,
    ):
        yield client


def dying(how: Callable[[], Any]) -> Any:
    """Return a function that dies of the third chunk; travels by value."""

    def die(chunk: zds.Chunk) -> Any:
        if chunk.index == (2,):
            how()
        return int(chunk.data[0])

    return die


def leave() -> None:
    os._exit(3)


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hoard() -> None:
    import time  # noqa: PLC0415  # on the worker

    blocks = []
    while True:
        blocks.append(bytearray(b"x") * 20_000_000)
        time.sleep(0.01)


def letter_of(url: str, client: Client, how: Callable[[], Any]) -> zds.DeadLetter:
    stream = zds.stream_chunks(url, client=client, on_error="skip").map(dying(how))
    assert [chunk.data for chunk in stream] == [1, 2, 4]
    assert balanced(stream.report)
    (letter,) = stream.report.dead_letters
    assert letter.index == (2,)
    assert letter.category == "cluster"
    assert letter.worker.startswith("tcp://")
    assert letter.worker in letter.message
    return letter


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (leave, "its process exited with code 3"),
        (be_killed, "its process was killed by SIGKILL"),
        (hoard, "MiB, too near to its memory limit of 477 MiB"),
    ],
    ids=["exit code", "signal", "memory"],
)
def test_a_nanny_tells_of_what_its_worker_died(tended: Client, url: str, how: Callable[[], Any], words: str) -> None:
    assert words in letter_of(url, tended, how).message


@pytest.mark.slow
def test_so_do_the_nannies_of_a_local_cluster(url: str) -> None:
    with ExitStack() as stack:
        cluster = stack.enter_context(
            LocalCluster(
                n_workers=2,
                threads_per_worker=1,
                dashboard_address="127.0.0.1:0",
                scheduler_kwargs={"dashboard": False},
                silence_logs=50,
            )
        )
        client = stack.enter_context(Client(cluster, set_as_default=False))
        assert "its process exited with code 3" in letter_of(url, client, leave).message


@pytest.mark.slow
def test_so_they_do_where_dask_lets_no_task_meet_a_second_worker(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"}
    with (
        run_cluster(tmp_path, env=strict, worker_arguments=["--nanny"]) as cluster,
        Client(cluster.address, set_as_default=False) as client,
    ):
        assert "its process exited with code 3" in letter_of(url, client, leave).message


@pytest.mark.slow
def test_a_worker_whose_threads_hang_is_started_anew(tended: Client, tmp_path: Path) -> None:
    place = str(tmp_path / "array.zarr")
    zarr.create_array(place, shape=(40,), chunks=(1,), dtype="i4")[:] = range(40)

    def hang(chunk: zds.Chunk) -> int:
        if chunk.index[0] < 8:
            time.sleep(1000)
        return os.getpid()

    heard: list[Notice] = []
    before = set(tended.run(os.getpid).values())
    stream = zds.stream_chunks(
        place,
        client=tended,
        timeout=0.2,
        on_error="skip",
        retry=zds.RetryPolicy(attempts=1, breaker=None),
        callbacks=[heard.append],
    ).map(hang)
    assert [chunk.index[0] for chunk in stream] == list(range(8, 40))
    assert [letter.index[0] for letter in sorted(stream.report.dead_letters, key=lambda one: one.index)] == list(
        range(8)
    )
    assert {letter.category for letter in stream.report.dead_letters} == {"timeout"}
    assert balanced(stream.report)
    retired = [notice.worker for notice in heard if isinstance(notice, WorkerRetired)]
    assert retired
    tended.wait_for_workers(2, timeout=30)
    assert before - set(tended.run(os.getpid).values()), "its process is another one"
