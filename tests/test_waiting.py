"""What waits falls due in order, alone or in company."""

from __future__ import annotations

import math
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from zarr_dask_stream.engine.waiting import Again, WaitingRoom


def test_nothing_waits_at_first() -> None:
    room = WaitingRoom()
    assert not room
    assert (room.chunks, room.next_due, list(room.take_due(9.0))) == (0, math.inf, [])
    room.add(Again((), 1.0))
    assert not room, "no chunks, nothing to wait for"


def test_the_lonely_stay_apart_and_the_others_share() -> None:
    room = WaitingRoom()
    for again in (Again((1,), 1.0), Again((2, 3), 1.0, alone=True, suspect=True), Again((4,), 1.0), Again((5,), 3.0)):
        room.add(again)
    assert list(room.take_due(2.0)) == [Again((2, 3), 1.0, alone=True, suspect=True), Again((1, 4), 2.0)]
    assert (room.chunks, room.next_due) == (1, 3.0)


def test_groups_have_a_limit() -> None:
    room = WaitingRoom()
    for number in range(150):
        room.add(Again((number,), 0.0))
    assert [len(again.numbers) for again in room.take_due(0.0)] == [64, 64, 22]


def test_what_is_not_allowed_goes_on_waiting() -> None:
    room = WaitingRoom()
    for number in range(5):
        room.add(Again((number,), 0.0))
    answers: Iterator[bool] = iter([True, True, False])
    assert [again.numbers for again in room.take_due(1.0, lambda: next(answers))] == [(0, 1)]
    assert room.chunks == 3


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 10), st.booleans()), max_size=60), st.lists(st.floats(0, 12), max_size=5))
def test_each_comes_once_and_none_too_early(entries: list[tuple[float, bool]], looks: list[float]) -> None:
    room = WaitingRoom()
    for number, (due, alone) in enumerate(entries):
        room.add(Again((number,), due, alone=alone))
    came: list[int] = []
    for now in [*sorted(looks), 20.0]:
        taken = [number for again in room.take_due(now) for number in again.numbers]
        assert all(entries[number][0] <= now for number in taken)
        came += taken
        assert room.chunks == len(entries) - len(came)
    assert sorted(came) == list(range(len(entries)))
