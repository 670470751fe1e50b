"""Samples in, batches out: what a loader does with arrays, through a shuffle buffer or straight.

Which sample goes where is arithmetic and decided in ``source/shuffle.py``; here the rows are moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.shuffle import Numbers, Reservoir

__all__ = ["Layout", "Mixer", "aligned_empty"]

Array = npt.NDArray[Any]

_ALIGNMENT = 64  # bytes; what JAX asks of memory that it takes over without a copy


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return a new array in C order whose first byte lies at a multiple of 64.

    Examples
    --------
    >>> aligned_empty((3, 2), np.dtype("f4")).ctypes.data % 64
    0
    """
    if dtype.hasobject or dtype.kind == "T":
        return np.empty(shape, dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % _ALIGNMENT
    return raw[first : first + nbytes].view(dtype).reshape(shape)


@dataclass(frozen=True)
class Layout:
    """How an item's arrays hang together, and along which of their axes the samples lie.

    Parameters
    ----------
    names : tuple, int or None
        Keys of a dict of arrays, length of a tuple of arrays, or None for one array.
    axes : tuple of int
        Axis of the samples, for each array.

    Examples
    --------
    >>> layout = Layout.of({"x": np.zeros((2, 3)), "y": np.zeros(2)}, 0)
    >>> layout.names, [rows.shape for rows in layout.rows({"x": np.zeros((4, 3)), "y": np.zeros(4)})]
    (('x', 'y'), [(4, 3), (4,)])
    """

    names: tuple[Any, ...] | int | None
    axes: tuple[int, ...]

    @classmethod
    def of(cls, data: Any, axis: int | Mapping[Any, int]) -> Layout:
        """Describe the data of an item; `axis` by name where it differs from array to array."""
        names = _names(data)
        keys = names if isinstance(names, tuple) else range(1 if names is None else names)
        return cls(names, tuple(axis[key] if isinstance(axis, Mapping) else axis for key in keys))

    def rows(self, data: Any) -> list[Array]:
        """Return an item's arrays with the samples along the first axis, as views.

        Raises
        ------
        UsageError
            If the data hang together in another way, or an array has no such axis.
        """
        names = _names(data)
        if names != self.names:
            raise UsageError(f"the item is {_said(names)}, and the ones before it were {_said(self.names)}")
        if isinstance(names, tuple):
            members: Sequence[Any] = [data[name] for name in names]
        else:
            members = [data] if names is None else data
        arrays = [np.asarray(member) for member in members]
        for array, axis in zip(arrays, self.axes, strict=True):
            if not -array.ndim <= axis < array.ndim:
                raise UsageError(f"samples lie along axis {axis}, and there is an array of shape {array.shape}")
        # Most samples lie along the first axis already, and asking NumPy costs more than looking.
        return [np.moveaxis(array, axis, 0) if axis else array for array, axis in zip(arrays, self.axes, strict=True)]

    def empty(self, count: int, rows: Sequence[Array]) -> list[Array]:
        """Return arrays for `count` samples that are like these rows, with the samples along the first axis.

        They are views: seen with the samples along their own axis, they are new and in C order.
        """
        views = []
        for array, axis in zip(rows, self.axes, strict=True):
            at = axis % array.ndim
            shape = (*array.shape[1 : at + 1], count, *array.shape[at + 1 :])
            views.append(np.moveaxis(aligned_empty(shape, array.dtype), at, 0))
        return views

    def data(self, rows: Sequence[Array]) -> Any:
        """Put arrays together again, each with the samples along its own axis."""
        arrays = [np.moveaxis(array, 0, axis) if axis else array for array, axis in zip(rows, self.axes, strict=True)]
        if isinstance(self.names, tuple):
            return dict(zip(self.names, arrays, strict=True))
        return arrays[0] if self.names is None else tuple(arrays)


def _names(data: Any) -> tuple[Any, ...] | int | None:
    if isinstance(data, Mapping):
        return tuple(data)
    return len(data) if isinstance(data, (tuple, list)) else None


def _said(names: tuple[Any, ...] | int | None) -> str:
    if isinstance(names, tuple):
        return f"a dict of {', '.join(map(repr, names))}"
    return "one array" if names is None else f"a tuple of {names}"


class Mixer:
    """Takes the samples of one epoch as they come, and cuts batches.

    Parameters
    ----------
    count : int
        Samples in all.
    batch_size : int
        Samples of a batch; the last one may have fewer.
    axis : int, or mapping of name to int
        Axis of the samples.
    slots : int
        Samples in the shuffle buffer; 0 hands samples on in the order in which they come.
    key : int
        Which shuffle.
    done : int
        Batches that went out already: the buffer is made what it was after them, from the samples
        in `held`, which have to come once more.

    Examples
    --------
    >>> mixer = Mixer(count=5, batch_size=2, axis=0)
    >>> items = np.array([10, 11, 12]), np.array([13, 14])
    >>> [batch.tolist() for item in items for batch in mixer.add(mixer.rows(item))]
    [[10, 11], [12, 13], [14]]
    """

    def __init__(
        self,
        *,
        count: int,
        batch_size: int,
        axis: int | Mapping[Any, int],
        slots: int = 0,
        key: int = 0,
        done: int = 0,
    ) -> None:
        self._count = count
        self._batch_size = batch_size
        self._axis = axis
        self._reservoir = Reservoir(min(slots, count), count, key) if slots and count else None
        self._left = min(done * batch_size, count)  # samples that left, those in an unfinished batch included
        self._layout: Layout | None = None
        self._buffer: list[Array] = []
        self._batch: list[Array] = []
        self.came = self._left
        self.held: Numbers = np.empty(0, np.int64)
        if self._reservoir is not None and self._left:
            self.came = min(self._reservoir.slots + self._left, count)
            self.held = self._reservoir.held(self._left)
        self._to_put_back = int((self.held >= 0).sum())

    def rows(self, data: Any) -> list[Array]:
        """Return an item's arrays with the samples along the first axis, as views.

        Raises
        ------
        UsageError
            If it does not look like the items before, or its arrays differ in their samples.
        """
        layout = self._layout or Layout.of(data, self._axis)
        rows = layout.rows(data)
        if not rows:
            raise UsageError("there is no array in it")
        if len(rows) > 1 and len({len(array) for array in rows}) > 1:
            raise UsageError(f"its arrays have {', '.join(str(len(array)) for array in rows)} samples")
        if self._layout is None:
            self._layout = layout
            slots = 0 if self._reservoir is None else self._reservoir.slots
            self._buffer = [np.empty((slots, *array.shape[1:]), array.dtype) for array in rows]
        for array, usual in zip(rows, self._buffer, strict=True):
            if array.dtype != usual.dtype or array.shape[1:] != usual.shape[1:]:
                raise UsageError(
                    f"its samples are {array.dtype}{list(array.shape[1:])}, and those before them were "
                    f"{usual.dtype}{list(usual.shape[1:])}"
                )
        return rows

    def add(self, rows: list[Array], first: int | None = None, order: Numbers | None = None) -> Iterator[Any]:
        """Take an item, and yield the batches that are full with it.

        Parameters
        ----------
        rows : list of array
            What `rows` made of the item.
        first : int, optional
            Number of its first sample in the epoch; by default the item goes on where the last one
            ended. Of samples that came before only those are taken that `held` names.
        order : array of int, optional
            Order in which the item's samples are counted; as they lie by default.
        """
        first = self.came if first is None else first
        if self._to_put_back:
            self._put_back(rows, first, order)
        at, stop = max(self.came - first, 0), min(len(rows[0]), self._count - first)
        while at < stop:
            count = min(self._room(), stop - at)
            chosen = slice(at, at + count) if order is None else order[at : at + count]
            self._take([array[chosen] for array in rows], count)
            at += count
            yield from self._full()
        if self.came == self._count and not self._to_put_back:
            while self._left < self._count:
                self._give(self._room())
                yield from self._full()

    def _put_back(self, rows: list[Array], first: int, order: Numbers | None) -> None:
        """Fill the slots of a restored buffer whose samples this item holds."""
        slots = np.flatnonzero((self.held >= max(first, 0)) & (self.held < first + len(rows[0])))
        inside = self.held[slots] - first
        for buffer, array in zip(self._buffer, rows, strict=True):
            buffer[slots] = array[inside if order is None else order[inside]]
        self.held[slots] = -1
        self._to_put_back -= len(slots)

    def _room(self) -> int:
        """Return how many samples may pass before the buffer or a batch is full."""
        if self._reservoir is not None and self.came < self._reservoir.slots:
            return self._reservoir.slots - self.came
        return min(self._batch_size - self._left % self._batch_size, self._count - self._left)

    def _take(self, incoming: list[Array], count: int) -> None:
        """Take samples, as many as there is room for."""
        self.came += count
        if self._reservoir is None:
            for out, array in zip(self._target(count, incoming), incoming, strict=True):
                out[...] = array
        elif self.came > self._reservoir.slots:
            self._exchange(incoming, self._reservoir.leaving(self._left, self._left + count))
        else:
            for buffer, array in zip(self._buffer, incoming, strict=True):
                buffer[self.came - count : self.came] = array

    def _exchange(self, incoming: list[Array], slots: Numbers) -> None:
        """Let each sample that comes take the place of one that leaves."""
        order = np.argsort(slots, kind="stable")
        again = slots[order[1:]] == slots[order[:-1]]
        last = order[np.append(~again, True)]
        targets = self._target(len(slots), self._buffer)
        for buffer, array, out in zip(self._buffer, incoming, targets, strict=True):
            np.take(buffer, slots, axis=0, out=out, mode="clip")
            if len(last) < len(slots):  # where a slot is drawn twice, what leaves the second time has just come
                out[order[1:][again]] = array[order[:-1][again]]
            buffer[slots[last]] = array[last]

    def _give(self, count: int) -> None:
        """Let samples go of which none takes the place."""
        assert self._reservoir is not None
        slots = self._reservoir.leaving(self._left, self._left + count)
        for buffer, out in zip(self._buffer, self._target(count, self._buffer), strict=True):
            np.take(buffer, slots, axis=0, out=out, mode="clip")

    def _target(self, count: int, like: Sequence[Array]) -> list[Array]:
        """Return where in the batch the next samples go; a new batch where there is none."""
        assert self._layout is not None
        if not self._batch:
            self._batch = self._layout.empty(min(self._batch_size, self._count - self._left), like)
        at = self._left % self._batch_size
        self._left += count
        return [array[at : at + count] for array in self._batch]

    def _full(self) -> Iterator[Any]:
        if self._batch and (self._left % self._batch_size == 0 or self._left == self._count):
            assert self._layout is not None
            batch, self._batch = self._batch, []
            yield self._layout.data(batch)
