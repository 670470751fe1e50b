"""Streams on the dashboard of a real scheduler, and in what it and its workers tell Prometheus."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zarr
from distributed import Client, LocalCluster
from prometheus_client.parser import text_string_to_metric_families

import zarr_dask_stream as zds
from cluster.streaming import CHUNK_COUNT, slowly, total_of, write_array
from realparts.cluster import TcpCluster
from realparts.http_files import HttpStore
from realparts.process import wait_until
from zarr_dask_stream.watch import publisher
from zarr_dask_stream.watch.board import PAGE, Board, Posted

pytestmark = pytest.mark.cluster


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=20) as answer:
        assert answer.status == 200
        text: str = answer.read().decode()
        return text


def scrape(base: str) -> dict[str, float]:
    """Return the samples that a server shows, by name and labels."""
    return {
        sample.name + "".join(f" {label}={value}" for label, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(fetch(f"{base}/metrics"))
        for sample in family.samples
    }


@pytest.fixture(scope="module")
def shown() -> Iterator[LocalCluster]:
    """Return a cluster with a dashboard that has the page."""
    with LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=True,
        memory_limit=0,
        dashboard_address="127.0.0.1:0",
        worker_dashboard_address="127.0.0.1:0",
    ) as cluster:
        with Client(cluster, set_as_default=False) as client:
            zds.dashboard(client)
        yield cluster


@pytest.fixture
def guest(shown: LocalCluster) -> Iterator[Client]:
    with Client(shown) as client:
        yield client


@pytest.fixture
def array(tmp_path: Path) -> str:
    write_array(str(tmp_path / f"{tmp_path.name}.zarr"))
    return str(tmp_path / f"{tmp_path.name}.zarr")


def board_of(cluster: LocalCluster) -> Board:
    scheduler: Any = cluster.scheduler
    board: Board = scheduler.plugins["zarr-dask-stream"]._board
    return board


def posted_of(cluster: LocalCluster, array: str) -> list[Posted]:
    return [one for one in board_of(cluster).posted if array.endswith(one.news.name)]


def base_of(client: Client) -> str:
    return str(client.dashboard_link).rpartition("/")[0]


def is_drawn_by_bokeh(page: str) -> bool:
    return "Dask Diagnostic UI" in page and "bokeh.min.js" in page and "docs_json" in page


def test_the_page_is_on_the_dashboard_that_is_there(shown: LocalCluster, guest: Client) -> None:
    link = zds.dashboard(guest)  # again: nothing changes
    assert link == f"{base_of(guest)}/{PAGE}"
    assert "127.0.0.1" in link
    assert is_drawn_by_bokeh(fetch(link))
    status = fetch(str(guest.dashboard_link))
    assert status.count(f'href="{PAGE}"') == 1, "one entry in the bar on top, on the other pages too"
    scheduler: Any = shown.scheduler
    assert len(scheduler.http_application.applications) == 2


def test_streams_of_several_clients_are_seen_with_all_there_is_to_see(
    shown: LocalCluster, guest: Client, array: str
) -> None:
    with Client(shown, set_as_default=False) as other:
        for client in (guest, other):
            report = zds.stream_chunks(array, client=client).map(total_of).run()
            assert report.emitted == CHUNK_COUNT
    one, two = posted_of(shown, array)
    assert {one.client, two.client} == {guest.id, other.id}
    for posted in (one, two):
        assert posted.outcome == "done", "the end is told, though the program goes on at once"
        assert posted.news.counts["chunks"] == {"emitted": CHUNK_COUNT}
        assert posted.news.planned == CHUNK_COUNT
        assert posted.snapshot["counts"]["emitted"] == CHUNK_COUNT
        assert posted.snapshot["map"]["totals"]["done"] == CHUNK_COUNT


def test_a_stream_is_seen_while_it_goes_on(shown: LocalCluster, guest: Client, array: str) -> None:
    items = iter(zds.stream_chunks(array, client=guest, concurrency=8).map(slowly(0.02)))
    next(items)

    def moves() -> bool:
        found = posted_of(shown, array)
        return bool(found) and found[0].running and found[0].news.counts.get("chunks", {}).get("emitted", 0) > 0

    def seen() -> bool:
        next(items, None)
        return moves()

    wait_until(seen, what="news of the stream", timeout_s=20.0)
    (posted,) = posted_of(shown, array)
    assert posted.news.in_flight > 0
    assert posted.snapshot["outcome"] == "running"
    rest = list(items)
    wait_until(lambda: posted.outcome == "done", what="its end", timeout_s=10.0)
    assert rest


def test_a_stream_that_is_left_early_is_told(shown: LocalCluster, guest: Client, array: str) -> None:
    for _ in zds.stream_chunks(array, client=guest, concurrency=8):
        break
    (posted,) = posted_of(shown, array)
    assert posted.outcome == "stopped early"


def test_the_end_of_a_program_with_an_event_loop_is_told(shown: LocalCluster, array: str) -> None:
    async def program() -> None:
        async with Client(shown.scheduler_address, asynchronous=True) as client:
            async for _ in zds.stream_chunks(array, client=client).map(slowly(0.001)):
                pass

    asyncio.run(program())
    wait_until(lambda: not posted_of(shown, array)[0].running, what="the end of the stream", timeout_s=20.0)
    assert [posted.outcome for posted in posted_of(shown, array)] == ["done"]


def test_scheduler_and_workers_show_figures(shown: LocalCluster, guest: Client, array: str) -> None:
    before = scrape(base_of(guest))
    workers = [f"http://127.0.0.1:{worker['services']['dashboard']}" for worker in
               guest.scheduler_info(n_workers=-1)["workers"].values()]  # fmt: skip
    done = "zds_worker_chunks_total outcome=done"
    read = sum(scrape(worker)[done] for worker in workers)
    zds.stream_chunks(array, client=guest).map(total_of).run()
    after = scrape(base_of(guest))
    (posted,) = posted_of(shown, array)
    name = posted.news.name
    assert f"zds_runs_total outcome=done stream={name}" not in before
    assert after[f"zds_runs_total outcome=done stream={name}"] == 1
    assert after[f"zds_chunks_total outcome=emitted stream={name}"] == CHUNK_COUNT
    assert after[f"zds_decoded_bytes_total stream={name}"] == 60 * 50 * 4
    assert after[f"zds_active_runs stream={name}"] == 0
    assert after["dask_scheduler_clients"] >= 1, "beside what the scheduler shows anyway"
    assert sum(scrape(worker)[done] for worker in workers) == read + CHUNK_COUNT


@pytest.mark.slow
def test_a_worker_that_joins_later_shows_figures_too(shown: LocalCluster, guest: Client) -> None:
    shown.scale(3)
    guest.wait_for_workers(3)
    found = guest.scheduler_info(n_workers=-1)["workers"]
    bases = [f"http://127.0.0.1:{worker['services']['dashboard']}" for worker in found.values()]
    wait_until(
        lambda: all("zds_worker_batches_total" in scrape(base) for base in bases),
        what="the figures of all workers",
        timeout_s=20.0,
    )
    shown.scale(2)


@pytest.mark.slow
def test_streams_are_seen_again_after_a_restart_of_the_cluster(shown: LocalCluster, guest: Client, array: str) -> None:
    guest.restart()
    zds.stream_chunks(array, client=guest).map(total_of).run()
    assert [posted.outcome for posted in posted_of(shown, array)] == ["done"]


def test_nothing_secret_gets_there(shown: LocalCluster, guest: Client, http_store: HttpStore) -> None:
    write_array(str(http_store.directory / "open.zarr"))
    url = f"{http_store.url}/open.zarr".replace("http://", "http://anna:hunter2@")
    zds.stream_chunks(url, client=guest).map(total_of).run()
    (posted,) = [one for one in board_of(shown).posted if one.news.name.endswith("open.zarr")]
    assert "hunter2" not in repr(posted)
    assert "open.zarr" in posted.snapshot["url"]
    assert "hunter2" not in fetch(f"{base_of(guest)}/metrics")


def test_junk_is_refused_and_nothing_is_unpickled(shown: LocalCluster, guest: Client) -> None:
    before = board_of(shown).version
    scheduler: Any = guest.scheduler
    for junk in ({"v": 1, "run": "x" * 1000}, "text", None, {"v": 1, "run": "r", "snapshot": "x" * 10**6}):
        with pytest.raises(zds.UsageError, match="expected news"):
            guest.sync(scheduler.zds_stream, client=guest.id, news=junk)
    assert board_of(shown).version == before


def test_a_page_that_comes_later_shows_streams_under_way(
    tmp_path: Path, array: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "_ASK_EVERY_S", 0.1)
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        items = iter(zds.stream_chunks(array, concurrency=4))
        next(items)
        zds.dashboard(client)
        wait_until(lambda: bool(posted_of(cluster, array)), what="news of the stream", timeout_s=20.0)
        assert len(list(items)) == CHUNK_COUNT - 1
        assert [posted.outcome for posted in posted_of(cluster, array)] == ["done"]


def test_without_a_dashboard_it_says_so_and_streams_run(client: Client, array: str) -> None:
    try:
        with pytest.raises(zds.ClusterError, match=r"dashboard is switched off .*Streams run all the same"):
            zds.dashboard(client)
        assert zds.stream_chunks(array).map(total_of).run().emitted == CHUNK_COUNT
        name = array.rpartition("/")[2]
        found = [key for key in scrape(base_of(client)) if key.startswith("zds_chunks_total") and name in key]
        assert found, "figures need no Bokeh"
    finally:
        client.unregister_scheduler_plugin("zarr-dask-stream")
        client.set_metadata(["zarr-dask-stream"], None)


def test_without_bokeh_it_says_what_to_install(array: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        monkeypatch.setitem(sys.modules, "bokeh.server.server", None)
        with pytest.raises(zds.ClusterError, match=r"no Bokeh .*zarr-dask-stream\[dashboard\]"):
            zds.dashboard(client)
        assert zds.stream_chunks(array).map(total_of).run().emitted == CHUNK_COUNT


DIES = """
import sys, time
import zarr_dask_stream as zds
from distributed import Client
with Client(sys.argv[1]) as client:
    for number, _ in enumerate(zds.stream_chunks(sys.argv[2], concurrency=4)):
        print(number, flush=True)
        time.sleep(0.05)
"""


@pytest.mark.slow
@pytest.mark.sample
def test_the_stream_of_a_client_that_is_killed_is_gone(
    start_tcp_cluster: Callable[..., TcpCluster], array: str
) -> None:
    """A scheduler with the preload, in a process of its own, and a client that dies in mid-stream."""
    cluster = start_tcp_cluster(
        workers=1,
        scheduler_arguments=["--dashboard", "--preload", "zarr_dask_stream.watch.dashboard"],
        worker_arguments=["--dashboard-address", "127.0.0.1:0"],
    )
    name = "/".join(array.split("/")[-2:])
    with Client(cluster.address, set_as_default=False) as client:
        base = base_of(client)
        assert is_drawn_by_bokeh(fetch(f"{base}/{PAGE}"))
        victim = subprocess.Popen(
            [sys.executable, "-c", DIES, cluster.address, array], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        active, gone = f"zds_active_runs stream={name}", f"zds_runs_total outcome=gone stream={name}"
        (worker,) = client.scheduler_info(n_workers=-1)["workers"].values()
        at_worker = f"http://127.0.0.1:{worker['services']['dashboard']}"
        try:
            wait_until(lambda: scrape(base).get(active) == 1, what="the stream to be seen", timeout_s=40.0)
            wait_until(
                lambda: scrape(at_worker).get("zds_worker_batches_total", 0) > 0, what="a batch to end", timeout_s=40.0
            )
            os.kill(victim.pid, signal.SIGKILL)
            wait_until(lambda: scrape(base).get(gone) == 1, what="the stream to be gone", timeout_s=40.0)
        finally:
            victim.kill()
            victim.communicate()
        assert scrape(base)[active] == 0


def test_memory_is_bounded_whatever_the_grid(shown: LocalCluster, guest: Client, tmp_path: Path) -> None:
    big = zarr.create_array(str(tmp_path / "big.zarr"), shape=(1000, 1000), chunks=(1, 1), dtype="i1")
    for _ in zds.stream_chunks(big, client=guest, concurrency=4):
        break
    (posted,) = [one for one in board_of(shown).posted if one.news.name.endswith("big.zarr")]
    assert len(posted.news.snapshot) < 100_000
    assert posted.snapshot["map"]["layout"]["grid_shape"] == [1000, 1000]
