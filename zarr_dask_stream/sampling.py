"""Streams of whole samples: recut so that no sample lies in two items, alone or several arrays side by side.

A sample is everything at one place along an axis. Where chunks are cut along other axes too, items
become boxes that are as long as the array there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.opened import Decoder
from zarr_dask_stream.options import Options
from zarr_dask_stream.scalars import as_whole
from zarr_dask_stream.source.array import ArraySpec
from zarr_dask_stream.source.blocks import Blocks, Member, axis_number
from zarr_dask_stream.source.grid import ChunkGrid
from zarr_dask_stream.source.selection import ChunkPlan
from zarr_dask_stream.source.shuffle import Deck, DeckPlan, Numbers, Permutation
from zarr_dask_stream.stages.transform import Decode, Filter
from zarr_dask_stream.stream import ChunkStream

__all__ = ["Samples"]

_LARGE = 2**26  # bytes of an item beyond which it does not grow, to read a shard or a second array in one go


@dataclass(frozen=True, eq=False)
class Samples:
    """A stream whose items lie one behind the other along one axis, and hold whole samples.

    Parameters
    ----------
    options : Options
        The stream.
    axis : int
        Axis of the items' grid along which the samples lie.
    axes : int or dict of str to int
        The same in an item's data; by name where they are a dict of arrays.
    names : tuple, int or None
        How the caller named arrays that were put side by side: keys of a dict, or the length of a tuple.
    numbers : range or array of int
        Numbers of the items, in the order of the samples.
    length : int
        Samples of an item.
    odd : tuple of (int, int)
        Items with fewer: place in `numbers`, and samples.

    Examples
    --------
    >>> import zarr
    >>> from zarr_dask_stream.chunks import stream_chunks
    >>> array = zarr.create_array({}, shape=(10, 4), chunks=(4, 2), dtype="i2")
    >>> samples = Samples.of(stream_chunks(array), 0, shuffled=False)
    >>> samples.count, samples.numbers, samples.length, samples.odd, samples.options.plan.grid.chunks
    (10, range(0, 3), 4, ((2, 2),), (4, 4))
    """

    options: Options
    axis: int
    axes: int | dict[str, int]
    names: tuple[Any, ...] | int | None
    numbers: range | Numbers
    length: int
    odd: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, streams: Any, axis: Any, *, shuffled: bool) -> Samples:
        """Check a stream, or several, and recut what has to be.

        Parameters
        ----------
        streams : ChunkStream, or sequence or mapping of them
            Several: their samples are taken side by side.
        axis : int or str
            Of the samples, in each array; a number or a dimension name.
        shuffled : bool
            Whether the items will be read in random order: then small chunks of a shard are read together.

        Raises
        ------
        UsageError
            If the number of samples can't be known before the read, there is no such axis, arrays differ in
            their samples, or there are none.
        """
        if isinstance(streams, (Mapping, list, tuple)):
            many = list(streams.values() if isinstance(streams, Mapping) else streams)
            names: tuple[Any, ...] | int | None = tuple(streams) if isinstance(streams, Mapping) else len(many)
            options, number = _side_by_side([_options(stream) for stream in many], axis)
        else:
            options, names = _options(streams), None
            number = _axis(axis, options)
            options = _whole(options, number, shuffled=shuffled)
        numbers, length, odd = _lie(options.plan, number)
        return cls(options, number, _data_axes(options, number, axis), names, numbers, length, odd)

    @property
    def count(self) -> int:
        """Samples in all."""
        return len(self.numbers) * self.length - sum(self.length - n for _, n in self.odd)

    @property
    def dtypes(self) -> list[np.dtype[Any]] | None:
        """Of the arrays of a batch; None where a function of the caller's makes them."""
        o = self.options
        if _mapped(o):
            return None
        decoded: dict[str, np.dtype[Any]] = {}
        for stage in o.stages:
            if isinstance(stage, Decode) and isinstance(stage.fn, Decoder):
                decoded.update(stage.fn.dtypes)
        if o.blocks is None or not o.blocks.named:
            return list(decoded.values()) or [o.spec.dtype]
        return [decoded.get(name, m.spec.dtype) for name, m in o.blocks.members if not m.coord]

    @property
    def sample_nbytes(self) -> int | None:
        """Decoded bytes of one sample; None where a function of the caller's makes it."""
        return None if self.dtypes is None else self.options.item_nbytes // self.options.plan.grid.chunks[self.axis]

    def deck(self, key: int | None) -> Deck:
        """Return the items in random order, or as they lie for None."""
        return Deck(self.numbers, self.length, self.odd, None if key is None else Permutation(len(self.numbers), key))

    def stream(self, first: tuple[int, ...], deck: Deck, stretch: tuple[int, int]) -> ChunkStream:
        """Return a stream of some items by number, and then a stretch of the deck."""
        plan = self.options.plan
        described = {one.name: getattr(plan, one.name) for one in dataclasses.fields(ChunkPlan)}
        walk = DeckPlan(**{**described, "where": None}, first=first, deck=deck, stretch=stretch)
        return ChunkStream(dataclasses.replace(self.options, plan=walk))

    def dress(self, data: Any) -> Any:
        """Give arrays that were put side by side the names that the caller gave them."""
        if self.names is None:
            return data
        arrays = data.values() if isinstance(data, Mapping) else data
        return tuple(arrays) if isinstance(self.names, int) else dict(zip(self.names, arrays, strict=True))


# -- what is refused ----------------------------------------------------------------------------------


def _options(stream: Any) -> Options:
    """Return what a stream was asked for, if the number of its samples is known before it is read."""
    if not isinstance(stream, ChunkStream):
        raise UsageError(
            f"a loader needs a stream of zds.stream_chunks(...), or several in a tuple or dict, got "
            f"{type(stream).__name__}: {stream!r}"
        )
    o = stream._options  # noqa: SLF001  # the façade's other half
    _check_items(o)
    if o.missing == "skip":
        raise UsageError(
            'a loader must know the number of samples before they are read: missing="fill" hands out fill values, '
            'missing="raise" stops'
        )
    if o.on_error != "raise":
        raise UsageError(
            'a loader can\'t go on without a chunk, as each epoch has the same samples: leave on_error="raise", and '
            "leave chunks that are known to be bad out with where="
        )
    if o.checkpoint is not None:
        raise UsageError("a loader keeps its own place: use loader.state_dict() instead of checkpoint=")
    if not o.ordered:
        raise UsageError("a loader hands batches out in an order of its own, by its seed: leave ordered=True")
    return o


def _check_items(o: Options) -> None:
    """Refuse what makes other items, fewer items, or items that overlap."""
    for there, what in ((o.fold, ".reduce(...)"), (o.batch, ".batch(...)"), (o.route, ".route(...)")):
        if there is not None:
            raise UsageError(f"a loader makes batches of items: give it the stream before {what}")
    if o.target is not None or o.sink is not None:
        raise UsageError("a loader makes batches of items: give it the stream before .to_zarr(...)")
    if o.limit is not None:
        raise UsageError("a loader needs the whole stream: select samples with region= instead of .take(...)")
    if any(isinstance(stage, Filter) for stage in o.stages):
        raise UsageError(
            "a loader must know the number of samples before they are read, and .filter(...) decides later: "
            "leave chunks out with where= or region="
        )
    if type(o.plan) is not ChunkPlan:
        raise UsageError("a loader cuts slices itself: give it zds.stream_chunks(...), with region= if need be")
    if o.plan.halo and not _mapped(o):
        raise UsageError("items with a halo overlap: put a .map(...) after .halo(...) that returns the core alone")


def _mapped(o: Options) -> bool:
    """Whether a function of the caller's makes the items."""
    return any(not isinstance(stage, Decode) for stage in o.stages)


def _axis(axis: Any, o: Options) -> int:
    """Return the number of the samples' axis in the items' grid."""
    dims = o.blocks.dims if o.blocks is not None and o.blocks.dims else None
    if dims is None and o.labels is not None:
        dims = o.labels.dims
    if not o.plan.grid.ndim:
        raise UsageError("a loader needs an array with axes, and this one has none")
    if dims is None:
        return axis_number(axis, o.spec, "axis")
    if isinstance(axis, str) and axis in dims:
        return dims.index(axis)
    number = as_whole(axis)
    if number is not None and -len(dims) <= number < len(dims):
        return number % len(dims)
    raise UsageError(f"axis names axis {axis!r}, and the items have axes 0 to {len(dims) - 1} called {_list(dims)}")


def _list(names: Sequence[Any]) -> str:
    return ", ".join(map(repr, names))


def _data_axes(o: Options, number: int, axis: Any) -> int | dict[str, int]:
    """Return along which axis of an item's data the samples lie."""
    if _mapped(o):
        return index(axis) if not isinstance(axis, str) else number
    if o.blocks is None or not o.blocks.named:
        return number
    members = [(name, member) for name, member in o.blocks.members if not member.coord]
    for name, member in members:
        if number not in member.axes:
            raise UsageError(f"variable {name!r} does not lie along axis {axis!r} of the samples: leave it out")
    return {name: member.axes.index(number) for name, member in members}


# -- items of whole samples ---------------------------------------------------------------------------


def _whole(o: Options, axis: int, *, shuffled: bool) -> Options:
    """Recut a stream whose items hold parts of samples, and one of small chunks in shards."""
    plan = o.plan
    chunks = list(plan.grid.chunks)
    split = [a for a in range(plan.grid.ndim) if a != axis and plan.stop[a] - plan.start[a] > 1]
    for a in split:
        chunks[a] = plan.grid.shape[a]
    plain = o.blocks is None and not _mapped(o) and plan.where is None
    if shuffled and plain:
        chunks[axis] = _run_of_shard(o.spec, axis, chunks)
    if chunks == list(plan.grid.chunks):
        return o
    if _mapped(o) or plan.where is not None:
        what = ".map(...)" if _mapped(o) else "where="
        wanted = ", ".join("None" if a == axis else "-1" for a in range(plan.grid.ndim))
        raise UsageError(
            f"chunks of {list(plan.grid.chunks)} hold parts of samples, and {what} speaks of chunks: put "
            f".rechunk(({wanted})) before .map(...), and select with region= instead of where="
        )
    return _recut(o, o.blocks or Blocks.of(o.spec, o.spec.chunks, plan.halo), chunks)


def _recut(o: Options, blocks: Blocks, chunks: Sequence[int]) -> Options:
    grid = dataclasses.replace(blocks.grid, chunks=tuple(max(c, 1) for c in chunks))
    blocks = dataclasses.replace(blocks, grid=grid)
    return dataclasses.replace(o, blocks=blocks, plan=dataclasses.replace(o.plan, grid=blocks.grid))


def _run_of_shard(spec: ArraySpec, axis: int, chunks: Sequence[int]) -> int:
    """Return how many samples of a shard to read together: an even part of it, of bounded size."""
    length = chunks[axis]
    if spec.shards is None:
        return length
    parts = spec.shards[axis] // length
    row = math.prod(chunks) * spec.item_nbytes
    return length * max(n for n in range(1, parts + 1) if parts % n == 0 and (n == 1 or n * row <= _LARGE))


def _side_by_side(many: list[Options], axis: Any) -> tuple[Options, int]:
    """Put arrays side by side: boxes of as many samples of each, whole along all other axes."""
    if not many:
        raise UsageError("a loader needs at least one stream")
    for o in many:
        if o.stages or o.blocks is not None or o.plan.where is not None:
            raise UsageError(
                "streams that are loaded side by side are plain: map the batches instead of .map(...), select with "
                "region= instead of where=, leave .rechunk(...) to the loader, and take zds.stream_dataset(...) for "
                "arrays of a group"
            )
    numbers = [_axis(axis, o) for o in many]
    spans = [o.plan.box[a] for o, a in zip(many, numbers, strict=True)]
    if len({(span.start, span.stop) for span in spans}) > 1:
        found = ", ".join(f"{o.spec.url} has {s.start}:{s.stop}" for o, s in zip(many, spans, strict=True))
        raise UsageError(f"streams that are loaded side by side need the same samples: {found} along axis {axis!r}")
    shape, box, members = [0], [spans[0]], []
    for name, (o, number) in enumerate(zip(many, numbers, strict=True)):
        spec = o.spec
        axes = []
        for a, n in enumerate(spec.shape):
            axes.append(0 if a == number else len(shape))
            if a != number:
                shape.append(n)
                box.append(o.plan.box[a])
        shape[0] = min(shape[0] or spec.shape[number], spec.shape[number])
        members.append((str(name), Member(spec, tuple(axes))))
    chunks = (_common_length([(o.spec, a) for o, a in zip(many, numbers, strict=True)]), *shape[1:])
    blocks = Blocks(ChunkGrid(tuple(shape), tuple(max(c, 1) for c in chunks)), tuple(members), named=True)
    return dataclasses.replace(many[0], blocks=blocks, plan=ChunkPlan(blocks.grid, tuple(box))), 0


def _common_length(arrays: Sequence[tuple[ArraySpec, int]]) -> int:
    """Return how many samples of several arrays to read together.

    Whole chunks of the heaviest array, and so many of them that of the others, whose chunks may be read
    for two items, no more is read than is used.
    """
    weights = [spec.nbytes // max(spec.shape[axis], 1) for spec, axis in arrays]
    heaviest, its_axis = arrays[weights.index(max(weights))]
    unit, total = heaviest.chunks[its_axis], max(sum(weights), 1)
    length = unit
    while length * total <= _LARGE and length < heaviest.shape[its_axis]:
        used = length * total
        read = sum(_touched(length, s.chunks[a], s.shape[a]) * w for (s, a), w in zip(arrays, weights, strict=True))
        if read <= 2 * used:
            break
        length += unit
    return length


def _touched(length: int, chunk: int, whole: int) -> int:
    """Return how many places along an axis lie in the chunks that a run of `length` touches, at most."""
    if length % chunk == 0:
        return length
    return min((-(-(length - 1) // chunk) + 1) * chunk, whole)


def _lie(plan: ChunkPlan, axis: int) -> tuple[range | Numbers, int, tuple[tuple[int, int], ...]]:
    """Return the numbers of the items along an axis, their length, and those of another length."""
    numbers: range | Numbers
    if not plan.box_size:
        numbers = range(0)
    elif plan.where is None:
        place = list(plan.start)
        first = plan.grid.number(place)
        place[axis] += 1
        step = plan.grid.number(place) - first if place[axis] < plan.grid.grid_shape[axis] else 1
        numbers = range(first, first + step * plan.box_size, step)
    else:
        numbers = np.fromiter(plan, np.int64)
    if not len(numbers):
        raise UsageError("there are no samples: the region is empty, or where= refuses every chunk")
    length = plan.grid.chunks[axis]
    ends = {0: int(numbers[0]), len(numbers) - 1: int(numbers[-1])}
    spans = {place: plan.region(number)[axis] for place, number in ends.items()}
    return numbers, length, tuple((at, s.stop - s.start) for at, s in spans.items() if s.stop - s.start != length)
