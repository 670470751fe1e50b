"""The page of a dashboard as a document, before any browser sees it."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import pytest
import zarr
from bokeh.document import Document
from bokeh.document.events import ColumnsPatchedEvent
from bokeh.models import ColumnDataSource
from bokeh.models.widgets.inputs import Select
from bokeh.models.widgets.markups import Div

import zarr_dask_stream as zds
from zarr_dask_stream.engine.events import (
    Batch,
    BatchSubmitted,
    Category,
    ChunkDeadLettered,
    ChunksEmitted,
    DeadLetter,
    Failure,
    RunFinished,
    RunStarted,
)
from zarr_dask_stream.watch.board import Board, News
from zarr_dask_stream.watch.chunkmap import OUTSIDE
from zarr_dask_stream.watch.figures import Figures
from zarr_dask_stream.watch.report import Report
from zarr_dask_stream.watch.seen import PALETTE
from zarr_dask_stream.watch.snapshot import snapshot
from zarr_dask_stream.watch.streams_page import streams_page


class Shown:
    """A page, the board behind it and the clock on the wall."""

    def __init__(self) -> None:
        self.board = Board()
        self.now = 100.0
        self.doc = Document()
        streams_page(self.board, clock=lambda: self.now)(None, {}, self.doc)
        (self.callback,) = self.doc.session_callbacks

    def update(self) -> None:
        self.callback.callback()
        self.doc.validate()

    def div(self, name: str) -> str:
        model: Any
        (model,) = self.doc.select({"type": Div, "name": name})
        return str(model.text) if model.visible else ""

    def source(self, name: str) -> Any:
        (model,) = self.doc.select({"type": ColumnDataSource, "name": name})
        return model

    @property
    def select(self) -> Any:
        (model,) = self.doc.select({"type": Select})
        return model

    def rows(self) -> list[dict[str, str]]:
        """Return the table as a reader sees it."""
        text = self.div("streams")
        names = re.findall(r"<th [^>]*>(.*?)</th>", text)
        rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr[^>]*>(<td.*?)</tr>", text)]
        return [dict(zip(names, [re.sub("<.*?>", "", cell) for cell in row], strict=True)) for row in rows]


@pytest.fixture
def shown() -> Shown:
    return Shown()


class Run:
    """A run as it is told: its report, its figures, and what a publisher makes of them."""

    def __init__(self, shape: tuple[int, ...] = (4, 6), url: str = "/data/a.zarr", run: str = "r1") -> None:
        self.report, self.figures, self.run = Report(), Figures(), run
        self.tell(RunStarted(0.0, int(np.prod(shape)), 8, shape, url))

    def tell(self, *notices: Any) -> Run:
        for notice in notices:
            self.report.handle(notice)
            self.figures.handle(notice)
        return self

    def news(self, **changes: Any) -> News:
        seen = snapshot(self.report, self.report.chunkmap, self.report.history)
        given = {
            "v": 1, "run": self.run, "name": self.figures.name, "whose": "host:1", "outcome": self.report.outcome,
            "counts": self.figures.copy(), "planned": self.figures.planned, "in_flight": self.figures.in_flight,
            "snapshot": json.dumps(seen),
        }  # fmt: skip
        return News.parse({**given, **changes})


def sent(start: int, stop: int, batch: int = 1) -> BatchSubmitted:
    count = stop - start
    return BatchSubmitted(0.1, Batch(batch, (range(start, stop),), count, 8 * count, fresh=True), count, 8 * count)


def dead(number: int, message: str) -> ChunkDeadLettered:
    failure = Failure(number, Category.FUNCTION, "ValueError", message)
    return ChunkDeadLettered(0.3, number, DeadLetter.of(failure, (0, number), (slice(0, 1),) * 2, 1, "no"))


def test_an_empty_board_says_what_will_be_seen(shown: Shown) -> None:
    assert "No stream has been seen so far" in shown.div("head")
    assert not shown.div("streams")
    assert not shown.select.visible
    assert shown.doc.title == "Dask: Zarr streams"


def test_cells_change_as_chunks_end(shown: Shown) -> None:
    run = Run().tell(sent(0, 8))
    shown.board.post("anna", run.news(), shown.now)
    shown.update()
    cells = shown.source("cells")
    assert len(cells.data["x"]) == 24
    assert list(cells.data["what"][:9]) == ["in flight"] * 8 + ["planned"]
    assert cells.data["fill"][0] == PALETTE["in flight"]
    assert cells.data["where"][7] == "(1, 1)"
    run.tell(ChunksEmitted(0.3, (0, 1)), dead(2, "broken"))
    shown.board.post("anna", run.news(), shown.now)
    shown.update()
    assert list(cells.data["what"][:4]) == ["done", "done", "dead", "in flight"]
    assert cells.data["fill"][:3] == [PALETTE["done"], PALETTE["done"], PALETTE["dead"]]


def test_only_what_changed_goes_to_the_browser(shown: Shown) -> None:
    run = Run((60, 60)).tell(sent(0, 8))
    shown.board.post("anna", run.news(), shown.now)
    shown.update()
    patches: list[Any] = []

    def note(event: Any) -> None:
        if isinstance(event, ColumnsPatchedEvent):
            patches.append(event.patches)

    shown.doc.on_change(note)
    shown.update()
    assert not patches
    shown.board.post("anna", run.tell(ChunksEmitted(0.3, (0, 1))).news(), shown.now)
    shown.update()
    (patch,) = patches
    assert [place for place, _ in patch["what"]] == [0, 1]


def test_figures_are_written_out(shown: Shown) -> None:
    run = Run().tell(sent(0, 12), ChunksEmitted(0.3, tuple(range(6))), dead(7, "broken"))
    shown.board.post("anna", run.news(), shown.now)
    shown.update()
    assert "1 running, 0 ended" in shown.div("head")
    assert "7 of 24" in shown.div("figures")
    assert 'aria-valuenow="29"' in shown.div("figures")
    assert "in flight 5" in shown.div("legend")
    assert "dead 1" in shown.div("legend")
    assert "broken" in shown.div("causes")
    (row,) = shown.rows()
    assert row["Stream"] == "data/a.zarr"
    assert row["State"] == "running"
    assert row["Chunks"] == "7 of 24"
    assert row["Dead letters"] == "1"


def test_how_it_ended_is_told(shown: Shown) -> None:
    run = Run().tell(sent(0, 24), ChunksEmitted(0.3, tuple(range(24))), RunFinished(0.4, "done", 24, 0.0, 24, 192))
    shown.board.post("anna", run.news(), shown.now)
    broken = Run(run="r2").tell(RunFinished(0.4, "failed", 24, 0.0, 24, 192, error="StoreError: no such bucket"))
    shown.board.post("bert", broken.news(), shown.now)
    lost = Run(run="r3").tell(sent(0, 3))
    shown.board.post("carl", lost.news(), shown.now)
    shown.board.left("carl")
    shown.update()
    assert {row["State"] for row in shown.rows()} == {"done", "failed", "client gone"}
    assert "client left before it ended" in shown.div("title")


def test_a_run_that_is_chosen_stays_chosen(shown: Shown) -> None:
    first, second = Run(url="/data/first.zarr", run="r1"), Run(url="/data/second.zarr", run="r2")
    shown.board.post("anna", first.news(), shown.now)
    shown.board.post("anna", second.news(), shown.now)
    shown.update()
    assert "second.zarr" in shown.div("title"), "the latest, as long as nobody chooses"
    assert [run for run, _ in shown.select.options] == ["", "r2", "r1"]
    shown.select.value = "r1"
    assert "first.zarr" in shown.div("title")
    shown.board.post("anna", Run(url="/data/third.zarr", run="r3").news(), shown.now)
    shown.update()
    assert "first.zarr" in shown.div("title")
    assert shown.div("streams").index('aria-current="true"') > shown.div("streams").index("third.zarr")


def test_one_that_is_forgotten_is_shown_no_more(shown: Shown) -> None:
    shown.board.post("anna", Run(run="old").tell(RunFinished(0.4, "done", 24, 0.0, 24, 192)).news(), shown.now)
    shown.update()
    shown.select.value = "old"
    done = Run().tell(RunFinished(0.4, "done", 24, 0.0, 24, 192))
    for number in range(100):
        done.run = f"r{number}"
        shown.board.post("anna", done.news(snapshot=""), shown.now)
    shown.update()
    assert shown.select.value == ""
    assert len(shown.rows()) == 12
    assert "88 more" in shown.div("streams")


def test_a_stream_that_stands_still_is_told(shown: Shown) -> None:
    shown.board.post("anna", Run().tell(sent(0, 3)).news(), shown.now)
    shown.now += 65
    shown.update()
    assert "No chunk has moved for 1 min" in shown.div("title")
    assert shown.rows()[0]["Last news"] == "1 min ago"


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (0, 3), (1000,), (3, 4, 5), (1000, 1000), (10**6,), (2, 100_000)])
def test_grids_of_any_shape_are_drawn(shown: Shown, shape: tuple[int, ...]) -> None:
    run = Run(shape)
    shown.board.post("anna", run.news(), shown.now)
    shown.update()
    count = len(shown.source("cells").data["x"])
    assert count == np.count_nonzero(run.report.chunkmap.states() != OUTSIDE) <= 4096
    assert (count > 1000) is (math.prod(shape) > 1000)


def test_texts_of_strangers_are_text(shown: Shown) -> None:
    evil = "<script>alert(1)</script>"
    run = Run(url=f"/data/{evil}").tell(dead(0, evil), dead(1, f"<img src=x onerror={evil}>"))
    shown.board.post("anna", run.news(name=evil), shown.now)
    shown.update()
    shown.board.post("anna", run.tell(RunFinished(0.4, "failed", 24, 0.0, 24, 192, error=evil)).news(name=evil), 0.0)
    shown.update()
    divs: list[Any] = list(shown.doc.select({"type": Div}))
    texts = [str(model.text) for model in divs]
    assert not any("<script" in text or "<img" in text for text in texts)
    assert "&lt;script&gt;" in shown.div("title")


@pytest.mark.parametrize(
    "change",
    [
        {"map": {}},
        {"map": None},
        {"counts": {"settled": "many"}},
        {"time": {"fetch": "<b>long</b>"}},
        {"causes": [{"error_type": "x", "message": "y", "tries": "<b>", "dead": 1}]},
        {"series": {"chunks": {"t": [1], "y": []}}},
        {"series": None},
        {"at": None},
    ],
)
def test_a_snapshot_that_makes_no_sense_leaves_the_rest_as_it_is(shown: Shown, change: dict[str, Any]) -> None:
    run = Run().tell(sent(0, 3))
    seen = snapshot(run.report, run.report.chunkmap, run.report.history)
    shown.board.post("anna", run.news(snapshot=json.dumps({**seen, **change})), shown.now)
    shown.board.post("bert", Run(run="r2").news(), shown.now)
    shown.update()
    assert [row["Stream"] for row in shown.rows()] == ["data/a.zarr", "data/a.zarr"]
    shown.select.value = "r1"
    assert "can't read" in shown.div("title")
    assert not shown.div("figures")
    shown.select.value = "r2"
    assert shown.div("figures")


@pytest.mark.parametrize(
    "layout",
    [
        {"shape": [10**6, 10**6]},
        {"shape": [-1, -1]},
        {"axes": [0, 7]},
        {"merge": [0, 0]},
        {"kind": "sphere"},
        {"grid_shape": [1] * 1000},
        {"axes": []},
    ],
)
def test_a_map_that_would_be_too_large_or_wrong_is_not_drawn(shown: Shown, layout: dict[str, Any]) -> None:
    run = Run()
    seen = snapshot(run.report, run.report.chunkmap, run.report.history)
    seen["map"]["layout"].update(layout)
    shown.board.post("anna", run.news(snapshot=json.dumps(seen)), shown.now)
    shown.update()
    assert "can't read" in shown.div("title")
    assert not shown.source("cells").data["x"]


def test_a_real_run_is_drawn(shown: Shown) -> None:
    array = zarr.create_array({}, shape=(12, 20), chunks=(2, 2), dtype="i4")
    array[:] = 1
    stream = zds.stream_chunks(array, concurrency=1)
    figures = Figures()
    report = stream.filter(lambda chunk: chunk.index[0] > 1).run()
    for notice in (RunStarted(0.0, 60, 8, (6, 10), "x"),):
        figures.handle(notice)
    seen = snapshot(report, report.chunkmap, report.history)
    news = News.parse({"v": 1, "run": "r", "name": "a", "outcome": "done", "snapshot": json.dumps(seen), "planned": 60})
    shown.board.post("anna", news, shown.now)
    shown.update()
    assert set(shown.source("cells").data["what"]) == {"done", "filtered"}
    assert "filtered 20" in shown.div("legend")
