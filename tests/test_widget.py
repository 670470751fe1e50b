"""The live widget: what it sends, what it does when something is pressed, and all of that in a real kernel."""

from __future__ import annotations

import gc
import pickle
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
import zarr

import zarr_dask_stream as zds
from zarr_dask_stream.engine.throttle import RateLimit
from zarr_dask_stream.watch import widget as module
from zarr_dask_stream.watch.chunkmap import COLOURS, GROUNDS, STATES
from zarr_dask_stream.watch.widget import StreamWidget, changed_rate

pytest.importorskip("anywidget", reason="the widget: pip install '.[notebook]'")
kernels = pytest.importorskip("jupyter_client.manager", reason="a kernel: pip install '.[notebook]'")

SCRIPT, STYLE = ((files("zarr_dask_stream.watch") / f"widget.{kind}").read_text() for kind in ("js", "css"))


@pytest.fixture
def stream() -> zds.ChunkStream:
    array = zarr.create_array({}, shape=(6, 4, 4), chunks=(2, 2, 2), dtype="i4")
    array[:] = 7
    return zds.stream_chunks(array, concurrency=1)


@pytest.fixture
def widget(stream: zds.ChunkStream) -> Iterator[StreamWidget]:
    made = stream.widget()
    yield made
    made.close()


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "zds-widget"]


def soon(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# -- what it follows ------------------------------------------------------------------------------------


def test_it_follows_each_run_with_a_thread_that_ends_with_it(stream: zds.ChunkStream, widget: StreamWidget) -> None:
    frames: list[dict[str, Any]] = []
    widget.view.observe(lambda change: frames.append(change.new), names="frame")
    assert (widget.view.frame["badge"], threads()) == ("not started", [])
    for run in (1, 2):
        for _ in stream:
            soon(lambda: bool(frames) and frames[-1]["live"])
            assert len(threads()) == 1
        soon(lambda: not threads())
        assert (frames[-1]["badge"], frames[-1]["run"]) == ("done", run)
        assert set(frames[-1]["cells"]) == {STATES.index("done")}


def test_it_shows_a_run_that_has_begun_before(stream: zds.ChunkStream) -> None:
    items = iter(stream)
    next(items)
    late = stream.widget()
    soon(lambda: late.view.frame["live"])
    assert late.view.frame["maps"] == ["the longest"]  # what was before it was not told apart by other axes
    assert len(list(items)) == 11
    soon(lambda: late.view.frame["badge"] == "done")
    late.close()


def test_it_shows_a_run_that_failed(stream: zds.ChunkStream) -> None:
    broken = stream.map(lambda _: 1 // 0)
    widget = broken.widget()
    with pytest.raises(zds.ChunkError):
        broken.run()
    soon(lambda: not threads())
    assert widget.view.frame["badge"] == "failed"
    assert "ZeroDivisionError" in widget.view.frame["troubles"][-1]
    widget.close()


def test_several_streams_have_widgets_of_their_own(stream: zds.ChunkStream, widget: StreamWidget) -> None:
    other = stream.filter(lambda chunk: chunk.index[0] == 0)
    beside = other.widget()
    other.run()
    soon(lambda: not threads())
    assert beside.view.frame["badge"] == "done"
    assert beside.view.frame["counts"][STATES.index("filtered")] == 8
    assert widget.view.frame["badge"] == "not started"
    beside.close()


def test_a_closed_widget_follows_no_more(stream: zds.ChunkStream, widget: StreamWidget) -> None:
    widget.close()
    widget.close()
    stream.run()
    assert (widget.view.frame["badge"], threads()) == ("not started", [])


def test_a_stream_travels_without_its_widget_and_does_not_keep_it(stream: zds.ChunkStream) -> None:
    widget = stream.widget()
    assert "StreamWidget" in repr(widget)
    assert len(pickle.loads(pickle.dumps(stream))) == 12
    widget.close()
    del widget
    gc.collect()
    assert len(stream._widgets) == 0


def test_other_axes_know_what_earlier_runs_have_done(tmp_path: Any) -> None:
    source = zarr.create_array(tmp_path / "a.zarr", shape=(6, 4, 4), chunks=(2, 2, 2), dtype="i4")
    source[:] = np.arange(1, 97).reshape(6, 4, 4)
    stream = zds.stream_chunks(source, concurrency=1, checkpoint=tmp_path / "ledger")
    for chunk, _ in zip(stream, range(3), strict=False):
        del chunk
    widget = stream.widget()
    widget._hear({"zds": "axes", "value": 1, "id": "1"})
    items = iter(stream)
    next(items)
    assert widget.frame["maps"][1] == "axis 0 x axis 1"
    assert widget.frame["layout"]["axes"] == [0, 1]
    assert widget.frame["counts"][STATES.index("done")] >= 2
    items.close()  # type: ignore[attr-defined]  # a generator, as every stream's iterator
    widget.close()


# -- what is pressed ------------------------------------------------------------------------------------


def test_what_is_pressed_acts_once(stream: zds.ChunkStream, widget: StreamWidget) -> None:
    widget._hear({"zds": "pause", "id": "a.1"})
    soon(lambda: stream.paused and widget.view.frame["paused"])
    widget._hear({"zds": "resume", "id": "a.2"})
    widget._hear({"zds": "pause", "id": "a.1"})  # as the main thread hears it, when the cell is over
    assert not stream.paused
    soon(lambda: not widget.view.frame["paused"])
    widget._hear({"zds": "rate", "value": 20, "id": "a.3"})
    assert stream.rate_limit == RateLimit(requests=20)
    soon(lambda: widget.view.frame["rate"] == 20.0)
    widget._hear({"zds": "rate", "value": None, "id": "a.4"})
    assert stream.rate_limit is None


def test_drain_ends_a_run_and_has_no_effect_on_the_next(stream: zds.ChunkStream, widget: StreamWidget) -> None:
    taken = 0
    for _ in stream:
        taken += 1
        widget._hear({"zds": "drain", "id": "a.1"})
    assert 0 < taken < 12
    assert stream.report.outcome == "stopped early"
    assert len(list(stream)) == 12
    soon(lambda: widget.view.frame["badge"] == "done")


def test_other_axes_are_drawn_when_chosen(stream: zds.ChunkStream, widget: StreamWidget) -> None:
    stream.run()
    assert widget.frame["maps"] == ["the longest", "axis 0 x axis 1", "axis 0 x axis 2", "axis 1 x axis 2"]
    widget._hear({"zds": "axes", "value": 3, "id": "a.1"})
    assert (widget.frame["map"], widget.frame["layout"]["shape"]) == (3, [2, 2])
    assert list(widget.frame["cells"]) == [STATES.index("done")] * 4
    widget._hear({"zds": "axes", "value": 9, "id": "a.2"})
    assert widget.frame["map"] == 3


def test_a_label_is_sent_to_who_asked(
    stream: zds.ChunkStream, widget: StreamWidget, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream.run()
    soon(lambda: not threads())
    sent: list[Any] = []
    monkeypatch.setattr(widget.view, "send", sent.append)
    widget._hear({"zds": "label", "view": "v", "cell": [2, 1]})
    soon(lambda: bool(sent))
    assert sent == [{"zds": "label", "view": "v", "cell": [2, 1], "text": "chunks (2, 1, 0..1): 2 done"}]
    widget._hear({"zds": "label", "view": "v", "cell": [200, 1]})
    soon(lambda: not threads())
    assert len(sent) == 1


@pytest.mark.parametrize(
    "content",
    [
        None,
        {},
        {"zds": "shout"},
        {"zds": "label"},
        {"zds": "label", "view": 1, "cell": "ab"},
        {"zds": "rate", "value": -1},
        {"zds": "rate", "value": "many"},
        {"zds": "axes", "value": "x"},
    ],
)
def test_messages_that_mean_nothing_change_nothing(stream: zds.ChunkStream, widget: StreamWidget, content: Any) -> None:
    widget._hear(content)
    assert (stream.paused, stream.rate_limit, widget.frame["map"]) == (False, None, 0)


def test_a_rate_leaves_the_bound_on_bytes_as_it_is() -> None:
    both = RateLimit(requests=60, bytes=1000, per=60)
    assert changed_rate(both, 5) == RateLimit(requests=300, bytes=1000, per=60)
    assert changed_rate(both, None) == RateLimit(bytes=1000, per=60)
    assert changed_rate(both, True) == RateLimit(bytes=1000, per=60)
    assert changed_rate(None, None) is None


def test_without_anywidget_the_extra_is_named(stream: zds.ChunkStream, monkeypatch: pytest.MonkeyPatch) -> None:
    module._view_class.cache_clear()
    monkeypatch.setitem(sys.modules, "anywidget", None)
    with pytest.raises(zds.UsageError, match=r"pip install 'zarr-dask-stream\[notebook\]'"):
        stream.widget()


# -- its looks ------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("ground", ["light", "dark"])
def test_colours_have_the_contrast_that_wcag_asks_for(ground: str) -> None:
    light, dark = (
        dict(re.findall(r"--zds-(\w+): (#[0-9a-f]{6});", block)) for block in re.findall(r"\{([^}]*)\}", STYLE)[:2]
    )
    colours = light if ground == "light" else dark
    assert set(light) - {"area"} == set(dark) - {"area"}
    assert colours["ground"] == GROUNDS[ground]
    for name in ("text", "quiet", "bad", "ok", "wait"):
        assert contrast(colours[name], colours["ground"]) >= 4.5
    for name in ("text", "quiet"):
        assert contrast(colours[name], colours["panel"]) >= 4.5
    for name in ("edge", "line", "focus", *(f"part{i}" for i in range(6))):
        assert contrast(colours[name], colours["ground"]) >= 3
    assert contrast(colours["edge"], colours["panel"]) >= 2.9
    assert all(contrast(colour, colours["ground"]) >= 3 for colour in COLOURS[ground].values())


def test_it_asks_nobody_for_anything() -> None:
    assert set(re.findall(r"https?://[^\s\"')]+", SCRIPT + STYLE)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\bimport\b|fetch\(|innerHTML|eval\(", SCRIPT)
    assert "@import" not in STYLE
    assert "url(" not in STYLE


# -- in a real kernel -----------------------------------------------------------------------------------

CELL = """
import time, zarr
import zarr_dask_stream as zds
array = zarr.create_array({}, shape=(40, 50), chunks=(1, 1), dtype="i4")
array[:] = 7
stream = zds.stream_chunks(array, concurrency=1).map(lambda chunk: time.sleep(0.005))
display(stream.widget())
for chunk in stream:
    pass
"""


class FrontEnd:
    """A front end that knows nothing of subshells: it sends what is pressed where all front ends send it."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.comm = ""
        self.frame: dict[str, Any] = {}
        self.displays: list[dict[str, Any]] = []
        self.errors: list[Any] = []
        self.busy = True

    def run(self, source: str) -> None:
        self.cell = self.client.execute(source)

    def listen(self, until: Callable[[], bool], seconds: float = 60.0) -> bool:
        deadline = time.monotonic() + seconds
        while not until():
            try:
                message = self.client.get_iopub_msg(timeout=max(min(deadline - time.monotonic(), 1.0), 0.01))
            except queue.Empty:
                if time.monotonic() > deadline:
                    return False
                continue
            self._take(message)
        return True

    def _take(self, message: dict[str, Any]) -> None:
        kind, content = message["msg_type"], message["content"]
        if kind == "comm_open" and "frame" in content["data"].get("state", {}):
            self.comm = content["comm_id"]
        if kind in ("comm_open", "comm_msg") and content["comm_id"] == self.comm:
            self.frame = content["data"].get("state", {}).get("frame", self.frame)
        if kind in ("display_data", "update_display_data"):
            self.displays.append(content["data"])
        if kind == "error" or (kind == "stream" and content["name"] == "stderr"):
            self.errors.append(content)
        if kind == "status" and message["parent_header"].get("msg_id") == self.cell:
            self.busy = content["execution_state"] != "idle"

    def press(self, kind: str, value: Any = None) -> None:
        data = {"method": "custom", "content": {"zds": kind, "value": value, "id": kind}}
        message = self.client.session.msg("comm_msg", {"comm_id": self.comm, "data": data})
        self.client.shell_channel.send(message)

    @property
    def done(self) -> int:
        return int(self.frame["counts"][STATES.index("done")])


@pytest.fixture
def front_end() -> Iterator[FrontEnd]:
    manager, client = kernels.start_new_kernel(kernel_name="python3")
    try:
        yield FrontEnd(client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.mark.skipif(
    tuple(map(int, version("ipykernel").split(".")[:2])) < (7, 4),
    reason="before ipykernel 7.4, what is pressed where there are no subshells acts when the cell ends",
)
def test_buttons_act_while_the_cell_runs(front_end: FrontEnd) -> None:
    front_end.run(CELL)
    assert front_end.listen(lambda: bool(front_end.frame) and front_end.frame["live"] and front_end.done > 0)
    front_end.press("pause")
    assert front_end.listen(lambda: front_end.frame["paused"])
    before = -1
    while front_end.done != before:  # what was in flight comes in
        before = front_end.done
        front_end.listen(lambda: False, 1.5)
    assert before < 2000
    assert front_end.busy
    front_end.press("resume")
    assert front_end.listen(lambda: front_end.done > before)
    front_end.press("drain")
    assert front_end.listen(lambda: not front_end.busy and front_end.frame["badge"] == "stopped early")
    assert front_end.listen(lambda: len(front_end.displays) >= 2)
    first, *_, last = front_end.displays
    assert "application/vnd.jupyter.widget-view+json" in first
    assert set(last) == {"text/plain", "text/html"}
    assert "<svg" in last["text/html"]
    assert front_end.errors == []


def test_a_drain_by_the_program_is_shown(stream: zds.ChunkStream, widget: StreamWidget) -> None:
    """It was shown only where the button was pressed."""
    for taken, _ in enumerate(stream):
        if not taken:
            before = stream.draining
            stream.drain()
            assert (before, stream.draining) == (False, True)
            assert (widget.frame["badge"], widget.frame["draining"]) == ("draining", True)
    assert not stream.draining, "it is over"
    for _ in stream:
        assert not stream.draining, "another run is another one"
        break
