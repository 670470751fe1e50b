"""What a stream was asked to be: every option, checked, as one frozen value."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from zarr_dask_stream.engine.checkpoint import Checkpoint
from zarr_dask_stream.engine.cluster import check_client, memory_budget
from zarr_dask_stream.engine.events import Callback, DeadLetter
from zarr_dask_stream.engine.feed import Feed
from zarr_dask_stream.engine.retry import RetryPolicy
from zarr_dask_stream.engine.throttle import RateLimit
from zarr_dask_stream.engine.window import WindowLimits
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.scalars import as_real, as_whole
from zarr_dask_stream.source.array import ArraySpec
from zarr_dask_stream.source.blocks import Blocks
from zarr_dask_stream.source.hedging import Hedge
from zarr_dask_stream.source.labels import Labels
from zarr_dask_stream.source.selection import ChunkPlan, Missing
from zarr_dask_stream.source.target import Target
from zarr_dask_stream.stages.batch import BatchRule, Route
from zarr_dask_stream.stages.combine import Fold
from zarr_dask_stream.stages.sink import Sink
from zarr_dask_stream.stages.transform import Stage, check_function

__all__ = [
    "OnError",
    "Options",
    "Progress",
    "check_count",
    "check_kind",
    "run_options",
]

OnError = Literal["raise", "skip"] | Callable[[DeadLetter], Any]
Progress = bool | Callable[[int, int], Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything that was asked for, checked; a stream is this and nothing else."""

    spec: ArraySpec
    plan: ChunkPlan
    missing: Missing
    ordered: bool
    limits: WindowLimits
    retry: RetryPolicy
    timeout: float | None
    on_error: OnError
    progress: Progress
    callbacks: tuple[Any, ...]
    client: Any
    stages: tuple[Stage, ...] = ()
    fold: Fold | None = None
    limit: int | None = None
    rate_limit: RateLimit | None = None
    requests: int | None = None
    hedge: Hedge | None = None
    checkpoint: Checkpoint | None = None
    blocks: Blocks | None = None
    labels: Labels | None = None
    together: bool = False
    batch: BatchRule | None = None
    route: Route | None = None
    sink_retry: RetryPolicy | None = None
    target: Target | None = None
    sink: Sink | None = None
    feed: Feed | None = None

    @property
    def item_nbytes(self) -> int:
        """Decoded bytes of one item: a chunk, or a box that is put together."""
        return self.spec.chunk_nbytes if self.blocks is None else self.blocks.nbytes

    @property
    def dims(self) -> tuple[str | None, ...] | None:
        """Names of the axes of the items, or None where they have none."""
        if self.labels is not None:
            return self.labels.dims
        return self.spec.dimension_names if self.blocks is None or self.blocks.dims is None else self.blocks.dims

    def describe(self) -> str:
        """Return a line for whoever looks at the stream: the array, its items, what is done with them."""
        what = _typed(self.spec)
        if self.blocks is not None and self.blocks.named:
            arrays = (f"{name}: {_typed(member.spec)}" for name, member in self.blocks.members if not member.coord)
            what = f"{', '.join(arrays)} along {', '.join(self.blocks.dims or ()) or 'nothing'},"
        plan = self.plan
        words = ["ordered" if self.ordered else "as completed"]
        if self.limits.chunks is not None:
            words.append(f"concurrency={self.limits.chunks}")
        if not plan.whole or plan.where is not None:
            words.append(f"{plan.box_size:,} of them planned" if plan.where is None else "a selection")
        words += [type(stage).__name__.lower() for stage in self.stages]
        if self.fold is not None:
            words += ["reduce"] if self.fold.window is None else ["window", "reduce"]
        words += [name for name, there in (("batch", self.batch), ("route", self.route)) if there is not None]
        return f"{what} in {len(plan.grid):,} chunks of [{', '.join(map(str, plan.grid.chunks))}], {', '.join(words)}"


def _typed(spec: ArraySpec) -> str:
    return f"{spec.dtype}[{', '.join(map(str, spec.shape))}]"


def run_options(
    *,
    missing: Missing,
    ordered: bool,
    concurrency: int | None,
    max_bytes: int | str,
    retry: RetryPolicy | None,
    timeout: float | None,
    on_error: OnError,
    checkpoint: str | os.PathLike[str] | Checkpoint | None,
    progress: Progress,
    callbacks: Iterable[Any],
    client: Any,
) -> dict[str, Any]:
    """Check what every run can be told, whatever it reads or writes, and return it as `Options` has it."""
    check_count("concurrency", "chunks", concurrency)
    _check_choices(missing, ordered, progress, on_error)
    check_kind("retry", RetryPolicy, retry)
    _check_timeout(timeout)
    if callable(on_error):
        check_function(on_error, "on_error", "a DeadLetter")
    check_client(client)
    ledger = Checkpoint(url=checkpoint) if isinstance(checkpoint, (str, os.PathLike)) else checkpoint
    check_kind("checkpoint", Checkpoint, ledger)
    return {
        "missing": missing,
        "ordered": ordered,
        "limits": WindowLimits(chunks=as_whole(concurrency), nbytes=memory_budget(max_bytes)),
        "retry": retry if retry is not None else RetryPolicy(),
        "timeout": as_real(timeout),
        "on_error": on_error,
        "checkpoint": ledger,
        "progress": progress,
        "callbacks": _check_callbacks(callbacks),
        "client": client,
    }


def check_count(name: str, of: str, value: Any) -> None:
    """Refuse what is neither a positive whole number nor None."""
    if value is not None and (as_whole(value) or 0) < 1:
        raise UsageError(f"{name} is a number of {of}, at least one, or None, got {value!r}")


def check_kind(name: str, kind: type, value: Any) -> None:
    """Refuse what is neither of this class nor None."""
    if value is not None and not isinstance(value, kind):
        raise UsageError(f"{name} must be a {kind.__name__}, got {type(value).__name__}: {value!r}")


def _check_choices(missing: Any, ordered: Any, progress: Any, on_error: Any) -> None:
    """Refuse words and values that mean nothing here."""
    if not (isinstance(missing, str) and missing in ("fill", "skip", "raise")):
        raise UsageError(f'missing must be "fill", "skip" or "raise", got {missing!r}')
    if not isinstance(ordered, bool):
        raise UsageError(f"ordered must be True or False, got {ordered!r}")
    if not callable(progress) and not isinstance(progress, bool):
        raise UsageError(f"progress must be True, False or a function of (done, total), got {progress!r}")
    if callable(progress):
        check_function(progress, "progress", "done and total", arguments=2)
    if not callable(on_error) and not (isinstance(on_error, str) and on_error in ("raise", "skip")):
        raise UsageError(f'on_error must be "raise", "skip" or a function of a DeadLetter, got {on_error!r}')


def _check_timeout(timeout: Any) -> None:
    """Refuse what is neither seconds nor None."""
    if timeout is None:
        return
    if (as_real(timeout) or 0.0) <= 0:
        raise UsageError(f"timeout is seconds greater than 0, or None, got {timeout!r}")


def _check_callbacks(callbacks: Any) -> tuple[Any, ...]:
    """Return the observers as a tuple; one alone will do."""
    if callable(callbacks) or isinstance(callbacks, Callback):
        return (callbacks,)
    try:
        observers = tuple(callbacks)
    except TypeError:
        raise UsageError(f"callbacks must be a list of observers, got {callbacks!r}") from None
    for observer in observers:
        if not isinstance(observer, Callback) and not callable(observer):
            raise UsageError(f"a callback is a zds.Callback or a function of an event, got {observer!r}")
    return observers
