"""The page of the dashboard in a real browser, from a real Bokeh server: what a pointer finds on it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from bokeh.application import Application
from bokeh.application.handlers import FunctionHandler
from bokeh.server.server import Server

from realparts.browser import Browser, Tab
from zarr_dask_stream.engine.events import Batch, BatchSubmitted, ChunksEmitted, RunStarted
from zarr_dask_stream.watch.board import Board, News
from zarr_dask_stream.watch.figures import Figures
from zarr_dask_stream.watch.report import Report
from zarr_dask_stream.watch.snapshot import snapshot
from zarr_dask_stream.watch.streams_page import streams_page

pytestmark = pytest.mark.xdist_group("browser")

SHAPE = (4, 6)
# Where the middle of a cell of the map is on the screen.
FIND = """([column, row]) => {
  const found = []
  const walk = (view) => {
    if (view.model?.type === "Figure" && view.model.title.text.startsWith("Chunks: ")) {
      const at = view.el.getBoundingClientRect()
      found.push([at.x + view.frame.x_scale.compute(column + 0.5), at.y + view.frame.y_scale.compute(row + 0.5)])
    }
    for (const child of view.child_views ?? []) walk(child)
  }
  for (const root of Bokeh.index.roots) walk(root)
  return found[0]
}"""
# What all tooltips say that can be seen, through every shadow root.
TIPS = """() => {
  const said = []
  const walk = (root) => {
    for (const element of root.querySelectorAll("*")) {
      if (element.classList.contains("bk-tooltip-content") && element.getBoundingClientRect().width) {
        said.push(element.textContent)
      }
      if (element.shadowRoot) walk(element.shadowRoot)
    }
  }
  walk(document)
  return said.join(" | ")
}"""


class Shown:
    """A board, what a client posts on it, and a server with the page."""

    def __init__(self) -> None:
        self.board, self.report, self.figures = Board(), Report(), Figures()
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._ready.wait(30)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        page = streams_page(self.board)
        application = Application(FunctionHandler(lambda doc: page(None, {}, doc)))
        server = Server({"/streams": application}, port=0, address="127.0.0.1", allow_websocket_origin=["*"])
        server.start()
        self.port = server.port or 0
        self._ready.set()
        self._loop.run_forever()
        server.stop()
        self._loop.run_until_complete(asyncio.sleep(0.05))

    def tell(self, *notices: Any) -> None:
        """Post what has happened, in the thread of the server."""
        for notice in notices:
            self.report.handle(notice)
            self.figures.handle(notice)
        seen = snapshot(self.report, self.report.chunkmap, self.report.history)
        news = News.parse(
            {
                "v": 1, "run": "r1", "name": self.figures.name, "whose": "host:1", "outcome": self.report.outcome,
                "counts": self.figures.copy(), "planned": self.figures.planned, "in_flight": self.figures.in_flight,
                "snapshot": json.dumps(seen),
            }
        )  # fmt: skip
        posted = threading.Event()

        def post() -> None:
            self.board.post("anna", news, time.time())
            posted.set()

        self._loop.call_soon_threadsafe(post)
        assert posted.wait(30)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()


@pytest.fixture
def shown() -> Iterator[Shown]:
    made = Shown()
    yield made
    made.close()


def begin(shown: Shown) -> None:
    total = int(np.prod(SHAPE))
    shown.tell(
        RunStarted(0.0, total, 8, SHAPE, "/data/a.zarr"),
        BatchSubmitted(0.1, Batch(1, (range(8),), 8, 64, fresh=True), 8, 64),
    )


def look(shown: Shown, tab: Tab) -> None:
    tab.page.goto(f"http://127.0.0.1:{shown.port}/streams")
    tab.page.wait_for_function("window.Bokeh?.documents[0]?.is_idle")


def point(tab: Tab, column: int, row: int) -> None:
    """Move the pointer over a cell, in steps as a hand does."""
    tab.page.wait_for_function(f"() => ({FIND})([0, 0])?.every(Number.isFinite)")
    x, y = tab.page.evaluate(FIND, [column, row])
    tab.page.mouse.move(x - 4, y - 3)
    tab.page.mouse.move(x, y, steps=4)


def wait_for_tip(tab: Tab, text: str) -> None:
    tab.page.wait_for_function(f"(text) => ({TIPS})() === text", arg=text, timeout=10_000)


@pytest.mark.parametrize("first", ["the page", "the stream"])
def test_a_cell_says_which_chunk_it_is_and_what_became_of_it(browser: Browser, shown: Shown, first: str) -> None:
    with browser.tab() as tab:
        if first == "the page":
            look(shown, tab)
            begin(shown)
        else:
            begin(shown)
            look(shown, tab)
        point(tab, 1, 1)
        wait_for_tip(tab, "(1, 1)in flight")
        shown.tell(ChunksEmitted(0.3, tuple(range(8))))
        tab.page.wait_for_timeout(1200)  # an update of the page, and one more
        point(tab, 1, 1)
        wait_for_tip(tab, "(1, 1)done")
        point(tab, 4, 3)
        wait_for_tip(tab, "(3, 4)planned")
        assert tab.errors == []
