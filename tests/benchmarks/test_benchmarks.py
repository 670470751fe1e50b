"""What the benchmark says is what it measured: verdicts, tables, plots, and a road that holds requests back."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_stream, figures, plots
from benchmarks.contest import Contender, Figure, Kind, Outcome, Ratio, Row, share, times
from benchmarks.road import Delays, SlowRoad
from benchmarks.rows import ROWS, SMALLER
from realparts.http_files import HttpStore

RESULTS = json.loads((figures.HERE / "results.json").read_text(encoding="utf-8"))


def run(chunks: int, seconds: float, **own: float) -> dict[str, Any]:
    return {"chunks": chunks, "seconds": seconds, "figures": own}


# -- verdicts -----------------------------------------------------------------------------------------


def test_a_ratio_is_the_median_of_the_ratios_within_rounds() -> None:
    rounds = [{"a": run(10, a), "b": run(10, b)} for a, b in ((1.0, 2.0), (10.0, 5.0), (4.0, 3.0))]
    goal = bench_stream.judge(share("a", "b", 0.8), rounds)
    assert goal["values"] == [2.0, 0.5, 0.75]
    assert (goal["median"], goal["lowest"], goal["highest"], goal["met"]) == (0.75, 0.5, 2.0, False)
    assert bench_stream.judge(times("a", "b", 0.75, "b"), rounds)["met"] is True


def test_a_ratio_can_be_taken_of_several_times_the_other() -> None:
    goal = bench_stream.judge(Ratio("", "a", "b", None, factor=4), [{"a": run(30, 1), "b": run(10, 1)}])
    assert (goal["median"], goal["met"]) == (0.75, None)


@pytest.mark.parametrize(("least", "most", "met"), [(2.0, None, True), (None, 2.0, False), (2.0, 3.0, True)])
def test_a_figure_is_held_between_its_bounds(least: float | None, most: float | None, met: bool) -> None:
    goal = Figure("", "a", "f", least=least, most=most)
    assert bench_stream.judge(goal, [{"a": run(1, 1, f=2.5)}])["met"] is met


def contender(name: str, kind: Kind, total: float = 1.0) -> Contender:
    return Contender(name, lambda: Outcome(1, total, seconds=1.0), kind, work="w")


@pytest.fixture
def no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the garbage of all other tests alone: to look through it takes longer than these."""
    monkeypatch.setattr("gc.collect", lambda: 0)


def test_a_contender_that_did_other_work_is_found_out(no_garbage: None) -> None:
    row = Row("", [contender("limit", "limit"), contender("stream", "stream", 1.1)], [])
    with pytest.raises(RuntimeError, match=r"stream came to a total of 1\.1, others to 1\.0"):
        bench_stream.warm_up(row)


def test_a_peer_that_fails_is_left_out_and_named(no_garbage: None) -> None:
    def fail() -> Outcome:
        raise ValueError("not today")

    peer = replace(contender("peer", "peer"), run=fail)
    goals = [times("stream", "peer", 2.0, "peer"), share("stream", "limit", 0.1)]
    row = Row("", [contender("limit", "limit"), contender("stream", "stream"), peer], list(goals))
    result = bench_stream.run_row("row", row, 2)
    assert [c["name"] for c in result["contenders"]] == ["limit", "stream"]
    assert [goal["to"] for goal in result["goals"]] == ["limit"]
    assert result["absent"] == {"peer": "failed: ValueError: not today"}
    assert len(result["rounds"]) == 2
    assert "absent  peer: failed: ValueError: not today" in "\n".join(figures.brief(result))


def test_rows_of_other_versions_are_not_kept(tmp_path: Path) -> None:
    about = {"machine": {"cores": 2}, "versions": {"zarr": "3.1"}, "seed": 1}
    path = tmp_path / "results.json"
    assert bench_stream.kept(path, about) == []
    path.write_text(json.dumps({**about, "rows": [{"name": "small"}]}))
    assert bench_stream.kept(path, about) == [{"name": "small"}]
    with pytest.raises(SystemExit, match="other versions"):
        bench_stream.kept(path, {**about, "seed": 2})


def test_names_go_together() -> None:
    assert set(SMALLER) == set(ROWS)
    assert set(figures.notes()) <= set(ROWS)


# -- tables -------------------------------------------------------------------------------------------


def test_the_readme_shows_what_was_measured() -> None:
    text = (figures.ROOT / "README.md").read_text(encoding="utf-8")
    assert figures.inserted(text, figures.readme(RESULTS) + "\n") == text
    assert (figures.HERE / "results.md").read_text(encoding="utf-8") == figures.table(RESULTS)


def test_the_verdicts_follow_from_the_rounds() -> None:
    for row in RESULTS["rows"]:
        for goal in row["goals"]:
            least, most = goal["least"], goal["most"]
            assert goal["lowest"] <= goal["median"] <= goal["highest"]
            assert len(goal["values"]) == len(row["rounds"])
            if least is not None or most is not None:
                assert goal["met"] is bench_stream._within(goal["median"], least, most)


def test_a_readme_without_a_place_for_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no lines"):
        figures.inserted("# Title\n", "table")


# -- plots --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", plots.THEMES)
def test_text_and_marks_stand_out_from_the_page(name: str) -> None:
    theme = plots.THEMES[name]
    assert min(plots.contrast(colour, theme.page) for colour in (theme.text, theme.faint)) >= 4.5
    assert min(plots.contrast(colour, theme.page) for colour in (theme.good, theme.short)) >= 3


@pytest.mark.parametrize("kind", plots.PLOTS)
def test_the_same_results_make_the_same_plot(kind: str) -> None:
    one_row = {**RESULTS, "rows": RESULTS["rows"][:1]}
    first, second = (plots.svg(plots.PLOTS[kind], one_row, plots.THEMES["dark"]) for _ in range(2))
    assert first == second
    assert ET.fromstring(first).tag.endswith("svg")


def test_every_plot_of_the_readme_is_there() -> None:
    names = {f"{kind}-{theme}.svg" for kind in plots.PLOTS for theme in plots.THEMES}
    assert names == {path.name for path in (figures.HERE / figures.PLOTS).iterdir()}
    text = (figures.ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"tests/benchmarks/plots/{name}" in text for name in names)


# -- the road -----------------------------------------------------------------------------------------


@pytest.fixture
def road(http_store: HttpStore) -> Iterator[SlowRoad]:
    http_store.directory.joinpath("value").write_bytes(bytes(range(256)) * 1000)
    road = SlowRoad(http_store.url, Delays(0.02))
    yield road
    road.close()


@pytest.fixture
def get(road: SlowRoad) -> Iterator[Callable[..., tuple[bytes, float]]]:
    connection = http.client.HTTPConnection(road.url.removeprefix("http://"), timeout=30)

    def ask(method: str = "GET") -> tuple[bytes, float]:
        begin = time.perf_counter()
        connection.request(method, "/value")
        body = connection.getresponse().read()
        return body, time.perf_counter() - begin

    yield ask
    connection.close()


def test_the_road_holds_requests_back_and_changes_nothing(
    road: SlowRoad, get: Callable[..., tuple[bytes, float]]
) -> None:
    for _ in range(3):
        body, seconds = get()
        assert body == bytes(range(256)) * 1000
        assert seconds >= 0.02
    assert get("HEAD")[0] == b""
    traffic = road.take_traffic()
    assert (traffic["requests"], traffic["hung"], traffic["peak_requests"]) == (4, 0, 1)
    assert traffic["answer_s"] >= 0.02
    assert road.take_traffic()["requests"] == 0


def test_exactly_one_of_so_many_requests_hangs(road: SlowRoad, get: Callable[..., tuple[bytes, float]]) -> None:
    road.set(Delays(0.0, hang_every=5, hang_s=0.2))
    slow = [get()[1] >= 0.2 for _ in range(15)]
    assert [sum(slow[start : start + 5]) for start in (0, 5, 10)] == [1, 1, 1]
    assert road.take_traffic()["hung"] == 3


# -- from end to end ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.cluster
def test_a_row_is_measured_from_the_command_line(tmp_path: Path) -> None:
    script = figures.HERE / "bench_stream.py"
    options = ["--rows", "latency,client", "--rounds", "2", "--scale", "0.01"]
    command = [sys.executable, str(script), "--out", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in result["rows"]] == ["client", "latency"]
    client = result["rows"][0]
    assert {"limit", "stream", "tensorstore"} <= {c["name"] for c in client["contenders"]}
    assert all(run["cpu_s"] > 0 for run in client["rounds"][0].values())
    assert [len(row["rounds"]) for row in result["rows"]] == [2, 2]
    assert "## client" in (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| client |" in (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "<picture>" in (tmp_path / "readme.md").read_text(encoding="utf-8")
