"""Producers, shares and consumers: in one thread, in several, and on an event loop."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import zarr_dask_stream as zds
from realparts.leaks import LeakCheck
from zarr_dask_stream import turns
from zarr_dask_stream.testing import FaultyStore, LatencyStore

CHUNKS = 24


def counting(store: Any = None, chunks: int = CHUNKS) -> Any:
    """Return a store that counts reads, with an array of as many chunks of two elements, each its own number."""
    store = FaultyStore({}) if store is None else store
    array = zarr.create_array(store, shape=(2 * chunks,), chunks=(2,), dtype="i4", fill_value=-1)
    array[:] = np.repeat(np.arange(chunks, dtype="i4"), 2)
    store.reads.clear()
    return store


def reads(store: Any) -> int:
    return sum(count for key, count in store.reads.items() if key.startswith("c/"))


def numbers(chunks: Any) -> list[int]:
    return [int(chunk.data[0]) for chunk in chunks]


def balanced(report: zds.Report) -> bool:
    ends = report.emitted + report.filtered + report.skipped_missing + report.dead_lettered + report.cancelled
    return report.total == ends


def together(work: Callable[[Any], Any], arguments: Any) -> list[Any]:
    """Call a function in as many threads as there are arguments, all at once."""
    arguments = list(arguments)
    with ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(work, arguments))


def interrupt_soon() -> None:
    """Press Ctrl-C half a second from now."""
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()


def flat(parts: Any) -> list[int]:
    return list(itertools.chain.from_iterable(parts))


def wait_for_reads(store: Any, count: int) -> None:
    deadline = time.monotonic() + 20
    while reads(store) < count:
        assert time.monotonic() < deadline, f"{reads(store)} reads instead of {count}"
        time.sleep(0.002)


@pytest.fixture(params=["sequential", "embedded"])
def concurrency(request: pytest.FixtureRequest) -> int | None:
    return 1 if request.param == "sequential" else None


@pytest.fixture
def store() -> Any:
    return counting()


@pytest.fixture
def slow() -> Any:
    """Return a store in which each read takes 30 ms."""
    return counting(LatencyStore({}, delay_s=0.03))


# -- producers ----------------------------------------------------------------------------------------


def test_nothing_is_read_that_was_not_asked_for(store: Any, concurrency: int | None) -> None:
    stream = zds.stream_chunks(store, concurrency=concurrency)
    with stream.producer() as producer:
        assert reads(store) == 0
        assert numbers(producer.ask(3)) == [0, 1, 2]
        assert reads(store) == 3
        assert numbers(producer.ask()) == [3]
        time.sleep(0.1)  # what nobody asked for would be on its way by now
        assert reads(store) == 4
        assert not producer.done
    assert stream.report.peak_chunks_in_flight <= 3
    assert (stream.report.emitted, stream.report.cancelled, stream.report.outcome) == (4, CHUNKS - 4, "stopped early")


@settings(deadline=None, max_examples=25)
@given(
    asks=st.lists(st.integers(1, 10), min_size=1, max_size=12), ordered=st.booleans(), kept=st.sampled_from([1, 2, 3])
)
def test_any_asks_are_answered_in_full_until_the_end(asks: list[int], ordered: bool, kept: int) -> None:
    store = counting()
    stream = zds.stream_chunks(store, concurrency=1, ordered=ordered)
    if kept > 1:
        stream = stream.filter(lambda chunk: chunk.index[0] % kept == 0)
    expected = list(range(0, CHUNKS, kept))
    with stream.producer() as producer:
        for n in asks:
            got, expected = expected[:n], expected[n:]
            assert numbers(producer.ask(n)) == got
            most = CHUNKS if not expected or len(got) < n else expected[0]
            assert reads(store) <= most, "what is filtered is read too, and no more"
            if kept == 1:
                assert producer.done == (not expected)
    assert balanced(stream.report)


def test_the_end_of_the_stream(store: Any, concurrency: int | None) -> None:
    stream = zds.stream_chunks(store, concurrency=concurrency)
    producer = stream.producer()
    assert numbers(producer.ask(CHUNKS - 1)) == list(range(CHUNKS - 1))
    assert producer.done is False
    assert numbers(producer.ask(5)) == [CHUNKS - 1]
    assert [producer.done] == [True]
    assert stream.report.outcome == "done", "with the last item all is ended, closed or not"
    assert producer.ask(5) == []
    producer.close()
    producer.close()
    assert stream.report.outcome == "done"


def test_take_ends_a_producer_too(store: Any) -> None:
    stream = zds.stream_chunks(store, concurrency=1).take(5)
    with stream.producer() as producer:
        assert (len(producer.ask(3)), len(producer.ask(3)), producer.done) == (3, 2, True)
    assert reads(store) == 5
    assert stream.report.outcome == "done"


def test_threads_that_ask_at_once_get_each_item_once(store: Any, concurrency: int | None) -> None:
    stream = zds.stream_chunks(store, concurrency=concurrency)
    with stream.producer() as producer:

        def work(n: int) -> list[int]:
            mine: list[int] = []
            while items := producer.ask(n):
                mine += numbers(items)
            return mine

        parts = together(work, [1, 2, 3, 4])
    assert sorted(number for part in parts for number in part) == list(range(CHUNKS))
    assert all(part == sorted(part) for part in parts)
    assert stream.report.peak_chunks_in_flight <= 1 + 2 + 3 + 4
    assert reads(store) == CHUNKS
    assert stream.report.outcome == "done"


HOLD = threading.Event()


def held(chunk: zds.Chunk) -> Any:
    """Let chunk 0 wait until it is told."""
    if chunk.index == (0,):
        HOLD.wait(30)
    return chunk.data


def test_an_ask_wakes_who_waits_for_the_cluster(store: Any) -> None:
    """The first one's thread waits for chunk 0, which is held; what a second one asks for is read meanwhile."""
    HOLD.clear()
    stream = zds.stream_chunks(store).map(held)
    with stream.producer() as producer, ThreadPoolExecutor(2) as pool:
        first = pool.submit(producer.ask, 2)
        wait_for_reads(store, 2)
        time.sleep(0.05)
        second = pool.submit(producer.ask, 1)
        wait_for_reads(store, 3)
        assert not HOLD.is_set()
        HOLD.set()
        assert sorted(numbers(first.result() + second.result())) == [0, 1, 2]


def test_time_is_up(slow: Any, concurrency: int | None) -> None:
    stream = zds.stream_chunks(slow, concurrency=concurrency)
    with stream.producer() as producer:
        producer.ask(1)  # by now everything is started
        got = numbers(producer.ask(4, timeout=0))
        assert len(got) < 4
        assert not producer.done
        while len(got) < 4:
            got += numbers(producer.ask(1, timeout=0.02))
        assert got == [1, 2, 3, 4]
        assert reads(slow) <= 8, "what was on its way is not read again"
        assert stream.report.retries == 0


def test_failures_reach_all_that_ask(store: Any, concurrency: int | None) -> None:
    store.break_reads({"c/3": PermissionError("not yours")})
    stream = zds.stream_chunks(store, concurrency=concurrency)
    producer = stream.producer()

    def work(_: int) -> str:
        try:
            while producer.ask(1):
                pass
        except zds.ChunkError as error:
            return str(error.index)
        return "nothing"

    assert together(work, range(3)) == ["(3,)"] * 3
    with pytest.raises(zds.ChunkError, match="not yours"):
        producer.ask(1)
    assert producer.done
    assert stream.report.outcome == "failed"
    assert balanced(stream.report)


def test_what_had_come_before_a_failure_is_not_taken_for_the_end(store: Any) -> None:
    store.break_reads({"c/3": PermissionError("not yours")})
    producer = zds.stream_chunks(store, concurrency=1).producer()
    with pytest.raises(zds.ChunkError):
        producer.ask(10)


def test_close_ends_the_wait_of_other_threads(leak_check: LeakCheck) -> None:
    store = counting(LatencyStore({}, delay_s=0.2))
    stream = zds.stream_chunks(store)
    producer = stream.producer()
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(producer.ask, CHUNKS) for _ in range(3)]
        while reads(store) < 1:
            time.sleep(0.005)
        producer.close()
        got = [number for future in waiting for number in numbers(future.result(timeout=10))]
    assert len(got) < CHUNKS
    assert producer.done
    assert producer.ask(1) == []
    assert stream.report.outcome == "stopped early"
    assert stream.report.emitted == len(got)
    assert balanced(stream.report)


def test_closing_the_stream_closes_its_producer(store: Any, concurrency: int | None) -> None:
    stream = zds.stream_chunks(store, concurrency=concurrency)
    producer = stream.producer()
    producer.ask(2)
    stream.close()
    assert producer.ask(2) == []
    assert producer.done
    assert stream.report.outcome == "stopped early"


def test_a_producer_nobody_holds_leaves_nothing(store: Any, leak_check: LeakCheck) -> None:
    stream = zds.stream_chunks(store)
    producer = stream.producer()
    producer.ask(2)
    del producer
    gc.collect()
    assert stream.report.outcome == "stopped early"


def test_ctrl_c_while_it_waits(leak_check: LeakCheck) -> None:
    store = counting(LatencyStore({}, delay_s=0.2))
    stream = zds.stream_chunks(store)
    with stream.producer() as producer:
        interrupt_soon()
        with pytest.raises(KeyboardInterrupt):
            producer.ask(CHUNKS)
        assert producer.ask(1) == []
    assert stream.report.outcome == "stopped early"
    assert balanced(stream.report)


def test_pause_and_resume(store: Any) -> None:
    stream = zds.stream_chunks(store)
    with stream.producer() as producer:
        producer.ask(1)
        stream.pause()
        assert producer.ask(2, timeout=0.05) == []
        stream.resume()
        assert numbers(producer.ask(2)) == [1, 2]


def test_a_callback_can_not_ask(store: Any) -> None:
    caught: list[Exception] = []

    def asking(letter: zds.DeadLetter) -> None:
        try:
            producer.ask(1)
        except zds.UsageError as error:
            caught.append(error)

    store.break_reads({"c/1": PermissionError("not yours")})
    with zds.stream_chunks(store, concurrency=1, on_error=asking).producer() as producer:
        assert numbers(producer.ask(2)) == [0, 2]
    assert "callback" in str(caught[0])


def test_bad_asks(store: Any) -> None:
    stream = zds.stream_chunks(store, concurrency=1)
    with stream.producer() as producer:
        for n in (0, -1, 2.5, True, "3"):
            with pytest.raises(zds.UsageError, match="at least one"):
                producer.ask(n)  # type: ignore[arg-type]
        for timeout in (-1, True, "1", float("nan")):
            with pytest.raises(zds.UsageError, match="timeout"):
                producer.ask(1, timeout=timeout)  # type: ignore[arg-type]
        with pytest.raises(zds.UsageError, match="auto_ack=False"):
            producer.ack([])
        assert len(producer.ask(np.int64(2))) == 2  # type: ignore[arg-type]
    with pytest.raises(zds.UsageError, match="reduced stream"):
        stream.reduce(zds.reducers.sum()).producer()
    with pytest.raises(zds.UsageError, match=r"leave \.batch"):
        stream.batch(size=3).share(2)
    with pytest.raises(zds.UsageError, match="key needs a function"):
        stream.share(2, "partition", key=3)  # type: ignore[arg-type]


# -- checkpoints --------------------------------------------------------------------------------------


def ledger(tmp_path: Path) -> zds.Checkpoint:
    return zds.Checkpoint(url=tmp_path / "ledger")


def rest_of(stream: zds.ChunkStream) -> list[int]:
    """Return what a new run hands out."""
    return numbers(stream)


def test_an_item_is_done_when_the_asker_comes_back(store: Any, tmp_path: Path) -> None:
    stream = zds.stream_chunks(store, concurrency=1, checkpoint=ledger(tmp_path))
    with stream.producer() as producer:
        assert numbers(producer.ask(4)) == [0, 1, 2, 3]
        assert numbers(producer.ask(2)) == [4, 5]
    assert rest_of(stream) == list(range(4, CHUNKS)), "4 and 5 were in hand at the end"


def test_a_thread_that_dies_comes_back_for_nobody(store: Any, tmp_path: Path) -> None:
    """Python gives a new thread the number of one that is gone: what that had in hand must not pass for done."""
    stream = zds.stream_chunks(store, concurrency=1, checkpoint=ledger(tmp_path))
    with stream.producer() as producer:
        for _ in range(4):
            thread = threading.Thread(target=producer.ask, args=(2,))
            thread.start()
            thread.join()
    assert rest_of(stream) == list(range(CHUNKS))


def test_to_the_end_and_everything_is_done(store: Any, tmp_path: Path, concurrency: int | None) -> None:
    stream = zds.stream_chunks(store, concurrency=concurrency, checkpoint=ledger(tmp_path))
    producer = stream.producer()
    while producer.ask(5):
        pass
    assert stream.report.outcome == "done"
    assert rest_of(stream) == []


def test_items_are_done_when_told(store: Any, tmp_path: Path) -> None:
    stream = zds.stream_chunks(store, concurrency=1, checkpoint=ledger(tmp_path))
    with stream.producer(auto_ack=False) as producer:
        first, second, third = producer.ask(3)
        producer.ack(third)
        producer.ask(2)
        producer.ack([first])
    assert rest_of(stream) == [1, *range(3, CHUNKS)]
    with stream.producer(auto_ack=False) as producer:
        while items := producer.ask(4):
            producer.ack(items)
    assert second.index == (1,)
    assert rest_of(stream) == []


# -- shares -------------------------------------------------------------------------------------------


def drain(share: zds.Share) -> list[int]:
    return numbers(share)


def test_on_demand_each_item_goes_to_one(store: Any, concurrency: int | None, leak_check: LeakCheck) -> None:
    stream = zds.stream_chunks(store, concurrency=concurrency)
    parts = together(drain, stream.share(3))
    assert sorted(number for part in parts for number in part) == list(range(CHUNKS))
    assert reads(store) == CHUNKS
    assert (stream.report.outcome, stream.report.emitted) == ("done", CHUNKS)


def test_all_of_a_key_go_to_one_in_order(store: Any, concurrency: int | None) -> None:
    stream = zds.stream_chunks(store, concurrency=concurrency)
    parts = together(drain, stream.share(3, "partition", key=lambda index: index[0] % 5))
    keys = [0, 3], [1, 4], [2]
    assert parts == [[n for n in range(CHUNKS) if n % 5 in mine] for mine in keys]
    assert stream.report.outcome == "done"


def test_everything_to_each(store: Any, concurrency: int | None, leak_check: LeakCheck) -> None:
    stream = zds.stream_chunks(store, concurrency=concurrency)
    shares = stream.share(3, "broadcast")
    assert together(drain, shares) == [list(range(CHUNKS))] * 3
    assert repr(shares[1]) == "Share(1 of 3, broadcast)"
    assert reads(store) == CHUNKS
    assert (stream.report.outcome, stream.report.emitted) == ("done", CHUNKS)


@pytest.mark.parametrize("how", ["broadcast", "partition"])
def test_the_slowest_holds_the_others_within_the_window(store: Any, how: Any) -> None:
    """What waits for the slow one is in flight: memory is bounded for all together."""
    window = 4
    stream = zds.stream_chunks(store, client=None, concurrency=window)
    key = (lambda index: index[0] % 2) if how == "partition" else None
    fast, slow = stream.share(2, how, key=key)
    seen: list[int] = []
    behind: list[int] = []

    def run_ahead() -> None:
        seen.extend(int(chunk.data[0]) for chunk in fast)

    def follow() -> None:
        for number, _ in enumerate(slow):
            time.sleep(0.02)
            taken = number + 1 if how == "broadcast" else 2 * (number + 1)
            behind.append(len(seen) - taken if how == "broadcast" else 2 * len(seen) - taken)

    together(lambda work: work(), [run_ahead, follow])
    assert len(seen) == (CHUNKS if how == "broadcast" else CHUNKS // 2)
    assert max(behind) <= 2 * window
    assert stream.report.peak_chunks_in_flight <= window
    assert reads(store) == CHUNKS


@pytest.mark.parametrize("how", ["demand", "partition", "broadcast"])
@pytest.mark.parametrize("leave", ["break", "raise", "close"])
def test_who_leaves_does_not_stop_the_others(store: Any, how: Any, leave: str, leak_check: LeakCheck) -> None:
    stream = zds.stream_chunks(store)
    key = (lambda index: index[0] % 6) if how == "partition" else None
    one, two, three = stream.share(3, how, key=key)
    had: list[int] = []
    go_on = threading.Event()

    def leaver() -> None:
        try:
            with one:
                for chunk in one:
                    had.append(int(chunk.data[0]))
                    if len(had) == 2:
                        if leave == "break":
                            break
                        if leave == "raise":
                            had.index(-1)
                        one.close()
        except ValueError:
            pass
        finally:
            go_on.set()

    def others(share: zds.Share) -> list[int]:
        if how == "demand":
            go_on.wait(10)  # or they might have taken everything before
        return drain(share)

    thread = threading.Thread(target=leaver)
    thread.start()
    parts = together(others, [two, three])
    thread.join()
    if how == "broadcast":
        assert parts == [list(range(CHUNKS))] * 2
        assert had == [0, 1]
    else:
        assert len(had) == 2
        assert sorted(had + parts[0] + parts[1]) == list(range(CHUNKS)), "nothing that waited for it is lost"
    assert stream.report.outcome == "done"
    assert stream.report.emitted == CHUNKS
    with pytest.raises(zds.UsageError, match="has left"):
        next(iter(one))


def test_a_loop_whose_exception_is_kept_is_left(store: Any) -> None:
    def work(share: zds.Share) -> int:
        for number, _ in enumerate(share):
            if share.number == 0 and number == 1:
                raise ZeroDivisionError
        return number

    one, two = zds.stream_chunks(store, concurrency=2).share(2, "broadcast")
    with ThreadPoolExecutor(2) as pool:
        failed, done = pool.submit(work, one), pool.submit(work, two)
        assert isinstance(failed.exception(20), ZeroDivisionError)
        assert done.result(20) == CHUNKS - 1


def test_a_share_that_nobody_holds_holds_nobody_up(store: Any) -> None:
    first = zds.stream_chunks(store, concurrency=2).share(3, "broadcast")[0]
    gc.collect()
    assert drain(first) == list(range(CHUNKS))


def test_the_last_to_leave_ends_the_run(store: Any, leak_check: LeakCheck) -> None:
    stream = zds.stream_chunks(store)
    for share in stream.share(2, "broadcast"):
        for _ in share:
            break
    assert stream.report.outcome == "stopped early"
    assert balanced(stream.report)


def test_who_holds_up_the_others_is_named(
    store: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two loops one after the other in one thread: the first one waits for the second, which never comes."""
    monkeypatch.setattr(turns, "_BLOCKED_S", 0.05)
    stream = zds.stream_chunks(store, concurrency=2)
    first, second = stream.share(2, "broadcast")
    timer = threading.Timer(0.5, stream.close)
    timer.start()
    assert drain(first) == [0, 1]
    timer.join()
    assert "consumer 0 has waited for" in caplog.text
    assert "consumer 1 has not taken the 2 items" in caplog.text
    second.close()
    first.close()


def test_a_key_function_that_fails_ends_all(store: Any) -> None:
    shares = zds.stream_chunks(store, concurrency=1).share(2, "partition", key=lambda index: index[7])

    def work(share: zds.Share) -> None:
        with pytest.raises(zds.UsageError, match="key"):
            drain(share)

    together(work, shares)


def test_failures_reach_all_shares(store: Any, concurrency: int | None) -> None:
    store.break_reads({"c/9": PermissionError("not yours")})
    shares = zds.stream_chunks(store, concurrency=concurrency).share(3, "broadcast")

    def work(share: zds.Share) -> None:
        with pytest.raises(zds.ChunkError, match="not yours"):
            drain(share)

    together(work, shares)


def test_a_broadcast_item_is_done_when_all_have_come_back(store: Any, tmp_path: Path) -> None:
    stream = zds.stream_chunks(store, concurrency=4, checkpoint=ledger(tmp_path))
    one, two = stream.share(2, "broadcast")
    left, right = iter(one), iter(two)
    assert [numbers([next(left), next(left), next(left)]), numbers([next(right), next(right)])] == [[0, 1, 2], [0, 1]]
    one.close()
    two.close()
    assert rest_of(stream) == list(range(1, CHUNKS)), "both came back after 0, one after 1"
    assert together(drain, stream.share(2, "broadcast")) == [[], []]


def test_what_a_share_had_in_hand_when_it_left_comes_again(store: Any, tmp_path: Path) -> None:
    stream = zds.stream_chunks(store, concurrency=2, checkpoint=ledger(tmp_path))
    one, two = stream.share(2)
    for chunk in one:
        had = int(chunk.data[0])
        break
    got = drain(two)
    assert sorted([had, *got]) == list(range(CHUNKS))
    assert rest_of(stream) == [had]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0,), "number of consumers"),
        ((True,), "number of consumers"),
        ((2.0,), "number of consumers"),
        ((2, "all"), '"broadcast"'),
        ((2, "partition"), "key="),
    ],
)
def test_bad_shares(store: Any, arguments: tuple[Any, ...], match: str) -> None:
    stream = zds.stream_chunks(store, concurrency=1)
    with pytest.raises(zds.UsageError, match=match):
        stream.share(*arguments)
    with pytest.raises(zds.UsageError, match="key="):
        stream.share(2, key=lambda index: index[0])


# -- consumers ----------------------------------------------------------------------------------------


class Collector(zds.Consumer):
    """Keeps what it is handed, and how much had been read at each time."""

    def __init__(self, store: Any = None) -> None:
        self.store = store
        self.batches: list[list[int]] = []
        self.ahead: list[int] = []

    @property
    def numbers(self) -> list[int]:
        return [number for batch in self.batches for number in batch]

    def handle_items(self, items: list[zds.Chunk]) -> None:
        if self.store is not None:
            time.sleep(0.01)  # what is read ahead is read by now
            self.ahead.append(reads(self.store) - len(self.numbers))
        self.batches.append(numbers(items))


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


class Choking(Collector):
    """Raises on one chunk."""

    max_demand = 2

    def handle_items(self, items: list[zds.Chunk]) -> None:
        if 7 in numbers(items):
            raise ZeroDivisionError("seven")
        super().handle_items(items)


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


# -- on an event loop ---------------------------------------------------------------------------------


class Awaiting(Collector):
    async def handle_items(self, items: list[zds.Chunk]) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        self.batches.append(numbers(items))


def test_tasks_that_ask_at_once(store: Any, concurrency: int | None, leak_check: LeakCheck) -> None:
    stream = zds.stream_chunks(store, concurrency=concurrency)

    async def main() -> list[list[int]]:
        async with stream.producer() as producer:

            async def work(n: int) -> list[int]:
                mine: list[int] = []
                while items := await producer.ask_async(n):
                    mine += numbers(items)
                return mine

            parts = await asyncio.gather(*map(work, [1, 2, 3, 4]))
            assert producer.done
            return parts

    parts = asyncio.run(main())
    assert sorted(flat(parts)) == list(range(CHUNKS))
    assert reads(store) == CHUNKS
    assert stream.report.peak_chunks_in_flight <= 10
    assert stream.report.outcome == "done"


def test_tasks_read_nothing_that_was_not_asked_for(store: Any, concurrency: int | None) -> None:
    async def main() -> None:
        async with zds.stream_chunks(store, concurrency=concurrency).producer() as producer:
            assert numbers(await producer.ask_async(3)) == [0, 1, 2]
            await asyncio.sleep(0.1)
            assert reads(store) == 3

    asyncio.run(main())


def test_to_be_cancelled_loses_nothing(slow: Any, concurrency: int | None) -> None:
    """What had come for the one that was cancelled goes to the next, and is not read twice."""
    stream = zds.stream_chunks(slow, concurrency=concurrency)

    async def main() -> list[int]:
        got: list[int] = []
        async with stream.producer() as producer:
            await asyncio.wait_for(producer.ask_async(1), 30)
            while len(got) < 12:
                try:
                    got += numbers(await asyncio.wait_for(producer.ask_async(3), 0.05))
                except TimeoutError:
                    got += numbers(await producer.ask_async(1))
        return got

    got = asyncio.run(main())
    assert got == list(range(1, len(got) + 1))
    assert reads(slow) <= 1 + len(got) + 3
    assert max(count for key, count in slow.reads.items() if key.startswith("c/")) == 1


def test_shares_of_tasks(store: Any, concurrency: int | None, leak_check: LeakCheck) -> None:
    stream = zds.stream_chunks(store, concurrency=concurrency)

    async def drain_async(share: zds.Share) -> list[int]:
        return [int(chunk.data[0]) async for chunk in share]

    async def main() -> None:
        parts = await asyncio.gather(*map(drain_async, stream.share(3)))
        assert sorted(flat(parts)) == list(range(CHUNKS))
        assert all(parts), "the loop of one does not keep the others from theirs"
        parts = await asyncio.gather(*map(drain_async, stream.share(3, "broadcast")))
        assert parts == [list(range(CHUNKS))] * 3
        parts = await asyncio.gather(*map(drain_async, stream.share(2, "partition", key=lambda index: index[0] % 2)))
        assert parts == [list(range(0, CHUNKS, 2)), list(range(1, CHUNKS, 2))]
        assert stream.report.outcome == "done"

    asyncio.run(main())


def test_a_task_that_leaves_does_not_stop_the_others(store: Any, leak_check: LeakCheck) -> None:
    stream = zds.stream_chunks(store)

    async def main() -> None:
        one, two = stream.share(2, "broadcast")

        async def leaver() -> None:
            async with one:
                async for chunk in one:
                    if int(chunk.data[0]) == 2:
                        break

        async def stayer() -> list[int]:
            async with two:
                return [int(chunk.data[0]) async for chunk in two]

        _, got = await asyncio.gather(leaver(), stayer())
        assert got == list(range(CHUNKS))

    asyncio.run(main())
    assert stream.report.outcome == "done"


def test_a_cancelled_main_leaves_nothing(leak_check: LeakCheck) -> None:
    store = counting(LatencyStore({}, delay_s=0.3))
    stream = zds.stream_chunks(store)

    async def main() -> None:
        producer = stream.producer()  # nobody closes it
        await producer.ask_async(CHUNKS)

    async def limited() -> None:
        await asyncio.wait_for(main(), 1.0)

    with pytest.raises(TimeoutError):
        asyncio.run(limited())
    assert stream.report.outcome == "stopped early"
    assert balanced(stream.report)


@pytest.mark.parametrize("kind", [Collector, Awaiting])
def test_consumers_fed_by_tasks(store: Any, concurrency: int | None, kind: Any, leak_check: LeakCheck) -> None:
    stream = zds.stream_chunks(store, concurrency=concurrency)
    consumers = [kind(), kind()]
    for consumer in consumers:
        consumer.max_demand = 4
    report = asyncio.run(stream.feed_async(*consumers, how="broadcast"))
    assert [consumer.numbers for consumer in consumers] == [list(range(CHUNKS))] * 2
    assert (report.outcome, report.emitted) == ("done", CHUNKS)
    assert report.peak_chunks_in_flight <= 4


def test_what_a_task_raises_stops_the_stream(store: Any, leak_check: LeakCheck) -> None:
    stream = zds.stream_chunks(store)
    with pytest.raises(ZeroDivisionError, match="seven") as caught:
        asyncio.run(stream.feed_async(Choking(), Awaiting(), how="broadcast"))
    assert "raised by Choking.handle_items" in caught.value.__notes__[0]
    assert stream.report.outcome == "stopped early"
    assert balanced(stream.report)


def test_cancelled_feeding_leaves_nothing(leak_check: LeakCheck) -> None:
    store = counting(LatencyStore({}, delay_s=0.3))
    stream = zds.stream_chunks(store)

    async def main() -> None:
        await asyncio.wait_for(stream.feed_async(Awaiting(), Awaiting()), 1.0)

    with pytest.raises(TimeoutError):
        asyncio.run(main())
    assert stream.report.outcome == "stopped early"
    assert balanced(stream.report)


def test_failures_reach_all_tasks(store: Any, concurrency: int | None) -> None:
    store.break_reads({"c/3": PermissionError("not yours")})
    stream = zds.stream_chunks(store, concurrency=concurrency)

    async def main() -> None:
        async with stream.producer() as producer:
            answers = await asyncio.gather(*(producer.ask_async(9) for _ in range(3)), return_exceptions=True)
            assert [type(answer) for answer in answers] == [zds.ChunkError] * 3
            with pytest.raises(zds.ChunkError, match="not yours"):
                await producer.ask_async(1)
            assert producer.done

    asyncio.run(main())


def test_an_item_is_done_when_its_task_comes_back(store: Any, tmp_path: Path) -> None:
    stream = zds.stream_chunks(store, concurrency=1, checkpoint=ledger(tmp_path))

    async def main() -> None:
        async with stream.producer() as producer:
            assert numbers(await producer.ask_async(3)) == [0, 1, 2]
            assert numbers(await asyncio.create_task(producer.ask_async(2))) == [3, 4]
            assert numbers(await producer.ask_async(2)) == [5, 6]

    asyncio.run(main())
    assert rest_of(stream) == list(range(3, CHUNKS)), "another task had 3 and 4, and 5 and 6 were in hand"


def test_threads_and_tasks_do_not_mix(store: Any) -> None:
    stream = zds.stream_chunks(store, concurrency=1)

    async def main() -> None:
        with stream.producer() as producer:
            producer.ask(1)
            with pytest.raises(zds.UsageError, match="tasks of an event loop can't take part"):
                await producer.ask_async(1)
        async with stream.producer() as producer:
            await producer.ask_async(1)
            with pytest.raises(zds.UsageError, match="threads can't take part"):
                producer.ask(1)

    asyncio.run(main())


def test_a_coroutine_function_needs_a_loop(store: Any) -> None:
    with pytest.raises(zds.UsageError, match="feed_async"):
        zds.stream_chunks(store, concurrency=1).feed(Awaiting())


@pytest.fixture(autouse=True)
def _no_default_client() -> None:
    """A client left active by another test would move these runs to its cluster."""
    with pytest.raises(ValueError, match="No clients found"):
        distributed.default_client()


def test_counter_of_reads_counts(store: Any) -> None:
    """The tests above rest on this count."""
    list(zds.stream_chunks(store, concurrency=1))
    assert Counter(key for key in store.reads if key.startswith("c/")).total() == reads(store) == CHUNKS
