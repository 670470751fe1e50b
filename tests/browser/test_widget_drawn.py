"""The widget's own script in a real browser: every state of a stream, without a notebook around."""

from __future__ import annotations

from pathlib import Path

import pytest

from realparts.browser import Browser
from watched import MESSAGE, finished, frame_of, notices
from widget_stage import Stage
from zarr_dask_stream.watch.chunkmap import COLOURS, GROUNDS
from zarr_dask_stream.watch.frame import Controls

pytestmark = pytest.mark.xdist_group("browser")

GRID = (24, 30)


@pytest.mark.parametrize("dark", [False, True])
def test_a_run_in_the_middle(browser: Browser, tmp_path: Path, dark: bool) -> None:
    with browser.tab(dark=dark) as tab:
        frame = frame_of(notices(GRID), maps=["the longest", "time x lat"])
        stage = Stage(tab, frame, dark=dark)
        text = stage.text()
        for part in (
            "running",
            "432/720 chunks",
            "2 dead letters",
            f"done {frame['counts'][3]}",
            "dead 2",
            "Where the time goes",
            "fetch",
        ):
            assert part in text
        colours = COLOURS["dark" if dark else "light"]
        drawn = {colours[state] for state in ("planned", "in flight", "retried", "done", "filtered", "dead")}
        assert drawn <= stage.colours()
        assert GROUNDS["dark" if dark else "light"] in stage.colours()
        tab.page.click("summary")
        assert MESSAGE in stage.text()  # as text: nothing of it has become a tag
        assert tab.page.query_selector("td b") is None
        assert tab.shot(tmp_path / "shot.png").stat().st_size > 10_000
        assert (tab.errors, [url for url in tab.requests if not url.startswith("blob:")]) == ([], [])


def test_cells_change_their_colour_as_frames_come_in(browser: Browser) -> None:
    with browser.tab() as tab:
        stage = Stage(tab, frame_of([]))
        assert "Not started" in stage.text()
        assert not tab.page.is_visible(".zds-canvas")
        stage.feed(frame_of(notices(GRID, done=0.5)))
        before = stage.colours()
        stage.feed(frame_of([*notices(GRID, done=1.0, dead=0), finished(GRID)]))
        assert COLOURS["light"]["planned"] in before - stage.colours()
        assert "720/720 chunks" in stage.text()
        assert tab.page.is_disabled(".zds-pause")
        assert tab.page.is_disabled(".zds-drain")
        assert tab.errors == []


@pytest.mark.parametrize("grid", [(1,), (3, 1), (5000,), (1000, 1000), (9, 9, 9, 9)], ids=str)
def test_one_chunk_and_a_million_fit(browser: Browser, grid: tuple[int, ...]) -> None:
    with browser.tab(width=400) as tab:
        stage = Stage(tab, frame_of([*notices(grid, done=1.0, dead=0, per_s=20_000), finished(grid)]))
        assert COLOURS["light"]["done"] in stage.colours()
        box = tab.page.eval_on_selector(".zds-canvas", "(c) => [c.clientWidth, c.clientHeight]")
        assert 8 <= box[0] <= 400
        assert 8 <= box[1] <= 400
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 400
        assert tab.errors == []


def test_buttons_say_what_was_pressed(browser: Browser) -> None:
    told = notices(GRID)
    with browser.tab() as tab:
        stage = Stage(tab, frame_of(told))
        tab.page.click(".zds-pause")
        stage.feed(frame_of(told, controls=Controls(paused=True)))
        assert (stage.text(".zds-pause"), stage.text(".zds-badge")) == ("Resume", "paused")
        tab.page.click(".zds-pause")
        tab.page.fill(".zds-rate", "40")
        tab.page.press(".zds-rate", "Enter")
        stage.feed(frame_of(told, controls=Controls(rate=40.0)))
        tab.page.fill(".zds-rate", "")
        tab.page.press(".zds-rate", "Tab")
        tab.page.click(".zds-drain")
        pressed = [(message["zds"], message["value"]) for message in stage.pressed]
        assert pressed == [("pause", None), ("resume", None), ("rate", 40), ("rate", None), ("drain", None)]
        assert len({message["id"] for message in stage.pressed}) == 5
        stage.feed(frame_of(told, controls=Controls(draining=True)))
        assert (stage.text(".zds-badge"), tab.page.is_disabled(".zds-drain")) == ("draining", True)


def test_a_rate_that_makes_no_sense_is_refused_in_words(browser: Browser) -> None:
    with browser.tab() as tab:
        stage = Stage(tab, frame_of(notices(GRID)))
        tab.page.fill(".zds-rate", "-3")
        tab.page.press(".zds-rate", "Tab")
        assert "greater than 0" in stage.text(".zds-note")
        assert tab.page.get_attribute(".zds-rate", "aria-invalid") == "true"
        assert stage.pressed == []


def test_a_kernel_that_does_not_answer_is_named(browser: Browser) -> None:
    with browser.tab() as tab:
        stage = Stage(tab, frame_of(notices(GRID)))
        tab.page.click(".zds-pause")
        tab.page.wait_for_function("document.querySelector('.zds-note').textContent.includes('No answer')")
        stage.feed(frame_of(notices(GRID), controls=Controls(paused=True)))
        assert stage.text(".zds-note") == ""


def test_cells_are_reached_by_pointer_and_by_keyboard(browser: Browser) -> None:
    with browser.tab() as tab:
        stage = Stage(tab, frame_of(notices((1000, 1000), per_s=20_000, dead=0)))
        tab.page.hover(".zds-canvas", position={"x": 3, "y": 3})
        assert stage.text(".zds-tip") == "chunks (0..15, 0..15): done, 100 % ended"
        assert {"zds": "label", "cell": [0, 0]}.items() <= stage.sent[0].items()
        exact = {
            "zds": "label",
            "view": stage.sent[0]["view"],
            "cell": [0, 0],
            "text": "chunks (0..15, 0..15): 256 done",
        }
        tab.page.evaluate("(message) => window.tell('msg:custom', message)", exact)
        assert stage.text(".zds-tip") == exact["text"]
        tab.page.focus(".zds-canvas")
        tab.page.keyboard.press("ArrowDown")
        tab.page.keyboard.press("ArrowRight")
        assert stage.text(".zds-said").startswith("chunks (16..31, 16..31): ")
        tab.page.keyboard.press("PageDown")
        tab.page.keyboard.press("End")
        tab.page.keyboard.press("ArrowRight")  # there is none
        assert stage.text(".zds-said") == "chunks (992..999, 992..999): planned, 0 % ended"
        names = tab.page.eval_on_selector_all(
            "button, input, select, canvas", "(all) => all.map((one) => one.tabIndex)"
        )
        assert set(names) == {0}


def test_axes_are_chosen_from_a_list(browser: Browser) -> None:
    told = notices((8, 9, 10))
    maps = ["the longest", "time x lat", "time x lon"]
    with browser.tab() as tab:
        stage = Stage(tab, frame_of(told, maps=maps))
        tab.page.select_option(".zds-axes", "2")
        assert (stage.pressed[0]["zds"], stage.pressed[0]["value"]) == ("axes", 2)
        stage.feed(frame_of(told, maps=maps, shown=2, axes=(0, 2)))
        assert tab.page.input_value(".zds-axes") == "2"
        assert "8 by 10 cells" in tab.page.get_attribute(".zds-canvas", "aria-label")


def test_everything_on_it_has_a_name_and_nothing_is_left_behind(browser: Browser) -> None:
    with browser.tab() as tab:
        Stage(tab, frame_of(notices(GRID), maps=["a", "b"]))
        nameless = tab.page.evaluate(
            """() => [...document.querySelectorAll("button, input, select, canvas, svg, [role=progressbar], section")]
              .filter((one) => !(one.textContent.trim() || one.getAttribute("aria-label") || one.labels?.length))
              .map((one) => one.outerHTML)"""
        )
        assert nameless == []
        levels = tab.page.eval_on_selector_all("h1,h2,h3,h4", "(all) => all.map((one) => Number(one.tagName[1]))")
        assert levels == [3, 4, 4]
        assert tab.page.eval_on_selector_all("th", "(all) => all.every((one) => one.scope === 'col')")
        tab.page.evaluate("window.cleanup()")
        left = tab.page.evaluate("Object.values(window.listeners).flat().length")
        assert left == 0


@pytest.mark.slow
def test_a_million_chunks_are_drawn_smoothly(browser: Browser) -> None:
    frames = [frame_of(notices((1000, 1000), done=done / 10, per_s=20_000)) for done in range(1, 10)]
    with browser.tab() as tab:
        stage = Stage(tab, frames[0])
        spent = tab.page.evaluate("performance.now()")
        for frame in frames:
            stage.feed(frame)
        spent = tab.page.evaluate("performance.now()") - spent
        print(f"{spent / len(frames):.0f} ms a frame of 10^6 chunks, its way to the browser included")
        assert "900,000/1,000,000 chunks" in stage.text()
