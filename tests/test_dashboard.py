"""What `zds.dashboard` refuses, and that a publisher that can't publish troubles nobody."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import zarr_dask_stream as zds
from zarr_dask_stream.engine.events import ChunksEmitted, RunFinished, RunStarted
from zarr_dask_stream.watch import publisher
from zarr_dask_stream.watch.publisher import METADATA, Publisher


class Scheduler:
    """The side of a scheduler that publishers see."""

    def __init__(self) -> None:
        self.listens = True
        self.breaks = False
        self.asked = 0
        self.heard: list[dict[str, Any]] = []

    async def get_metadata(self, keys: list[str], default: Any) -> Any:
        assert keys == [METADATA]
        self.asked += 1
        return {"v": 1} if self.listens else default

    async def zds_stream(self, client: str, news: dict[str, Any]) -> None:
        assert client == "Client-1"
        if self.breaks:
            raise OSError("connection lost")
        self.heard.append(news)


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler()


@pytest.fixture
def client(scheduler: Scheduler) -> Iterator[Any]:
    """Return what a publisher needs of a client: an event loop in a thread of its own, and the way to its scheduler."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield SimpleNamespace(
            loop=SimpleNamespace(asyncio_loop=loop), scheduler=scheduler, id="Client-1", status="running"
        )
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def finish(one: Publisher) -> None:
    one.handle(RunFinished(1.0, "done", 3, 0.0, 1, 8))
    assert one._work is not None
    one._work.result(10)


def begun(client: Any, look: Any = dict) -> Publisher:
    one = Publisher(client, look)
    one.handle(RunStarted(0.0, 3, 8, (3,), "/data/a.zarr"))
    return one


def test_the_end_is_told_before_the_run_is_over(client: Any, scheduler: Scheduler) -> None:
    one = begun(client, lambda: {"seen": True})
    one.handle(ChunksEmitted(0.5, (0, 1, 2)))
    finish(one)
    last = scheduler.heard[-1]
    assert last["outcome"] == "done"
    assert last["counts"]["chunks"] == {"emitted": 3}
    assert last["snapshot"] == '{"seen":true}'
    assert len({news["run"] for news in scheduler.heard}) == 1


def test_thousands_of_notices_make_little_news(client: Any, scheduler: Scheduler) -> None:
    one = begun(client)
    for number in range(5000):
        one.handle(ChunksEmitted(0.5, (number,)))
    finish(one)
    assert len(scheduler.heard) <= 4


def test_where_nobody_listens_nothing_is_sent(client: Any, scheduler: Scheduler) -> None:
    scheduler.listens = False
    looks: list[int] = []

    def look() -> dict[str, Any]:
        looks.append(1)
        return {}

    one = begun(client, look)
    finish(one)
    assert 1 <= scheduler.asked <= 2
    assert not scheduler.heard
    assert not looks


def test_a_scheduler_that_breaks_is_asked_again(
    client: Any, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "_ASK_EVERY_S", 0.01)
    monkeypatch.setattr(publisher, "_EVERY_S", 0.01)
    scheduler.breaks = True
    one = begun(client)
    asked = threading.Event()
    while scheduler.asked < 3:
        one.handle(ChunksEmitted(0.5, (0,)))
        asked.wait(0.01)
    scheduler.breaks = False
    finish(one)
    assert scheduler.heard[-1]["outcome"] == "done"


def test_what_cannot_be_shown_troubles_nobody(client: Any, scheduler: Scheduler) -> None:
    one = begun(client, lambda: {"nan": float("nan")})
    finish(one)
    assert not scheduler.heard


def test_a_client_that_closed_ends_it(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "_EVERY_S", 0.01)
    one = begun(client)
    client.status = "closed"
    assert one._work is not None
    one._work.result(10)


def test_without_a_client_it_says_what_to_do() -> None:
    with pytest.raises(zds.UsageError, match="no active client"):
        zds.dashboard()
    with pytest.raises(zds.UsageError):
        zds.dashboard("tcp://127.0.0.1:8786")
