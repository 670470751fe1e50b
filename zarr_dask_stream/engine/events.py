"""What can happen to a stream: one vocabulary for the machine, its observers and replay logs.

Three kinds of frozen records live here:

- *outcomes*, what a worker says of a batch of chunks (`BatchResult`, `Failure`);
- *inputs* of the supervisor (`BatchDone`, `BatchLost`, `Tick`, `Threads`);
- *notices* for observers (`RunStarted` ... `RunFinished`), which a `Callback` or a `Report` folds.

Every planned chunk has exactly one terminal notice: it was emitted, filtered, skipped as missing,
dead-lettered or cancelled. Times are seconds on the clock of the run, which starts at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any

__all__ = [
    "Batch",
    "BatchDone",
    "BatchFinished",
    "BatchHedged",
    "BatchLost",
    "BatchResult",
    "BatchStats",
    "BatchSubmitted",
    "Blame",
    "Callback",
    "Category",
    "ChunkDeadLettered",
    "ChunkRetried",
    "ChunksCancelled",
    "ChunksEmitted",
    "ChunksFiltered",
    "ChunksSkipped",
    "ClusterChanged",
    "DeadLetter",
    "Failure",
    "Input",
    "Notice",
    "RunFinished",
    "RunStarted",
    "SlowedDown",
    "Threads",
    "Tick",
    "WorkerRetired",
]


class Category(Enum):
    """What kind of failure it was: what `RetryPolicy` judges by."""

    TRANSIENT = "transient"
    THROTTLED = "throttled"
    TIMEOUT = "timeout"
    CORRUPT = "corrupt"
    CREDENTIALS = "credentials"
    MISSING = "missing"
    PERMANENT = "permanent"
    FUNCTION = "function"
    CLUSTER = "cluster"
    NOT_VISIBLE = "not visible"


class Blame(Enum):
    """How far a batch is to blame for the death of the worker it was on."""

    NONE = "none"
    SHARED = "shared"
    SOLE = "sole"


# -- outcomes ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Batch:
    """Chunks that travel in one task.

    `ranges` are linear chunk numbers; `nbytes` is what their decoded data can take at most. A `suspect`
    batch was on a worker that died: an executor keeps suspects to one at a time on any worker, bound to
    it, so that each costs one worker at most and the blame has an address. A `fresh` one is of chunks that
    go out for the first time.
    """

    id: int
    ranges: tuple[range, ...]
    count: int
    nbytes: int
    attempt: int = 1
    suspect: bool = False
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """One attempt at one chunk that failed. The worker says what happened; the client judges.

    `error` is the exception itself where it survives pickling, else None: then `error_type` and
    `message` are all there is.
    """

    number: int
    category: Category
    error_type: str
    message: str
    retryable: bool = False
    error: BaseException | None = None
    traceback: str = ""
    worker: str = ""


@dataclass(slots=True)
class BatchStats:
    """Where the time of one batch went on its worker, seconds and bytes.

    `fetch_s` adds up what each request took; on a remote store many are under way at once, and it exceeds `wall_s`.
    `again` counts chunks of boxes that were read again within the batch, `throttled` those of them for which
    the store had asked for less.
    """

    setup_s: float = 0.0
    fetch_s: float = 0.0
    decode_s: float = 0.0
    compute_s: float = 0.0
    wall_s: float = 0.0
    bytes_stored: int = 0
    bytes_decoded: int = 0
    bytes_result: int = 0
    bytes_written: int = 0
    latency: dict[int, int] = field(default_factory=dict)
    worker: str = ""
    zombies: int = 0
    hedges: int = 0
    again: int = 0
    throttled: int = 0
    filled: int = 0

    @property
    def waited_s(self) -> float:
        """How long the batch's thread waited for the store: requests overlap, and are part of its own time."""
        return min(self.fetch_s, max(self.wall_s - self.setup_s - self.decode_s - self.compute_s, 0.0))


@dataclass(slots=True)
class BatchResult:
    """What became of each chunk of a batch.

    `numbers` and `values` run in parallel; `missing` are those of `numbers` that came from the fill
    value. `unattempted` chunks were not tried (the batch was cut short) and keep their attempts; so do
    those that are `apart`, which have to be tried one by one: a function that was given them all hung.
    With a reduction, `values` is empty, `numbers` are the chunks folded and `partial` their fold.
    """

    numbers: list[int] = field(default_factory=list)
    values: Sequence[Any] = ()
    missing: frozenset[int] = frozenset()
    filtered: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    unattempted: list[int] = field(default_factory=list)
    apart: list[int] = field(default_factory=list)
    partial: Any = None
    stats: BatchStats = field(default_factory=BatchStats)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A chunk that was given up: what it was, and all that is known of why.

    Attributes
    ----------
    index : tuple of int
        Grid index.
    region : tuple of slice
        Place in array coordinates.
    attempts : int
        How many times it was tried.
    category, error_type, message : str
        Kind of failure, class name and text of the last error.
    reason : str
        Why it was not tried again.
    worker : str
        Address of the worker of the last attempt, where known.

    Examples
    --------
    >>> import zarr, zarr_dask_stream as zds
    >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4")
    >>> stream = zds.stream_chunks(array, concurrency=1, on_error="skip").map(lambda chunk: 1 // chunk.index[0])
    >>> [letter] = stream.run().dead_letters
    >>> letter.index, letter.attempts, letter.category, letter.message
    ((0,), 1, 'function', 'integer division or modulo by zero')
    """

    index: tuple[int, ...]
    region: tuple[slice, ...]
    attempts: int
    category: str
    error_type: str
    message: str
    reason: str = ""
    worker: str = ""
    traceback: str = field(default="", repr=False)
    error: BaseException | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(
        cls, failure: Failure, index: tuple[int, ...], region: tuple[slice, ...], attempts: int, reason: str
    ) -> DeadLetter:
        """Make one of the last failure of a chunk."""
        return cls(
            index=index,
            region=region,
            attempts=attempts,
            category=failure.category.value,
            error_type=failure.error_type,
            message=failure.message,
            reason=reason,
            worker=failure.worker,
            traceback=failure.traceback,
            error=failure.error,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: the region as [start, stop] pairs, without the exception."""
        return {
            "index": list(self.index),
            "region": [[s.start, s.stop] for s in self.region],
            "attempts": self.attempts,
            "category": self.category,
            "error_type": self.error_type,
            "message": self.message,
            "reason": self.reason,
            "worker": self.worker,
        }


# -- inputs of the supervisor -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BatchDone:
    """A batch came back; its chunks may have failed one by one. `transfer_s`: the way to the client."""

    batch: int
    result: BatchResult
    transfer_s: float = 0.0


@dataclass(frozen=True, slots=True)
class BatchLost:
    """A batch did not come back: its worker died, or the task itself could not run."""

    batch: int
    reason: str
    error: BaseException | None = None
    deaths: int = 1
    worker: str = ""
    blame: Blame = Blame.SOLE


@dataclass(frozen=True, slots=True)
class Tick:
    """Time went by, or the consumer made room."""


@dataclass(frozen=True, slots=True)
class Threads:
    """The cluster now has so many task threads on so many workers, or none for `waiting_s`."""

    threads: int
    workers: int
    waiting_s: float = 0.0


Input = BatchDone | BatchLost | Tick | Threads


# -- notices for observers --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Notice:
    """Something observers may want to know. `at`: seconds since the run began."""

    at: float

    def to_dict(self) -> dict[str, Any]:
        """Return the notice as plain data for JSON, with its name under "event"."""
        return {"event": type(self).__name__, **_plain(self)}


@dataclass(frozen=True, slots=True)
class RunStarted(Notice):
    """A run began.

    `total` counts the chunks this run has to do; None while a `where` predicate has not been walked to
    its end. `resumed` chunks were done by earlier runs on the same checkpoint. The run lies
    between the grid indices `box_start` and `box_stop` (empty: the whole grid). At most `max_chunks` (None: no bound
    of its own) and `max_nbytes` (0: not known) may be in flight.
    """

    total: int | None
    chunk_nbytes: int
    grid_shape: tuple[int, ...]
    url: str
    resumed: int = 0
    box_start: tuple[int, ...] = ()
    box_stop: tuple[int, ...] = ()
    max_chunks: int | None = None
    max_nbytes: int = 0


@dataclass(frozen=True, slots=True)
class BatchSubmitted(Notice):
    """A batch went to the cluster. In flight: chunks and decoded bytes, with this batch."""

    batch: Batch
    in_flight: int
    in_flight_bytes: int


@dataclass(frozen=True, slots=True)
class BatchFinished(Notice):
    """A batch came back or was lost.

    `elapsed_s`: since its submission; for `queued_s` of them other batches of the run had all threads. `filled`: chunks
    that were not stored.
    """

    batch: Batch
    stats: BatchStats | None
    elapsed_s: float
    transfer_s: float
    lost: str = ""
    filled: tuple[int, ...] = ()
    queued_s: float = 0.0

    @property
    def schedule_s(self) -> float:
        """What is left of `elapsed_s` beside the queue, the work and the results' way: what Dask took."""
        worked_s = 0.0 if self.stats is None else self.stats.wall_s
        return max(self.elapsed_s - worked_s - self.transfer_s - self.queued_s, 0.0)


@dataclass(frozen=True, slots=True)
class ChunksEmitted(Notice):
    """Terminal: the consumer, a reduction or a sink took these chunks."""

    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChunksFiltered(Notice):
    """Terminal: a filter stage dropped these chunks."""

    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChunksSkipped(Notice):
    """Terminal: these chunks are not stored and ``missing="skip"``.

    `count` alone tells how many where a listing showed whole stretches to be absent.
    """

    numbers: tuple[range, ...]
    count: int


@dataclass(frozen=True, slots=True)
class ChunkDeadLettered(Notice):
    """Terminal: a chunk was given up."""

    number: int
    letter: DeadLetter


@dataclass(frozen=True, slots=True)
class ChunksCancelled(Notice):
    """Terminal: so many planned chunks were never given out, because the run ended early."""

    count: int


@dataclass(frozen=True, slots=True)
class ChunkRetried(Notice):
    """A chunk failed and will be tried again after `delay_s`."""

    failure: Failure
    attempt: int
    delay_s: float


@dataclass(frozen=True, slots=True)
class BatchHedged(Notice):
    """A second copy of a straggling batch was started."""

    batch: Batch
    copy: Batch


@dataclass(frozen=True, slots=True)
class SlowedDown(Notice):
    """The store complained; `requests_per_s` is what the whole cluster may ask for from now on."""

    requests_per_s: float


@dataclass(frozen=True, slots=True)
class WorkerRetired(Notice):
    """A worker was restarted because so many of its threads hang in chunks that were given up."""

    worker: str
    zombies: int


@dataclass(frozen=True, slots=True)
class ClusterChanged(Notice):
    """The number of workers or threads changed. `waiting_s`: so long there has been no worker."""

    workers: int
    threads: int
    waiting_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RunFinished(Notice):
    """A run ended. `outcome`: "done", "stopped early" or "failed". `waited_s`: for the consumer."""

    outcome: str
    total: int
    consumer_s: float
    peak_chunks: int
    peak_bytes: int
    error: str = ""


class Callback:
    """Observer of a run: override what you want to hear of.

    A notice of class `ChunksEmitted` goes to ``on_chunks_emitted(notice)`` where there is such a
    method, and every notice goes to `on_notice`. An observer that raises is dropped with a log
    line; it never stops a stream.

    Examples
    --------
    >>> class Loud(Callback):
    ...     def on_run_finished(self, notice):
    ...         print("finished:", notice.outcome)
    >>> Loud().handle(RunFinished(1.0, "done", 4, 0.0, 2, 64))
    finished: done
    """

    def for_run(self) -> Callback:
        """Return the observer of a run that begins: this one, unless runs must be kept apart."""
        return self

    def on_notice(self, notice: Notice) -> None:
        """Hear of everything."""

    def handle(self, notice: Notice) -> None:
        """Pass one notice on to the methods that want it."""
        self.on_notice(notice)
        method = getattr(self, _method_name(type(notice).__name__), None)
        if method is not None:
            method(notice)


def _plain(value: Any) -> Any:
    """Turn records into dicts, ranges and slices into lists of their bounds, errors into text."""
    if is_dataclass(value):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, range):
        return [value.start, value.stop, value.step]
    if isinstance(value, slice):
        return [value.start, value.stop]
    if isinstance(value, BaseException):
        return type(value).__name__  # its text is beside it
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (tuple, list)) else value


@cache
def _method_name(name: str) -> str:
    return "on" + "".join(f"_{c.lower()}" if c.isupper() else c for c in name)
