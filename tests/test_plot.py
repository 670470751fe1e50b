"""A run as a figure: every kind of run, drawn for real."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import zarr
from matplotlib.image import imread

import zarr_dask_stream as zds
from zarr_dask_stream.engine.events import RunStarted
from zarr_dask_stream.errors import UsageError


@pytest.fixture
def report() -> zds.Report:
    array = zarr.create_array({}, shape=(12, 20), chunks=(1, 1), dtype="f8")
    array[:] = np.arange(1.0, 241.0).reshape(12, 20)  # nothing that would not be stored

    def broken(chunk: zds.Chunk) -> float:
        if chunk.index == (3, 4):
            raise ValueError("no")
        return float(chunk.data[0, 0])

    return zds.stream_chunks(array, concurrency=1, on_error="skip").map(broken).run()


def test_a_figure_says_what_was(report: zds.Report) -> None:
    figure = report.plot()
    text = " ".join([figure.get_suptitle(), *(axes.get_title(loc="left") for axes in figure.axes)])
    for expected in ("done, 240 chunks", "1 dead letters", "Chunk map", "Chunks per second", "Where the time went"):
        assert expected in text
    labels = [label.get_text() for label in figure.axes[0].get_legend().get_texts()]
    assert labels == ["done 239", "dead 1"]


def test_a_figure_can_be_kept(report: zds.Report) -> None:
    kept = io.BytesIO()
    report.plot().savefig(kept, dpi=50)
    kept.seek(0)
    pixels = imread(kept)
    assert pixels.shape[1] == 525
    assert len(np.unique((pixels[..., :3] * 255).astype(int).reshape(-1, 3), axis=0)) > 20


def test_runs_of_which_there_is_nothing_to_see_are_drawn_too() -> None:
    empty = zds.Report()
    assert len(empty.plot().axes) == 5
    empty.handle(RunStarted(0.0, 0, 8, (0, 4), "m"))
    assert len(empty.plot().axes) == 5
    begun = zds.Report()
    begun.handle(RunStarted(0.0, 10**6, 8, (1000, 1000), "m"))
    kept = io.BytesIO()
    begun.plot().savefig(kept, dpi=40)
    assert kept.tell() > 1000


def test_without_matplotlib_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"zarr-dask-stream\[notebook\].*to_html"):
        zds.Report().plot()
