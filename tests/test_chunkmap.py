"""The chunk grid as cells: every chunk counted once, in the state it is in."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

import zarr_dask_stream as zds
from zarr_dask_stream.engine.events import (
    Batch,
    BatchSubmitted,
    Category,
    ChunkDeadLettered,
    ChunkRetried,
    ChunksCancelled,
    ChunksEmitted,
    ChunksFiltered,
    ChunksSkipped,
    DeadLetter,
    Failure,
    Notice,
    RunFinished,
    RunStarted,
)
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.watch import chunkmap as module
from zarr_dask_stream.watch.chunkmap import COLOURS, GROUNDS, OUTSIDE, STATES, ChunkMap, lay_out

shapes = st.lists(st.integers(1, 30), max_size=4).map(tuple)


def started(shape: tuple[int, ...], **more: Any) -> RunStarted:
    return RunStarted(0.0, math.prod(shape), 8, shape, "memory://", **more)


def sent(*numbers: int, fresh: bool = True) -> BatchSubmitted:
    ranges = tuple(range(n, n + 1) for n in numbers)
    return BatchSubmitted(0.0, Batch(1, ranges, len(numbers), 8 * len(numbers), fresh=fresh), 0, 0)


def retried(number: int, attempt: int = 1) -> ChunkRetried:
    return ChunkRetried(0.0, Failure(number, Category.TRANSIENT, "OSError", "reset"), attempt, 0.1)


def dead(number: int) -> ChunkDeadLettered:
    return ChunkDeadLettered(0.0, number, DeadLetter((number,), (slice(0, 1),), 3, "corrupt", "ValueError", "bad"))


def finished(outcome: str = "done", total: int = 0) -> RunFinished:
    return RunFinished(1.0, outcome, total, 0.0, 1, 8)


def folded(*notices: Notice, **options: Any) -> ChunkMap:
    chunkmap = ChunkMap(**options)
    for notice in notices:
        chunkmap.handle(notice)
    return chunkmap


def names(chunkmap: ChunkMap) -> list[list[str]]:
    return [[(*STATES, "outside")[state] for state in row] for row in chunkmap.states().tolist()]


# -- the layout -------------------------------------------------------------------------------------


@given(shapes, st.integers(1, 300), st.data())
def test_every_chunk_has_the_cell_whose_bounds_hold_it(shape: tuple[int, ...], cells: int, data: st.DataObject) -> None:
    axes = data.draw(st.none() | st.permutations(range(len(shape))).map(lambda p: p[:2]).filter(bool))
    layout = lay_out(shape, cells=cells, axes=axes)
    rows, columns = layout.shape
    assert rows * columns <= max(cells, 1) or layout.kind == "line"
    found = layout.cell_of(np.arange(math.prod(shape)))
    for number, index in enumerate(itertools.product(*map(range, shape))):
        row, column = divmod(int(found[number]), columns)
        assert all(a <= i < b for i, (a, b) in zip(index, layout.bounds(row, column), strict=True))
        if number > 50:
            break
    whole = layout.sizes([0] * len(shape), shape)
    assert whole.ravel().tolist() == np.bincount(found, minlength=rows * columns).tolist()


@given(st.integers(1, 100_000), st.integers(1, 5000))
def test_a_line_wraps_within_its_cells(length: int, cells: int) -> None:
    layout = lay_out((length,), cells=cells)
    rows, columns = layout.shape
    assert rows * columns <= cells + columns
    assert rows == 1 or (rows - 1) * columns < -(-length // layout.merge[0]) <= rows * columns
    assert rows <= columns


@given(shapes.filter(bool), st.data())
def test_a_box_is_counted_by_arithmetic(shape: tuple[int, ...], data: st.DataObject) -> None:
    start, stop = zip(*(sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape), strict=True)
    layout = lay_out(shape, cells=50)
    inside = [
        number
        for number, index in enumerate(itertools.product(*map(range, shape)))
        if all(a <= i < b for i, a, b in zip(index, start, stop, strict=True))
    ]
    counted = np.bincount(layout.cell_of(inside), minlength=math.prod(layout.shape))
    assert layout.sizes(start, stop).ravel().tolist() == counted.tolist()


@pytest.mark.parametrize(
    ("shape", "cells", "kind", "expected"),
    [
        ((), 4096, "point", (1, 1)),
        ((1, 1, 1), 4096, "point", (1, 1)),
        ((0, 5), 4096, "empty", (0, 0)),
        ((7,), 4096, "line", (1, 7)),
        ((1, 100, 1), 4096, "line", (5, 20)),
        ((1_000_000,), 4096, "line", (32, 128)),
        ((1_000_000, 2), 4096, "line", (32, 128)),
        ((12, 12, 9), 4096, "plane", (12, 12)),
        ((1000, 1000), 4096, "plane", (63, 63)),
        ((365, 10, 20), 400, "line", (10, 40)),
        ((40, 20), 4096, "plane", (40, 20)),
    ],
)
def test_layouts_of_usual_grids(shape: tuple[int, ...], cells: int, kind: str, expected: tuple[int, int]) -> None:
    layout = lay_out(shape, cells=cells)
    assert (layout.kind, layout.shape) == (kind, expected)


@pytest.mark.parametrize("axes", [(), (0, 0), (0, 1, 2), (3,), (-4,), 5])
def test_axes_that_make_no_picture_are_refused(axes: Any) -> None:
    with pytest.raises(UsageError, match="one or two different axes of a grid of rank 3"):
        lay_out((2, 3, 4), axes=axes)


def test_axes_may_count_from_the_end() -> None:
    assert lay_out((2, 3, 4), axes=(-1, 0)).shape == (4, 2)


@pytest.mark.parametrize("cells", [0, -1, True, 2.0])
def test_a_map_without_cells_is_refused(cells: Any) -> None:
    with pytest.raises(UsageError, match="at least one cell"):
        ChunkMap(cells=cells)


# -- the fold ---------------------------------------------------------------------------------------


def test_each_chunk_is_shown_where_it_is() -> None:
    run = [started((2, 4)), sent(0, 1, 2, 3, 4, 5), retried(1), ChunksEmitted(0.1, (0,)), ChunksFiltered(0.1, (2,))]
    run += [ChunksSkipped(0.1, (range(3, 4),), 1), dead(4)]
    chunkmap = folded(*run)
    assert names(chunkmap) == [["done", "retried", "filtered", "missing"], ["dead", "in flight", "planned", "planned"]]
    assert chunkmap.label(0, 1) == "chunk (0, 1): retried, 1 retry"
    chunkmap.handle(sent(1, fresh=False))
    chunkmap.handle(ChunksEmitted(0.2, (1, 5)))
    chunkmap.handle(ChunksCancelled(0.3, 2))
    chunkmap.handle(finished("stopped early"))
    assert names(chunkmap) == [["done", "done", "filtered", "missing"], ["dead", "done", "cancelled", "cancelled"]]
    assert chunkmap.label(0, 1) == "chunk (0, 1): done, 1 retry"


def test_a_chunk_that_fails_again_and_again_is_one_chunk() -> None:
    chunkmap = folded(started((3,)), sent(0, 1), retried(1), retried(1, 2), retried(1, 3))
    assert chunkmap.totals()["retried"] == 1
    chunkmap.handle(dead(1))
    assert chunkmap.totals() == {**dict.fromkeys(STATES, 0), "planned": 1, "in flight": 1, "dead": 1}
    assert chunkmap.label(0, 1) == "chunk (1,): dead, 3 retries"


def test_of_a_merged_cell_the_trouble_is_shown_and_the_rest_said() -> None:
    chunkmap = folded(started((4, 4)), cells=4)
    assert chunkmap.shape == (2, 2)
    chunkmap.handle(sent(0, 1, 4, 2))
    chunkmap.handle(ChunksEmitted(0.1, (0, 1)))
    assert names(chunkmap) == [["in flight", "in flight"], ["planned", "planned"]]
    assert chunkmap.label(0, 0) == "chunks (0..1, 0..1): 2 done, 1 planned, 1 in flight"
    assert chunkmap.done_share()[0, 0] == pytest.approx(0.5)
    chunkmap.handle(dead(4))
    assert names(chunkmap)[0][0] == "dead"
    assert chunkmap.done_share()[0, 0] == pytest.approx(0.75)


def test_chunks_beyond_the_region_are_not_part_of_the_run() -> None:
    chunkmap = folded(started((4, 4), box_start=(1, 1), box_stop=(3, 3)))
    states = chunkmap.states()
    assert (states == OUTSIDE).sum() == 12
    assert chunkmap.totals()["planned"] == 4
    assert chunkmap.label(0, 0) == "(0, 0): not part of this run"


@pytest.mark.parametrize(
    ("notices", "left"),
    [
        ([ChunksSkipped(0.0, (), 7)], "missing"),  # a listing showed them to be absent
        ([], "outside"),  # a predicate left them out
        ([ChunksCancelled(0.9, 7)], "cancelled"),  # .take(1)
    ],
)
def test_what_is_left_at_the_end_is_explained(notices: list[Notice], left: str) -> None:
    chunkmap = folded(started((8,)), sent(0), ChunksEmitted(0.1, (0,)), *notices, finished())
    assert names(chunkmap) == [["done", *[left] * 7]]


def test_earlier_runs_are_shown_as_done() -> None:
    chunkmap = folded(started((8,)))
    chunkmap.resume(np.arange(3))
    assert names(chunkmap) == [["done"] * 3 + ["planned"] * 5]


def test_numbers_beyond_the_grid_do_no_harm() -> None:
    chunkmap = folded(started((2,)), sent(0, 7), ChunksEmitted(0.1, (0, 7)))
    assert chunkmap.totals()["done"] == 1


def test_before_it_began_there_is_nothing_and_nothing_breaks() -> None:
    chunkmap = ChunkMap()
    assert chunkmap.shape == (0, 0)
    assert chunkmap.states().shape == chunkmap.done_share().shape == (0, 0)
    chunkmap.handle(ChunksEmitted(0.1, (0,)))
    chunkmap.handle(finished())
    assert chunkmap.totals() == dict.fromkeys(STATES, 0)


@given(
    shapes.filter(bool),
    st.lists(st.tuples(st.sampled_from(["emit", "filter", "skip", "die", "retry", "send"]), st.integers(0, 10**6))),
    st.integers(1, 40),
)
def test_no_chunk_is_lost_or_counted_twice(shape: tuple[int, ...], moves: list[tuple[str, int]], cells: int) -> None:
    """Against a model that keeps the state of each chunk."""
    size = math.prod(shape)
    state = dict.fromkeys(range(size), "planned")
    chunkmap = folded(started(shape), cells=cells)
    ends: dict[str, tuple[str, Any]] = {
        "emit": ("done", lambda n: ChunksEmitted(0.0, (n,))),
        "filter": ("filtered", lambda n: ChunksFiltered(0.0, (n,))),
        "skip": ("missing", lambda n: ChunksSkipped(0.0, (range(n, n + 1),), 1)),
        "die": ("dead", dead),
        "retry": ("retried", retried),
    }
    for what, drawn in moves:
        number = drawn % size
        if what == "send" and state[number] == "planned":
            chunkmap.handle(sent(number))
            state[number] = "in flight"
        elif what != "send" and state[number] in ("in flight", "retried"):
            state[number], notice = ends[what][0], ends[what][1](number)
            chunkmap.handle(notice)
    assert chunkmap.totals() == {name: list(state.values()).count(name) for name in STATES}
    assert chunkmap.counts.sum() == size
    one = chunkmap.layout.cell_of(np.arange(size))
    dead_cells = {int(one[n]) for n, name in state.items() if name == "dead"}
    assert set(np.flatnonzero(chunkmap.states().ravel() == STATES.index("dead")).tolist()) == dead_cells


def test_memory_is_bounded_and_one_chunk_at_a_time_is_counted_in_bulk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that come one by one: they are counted in thousands, and nothing is kept of them."""
    calls: list[int] = []
    joined = module._numbers_of

    def joined_too(parts: list[Any]) -> Any:
        calls.append(len(parts))
        return joined(parts)

    monkeypatch.setattr(module, "_numbers_of", joined_too)
    chunkmap = folded(started((1000, 1000)))
    for number in range(40_000):
        chunkmap.on_chunks_emitted(ChunksEmitted(0.0, (number,)))
        assert len(chunkmap._state.held) < 4096
    assert len(calls) <= 40_000 // 4096
    assert chunkmap.totals()["done"] == 40_000
    assert math.prod(chunkmap.shape) <= 4096


# -- colours ----------------------------------------------------------------------------------------


def _linear(colour: str) -> Any:
    parts = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio of two colours."""
    low, high = sorted(float(_linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


# Machado, Oliveira and Fernandes 2009, severity 1.0.
SIGHT = {
    "usual": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def _lab(linear: Any) -> Any:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(linear, 0, 1) / [0.9505, 1.0, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_state_stands_out_from_the_ground(scheme: str) -> None:
    assert list(COLOURS[scheme]) == list(STATES)
    for state, colour in COLOURS[scheme].items():
        assert contrast(colour, GROUNDS[scheme]) >= 3, state


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("sight", list(SIGHT))
def test_states_can_be_told_apart_by_everybody(scheme: str, sight: str) -> None:
    seen = {state: _lab(SIGHT[sight] @ _linear(colour)) for state, colour in COLOURS[scheme].items()}
    for one, other in itertools.combinations(STATES, 2):
        assert np.linalg.norm(seen[one] - seen[other]) >= 17, (one, other)


# -- on a real stream -------------------------------------------------------------------------------


def test_a_real_run_ends_with_every_chunk_in_its_place() -> None:
    array = zarr.create_array({}, shape=(6, 8), chunks=(1, 1), dtype="i4", fill_value=0)
    array[:] = np.arange(48).reshape(6, 8)

    def broken(chunk: zds.Chunk) -> Any:
        if chunk.index == (2, 3):
            raise ValueError("no")
        return chunk.data

    chunkmap = ChunkMap()
    stream = zds.stream_chunks(
        array, region=(slice(1, 6), slice(0, 6)), missing="skip", on_error="skip", concurrency=1, callbacks=[chunkmap]
    )
    report = stream.filter(lambda chunk: chunk.index[1] != 5).map(broken).run()
    assert report.dead_lettered == 1
    states = names(chunkmap)
    assert states[0] == ["outside"] * 8
    assert states[2] == ["done", "done", "done", "dead", "done", "filtered", "outside", "outside"]
    assert chunkmap.totals()["done"] == report.emitted == 24


@pytest.mark.parametrize("missing", ["fill", "skip"])
@pytest.mark.parametrize("how", ["run", "loop", "reduce"])
def test_chunks_that_are_not_stored_are_shown_as_missing(missing: Any, how: str) -> None:
    array = zarr.create_array({}, shape=(6, 10), chunks=(1, 1), dtype="i4", fill_value=0)
    array[1, 2:5] = 7
    array[4] = 3
    stream: Any = zds.stream_chunks(array, missing=missing, concurrency=1)
    if how == "reduce":
        stream = stream.reduce(zds.reducers.sum())
    if how == "run":
        stream.run()
    else:
        list(stream)
    report = stream.report
    expected = np.full((6, 10), STATES.index("missing"))
    expected[1, 2:5] = expected[4] = STATES.index("done")
    assert report.chunkmap.states().tolist() == expected.tolist()
    assert report.chunkmap.totals()["missing"] == report.filled_missing + report.skipped_missing == 47


def test_what_an_earlier_run_has_done_is_shown_as_done(tmp_path: Path) -> None:
    array = zarr.create_array({}, shape=(4, 20), chunks=(1, 2), dtype="i4")
    array[:] = 1
    region = (slice(1, 3), slice(4, 18))
    stream = zds.stream_chunks(array, region=region, concurrency=1, checkpoint=tmp_path / "ledger")
    for position, _ in enumerate(stream):
        if position == 8:
            break
    assert stream.report.chunkmap.totals()["cancelled"] == 5
    report = stream.run()
    assert report.resumed == 8
    assert report.chunkmap.totals() == {**dict.fromkeys(STATES, 0), "done": 14}
    assert (report.chunkmap.states() == OUTSIDE).sum() == 26
