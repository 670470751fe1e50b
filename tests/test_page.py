"""The page of a run: whole, escaped, in order for those who hear it, and the same in a real browser."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from matplotlib.image import imread

import zarr_dask_stream as zds
from realparts.browser import Browser, Tab
from watched import came_back, given_up, sent, tried_again
from zarr_dask_stream.engine.events import (
    ChunksEmitted,
    ClusterChanged,
    RunFinished,
    RunStarted,
)
from zarr_dask_stream.engine.task import latency_histogram
from zarr_dask_stream.watch.charts import INK, PHASE_COLOURS
from zarr_dask_stream.watch.chunkmap import COLOURS

EVIL = "<script>alert('x')</script>&\"'><img src=https://evil.example/x onerror=alert(1)>"


def play(
    shape: tuple[int, ...],
    *,
    outcome: str = "done",
    upto: float = 1.0,
    dead: int = 0,
    retried: int = 0,
    text: str = "reset by peer",
    workers: int = 3,
) -> zds.Report:
    """Fold a run over a grid: every so many chunks one that fails, or is given up."""
    total = math.prod(shape)
    report = zds.Report()
    report.handle(RunStarted(0.0, total, 40_000, shape, f"s3://bucket/{text}/t2m.zarr", max_nbytes=2**28))
    report.handle(ClusterChanged(0.0, workers, 2 * workers))
    step = max(total // 200, 1)
    for at in range(0, int(total * upto), step):
        now = 60.0 * (at + step) / total
        numbers = range(at, min(at + step, total))
        report.handle(sent(now, numbers, 2 * step, 40_000))
        worker = f"tcp://10.0.0.{at // step % workers}:4000/{text}"
        spent = [0.001 * (1 + n % 7) for n in numbers]
        report.handle(
            came_back(
                now, numbers, worker, elapsed_s=4 * sum(spent), transfer_s=0.001, nbytes=40_000,
                wall_s=3 * sum(spent), fetch_s=sum(spent), decode_s=sum(spent) / 2, compute_s=sum(spent) / 3,
                bytes_stored=10_000 * len(numbers), bytes_decoded=40_000 * len(numbers),
                latency=latency_histogram(spent),
            )
        )  # fmt: skip
        fine = []
        for n in numbers:
            if retried and n % retried == 1:
                report.handle(tried_again(now, n, f"{text} {n}", worker))
            if dead and n % dead == 3:
                report.handle(given_up(now, n, text, worker, grid=shape, error_type=f"Error{text}", reason=text))
            else:
                fine.append(n)
        report.handle(ChunksEmitted(now, tuple(fine)))
    if outcome != "running":
        error = f"ChunkError: {text}" if outcome == "failed" else ""
        report.handle(RunFinished(60.0, outcome, total, 3.0, 2 * step, 80_000 * step, error))
    return report


RUNS: dict[str, Callable[[], zds.Report]] = {
    "usual": lambda: play((30, 40), dead=170, retried=40),
    "one chunk": lambda: play((1,)),
    "no chunks": lambda: play((0, 5)),
    "not begun": zds.Report,
    "a million": lambda: play((1000, 1000), dead=90_000, retried=40_000),
    "running": lambda: play((50, 80), outcome="running", upto=0.4, retried=60),
    "failed": lambda: play((365,), outcome="failed", upto=0.3, dead=100),
    "hostile": lambda: play((6, 7, 8), outcome="failed", dead=30, retried=20, text=EVIL),
}


@pytest.fixture(params=list(RUNS))
def report(request: pytest.FixtureRequest) -> Any:
    return RUNS[request.param]()


class Outline(HTMLParser):
    """What an HTML page consists of; complains of tags that don't match."""

    VOID = frozenset({"meta", "link", "br", "hr", "img", "input", "col"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
            self.text.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.text[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


# -- every kind of run ------------------------------------------------------------------------------


def test_a_page_is_whole_and_asks_for_nothing(report: zds.Report, tmp_path: Path) -> None:
    page = report.to_html(tmp_path / "r.html").read_text(encoding="utf-8")
    outline = Outline(page)
    assert page.startswith("<!doctype html>")
    assert outline.all("html")[0]["lang"] == "en"
    assert outline.text["title"][0].startswith("Stream report: ")
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in outline.tags}
    for tag, attributes in outline.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("src", "href", "xlink:href", "action"), (tag, name)
            if name in ("style", "fill", "stroke"):
                assert "url(" not in (value or "") or (value or "").startswith("url(#"), (tag, value)
    assert "@import" not in page
    assert "url(" not in outline.text["style"][0]
    assert len(page) < 700_000


def test_those_who_hear_it_find_their_way(report: zds.Report, tmp_path: Path) -> None:
    outline = Outline(report.to_html(tmp_path / "r.html").read_text(encoding="utf-8"))
    levels = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(deeper <= level + 1 for level, deeper in pairwise(levels))
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for attributes in outline.all("th"):
        assert attributes.get("scope") in ("row", "col")
    assert len(outline.text.get("caption", [])) == len(outline.all("table"))
    named = 0
    for attributes in outline.all("svg"):
        if attributes.get("aria-hidden") == "true":
            continue
        assert attributes["role"] == "img"
        marks = (attributes["aria-labelledby"] or "").split()
        assert marks
        assert set(marks) <= set(ids)
        named += 1
    assert named or not report.settled
    for attributes in outline.all("section"):
        assert attributes["aria-labelledby"] in ids
    assert {"main", "header"} <= {tag for tag, _ in outline.tags}


def test_in_a_notebook_it_is_a_picture_that_needs_no_script(report: zds.Report) -> None:
    piece = report._repr_html_()
    outline = Outline(piece)
    assert not {"script", "html", "body", "link", "iframe"} & {tag for tag, _ in outline.tags}
    assert len(piece) < 600_000
    # The colours are in the shapes too: GitHub and others drop style sheets.
    filled = [a for tag in ("rect", "path", "circle", "text") for a in outline.all(tag)]
    assert all(a.get("fill") for a in filled)


def test_what_it_says_is_what_was() -> None:
    text = " ".join(Outline(play((30, 40), dead=170, retried=40)._repr_html_()).text["div"])
    for expected in ("1,200", "8 chunks given up", "OSError", "done 1,192", "dead 8", "30 x 40", "Axis 0 goes down"):
        assert expected in text, expected


def test_each_part_of_a_map_says_which_chunks_it_is() -> None:
    titles = Outline(play((4, 6), dead=9, upto=0.5)._repr_html_()).text["title"]
    assert "chunk (0, 3): dead" in titles
    assert "chunks (0, 4) to (0, 5): 2 done" in titles


def test_advice_is_part_of_it(tmp_path: Path) -> None:
    report = play((30, 40), retried=30)
    assert report.advice()[0].kind == "one-cause"
    assert report.advice()[0].title in report.to_html(tmp_path / "r.html").read_text()


def test_secrets_of_a_store_are_never_in_it(tmp_path: Path) -> None:
    """Neither those of the address nor those of the options, whatever fails."""
    url = "https://someone:hunter2secret@127.0.0.1:9/data.zarr?X-Amz-Signature=abcdefsecret"
    try:
        stream = zds.stream_chunks(url, storage_options={"headers": {"Authorization": "Bearer tokensecret"}})
        report = stream.run()
    except zds.ZdsError as error:
        report = zds.Report(url="", outcome="failed", error=str(error))
    page = report.to_html(tmp_path / "r.html").read_text() + report._repr_html_()
    assert "secret" not in page


def test_while_it_runs_it_can_be_written_at_any_moment(tmp_path: Path) -> None:
    array = zarr.create_array({}, shape=(10, 10), chunks=(1, 1), dtype="i4")
    array[:] = 1
    stream = zds.stream_chunks(array, concurrency=1)
    seen = []
    for _ in stream:
        page = stream.report.to_html(tmp_path / "r.html").read_text()
        Outline(page)
        seen.append("Running" in page)
    assert all(seen)
    assert "every chunk that was planned has reached its end" in stream.report.to_html(tmp_path / "r.html").read_text()


# -- colours ----------------------------------------------------------------------------------------


def _luminance(colour: str) -> float:
    parts = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio of two colours."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("place", [0, 1], ids=["light", "dark"])
def test_text_and_graphics_stand_out_from_their_grounds(place: int) -> None:
    scheme = ("light", "dark")[place]
    ink = INK[scheme]
    for ground in (ink["ground"], ink["card"]):
        for name in ("ink", "quiet", "accent", "bad", "warn"):
            assert contrast(ink[name], ground) >= 4.5, (scheme, name)
        assert contrast(ink["line"], ground) >= 3
        for phase, colours in PHASE_COLOURS.items():
            assert contrast(colours[place], ground) >= 3, phase
            assert contrast(colours[place], ink["ground"]) >= 4.5, phase  # words within the bar
        for state, colour in COLOURS[scheme].items():
            assert contrast(colour, ground) >= 3, state


# -- in a real browser --------------------------------------------------------------------------------


@pytest.fixture
def shown(browser: Browser, tmp_path: Path) -> Iterator[Tab]:
    report = play((30, 40), dead=170, retried=40)
    path = report.to_html(tmp_path / "r.html")
    with browser.tab(width=1100) as tab:
        tab.goto(path)
        yield tab


@pytest.mark.slow
@pytest.mark.sample
def test_a_real_browser_shows_it_light_dark_narrow_and_on_paper(browser: Browser, shown: Tab, tmp_path: Path) -> None:
    page = shown.page
    assert page.title() == "Stream report: t2m.zarr"
    text = page.inner_text("body")
    for expected in ("Chunk map", "Errors by cause", "Dead letters", "1,200", "OSError"):
        assert expected in text
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    assert page.evaluate(ground) == "rgb(255, 255, 255)"
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(ground) == "rgb(20, 23, 28)"
    page.emulate_media(media="print")
    assert page.evaluate(ground) == "rgb(255, 255, 255)"
    assert len(page.pdf()) > 10_000
    page.emulate_media(media="screen", color_scheme="light")
    # Narrow: nothing sticks out to the side but within tables, which scroll by themselves.
    for width in (1100, 400, 320):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert shown.errors == []
    assert [url for url in shown.requests if not url.startswith("file:")] == []
    shot = shown.shot(tmp_path / "r.png")
    assert shot.stat().st_size > 20_000


@pytest.mark.slow
def test_the_map_has_the_colours_of_its_states(shown: Tab, tmp_path: Path) -> None:
    picture = shown.page.locator("svg[role=img]").first
    path = tmp_path / "map.png"
    picture.screenshot(path=str(path))
    pixels = (imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    found = {tuple(pixel) for pixel in pixels.tolist()}
    for state in ("done", "dead"):
        colour = COLOURS["light"][state]
        assert tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5)) in found, state


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in RUNS if kind != "usual"])
def test_every_kind_of_run_is_shown_without_an_error(browser: Browser, kind: str, tmp_path: Path) -> None:
    path = RUNS[kind]().to_html(tmp_path / "r.html")
    for dark in (False, True):
        with browser.tab(width=400, dark=dark) as tab:
            tab.goto(path)
            assert tab.page.evaluate("document.documentElement.scrollWidth") <= 400
            assert "Stream report" in tab.page.inner_text("h1")
            assert tab.errors == []
            assert tab.requests == [path.resolve().as_uri()]


# What JupyterLab and nbviewer say of all that outputs hold.
HOST = """
.jp-RenderedHTMLCommon dl dt{float:left;clear:left;width:20%;font-weight:bold}
.jp-RenderedHTMLCommon dl dd{margin-left:20%}
.jp-RenderedHTMLCommon ul:not(.list-inline){padding-left:2em;list-style:disc}
.jp-RenderedHTMLCommon table{table-layout:fixed;margin-left:auto;margin-bottom:1em}
.jp-RenderedHTMLCommon td,.jp-RenderedHTMLCommon th{vertical-align:middle;padding:.5em;border:none}
:not(.jp-RenderedMarkdown).jp-RenderedHTMLCommon td{text-align:right}
:not(.jp-RenderedMarkdown).jp-RenderedHTMLCommon th{text-align:right}
.jp-RenderedHTMLCommon tbody tr:nth-child(odd){background:rgb(1,2,3)}
.jp-RenderedHTMLCommon p{margin:0 0 1em}
"""


@pytest.mark.slow
@pytest.mark.sample
def test_the_piece_for_a_notebook_keeps_its_looks_among_the_rules_of_its_host(browser: Browser, tmp_path: Path) -> None:
    reports = [play((30, 40), dead=170, retried=40), play((3, 4), outcome="failed", upto=0.5)]
    pieces = "".join(f'<div class="jp-RenderedHTMLCommon">{report._repr_html_()}</div>' for report in reports)
    path = tmp_path / "n.html"
    head = f'<meta charset="utf-8"><title>n</title><style>{HOST}</style>'
    path.write_text(f'<!doctype html><html lang="en">{head}<body data-jp-theme-light="false">{pieces}</body></html>')
    look = "([s, name]) => [...new Set([...document.querySelectorAll(s)].map(e => getComputedStyle(e)[name]))]"
    with browser.tab(width=900) as tab:
        tab.goto(path)
        page = tab.page
        assert page.inner_text("body").count("Chunk map") == 2
        assert page.evaluate(look, [".zds dt", "float"]) == ["none"]
        assert page.evaluate(look, [".zds dd", "marginLeft"]) == ["0px"]
        assert page.evaluate(look, [".zds ul", "paddingLeft"]) == ["0px"]
        assert page.evaluate(look, [".zds td.m", "textAlign"]) == ["left"]
        assert page.evaluate(look, [".zds td.n", "textAlign"]) == ["right"]
        assert page.evaluate(look, [".zds tr", "backgroundColor"]) == ["rgba(0, 0, 0, 0)"]
        # The notebook says that it is dark, whatever the system is.
        assert page.evaluate(look, [".zds", "backgroundColor"]) == ["rgb(20, 23, 28)"]
        assert tab.errors == []


def test_the_headline_tells_of_dead_letters() -> None:
    """It said that all was done, though chunks had been given up."""
    fine, some, one = play((10,)), play((1000,), dead=100), play((10,), dead=10)
    assert '<p class="outcome">Done: every chunk that was planned has reached its end.' in fine._repr_html_()
    assert (
        f'<p class="outcome warn">Done but for {some.dead_lettered} chunks, which were given up' in some._repr_html_()
    )
    assert '<p class="outcome warn">Done but for 1 chunk, which was given up' in one._repr_html_()
    fine.cancelled = 3
    assert '<p class="outcome">Done: all that was asked for has reached its end.' in fine._repr_html_()
