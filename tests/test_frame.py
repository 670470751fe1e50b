"""What the widget shows at one moment."""

from __future__ import annotations

import json
from typing import Any

import pytest

from watched import MESSAGE, finished, frame_of, notices
from zarr_dask_stream.engine.events import ChunksEmitted, ClusterChanged, RunStarted
from zarr_dask_stream.watch.chunkmap import STATES
from zarr_dask_stream.watch.frame import Controls, Pace, axes_choices, axes_name

GRID = (24, 30)


def weight(frame: dict[str, Any]) -> int:
    binary = sum(len(value) for value in frame.values() if isinstance(value, bytes))
    rest = {name: value for name, value in frame.items() if not isinstance(value, bytes)}
    return binary + len(json.dumps(rest, allow_nan=False))


def test_a_run_in_the_middle() -> None:
    frame = frame_of(notices(GRID))
    counts = dict(zip(frame["states"], frame["counts"], strict=True))
    assert sum(counts.values()) == 720
    assert (counts["dead"], counts["retried"], counts["in flight"]) == (2, 1, 3)
    assert counts["planned"] == 720 - 432 - 4
    assert len(frame["cells"]) == len(frame["shares"]) == 720
    assert (frame["state"], frame["live"], frame["over"], frame["share"]) == ("running", True, False, 0.6)
    assert frame["numbers"][0] == "432/720 chunks"
    assert frame["numbers"][1].endswith("/s")
    assert frame["numbers"][-2].endswith(" left")
    assert frame["troubles"] == ["1 retry", "2 dead letters"]
    assert [row[2:] for row in frame["letters"]] == [["PermissionError", MESSAGE]] * 2
    assert [line["name"] for line in frame["series"]] == ["Chunks/s", "Decoded/s", "In flight"]
    assert all(len(line["times"]) == len(line["values"]) > 5 for line in frame["series"])


@pytest.mark.parametrize("grid", [(), (1,), (40,), (5000,), (1000, 1000), (30, 200, 200), (9, 9, 9, 9, 9)])
def test_it_stays_small_whatever_the_grid(grid: tuple[int, ...]) -> None:
    frame = frame_of(notices(grid, per_s=20_000, dead=300), maps=["one", "two"])
    rows, columns = frame["layout"]["shape"]
    assert rows * columns == len(frame["cells"]) <= 4096
    assert weight(frame) < 60_000


def test_words_for_how_it_stands() -> None:
    told = notices(GRID)
    assert frame_of(told, controls=Controls(paused=True))["badge"] == "paused"
    assert frame_of(told, controls=Controls(draining=True))["badge"] == "draining"
    over = frame_of([*told, finished(GRID)], controls=Controls(paused=True, draining=True))
    assert (over["badge"], over["over"], over["live"]) == ("done, but for dead letters", True, False)
    assert frame_of([*notices(GRID, dead=0), finished(GRID)])["badge"] == "done"
    failed = frame_of([*told, finished(GRID, outcome="failed", error="ChunkError: it broke")])
    assert (failed["badge"], failed["troubles"][-1]) == ("failed", "ChunkError: it broke")
    assert not any(text.endswith("left") for text in failed["numbers"])


def test_before_it_began_and_without_chunks() -> None:
    frame = frame_of([])
    assert (frame["badge"], frame["numbers"], frame["share"], frame["cells"]) == ("not started", [], None, b"")
    assert frame["empty"].startswith("Not started")
    nothing = frame_of([RunStarted(0.0, 0, 8, (0, 3), "m"), finished((0, 3))])
    assert (nothing["empty"], nothing["share"]) == ("There is no chunk to read.", 1.0)


def test_a_total_that_is_not_known_yet() -> None:
    frame = frame_of([RunStarted(0.0, None, 8, (6,), "m"), ChunksEmitted(1.0, (1,))])
    assert (frame["share"], frame["numbers"][0]) == (None, "1/? chunks")


def test_a_run_that_ends_after_so_many() -> None:
    told = [RunStarted(0.0, 6, 8, (6,), "m"), ChunksEmitted(1.0, (0,))]
    frame = frame_of(list(told), limit=2)
    assert (frame["share"], frame["numbers"][0]) == (0.5, "1/2 chunks")


def test_a_cluster_without_workers_is_named() -> None:
    told = [RunStarted(0.0, 6, 8, (6,), "m"), ClusterChanged(0.1, 2, 2), ClusterChanged(5.0, 0, 0)]
    assert frame_of(list(told))["troubles"] == ["waiting for a worker to join the cluster"]
    assert frame_of(list(told[:2]))["troubles"] == []


def test_shares_of_cells_that_hold_several_chunks() -> None:
    frame = frame_of(notices((1000, 1000), done=0.5, per_s=20_000, dead=0))
    assert frame["layout"]["merge"] == [16, 16]
    assert frame["cells"][0] == STATES.index("done")
    assert frame["shares"][0] == 255
    assert frame["cells"][-1] == STATES.index("planned")
    assert frame["shares"][-1] == 0


def test_rates_are_those_of_the_last_looks() -> None:
    pace = Pace()
    assert pace.per_s == (0.0, 0.0)
    for second in range(100):
        pace.look(second, 10 * second + max(second - 60, 0) * 90, second)
    assert pace.per_s == pytest.approx((100.0, 1.0))
    still = Pace()
    still.look(1.0, 5, 5)
    still.look(1.0, 9, 9)
    assert still.per_s == (0.0, 0.0)


def test_axes_to_choose_from() -> None:
    assert axes_choices(()) == axes_choices((1, 7, 1)) == axes_choices((4, 5)) == [None]
    assert len(axes_choices((9, 9, 9, 9, 9))) == 6
    assert axes_choices((4, 1, 5, 6)) == [None, (0, 2), (0, 3), (2, 3)]
    assert axes_name((1, 2), ("t", None, "x")) == "axis 1 x x"
