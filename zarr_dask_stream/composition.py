"""What each stage makes of a stream: the options before it in, checked, and the options with it out.

A `ChunkStream` is nothing but its `Options`, and each of its stages is one function here. None of them reads data;
`written` looks at the place of the target.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from zarr_dask_stream.engine.cluster import memory_budget
from zarr_dask_stream.engine.retry import RetryPolicy
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.opened import Decoder
from zarr_dask_stream.options import Options, check_kind
from zarr_dask_stream.scalars import as_whole
from zarr_dask_stream.source.aligned import recut
from zarr_dask_stream.source.blocks import Blocks, parse_chunks
from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.source.halo import parse_halo
from zarr_dask_stream.source.store import store_errors
from zarr_dask_stream.source.target import check_writing
from zarr_dask_stream.source.writer import Verify
from zarr_dask_stream.stages.batch import BatchRule, MapBatch, Route
from zarr_dask_stream.stages.combine import Fold, Reducer, Ungrouped, as_reducer, check_data
from zarr_dask_stream.stages.each import Kind, each
from zarr_dask_stream.stages.layout import Items, as_dtype, as_lengths, lay_out
from zarr_dask_stream.stages.transform import Decode, Filter, Map, Stage, check_function
from zarr_dask_stream.stages.windows import InWindow, parse_along, parse_every

__all__ = [
    "batch_mapped",
    "batched",
    "filtered",
    "grouped",
    "haloed",
    "mapped",
    "rechunked",
    "reduced",
    "routed",
    "taken",
    "windowed",
    "written",
]

_CHOOSE = "batches and sinks take items, and a reduction folds them: choose one of them"


# -- other items than stored chunks ---------------------------------------------------------------------


def rechunked(o: Options, chunks: int | Sequence[int | None] | Mapping[int | str, int]) -> Options:
    """Make items boxes of this shape."""
    _check_recut(o, "rechunk")
    if o.together:
        raise UsageError("slices are boxes of their own: use stream_chunks(...).rechunk(...) for others")
    if o.plan.where is not None:
        raise UsageError(
            "where= is asked about stored chunks, and rechunk(...) makes other items: select with region=, or "
            "with .filter(...) after it"
        )
    if o.blocks is not None and o.blocks.named:
        return _recut(o, recut(o.blocks, chunks))
    return _recut(o, Blocks.of(o.spec, parse_chunks(chunks, o.spec), o.plan.halo))


def haloed(o: Options, depth: int | Sequence[Any] | Mapping[Any, Any], boundary: Any) -> Options:
    """Read so many elements around each item with it."""
    _check_recut(o, "halo")
    blocks = o.blocks or Blocks.of(o.spec, o.spec.chunks)
    depth, boundary = _numbered(o, depth), _numbered(o, boundary)
    for dtype in {member.spec.dtype for _, member in blocks.members if not member.coord}:
        halo = parse_halo(depth, boundary, o.plan.grid.shape, dtype)
    if o.stages and any(isinstance(edge, (int, float, complex)) for edge in halo.boundary):
        raise UsageError(
            "halo: a constant boundary is a stored value, and the items' values are decoded: use a word, or None"
        )
    return _recut(o, dataclasses.replace(blocks, halo=halo))


def _check_recut(o: Options, what: str) -> None:
    if any(not isinstance(stage, Decode) for stage in o.stages) or o.fold is not None or o.limit is not None:
        raise UsageError(f"put .{what}(...) before all other stages: it says what is read")


def _numbered(o: Options, given: Any) -> Any:
    """Replace names of dimensions by numbers of axes; what is no dimension is refused later."""
    dims = list(o.dims or ())
    if not isinstance(given, Mapping):
        return given
    return {dims.index(axis) if axis in dims else axis: one for axis, one in given.items()}


def _recut(o: Options, blocks: Blocks) -> Options:
    plan = dataclasses.replace(o.plan, grid=blocks.grid, halo=blocks.halo)
    return dataclasses.replace(o, blocks=blocks, plan=plan)


# -- stages of each item --------------------------------------------------------------------------------


def mapped(o: Options, fn: Callable[[Chunk], Any], *, dtype: Any, chunks: int | Sequence[int | None] | None) -> Options:
    """Call a function with each item."""
    check_function(fn, "map", "the chunk")
    return _staged(o, Map(fn, as_dtype(dtype), as_lengths(chunks)))


def filtered(o: Options, pred: Callable[[Chunk], Any]) -> Options:
    """Drop items after the read."""
    check_function(pred, "filter", "the chunk")
    if o.limit is not None:
        raise UsageError("put .filter(...) before .take(...): after it, fewer items than asked for would come")
    return _staged(o, Filter(pred))


def batch_mapped(o: Options, fn: Callable[..., Any], *, size: int | None, nbytes: int | str | None) -> Options:
    """Call a function with several items at once."""
    check_function(fn, "map_batch", "a batch of chunks")
    return _staged(o, MapBatch(fn, BatchRule(size=size, nbytes=None if nbytes is None else _nbytes(nbytes))))


def taken(o: Options, n: Any) -> Options:
    """End after so many items."""
    count = as_whole(n)
    if count is None or count < 0:
        raise UsageError(f"take needs a number of items >= 0, got {n!r}")
    return _with(o, limit=count if o.limit is None else min(o.limit, count))


def _staged(o: Options, stage: Stage) -> Options:
    return _with(o, stages=(*o.stages, stage))


def _with(o: Options, **changes: Any) -> Options:
    """Change what belongs before a reduction, a batch, a sink or a target; where one is there, refuse."""
    _check_no_target(o)
    if o.fold is not None:
        raise UsageError("a reduced stream has no chunks any more: put other stages before .reduce(...)")
    if o.batch is not None or o.route is not None:
        last = "route" if o.route is not None else "batch"
        raise UsageError(f".{last}(...) hands items out, as the last stage: put other stages before it")
    o = dataclasses.replace(o, **changes)
    if o.plan.labels is not None and not all(isinstance(stage, (Decode, Filter)) for stage in o.stages):
        o = dataclasses.replace(o, plan=dataclasses.replace(o.plan, labels=None))  # what comes out is no such array
    return o


def _check_no_target(o: Options) -> None:
    if o.sink is not None:
        raise UsageError("put .to_zarr(...) last: what is written is what comes out of the stages before it")


# -- reductions -----------------------------------------------------------------------------------------


def reduced(o: Options, reducer: Reducer | Mapping[str, Any] | Iterable[Reducer]) -> Options:
    """Fold the items into answers, by key and window where the options have them."""
    _check_no_target(o)
    if o.batch is not None or o.route is not None:
        raise UsageError(_CHOOSE)
    if o.fold is not None and not isinstance(o.fold.reducer, Ungrouped):
        raise UsageError("the stream is reduced already")
    if o.limit is not None:
        raise UsageError("take(...) hands out items, and a reduction folds them: use region= or where= instead")
    kinds = _kinds(o)
    reducer = as_reducer(reducer) if kinds is None else each(reducer, kinds)
    if not any(isinstance(stage, (Map, MapBatch)) for stage in o.stages):
        check_data(reducer, o.spec.dtype, len(o.spec.shape))
    fold = Fold(reducer) if o.fold is None else Fold(reducer, o.fold.key, o.fold.window)
    return dataclasses.replace(o, fold=fold)


def _kinds(o: Options) -> dict[str, Kind] | None:
    """Return what is known of the arrays of items that hold several; None where they hold something else."""
    if o.blocks is None or not o.blocks.named or any(not isinstance(s, (Decode, Filter)) for s in o.stages):
        return None
    decoded: dict[str, Any] = {}
    for stage in o.stages:
        if isinstance(stage, Decode) and isinstance(stage.fn, Decoder):
            decoded.update(stage.fn.dtypes)
    dims = o.blocks.dims or ()
    divided = [axis for axis, (a, b) in enumerate(zip(o.plan.start, o.plan.stop, strict=True)) if b - a > 1]
    return {
        name: Kind(
            decoded.get(name, member.spec.dtype),
            len(member.axes),
            tuple(dims[axis] for axis in divided if axis not in member.axes),
        )
        for name, member in o.blocks.members
        if not member.coord
    }


def grouped(o: Options, key: Callable[[tuple[int, ...]], Hashable]) -> Options:
    """Fold apart for each key; the reducer is still to come."""
    check_function(key, "group_by", "the grid index")
    if o.fold is not None and isinstance(o.fold.reducer, Ungrouped) and o.fold.key is None:
        return dataclasses.replace(o, fold=dataclasses.replace(o.fold, key=key))
    return _with(o, fold=Fold(Ungrouped(), key))


def windowed(
    o: Options,
    *,
    along: int | str | Sequence[int | str] | None,
    size: int | Sequence[int] | None,
    step: int | Sequence[int] | None,
    every: int | None,
    seconds: float | None,
    reset: bool,
) -> Options:
    """Fold apart for each window, or answer at triggers; the reducer is still to come."""
    key = None
    if o.fold is not None:
        if not isinstance(o.fold.reducer, Ungrouped) or o.fold.window is not None:
            raise UsageError("put one .window(...) before .reduce(...)")
        key = o.fold.key
    elif o.batch is not None or o.route is not None:
        raise UsageError(_CHOOSE)
    if along is None:
        if size is not None or step is not None or (every is None and seconds is None):
            raise UsageError("a window needs along= and size=, or every= chunks, or seconds=")
        return dataclasses.replace(o, fold=Fold(Ungrouped(), key, parse_every(every, seconds, reset)))
    if every is not None or seconds is not None or reset:
        raise UsageError("a window lies along axes, or is a trigger (every=, seconds=, reset=): choose one")
    if o.together:
        raise UsageError("slices are windows of their own: use stream_chunks(...).window(along=...)")
    windows = parse_along(o.plan, o.dims, along, size, step)
    plan = dataclasses.replace(o.plan, where=InWindow(windows, o.plan.where)) if windows.gaps else o.plan
    return dataclasses.replace(o, plan=plan, fold=Fold(Ungrouped(), key, windows))


# -- items together, and where they go --------------------------------------------------------------------


def batched(o: Options, *, size: int | None, nbytes: int | str | None, seconds: float | None) -> Options:
    """Hand items out in batches."""
    if size is None and nbytes is None and seconds is None:
        raise UsageError("a batch needs a bound: size=, bytes= or seconds=")
    most = o.limits.nbytes
    rule = BatchRule(size=size, nbytes=most if nbytes is None else min(_nbytes(nbytes), most), seconds=seconds)
    if o.fold is not None:
        raise UsageError(
            "a reduced stream hands out its answers one by one: leave .batch(...) out, and gather them in your loop"
        )
    return _with(o, batch=rule)


def _nbytes(amount: Any) -> int:
    try:
        return memory_budget(amount)
    except UsageError as error:
        raise UsageError(str(error).replace("max_bytes", "bytes", 1)) from None


def routed(o: Options, key: Callable[[Chunk], Any], sinks: Any, retry: RetryPolicy | None) -> Options:
    """Hand each item to one of several sinks."""
    check_function(key, "route", "the chunk")
    if not isinstance(sinks, Mapping) or not sinks:
        raise UsageError(f"route needs sinks, functions by key, {{name: function}}, got {sinks!r}")
    for name, sink in sinks.items():
        check_function(sink, f"the sink {name!r}", "a batch or a chunk")
    if o.fold is not None or o.route is not None:
        what = "a reduced stream hands out answers" if o.fold is not None else "the items have their sinks"
        raise UsageError(f"{what}: put one .route(...) at the end of a stream of chunks")
    check_kind("retry", RetryPolicy, retry)
    return dataclasses.replace(o, route=Route(key, dict(sinks)), sink_retry=retry)


def written(
    o: Options,
    target: Any,
    create: dict[str, Any],
    *,
    path: Any,
    storage_options: Mapping[str, Any] | None,
    overwrite: bool,
    verify: Verify,
) -> Options:
    """Write each item to its place in an array, which `create` describes where there is none."""
    _check_no_target(o)
    if o.fold is not None or o.batch is not None or o.route is not None:
        raise UsageError("to_zarr writes items: reduce, group_by, window, batch and route have no place before it")
    check_writing(overwrite, verify)
    if not isinstance(path, str):
        raise UsageError(f"path is text, the target's place inside the store, got {path!r}")
    check_kind("storage_options", Mapping, storage_options)
    with store_errors():
        layout = lay_out(
            Items(o.spec, o.plan, o.blocks, o.stages, limited=o.limit is not None),
            target,
            create,
            path=path,
            storage_options=storage_options,
            overwrite=overwrite,
            verify=verify,
            aside=f".zds-{uuid.uuid4().hex[:12] if o.checkpoint is None else o.checkpoint.token}",
            durable=o.checkpoint is not None,
        )
        if o.checkpoint is None and not layout.target.exists:
            layout.target.check_free()
    if layout.blocks is not o.blocks and layout.blocks is not None:
        o = dataclasses.replace(o, blocks=layout.blocks, plan=dataclasses.replace(o.plan, grid=layout.blocks.grid))
    return dataclasses.replace(o, target=layout.target, sink=layout.sink)
