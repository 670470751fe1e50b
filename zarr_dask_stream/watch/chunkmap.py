"""The chunk grid as a picture of a few thousand cells: a pure fold of a run's notices.

A cell stands for one chunk, or for a block of neighbours where the grid is larger than the picture. Nothing is kept
for each chunk, so memory is bounded whatever the grid; only chunks that failed or came as fill values, and have not
ended yet, are known by number, and those hold credit. Notices are set aside as they come and counted together, a few
thousand chunks at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from zarr_dask_stream.engine.events import (
    BatchFinished,
    BatchSubmitted,
    Callback,
    ChunkDeadLettered,
    ChunkRetried,
    ChunksCancelled,
    ChunksEmitted,
    ChunksFiltered,
    ChunksSkipped,
    RunFinished,
    RunStarted,
)
from zarr_dask_stream.errors import UsageError

__all__ = ["COLOURS", "GROUNDS", "OUTSIDE", "STATES", "ChunkMap", "Layout", "Picture", "lay_out"]

STATES = ("planned", "in flight", "retried", "done", "filtered", "missing", "dead", "cancelled")
"""What a chunk can be, by the code that stands for it in `ChunkMap.states`.

Missing are chunks that are not stored, whether they were left out or came as fill values.
"""

OUTSIDE = len(STATES)
"""The code of a cell that holds no chunk of this run."""

GROUNDS = {"light": "#ffffff", "dark": "#14171c"}
"""The grounds that the colours are made for."""

# At least 3:1 against their ground; told apart under the common kinds of colour blindness, as the tests compute.
COLOURS: dict[str, dict[str, str]] = {
    "light": {
        "planned": "#888e97",
        "in flight": "#c46a00",
        "retried": "#a51d79",
        "done": "#0b56a8",
        "filtered": "#2c8461",
        "missing": "#738bd4",
        "dead": "#7a0012",
        "cancelled": "#33373d",
    },
    "dark": {
        "planned": "#6f7682",
        "in flight": "#ffb83d",
        "retried": "#ff74c4",
        "done": "#4195ff",
        "filtered": "#46c88e",
        "missing": "#4260e3",
        "dead": "#ff4a4a",
        "cancelled": "#e6e9ee",
    },
}

_PLANNED, _IN_FLIGHT, _RETRIED, _DONE, _FILTERED, _MISSING, _DEAD, _CANCELLED = range(len(STATES))
# What a person must see of a cell that holds several: trouble first, then what moves, then what is.
_SEEN = (_DEAD, _RETRIED, _IN_FLIGHT, _DONE, _FILTERED, _MISSING, _CANCELLED, _PLANNED)
_RETRIES, _NOWHERE = len(STATES), len(STATES) + 1  # counted beside the states; where moves come from or end unseen
_HELD = 4096  # chunks set aside before they are counted
_LONGEST_SIDE = 8  # a plane that is longer than so many times its width is drawn as a line that wraps
_ROUND = (10, 12, 16, 20, 24, 25, 32, 40, 50, 60, 64, 80, 100, 120, 128, 150, 160, 200, 250, 256, 300, 320, 400, 500)

_Ints = npt.NDArray[np.int64]
_Numbers = tuple[int, ...] | tuple[range, ...] | _Ints


@dataclass(frozen=True)
class Layout:
    """How a grid of chunks is laid out as cells.

    Attributes
    ----------
    grid_shape : tuple of int
        Chunks along each axis.
    kind : {"plane", "line", "point", "empty"}
        Two axes as rows and columns; one axis that wraps from row to row; one cell; none.
    axes : tuple of int
        The axes that are drawn: two, one or none. All others are merged into each cell.
    merge : tuple of int
        How many neighbours along each of `axes` make one cell.
    shape : (int, int)
        Rows and columns of cells.
    """

    grid_shape: tuple[int, ...]
    kind: Literal["plane", "line", "point", "empty"]
    axes: tuple[int, ...]
    merge: tuple[int, ...]
    shape: tuple[int, int]

    def cell_of(self, numbers: npt.ArrayLike) -> _Ints:
        """Return the cell of each linear chunk number, counted row by row.

        Parameters
        ----------
        numbers : array of int
            Linear numbers in C order, each within the grid.

        Returns
        -------
        array of int64
            Of the same shape: ``row * columns + column``.

        Examples
        --------
        >>> lay_out((4, 6), cells=6).cell_of([0, 5, 23])
        array([0, 2, 5])
        """
        held = np.asarray(numbers, np.int64)
        if not self.axes:
            return np.zeros_like(held)
        along = [self._along(held, axis, merge) for axis, merge in zip(self.axes, self.merge, strict=True)]
        return along[0] if len(along) == 1 else along[0] * self.shape[1] + along[1]

    def _along(self, numbers: _Ints, axis: int, merge: int) -> _Ints:
        # One division by the product of stride and merge does for the first axis, where nothing wraps round.
        stride = math.prod(self.grid_shape[axis + 1 :])
        if axis == 0 or math.prod(self.grid_shape[:axis]) == 1:
            return numbers // (stride * merge)
        places = (numbers // stride if stride > 1 else numbers) % self.grid_shape[axis]
        return places // merge if merge > 1 else places

    def sizes(self, start: Sequence[int], stop: Sequence[int]) -> _Ints:
        """Count the chunks of a box of the grid that lie in each cell; arithmetic, whatever the box holds.

        Parameters
        ----------
        start, stop : sequence of int
            First grid index of the box and the one past its last, along each axis.

        Returns
        -------
        array of int64, shape ``shape``
        """
        rows, columns = self.shape
        if self.kind == "empty":
            return np.zeros(self.shape, np.int64)
        rest = math.prod(max(b - a, 0) for axis, (a, b) in enumerate(zip(start, stop, strict=True))
                         if axis not in self.axes)  # fmt: skip
        if self.kind == "point":
            return np.full(self.shape, rest, np.int64)
        if self.kind == "line":
            along = _overlap(rows * columns, self.merge[0], start[self.axes[0]], stop[self.axes[0]])
            return along.reshape(self.shape) * rest
        down, across = (
            _overlap(count, merge, start[axis], stop[axis])
            for count, merge, axis in zip(self.shape, self.merge, self.axes, strict=True)
        )
        return np.multiply.outer(down, across) * rest

    def bounds(self, row: int, column: int) -> tuple[tuple[int, int], ...]:
        """Return the first grid index of a cell and the one past its last, along each axis."""
        cell = (row * self.shape[1] + column,) if self.kind == "line" else (row, column)
        found = [(0, n) for n in self.grid_shape]
        for axis, merge, place in zip(self.axes, self.merge, cell, strict=False):
            length = self.grid_shape[axis]
            found[axis] = (min(place * merge, length), min((place + 1) * merge, length))
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Return the layout as plain data for JSON."""
        return {
            "grid_shape": list(self.grid_shape),
            "kind": self.kind,
            "axes": list(self.axes),
            "merge": list(self.merge),
            "shape": list(self.shape),
        }


def _overlap(count: int, merge: int, start: int, stop: int) -> _Ints:
    """Count the places from `start` to `stop` in each of `count` groups of `merge` neighbours."""
    edges = np.arange(count + 1, dtype=np.int64) * merge
    inside = np.clip(edges, start, max(start, stop))
    return np.asarray(np.diff(inside), np.int64)


def lay_out(grid_shape: Sequence[int], *, cells: int = 4096, axes: Sequence[int] | None = None) -> Layout:
    """Lay a grid of any rank out as at most so many cells.

    Parameters
    ----------
    grid_shape : sequence of int
        Chunks along each axis.
    cells : int
        Most cells.
    axes : (int, int) or (int,), optional
        The axes for rows and columns, or the one axis to draw as a line that wraps. Default: the two longest, in
        their order; where one is much longer than all others together, that one alone.

    Returns
    -------
    Layout

    Raises
    ------
    UsageError
        If `cells` is not positive, or `axes` are not one or two different axes of the grid.

    Examples
    --------
    >>> lay_out((12, 30, 40)).shape, lay_out((12, 30, 40), axes=(0, 1)).shape
    ((30, 40), (12, 30))
    >>> lay_out((1000, 1000), cells=4096).merge
    (16, 16)
    >>> lay_out((100,)).shape
    (5, 20)
    """
    shape = tuple(int(n) for n in grid_shape)
    _checked_cells(cells)
    if math.prod(shape) == 0:
        return Layout(shape, "empty", (), (), (0, 0))
    drawn = _default_axes(shape) if axes is None else _checked_axes(axes, len(shape))
    if not drawn:
        return Layout(shape, "point", (), (), (1, 1))
    if len(drawn) == 1:
        length = shape[drawn[0]]
        merge = -(-length // cells)
        count = -(-length // merge)
        columns = _columns(count, cells)
        return Layout(shape, "line", drawn, (merge,), (-(-count // columns), columns))
    down, across = shape[drawn[0]], shape[drawn[1]]
    rows = down
    if down * across > cells:
        rows = min(max(int(down * math.sqrt(cells / (down * across))), cells // across, 1), down, cells)
    row_merge = -(-down // rows)
    rows = -(-down // row_merge)
    column_merge = -(-across // max(cells // rows, 1))
    return Layout(shape, "plane", drawn, (row_merge, column_merge), (rows, -(-across // column_merge)))


def _checked_cells(cells: Any) -> int:
    if isinstance(cells, bool) or not isinstance(cells, int) or cells < 1:
        raise UsageError(f"a chunk map has at least one cell, got cells={cells!r}")
    return cells


def _default_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    longest = sorted(range(len(shape)), key=lambda axis: (-shape[axis], axis))[:2]
    long = [axis for axis in longest if shape[axis] > 1]
    if len(long) == 2 and shape[long[0]] > _LONGEST_SIDE * shape[long[1]] and shape[long[0]] > 16:
        long = long[:1]
    return tuple(sorted(long))


def _checked_axes(axes: Sequence[int], ndim: int) -> tuple[int, ...]:
    try:
        chosen = tuple(range(ndim)[axis] for axis in axes)
    except (IndexError, TypeError):
        chosen = ()
    if not 1 <= len(chosen) <= 2 or len(set(chosen)) < len(chosen):
        raise UsageError(f"axes of a chunk map are one or two different axes of a grid of rank {ndim}, got {axes!r}")
    return chosen


def _columns(count: int, cells: int) -> int:
    """Return how many cells of a line make a row: a round number, so that the picture is wider than high."""
    if count <= 16:
        return count
    wanted = math.sqrt(4 * count)
    fitting = [n for n in _ROUND if n >= wanted and -(-count // n) * n <= max(cells, count)]
    return fitting[0] if fitting else math.ceil(wanted)


class ChunkMap(Callback):
    """What has become of the chunks of a run, as a picture of a few thousand cells.

    Parameters
    ----------
    cells : int
        Most cells of the picture.
    axes : (int, int) or (int,), optional
        The axes of the grid for rows and columns, or one that wraps. Default: see `lay_out`.

    Raises
    ------
    UsageError
        If `cells` or `axes` make no picture of the grid.

    Notes
    -----
    About 0.3 us a chunk, where chunks come in batches. Another thread may read at any time: counts are replaced, never
    changed in place.

    Chunks that a listing of the store shows to be absent, and those that a `where` leaves out, are not known by
    number while the run goes on: they look planned until it ends.

    Examples
    --------
    >>> from zarr_dask_stream.engine.events import Batch
    >>> chunkmap = ChunkMap()
    >>> chunkmap.handle(RunStarted(0.0, 6, 8, (2, 3), "memory://"))
    >>> chunkmap.handle(BatchSubmitted(0.1, Batch(1, (range(0, 4),), 4, 32, fresh=True), 4, 32))
    >>> chunkmap.handle(ChunksEmitted(0.2, (0, 1, 2)))
    >>> [[STATES[state] for state in row] for row in chunkmap.states()]
    [['done', 'done', 'done'], ['in flight', 'planned', 'planned']]
    >>> chunkmap.label(1, 0)
    'chunk (1, 0): in flight'
    """

    def __init__(self, *, cells: int = 4096, axes: Sequence[int] | None = None) -> None:
        self._cells = _checked_cells(cells)
        self._axes = axes
        self._size = 0
        self._absent = 0  # chunks known to be missing, their numbers not
        self._left = 0  # chunks known to be called back, their numbers not
        self._again: set[int] = set()
        self._filled: set[int] = set()
        self._held = 0
        # Replaced as a whole: who reads takes it once, and has counts and what is still to be counted.
        self._state = _Counted.of(lay_out((0,)))

    # -- the fold -----------------------------------------------------------------------------------

    def on_run_started(self, notice: RunStarted) -> None:
        """Learn the grid."""
        shape = tuple(notice.grid_shape)
        self._size = math.prod(shape)
        self._absent = self._left = self._held = 0
        self._again, self._filled = set(), set()
        state = _Counted.of(lay_out(shape, cells=self._cells, axes=self._axes))
        state.counts[_PLANNED] = state.layout.sizes(
            notice.box_start or (0,) * len(shape), notice.box_stop or shape
        ).ravel()
        self._state = state

    def resume(self, numbers: npt.ArrayLike) -> None:
        """Take chunks as done that earlier runs have done.

        Parameters
        ----------
        numbers : array of int
            Linear chunk numbers.
        """
        self._move(_PLANNED, _DONE, np.asarray(numbers, np.int64).ravel())

    def on_batch_submitted(self, notice: BatchSubmitted) -> None:
        """Move chunks that go out for the first time."""
        if notice.batch.fresh:
            self._move(_PLANNED, _IN_FLIGHT, notice.batch.ranges, notice.batch.count)

    def on_batch_finished(self, notice: BatchFinished) -> None:
        """Remember which chunks came as fill values, until they are handed out."""
        self._filled.update(notice.filled)

    def on_chunks_emitted(self, notice: ChunksEmitted) -> None:
        """Move chunks."""
        numbers = notice.numbers
        if self._filled:
            filled = self._filled.intersection(numbers)
            if filled:
                self._filled -= filled
                self._settle(tuple(filled), _MISSING)
                numbers = tuple(number for number in numbers if number not in filled)
        self._settle(numbers, _DONE)

    def on_chunks_filtered(self, notice: ChunksFiltered) -> None:
        """Move chunks."""
        self._filled.difference_update(notice.numbers)
        self._settle(notice.numbers, _FILTERED)

    def on_chunks_skipped(self, notice: ChunksSkipped) -> None:
        """Move chunks; remember how many there are of which only the count is known."""
        known = sum(len(run) for run in notice.numbers)
        if known:
            self._settle(tuple(chain.from_iterable(notice.numbers)), _MISSING)
        self._absent += notice.count - known

    def on_chunk_dead_lettered(self, notice: ChunkDeadLettered) -> None:
        """Move a chunk."""
        self._settle((notice.number,), _DEAD)

    def on_chunk_retried(self, notice: ChunkRetried) -> None:
        """Count, and move a chunk that failed for the first time."""
        number = notice.failure.number
        if number not in self._again:
            self._again.add(number)
            self._move(_IN_FLIGHT, _RETRIED, (number,))
        self._move(_NOWHERE, _RETRIES, (number,))

    def on_chunks_cancelled(self, notice: ChunksCancelled) -> None:
        """Remember how many; which they are is known at the end."""
        self._left += notice.count

    def on_run_finished(self, notice: RunFinished) -> None:
        """Say of what is left over what it was: called back, missing, or never planned."""
        state = self._state.counted()
        counts = state.counts
        out = counts[_IN_FLIGHT] + counts[_RETRIED]
        counts[_CANCELLED] += out
        counts[_IN_FLIGHT] = counts[_RETRIED] = 0
        called_back = max(self._left - int(out.sum()), 0)
        # Only how many of each there are is known: what most of them were stands for all.
        left = int(counts[_PLANNED].sum())
        unplanned = left - self._absent - called_back if notice.outcome == "done" else 0
        kinds = ((unplanned, _NOWHERE), (self._absent, _MISSING), (called_back, _CANCELLED))
        most = max(kinds, key=lambda kind: kind[0])
        counts[most[1] if most[0] > 0 else _CANCELLED] += counts[_PLANNED]
        counts[_PLANNED] = 0
        self._again, self._filled = set(), set()
        self._held = 0
        self._state = state

    def _settle(self, numbers: tuple[int, ...], to: int) -> None:
        if self._again:
            again = self._again.intersection(numbers)
            if again:
                self._again -= again
                self._move(_RETRIED, to, tuple(again))
                numbers = tuple(number for number in numbers if number not in again)
        if numbers:
            self._move(_IN_FLIGHT, to, numbers)

    def _move(self, was: int, to: int, numbers: _Numbers, count: int | None = None) -> None:
        state = self._state
        state.held.append((was, to, numbers))
        self._held += len(numbers) if count is None else count
        if self._held >= _HELD or len(state.held) >= _HELD:
            self._state = state.counted()
            self._held = 0

    # -- what it shows --------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        """How chunks are laid out as cells; empty until the run has begun."""
        return self._state.layout

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of cells."""
        return self._state.layout.shape

    def cell_of(self, numbers: npt.ArrayLike) -> _Ints:
        """Return the cell of each linear chunk number: ``row * columns + column``."""
        return self._state.layout.cell_of(numbers)

    @property
    def counts(self) -> _Ints:
        """Chunks by cell and state, shape ``(rows, columns, len(STATES))``."""
        return self.picture().counts

    def states(self) -> npt.NDArray[np.uint8]:
        """Return what a person must see of each cell, shape ``(rows, columns)``.

        Codes are positions in `STATES`, `OUTSIDE` where a cell holds no chunk of the run. Of a cell that holds
        several: dead before retried, in flight, done, filtered, missing, cancelled, planned.
        """
        return self.picture().states

    def done_share(self) -> npt.NDArray[np.float32]:
        """Return the share of each cell's chunks that have reached an end other than cancellation."""
        return self.picture().done_share

    def totals(self) -> dict[str, int]:
        """Return how many chunks are in each state."""
        return self.picture().totals

    def label(self, row: int, column: int) -> str:
        """Return one line for a person about a cell: which chunks, and what has become of them."""
        return self.picture().label(row, column)

    def picture(self) -> Picture:
        """Return all of this at one moment, to be read as often as one likes."""
        state = self._state.counted()
        by_cell = state.counts.reshape(len(state.counts), *state.layout.shape)
        return Picture(state.layout, np.moveaxis(by_cell[: len(STATES)], 0, -1), by_cell[_RETRIES])


@dataclass(frozen=True)
class Picture:
    """A chunk map at one moment.

    Attributes
    ----------
    layout : Layout
        How chunks are laid out as cells.
    counts : array of int64, shape (rows, columns, len(STATES))
        Chunks by cell and state.
    retries : array of int64, shape (rows, columns)
        Tries beyond a chunk's first, by cell.
    """

    layout: Layout
    counts: _Ints
    retries: _Ints

    @cached_property
    def states(self) -> npt.NDArray[np.uint8]:
        """What a person must see of each cell; see `ChunkMap.states`."""
        found = np.full(self.layout.shape, OUTSIDE, np.uint8)
        for state in reversed(_SEEN):
            found[self.counts[..., state] > 0] = state
        return found

    @cached_property
    def done_share(self) -> npt.NDArray[np.float32]:
        """Share of each cell's chunks that have reached an end other than cancellation."""
        ended = self.counts[..., (_DONE, _FILTERED, _MISSING, _DEAD)].sum(axis=-1)
        share: npt.NDArray[np.float32] = (ended / np.maximum(self.counts.sum(axis=-1), 1)).astype(np.float32)
        return share

    @cached_property
    def totals(self) -> dict[str, int]:
        """Chunks in each state."""
        return dict(zip(STATES, self.counts.sum(axis=(0, 1)).tolist(), strict=True))

    def place(self, row: int, column: int) -> str:
        """Return which grid indices a cell holds, such as "(3, 0..7)"."""
        places = [str(a) if b - a == 1 else f"{a}..{b - 1}" for a, b in self.layout.bounds(row, column)]
        return f"({', '.join(places)}{',' if len(places) == 1 else ''})"

    def label(self, row: int, column: int) -> str:
        """Return one line for a person about a cell: which chunks, and what has become of them."""
        which = self.place(row, column)
        found = self.counts[row, column]
        held = int(found.sum())
        if not held:
            return f"{which}: not part of this run"
        if held == 1 and ".." not in which:
            text = f"chunk {which}: {STATES[int(found.argmax())]}"
        else:
            several = sorted(np.flatnonzero(found).tolist(), key=lambda state: -int(found[state]))
            text = f"chunks {which}: " + ", ".join(f"{found[state]:,} {STATES[state]}" for state in several)
        retries = int(self.retries[row, column])
        return text + (f", {retries:,} {'retry' if retries == 1 else 'retries'}" if retries else "")


@dataclass(frozen=True)
class _Counted:
    """Counts by state and cell, and moves that are not counted yet. Only `held` is ever added to."""

    layout: Layout
    counts: _Ints
    held: list[tuple[int, int, _Numbers]]

    @classmethod
    def of(cls, layout: Layout) -> _Counted:
        return cls(layout, np.zeros((_NOWHERE + 1, math.prod(layout.shape)), np.int64), [])

    def counted(self) -> _Counted:
        """Return the same with every move counted."""
        counts = self.counts.copy()
        size, cells = math.prod(self.layout.grid_shape), counts.shape[1]
        moves: dict[tuple[int, int], list[_Numbers]] = {}
        for was, to, numbers in self.held[:]:
            moves.setdefault((was, to), []).append(numbers)
        for (was, to), parts in moves.items():
            numbers = _numbers_of(parts)
            if numbers.size and numbers.max() >= size:
                numbers = numbers[numbers < size]  # what is not in the grid is not in the picture
            if cells:
                found = np.bincount(self.layout.cell_of(numbers), minlength=cells)
                counts[to] += found
                counts[was] -= found
        np.maximum(counts[:_NOWHERE], 0, out=counts[:_NOWHERE])
        return _Counted(self.layout, counts, [])


def _numbers_of(parts: list[_Numbers]) -> _Ints:
    """Join numbers that came as tuples of int, as tuples of range, or as arrays."""
    singles: list[Iterable[int]] = []
    arrays: list[_Ints] = []
    for part in parts:
        if isinstance(part, np.ndarray):
            arrays.append(part)
        elif part and isinstance(part[0], range):
            for run in part:
                assert isinstance(run, range)
                if len(run) < 16:
                    singles.append(run)
                else:
                    arrays.append(np.arange(run.start, run.stop, run.step, dtype=np.int64))
        else:
            singles.append(part)  # type: ignore[arg-type]  # all int, as the first one is
    if singles:
        arrays.append(np.fromiter(chain.from_iterable(singles), np.int64))
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
