"""Who gets which item, and when its credit returns. Any order of events is in ``stateful/test_demand_states.py``."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from zarr_dask_stream.engine.dispatch import Broadcast, Dispatch, OnDemand, Partition, Receipts
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.source.grid import ChunkGrid
from zarr_dask_stream.source.selection import ChunkPlan, parse_region

GRID = ChunkGrid((20,), (1,))
PLAN = ChunkPlan(GRID, parse_region(None, GRID.shape))


def filled(dispatch: Dispatch, numbers: Iterable[int]) -> Dispatch:
    for number in numbers:
        dispatch.put(Chunk.planned(PLAN, number, number * 10))
    return dispatch


def take(dispatch: Dispatch, who: int, most: int | None = None) -> list[int]:
    return [chunk.index[0] for chunk in dispatch.take(who, most)]


# -- on demand ----------------------------------------------------------------------------------------


def test_on_demand_each_item_goes_to_one_and_leaves_with_it() -> None:
    shared = filled(OnDemand(2), range(4))
    assert take(shared, 1, 3) == [0, 1, 2]
    assert shared.left() == [0, 1, 2]
    assert shared.left() == []
    assert take(shared, 0) == [3]
    assert len(shared) == 0


def test_what_was_given_back_comes_first_and_leaves_once() -> None:
    shared = filled(OnDemand(), range(4))
    shared.ask(0, 4)
    chunks = shared.take(0, 2)
    assert shared.left() == [0, 1]
    shared.give_back(0, chunks)
    assert shared.demand == 2, "what was asked for with them is not asked for any more: they need no reading"
    assert take(shared, 0) == [0, 1, 2, 3]
    assert shared.left() == [2, 3]


def test_who_has_left_gets_nothing_and_asks_for_nothing() -> None:
    shared = filled(OnDemand(2), range(4))
    shared.ask(0, 3)
    shared.ask(1, 5)
    assert take(shared, 1, 2) == [0, 1]
    shared.leave(1)
    shared.leave(1)
    assert take(shared, 1) == []
    assert shared.demand == 3 + 2, "of what it asked for, what it got counts"
    assert take(shared, 0) == [2, 3]


# -- broadcast ----------------------------------------------------------------------------------------


def test_the_slowest_decides_when_an_item_leaves() -> None:
    shared = filled(Broadcast(3), range(3))
    assert take(shared, 0) == [0, 1, 2]
    assert take(shared, 1, 2) == [0, 1]
    assert (shared.left(), len(shared)) == ([], 3)
    assert take(shared, 2, 1) == [0]
    assert (shared.left(), len(shared)) == ([0], 2)


def test_the_demand_of_a_broadcast_is_that_of_the_least_demanding() -> None:
    shared = Broadcast(2)
    shared.ask(0, 7)
    assert shared.demand == 0
    shared.ask(1, 3)
    assert shared.demand == 3
    shared.leave(1)
    assert shared.demand == 7
    shared.leave(0)
    assert shared.demand == 0


def test_who_leaves_holds_nobody_up_any_more() -> None:
    shared = filled(Broadcast(2), range(3))
    assert take(shared, 0) == [0, 1, 2]
    shared.leave(1)
    assert shared.left() == [0, 1, 2]
    filled(shared, [3])
    assert (take(shared, 0), take(shared, 1), shared.left()) == ([3], [], [3])
    shared.leave(0)
    assert filled(shared, [4]).left() == [4], "nobody is there to take it"


def test_copies_are_views_that_can_not_be_written_to() -> None:
    shared = Broadcast(2)
    data = np.zeros(3)
    shared.put(Chunk.planned(PLAN, 0, data))
    [one], [other] = shared.take(0), shared.take(1)
    assert np.shares_memory(one.data, other.data)
    assert data.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        one.data[0] = 1


# -- by key -------------------------------------------------------------------------------------------


def test_a_key_keeps_its_consumer_and_keys_go_round() -> None:
    shared = filled(Partition(2, lambda index: index[0] % 3), range(9))
    assert shared.waiting(0) == 6
    assert take(shared, 0, 3) == [0, 2, 3]
    assert shared.left() == [0, 2, 3]
    assert take(shared, 1) == [1, 4, 7]
    assert take(shared, 0) == [5, 6, 8]


def test_keys_of_who_left_are_given_out_again_in_order() -> None:
    shared = filled(Partition(3, lambda index: index[0] % 3), range(9))
    shared.leave(0)
    assert take(shared, 1) == [1, 4, 7, 0, 3, 6]
    assert take(shared, 2) == [2, 5, 8]
    filled(shared, range(9, 12))
    assert (take(shared, 1), take(shared, 2)) == ([9, 10], [11])


def test_items_for_nobody_leave_at_once() -> None:
    shared = filled(Partition(1, lambda index: index[0]), [0])
    shared.leave(0)
    filled(shared, [1])
    assert (shared.left(), len(shared)) == ([0, 1], 0)


@pytest.mark.parametrize("key", [lambda index: index[5], lambda index: [index]])
def test_a_key_function_that_fails_is_named_with_the_index(key: object) -> None:
    shared = Partition(2, key)  # type: ignore[arg-type]  # a list can't be hashed
    with pytest.raises(UsageError, match=r"key\(\(3,\)\) raised (IndexError|TypeError).*can be hashed"):
        filled(shared, [3])


# -- receipts -----------------------------------------------------------------------------------------


def test_an_item_is_done_when_all_are_through_with_it() -> None:
    receipts = Receipts(3)
    assert receipts.confirm([1, 2]) == receipts.confirm([2]) == []
    assert receipts.confirm([1, 2]) == [2]
    assert receipts.confirm([1]) == [1]


def test_what_one_has_not_confirmed_when_it_left_is_never_done() -> None:
    receipts = Receipts(2)
    receipts.confirm([1])
    receipts.forfeit()
    assert receipts.confirm([1, 2]) == [1]
    assert receipts.confirm([3]) == receipts.confirm([2]) == []


def test_one_confirmation_is_enough_where_each_item_has_one_consumer() -> None:
    receipts = Receipts()
    receipts.forfeit()
    assert receipts.confirm([4, 5]) == [4, 5]
