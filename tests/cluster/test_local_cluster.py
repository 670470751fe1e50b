"""The stream on a cluster of real worker processes on this host."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import dask
import distributed
import numpy as np
import psutil
import pytest
import zarr
from distributed import Client, LocalCluster

import zarr_dask_stream as zds
from cluster.streaming import CHUNK_COUNT, Total, address_of, assemble, marking, slowly, total_of, write_array
from counted import balanced
from realparts.leaks import LeakCheck
from realparts.process import Process, wait_until
from zarr_dask_stream.engine.events import BatchSubmitted, Notice

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, np.ndarray]:
    url = str(tmp_path_factory.mktemp("local") / "array.zarr")
    return url, write_array(url)


@pytest.fixture
def url(place: tuple[str, np.ndarray]) -> str:
    return place[0]


@pytest.fixture
def data(place: tuple[str, np.ndarray]) -> np.ndarray:
    return place[1]


@pytest.fixture(scope="module")
def threaded_client() -> Iterator[Client]:
    """One worker process with four threads."""
    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=4,
            processes=True,
            memory_limit=0,
            dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"dashboard": False},
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def worker_pids(client: Client) -> set[int]:
    return set(client.run(os.getpid).values())


# -- the main path ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [True, False])
def test_streams_whole_array(client: Client, url: str, data: np.ndarray, ordered: bool, leak_check: LeakCheck) -> None:
    stream = zds.stream_chunks(url, client=client, ordered=ordered)
    np.testing.assert_array_equal(assemble(stream), data)
    assert stream.report.emitted == CHUNK_COUNT
    assert stream.report.outcome == "done"
    assert balanced(stream.report)


def test_ordered_is_grid_order(client: Client, url: str) -> None:
    indices = [chunk.index for chunk in zds.stream_chunks(url, client=client)]
    assert indices == [(i, j) for i in range(10) for j in range(10)]


def test_the_active_client_is_used(client: Client, url: str) -> None:
    ran_in = {chunk.data for chunk in zds.stream_chunks(url).map(lambda _: os.getpid())}
    assert ran_in
    assert ran_in <= worker_pids(client)


def test_map_filter_take_reduce_run(client: Client, url: str, data: np.ndarray) -> None:
    stream = zds.stream_chunks(url)
    diagonal = stream.filter(lambda chunk: chunk.index[0] == chunk.index[1]).map(total_of)
    expected = {(i, i): int(data[6 * i : 6 * i + 6, 5 * i : 5 * i + 5].sum()) for i in range(10)}
    assert {chunk.index: chunk.data for chunk in diagonal} == expected
    assert diagonal.report.filtered == CHUNK_COUNT - 10
    assert [chunk.index for chunk in stream.take(3)] == [(0, 0), (0, 1), (0, 2)]
    assert stream.reduce(Total()).compute() == int(data.sum())
    rows = stream.group_by(lambda index: index[0]).reduce(Total()).compute()
    assert rows == {row: int(data[6 * row : 6 * row + 6].sum()) for row in range(10)}
    report = stream.map(total_of).run()
    assert report.emitted == CHUNK_COUNT
    assert balanced(report)


def test_functions_of_every_kind(client: Client, url: str, data: np.ndarray) -> None:
    factor = 3

    def closure(chunk: zds.Chunk) -> int:
        return factor * total_of(chunk)

    sums = [
        sum(chunk.data for chunk in zds.stream_chunks(url).map(fn))
        for fn in (total_of, lambda chunk: int(chunk.data.sum()), closure, Doubler())
    ]
    assert sums == [int(data.sum()) * n for n in (1, 1, 3, 2)]


class Doubler:
    def __call__(self, chunk: zds.Chunk) -> int:
        return 2 * total_of(chunk)


def test_a_function_can_ask_for_its_worker(client: Client, url: str) -> None:
    def who(_: zds.Chunk) -> str:
        return str(distributed.get_worker().address)

    answers = {chunk.data for chunk in zds.stream_chunks(url).map(who)}
    assert answers
    assert answers <= set(client.scheduler_info()["workers"])


def test_two_streams_at_once_on_one_client(client: Client, url: str, leak_check: LeakCheck) -> None:
    pairs = zip(zds.stream_chunks(url), zds.stream_chunks(url), strict=True)
    count = 0
    for left, right in pairs:
        assert left.index == right.index
        np.testing.assert_array_equal(left.data, right.data)
        count += 1
    assert count == CHUNK_COUNT


def test_a_handler_of_the_users_own_hears_what_it_heard_before(client: Client, url: str) -> None:
    heard: list[Any] = []

    def say(word: str) -> None:
        def is_heard() -> bool:
            client.log_event("all", word)  # again and again: a subscription takes a moment
            return word in heard

        wait_until(is_heard, what="the handler to hear", timeout_s=5)

    client.subscribe_topic("all", lambda event: heard.append(event[1]))
    try:
        say("before")
        for _ in zds.stream_chunks(url, client=client).take(1):
            say("during")
        say("after")
    finally:
        client.unsubscribe_topic("all")


def test_events_that_come_when_no_stream_listens_any_more_are_no_trouble(client: Client, url: str) -> None:
    assert sum(1 for _ in zds.stream_chunks(url, client=client).take(1)) == 1
    for topic in ("all", "worker-restart-memory"):  # as those that were on their way when the stream ended
        client.sync(client._handle_event, topic, (0.0, {"action": "remove-worker", "worker": "tcp://nobody"}))
    assert sum(1 for _ in zds.stream_chunks(url, client=client).take(1)) == 1


def test_a_later_stream_does_not_starve_an_earlier_one(client: Client, url: str) -> None:
    # A window of eight keeps batches at one chunk, so that both streams send many tasks.
    def stream() -> zds.ChunkStream:
        return zds.stream_chunks(url, client=client, concurrency=8, ordered=False).map(slowly(0.02))

    early = 0
    started, enough = threading.Event(), threading.Event()

    def go_on() -> None:
        nonlocal early
        for _ in stream():
            early += 1
            if early == 40:
                started.set()
            if enough.is_set():
                break

    thread = threading.Thread(target=go_on)
    thread.start()
    assert started.wait(60)
    begin = early
    late = sum(1 for _ in stream().take(30))
    end = early
    enough.set()
    thread.join()
    assert late == 30
    assert end - begin >= 18, "the later stream took the whole cluster"


def test_threads_of_one_worker_work_side_by_side(threaded_client: Client, url: str, data: np.ndarray) -> None:
    stream = zds.stream_chunks(url, client=threaded_client, region=(slice(0, 6), slice(0, 40))).map(meet_three_others)
    assert sum(chunk.data for chunk in stream) == int(data[:6, :40].sum())
    np.testing.assert_array_equal(assemble(zds.stream_chunks(url, client=threaded_client)), data)


_together = threading.Barrier(4)


def meet_three_others(chunk: zds.Chunk) -> int:
    _together.wait(30)
    return total_of(chunk)


# -- bounds -------------------------------------------------------------------------------------------


def test_bytes_in_flight_stay_under_their_bound(client: Client, url: str) -> None:
    bound = 1000
    heard: list[int] = []

    def listen(notice: Notice) -> None:
        if isinstance(notice, BatchSubmitted):
            heard.append(notice.in_flight_bytes)

    stream = zds.stream_chunks(url, max_bytes=bound, callbacks=[listen])
    assert sum(1 for _ in stream) == CHUNK_COUNT
    assert 0 < max(heard) <= bound
    assert stream.report.peak_bytes_in_flight <= bound
    assert stream.report.peak_chunks_in_flight == bound // (6 * 5 * 4)


def test_memory_of_the_client_stays_flat(client: Client, tmp_path: Path) -> None:
    # 400 MiB that nobody stored: the workers make them up and send them all here.
    mib = 1 << 20
    zarr.create_array(str(tmp_path / "wide"), shape=(400 * mib,), chunks=(mib,), dtype="u1", fill_value=3)
    stream = zds.stream_chunks(str(tmp_path / "wide"), max_bytes=16 * mib)
    process = psutil.Process()
    chunks = iter(stream)
    for chunk in islice(chunks, 40):
        assert chunk.data[-1] == 3
    before = process.memory_info().rss
    highest = 0
    for _ in chunks:
        highest = max(highest, process.memory_info().rss)
    assert stream.report.emitted == 400
    assert highest - before < 120 * mib


def test_results_stay_on_the_workers_in_a_run_for_effects(client: Client, tmp_path: Path) -> None:
    mib = 1 << 20
    zarr.create_array(str(tmp_path / "wide"), shape=(64 * mib,), chunks=(mib,), dtype="u1", fill_value=3)
    report = zds.stream_chunks(str(tmp_path / "wide"), max_bytes=16 * mib).run()
    assert report.emitted == 64
    assert report.bytes_decoded == 64 * mib


# -- functions that carry a lot ---------------------------------------------------------------------------


_unpacked: dict[int, int] = {}


class Ballast:
    """Five megabytes that count how often they are unpacked in a process."""

    def __init__(self) -> None:
        self.values = np.random.default_rng(1).integers(0, 255, 5_000_000, dtype="u1")

    def __setstate__(self, state: dict[str, Any]) -> None:
        _unpacked[os.getpid()] = _unpacked.get(os.getpid(), 0) + 1
        self.__dict__ = state


def unpackings() -> int:
    return _unpacked[os.getpid()]


def test_a_large_closure_travels_once_to_each_worker(client: Client, url: str, leak_check: LeakCheck) -> None:
    ballast = Ballast()
    expected = int(ballast.values[:100].sum())

    def use(_: zds.Chunk) -> tuple[int, int, int]:
        return int(ballast.values[:100].sum()), os.getpid(), unpackings()

    # A graph that carries the function is larger than this, and its warning an error here.
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1MiB"}):
        answers = [chunk.data for chunk in zds.stream_chunks(url, concurrency=10).map(use)]
    assert len(answers) == CHUNK_COUNT
    assert {total for total, _, _ in answers} == {expected}
    for pid in {pid for _, pid, _ in answers}:
        assert max(times for _, where, times in answers if where == pid) <= 2


# -- results and functions that can't travel ----------------------------------------------------------


class Unreadable:
    """Travels, and can't be unpacked on the client."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _only_on_workers, (os.getpid(),)


def _only_on_workers(pid: int) -> Unreadable:
    if os.getpid() != pid:
        raise LookupError("this object belongs to its worker")
    return Unreadable()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("value", [threading.Lock, Unreadable], ids=["can't be packed", "can't be unpacked"])
def test_a_result_that_cannot_travel_is_an_error_not_a_hang(client: Client, url: str, value: Any) -> None:
    with pytest.raises(zds.ZdsError, match="result"):
        list(zds.stream_chunks(url).map(lambda _: value()))


# -- leaving early ------------------------------------------------------------------------------------


def test_an_early_break_leaves_nothing(client: Client, url: str, tmp_path: Path, leak_check: LeakCheck) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    stream = zds.stream_chunks(url).map(marking(marks, 0.02))
    for chunk in stream:
        if chunk.index == (0, 3):
            break
    del chunk
    assert stream.report.outcome == "stopped early"
    assert stream.report.emitted == 4
    assert balanced(stream.report)
    leak_check.assert_clean()
    assert_quiet(marks)


def test_a_consumer_that_raises_leaves_nothing(client: Client, url: str, leak_check: LeakCheck) -> None:
    stream = zds.stream_chunks(url).map(slowly(0.01))

    def consume() -> None:
        for _ in stream:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        consume()
    assert balanced(stream.report)


def test_a_stream_that_fails_leaves_nothing(client: Client, url: str, leak_check: LeakCheck) -> None:
    def fail(chunk: zds.Chunk) -> Any:
        if chunk.index == (3, 3):
            raise KeyError("no such station")
        return chunk.data

    stream = zds.stream_chunks(url).map(fail)
    with pytest.raises(zds.ChunkError, match="no such station"):
        list(stream)
    assert stream.report.outcome == "failed"
    assert balanced(stream.report)


def assert_quiet(marks: Path) -> None:
    """Require that the workers' functions write no more marks, but for calls that had begun."""
    time.sleep(0.5)
    before = len(list(marks.iterdir()))
    time.sleep(0.5)
    assert len(list(marks.iterdir())) == before


INTERRUPTED = """
    import sys
    from pathlib import Path
    from distributed import Client, LocalCluster
    import zarr_dask_stream as zds
    from cluster.streaming import marking

    if __name__ == "__main__":
        url, marks, how = sys.argv[1:]
        if how == "embedded":
            client = None
        else:
            client = Client(how)
        for count, chunk in enumerate(zds.stream_chunks(url, client=client).map(marking(Path(marks), 0.05))):
            if count == 3:
                print("streaming", flush=True)
"""


@pytest.mark.parametrize("how", ["embedded", "cluster"])
def test_ctrl_c_ends_the_stream_and_its_tasks(
    client: Client, url: str, tmp_path: Path, how: str, leak_check: LeakCheck
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    script = tmp_path / "interrupted.py"
    script.write_text(textwrap.dedent(INTERRUPTED))
    address = address_of(client) if how == "cluster" else how
    process = Process.start(
        "interrupted",
        [sys.executable, str(script), url, str(marks), address],
        folder=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    try:
        process.wait_ready(lambda: "streaming" in process.tail(), timeout_s=60)
        os.kill(process.pid, signal.SIGINT)
        wait_until(lambda: not process.alive, what="the stream to end after Ctrl-C", timeout_s=5)
        assert process.popen.returncode in {130, -signal.SIGINT}
        assert process.tail().rstrip().endswith("KeyboardInterrupt"), process.tail()
        assert len(list(marks.iterdir())) < CHUNK_COUNT
        assert_quiet(marks)
    finally:
        process.end()


# -- streams in other places ----------------------------------------------------------------------------


def stream_within(url: str) -> int:
    with distributed.worker_client(separate_thread=False) as inner:
        return sum(chunk.data for chunk in zds.stream_chunks(url, client=inner).map(total_of))


def stream_within_by_itself(url: str) -> int:
    return sum(chunk.data for chunk in zds.stream_chunks(url).map(total_of))


def stream_within_get_client(url: str) -> int:
    inner = distributed.get_client()
    return sum(chunk.data for chunk in zds.stream_chunks(url, client=inner).map(total_of))


@pytest.mark.timeout(90)
@pytest.mark.parametrize("task", [stream_within, stream_within_by_itself, stream_within_get_client])
def test_a_stream_inside_tasks_that_fill_the_cluster(client: Client, url: str, data: np.ndarray, task: Any) -> None:
    # As many outer tasks as there are threads: unless they step aside, no thread is left for the inner ones.
    outer = [client.submit(task, url, pure=False) for _ in range(2)]
    assert client.gather(outer) == [int(data.sum())] * 2
    # Afterwards each worker has the one thread it had: two tasks on one worker do not overlap.
    assert sum(client.nthreads().values()) == 2


def stream_in_a_function(url: str, client: Any) -> Any:
    def total(chunk: zds.Chunk) -> tuple[int, int]:
        row = zds.stream_chunks(url, client=client, region=chunk.region[0])
        return threading.active_count(), sum(int(inner.data.sum()) for inner in row)

    return total


@pytest.mark.timeout(60)
@pytest.mark.parametrize("timeout", [60.0, None])
def test_a_stream_inside_a_function_of_a_stream(
    client: Client, url: str, data: np.ndarray, timeout: float | None, leak_check: LeakCheck
) -> None:
    # It waits for no thread of the cluster, and starts no cluster on the worker.
    outer = zds.stream_chunks(url, client=client, region=(slice(None), slice(0, 5)), timeout=timeout)
    answers = [chunk.data for chunk in outer.map(stream_in_a_function(url, None))]
    assert [total for _, total in answers] == [int(data[6 * i : 6 * i + 6].sum()) for i in range(10)]
    assert max(threads for threads, _ in answers) <= 16


def test_a_stream_inside_a_function_refuses_a_client(client: Client, url: str) -> None:
    def total(chunk: zds.Chunk) -> int:
        return sum(1 for _ in zds.stream_chunks(url, client=distributed.get_client()))

    with pytest.raises(zds.ChunkError, match="Leave client= out"):
        list(zds.stream_chunks(url, client=client).map(total))


FORKED = """
    import multiprocessing
    import os
    import sys
    import threading
    from contextlib import ExitStack
    import dask._expr
    import dask.tokenize
    from distributed import Client, LocalCluster
    import zarr_dask_stream as zds
    from zarr_dask_stream.source import array, codec, store

    def total(url, client=None):
        return sum(int(chunk.data.sum()) for chunk in zds.stream_chunks(url, client=client))

    def child(url, client, queue):
        try:
            queue.put(total(url, client))
        except zds.ZdsError as error:
            queue.put(f"{type(error).__name__}: {error}")

    def hold_locks(held):
        # As other threads do for moments: a fork may come at any of them.
        name = vars(dask._expr.Expr)["_name"]
        locks = [dask.tokenize.tokenize_lock, codec._compiled_lock, store._opened_lock, array._quiet]
        with ExitStack() as stack:
            for lock in [*locks, *([name.lock] if hasattr(name, "lock") else [])]:
                stack.enter_context(lock)
            held.set()
            threading.Event().wait()

    if __name__ == "__main__":
        url, how = sys.argv[1:]
        fork = multiprocessing.get_context("fork")
        queue = fork.Queue()
        total(url)  # whose threads stay with the parent
        if how == "in mid-stream":
            stream = iter(zds.stream_chunks(url))
            next(stream)
        client = None
        if how in {"active", "given"}:
            client = Client(processes=False, n_workers=1, dashboard_address=None, set_as_default=how == "active")
        if how == "locks held":
            held = threading.Event()
            threading.Thread(target=hold_locks, args=(held,), daemon=True).start()
            held.wait()
        for _ in range(2):
            process = fork.Process(target=child, args=(url, client if how == "given" else None, queue))
            process.start()
            process.join()
            assert process.exitcode == 0, process.exitcode
            print("child:", queue.get())
        if how == "in mid-stream":
            print("rest:", sum(1 for _ in stream))
        if how != "locks held":
            print("parent:", total(url, client))
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("how", ["before", "in mid-stream", "locks held", "active", "given"])
def test_a_forked_child_streams_by_itself_or_says_why_not(url: str, data: np.ndarray, tmp_path: Path, how: str) -> None:
    script = tmp_path / "forked.py"
    script.write_text(textwrap.dedent(FORKED))
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), url, how], check=False, capture_output=True, text=True, timeout=50
    )
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    if how != "locks held":
        assert lines[-1] == f"parent: {int(data.sum())}"
    if how in {"active", "given"}:
        assert lines[0] == lines[1]
        assert lines[0].startswith("child: ClusterError: this process was forked")
    else:
        assert lines[:2] == [f"child: {int(data.sum())}"] * 2
        assert how != "in mid-stream" or lines[2] == f"rest: {CHUNK_COUNT - 1}"


def test_async_client(client: Client, url: str, data: np.ndarray, leak_check: LeakCheck) -> None:
    async def main() -> np.ndarray:
        async with Client(address_of(client), asynchronous=True, set_as_default=False) as own:
            stream = zds.stream_chunks(url, client=own)
            out = np.zeros_like(data)
            beats = 0

            async def beat() -> None:
                nonlocal beats
                while True:
                    await asyncio.sleep(0.01)
                    beats += 1

            heart = asyncio.create_task(beat())
            async for chunk in stream.map(slowly(0.005)):
                out[chunk.region] = chunk.data
            heart.cancel()
            assert beats > 5, "the event loop stood still"
            async for _ in stream:
                break
            assert not own.futures or await settles(own)
            return out

    np.testing.assert_array_equal(asyncio.run(main()), data)


async def settles(client: Client) -> bool:
    """Whether the client's last futures are let go within 5 s."""
    for _ in range(100):
        if not client.futures:
            return True
        await asyncio.sleep(0.05)
    return False


@pytest.mark.timeout(60)
@pytest.mark.parametrize("moment_s", [0.0, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.5])
def test_async_stream_that_is_cancelled_leaves_nothing(
    client: Client, url: str, leak_check: LeakCheck, moment_s: float
) -> None:
    async def main() -> None:
        async with Client(address_of(client), asynchronous=True, set_as_default=False) as own:

            async def consume() -> None:
                async for _ in zds.stream_chunks(url, client=own).map(slowly(0.05)):
                    pass

            task = asyncio.create_task(consume())
            await asyncio.sleep(moment_s)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await settles(own)

    asyncio.run(main())
