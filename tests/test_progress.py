"""The bar, the lines and the callback."""

from __future__ import annotations

import io
import json
import logging
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import zarr
from rich.console import Console

import zarr_dask_stream as zds
from zarr_dask_stream.engine.events import (
    Batch,
    BatchFinished,
    BatchStats,
    Category,
    ChunkDeadLettered,
    ChunkRetried,
    ChunksEmitted,
    ClusterChanged,
    DeadLetter,
    Failure,
    Notice,
    RunFinished,
    RunStarted,
)
from zarr_dask_stream.watch import progress
from zarr_dask_stream.watch.progress import progress_observer

SHOW_CURSOR = "\x1b[?25h"


class Play:
    """Plays notices to a report and to what `progress_observer` made."""

    def __init__(self, *, terminal: bool) -> None:
        self.out = io.StringIO()
        console = Console(file=self.out, force_terminal=terminal, width=80, color_system=None, _environ={})
        self.report = zds.Report()
        self.observer = progress_observer(True, self.report, console)

    def __call__(self, *notices: Notice) -> str:
        for notice in notices:
            self.report.handle(notice)
            self.observer(notice)
        return self.out.getvalue()


def started(total: int | None = 1000) -> RunStarted:
    return RunStarted(0.0, total, 8, (10,), "memory://")


def finished(at: float = 4.0, outcome: str = "done", total: int = 1000) -> RunFinished:
    return RunFinished(at, outcome, total, 0.0, 1, 8)


def emitted(at: float, first: int, stop: int) -> ChunksEmitted:
    return ChunksEmitted(at, tuple(range(first, stop)))


def retried(at: float) -> ChunkRetried:
    return ChunkRetried(at, Failure(3, Category.TRANSIENT, "OSError", "reset"), 1, 0.1)


def test_the_bar_ends_with_the_whole_account_on_one_line_of_80() -> None:
    text = Play(terminal=True)(started(), emitted(1.0, 0, 1000), finished())
    last = text.split("\x1b[2K")[-1].split("\n")[0]
    assert "1,000/1,000 chunks · 4.0 s · 250/s" in last
    assert len(last) <= 80


def test_trouble_has_a_line_of_its_own_and_fits_with_large_numbers() -> None:
    play = Play(terminal=True)
    text = play(started(123_456_789), emitted(1.0, 0, 9), retried(2.0), retried(2.0), finished(7265.0, "failed"))
    assert "2 retries" in text
    assert "failed" in text
    lines = re.split(r"[\r\n]|\x1b\[2K", text)
    assert all(len(re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", line)) <= 80 for line in lines)


@pytest.mark.parametrize("terminal", [True, False])
def test_what_was_given_up_and_how_fast_it_goes_is_said(*, terminal: bool) -> None:
    play = Play(terminal=terminal)
    letter = DeadLetter((3,), (slice(3, 4),), 3, "corrupt", "ValueError", "bad")
    stats = BatchStats(bytes_decoded=8 * 2**20)
    play(started(1000), BatchFinished(2.0, Batch(1, (range(4),), 4, 32), stats, 1.0, 0.0), emitted(2.0, 0, 499))
    text = play(ChunkDeadLettered(3.0, 3, letter), finished(4.0))
    for expected in ("500/1,000 chunks", "125/s", "2.0 MiB/s", "1 dead letter"):
        assert expected in text


def test_a_run_without_a_known_total_still_counts() -> None:
    assert "12/? chunks" in Play(terminal=False)(started(None), emitted(11.0, 0, 12))


def test_waiting_for_workers_is_said() -> None:
    play = Play(terminal=False)
    assert "waiting for a worker" in play(started(), ClusterChanged(20.0, 0, 0, 20.0))
    assert "waiting for a worker" not in play(finished()).splitlines()[-1]


def test_the_cursor_comes_back_when_the_run_is_left() -> None:
    text = Play(terminal=True)(started(), emitted(1.0, 0, 3), finished(1.5, "stopped early"))
    assert text.rindex(SHOW_CURSOR) > text.rindex("\x1b[?25l")
    assert "stopped early" in text


def test_where_nothing_can_be_drawn_there_are_lines_at_intervals() -> None:
    play = Play(terminal=False)
    assert play(started(), *(emitted(n / 100, n, n + 1) for n in range(900))) == ""
    text = play(emitted(10.0, 900, 950), emitted(10.1, 950, 960), retried(10.2), emitted(20.5, 960, 980))
    assert text.splitlines() == [
        "zds: 950/1,000 chunks, 95/s, 0 B/s, 1.0 s left",
        "zds: 980/1,000 chunks, 48/s, 0 B/s, 1.0 s left, 1 retry",
    ]
    assert play(finished(21.0)).splitlines()[-1] == "zds: 980/1,000 chunks, 21.0 s, 47/s, 0 B/s, 1 retry"
    assert "\x1b" not in play()


def test_events_cost_no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []
    draw = progress._Bar._draw

    def counted(self: Any) -> Any:
        drawn.append(time.monotonic())
        return draw(self)

    monkeypatch.setattr(progress._Bar, "_draw", counted)
    play = Play(terminal=True)
    play(started(100_000))
    began = time.monotonic()
    n = 0
    while time.monotonic() < began + 1.0:
        play(emitted(1.0, n, n + 1))
        n += 1
    play(finished())
    assert n > 1000
    assert len(drawn) <= 10 + 5  # ten a second, and those at the beginning and the end


# -- on a real stream -----------------------------------------------------------------------------


@pytest.fixture
def array() -> Any:
    array = zarr.create_array({}, shape=(20,), chunks=(2,), dtype="i4")
    array[:] = np.arange(1, 21)
    return array


@pytest.mark.parametrize("concurrency", [1, None])
def test_a_callable_hears_how_far_it_is(array: Any, concurrency: int | None) -> None:
    heard: list[tuple[int, int]] = []
    zds.stream_chunks(array, concurrency=concurrency, progress=lambda done, total: heard.append((done, total))).run()
    assert heard[-1] == (10, 10)
    assert heard == sorted(set(heard))


def test_a_callable_that_raises_is_logged_and_dropped_and_the_stream_goes_on(
    array: Any, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def broken(done: int, total: int) -> None:
        calls.append(done)
        raise RuntimeError("no paper")

    with caplog.at_level(logging.ERROR, "zarr_dask_stream"):
        assert zds.stream_chunks(array, concurrency=1, progress=broken).run().emitted == 10
    assert len(calls) == 1
    (record,) = caplog.records
    assert "broken" in record.getMessage()
    assert record.exc_info
    assert "no paper" in str(record.exc_info[1])


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, _environ={})
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    return out


def _drain(stream: zds.ChunkStream) -> None:
    for _ in stream:
        pass


def _interrupt(stream: zds.ChunkStream) -> None:
    def body() -> None:
        for _ in stream:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        body()


def _leave(stream: zds.ChunkStream) -> None:
    for _ in stream:
        break


@pytest.mark.parametrize("consume", [_drain, _interrupt, _leave])
def test_one_bar_for_each_run_and_a_terminal_as_before(
    array: Any, terminal: io.StringIO, consume: Callable[[zds.ChunkStream], None], leak_check: object
) -> None:
    stream = zds.stream_chunks(array, concurrency=1, progress=True)
    for run in (1, 2):
        consume(stream)
        text = terminal.getvalue()
        assert text.count(SHOW_CURSOR) == run
        assert text.endswith(SHOW_CURSOR)


@pytest.mark.slow  # a kernel has to start
def test_a_notebook_shows_a_widget_and_the_report_as_a_picture() -> None:
    import nbformat  # noqa: PLC0415  # only this test needs the notebook's packages
    from nbclient import NotebookClient  # noqa: PLC0415  # slow to import

    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import zarr, zarr_dask_stream as zds\n"
        "array = zarr.create_array({}, shape=(20,), chunks=(2,), dtype='i4')\n"
        "report = zds.stream_chunks(array, concurrency=1, progress=True).run()\n"
        "print(report.emitted)\n"
        "report"
    )
    v4: Any = nbformat.v4  # has no annotations
    notebook = v4.new_notebook(cells=[v4.new_code_cell(code)])
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    assert "10\n" in "".join(out.get("text", "") for out in outputs if out.get("name") == "stdout")
    assert any("application/vnd.jupyter.widget-view+json" in out.get("data", {}) for out in outputs)
    drawn = re.sub(r"<[^>]+>", " ", json.dumps(notebook.metadata["widgets"]))
    assert "10/10 chunks" in drawn
    assert re.search(r"[0-9]/s", drawn)
    assert "Chunk map" in outputs[-1]["data"]["text/html"]


@pytest.mark.parametrize("concurrency", [1, 2])
def test_of_a_stream_that_takes_a_few_the_way_to_those_is_shown(concurrency: int) -> None:
    array = zarr.create_array({}, shape=(20,), chunks=(1,), dtype="i4")
    seen: list[tuple[int, int]] = []
    stream = zds.stream_chunks(array, concurrency=concurrency, progress=lambda done, total: seen.append((done, total)))
    stream = stream.filter(lambda chunk: chunk.index[0] % 2).take(3)
    assert [chunk.index for chunk in stream] == [(1,), (3,), (5,)]
    assert seen[-1] == (3, 3)
    assert {total for _, total in seen} == {3}
    report = stream.report
    assert report.total == report.emitted + report.filtered + report.cancelled == 20


def test_a_stream_that_takes_more_than_there_are_ends_full() -> None:
    array = zarr.create_array({}, shape=(4,), chunks=(1,), dtype="i4")
    seen: list[tuple[int, int]] = []
    stream = zds.stream_chunks(array, concurrency=1, progress=lambda done, total: seen.append((done, total)))
    assert len(list(stream.take(9))) == 4
    assert seen[-1] == (4, 4)
