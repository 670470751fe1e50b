"""Credit: its limits hold under any history. The outbox: what is announced first leaves first."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zarr_dask_stream.engine.window import Item, Outbox, Window, WindowLimits
from zarr_dask_stream.errors import UsageError


@given(
    chunks=st.none() | st.integers(1, 20),
    nbytes=st.integers(1, 1000),
    chunk_nbytes=st.integers(0, 400),
    steps=st.lists(st.tuples(st.booleans(), st.integers(1, 20)), max_size=60),
)
def test_limits_are_never_passed_but_for_one_oversized_chunk(
    chunks: int | None, nbytes: int, chunk_nbytes: int, steps: list[tuple[bool, int]]
) -> None:
    limits = WindowLimits(chunks=chunks, nbytes=nbytes)
    window = Window(limits)
    for submit, wanted in steps:
        if submit:
            count = min(wanted, window.room(chunk_nbytes))
            window.reserve(count, count * chunk_nbytes)
        else:
            count = min(wanted, window.chunks)
            window.release(count, count * chunk_nbytes)
        assert chunks is None or window.chunks <= chunks
        assert window.nbytes <= nbytes or window.chunks == 1
        assert window.nbytes == window.chunks * chunk_nbytes
        assert window.chunks <= limits.capacity(chunk_nbytes)
        assert window.peak_chunks >= window.chunks
        assert window.peak_bytes >= window.nbytes
        if not window.chunks:
            assert window.room(chunk_nbytes) == limits.capacity(chunk_nbytes)


def test_a_chunk_larger_than_the_limit_passes_alone() -> None:
    window = Window(WindowLimits(chunks=8, nbytes=100))
    assert window.room(1000) == 1
    window.reserve(1, 1000)
    assert window.room(1000) == 0
    assert window.room(1) == 0
    window.release(1, 1000)
    assert window.room(1000) == 1


def test_more_credit_than_was_taken_is_a_mistake() -> None:
    window = Window(WindowLimits(chunks=8, nbytes=100))
    window.reserve(1, 10)
    with pytest.raises(AssertionError):
        window.release(2, 20)


@pytest.mark.parametrize(("chunks", "nbytes"), [(0, 1), (-1, 1), (1, 0), (None, -5)])
def test_limits_below_one_are_refused(chunks: int | None, nbytes: int) -> None:
    with pytest.raises(UsageError):
        WindowLimits(chunks=chunks, nbytes=nbytes)


# -- the outbox -------------------------------------------------------------------------------------

arrivals = st.integers(0, 25).flatmap(lambda n: st.tuples(st.permutations(range(n)), st.lists(st.integers(0, 3))))


@given(arrivals, st.data())
def test_ordered_output_is_the_announced_order(drawn: tuple[list[int], list[int]], data: st.DataObject) -> None:
    announced, actions = drawn
    arriving = data.draw(st.permutations(announced))
    dropped = set(data.draw(st.lists(st.sampled_from(announced)))) if announced else set()
    box, out = Outbox(ordered=True), []
    cuts = sorted(data.draw(st.lists(st.integers(0, len(announced)), max_size=4)))
    pieces = [announced[a:b] for a, b in zip([0, *cuts], [*cuts, len(announced)], strict=True)]
    box.expect([range(n, n + 1) for n in pieces[0]])
    rest = iter(pieces[1:])
    later = [n for piece in pieces[1:] for n in piece]
    for step, number in enumerate(arriving):
        if number in later:
            for piece in rest:
                box.expect([range(n, n + 1) for n in piece])
        if number in dropped:
            box.drop(number)
        elif step % 2:
            box.put(Item(number, str(number), False))
        else:
            box.extend([Item(number, str(number), False)])
        if actions and actions[step % len(actions)]:
            while (item := box.pop()) is not None:
                out.append(item)
    while (item := box.pop()) is not None:
        out.append(item)
    assert [item.number for item in out] == [n for n in announced if n not in dropped]
    assert all(item.value == str(item.number) for item in out)
    assert len(box) == box.ready == 0


@given(st.permutations(range(12)))
def test_unordered_output_is_the_order_of_arrival(arriving: list[int]) -> None:
    box = Outbox(ordered=False)
    box.expect([range(12)])
    for number in arriving:
        if number % 3:
            box.put(Item(number, None, False))
        else:
            box.drop(number)
    items: list[Any] = [box.pop() for _ in range(8)]
    assert [item.number for item in items] == [n for n in arriving if n % 3]
    assert box.pop() is None
    assert len(box) == 0


def test_one_that_is_late_holds_back_those_behind_it() -> None:
    box = Outbox(ordered=True)
    box.expect([range(3), range(10, 14, 2)])
    box.extend(Item(n, n, False) for n in (12, 2, 1, 10))
    assert (box.ready, len(box)) == (0, 4)
    box.put(Item(0, 0, False))
    assert box.ready == 5
    assert [box.pop() for _ in range(6)] == [*(Item(n, n, False) for n in (0, 1, 2, 10, 12)), None]


def test_values_that_are_none_are_values() -> None:
    box = Outbox(ordered=True)
    box.expect([range(2)])
    box.put(Item(0, None, True))
    box.put(Item(1, None, False))
    assert box.pop() == Item(0, None, True)
    assert box.pop() == Item(1, None, False)
