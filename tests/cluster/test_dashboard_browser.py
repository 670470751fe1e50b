"""The page of streams on a real dashboard in a real browser."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from distributed import Client, LocalCluster

import zarr_dask_stream as zds
from cluster.streaming import slowly
from realparts.browser import Browser
from zarr_dask_stream.watch.chunkmap import COLOURS

pytestmark = pytest.mark.cluster

READY = "() => window.Bokeh && Bokeh.documents.length && Bokeh.documents[0].is_idle"
DONE = COLOURS["light"]["done"]
CELLS = """() => {
  const source = Bokeh.documents[0].get_model_by_name("cells");
  const counts = {};
  for (const what of source.data.what) { const key = what.split(",")[0]; counts[key] = (counts[key] || 0) + 1; }
  return counts;
}"""
PIXELS = """() => {
  const found = {};
  const roots = [document];
  while (roots.length) {
    const root = roots.pop();
    for (const one of root.querySelectorAll("*")) {
      if (one.shadowRoot) roots.push(one.shadowRoot);
      if (one.tagName !== "CANVAS" || !one.width || !one.height) continue;
      const data = one.getContext("2d").getImageData(0, 0, one.width, one.height).data;
      for (let i = 0; i < data.length; i += 4) {
        if (data[i + 3] < 250) continue;
        const key = "#" + [0, 1, 2].map((k) => data[i + k].toString(16).padStart(2, "0")).join("");
        found[key] = (found[key] || 0) + 1;
      }
    }
  }
  return found;
}"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, memory_limit=0, dashboard_address="127.0.0.1:0"
    ) as cluster:
        yield cluster


def whose() -> str:
    """Return how the streams of this process are marked."""
    return f"{socket.gethostname()}:{os.getpid()}"


def fails_at_times(chunk: zds.Chunk) -> Any:
    """Fail for one chunk in forty."""
    if sum(chunk.index) % 40 == 7:
        raise ValueError(f"chunk {chunk.index} has a <bad> header")
    return slowly(0.004)(chunk)


def test_cells_change_colour_while_two_clients_stream(cluster: LocalCluster, browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "hourly.zarr"
    array = zarr.create_array(str(path), shape=(240, 400), chunks=(10, 10), dtype="f4")
    array[:] = np.random.default_rng(1).random((240, 400), dtype="f4")
    with Client(cluster) as client, Client(cluster, set_as_default=False) as other, browser.tab() as tab:
        tab.goto(zds.dashboard(client))
        tab.page.wait_for_function(READY)
        tab.page.get_by_text("No stream has been seen so far").wait_for()
        tab.shot(tmp_path / "empty.png")

        assert zds.stream_chunks(str(path), client=other, region=(slice(0, 100), slice(0, 100))).run().emitted == 100
        tab.page.get_by_text("0 running, 1 ended").wait_for()
        room = threading.Semaphore(0)
        problems: list[BaseException] = []

        def streams() -> None:
            try:
                for _ in zds.stream_chunks(
                    str(path), client=client, concurrency=24, ordered=False, on_error="skip"
                ).map(fails_at_times):
                    room.acquire(timeout=30)
            except BaseException as error:  # noqa: BLE001  # shown by the test, below
                problems.append(error)

        running = threading.Thread(target=streams)
        running.start()
        try:
            room.release(400)
            tab.page.get_by_text("1 running, 1 ended").wait_for()
            tab.page.wait_for_function(f"() => (({CELLS})().done || 0) >= 300")
            before = tab.page.evaluate(CELLS)
            assert before["planned"] > 100
            assert 0 < before["in flight"] <= 24
            pixels = tab.page.evaluate(PIXELS)
            assert pixels[DONE] > 5000, "the colour of cells that are done"
            tab.shot(tmp_path / "running.png")
        finally:
            room.release(10_000)
            running.join(60)
        assert not problems
        tab.page.get_by_text("0 running, 2 ended").wait_for()
        after = tab.page.evaluate(CELLS)
        assert after["dead"] == 24
        assert after["done"] == 960 - after["dead"]
        assert tab.page.evaluate(PIXELS)[DONE] > pixels[DONE]
        tab.page.get_by_role("row", name="960 of 960").get_by_text("done").wait_for()
        tab.page.get_by_text("chunk (#) has a <bad> header").wait_for()
        tab.shot(tmp_path / "done.png")
        tab.page.get_by_label("Show").select_option(label=f"{path.parent.name}/{path.name}, done, {whose()}, no. 1")
        tab.page.get_by_text("100 of 100").nth(1).wait_for()
        assert tab.page.evaluate(CELLS) == {"done": 100}
        assert not tab.errors
        host = str(client.dashboard_link).rpartition("/")[0]
        assert {request for request in tab.requests if not request.startswith((host, "data:", "blob:"))} == set()


def test_the_bar_on_top_leads_to_it(cluster: LocalCluster, browser: Browser) -> None:
    with Client(cluster) as client, browser.tab() as tab:
        zds.dashboard(client)
        tab.goto(str(client.dashboard_link))
        tab.page.get_by_role("link", name="Zarr-Streams").click()
        tab.page.get_by_role("heading", name="Zarr streams").wait_for()
        assert tab.page.title() == "Dask: Zarr streams"
