"""Producers: what is asked for is read, and nothing else; an item is done when the asker is through with it."""

from __future__ import annotations

import gc
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import zarr_dask_stream as zds
from asking import (
    CHUNKS,
    counting,
    interrupt_soon,
    ledger,
    numbers,
    reads,
    rest_of,
    slow_store,
    together,
    wait_for_reads,
)
from counted import balanced
from realparts.leaks import LeakCheck
from zarr_dask_stream.testing import LatencyStore

pytestmark = pytest.mark.usefixtures("no_default_client")


@pytest.fixture
def store() -> Any:
    return counting()


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


def test_time_is_up(concurrency: int | None) -> None:
    slow = slow_store()
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
                producer.ask(n)  # type: ignore[arg-type]  # callers need not be typed
        for timeout in (-1, True, "1", float("nan")):
            with pytest.raises(zds.UsageError, match="timeout"):
                producer.ask(1, timeout=timeout)  # type: ignore[arg-type]  # callers need not be typed
        with pytest.raises(zds.UsageError, match="auto_ack=False"):
            producer.ack([])
        assert len(producer.ask(np.int64(2))) == 2  # type: ignore[arg-type]  # callers need not be typed
    with pytest.raises(zds.UsageError, match="reduced stream"):
        stream.reduce(zds.reducers.sum()).producer()
    with pytest.raises(zds.UsageError, match=r"leave \.batch"):
        stream.batch(size=3).share(2)
    with pytest.raises(zds.UsageError, match="key needs a function"):
        stream.share(2, "partition", key=3)  # type: ignore[arg-type]  # callers need not be typed


# -- checkpoints --------------------------------------------------------------------------------------


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


def test_counter_of_reads_counts(store: Any) -> None:
    """The tests above rest on this count."""
    list(zds.stream_chunks(store, concurrency=1))
    assert Counter(key for key in store.reads if key.startswith("c/")).total() == reads(store) == CHUNKS
