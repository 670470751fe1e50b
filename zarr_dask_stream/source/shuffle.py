"""A seeded shuffle that is arithmetic: what comes at any position can be asked for, without a list.

Three kinds of chance, each a pure function of a key:

- `chance`: 64 random bits for each position (SplitMix64);
- `Permutation`: a permutation of ``0 .. n - 1`` in O(1) memory, with its inverse (a Feistel network that
  walks its cycles);
- `Reservoir`: which of the samples in a buffer leaves at which time.

None of them depends on NumPy's generators, whose numbers may change from release to release: a state
that is saved today means the same samples tomorrow. `Deck` puts blocks of samples in such an order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from zarr_dask_stream.source.selection import ChunkPlan, encode_numbers

__all__ = ["Deck", "DeckPlan", "Permutation", "Reservoir", "Slot", "chance", "key_of", "shuffled"]

Words = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio, made odd
_ROUNDS = 8
_PIECE = 256  # positions that are put in order together
_LOOK_BACK = 4096


def _mix(words: Words) -> Words:
    """Scramble 64-bit words; the finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def key_of(*parts: int) -> int:
    """Make one 64-bit key of several numbers, of which only the lowest 64 bits count.

    Examples
    --------
    >>> key_of(7, 0) == key_of(7, 0), key_of(7, 0) == key_of(0, 7)
    (True, False)
    """
    key = 0
    for part in parts:
        # The same as `_mix`; for one word, Python's integers are quicker than arrays.
        word = (3 * key + part + _GAMMA) & _MASK
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
        key = word ^ (word >> 31)
    return key


def chance(key: int, start: int, stop: int) -> Words:
    """Return 64 random bits for each position from `start` to `stop`.

    Examples
    --------
    >>> bool((chance(1, 0, 9)[3:] == chance(1, 3, 9)).all())
    True
    """
    positions = np.arange(start + 1, stop + 1, dtype=np.uint64)
    return _mix(np.uint64(key) + positions * np.uint64(_GAMMA))


def shuffled(key: int, count: int) -> Numbers:
    """Return ``0 .. count - 1`` in random order, as an array.

    Examples
    --------
    >>> sorted(shuffled(5, 4).tolist())
    [0, 1, 2, 3]
    """
    return np.argsort(chance(key, 0, count), kind="stable")


@dataclass(frozen=True)
class Permutation:
    """A permutation of ``0 .. size - 1``.

    Parameters
    ----------
    size : int
        How many numbers, at least 1.
    key : int
        Which permutation.

    Notes
    -----
    A generalized Feistel network on pairs ``(left, right)`` below ``(a, b)``, where ``a * b`` is the
    least rectangle about as wide as high that holds all numbers (Black and Rogaway, "Ciphers with
    arbitrary finite domains", 2002). What falls outside is sent through again until it is inside.

    Examples
    --------
    >>> order = Permutation(5, key=3)
    >>> there = order.forward(np.arange(5))
    >>> sorted(there.tolist()), order.inverse(there).tolist()
    ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    """

    size: int
    key: int

    @cached_property
    def _sides(self) -> tuple[np.uint64, np.uint64]:
        a = math.isqrt(self.size - 1) + 1
        return np.uint64(a), np.uint64(-(-self.size // a))

    @cached_property
    def _keys(self) -> Words:
        return chance(self.key, 0, _ROUNDS)

    def forward(self, positions: Numbers) -> Numbers:
        """Return the numbers at these positions."""
        return self._walk(positions, backward=False)

    def inverse(self, numbers: Numbers) -> Numbers:
        """Return the positions of these numbers."""
        return self._walk(numbers, backward=True)

    def _walk(self, given: Numbers, *, backward: bool) -> Numbers:
        words = self._through(given.astype(np.uint64), backward=backward)
        while (outside := words >= np.uint64(self.size)).any():
            words[outside] = self._through(words[outside], backward=backward)
        return words.astype(np.int64)

    def _through(self, words: Words, *, backward: bool) -> Words:
        a, b = self._sides
        left, right = words // b, words % b
        for at in range(_ROUNDS)[:: -1 if backward else 1]:
            if at % 2:
                right = _turn(right, left ^ self._keys[at], b, backward=backward)
            else:
                left = _turn(left, right ^ self._keys[at], a, backward=backward)
        return left * b + right


def _turn(side: Words, other: Words, modulus: np.uint64, *, backward: bool) -> Words:
    step = _mix(other) % modulus
    return (side + (modulus - step if backward else step)) % modulus


@dataclass(frozen=True)
class Reservoir:
    """Which sample leaves a shuffle buffer, and when: one reservoir, once filled and at the end emptied.

    The first `slots` samples fill it. From then on each sample that comes takes the place of another
    one, chosen at random, which leaves. When no more come, the rest leaves in random order.

    Parameters
    ----------
    slots : int
        Samples that the buffer holds, at least 1 and below 2**32.
    count : int
        Samples in all, at least `slots`.
    key : int
        Which shuffle.

    Examples
    --------
    >>> reservoir = Reservoir(slots=3, count=8, key=1)
    >>> reservoir.held(0).tolist()
    [0, 1, 2]
    >>> [int((reservoir.held(t) >= 0).sum()) for t in range(9)]
    [3, 3, 3, 3, 3, 3, 2, 1, 0]
    """

    slots: int
    count: int
    key: int

    @property
    def steady(self) -> int:
        """How many samples leave while others come."""
        return self.count - self.slots

    def leaving(self, start: int, stop: int) -> Numbers:
        """Return the slots from which the samples leave that leave as number `start` to `stop`."""
        turn = min(max(self.steady, start), stop)
        early = chance(self.key, start, turn)
        drawn = ((early >> np.uint64(32)) * np.uint64(self.slots)) >> np.uint64(32)
        if turn == stop:
            return drawn.astype(np.int64)
        return np.concatenate([drawn.astype(np.int64), self._end[turn - self.steady : stop - self.steady]])

    @cached_property
    def _end(self) -> Numbers:
        return shuffled(key_of(self.key), self.slots)

    def held(self, left: int) -> Numbers:
        """Return which sample is in which slot once `left` samples have left; -1 where there is none.

        The last sample drawn into a slot is the one in it, so it is enough to look back until each slot
        was drawn: about ``slots * log(slots)`` draws, however far the end of them is from the beginning.
        """
        held = np.full(self.slots, -1, np.int64)
        open_slots = self.slots
        stop = min(left, self.steady)
        piece = max(_LOOK_BACK, self.slots)
        while open_slots and stop:
            start = max(stop - piece, 0)
            slots, first = np.unique(self.leaving(start, stop)[::-1], return_index=True)
            new = held[slots] < 0
            held[slots[new]] = self.slots + stop - 1 - first[new]
            open_slots -= int(np.count_nonzero(new))
            stop = start
        untouched = held < 0
        held[untouched] = np.flatnonzero(untouched)
        held[self._end[: max(left - self.steady, 0)]] = -1
        return held


class Slot(NamedTuple):
    """A block's place in a deck: its number, and which samples of the deck it holds."""

    number: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Deck:
    """Blocks of samples in the order in which they are read; all but a few are of one length.

    Parameters
    ----------
    numbers : range or array of int
        Numbers of the blocks.
    length : int
        Samples of a block.
    odd : tuple of (int, int)
        Blocks of another length: place in `numbers`, and samples.
    permutation : Permutation, optional
        Of the places in `numbers`; none: as they stand.

    Examples
    --------
    >>> deck = Deck(range(4), 10, odd=((3, 5),))
    >>> deck.samples, deck.find(np.array([0, 9, 34])).tolist()
    (35, [0, 0, 3])
    >>> deck.slot(3)
    Slot(number=3, start=30, stop=35)
    """

    numbers: range | Numbers
    length: int
    odd: tuple[tuple[int, int], ...] = ()
    permutation: Permutation | None = None
    _shifts: tuple[tuple[int, int], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        places = np.array([place for place, _ in self.odd], np.int64)
        at = places if self.permutation is None else self.permutation.inverse(places)
        shifts = [(position, self.length - n) for position, (_, n) in zip(at.tolist(), self.odd, strict=True)]
        object.__setattr__(self, "_shifts", tuple(shifts))

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def samples(self) -> int:
        """Samples in all."""
        return self.start(len(self))

    def start(self, position: int) -> int:
        """Return how many samples come before the block at `position`."""
        return position * self.length - sum(short for at, short in self._shifts if at < position)

    def find(self, samples: Numbers) -> Numbers:
        """Return the positions of the blocks that hold these samples."""
        positions = samples // self.length
        # Short blocks before it can only push a sample on, by one block for each of them.
        for _ in self._shifts:
            after = (positions + 1) * self.length
            for at, short in self._shifts:
                after -= short * (at <= positions)
            positions += after <= samples
        return positions

    def places(self, start: int, stop: int) -> Numbers:
        """Return the places in `numbers` of the blocks at these positions."""
        positions = np.arange(start, stop, dtype=np.int64)
        return positions if self.permutation is None else self.permutation.forward(positions)

    def slot(self, position: int) -> Slot:
        """Return what lies at `position`."""
        place = int(self.places(position, position + 1)[0])
        return Slot(int(self.numbers[place]), self.start(position), self.start(position + 1))

    def slots(self, start: int, stop: int) -> Iterator[Slot]:
        """Walk what lies at these positions."""
        for at in range(start, stop, _PIECE):
            places = self.places(at, min(at + _PIECE, stop)).tolist()
            for position, place in enumerate(places, at):
                yield Slot(int(self.numbers[place]), self.start(position), self.start(position + 1))

    def runs(self, start: int, stop: int) -> Iterator[range]:
        """Walk the numbers of the blocks at these positions, as ranges."""
        if self.permutation is None and isinstance(self.numbers, range):
            yield self.numbers[start:stop]
            return
        for at in range(start, stop, _PIECE):
            places = self.places(at, min(at + _PIECE, stop))
            chosen = (self.numbers[place] for place in places.tolist())
            yield from encode_numbers(int(number) for number in chosen)


@dataclass(frozen=True, kw_only=True)
class DeckPlan(ChunkPlan):
    """Some blocks by number, then a stretch of a deck, in that order.

    Parameters
    ----------
    first : tuple of int
        Numbers.
    deck : Deck
        The blocks.
    stretch : tuple of (int, int)
        Positions in it, from and to.

    Examples
    --------
    >>> from zarr_dask_stream.source.grid import ChunkGrid
    >>> plan = DeckPlan(
    ...     ChunkGrid((10,), (1,)), (slice(0, 10),), first=(7, 2), deck=Deck(range(10), 1), stretch=(4, 6)
    ... )
    >>> list(plan), len(plan)
    ([7, 2, 4, 5], 4)
    """

    first: tuple[int, ...]
    deck: Deck
    stretch: tuple[int, int]

    @cached_property
    def _size(self) -> int:
        return len(self.first) + self.stretch[1] - self.stretch[0]

    @property
    def variant(self) -> tuple[Any, ...]:
        """What tells this walk from that of other plans with the same chunks."""
        permutation = self.deck.permutation
        return "deck", self.first, self.stretch, None if permutation is None else permutation.key

    def runs(self, *, by_shard: bool = False) -> Iterator[range]:  # noqa: ARG002  # the order is the deck's
        """Walk the numbers in the order of the deck."""
        yield from encode_numbers(self.first)
        yield from self.deck.runs(*self.stretch)
