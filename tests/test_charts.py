"""Pictures as text: what is drawn is what was given, and nothing that was given becomes markup."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zarr_dask_stream.engine.events import Batch, BatchSubmitted, ChunksEmitted, RunStarted
from zarr_dask_stream.watch import charts
from zarr_dask_stream.watch.charts import Band, histograms, legend, line_chart, map_chart, sparkline, split_bar
from zarr_dask_stream.watch.chunkmap import STATES, ChunkMap, Picture

SVG = "{http://www.w3.org/2000/svg}"
EVIL = "<b>&\"'"


def parsed(svg: str) -> ET.Element:
    """Parse it as XML, which is stricter than HTML: each tag closed, each attribute quoted and escaped."""
    return ET.fromstring(svg)


def picture_of(shape: tuple[int, ...], done: int, *, cells: int = 4096) -> Picture:
    chunkmap = ChunkMap(cells=cells)
    chunkmap.handle(RunStarted(0.0, 1, 8, shape, "m"))
    chunkmap.handle(BatchSubmitted(0.0, Batch(1, (range(done + 1),), done + 1, 8, fresh=True), 1, 1))
    chunkmap.handle(ChunksEmitted(0.0, tuple(range(done))))
    return chunkmap.picture()


def area(svg: ET.Element, width: float, height: float) -> float:
    """Add up the cells that the parts of a map cover."""
    gap = charts._gap(width, height)
    sides = [(float(r.attrib["width"]), float(r.attrib["height"])) for r in svg.findall(f"{SVG}rect")]
    for path in svg.findall(f"{SVG}path"):
        sides += [(float(w), float(h)) for w, h in re.findall(r"h([0-9.]+)v([0-9.]+)h-", path.attrib["d"])]
    return sum((w + gap) * (h + gap) for w, h in sides) / (width * height)


@pytest.mark.parametrize(("shape", "done", "cells"), [((5, 7), 17, 4096), ((400,), 123, 4096), ((90, 90), 4000, 100)])
def test_every_cell_of_a_map_is_drawn_once(shape: tuple[int, ...], done: int, cells: int) -> None:
    picture = picture_of(shape, done, cells=cells)
    svg = parsed(map_chart(picture))
    rows, columns = picture.layout.shape
    width, height = (float(n) for n in svg.attrib["viewBox"].split()[2:])
    assert area(svg, width / columns, height / rows) == pytest.approx((picture.counts.sum(axis=-1) > 0).sum(), rel=1e-3)
    title, about = svg.findtext(f"{SVG}title"), svg.findtext(f"{SVG}desc")
    assert title == f"Chunk map, {rows} by {columns} cells"
    assert f"{done:,} done" in (about or "")


def test_a_map_of_ever_changing_cells_stays_small() -> None:
    counts = np.zeros((64, 64, len(STATES)), np.int64)
    state = (np.add.outer(np.arange(64), np.arange(64)) % 2) * 3
    np.put_along_axis(counts, state[..., None], 1, axis=-1)
    layout = picture_of((64, 64), 1).layout
    svg = map_chart(Picture(layout, counts, np.zeros((64, 64), np.int64)))
    assert len(svg) < 200_000
    assert area(parsed(svg), *charts._cell_size(64, 64, 2.0)) == pytest.approx(64 * 64, rel=1e-3)


def test_a_cell_fills_up_as_its_chunks_end() -> None:
    levels = []
    for done in (1, 10, 16):
        svg = map_chart(picture_of((64,), done, cells=4))
        levels.append(min(int(look) for look in re.findall(r'fill="url\(#m[0-9a-f]+-(\d+)\)"', svg)))
    first = STATES.index("in flight") * 5 + 4
    assert levels == [0 * 5 + 4, 0 * 5 + 4, 0 * 5 + 4] or levels[0] <= first
    partial = map_chart(picture_of((4, 4), 16, cells=4))
    assert "url(#" in partial


def test_no_chunks_is_said_in_words() -> None:
    assert map_chart(ChunkMap().picture()) == '<p class="quiet">The grid has no chunks.</p>'
    assert legend(ChunkMap().picture()) == ""
    assert split_bar([("fetch", 0.0)], title="t") == '<p class="quiet">No time was measured.</p>'
    assert histograms([], title="t", unit=str) == '<p class="quiet">Nothing was measured.</p>'


def test_a_legend_counts_what_there_is() -> None:
    text = re.sub("<[^>]+>", "", legend(picture_of((3, 4), 5)))
    assert text == " planned 6 in flight 1 done 5"


@given(st.lists(st.floats(0, 1e12), max_size=40), st.floats(0, 1e13), st.sampled_from([1000, 1024]))
def test_a_line_stays_within_its_frame(values: list[float], bound: float, base: int) -> None:
    times = [0.5 * n for n in range(len(values))]
    svg = parsed(
        line_chart(
            times, [Band(EVIL, values)], title=EVIL, unit=lambda value: f"{value:g}{EVIL}", until=30.0, base=base,
            bound=bound, bound_name=EVIL,
        )
    )  # fmt: skip
    assert svg.findtext(f"{SVG}title") == EVIL
    height = float(svg.attrib["viewBox"].split()[3])
    for path in svg.iter(f"{SVG}path"):
        for x, y in re.findall(r"[ML]([-0-9.]+) ([-0-9.]+)", path.attrib["d"]):
            assert -1 <= float(x) <= 401
            assert -1 <= float(y) <= height + 1


@given(st.floats(1e-6, 1e15), st.sampled_from([1000, 1024]), st.sampled_from([0.0, 1.0]))
def test_an_axis_holds_its_values_and_has_few_marks(most: float, base: int, least: float) -> None:
    top, step = charts.nice_axis(most, base, least)
    assert top >= most * (1 - 1e-9)
    assert 1 <= round(top / step) <= 5
    assert top / step == pytest.approx(round(top / step))
    assert least or top <= 2.6 * most
    assert step >= least


@given(st.floats(1e-3, 1e7))
def test_an_axis_of_time_has_few_round_moments(end: float) -> None:
    ticks = charts._time_ticks(end)
    assert 1 <= len(ticks) <= 5
    assert ticks[-1] <= end * (1 + 1e-9)


def test_shares_fill_the_bar() -> None:
    svg = parsed(split_bar([("fetch", 3.0), ("decode", 1.0), ("compute", 0.0)], title="t"))
    widths = [float(rect.attrib["width"]) for rect in svg.iter(f"{SVG}rect")]
    assert widths == [538.0, 178.0]
    assert svg.findtext(f"{SVG}desc") == "fetch 75%, decode 25%"


def test_distributions_share_an_axis() -> None:
    edges = 2.0 ** (np.arange(4) / 8)
    counts = np.array([1, 5, 2])
    svg = parsed(histograms([("fetch", edges, counts, EVIL), ("task", edges * 8, counts, "")], title="t", unit=str))
    assert EVIL in (svg.findtext(f"{SVG}desc") or "")
    texts = [text.text for text in svg.iter(f"{SVG}text")]
    assert {"fetch", "task", "1.0", "10.0"} <= set(texts)


@pytest.mark.parametrize("values", [[], [3.0], [1.0, 2.0, 0.0]])
def test_a_small_line_for_a_table(values: list[float]) -> None:
    assert parsed(sparkline(values, title=EVIL)).findtext(f"{SVG}title") == EVIL


def test_states_have_names() -> None:
    assert [charts.state_name(code) for code in (0, len(STATES))] == ["planned", "outside"]
