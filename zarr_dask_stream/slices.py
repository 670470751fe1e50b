"""An array slice by slice along one axis, each stored chunk read once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from zarr_dask_stream.chunks import stream_chunks
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.scalars import as_whole
from zarr_dask_stream.source.blocks import Blocks, axis_number
from zarr_dask_stream.source.selection import ChunkPlan, encode_numbers
from zarr_dask_stream.stream import ChunkStream

__all__ = ["SlicePlan", "stream_slices"]


@dataclass(frozen=True)
class SlicePlan(ChunkPlan):
    """Slices along one axis: boxes of length one there, and as long as the region elsewhere.

    Parameters
    ----------
    axis : int
        The axis.
    step : int
        Every so many elements.
    chunk : int
        Length of the stored chunks along the axis: slices of one chunk are read together.

    Examples
    --------
    >>> from zarr_dask_stream.source.grid import ChunkGrid
    >>> plan = SlicePlan(ChunkGrid((10, 4), (1, 4)), (slice(1, 9), slice(0, 4)), axis=0, step=3, chunk=4)
    >>> len(plan), list(plan.runs())
    (3, [range(1, 2), range(4, 8, 3)])
    """

    axis: int = 0
    step: int = 1
    chunk: int = 1

    @cached_property
    def _size(self) -> int:
        return len(self._places) if self.where is None else sum(len(run) for run in self.runs())

    @property
    def variant(self) -> tuple[Any, ...]:
        """What tells this walk from that of other plans with the same boxes."""
        return "slices", self.axis, self.step

    @property
    def _places(self) -> range:
        along = self.box[self.axis]
        return range(along.start, along.stop if self.box_size else along.start, self.step)

    def runs(self, *, by_shard: bool = False) -> Iterator[range]:  # noqa: ARG002  # slices always run by chunk
        """Walk the slices, those of one row of chunks in one range."""
        places = self._places
        while places:
            chunk_stop = (places.start // self.chunk + 1) * self.chunk
            count = min(len(places), -(-(chunk_stop - places.start) // self.step))
            piece, places = places[:count], places[count:]
            yield from [_tidy(piece)] if self.where is None else self._chosen(piece)

    def _chosen(self, piece: range) -> Iterator[range]:
        yield range(0)
        yield from encode_numbers(n for n in piece if self._wants(n))


def _tidy(piece: range) -> range:
    return range(piece.start, piece[-1] + 1, piece.step if len(piece) > 1 else 1)


def stream_slices(
    array: Any,
    axis: int | str = 0,
    *,
    start: int | None = None,
    stop: int | None = None,
    step: int | None = None,
    **options: Any,
) -> ChunkStream:
    """Stream an array slice by slice along one axis.

    Parameters
    ----------
    array : str, path, zarr.Array, zarr store or mapping
        As for `stream_chunks`.
    axis : int or str
        Number of the axis, or its dimension name.
    start, stop, step : int, optional
        Which slices, as in ``array[start:stop:step]``; `step` is positive.
    **options
        All options of `stream_chunks`. A `region` selects along the other axes; `where` is asked with the
        index of a slice.

    Returns
    -------
    ChunkStream
        One item for each slice, in order. ``.data`` keeps the axis, with length one, as ``.region`` does;
        ``.index`` has the position along the axis, and zero along the others. The slices of one row of
        chunks go to one task, which reads each chunk once, as long as they fit into `max_bytes` together.

    Raises
    ------
    UsageError
        If there is no such axis, the bounds or the step make no sense, or an option does not.

    Examples
    --------
    >>> import numpy as np, zarr
    >>> array = zarr.create_array({}, shape=(6, 2), chunks=(4, 1), dtype="i4")
    >>> array[:] = np.arange(12).reshape(6, 2)
    >>> [(item.index, item.data.tolist()) for item in stream_slices(array, start=1, step=2)]
    [((1, 0), [[2, 3]]), ((3, 0), [[6, 7]]), ((5, 0), [[10, 11]])]
    >>> [item.data for item in stream_slices(array, axis=1).map(lambda item: int(item.data.sum()))]
    [30, 36]
    """
    stream = stream_chunks(array, **options)
    o = stream._options  # noqa: SLF001  # the façade's other half
    spec, box = o.spec, o.plan.box
    if not spec.shape:
        raise UsageError("stream_slices needs an array with axes, and this one has none")
    number = axis_number(axis, spec, "axis")
    length = spec.shape[number]
    if (box[number].start, box[number].stop) != (0, length):
        raise UsageError(f"region= selects along the other axes; along axis {number} say start= and stop=")
    bounds = [None if one is None else _whole(name, one) for name, one in (("start", start), ("stop", stop))]
    stride = 1 if step is None else _whole("step", step)
    if stride < 1:
        raise UsageError(f"step is a positive number of elements, got {step!r}; slices come in order")
    first, last, _ = slice(*bounds).indices(length)
    along = slice(first, max(first, last))
    chunks = [max(n, 1) for n in spec.shape]
    chunks[number] = 1
    blocks = Blocks.of(spec, chunks)
    plan = SlicePlan(
        blocks.grid,
        (*box[:number], along, *box[number + 1 :]),
        o.plan.where,
        labels=o.plan.labels,
        axis=number,
        step=stride,
        chunk=spec.chunks[number],
    )
    return ChunkStream(dataclasses.replace(o, plan=plan, blocks=blocks, together=True))


def _whole(name: str, given: Any) -> int:
    number = as_whole(given)
    if number is None:
        raise UsageError(f"{name} is a whole number or None, got {given!r}")
    return number
