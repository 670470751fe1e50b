"""How items have to lie so that every object of a target is whole in one of them, and what the target will be.

Rules
-----
1. A target that is made is as large as what the stream covers: a region of the source becomes all of the target.
   One that is there already, an open array, has either that shape, or the whole source's: then items keep their
   places.
2. Without other stages items are cut anew where they don't hold whole objects of the target: into boxes of one
   object, grown along each axis until they hold whole chunks of the source too, as far as 64 MiB allow.
3. With other stages items are what their functions were written for: they are never cut anew, but refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.scalars import as_whole
from zarr_dask_stream.source.array import ArraySpec
from zarr_dask_stream.source.blocks import Blocks
from zarr_dask_stream.source.grid import Index
from zarr_dask_stream.source.metadata import join
from zarr_dask_stream.source.selection import ChunkPlan
from zarr_dask_stream.source.target import Place, Target, check_options, existing_target, find_place, new_target
from zarr_dask_stream.source.template import complete_options
from zarr_dask_stream.source.writer import Verify, is_castable
from zarr_dask_stream.stages.sink import Placement, Sink
from zarr_dask_stream.stages.transform import Filter, Map, Stage

__all__ = ["Items", "Layout", "as_dtype", "as_lengths", "choose_boxes", "lay_out", "writes_empty"]

_MOST_GROWN = 2**26  # bytes of a box that is grown to hold whole chunks of the source
_LEAST_BOXES = 64  # of which a target is made, where growing is what decides


@dataclass(frozen=True)
class Items:
    """A stream, as far as the lie of its items matters.

    `limited` says that only the first of them are wanted.
    """

    spec: ArraySpec
    plan: ChunkPlan
    blocks: Blocks | None = None
    stages: tuple[Stage, ...] = ()
    limited: bool = False

    @property
    def mapped(self) -> bool:
        """Whether a function makes other data of them."""
        return any(not isinstance(stage, Filter) for stage in self.stages)


@dataclass(frozen=True)
class Layout:
    """A target, how items get there, and the boxes to read where they are not those of the stream."""

    target: Target
    sink: Sink
    blocks: Blocks | None


@dataclass(frozen=True)
class _Declared:
    """What the functions of a stream make of an item, as far as was said."""

    dtype: np.dtype[Any] | None  # None: nothing was said
    length: Index


def lay_out(
    items: Items,
    target: Any,
    options: Mapping[str, Any],
    *,
    path: str = "",
    storage_options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    verify: Verify = True,
    aside: str = "",
    durable: bool = False,
) -> Layout:
    """Plan how a stream is written to a target; nothing is written, and no more read than metadata.

    Parameters
    ----------
    items : Items
        The stream.
    target : Any
        What names a store, or an open `zarr.Array`.
    options : mapping
        What ``zarr.create_array`` takes, as far as was said.
    aside : str
        Name of a folder for files that are not whole yet.
    durable : bool
        Whether what is acknowledged has to survive a loss of power.

    Raises
    ------
    UsageError
        If it can't work: see the rules above.
    """
    blocks = items.blocks
    if blocks is not None and (blocks.named or len(blocks.members) > 1):
        raise UsageError("to_zarr writes one array, and this stream has several: stream each of them")
    check_options(options)
    declared = _declared(items)
    if isinstance(target, zarr.Array) and not path:
        made, placement = _existing(target, items.plan, declared, options, overwrite=overwrite)
    else:
        made, placement = _made(
            items, find_place(target, path, storage_options), declared, options, overwrite=overwrite
        )
    _check_apart(items, made)
    expected = _expected(items, declared, made.spec.dtype, options)
    boxes = _boxes(items, made, placement)
    sink = Sink(
        spec=made.spec,
        placement=placement,
        expected=expected,
        write_empty=writes_empty(options.get("config")),
        verify=verify,
        fresh=not made.exists,
        aside=join(made.spec.path, aside) if aside and made.spec.store.kind == "local" else "",
        durable=durable,
    )
    return Layout(made, sink, boxes)


def writes_empty(config: Any) -> bool:
    """Whether chunks of fill values are stored too, by the options of an array or zarr's own configuration."""
    given = (
        config.get("write_empty_chunks") if isinstance(config, Mapping) else getattr(config, "write_empty_chunks", None)
    )
    return bool(zarr.config.get("array.write_empty_chunks") if given is None else given)


def as_dtype(dtype: Any) -> np.dtype[Any] | None:
    """Return what a caller says of a function's result, or refuse what names no dtype."""
    try:
        return None if dtype is None else np.dtype(dtype)
    except TypeError as error:
        raise UsageError(f"dtype is what NumPy takes for one, got {dtype!r}") from error


def as_lengths(chunks: Any) -> tuple[int | None, ...] | int | None:
    """Return what a caller says of the shape of a function's result, or refuse what is none."""
    several = isinstance(chunks, (tuple, list))
    for one in chunks if several else (chunks,):
        if one is not None and (as_whole(one) or 0) < 1:
            raise UsageError(
                "chunks is the shape that a function makes of a full chunk: lengths from 1, None where it stays, got "
                f"{chunks!r}"
            )
    return tuple(chunks) if several else chunks


# -- what is declared -----------------------------------------------------------------------------


def _declared(items: Items) -> _Declared:
    chunks = items.plan.grid.chunks
    dtype, length = None, chunks
    for stage in items.stages:
        if isinstance(stage, Map):
            dtype = stage.dtype if stage.dtype is not None else dtype
            if stage.chunks is not None:
                length = _lengths(stage.chunks, chunks)
    return _Declared(dtype, length)


def _lengths(given: Any, chunks: Index) -> Index:
    lengths = tuple(given) if isinstance(given, (tuple, list)) else (given,) * len(chunks)
    if len(lengths) != len(chunks):
        raise UsageError(
            f".map(fn, chunks={given!r}) names {len(lengths)} axes, and items have {len(chunks)}: a function for a "
            "target keeps every axis, with length 1 where nothing else is left of it"
        )
    return tuple(n if length is None else int(length) for length, n in zip(lengths, chunks, strict=True))


def _expected(
    items: Items, declared: _Declared, dtype: np.dtype[Any], options: Mapping[str, Any]
) -> np.dtype[Any] | None:
    """Return the dtype that items must have; None where any that can be cast will do."""
    if items.mapped and declared.dtype is None and options.get("dtype") is not None:
        return None
    found = items.spec.dtype if declared.dtype is None else declared.dtype
    if not is_castable(found, dtype):
        raise UsageError(
            f"items hold {found}, and the target {dtype}, which is of another kind: cast them in a function, "
            f".map(fn, dtype={str(dtype)!r})"
        )
    return found


# -- the target -----------------------------------------------------------------------------------


def _made(
    items: Items, place: Place, declared: _Declared, options: Mapping[str, Any], *, overwrite: bool
) -> tuple[Target, Placement]:
    plan = items.plan
    placement = Placement(tuple(part.start for part in plan.box), plan.grid.chunks, declared.length)
    _check_begin(plan, placement)
    version = place.version_above()
    if version is not None:
        options = {"zarr_format": version, **options}
    recut = items.blocks is not None or declared.length != plan.grid.chunks
    completed = complete_options(
        items.spec,
        options,
        shape=placement.shape(plan.box),
        dtype=items.spec.dtype if declared.dtype is None else declared.dtype,
        chunks=declared.length if recut else None,
        keep_attributes=not items.mapped,
    )
    return new_target(place, completed, overwrite=overwrite), placement


def _existing(
    array: Any, plan: ChunkPlan, declared: _Declared, options: Mapping[str, Any], *, overwrite: bool
) -> tuple[Target, Placement]:
    extra = sorted({*options} - {"config"}) + ["overwrite"] * overwrite
    if extra:
        raise UsageError(
            f"the target is an open array and is written to as it is: leave {', '.join(extra)} out, or name its place "
            "to have it made anew"
        )
    target = existing_target(array)
    shape, step, length = target.spec.shape, plan.grid.chunks, declared.length
    whole = Placement((0,) * len(step), step, length)
    part = Placement(tuple(part.start for part in plan.box), step, length)
    whole_shape = whole.shape(tuple(slice(0, n) for n in plan.grid.shape))
    for placement, wanted in ((whole, whole_shape), (part, part.shape(plan.box))):
        if shape == wanted:
            _check_begin(plan, placement)
            return target, placement
    also = "" if plan.whole else f", or {part.shape(plan.box)} for the region alone"
    raise UsageError(f"the target has shape {shape}, and {whole_shape} is to be written{also}")


def _check_begin(plan: ChunkPlan, placement: Placement) -> None:
    """Refuse a region that begins inside an item whose length a function changes: what its part becomes is unknown."""
    places = zip(plan.box, plan.grid.begin, placement.step, placement.length, strict=True)
    for axis, (part, begin, step, length) in enumerate(places):
        if step != length and (part.start - begin) % step:
            raise UsageError(
                f"the region begins at {part.start} of axis {axis}, inside an item, and .map(fn, chunks=...) says only "
                f"what whole items become: begin at a multiple of {step}"
            )


def _check_apart(items: Items, target: Target) -> None:
    if Place(items.spec.store, items.spec.path).meets(target.place):
        raise UsageError(
            f"the target {target.place.url} is the source itself, or one lies inside the other: what is read would be "
            "written over. Choose another place"
        )


# -- items ----------------------------------------------------------------------------------------


def _boxes(items: Items, target: Target, placement: Placement) -> Blocks | None:
    """Return the boxes to read: those of the stream where they hold whole objects, else others."""
    plan, spec = items.plan, items.spec
    objects = target.spec.grid.shard_grid.chunks
    _check_edges(placement.region(plan.box) if len(plan.grid) else (), objects, target)
    if _aligned(plan, placement, objects):
        return items.blocks
    wanted = choose_boxes(objects, spec.chunks, target.spec.shape, spec.item_nbytes)
    what = (
        f"the target is stored in {'shards' if target.spec.shards else 'chunks'} of {list(objects)}, and items of "
        f"{list(placement.length)} hold parts of them, so that several tasks would write to one"
    )
    if items.mapped or plan.halo is not None:
        same = placement.step == placement.length
        advice = f"put .rechunk({wanted}) before the other stages, or " if same else ""
        raise UsageError(f"{what}: {advice}choose chunks= and shards= of which items hold whole ones")
    if items.stages or plan.where is not None or items.limited:
        raise UsageError(
            f"{what}. Items can be cut anew, but where=, .filter(...) and .take(...) speak of those that there are: "
            f"put .rechunk({wanted}) before them, or choose chunks= and shards= of which items hold whole ones"
        )
    return Blocks.of(spec, wanted, origin=placement.start if any(placement.start) else None)


def _check_edges(region: Sequence[slice], objects: Index, target: Target) -> None:
    """Refuse a part of an array that is there whose edges lie inside stored objects."""
    for axis, (part, length, n) in enumerate(zip(region, objects, target.spec.shape, strict=False)):
        if part.start % length or (part.stop % length and part.stop != n):
            raise UsageError(
                f"the target's axis {axis} is stored in lengths of {length}, and {part.start}:{part.stop} of it is to "
                "be written: a region of an array that is there begins and ends where its stored objects do"
            )


def _aligned(plan: ChunkPlan, placement: Placement, objects: Index) -> bool:
    """Whether every border between two items lies on a border between two objects."""
    axes = zip(plan.box, plan.grid.begin, placement.start, placement.step, placement.length, objects, strict=True)
    for part, begin, start, step, length, size in axes:
        border = begin + ((part.start - begin) // step + 1) * step  # the first inside the region
        if border >= part.stop:
            continue
        first = border - start if step == length else (border - start) // step * length
        if first % size or (border + step < part.stop and length % size):
            return False
    return True


def choose_boxes(objects: Index, chunks: Index, shape: Index, item_nbytes: int) -> Index:
    """Return the shape of boxes that hold whole objects of a target, and whole chunks of a source as far as possible.

    Parameters
    ----------
    objects, chunks : tuple of int
        Shape of the target's objects and of the source's chunks.
    shape : tuple of int
        Shape of the target: a box need not be longer.
    item_nbytes : int
        Bytes of one element of the source. Boxes are grown to 64 MiB at most, and of a small array to a part of it:
        there should be work for every thread.

    Examples
    --------
    >>> choose_boxes((4, 6), (10, 2), (10_000, 10_000), 8)
    (20, 6)
    >>> choose_boxes((1000, 1000), (1024, 1024), (10**6, 10**6), 8)
    (4000, 2000)
    """
    boxes = list(objects)
    whole = [
        min(math.lcm(size, chunk), -(-max(n, 1) // size) * size)
        for size, chunk, n in zip(objects, chunks, shape, strict=True)
    ]
    budget = min(_MOST_GROWN, math.prod(shape) * item_nbytes // _LEAST_BOXES)

    def grow(axis: int, length: int) -> bool:
        fits = math.prod(boxes) // boxes[axis] * length * item_nbytes <= budget
        if fits:
            boxes[axis] = length
        return fits

    for axis in sorted(range(len(boxes)), key=lambda axis: whole[axis] / objects[axis]):
        grow(axis, whole[axis])
    # Where whole chunks don't fit, the longer a box is, the fewer chunks are read for two of them.
    left = [axis for axis in range(len(boxes)) if boxes[axis] < whole[axis]]
    while left:
        axis = max(left, key=lambda axis: chunks[axis] / boxes[axis])
        if not grow(axis, min(2 * boxes[axis], whole[axis])) or boxes[axis] == whole[axis]:
            left.remove(axis)
    return tuple(boxes)
