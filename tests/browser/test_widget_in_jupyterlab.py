"""The widget in a real JupyterLab: run, watch, pause, resume, bound, drain, while the cell that iterates is busy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from realparts.browser import Browser, Tab
from realparts.jupyter import Lab, run_lab
from widget_stage import canvas_colours
from zarr_dask_stream.watch.chunkmap import COLOURS

pytestmark = [pytest.mark.xdist_group("browser"), pytest.mark.timeout(180), pytest.mark.slow]

STREAM = """
import time, zarr
import zarr_dask_stream as zds
array = zarr.create_array({}, shape=(40, 50), chunks=(1, 1), dtype="i4")
array[:] = 7
def work(chunk):
    time.sleep(0.004)
    if chunk.index == (1, 7):
        raise ValueError("the tile is <b>broken</b>")
    return chunk.data
stream = zds.stream_chunks(array, concurrency=1, on_error="skip").map(work)
"""
LOOP = """
display(stream.widget())
for chunk in stream:
    pass
print("the cell is over")
"""
VIEW, HTML = "application/vnd.jupyter.widget-view+json", "text/html"
IDLE = "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
OVER = (
    "[...document.querySelectorAll('.jp-OutputArea-output')].some((one) => one.innerText.includes('the cell is over'))"
)


def press(tab: Tab, command: str) -> None:
    """Start a command of JupyterLab, and go on while it runs."""
    tab.page.evaluate("(name) => { window.jupyterapp.commands.execute(name); }", command)


def numbers(tab: Tab) -> int:
    """Return how many chunks have ended, as a person reads it."""
    return int(tab.page.inner_text(".zds-numbers").split("/")[0].replace(",", ""))


def badge(tab: Tab, word: str) -> None:
    tab.page.wait_for_function("(word) => document.querySelector('.zds-badge')?.textContent === word", arg=word)


@contextmanager
def notebook(browser: Browser, lab: Lab, name: str, *cells: str, dark: bool = False) -> Iterator[Tab]:
    """Open a notebook whose kernel is ready."""
    lab.write(name, cells)
    with browser.tab(dark=dark) as tab:
        tab.page.set_default_timeout(60_000)
        # A workspace of its own: nothing that another test has left open.
        tab.goto(f"{lab.url}/lab/workspaces/{Path(name).stem}/tree/{name}")
        try:
            tab.page.wait_for_function(IDLE)
            yield tab
        except BaseException:
            tab.shot(lab.folder / f"{Path(name).stem}-failed.png")
            raise


def outputs(lab: Lab, tab: Tab, name: str) -> list[dict[str, Any]]:
    """Save the notebook; return the data of its outputs as they are in the file."""
    tab.page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    return [output.data for cell in lab.read(name).cells for output in cell.outputs if "data" in output]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with run_lab(tmp_path_factory.mktemp("lab")) as running:
        yield running


@pytest.mark.sample
def test_it_is_watched_and_steered_while_the_cell_runs(browser: Browser, lab: Lab, tmp_path: Path) -> None:
    with notebook(browser, lab, "steered.ipynb", STREAM + LOOP) as tab:
        press(tab, "notebook:run-all-cells")
        badge(tab, "running")
        tab.page.wait_for_function("document.querySelector('.zds-live').innerText.includes('1 dead letter')")
        colours = COLOURS["light"]
        assert {colours["planned"], colours["done"], colours["dead"]} <= canvas_colours(tab.page)

        tab.page.click(".zds-pause")
        badge(tab, "paused")
        before = -1
        while numbers(tab) != before:  # what was in flight comes in
            before = numbers(tab)
            tab.page.wait_for_timeout(1500)
        assert before < 2000
        tab.page.hover(".zds-canvas", position={"x": 4, "y": 4})
        tab.page.wait_for_function("document.querySelector('.zds-tip').innerText === 'chunk (0, 0): done'")
        assert tab.shot(tmp_path / "paused.png").stat().st_size > 20_000

        tab.page.fill(".zds-rate", "100")
        tab.page.press(".zds-rate", "Enter")
        tab.page.click(".zds-pause")
        badge(tab, "running")
        tab.page.wait_for_function(
            "(n) => Number(document.querySelector('.zds-numbers').innerText.split('/')[0].replace(',', '')) > n",
            arg=before + 20,
        )
        tab.page.click(".zds-drain")
        tab.page.wait_for_function(OVER)
        tab.page.wait_for_selector(".zds-live", state="detached")
        assert tab.shot(tmp_path / "over.png").stat().st_size > 20_000
        [picture] = outputs(lab, tab, "steered.ipynb")
        assert VIEW not in picture
        assert "<svg" in picture[HTML]
        assert "<script" not in picture[HTML]
        assert "stopped early" in picture[HTML].lower()
        outside = [url for url in tab.requests if not url.startswith((lab.url, "data:", "blob:", "ws:"))]
        assert (tab.errors, outside) == ([], [])


def test_two_streams_a_second_run_and_a_restart(browser: Browser, lab: Lab, tmp_path: Path) -> None:
    both = "other = stream.filter(lambda chunk: False)\ndisplay(stream.widget(), other.widget())"
    cells = (STREAM + both, "other.run()", "stream.run()")
    with notebook(browser, lab, "several.ipynb", *cells) as tab:
        press(tab, "notebook:run-all-cells")
        tab.page.wait_for_function("document.querySelectorAll('.zds-live').length === 1")  # the other one is over
        badge(tab, "running")
        assert tab.page.locator(".jp-OutputArea-output svg").count() > 0
        tab.page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
        tab.page.wait_for_function(IDLE)
        tab.page.click(".zds-pause")
        tab.page.wait_for_function("document.querySelector('.zds-note')?.textContent.includes('No answer')")
        tab.shot(tmp_path / "restarted.png")
        press(tab, "notebook:run-all-cells")
        badge(tab, "running")


def test_a_saved_notebook_shows_its_picture_without_a_kernel(browser: Browser, lab: Lab) -> None:
    quick = STREAM.replace("0.004", "0")
    with notebook(browser, lab, "saved.ipynb", quick + LOOP) as tab:
        press(tab, "notebook:run-all-cells")
        tab.page.wait_for_function(OVER)
        tab.page.wait_for_selector(".jp-RenderedHTMLCommon svg")
        [picture] = outputs(lab, tab, "saved.ipynb")
        assert VIEW not in picture
    with browser.tab() as tab:
        tab.goto(f"{lab.url}/lab/workspaces/again/tree/saved.ipynb")
        tab.page.wait_for_selector(".jp-RenderedHTMLCommon svg", timeout=60_000)
        assert "model not found" not in tab.page.inner_text(".jp-Notebook")


def test_the_dark_theme(browser: Browser, tmp_path: Path) -> None:
    with run_lab(tmp_path, dark=True) as lab, notebook(browser, lab, "dark.ipynb", STREAM + LOOP) as tab:
        press(tab, "notebook:run-all-cells")
        badge(tab, "running")
        tab.page.wait_for_selector(".zds-live.zds-dark")
        tab.page.wait_for_timeout(1000)
        assert {COLOURS["dark"]["planned"], COLOURS["dark"]["done"]} <= canvas_colours(tab.page)
        tab.shot(tmp_path / "dark.png")
        assert tab.errors == []
