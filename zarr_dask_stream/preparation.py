"""What a run needs before it begins: work for its workers, how long tasks are, the chunks that are stored, a ledger."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable

import numpy as np

from zarr_dask_stream.engine.batching import BatchLimits
from zarr_dask_stream.engine.checkpoint import Ledger
from zarr_dask_stream.engine.identity import fingerprint, identity
from zarr_dask_stream.engine.task import Work
from zarr_dask_stream.errors import StoreError
from zarr_dask_stream.options import Options
from zarr_dask_stream.source.assemble import stored_blocks
from zarr_dask_stream.source.reader import stored_numbers
from zarr_dask_stream.source.selection import Sieve
from zarr_dask_stream.stages.batch import MapBatch
from zarr_dask_stream.stages.windows import Every

__all__ = ["batch_limits", "ledger_of", "stored_only", "work_of"]

logger = logging.getLogger("zarr_dask_stream")

_LOCAL_KINDS = ("local", "zip", "memory")
_LOCAL_TASK_S = 0.25
_REMOTE_TASK_S = 1.0
_LOCAL_LEAST_S, _REMOTE_LEAST_S = 0.04, 0.15
_FIRST_REMOTE, _FIRST_REMOTE_BYTES = 8, 2**21


def work_of(options: Options, *, discard: bool = False) -> Work:
    """Return what workers have to know of a stream; with `discard`, values stay with them."""
    o = options
    return Work(
        spec=o.spec,
        box=o.plan.box,
        missing=o.missing,
        timeout=o.timeout,
        fetches=o.requests,
        hedge=o.hedge,
        stages=o.stages,
        fold=o.fold,
        retry=o.retry,
        discard=discard,
        blocks=o.blocks,
        labels=o.labels,
        sink=o.sink,
        fed=o.feed is not None,
    )


def batch_limits(options: Options) -> BatchLimits:
    """Return how long the tasks of a stream may get, and how large its first ones are."""
    # On a remote store the first and the last requests of a task are not overlapped: longer tasks, to the end.
    stores = [options.spec.store, *([] if options.sink is None else [options.sink.spec.store])]
    local = all(store.kind in _LOCAL_KINDS for store in stores)
    sizes = [stage.rule.size for stage in options.stages if isinstance(stage, MapBatch)]
    window = None if options.fold is None else options.fold.window
    most = window.chunks if isinstance(window, Every) else None
    limits = BatchLimits(
        target_s=_LOCAL_TASK_S if local else _REMOTE_TASK_S,
        least_s=_LOCAL_LEAST_S if local else _REMOTE_LEAST_S,
        # A few small objects far away take no longer than one.
        first=1 if local else max(min(_FIRST_REMOTE, _FIRST_REMOTE_BYTES // max(options.item_nbytes, 1)), 1),
        unit=max((size for size in sizes if size is not None), default=1),
    )
    return limits if most is None else dataclasses.replace(limits, chunks=min(limits.chunks, most))


def stored_only(options: Options, runs: Iterable[range]) -> Iterable[range]:
    """Leave out what a listing of the store shows to be absent; where it can't be listed, ask chunk by chunk."""
    try:
        if options.blocks is not None:
            numbers = stored_blocks(options.blocks)
        else:
            numbers = np.fromiter(stored_numbers(options.spec, options.plan.box), np.int64)
    except (StoreError, OSError) as error:
        logger.info("the store can't be listed, absent chunks are asked for one by one: %s", error)
        return runs
    return Sieve(runs, numbers)


def ledger_of(options: Options) -> Ledger:
    """Return the ledger of a stream, with all that makes it this stream and no other."""
    o, spec = options, options.spec
    assert o.checkpoint is not None
    about = {
        "array": spec.store.url,
        "path": spec.path,
        "shape": list(spec.shape),
        "chunks": list(o.plan.grid.chunks),
        "region": [[s.start, s.stop] for s in o.plan.box],
        "missing": o.missing,
        "stages": [type(stage).__name__.lower() for stage in o.stages],
        "where": o.plan.where is not None,
        "reduce": None if o.fold is None else type(o.fold.reducer).__name__,
        **({} if o.sink is None else {"target": o.sink.spec.url}),
    }
    parts = {
        "about": about,
        "metadata": spec.fingerprint if o.blocks is None else o.blocks.fingerprints,
        **({} if not o.plan.variant else {"variant": list(o.plan.variant)}),
        **({} if o.plan.halo is None else {"halo": [list(o.plan.halo.depth), list(o.plan.halo.boundary)]}),
        "where": identity(o.plan.where),
        "stages": identity(o.stages),
        "fold": identity(o.fold),
        **({} if o.feed is None else {"fed": True}),
        **({} if o.sink is None else {"sink": [o.sink.spec.url, o.sink.spec.fingerprint, identity(o.sink.placement)]}),
    }
    return Ledger(o.checkpoint, o.plan, fingerprint(parts), about)
