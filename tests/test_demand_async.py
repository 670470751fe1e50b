"""Producers, shares and consumers on an event loop."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import zarr_dask_stream as zds
from asking import CHUNKS, Awaiting, Choking, Collector, counting, flat, ledger, numbers, reads, rest_of, slow_store
from counted import balanced
from realparts.leaks import LeakCheck
from zarr_dask_stream.testing import LatencyStore

pytestmark = pytest.mark.usefixtures("no_default_client")


@pytest.fixture
def store() -> Any:
    return counting()


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


def test_to_be_cancelled_loses_nothing(concurrency: int | None) -> None:
    slow = slow_store()
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
