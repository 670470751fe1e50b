"""The arithmetic of the shuffle, against lists that are shuffled the slow way."""

from __future__ import annotations

import math
import pickle
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zarr_dask_stream.source.grid import ChunkGrid
from zarr_dask_stream.source.selection import decode_numbers
from zarr_dask_stream.source.shuffle import Deck, DeckPlan, Permutation, Reservoir, chance, key_of, shuffled

KEYS = st.integers(0, 2**64 - 1)


@settings(deadline=None)
@given(st.integers(1, 3000), KEYS)
def test_a_permutation_is_one_and_can_be_undone(size: int, key: int) -> None:
    order = Permutation(size, key)
    there = order.forward(np.arange(size))
    assert sorted(there.tolist()) == list(range(size))
    assert order.inverse(there).tolist() == list(range(size))
    assert order.forward(np.arange(size)[::-1]).tolist() == there[::-1].tolist()


@settings(deadline=None)
@given(st.integers(1, 2**62), KEYS, st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=20))
def test_a_huge_permutation_costs_no_more(size: int, key: int, places: list[float]) -> None:
    order = Permutation(size, key)
    positions = np.array([min(int(place * size), size - 1) for place in places])
    numbers = order.forward(positions)
    assert ((numbers >= 0) & (numbers < size)).all()
    np.testing.assert_array_equal(order.inverse(numbers), positions)


@pytest.mark.parametrize("size", [3, 4])
def test_small_permutations_all_occur_about_equally_often(size: int) -> None:
    """Each of the size! orders; the bounds are eight standard deviations wide."""
    orders = math.factorial(size)
    keys = range(64 * orders)
    found = Counter(tuple(Permutation(size, key_of(key)).forward(np.arange(size)).tolist()) for key in keys)
    assert len(found) == orders
    assert max(abs(n - 64) for n in found.values()) < 64


def test_a_permutation_puts_numbers_anywhere() -> None:
    """Over many keys each number comes to each place about equally often, and neighbours part."""
    size, tries = 20, 2000
    places = np.zeros((size, size), int)
    close = 0
    for key in range(tries):
        order = Permutation(size, key).forward(np.arange(size))
        places[np.arange(size), order] += 1
        close += int((np.diff(order) == 1).sum())
    usual = tries / size
    assert np.abs(places - usual).max() < 6 * usual**0.5
    assert abs(close / tries - (size - 1) / size) < 0.2  # in a random order, one neighbour in twenty follows


def test_keys_and_seeds_make_a_difference() -> None:
    orders = {
        tuple(Permutation(1000, key_of(seed, epoch)).forward(np.arange(9))) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(orders) == 4
    assert len({tuple(shuffled(key, 9)) for key in range(50)}) == 50
    bits = np.unpackbits(chance(0, 0, 10_000).view(np.uint8))
    assert abs(bits.mean() - 0.5) < 0.01


def test_the_numbers_are_the_same_in_every_release() -> None:
    """States that were saved depend on them: they may not change."""
    assert key_of(7, 3) == 3220955328882294624
    assert Permutation(10, 1).forward(np.arange(10)).tolist() == [6, 9, 8, 4, 3, 7, 1, 0, 5, 2]
    assert shuffled(1, 8).tolist() == [4, 3, 7, 0, 1, 5, 6, 2]
    assert Reservoir(4, 12, 1).leaving(0, 12).tolist() == [2, 2, 3, 1, 1, 3, 3, 2, 2, 0, 3, 1]


# -- the reservoir ------------------------------------------------------------------------------------


def slow_reservoir(slots: int, count: int, key: int) -> tuple[list[int], list[list[int]]]:
    """Return the samples in the order in which they leave, and what the buffer held before each."""
    reservoir = Reservoir(slots, count, key)
    drawn = reservoir.leaving(0, count).tolist()
    buffer, out, held = list(range(slots)), [], []
    for time in range(count):
        held.append(list(buffer))
        out.append(buffer[drawn[time]])
        buffer[drawn[time]] = slots + time if time < count - slots else -1
    return out, [*held, buffer]


@settings(deadline=None)
@given(st.data())
def test_a_reservoir_hands_out_each_sample_once_and_knows_what_it_held(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 300))
    slots = data.draw(st.integers(1, count))
    key = data.draw(KEYS)
    out, held = slow_reservoir(slots, count, key)
    assert sorted(out) == list(range(count))
    assert -1 not in out
    reservoir = Reservoir(slots, count, key)
    for time in range(count + 1):
        assert reservoir.held(time).tolist() == held[time], time
    start = data.draw(st.integers(0, count))
    assert reservoir.leaving(start, count).tolist() == reservoir.leaving(0, count)[start:].tolist()


def test_what_was_held_is_found_without_going_back_to_the_beginning() -> None:
    reservoir = Reservoir(1000, 10**12, key=5)
    left = 10**11
    held = reservoir.held(left)
    assert len(set(held.tolist())) == 1000
    assert held.max() < left + 1000
    assert held.min() > left - 1000 * 30  # e**-30 is the chance of a sample to stay so long


@pytest.mark.parametrize("slots", [1, 7, 64])
def test_every_slot_is_drawn_about_equally_often(slots: int) -> None:
    drawn = np.bincount(Reservoir(slots, 64_000 + slots, key=2).leaving(0, 64_000), minlength=slots)
    usual = 64_000 / slots
    assert np.abs(drawn - usual).max() <= 6 * usual**0.5 * (slots > 1)


# -- blocks in order ----------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.data())
def test_a_deck_finds_each_sample(data: st.DataObject) -> None:
    blocks, length = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 9))
    first, step = data.draw(st.integers(0, 50)), data.draw(st.integers(1, 5))
    lengths = [length] * blocks
    for place in data.draw(st.sets(st.sampled_from(sorted({0, blocks - 1})))):
        lengths[place] = data.draw(st.integers(1, length))
    odd = tuple((place, n) for place, n in enumerate(lengths) if n != length)
    permutation = data.draw(st.none() | st.builds(Permutation, st.just(blocks), KEYS))
    numbers: range | np.ndarray = range(first, first + step * blocks, step)
    if data.draw(st.booleans()):
        numbers = np.array(numbers)
    deck = Deck(numbers, length, odd, permutation)
    assert len(deck) == blocks
    assert deck.samples == sum(lengths)
    by_number = dict(zip(numbers, lengths, strict=True))
    slots = list(deck.slots(0, blocks))
    assert [deck.slot(position) for position in range(blocks)] == slots
    assert sorted(slot.number for slot in slots) == sorted(by_number)
    assert [slot.stop - slot.start for slot in slots] == [by_number[slot.number] for slot in slots]
    assert [slot.start for slot in slots] == [0, *[slot.stop for slot in slots[:-1]]]
    owner = [position for position, slot in enumerate(slots) for _ in range(slot.start, slot.stop)]
    assert deck.find(np.arange(deck.samples)).tolist() == owner
    start = data.draw(st.integers(0, blocks))
    stop = data.draw(st.integers(start, blocks))
    assert list(decode_numbers(deck.runs(start, stop))) == [slot.number for slot in slots[start:stop]]


def planned(size: int, first: tuple[int, ...], stretch: tuple[int, int]) -> DeckPlan:
    deck = Deck(range(size), 1, permutation=Permutation(size, 3))
    return DeckPlan(ChunkGrid((size,), (1,)), (slice(0, size),), first=first, deck=deck, stretch=stretch)


def test_a_plan_walks_the_order_it_is_given() -> None:
    plan = planned(100, (7, 2), (10, 90))
    numbers = list(plan)
    assert numbers == list(plan)
    assert numbers[:2] == [7, 2]
    assert len(plan) == len(numbers) == 82
    assert len(set(numbers[2:])) == 80
    assert numbers[2:] != sorted(numbers[2:])
    assert list(pickle.loads(pickle.dumps(plan))) == numbers
    assert plan.variant != planned(100, (7, 2), (10, 91)).variant


def test_a_long_order_takes_no_memory() -> None:
    plan = planned(10**12, (), (0, 10**12))
    tracemalloc.start()
    numbers = decode_numbers(plan.runs())
    assert len({next(numbers) for _ in range(2000)}) == 2000
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
