"""Answers on the client: each window once, as soon as it is complete, whatever comes back in whatever order."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from windowing import alongs, plans
from zarr_dask_stream.engine.partials import decode_value, encode_value
from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.source.grid import ChunkGrid
from zarr_dask_stream.source.selection import ChunkPlan
from zarr_dask_stream.stages.answers import Answers, Ending, WindowResult, answers_of
from zarr_dask_stream.stages.combine import Fold, Partials, Reducer
from zarr_dask_stream.stages.windows import Along, Every, InWindow, parse_along

ENDINGS: list[Ending] = ["folded", "filtered", "skipped", "dead"]


class Elements(Reducer):
    """The list of values: merged in place, so that a partial used twice shows."""

    def create(self) -> list[int]:
        return []

    def add(self, partial: list[int], chunk: Chunk) -> list[int]:
        partial.extend(chunk.data.ravel().tolist())
        return partial

    def merge(self, left: list[int], right: list[int]) -> list[int]:
        left.extend(right)
        return left


@dataclass
class OfParity:
    parity: int
    where: Any

    def __call__(self, index: tuple[int, ...]) -> bool:
        return sum(index) % 2 == self.parity and (self.where is None or bool(self.where(index)))


class Scene:
    """A plan on its way through `Answers`: sent in order, settled in any order, handed out as it comes."""

    def __init__(self, plan: ChunkPlan, fold: Fold, endings: dict[int, Ending], *, ordered: bool) -> None:
        along = fold.window
        self.plan, self.fold, self.endings, self.ordered = plan, fold, endings, ordered
        if isinstance(along, Along):
            self.order = sorted(plan, key=along.position)
        else:
            self.order = list(plan)
        self.data = np.arange(np.prod(plan.grid.shape)).reshape(plan.grid.shape)

    def start(self, state: Any = None) -> Answers:
        answers = answers_of(self.fold, self.plan, ordered=self.ordered)
        answers.load(decode_value(encode_value(state)) if state else {})
        return answers

    def settle(self, answers: Answers, number: int) -> Ending:
        how = self.endings.get(number, "folded")
        if how == "folded":
            partials: Partials = {}
            self.fold.add(partials, Chunk.planned(self.plan, number, self.data[self.plan.region(number)]))
            answers.merge(pickle.loads(pickle.dumps(partials)))
        answers.settled([number], how)
        return how

    def expected(self, along: Along, window: int) -> tuple[list[int], dict[str, int]]:
        """Return the values and counts of a window, by brute force."""
        values: list[int] = []
        counts = dict.fromkeys(ENDINGS, 0)
        box = along.region(window)
        for number in self.plan:
            region = self.plan.region(number)
            both = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(box, region, strict=True))
            if all(part.stop > part.start for part in both):
                how = self.endings.get(number, "folded")
                counts[how] += 1
                values += self.data[both].ravel().tolist() if how == "folded" else []
        return sorted(values), {str(how): count for how, count in counts.items()}


def counts_of(item: Any) -> dict[str, int]:
    return {how: getattr(item, how) for how in ENDINGS}


@st.composite
def scenes(draw: st.DrawFn) -> tuple[Scene, Along]:
    plan, along = draw(alongs())
    where = draw(st.sampled_from([None, lambda index: sum(index) % 3 > 0]))
    plan = ChunkPlan(plan.grid, plan.box, InWindow(along, where) if along.gaps else where)
    endings = draw(st.dictionaries(st.sampled_from(range(len(plan.grid))), st.sampled_from(ENDINGS)))
    return Scene(plan, Fold(Elements(), None, along), endings, ordered=draw(st.booleans())), along


def play(scene: Scene, draw: Any, stop_after: int | None = None, state: Any = None, done: Any = ()) -> Any:
    """Run to the end, or break out of the loop at an item; return the items, the state and the chunks done."""
    answers = scene.start(state)
    todo = [number for number in scene.order if number not in done]
    out: list[int] = []
    items: list[Any] = []
    finished = set(done)
    while True:
        answers.passed(todo[0] if todo else None)
        item = answers.take(0.0)
        if item is not None:
            items.append(item)
            if stop_after is not None and len(items) > stop_after:
                return items, answers.dump(), finished
            finished.update(answers.acknowledge(0.0))
        elif not todo and not out:
            break
        elif todo and (not out or draw(st.booleans())):
            number = todo.pop(0)
            answers.sent([number])
            out.append(number)
        else:
            number = out.pop(draw(st.integers(0, len(out) - 1)))
            if scene.settle(answers, number) != "dead":
                finished.add(number)
    answers.end()
    while (item := answers.take(0.0)) is not None:
        items.append(item)
        answers.acknowledge(0.0)
    assert answers.nbytes == 0, "nothing is held for windows that are done"
    return items, answers.dump(), finished


@given(scenes(), st.data())
def test_each_window_comes_once_with_its_own_chunks(case: tuple[Scene, Along], data: st.DataObject) -> None:
    scene, along = case
    items, state, _ = play(scene, data.draw)
    planned = [window for window in range(len(along)) if along.planned(scene.plan, window)]
    came = [item.index for item in items]
    assert sorted(came) == sorted(along.index(window) for window in planned)
    if scene.ordered:
        assert came == [along.index(window) for window in planned]
    for window in planned:
        item = items[came.index(along.index(window))]
        assert isinstance(item, WindowResult)
        values, counts = scene.expected(along, window)
        assert sorted(item.data) == values
        assert counts_of(item) == counts
        assert item.region == along.region(window)
        assert item.missing == (not counts["folded"])
        assert item.trigger == "complete"
    assert state["panes"] == {}
    assert state["accounts"] == {}


@given(scenes(), st.data())
def test_a_run_that_was_stopped_goes_on_with_the_same_rest(case: tuple[Scene, Along], data: st.DataObject) -> None:
    scene, _ = case
    scene.endings = {number: how for number, how in scene.endings.items() if how != "dead"}
    scene.ordered = True
    whole, _, _ = play(scene, data.draw)
    for stop in range(len(whole)):
        head, state, done = play(scene, data.draw, stop_after=stop)
        assert [item.index for item in head] == [item.index for item in whole[: stop + 1]]
        rest, _, _ = play(scene, data.draw, state=state, done=done)
        # What the consumer did not come back after is handed out again.
        assert [item.index for item in rest] == [item.index for item in whole[stop:]]
        assert [sorted(item.data) for item in rest] == [sorted(item.data) for item in whole[stop:]]
        assert [counts_of(item) for item in rest] == [counts_of(item) for item in whole[stop:]]


@given(scenes(), st.data())
def test_dead_chunks_are_tried_again_only_for_windows_that_lack_them(
    case: tuple[Scene, Along], data: st.DataObject
) -> None:
    scene, along = case
    scene.ordered = True
    whole, _, _ = play(scene, data.draw)
    stop = data.draw(st.integers(0, max(len(whole) - 1, 0)))
    head, state, done = play(scene, data.draw, stop_after=stop)
    acknowledged = {item.index for item in head[:stop]}
    healed = copy.copy(scene)
    healed.endings = {number: how for number, how in scene.endings.items() if how != "dead"}
    tried = [number for number in scene.order if number not in done]
    for number in tried:
        windows = list(along.windows_at(along.position(number)))
        assert any(along.index(window) not in acknowledged for window in windows)
    rest, _, _ = play(healed, data.draw, state=state, done=done)
    assert [item.index for item in rest] == [item.index for item in whole[stop:]]
    for item in rest:
        window = next(window for window in range(len(along)) if along.index(window) == item.index)
        values, counts = healed.expected(along, window)
        assert sorted(item.data) == values
        assert counts_of(item) == counts


def never(_: Any) -> Any:
    """Draw nothing: send one chunk, settle it, and so on."""
    return False


def test_a_dead_chunk_is_tried_again_for_the_windows_that_are_left() -> None:
    plan = ChunkPlan(ChunkGrid((12,), (4,)), (slice(0, 12),))
    along = parse_along(plan, None, 0, 2)
    dying = Scene(plan, Fold(Elements(), None, along), {0: "dead", 1: "dead"}, ordered=True)
    head, state, done = play(dying, never, stop_after=3)
    assert [(item.index, item.data, item.dead) for item in head] == [(k, [], 1) for k in range(4)]
    assert done == {0}, "windows 0 and 1 are done; 3 is not, and chunk 1 is in it"
    healed = Scene(plan, Fold(Elements(), None, along), {}, ordered=True)
    rest, state, done = play(healed, never, state=state, done=done)
    assert [(item.index, item.data) for item in rest] == [(3, [6, 7]), (4, [8, 9]), (5, [10, 11])]
    assert (state["panes"], state["accounts"], state["done"]) == ({}, {}, (6, []))
    assert done == {0, 1, 2}


@given(scenes(), st.data())
def test_groups_come_with_their_windows(case: tuple[Scene, Along], data: st.DataObject) -> None:
    scene, along = case
    scene.fold = Fold(Elements(), lambda index: sum(index) % 2, along)
    items, _, _ = play(scene, data.draw)
    expected = {}
    for window in range(len(along)):
        for parity in (0, 1):
            part = copy.copy(scene)
            part.plan = ChunkPlan(scene.plan.grid, scene.plan.box, OfParity(parity, scene.plan.where))
            values, _ = part.expected(along, window)
            if values:
                expected[parity, along.index(window)] = values
    assert {item.index: sorted(item.data) for item in items} == expected
    assert len(items) == len(expected)


def test_only_open_windows_are_held() -> None:
    plan = ChunkPlan(ChunkGrid((1000,), (1,)), (slice(0, 1000),))
    along = parse_along(plan, None, 0, 10, 3)
    scene = Scene(plan, Fold(Elements(), None, along), {}, ordered=True)
    answers = scene.start()
    most = 0
    for number in scene.order:
        answers.sent([number])
        scene.settle(answers, number)
        answers.passed(number + 1 if number + 1 < 1000 else None)
        most = max(most, sum(len(partials) for partials in answers.dump()["panes"].values()))
        while answers.take(0.0) is not None:
            answers.acknowledge(0.0)
    assert most <= 2 * (10 // 3 + 2)
    assert answers.nbytes == 0


def test_a_window_that_waits_for_one_chunk_holds_back_those_behind_it_only_in_order() -> None:
    plan = ChunkPlan(ChunkGrid((6,), (1,)), (slice(0, 6),))
    for ordered, before in [(True, []), (False, [1, 2])]:
        scene = Scene(plan, Fold(Elements(), None, parse_along(plan, None, 0, 2)), {}, ordered=ordered)
        answers = scene.start()
        answers.sent(range(6))
        answers.passed(None)
        came: list[Any] = []
        for number in [5, 4, 3, 2, 1, None, 0]:
            if number is None:
                assert sorted(came) == before
                continue
            scene.settle(answers, number)
            while (item := answers.take(0.0)) is not None:
                came.append(item.index)
                answers.acknowledge(0.0)
        assert sorted(came) == [0, 1, 2]


# -- triggers -----------------------------------------------------------------------------------------


@given(plans(2), st.integers(1, 5), st.booleans(), st.data())
def test_a_trigger_shows_what_was_folded_so_far(plan: ChunkPlan, every: int, reset: bool, data: st.DataObject) -> None:
    endings = data.draw(st.dictionaries(st.sampled_from(range(len(plan.grid))), st.sampled_from(ENDINGS)))
    scene = Scene(plan, Fold(Elements(), None, Every(every, None, reset)), endings, ordered=True)
    answers = scene.start()
    folded: list[int] = []
    since = 0
    items: list[Any] = []
    for number in scene.order:
        answers.sent([number])
        if scene.settle(answers, number) == "folded":
            folded += scene.data[plan.region(number)].ravel().tolist()
            since += 1
        item = answers.take(0.0)
        if since >= every:
            assert isinstance(item, WindowResult)
            assert sorted(item.data) == sorted(folded)
            assert (item.index, item.trigger, item.region) == (len(items), "every", ())
            items.append(item)
            answers.acknowledge(0.0)
            folded, since = [] if reset else folded, 0
        else:
            assert item is None
    answers.end()
    item = answers.take(0.0)
    if since or not items:
        assert isinstance(item, WindowResult)
        assert (sorted(item.data), item.trigger) == (sorted(folded), "end")
        answers.acknowledge(0.0)
        items.append(item)
    assert answers.take(0.0) is None
    whole = sum(item.folded for item in items) if reset else items[-1].folded
    assert whole == sum(endings.get(number, "folded") == "folded" for number in plan)


def test_a_trigger_by_the_clock() -> None:
    plan = ChunkPlan(ChunkGrid((6,), (1,)), (slice(0, 6),))
    scene = Scene(plan, Fold(Elements(), None, Every(None, 2.0)), {}, ordered=True)
    answers = scene.start()
    assert (answers.deadline, answers.take(100.0)) == (None, None)
    answers.acknowledge(100.0)
    scene.settle(answers, 0)
    assert (answers.deadline, answers.take(101.9)) == (102.0, None)
    item = answers.take(102.0)
    assert isinstance(item, WindowResult)
    assert (item.data, item.trigger) == ([0], "seconds")
    answers.acknowledge(105.0)
    assert (answers.deadline, answers.take(200.0)) == (None, None), "nothing new, nothing to show"
    scene.settle(answers, 1)
    assert answers.deadline == 107.0


def test_an_answer_shown_early_is_not_changed_by_what_comes_later() -> None:
    plan = ChunkPlan(ChunkGrid((6,), (1,)), (slice(0, 6),))
    scene = Scene(plan, Fold(Elements(), None, Every(1)), {}, ordered=True)
    answers = scene.start()
    items = []
    for number in range(3):
        scene.settle(answers, number)
        items.append(answers.take(0.0))
        answers.acknowledge(0.0)
    assert [item.data for item in items if item is not None] == [[0], [0, 1], [0, 1, 2]]


@pytest.mark.parametrize("reset", [True, False])
def test_a_trigger_that_was_not_acknowledged_fires_again(reset: bool) -> None:
    plan = ChunkPlan(ChunkGrid((6,), (1,)), (slice(0, 6),))
    scene = Scene(plan, Fold(Elements(), None, Every(2, None, reset)), {}, ordered=True)
    answers = scene.start()
    for number in range(4):
        scene.settle(answers, number)
        item = answers.take(0.0)
        if number == 1:
            answers.acknowledge(0.0)
    assert item is not None
    again = scene.start(answers.dump()).take(0.0)
    assert again is not None
    assert (again.index, again.data) == (item.index, item.data) == (1, [2, 3] if reset else [0, 1, 2, 3])


@given(st.data(), st.booleans())
def test_groups_of_a_trigger_and_of_a_window_are_done_one_by_one(data: st.DataObject, reset: bool) -> None:
    plan = ChunkPlan(ChunkGrid((6,), (1,)), (slice(0, 6),))
    window: Any = Every(6, None, True) if reset else parse_along(plan, None, 0, 6)
    scene = Scene(plan, Fold(Elements(), lambda index: index[0] % 3, window), {}, ordered=True)
    answers = scene.start()
    answers.sent(range(6))
    answers.passed(None)
    for number in range(6):
        scene.settle(answers, number)
    came: list[Any] = []
    stops = data.draw(st.lists(st.integers(1, 3), max_size=3))
    for most in [*stops, 10]:
        for _ in range(most):
            item = answers.take(0.0)
            if item is None:
                break
            came.append((item.index, item.data))
            answers.acknowledge(0.0)
        answers.take(0.0)  # handed out, and never acknowledged
        answers = scene.start(answers.dump())
        answers.passed(None)
    assert sorted(came) == [((key, 0), [key, key + 3]) for key in range(3)]


# -- what a person sees -------------------------------------------------------------------------------


def test_a_result_says_what_is_not_in_it_and_travels() -> None:
    item = WindowResult((0, 2), (slice(4, 8), slice(0, 3)), 1.5, "complete", folded=3, filtered=1, skipped=2, dead=1)
    for one in (item, pickle.loads(pickle.dumps(item))):
        assert repr(one) == (
            "WindowResult(index=(0, 2), region=[4:8, 0:3], data=1.5, complete, 3 chunks, 1 filtered, 2 not stored, "
            "1 dead)"
        )
    assert repr(WindowResult(1, (), None, "end")) == "WindowResult(index=1, region=[], data=None, end, 0 chunks)"


def test_without_windows_the_answer_comes_at_the_end() -> None:
    plan = ChunkPlan(ChunkGrid((4,), (1,)), (slice(0, 4),))
    scene = Scene(plan, Fold(Elements()), {}, ordered=True)
    answers = scene.start()
    for number in range(4):
        scene.settle(answers, number)
        assert answers.take(0.0) is None
    answers.end()
    item = answers.take(0.0)
    assert item is not None
    assert (item.index, item.data) == ((), [0, 1, 2, 3])
    assert answers.take(0.0) is None
