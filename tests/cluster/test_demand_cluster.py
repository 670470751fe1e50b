"""Producers, shares and consumers on clusters of real worker processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import pytest
from distributed import Client

import zarr_dask_stream as zds
from cluster.streaming import CHUNK_COUNT, SHAPE, address_of, marking, slowly, total_of, write_array
from counted import balanced
from realparts.cluster import TcpCluster
from realparts.leaks import LeakCheck
from realparts.process import Process, wait_until

pytestmark = pytest.mark.cluster

ALL = [(i, j) for i in range(10) for j in range(10)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, np.ndarray]:
    url = str(tmp_path_factory.mktemp("demand") / "array.zarr")
    return url, write_array(url)


@pytest.fixture
def url(place: tuple[str, np.ndarray]) -> str:
    return place[0]


@pytest.fixture
def data(place: tuple[str, np.ndarray]) -> np.ndarray:
    return place[1]


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    """Return a folder in which workers leave a file for each chunk that a function was called with."""
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder


def count(marks: Path) -> int:
    return len(list(marks.iterdir()))


def indices(chunks: Any) -> list[tuple[int, ...]]:
    return [chunk.index for chunk in chunks]


def put(out: np.ndarray, chunks: Any) -> None:
    for chunk in chunks:
        out[chunk.region] = chunk.data


def together(*works: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(work) for work in works]]


# -- threads ------------------------------------------------------------------------------------------


def test_workers_read_what_was_asked_for(client: Client, url: str, marks: Path, leak_check: LeakCheck) -> None:
    stream = zds.stream_chunks(url).map(marking(marks, 0.0))
    with stream.producer() as producer:
        assert indices(producer.ask(5)) == ALL[:5]
        time.sleep(0.3)
        assert count(marks) == 5
        assert indices(producer.ask(2)) == ALL[5:7]
    assert count(marks) == 7
    assert stream.report.peak_chunks_in_flight == 5
    assert balanced(stream.report)


def test_threads_that_ask_share_everything(client: Client, url: str, data: np.ndarray, leak_check: LeakCheck) -> None:
    stream = zds.stream_chunks(url, ordered=False)
    out = np.full(SHAPE, -7, "i4")
    with stream.producer() as producer:

        def work() -> int:
            had = 0
            while items := producer.ask(4):
                put(out, items)
                had += len(items)
            return had

        assert sum(together(work, work, work)) == CHUNK_COUNT
    np.testing.assert_array_equal(out, data)
    assert stream.report.peak_chunks_in_flight <= 12
    assert stream.report.outcome == "done"


@pytest.mark.parametrize("how", ["demand", "partition", "broadcast"])
def test_shares(client: Client, url: str, data: np.ndarray, how: Any, leak_check: LeakCheck) -> None:
    chunk_nbytes = 6 * 5 * 4
    stream = zds.stream_chunks(url, max_bytes=16 * chunk_nbytes)
    key = (lambda index: index[0]) if how == "partition" else None
    outs = [np.full(SHAPE, -7, "i4") for _ in range(3)]
    shares = stream.share(3, how, key=key)

    def work(share: zds.Share) -> None:
        for chunk in share:
            outs[share.number][chunk.region] = chunk.data
            if share.number == 2:
                time.sleep(0.002)  # the slow one

    together(*(lambda share=share: work(share) for share in shares))
    if how == "broadcast":
        assert all(np.array_equal(out, data) for out in outs)
    else:
        np.testing.assert_array_equal(np.max(outs, axis=0), data)
        assert sum(int((out >= 0).sum()) for out in outs) == data.size, "each item went to one"
    if how == "partition":
        assert [int((out[::6, 0] >= 0).sum()) for out in outs] == [4, 3, 3]
    assert stream.report.peak_bytes_in_flight <= 16 * chunk_nbytes
    assert (stream.report.outcome, stream.report.emitted) == ("done", CHUNK_COUNT)


class Summing(zds.Consumer):
    """Adds up totals."""

    max_demand = 12

    def __init__(self) -> None:
        self.total = 0

    def handle_items(self, items: list[zds.Chunk]) -> Any:
        self.total += sum(chunk.data for chunk in items)


def test_consumers(client: Client, url: str, data: np.ndarray, leak_check: LeakCheck) -> None:
    stream = zds.stream_chunks(url).map(total_of)
    consumers = [Summing(), Summing()]
    report = stream.feed(*consumers)
    assert sum(consumer.total for consumer in consumers) == int(data.sum())
    assert report.peak_chunks_in_flight <= 24
    assert report.outcome == "done"
    stream.feed(*consumers, how="broadcast")
    assert sum(consumer.total for consumer in consumers) == 3 * int(data.sum())


def test_closed_in_mid_stream_it_leaves_nothing(client: Client, url: str, leak_check: LeakCheck) -> None:
    stream = zds.stream_chunks(url).map(slowly(0.05))
    producer = stream.producer()
    waiting = threading.Thread(target=producer.ask, args=(CHUNK_COUNT,))
    waiting.start()
    wait_until(lambda: stream.report.batches > 2, what="batches", timeout_s=20)
    producer.close()
    waiting.join(10)
    assert not waiting.is_alive()
    assert stream.report.outcome == "stopped early"
    assert balanced(stream.report)


def ask_within(url: str) -> int:
    """Ask a producer inside a Dask task: it has to step aside for the reads that it waits for."""
    total = 0
    with zds.stream_chunks(url).map(total_of).producer() as producer:
        while items := producer.ask(25):
            total += sum(chunk.data for chunk in items)
    return total


def feed_within(url: str) -> int:
    consumers = [Summing(), Summing()]
    zds.stream_chunks(url).map(total_of).feed(*consumers)
    return sum(consumer.total for consumer in consumers)


@pytest.mark.parametrize("task", [ask_within, feed_within])
def test_inside_tasks_that_fill_the_cluster(client: Client, url: str, data: np.ndarray, task: Any) -> None:
    futures = client.map(task, [url, url], pure=False)
    assert client.gather(futures) == [int(data.sum())] * 2
    assert sum(client.nthreads().values()) == 2


def test_a_killed_worker_costs_nobody_an_item(tcp_cluster: TcpCluster, url: str, data: np.ndarray) -> None:
    with Client(tcp_cluster.address, set_as_default=False) as client:
        stream = zds.stream_chunks(url, client=client).map(slowly(0.02))
        outs = [np.full(SHAPE, -7, "i4") for _ in range(2)]

        def work(share: zds.Share) -> None:
            for chunk in share:
                outs[share.number][chunk.region] = chunk.data
                if share.number == 0 and chunk.index == (1, 0):
                    tcp_cluster.kill(tcp_cluster.worker_pids[0])

        one, two = stream.share(2, "broadcast")
        together(lambda: work(one), lambda: work(two))
    for out in outs:
        np.testing.assert_array_equal(out, data)
    assert stream.report.emitted == CHUNK_COUNT


INTERRUPTED = """
    import sys
    import threading
    from pathlib import Path
    from distributed import Client
    import zarr_dask_stream as zds
    from cluster.streaming import marking

    class Slow(zds.Consumer):
        max_demand = 8
        def handle_items(self, items):
            print("streaming", flush=True)

    def ask(producer):
        while producer.ask(2):
            print("streaming", flush=True)

    if __name__ == "__main__":
        url, marks, address, how = sys.argv[1:]
        stream = zds.stream_chunks(url, client=Client(address)).map(marking(Path(marks), 0.05))
        if how == "feed":
            stream.feed(Slow(), Slow())
        else:
            with stream.producer() as producer:
                other = threading.Thread(target=ask, args=(producer,))
                other.start()
                ask(producer)
"""


@pytest.mark.parametrize("how", ["ask", "feed"])
@pytest.mark.usefixtures("leak_check")
def test_ctrl_c_ends_all(client: Client, url: str, tmp_path: Path, marks: Path, how: str) -> None:
    script = tmp_path / "interrupted.py"
    script.write_text(textwrap.dedent(INTERRUPTED))
    process = Process.start(
        "interrupted",
        [sys.executable, str(script), url, str(marks), address_of(client), how],
        folder=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    try:
        process.wait_ready(lambda: "streaming" in process.tail(), timeout_s=60)
        os.kill(process.pid, signal.SIGINT)
        wait_until(lambda: not process.alive, what="the program to end after Ctrl-C", timeout_s=5)
        assert process.tail().rstrip().endswith("KeyboardInterrupt"), process.tail()
        assert count(marks) < CHUNK_COUNT
    finally:
        process.end()


# -- an asynchronous client ---------------------------------------------------------------------------


@asynccontextmanager
async def awake(client: Client) -> AsyncIterator[Client]:
    """Lend an asynchronous client, and require that the loop was free and that nothing is left."""
    async with Client(address_of(client), asynchronous=True, set_as_default=False) as own:
        beats = 0

        async def beat() -> None:
            nonlocal beats
            while True:
                await asyncio.sleep(0.005)
                beats += 1

        heart = asyncio.create_task(beat())
        yield own
        heart.cancel()
        assert beats > 5, "the event loop stood still"
        for _ in range(100):
            if not own.futures:
                break
            await asyncio.sleep(0.05)
        assert not own.futures


def run(client: Client, main: Callable[[Client], Awaitable[Any]]) -> Any:
    async def within() -> Any:
        async with awake(client) as own:
            return await main(own)

    return asyncio.run(within())


def test_an_asynchronous_client_that_asks(
    client: Client, url: str, data: np.ndarray, marks: Path, leak_check: LeakCheck
) -> None:
    out = np.full(SHAPE, -7, "i4")

    async def main(own: Client) -> zds.Report:
        stream = zds.stream_chunks(url, client=own).map(marking(marks, 0.002))
        async with stream.producer() as producer:
            with pytest.raises(zds.UsageError, match="the client is asynchronous"):
                stream.producer().ask(1)
            put(out, await producer.ask_async(5))
            await asyncio.sleep(0.2)
            assert count(marks) == 5

            async def work() -> None:
                while items := await producer.ask_async(4):
                    put(out, items)

            await asyncio.gather(work(), work(), work())
            assert producer.done
        return stream.report

    report = run(client, main)
    np.testing.assert_array_equal(out, data)
    assert report.peak_chunks_in_flight <= 12
    assert report.outcome == "done"


@pytest.mark.parametrize("how", ["demand", "partition", "broadcast"])
def test_an_asynchronous_client_that_shares(
    client: Client, url: str, data: np.ndarray, how: Any, leak_check: LeakCheck
) -> None:
    outs = [np.full(SHAPE, -7, "i4") for _ in range(3)]

    async def work(share: zds.Share) -> None:
        async for chunk in share:
            outs[share.number][chunk.region] = chunk.data

    async def main(own: Client) -> zds.Report:
        stream = zds.stream_chunks(url, client=own).map(slowly(0.002))
        key = (lambda index: index[1]) if how == "partition" else None
        await asyncio.gather(*map(work, stream.share(3, how, key=key)))
        return stream.report

    report = run(client, main)
    if how == "broadcast":
        assert all(np.array_equal(out, data) for out in outs)
    else:
        np.testing.assert_array_equal(np.max(outs, axis=0), data)
        assert sum(int((out >= 0).sum()) for out in outs) == data.size
    assert (report.outcome, report.emitted) == ("done", CHUNK_COUNT)


class Awaiting(Summing):
    async def handle_items(self, items: list[zds.Chunk]) -> None:
        await asyncio.sleep(0.002)
        super().handle_items(items)


def test_an_asynchronous_client_that_feeds(client: Client, url: str, data: np.ndarray, leak_check: LeakCheck) -> None:
    async def main(own: Client) -> int:
        consumers = [Awaiting(), Summing()]
        report = await zds.stream_chunks(url, client=own).map(total_of).feed_async(*consumers)
        assert report.peak_chunks_in_flight <= 24
        return sum(consumer.total for consumer in consumers)

    assert run(client, main) == int(data.sum())


@pytest.mark.parametrize("moment_s", [0.0, 0.003, 0.1])
def test_asking_that_is_cancelled_leaves_nothing(
    client: Client, url: str, moment_s: float, leak_check: LeakCheck
) -> None:
    async def main(own: Client) -> None:
        async with zds.stream_chunks(url, client=own).map(slowly(0.05)).producer() as producer:
            asking = [asyncio.create_task(producer.ask_async(40)) for _ in range(3)]
            await asyncio.sleep(moment_s)
            for task in asking:
                task.cancel()
            assert all(
                isinstance(error, asyncio.CancelledError)
                for error in await asyncio.gather(*asking, return_exceptions=True)
            )
            assert indices(await producer.ask_async(2)) == ALL[:2], "it goes on for others, from where it was"
        await asyncio.sleep(0.1)

    run(client, main)


def test_tasks_on_a_client_of_another_loop(client: Client, url: str, data: np.ndarray, leak_check: LeakCheck) -> None:
    """An ordinary client lives on an event loop of its own; tasks of another loop can ask all the same."""

    async def main() -> int:
        total = 0
        async with zds.stream_chunks(url, client=client).map(total_of).producer() as producer:
            while items := await producer.ask_async(30):
                total += sum(chunk.data for chunk in items)
        return total

    assert asyncio.run(main()) == int(data.sum())


def test_the_client_of_the_thread_that_shares_is_used(client: Client, url: str) -> None:
    """A client that is current in one context only is found there, not where the items are waited for."""
    own = Client(address_of(client), set_as_default=False)
    other = distributed.LocalCluster(
        n_workers=1, processes=False, dashboard_address="127.0.0.1:0", scheduler_kwargs={"dashboard": False}
    )
    with own, other, Client(other) as default:
        with own.as_current():
            share, _ = zds.stream_chunks(url).map(lambda _: os.getpid()).share(2)
        pids = set(together(lambda: {chunk.data for chunk in share})[0])
        assert pids <= set(own.run(os.getpid).values())
        assert os.getpid() in set(default.run(os.getpid).values())
