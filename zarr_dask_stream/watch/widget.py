"""The live widget of a stream in a notebook: `StreamWidget`, made by ``stream.widget()``.

While a run goes on, a thread of its own looks at the run's account a few times a second and sends what it sees; it
ends with the run. What is pressed has to act while the kernel is busy with the very cell that iterates the stream.
There are two ways for that, and both are taken:

- JupyterLab from 4.4 and Notebook from 7.4 send what is pressed to a subshell, a second thread of the kernel, where
  the kernel has any (ipykernel 7).
- ipykernel from 7.4 asks the widget's comm, in the thread that reads the messages of all front ends, where a message
  is to go. The widget takes that as the moment to hear it.

Elsewhere what is pressed acts when the cell ends, and the widget says so. A stream that runs in a thread leaves the
kernel free, and the buttons act everywhere.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.resources import files
from typing import Any, Protocol

from zarr_dask_stream.engine.events import Callback, ClusterChanged, Notice, RunFinished, RunStarted
from zarr_dask_stream.engine.throttle import RateLimit
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.watch.chunkmap import ChunkMap
from zarr_dask_stream.watch.frame import OVER, Controls, Pace, axes_choices, axes_name, make_frame
from zarr_dask_stream.watch.report import Report

__all__ = ["Controlled", "StreamWidget"]

_EVERY_S = 0.25  # between two frames
_REMEMBERED = 64  # presses that are known to have acted
_PLACES = 16  # outputs that are brought up to date at the end of a run


class Controlled(Protocol):
    """What a widget needs of a stream."""

    @property
    def report(self) -> Report:
        """Account of the latest run."""

    @property
    def paused(self) -> bool:
        """Whether nothing new is submitted."""

    @property
    def draining(self) -> bool:
        """Whether nothing new is submitted for good."""

    rate_limit: RateLimit | None

    def pause(self) -> None:
        """Submit nothing new."""

    def resume(self) -> None:
        """Go on."""

    def drain(self) -> None:
        """End when what is in flight was handed out."""


class StreamWidget:
    """A stream's live widget, which any notebook shows that has ipywidgets.

    It shows the latest run, and the next one as soon as it begins: the chunk map, rates, what is in flight, where
    the time goes, dead letters. Its buttons pause, resume and drain the stream and bound its requests. When a run
    is over, the output becomes a picture without scripts, which stays in the saved notebook.

    Parameters
    ----------
    stream : ChunkStream
        The stream; ``stream.widget()`` makes its widget.
    name : str
        What the stream is, in a line.
    grid_shape : tuple of int
        Chunks along each axis.
    dims : sequence of str or None, optional
        Names of the axes.
    limit : int, optional
        A run ends when so many chunks were handed out.

    Attributes
    ----------
    view : anywidget.AnyWidget
        The part that draws, to be put beside other widgets, as in ``ipywidgets.HBox([a.view, b.view])``.

    Raises
    ------
    UsageError
        If anywidget is not installed.

    Examples
    --------
    >>> import zarr
    >>> from zarr_dask_stream import stream_chunks
    >>> array = zarr.create_array({}, shape=(6, 4), chunks=(2, 2), dtype="i4")
    >>> array[:] = 7
    >>> stream = stream_chunks(array, concurrency=1)
    >>> widget = stream.widget()
    >>> report = stream.run()
    >>> widget.close()
    >>> widget.frame["badge"], widget.frame["numbers"][0], list(widget.frame["cells"])
    ('done', '6/6 chunks', [3, 3, 3, 3, 3, 3])
    """

    def __init__(
        self,
        stream: Controlled,
        *,
        name: str,
        grid_shape: Sequence[int],
        dims: Sequence[str | None] | None = None,
        limit: int | None = None,
    ) -> None:
        self._stream = stream
        self._name = name
        self._limit = limit
        self._choices = axes_choices(grid_shape)
        self._names = [axes_name(axes, dims) for axes in self._choices]
        self._shown = 0
        self._runs = 0
        self._account = _Account(stream.report, self._choices)
        self._closed = False
        self._acted: deque[str] = deque(maxlen=_REMEMBERED)
        self._asked: dict[str, tuple[int, int]] = {}
        self._places: deque[Any] = deque(maxlen=_PLACES)
        self._still = False  # whether these places show the picture that stays
        self._lock = threading.RLock()
        self._news = threading.Event()
        self._thread: threading.Thread | None = None
        self.view = _view_class()(frame=self._look())
        self.view.on_msg(lambda _, content, __: self._hear(content))
        self._hear_early(self.view.comm)
        if stream.report.outcome == "running":
            self._tell()

    def __repr__(self) -> str:
        return f"StreamWidget({self._name})"

    @property
    def frame(self) -> dict[str, Any]:
        """What is shown at the moment, as plain data."""
        with self._lock:
            return dict(self._look())

    def close(self) -> None:
        """Stop following the stream and remove the widget from its outputs; closing twice does no harm."""
        self._closed = True
        self._news.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(5.0)
        self.view.close()

    # -- in a notebook ------------------------------------------------------------------------------

    def _repr_html_(self) -> str:
        return self._account.report._repr_html_()

    def _ipython_display_(self) -> None:
        # Not a plain repr: what is in the output has to change once more when the run is over.
        display = import_module("IPython.display").display
        with self._lock:
            self._still = self._account.report.outcome in OVER
            self._places.append(display(self._bundle(live=not self._still), raw=True, display_id=True))

    def _bundle(self, *, live: bool) -> dict[str, Any]:
        bundle = {"text/plain": repr(self), "text/html": self._repr_html_()}
        if live:
            found = self.view._repr_mimebundle_()  # it is how notebooks ask, too
            bundle = {**(found[0] if isinstance(found, tuple) else found or {}), **bundle}
        return bundle

    def _show(self, *, live: bool) -> None:
        """Put the live widget, or the picture that stays, where it was displayed."""
        if self._still is not live:
            return
        self._still = not live
        for place in list(self._places):
            if place is not None:  # None: no notebook around
                place.update(self._bundle(live=live), raw=True)

    # -- what it follows ----------------------------------------------------------------------------

    def follow(self, report: Report, tell_also: Callable[[Callback, Sequence[ChunkMap]], None]) -> None:
        """Turn to a run that is about to begin.

        Parameters
        ----------
        report : Report
            Its account, which hears of each notice first.
        tell_also : callable
            Takes an observer of the run, and the maps that are to know what earlier runs have done.
        """
        if self._closed:
            return
        with self._lock:
            self._runs += 1
            self._account = account = _Account(report, self._choices, self._tell)
            self._show(live=True)
        tell_also(account, account.maps[1:])

    def _tell(self) -> None:
        """Have a frame sent soon, by a thread that goes on as long as the run does."""
        with self._lock:
            self._news.set()
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._send, name="zds-widget", daemon=True)
                self._thread.start()

    def _send(self) -> None:
        while True:
            self._news.clear()
            with self._lock:
                frame = self._look()
                asked, self._asked = self._asked, {}
                if not self._closed:
                    self.view.frame = frame
                    if frame["over"]:
                        self._show(live=False)
            for view, (row, column) in asked.items():
                self._answer(view, row, column)
            if frame["live"] and not self._closed:
                self._news.wait(_EVERY_S)
                continue
            with self._lock:
                if not self._news.is_set() or self._closed:
                    self._thread = None
                    return

    def _look(self) -> dict[str, Any]:
        account = self._account
        report = account.report
        shown = min(self._shown, len(account.maps) - 1)
        account.pace.look(report.wall_s, report.settled - report.cancelled, report.bytes_decoded)
        limit = self._stream.rate_limit
        rate = None if limit is None or limit.requests is None else limit.requests_per_s
        return make_frame(
            report,
            account.maps[shown],
            pace=account.pace,
            workers=account.workers,
            controls=Controls(self._stream.paused, self._stream.draining, rate),
            name=self._name,
            limit=self._limit,
            maps=self._names[: len(account.maps)],
            shown=shown,
            run=self._runs,
        )

    def _answer(self, view: str, row: int, column: int) -> None:
        maps = self._account.maps
        picture = maps[min(self._shown, len(maps) - 1)].picture()
        rows, columns = picture.layout.shape
        if 0 <= row < rows and 0 <= column < columns:
            text = picture.label(row, column)
            self.view.send({"zds": "label", "view": view, "cell": [row, column], "text": text})

    # -- what is pressed ----------------------------------------------------------------------------

    def _hear_early(self, comm: Any) -> None:
        """Hear messages in the thread that reads them, where the kernel asks in it where they go."""
        route = getattr(comm, "_reply_subshell_for", None)
        if route is None:
            return

        def heard(data: Any, default: Any) -> Any:
            if isinstance(data, dict) and data.get("method") == "custom":
                self._hear(data.get("content"))
            return default

        comm._reply_subshell_for = heard  # noqa: SLF001  # ipykernel has no other way in while a cell runs

    def _hear(self, content: Any) -> None:
        """Do what was pressed; each press once, though it may be heard twice."""
        if not isinstance(content, dict) or "zds" not in content:
            return
        kind, value = content["zds"], content.get("value")
        if kind == "label":
            self._ask(content)
            return
        key = str(content.get("id", ""))
        with self._lock:
            if key in self._acted:
                return
            if key:
                self._acted.append(key)
        if kind == "pause":
            self._stream.pause()
        elif kind == "resume":
            self._stream.resume()
        elif kind == "drain":
            self._stream.drain()
        elif kind == "rate":
            self._stream.rate_limit = changed_rate(self._stream.rate_limit, value)
        elif kind == "axes" and isinstance(value, int) and 0 <= value < len(self._choices):
            self._shown = value
        self._tell()

    def _ask(self, content: dict[str, Any]) -> None:
        view, cell = content.get("view"), content.get("cell")
        if isinstance(view, str) and isinstance(cell, list) and all(isinstance(i, int) for i in cell):
            with self._lock:
                if len(cell) == 2 and len(self._asked) < _REMEMBERED:
                    self._asked[view] = (cell[0], cell[1])
            self._tell()


def changed_rate(limit: RateLimit | None, requests: Any) -> RateLimit | None:
    """Return a bound with other requests per second, and the same bytes.

    Examples
    --------
    >>> changed_rate(None, 40), changed_rate(RateLimit(requests=40), None)
    (RateLimit(requests=40.0, bytes=None, per=1.0), None)
    """
    if isinstance(requests, bool) or not isinstance(requests, (int, float)) or not requests > 0:
        if limit is None or limit.bytes is None:
            return None
        return dataclasses.replace(limit, requests=None)
    if limit is None or limit.bytes is None:
        return RateLimit(requests=float(requests))
    return dataclasses.replace(limit, requests=float(requests) * limit.per)


class _Account(Callback):
    """What one run has come to, by every picture that there is to choose from."""

    def __init__(
        self, report: Report, choices: Sequence[tuple[int, ...] | None], tell: Callable[[], None] | None = None
    ) -> None:
        self.report = report
        self.pace = Pace()
        # The report folds the usual picture; of a run that was under way before, there is no other.
        self.maps = [report.chunkmap, *([] if tell is None else [ChunkMap(axes=axes) for axes in choices[1:]])]
        self.workers: int | None = None
        self._tell = tell

    def on_notice(self, notice: Notice) -> None:
        """Add up; have frames sent from the first notice to the last."""
        for chunkmap in self.maps[1:]:
            chunkmap.handle(notice)
        if isinstance(notice, ClusterChanged):
            self.workers = notice.workers
        if self._tell is not None and isinstance(notice, (RunStarted, RunFinished)):
            self._tell()


@functools.cache
def _view_class() -> Any:
    """Return the class of the part that draws; anywidget is imported here and not before."""
    try:
        anywidget, traitlets = import_module("anywidget"), import_module("traitlets")
    except ImportError as error:
        raise UsageError(
            f"the widget needs anywidget, which is not there ({error}): pip install 'zarr-dask-stream[notebook]'"
        ) from error
    here = files("zarr_dask_stream.watch")
    return type(
        "StreamView",
        (anywidget.AnyWidget,),
        {
            "__module__": __name__,
            "__doc__": "Draws what it is told, and sends what is pressed.",
            "_esm": (here / "widget.js").read_text(encoding="utf-8"),
            "_css": (here / "widget.css").read_text(encoding="utf-8"),
            "frame": traitlets.Dict().tag(sync=True),
        },
    )
