"""Shares of one run in threads: each item to one, or everything to each."""

from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import zarr_dask_stream as zds
from asking import CHUNKS, counting, drain, ledger, numbers, reads, rest_of, together
from counted import balanced
from realparts.leaks import LeakCheck
from zarr_dask_stream import turns

pytestmark = pytest.mark.usefixtures("no_default_client")


@pytest.fixture
def store() -> Any:
    return counting()


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
