"""The chunk grid: linear number <-> grid index <-> region. Arithmetic, nothing else.

Chunks are numbered in C order (the last axis runs fastest). A 0-d array has one chunk, numbered 0;
an array with an axis of length zero has none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from zarr_dask_stream.errors import UsageError

__all__ = ["ChunkGrid", "Index", "Region"]

Index = tuple[int, ...]
Region = tuple[slice, ...]


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class ChunkGrid:
    """A regular grid of chunks over an array.

    Parameters
    ----------
    shape : tuple of int
        Array shape, elements.
    chunks : tuple of int
        Shape of one chunk, elements: the unit that is decoded.
    shards : tuple of int, optional
        Shape of one stored object where several chunks share one, elements; a multiple of `chunks`.
    origin : tuple of int, optional
        Where the first chunk begins, elements; at the array's beginning unless it is said.

    Raises
    ------
    UsageError
        If the ranks differ, a chunk length is not positive, or a shard is not whole chunks.

    Examples
    --------
    >>> grid = ChunkGrid((5, 7), (2, 3))
    >>> grid.grid_shape, len(grid)
    ((3, 3), 9)
    >>> grid.index(5), grid.number((1, 2))
    ((1, 2), 5)
    >>> grid.region(5)
    (slice(2, 4, None), slice(6, 7, None))
    >>> ChunkGrid((5,), (2,), origin=(1,)).region(1)
    (slice(3, 5, None),)
    """

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    shards: tuple[int, ...] | None = None
    origin: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.chunks):
            raise UsageError(f"shape {self.shape} and chunks {self.chunks} must have the same number of axes")
        if any(c < 1 for c in self.chunks) or any(n < 0 for n in self.shape):
            raise UsageError(
                f"chunk lengths must be positive and axis lengths not negative, "
                f"got shape {self.shape} with chunks {self.chunks}"
            )
        if self.shards is not None and (
            len(self.shards) != len(self.chunks)
            or any(s < 1 or s % c for s, c in zip(self.shards, self.chunks, strict=True))
        ):
            raise UsageError(f"shards {self.shards} must be whole multiples of chunks {self.chunks}")

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @cached_property
    def grid_shape(self) -> tuple[int, ...]:
        """Number of chunks along each axis."""
        return tuple(_ceil_div(n - o, c) for n, c, o in zip(self.shape, self.chunks, self.begin, strict=True))

    @cached_property
    def begin(self) -> Index:
        """Where the first chunk begins along each axis."""
        return self.origin or (0,) * self.ndim

    @cached_property
    def _size(self) -> int:
        return math.prod(self.grid_shape)

    def __len__(self) -> int:
        return self._size

    @cached_property
    def _strides(self) -> tuple[int, ...]:
        strides = [1] * self.ndim
        for axis in range(self.ndim - 2, -1, -1):
            strides[axis] = strides[axis + 1] * self.grid_shape[axis + 1]
        return tuple(strides)

    def index(self, number: int) -> Index:
        """Grid index of chunk `number`; raises IndexError outside the grid."""
        if not 0 <= number < self._size:
            raise IndexError(f"chunk number {number} is outside a grid of {self._size} chunks")
        index = []
        for stride in self._strides:
            position, number = divmod(number, stride)
            index.append(position)
        return tuple(index)

    def number(self, index: Sequence[int]) -> int:
        """Linear number of the chunk at grid `index`; raises IndexError outside the grid."""
        if len(index) != self.ndim or any(not 0 <= i < n for i, n in zip(index, self.grid_shape, strict=True)):
            raise IndexError(f"chunk index {tuple(index)} is outside the grid {self.grid_shape}")
        return sum(i * s for i, s in zip(index, self._strides, strict=True))

    def region(self, number: int) -> Region:
        """Region of chunk `number` in array coordinates, cropped to the array."""
        return self.region_of(self.index(number))

    def region_of(self, index: Sequence[int]) -> Region:
        """Region of the chunk at grid `index` in array coordinates, cropped to the array."""
        places = zip(index, self.chunks, self.shape, self.begin, strict=True)
        return tuple(slice(o + i * c, min(o + (i + 1) * c, n)) for i, c, n, o in places)

    # -- shards -------------------------------------------------------------------------------

    @cached_property
    def shard_grid(self) -> ChunkGrid:
        """The grid of stored objects: the grid itself where nothing is sharded."""
        return ChunkGrid(self.shape, self.shards or self.chunks)

    @cached_property
    def chunks_per_shard(self) -> tuple[int, ...]:
        """Chunks of a shard along each axis (ones where nothing is sharded)."""
        shards = self.shards or self.chunks
        return tuple(s // c for s, c in zip(shards, self.chunks, strict=True))

    def shard_of(self, number: int) -> tuple[int, Index]:
        """Find the stored object that holds chunk `number`, and its index inside it."""
        index = self.index(number)
        per = self.chunks_per_shard
        shard = self.shard_grid.number([i // p for i, p in zip(index, per, strict=True)])
        return shard, tuple(i % p for i, p in zip(index, per, strict=True))

    def rows(self, start: Sequence[int], stop: Sequence[int]) -> Iterator[range]:
        """Numbers of a box of the grid, in C order, as the fewest ranges that run on.

        Parameters
        ----------
        start, stop : sequence of int
            First grid index of the box and the one past its last, along each axis.

        Examples
        --------
        >>> list(ChunkGrid((4, 6), (1, 1)).rows((1, 2), (3, 4)))
        [range(8, 10), range(14, 16)]
        >>> list(ChunkGrid((4, 6), (1, 1)).rows((1, 0), (3, 6)))
        [range(6, 18)]
        """
        if any(b <= a for a, b in zip(start, stop, strict=True)):
            return
        # Axes from the right that the box covers whole run on without a gap.
        split = self.ndim
        while split and start[split - 1] == 0 and stop[split - 1] == self.grid_shape[split - 1]:
            split -= 1
        split = max(split - 1, 0)
        if not self.ndim:
            yield range(1)
            return
        length = (stop[split] - start[split]) * self._strides[split]
        for outer in _walk(start[:split], stop[:split]):
            first = sum(i * s for i, s in zip(outer, self._strides[:split], strict=True))
            first += sum(i * s for i, s in zip(start[split:], self._strides[split:], strict=True))
            yield range(first, first + length)


def _walk(start: Sequence[int], stop: Sequence[int]) -> Iterator[Index]:
    """Every index of a box in C order, one at a time (itertools.product would hold each axis)."""
    if not start:
        yield ()
        return
    for head in range(start[0], stop[0]):
        for tail in _walk(start[1:], stop[1:]):
            yield (head, *tail)
