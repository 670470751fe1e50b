"""What the scheduler keeps of the streams of its clients: little, whatever it is told."""

import json
from typing import Any

import pytest

import zarr_dask_stream as zds
from zarr_dask_stream.watch.board import Board, News


def news(run: str = "r1", **changes: Any) -> News:
    given = {"v": 1, "run": run, "name": "t2m", "outcome": "running", "counts": {"chunks": {"emitted": 2}}}
    return News.parse({**given, **changes})


def outcomes(board: Board) -> dict[str, str]:
    return {posted.news.run: posted.outcome for posted in board.posted}


def test_streams_of_several_clients_stand_side_by_side() -> None:
    board = Board()
    board.post("anna", news("a"), 1.0)
    board.post("bert", news("b"), 2.0)
    board.post("anna", news("a", outcome="done"), 3.0)
    assert outcomes(board) == {"b": "running", "a": "done"}
    assert [posted.news.run for posted in board.posted] == ["b", "a"], "those under way come first"
    posted = board.get("a")
    assert posted is not None
    assert (posted.began, posted.heard) == (1.0, 3.0)


def test_the_streams_of_a_client_that_left_are_gone() -> None:
    board = Board()
    board.post("anna", news("a"), 1.0)
    board.post("anna", news("finished", outcome="done"), 1.0)
    board.post("bert", news("b"), 1.0)
    assert [posted.news.run for posted in board.left("anna")] == ["a"]
    assert outcomes(board) == {"a": "gone", "finished": "done", "b": "running"}
    assert not board.left("anna"), "once is enough"


def test_a_client_that_comes_back_goes_on() -> None:
    board = Board()
    board.post("anna", news("a"), 1.0)
    board.left("anna")
    board.post("anna", news("a"), 2.0)
    assert outcomes(board) == {"a": "running"}


def test_nobody_speaks_for_another_client() -> None:
    board = Board()
    board.post("anna", news("a"), 1.0)
    board.post("mallory", news("a", outcome="failed"), 2.0)
    assert outcomes(board) == {"a": "running"}


def test_what_ended_first_is_forgotten_first() -> None:
    board = Board(most=3)
    board.post("anna", news("old"), 0.0)
    for number in range(10):
        board.post("anna", news(f"done-{number}", outcome="done"), 1.0 + number)
    assert outcomes(board) == {"old": "running", "done-9": "done", "done-8": "done"}
    assert not board.full


def test_streams_under_way_are_not_pushed_out() -> None:
    board = Board(most=3)
    for number in range(5):
        board.post("anna", news(f"r{number}"), float(number))
    assert set(outcomes(board)) == {"r0", "r1", "r2"}
    assert board.full
    board.post("anna", news("r1", outcome="done"), 10.0)
    board.post("anna", news("r4"), 11.0)
    assert outcomes(board) == {"r4": "running", "r2": "running", "r0": "running"}


def test_who_looks_can_tell_whether_there_is_something_new() -> None:
    board = Board()
    seen = [board.version]
    board.post("anna", news("a"), 0.0)
    seen.append(board.version)
    board.left("anna")
    seen.append(board.version)
    assert len(set(seen)) == 3
    board.left("anna")
    assert board.version == seen[-1]


def test_snapshots_are_read_when_somebody_looks() -> None:
    board = Board()
    board.post("anna", news("a", snapshot=json.dumps({"v": 1, "url": "x"})), 0.0)
    posted = board.get("a")
    assert posted is not None
    assert posted.snapshot == {"v": 1, "url": "x"}
    assert posted.snapshot is posted.snapshot
    for broken in ("{", "[" * 100_000, '"text"', ""):
        board.post("anna", news("a", snapshot=broken), 0.0)
        assert posted.snapshot == {}


@pytest.mark.parametrize(
    "message",
    [
        None,
        [],
        {},
        {"v": 2, "run": "r"},
        {"v": 1},
        {"v": 1, "run": 7},
        {"v": 1, "run": "r", "name": "x" * 10_000},
        {"v": 1, "run": "r", "snapshot": "x" * 1_000_000},
        {"v": 1, "run": "r", "snapshot": {"not": "text"}},
        {"v": 1, "run": "r", "planned": "many"},
        {"v": 1, "run": "r", "planned": True},
        {"v": 1, "run": "r", "in_flight": float("inf")},
        {"v": 1, "run": "r", "counts": []},
        {"v": 1, "run": "r", "counts": {"chunks": 7}},
        {"v": 1, "run": "r", "counts": {"chunks": {"emitted": "many"}}},
        {"v": 1, "run": "r", "counts": {"chunks": {str(number): 1 for number in range(1000)}}},
        {"v": 1, "run": "r", "counts": {str(number): {} for number in range(1000)}},
        {"v": 1, "run": "r", "counts": {7: {}}},
    ],
)
def test_what_is_not_news_is_refused(message: Any) -> None:
    with pytest.raises(zds.UsageError, match="expected news of a stream"):
        News.parse(message)
